"""The command line: each verb is its flags and a few lines that call the library."""

from __future__ import annotations

import argparse
import codecs
import io
import os
import re
import signal
import subprocess
import sys
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

from . import __version__, card, compare, load, measure, plan, quantize, verify
from .errors import AaacError, AaacWarning, escaped

# The flag of each setting that the library's errors name in backquotes.
FLAGS = {
    "calibration": "--calib",
    "sequences": "--calib-sequences",
    "sequence_length": "--calib-length",
    "tensor_types": "--tensor-type",
    "feedback": "--no-feedback",
    "checkout": "--source",
    "texts": "--text",
    "n_ctx": "--ctx",
    "cache_types": "--cache-types",
    "output": "-o",
    "base": "--from",
}
_OTHERS = (
    "imatrix type embedding_type bpw size method seed device split_max_size resume "
    "text types backend arch plot comparison allow_requantize strict stock moments"
)
FLAGS |= {name: f"--{name.replace('_', '-')}" for name in _OTHERS.split()}

# Characters of our tables, for locales that do not have them.
PLAIN = {"±": "+-", "Δ": "delta "}


def main(argv: list[str] | None = None) -> int:
    """Run one verb. Status 0 for success, 1 for a verification that failed, 2 for bad input."""
    _print_anything()
    args = _parser().parse_args(argv)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:  # nohup ignores SIGHUP
            signal.signal(number, _interrupt)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", AaacWarning)
            warnings.showwarning = _show_warning
            return args.run(args) or 0
    except AaacError as e:
        print(f"aaac-gguf: error: {in_flags(str(e))}", file=sys.stderr)
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


def _print_anything() -> None:
    """Let standard output and error take every character, also in a locale that does not have it."""
    codecs.register_error("aaac_gguf.escaped", _escaped)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="aaac_gguf.escaped")


def _escaped(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    characters = error.object[error.start : error.end]
    return "".join(PLAIN.get(c, escaped(c)) for c in characters), error.end


def _show_warning(message: Warning | str, category: object, filename: str, lineno: int, *_: Any, **__: Any) -> None:
    print(f"aaac-gguf: warning: {in_flags(str(message))}", file=sys.stderr, flush=True)


def in_flags(message: str) -> str:
    """Return a message of the library with flags in the place of settings."""
    return re.sub(r"`(\w+)`", lambda setting: FLAGS.get(setting[1], setting[0]), message)


def _interrupt(number: int, frame: object) -> None:
    """Let SIGTERM and SIGHUP end a run as Ctrl-C does: nothing that looks whole stays, and a resumed run can go on."""
    raise KeyboardInterrupt(number)


def _parser() -> argparse.ArgumentParser:
    about = "4-bit GGUF files with two learned codebooks per matrix, and the llama.cpp that runs them"
    parser = argparse.ArgumentParser(prog="aaac-gguf", description=about)
    parser.add_argument("--version", action="version", version=f"aaac-gguf {__version__}")
    verbs = parser.add_subparsers(required=True, metavar="VERB", dest="verb")
    files = _add_convert, _add_measure, _add_verify, _add_dequantize, _add_inspect, _add_compare, _add_card
    for add in (*files, _add_demo, _add_llama):
        add(verbs)
    return parser


def _add_convert(verbs: Any) -> None:
    p = verbs.add_parser("convert", help="quantize a Hugging Face folder or a full-precision GGUF")
    flag = p.add_argument
    flag("source", metavar="SRC", help="Hugging Face model folder, full-precision GGUF file (or any shard of one), "
         "or a model on the Hugging Face Hub: hf://OWNER/NAME, or OWNER/NAME if there is no such path")  # fmt: skip
    flag("-o", "--output", type=Path, required=True, metavar="OUT.gguf")
    flag("--type", default="AAAC4_G16", help="type of the matrices: AAAC4_G16 (default), AAAC4_G32, AAAC4_G128; "
         "or for stock llama.cpp one of llama-quantize's mixtures (Q2_K, Q3_K_M, IQ4_XS, Q4_K_M, Q5_K_M, Q6_K "
         "and others); Q8_0, BF16, F16, F32")  # fmt: skip
    flag("--embedding-type", metavar="TYPE",
         help="type of token_embd and output (default: that of the mixture; Q6_K for AAAC types)")  # fmt: skip
    flag("--tensor-type", action="append", default=[], metavar="REGEX=TYPE",
         help="type of the tensors whose name matches; may repeat, the last match wins")  # fmt: skip
    flag("--bpw", type=_bits, metavar="BITS", help="mixed precision: the types from Q2_K to Q8_0 that, measured "
         "matrix by matrix, keep the file within so many bits per weight")  # fmt: skip
    flag("--size", type=_size, metavar="SIZE", help="the same by bytes of the output: 900M, 4.2GiB, 900000000")
    flag("--stock", action="store_true", help="for --bpw and --size: only types that every llama.cpp runs")
    flag("--calib", metavar="TEXT", help="calibrate on a text file (.jsonl: a 'text' or 'messages' a line), "
         "on the program's own mixed text (bundled), on tokens sampled from the model (self), or not at all "
         "(none); default: bundled for a folder, none for a GGUF")  # fmt: skip
    flag("--imatrix", type=Path, metavar="FILE", help="take importance from a llama.cpp imatrix file (GGUF or .dat)")
    flag("--moments", type=Path, metavar="DIR", help="take the calibration from a folder that `measure` made")
    flag("--from", dest="base", type=Path, metavar="FILE.gguf", help="a finished file of the same model: only the "
         "tensors that --tensor-type gives another type are quantized, the others are copied")  # fmt: skip
    flag(
        "--calib-sequences", type=_positive, default=64, metavar="N", help="calibration sequences at most (default 64)"
    )
    flag("--calib-length", type=_positive, default=512, metavar="T",
         help="tokens per calibration sequence (default 512)")  # fmt: skip
    flag("--method", choices=("aaac", "paper"), default="aaac",
         help="aaac (default), or the paper's Algorithm 1 as published")  # fmt: skip
    flag("--no-feedback", action="store_true",
         help="round by importance alone, without error feedback: faster, less exact")  # fmt: skip
    flag("--seed", type=int, default=0,
         help="for sampled tokens and for the groups that codebooks are fitted to (default 0)")  # fmt: skip
    flag("--device", default="cpu", help="cpu (default) or cuda")
    flag("--split-max-size", type=_split_size, metavar="N(M|G)",
         help="write files of at most so many bytes of tensor data: 500M, 2G")  # fmt: skip
    flag("--strict", action="store_true", help="end with an error, not a warning, if calibration reaches "
         "less than 95 %% of the weights that it is for")  # fmt: skip
    flag("--allow-requantize", action="store_true",
         help="take a GGUF that is quantized to less than 8 bits, or to AAAC types, as the source")  # fmt: skip
    flag("--resume", action="store_true", help="continue the same conversion after it was interrupted")
    flag("--dry-run", action="store_true", help="print the plan and the exact size, write nothing")
    p.set_defaults(run=_convert)


def _convert(args: argparse.Namespace) -> None:
    from .reporting import conversions

    settings = {
        "type": args.type,
        "embedding_type": args.embedding_type,
        "tensor_types": [_override(text) for text in args.tensor_type],
        "calibration": args.calib,
        "imatrix": args.imatrix,
        "sequences": args.calib_sequences,
        "sequence_length": args.calib_length,
        "method": args.method,
        "feedback": not args.no_feedback,
        "seed": args.seed,
        "device": args.device,
        "bpw": args.bpw,
        "size": args.size,
        "stock": args.stock,
        "split_max_size": args.split_max_size,
        "allow_requantize": args.allow_requantize,
        "strict": args.strict,
        "moments": args.moments,
        "base": args.base,
    }
    if args.dry_run:
        print(conversions.plan_text(plan(args.source, args.output, **settings)))
    else:
        print(conversions.convert_text(quantize(args.source, args.output, resume=args.resume, **settings)))


def _add_measure(verbs: Any) -> None:
    p = verbs.add_parser("measure", help="run the calibration once, for many conversions with --moments")
    flag = p.add_argument
    flag("source", metavar="SRC", help="as in convert")
    flag("-o", "--output", type=Path, required=True, metavar="DIR", help="the folder to make")
    flag("--calib", metavar="TEXT", help="as in convert")
    flag("--imatrix", type=Path, metavar="FILE", help="as in convert")
    flag("--calib-sequences", type=_positive, default=64, metavar="N", help="as in convert")
    flag("--calib-length", type=_positive, default=512, metavar="T", help="as in convert")
    flag("--embedding-type", metavar="TYPE",
         help="if the embeddings or the output matrix will have less than 5 bits: their type")  # fmt: skip
    flag("--seed", type=int, default=0, help="as in convert")
    flag("--device", default="cpu", help="cpu (default) or cuda")
    flag("--strict", action="store_true", help="as in convert")
    flag("--allow-requantize", action="store_true", help="as in convert")
    p.set_defaults(run=_measure)


def _measure(args: argparse.Namespace) -> None:
    from .reporting import conversions

    report = measure(
        args.source,
        args.output,
        calibration=args.calib,
        imatrix=args.imatrix,
        embedding_type=args.embedding_type,
        sequences=args.calib_sequences,
        sequence_length=args.calib_length,
        seed=args.seed,
        device=args.device,
        allow_requantize=args.allow_requantize,
        strict=args.strict,
    )
    print(conversions.measure_text(report))


def _add_verify(verbs: Any) -> None:
    p = verbs.add_parser(
        "verify", help="check a file's structure, its tensors against the source, and llama.cpp's logits"
    )
    flag = p.add_argument
    flag("file", type=Path, metavar="FILE.gguf")
    flag("--source", metavar="SRC", help="what the file was made from; without it only the structure is checked")
    flag("--text", type=Path, metavar="FILE",
         help="text to compare logits on (default: the sample that ships with aaac-gguf)")  # fmt: skip
    flag("--imatrix", type=Path, metavar="FILE",
         help="weight tensor errors by this importance, if the source is a GGUF")  # fmt: skip
    flag("--gpu", action="store_true",
         help="decode every tensor on the GPU as well (needs CuPy) and compare it to the bit")  # fmt: skip
    p.set_defaults(run=_verify)


def _verify(args: argparse.Namespace) -> int:
    from .reporting import tables

    result = verify(args.file, args.source, text=args.text, imatrix=args.imatrix, gpu=args.gpu)
    print(tables.verification_text(result))
    return 1 if result.failures else 0


def _add_dequantize(verbs: Any) -> None:
    p = verbs.add_parser("dequantize", help="write the decoded weights as an ordinary GGUF that stock llama.cpp runs")
    p.add_argument("file", type=Path, metavar="FILE.gguf")
    p.add_argument("-o", "--output", type=Path, required=True, metavar="FULL.gguf")
    p.add_argument("--type", default="F32", help="F32 (default, exact), F16 or BF16")
    p.set_defaults(run=_dequantize)


def _dequantize(args: argparse.Namespace) -> None:
    from .conversion.dequantize import dequantize_file

    n_bytes = dequantize_file(args.file, args.output, args.type)
    print(f"wrote {args.output}: {n_bytes:,} bytes")


def _add_inspect(verbs: Any) -> None:
    p = verbs.add_parser("inspect", help="list tensors, types, bytes and codebooks")
    p.add_argument("file", type=Path, metavar="FILE.gguf")
    p.add_argument("--plot", type=Path, metavar="OUT.png", help="draw the codebooks")
    p.set_defaults(run=_inspect)


def _inspect(args: argparse.Namespace) -> None:
    from .reporting import inspection

    file = load(args.file)
    print(inspection.inspect_text(file))
    if args.plot:
        inspection.plot_codebooks(file, args.plot)


def _add_compare(verbs: Any) -> None:
    about = "quantize to several types, each at its best, and measure them against the full model"
    p = verbs.add_parser("compare", help=about)
    flag = p.add_argument
    flag("source", metavar="SRC",
         help="as in convert: a folder, a full-precision GGUF file, or a model on the Hugging Face Hub")  # fmt: skip
    flag("--types", metavar="LIST", help="types of convert, llama-quantize's recipes (Q4_K_M and others are made by "
         "both programs), finished .gguf files, separated by commas "
         "(default AAAC4_G16,Q4_0,IQ4_NL,Q4_K_M,Q5_K_M)")  # fmt: skip
    flag("-o", "--output", type=Path, default=Path("aaac-compare"), metavar="DIR",
         help="where to write (default ./aaac-compare)")  # fmt: skip
    flag("--text", type=Path, action="append", default=[], metavar="FILE",
         help="text to measure on; may repeat (default: one that the model writes)")  # fmt: skip
    flag("--calib", metavar="TEXT", help="as in convert, for all types")
    flag("--imatrix", type=Path, metavar="FILE", help="as in convert, for all types")
    flag("--embedding-type", default="Q6_K", metavar="TYPE",
         help="type of token_embd and output in every file (default Q6_K)")  # fmt: skip
    flag("--device", default="cpu", help="what calibration runs on: cpu (default) or cuda")
    flag("--ctx", type=_positive, default=512, metavar="N", help="tokens per chunk of text (default 512)")
    flag("--chunks", type=_positive, default=64, metavar="N", help="chunks of each text at most (default 64)")
    flag("--cache-types", metavar="LIST", help="measure each file with these types of the KV cache too: Q8_0,Q4_0")
    p.set_defaults(run=_compare)


def _compare(args: argparse.Namespace) -> None:
    from .reporting import tables

    result = compare(
        args.source,
        args.output,
        types=args.types and args.types.split(","),
        texts=args.text,
        calibration=args.calib,
        imatrix=args.imatrix,
        embedding_type=args.embedding_type,
        device=args.device,
        n_ctx=args.ctx,
        n_chunks=args.chunks,
        cache_types=args.cache_types.split(",") if args.cache_types else (),
    )
    print(tables.comparison_text(result))
    print(f"\nwrote {args.output / 'comparison.json'} and, with plots, {args.output / 'comparison.html'}")


def _add_card(verbs: Any) -> None:
    p = verbs.add_parser("card", help="write a model card for the Hugging Face Hub")
    p.add_argument("file", type=Path, metavar="FILE.gguf")
    p.add_argument("--comparison", type=Path, metavar="JSON", help="comparison.json of compare, for its tables")
    p.add_argument("-o", "--output", type=Path, metavar="README.md", help="where to write (default: print it)")
    p.set_defaults(run=_card)


def _card(args: argparse.Namespace) -> None:
    from .files.atomic import atomic
    from .files.output import check_output

    text = card(args.file, args.comparison)
    if args.output is None:
        print(text, end="")
        return
    check_output(args.output, args.file)
    with atomic(args.output) as f:
        f.write(text.encode(errors="backslashreplace"))
    print(f"wrote {args.output}")


def _add_demo(verbs: Any) -> None:
    p = verbs.add_parser("demo", help="the whole way with the bundled model: quantize, compare, verify, run")
    p.add_argument("-o", "--output", type=Path, default=Path("aaac-demo"), metavar="DIR",
                   help="where to write (default ./aaac-demo)")  # fmt: skip
    p.set_defaults(run=_demo)


def _demo(args: argparse.Namespace) -> int:
    from .reporting import demo

    return demo.run(args.output)


def _add_llama(verbs: Any) -> None:
    p = verbs.add_parser("llama", help="the patched llama.cpp: build it, run its tools")
    actions = p.add_subparsers(required=True, metavar="ACTION")
    p = actions.add_parser("build", help="fetch, patch and build; does nothing the second time")
    p.add_argument("--backend", choices=("cpu", "cuda", "vulkan"), default="cpu",
                   help="cpu (default), cuda (needs the CUDA toolkit) or vulkan (needs glslc)")  # fmt: skip
    p.add_argument("--arch", metavar="LIST",
                   help="CUDA architectures, for example 90 or '80;89' (default: this machine's)")  # fmt: skip
    what = p.add_mutually_exclusive_group()
    what.add_argument("--source", type=Path, metavar="DIR",
                      help="build a patched copy of your own llama.cpp checkout; DIR is left as it is")  # fmt: skip
    what.add_argument("--python", action="store_true",
                      help="build the wheel of llama-cpp-python instead of the tools, and print its path")  # fmt: skip
    p.set_defaults(run=_llama_build)
    p = actions.add_parser("run", help="run a built tool", prefix_chars="\0")  # everything after TOOL is the tool's
    p.add_argument("tool", metavar="TOOL")
    p.add_argument("args", nargs=argparse.REMAINDER, metavar="...")
    p.set_defaults(run=_llama_run)


def _llama_build(args: argparse.Namespace) -> None:
    from .llama import build, patch

    built = (
        build.build_wheel(args.backend, args.arch) if args.python else build.build(args.backend, args.arch, args.source)
    )
    print(patch.summary(), file=sys.stderr)
    print(built)


def _llama_run(args: argparse.Namespace) -> int:
    from .llama import tools

    return subprocess.run([tools.tool(args.tool), *args.args]).returncode


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _override(text: str) -> tuple[str, str]:
    pattern, equals, name = text.rpartition("=")
    if not equals or not pattern:
        raise AaacError(f"`tensor_types` {text}: expected REGEX=TYPE, for example 'ffn_down=Q8_0'")
    return pattern, name


def _split_size(text: str) -> int:
    number, unit = text[:-1], {"M": 10**6, "G": 10**9}.get(text[-1:])
    if not (unit and number.isdecimal() and int(number)):
        raise argparse.ArgumentTypeError(f"{text}: give a whole number of M or G (10^6, 10^9 bytes), for example 2G")
    return int(number) * unit


def _size(text: str) -> int:
    for suffix, unit in {"MiB": 2**20, "GiB": 2**30, "M": 10**6, "G": 10**9, "": 1}.items():
        with suppress(ValueError, OverflowError):
            if text.endswith(suffix) and (size := int(float(text.removesuffix(suffix)) * unit)) > 0:
                return size
    raise argparse.ArgumentTypeError(f"{text}: give a number of bytes, M, G, MiB or GiB, for example 4.2GiB")


def _bits(text: str) -> float:
    value = float(text)
    if not 0 < value < 32:
        raise argparse.ArgumentTypeError(f"{text} is not a number of bits per weight")
    return value
