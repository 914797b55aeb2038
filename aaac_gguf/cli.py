"""The command line: argparse only, every verb is a few lines into a module."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from . import __version__, resources
from .errors import AaacError
from .llama import tools


def main(argv: list[str] | None = None) -> int:
    """Run one verb. Status 0 for success, 1 for a verification that failed, 2 for bad input."""
    args = _parser().parse_args(argv)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:  # nohup ignores SIGHUP
            signal.signal(number, _interrupt)
    try:
        return args.run(args) or 0
    except AaacError as e:
        print(f"aaac-gguf: error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as e:
        number = e.args[0] if e.args else signal.SIGINT
        print(f"aaac-gguf: interrupted by {signal.Signals(number).name}", file=sys.stderr)
        return 128 + number
    except BrokenPipeError:  # the reader of our output, `head` for one, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as e:  # a file or a disk that no verb could foresee
        print(f"aaac-gguf: error: {AaacError(f'{e.filename or args.verb}: {e.strerror or e}')}", file=sys.stderr)
        return 2


def _interrupt(number: int, frame: object) -> None:
    """Let SIGTERM and SIGHUP end a run as Ctrl-C does: nothing that looks whole stays, and `convert --resume` can go on."""
    raise KeyboardInterrupt(number)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="aaac-gguf",
        description="4-bit GGUF files with two learned codebooks per matrix, and the llama.cpp that runs them",
    )
    parser.add_argument("--version", action="version", version=f"aaac-gguf {__version__}")
    verbs = parser.add_subparsers(required=True, metavar="VERB", dest="verb")

    p = verbs.add_parser("convert", help="quantize a Hugging Face folder or a full-precision GGUF")
    p.add_argument("source", metavar="SRC", help="Hugging Face model folder, full-precision GGUF file (any shard of a split one), "
                   "or a model on the Hugging Face Hub: hf://OWNER/NAME, or OWNER/NAME where no such path exists")  # fmt: skip
    p.add_argument("-o", "--output", type=Path, required=True, metavar="OUT.gguf")
    p.add_argument("--type", default="AAAC4_G16", help="type of the matrices: AAAC4_G16 (default), AAAC4_G32, AAAC4_G128; "
                   "Q4_0, IQ4_NL, Q5_K, Q6_K, Q8_0, which stock llama.cpp runs; BF16, F16, F32")  # fmt: skip
    p.add_argument(
        "--embedding-type",
        default="Q6_K",
        metavar="TYPE",
        help="type of token_embd and output in a 4-bit file (default Q6_K)",
    )
    p.add_argument(
        "--tensor-type",
        action="append",
        default=[],
        metavar="REGEX=TYPE",
        help="type of the tensors whose name matches; may repeat, the last match wins",
    )
    p.add_argument("--bpw", type=_bits, metavar="BITS", help="mixed precision: the types from AAAC4_G128 to Q8_0 that, measured matrix by matrix, "
                   "keep the file within so many bits per weight")  # fmt: skip
    p.add_argument("--size", type=_size, metavar="SIZE", help="the same by bytes of the output: 900M, 4.2GiB")
    p.add_argument("--calib", metavar="TEXT", help="calibrate on a text file, on tokens sampled from the model (self), or not at all (none); "
                   "default: self for a folder, none for a GGUF")  # fmt: skip
    p.add_argument(
        "--imatrix", type=Path, metavar="FILE", help="take importance from a llama.cpp imatrix file (GGUF or .dat)"
    )
    p.add_argument(
        "--calib-sequences", type=_positive, default=64, metavar="N", help="calibration sequences at most (default 64)"
    )
    p.add_argument(
        "--calib-length", type=_positive, default=512, metavar="T", help="tokens per calibration sequence (default 512)"
    )
    p.add_argument(
        "--method",
        choices=("aaac", "paper"),
        default="aaac",
        help="aaac (default), or the paper's Algorithm 1 as published",
    )
    p.add_argument(
        "--no-feedback",
        action="store_true",
        help="round by importance alone, without error feedback: faster, less exact",
    )
    p.add_argument(
        "--seed",
        type=int,
        default=0,
        help="for sampled tokens and for the groups that codebooks are fitted to (default 0)",
    )
    p.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    p.add_argument(
        "--split-max-size",
        type=_split_size,
        metavar="N(M|G)",
        help="write files of at most so many bytes of tensor data: 500M, 2G",
    )
    p.add_argument("--resume", action="store_true", help="continue the same conversion after it was interrupted")
    p.add_argument("--dry-run", action="store_true", help="print the plan and the exact size, write nothing")
    p.set_defaults(run=_convert)

    p = verbs.add_parser(
        "verify", help="check a file's structure, its tensors against the source, and llama.cpp's logits"
    )
    p.add_argument("file", type=Path, metavar="FILE.gguf")
    p.add_argument(
        "--source", metavar="SRC", help="what the file was made from; without it only the structure is checked"
    )
    p.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help="text to compare logits on (default: the sample that ships with aaac-gguf)",
    )
    p.add_argument(
        "--imatrix",
        type=Path,
        metavar="FILE",
        help="weight tensor errors by this importance, where the source is a GGUF",
    )
    p.add_argument(
        "--gpu",
        action="store_true",
        help="decode every tensor on the GPU as well (needs CuPy) and compare it to the bit",
    )
    p.set_defaults(run=_verify)

    p = verbs.add_parser("dequantize", help="write the decoded weights as an ordinary GGUF that stock llama.cpp runs")
    p.add_argument("file", type=Path, metavar="FILE.gguf")
    p.add_argument("-o", "--output", type=Path, required=True, metavar="FULL.gguf")
    p.add_argument("--type", default="F32", help="F32 (default, exact), F16 or BF16")
    p.set_defaults(run=_dequantize)

    p = verbs.add_parser("inspect", help="list tensors, types, bytes and codebooks")
    p.add_argument("file", type=Path, metavar="FILE.gguf")
    p.add_argument("--plot", type=Path, metavar="OUT.png", help="draw the codebooks")
    p.set_defaults(run=_inspect)

    p = verbs.add_parser(
        "compare", help="quantize to several types, each at its best, and measure them against the full model"
    )
    p.add_argument(
        "source",
        metavar="SRC",
        help="as in convert: a folder, a full-precision GGUF file, or a model on the Hugging Face Hub",
    )
    p.add_argument("--types", metavar="LIST", help="AAAC types, llama-quantize's recipes, finished .gguf files, separated by commas "
                   "(default AAAC4_G16,Q4_0,IQ4_NL,Q4_K_M,Q5_K_M)")  # fmt: skip
    p.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("aaac-compare"),
        metavar="DIR",
        help="where to write (default ./aaac-compare)",
    )
    p.add_argument(
        "--text",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="text to measure on; may repeat (default: one that the model writes)",
    )
    p.add_argument("--calib", metavar="TEXT", help="as in convert, for all types")
    p.add_argument("--imatrix", type=Path, metavar="FILE", help="as in convert, for all types")
    p.add_argument(
        "--embedding-type",
        default="Q6_K",
        metavar="TYPE",
        help="type of token_embd and output in every file (default Q6_K)",
    )
    p.add_argument("--device", default="cpu", help="what calibration runs on: cpu (default) or cuda")
    p.add_argument("--ctx", type=_positive, default=512, metavar="N", help="tokens per chunk of text (default 512)")
    p.add_argument("--chunks", type=_positive, default=64, metavar="N", help="chunks of each text at most (default 64)")
    p.set_defaults(run=_compare)

    p = verbs.add_parser("demo", help="the whole way with the bundled model: quantize, compare, verify, run")
    p.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("aaac-demo"),
        metavar="DIR",
        help="where to write (default ./aaac-demo)",
    )
    p.set_defaults(run=_demo)

    p = verbs.add_parser("llama", help="the patched llama.cpp: build it, run its tools")
    actions = p.add_subparsers(required=True, metavar="ACTION")
    p = actions.add_parser("build", help="fetch, patch and build; does nothing the second time")
    p.add_argument(
        "--backend", choices=("cpu", "cuda"), default="cpu", help="cpu (default), or cuda: needs the CUDA toolkit"
    )
    p.add_argument(
        "--arch", metavar="LIST", help="CUDA architectures, for example 90 or '80;89' (default: this machine's)"
    )
    what = p.add_mutually_exclusive_group()
    what.add_argument(
        "--source",
        type=Path,
        metavar="DIR",
        help="build a patched copy of your own llama.cpp checkout; DIR is left as it is",
    )
    what.add_argument(
        "--python",
        action="store_true",
        help="build the wheel of llama-cpp-python instead of the tools, and print its path",
    )
    p.set_defaults(run=_llama_build)
    p = actions.add_parser("run", help="run a built tool", prefix_chars="\0")  # everything after TOOL is the tool's
    p.add_argument("tool", metavar="TOOL")
    p.add_argument("args", nargs=argparse.REMAINDER, metavar="...")
    p.set_defaults(run=_llama_run)
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _split_size(text: str) -> int:
    number, unit = text[:-1], {"M": 10**6, "G": 10**9}.get(text[-1:])
    if not (unit and number.isdecimal() and int(number)):
        raise argparse.ArgumentTypeError(f"{text}: give a whole number of M or G (10^6, 10^9 bytes), for example 2G")
    return int(number) * unit


def _size(text: str) -> int:
    for suffix, unit in {"MiB": 2**20, "GiB": 2**30, "M": 10**6, "G": 10**9}.items():
        with suppress(ValueError):
            if text.endswith(suffix) and (size := int(float(text.removesuffix(suffix)) * unit)) > 0:
                return size
    raise argparse.ArgumentTypeError(f"{text}: give a number of M, G, MiB or GiB, for example 4.2GiB")


def _bits(text: str) -> float:
    value = float(text)
    if not 0 < value < 32:
        raise argparse.ArgumentTypeError(f"{text} is not a number of bits per weight")
    return value


def _convert(args: argparse.Namespace) -> None:
    from .conversion import convert, plan
    from .models import source
    from .reporting import tables as report

    if args.calib and args.imatrix:
        raise AaacError("--calib and --imatrix: give one of them")
    if args.bpw and args.size:
        raise AaacError("--bpw and --size: give one of them")
    path = source.locate(args.source)
    ggml_type = plan.parse_type(args.type, "--type")
    # Nobody waits for a calibration who only asked for 8 or 16 bits.
    calib = args.calib or ("none" if path.is_file() or ggml_type in (*plan.PLAIN_TYPES, plan.T.Q8_0) else "self")
    settings = convert.Settings(
        type=ggml_type,
        overrides=[plan.parse_override(text) for text in args.tensor_type],
        embedding=plan.parse_type(args.embedding_type, "--embedding-type"),
        calibration=convert.Calibration(calib, args.imatrix, args.calib_sequences, args.calib_length, args.seed),
        method=args.method,
        feedback=not args.no_feedback,
        device=args.device,
        split_max_size=args.split_max_size,
        bpw=args.bpw,
        size=args.size,
    )
    if args.dry_run:
        print(report.plan_text(*convert.dry_run(path, args.output, settings)))
    else:
        print(report.convert_text(convert.convert(path, args.output, settings, args.resume)))


def _verify(args: argparse.Namespace) -> int:
    from .files import gguf as gguf_io
    from .inference import kernels
    from .models import source
    from .reporting import tables as report
    from .reporting import verify

    differences = kernels.compare_file(gguf_io.read(args.file)) if args.gpu else []
    result = verify.verify(
        args.file, args.source and source.locate(args.source), args.text or resources.SAMPLE_TEXT, args.imatrix
    )
    result.failures += differences
    print(report.verification_text(result))
    return 1 if result.failures else 0


def _dequantize(args: argparse.Namespace) -> None:
    from .conversion import convert, plan

    ggml_type = plan.parse_type(args.type, "--type")
    if ggml_type not in plan.PLAIN_TYPES:
        raise AaacError(f"--type {args.type}: choose from F32, F16, BF16")
    n_bytes = convert.dequantize_file(args.file, args.output, ggml_type)
    print(f"wrote {args.output}: {n_bytes:,} bytes")


def _inspect(args: argparse.Namespace) -> None:
    from .files import gguf as gguf_io
    from .reporting import tables as report

    file = gguf_io.read(args.file)
    print(report.inspect_text(file))
    if args.plot:
        report.plot_codebooks(file, args.plot)


def _compare(args: argparse.Namespace) -> None:
    from .conversion import convert, plan
    from .models import source
    from .reporting import compare
    from .reporting import tables as report

    if args.calib and args.imatrix:
        raise AaacError("--calib and --imatrix: give one of them")
    path = source.locate(args.source)
    settings = convert.Settings(
        embedding=plan.parse_type(args.embedding_type, "--embedding-type"),
        calibration=convert.Calibration(args.calib or ("none" if path.is_file() else "self"), args.imatrix),
        device=args.device,
    )
    types = args.types.split(",") if args.types else compare.DEFAULT_TYPES
    result = compare.compare(path, args.output, compare.Options(types, args.text, settings, args.ctx, args.chunks))
    print(report.comparison_text(result))
    print(f"\nwrote {args.output / 'comparison.json'} and, with plots, {args.output / 'comparison.html'}")


def _demo(args: argparse.Namespace) -> int:
    from .reporting import demo

    return demo.run(args.output)


def _llama_build(args: argparse.Namespace) -> None:
    from .llama import build as llama
    from .llama import patch

    built = (
        llama.build_wheel(args.backend, args.arch) if args.python else llama.build(args.backend, args.arch, args.source)
    )
    print(patch.summary(), file=sys.stderr)
    print(built)


def _llama_run(args: argparse.Namespace) -> int:

    return subprocess.run([tools.tool(args.tool), *args.args]).returncode


if __name__ == "__main__":
    sys.exit(main())
