"""Quantized types of one model side by side: each at its own best, all with the same calibration, against the full model's predictions."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from gguf import LlamaFileType

from .. import __version__
from ..calibration import tokens as tokens_module
from ..conversion import convert
from ..conversion.calibrate import calibrate
from ..conversion.job import prepare
from ..conversion.settings import Settings
from ..errors import AaacError
from ..files import format as fmt
from ..files import gguf as gguf_io
from ..files.atomic import atomic
from ..files.gguf import GgufFile
from ..files.imatrix import Imatrix, write_imatrix
from ..llama import build as llama
from ..llama import evaluate, patch, tools
from ..models import checkpoint
from ..models.source import full_precision
from ..progress import progress
from ..resources import sha256
from . import page, verify

# What `convert` makes, and what llama-quantize makes by its own recipes, some of which give some matrices more bits.
OURS = tuple(fmt.TYPES)
STOCK = tuple(
    name.removeprefix("MOSTLY_")
    for name in LlamaFileType.__members__
    if name.startswith("MOSTLY_") and "F16" not in name
)
SELF_SEQUENCES = 20
DEFAULT_TYPES = ("AAAC4_G16", "Q4_0", "IQ4_NL", "Q4_K_M", "Q5_K_M")


Speed = tuple[float, float]  # tokens per second: mean, standard deviation


@dataclass
class Row:
    """One file: bits per weight over all tensors; seconds with calibration."""

    name: str
    n_bytes: int
    bits_per_weight: float
    seconds: float | None = None
    prompt_speed: Speed | None = None
    generation_speed: Speed | None = None
    scores: dict[str, evaluate.Score] = field(default_factory=dict)  # by text
    tensor_errors: dict[str, float] = field(default_factory=dict)  # relative squared error by tensor
    codebooks: dict[str, list[list[int]]] = field(default_factory=dict)  # by tensor


@dataclass
class Comparison:
    """What `compare` was asked and found, and what comparison.json holds. texts: sha256 by name; perplexities: of the full model, with error."""

    model: str
    full_type: str
    full_bytes: int
    texts: dict[str, str]
    settings: dict[str, object]
    perplexities: dict[str, tuple[float, float]] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)


@dataclass(frozen=True)
class Options:
    """The flags of `aaac-gguf compare`."""

    types: Sequence[str] = DEFAULT_TYPES
    texts: Sequence[Path] = ()
    settings: Settings = field(default_factory=Settings)
    n_ctx: int = 512
    n_chunks: int = 64


def compare(source: Path, folder: Path, options: Options) -> Comparison:
    """Make each type's file in `folder`, measure it, and write comparison.json and comparison.html there. Raises AaacError for bad input."""
    types = [_checked(name) for name in options.types]
    for text in options.texts:
        if not text.is_file():
            raise AaacError(f"--text {text}: no such file")
    if len({text.name for text in options.texts}) < len(options.texts):
        raise AaacError("--text: two texts of the same name; rename one")
    if not source.is_file():
        checkpoint.check(source)
    try:
        folder.mkdir(exist_ok=True)
    except OSError as e:
        raise AaacError(f"--output {folder}: cannot be made: {e.strerror}") from None
    llama.build()
    stem = source.stem if source.is_file() else source.resolve().name
    files = {name: Path(name) if name.endswith(".gguf") else folder / f"{stem}-{name}.gguf" for name in types}
    with (
        tempfile.TemporaryDirectory(dir=folder, prefix=".aaac-compare-") as name,
        full_precision(source, Path(name)) as full,
    ):
        texts = options.texts or [self_text(source, folder / "self-generated.txt", options.settings)]
        result = Comparison(
            model=stem,
            full_type=max(full.tensors.values(), key=lambda t: t.n_elements).tensor_type.name,
            full_bytes=full.path.stat().st_size,
            texts={text.name: sha256(text) for text in texts},
            settings={
                "calibration": options.settings.calibration_kind(source),
                "sequences": options.settings.sequences,
                "sequence_length": options.settings.sequence_length,
                "seed": options.settings.seed,
                "embedding": options.settings.embedding_type,
                "n_ctx": options.n_ctx,
                "n_chunks": options.n_chunks,
                "aaac_gguf": __version__,
                "llama_cpp_python": patch.upstream().version,
                "cpus": os.cpu_count(),
            },
        )
        bases = {text: Path(name) / f"{text.stem}-logits" for text in texts}
        for text, base in bases.items():  # first, because a text may be too short
            result.perplexities[text.name] = evaluate.save_logits(
                full.path, text, base, options.n_ctx, options.n_chunks
            )
        imatrix: tuple[Path | None, float] | None = None
        for type_name, path in progress(files.items(), desc="comparing", unit="type"):
            seconds = None
            if type_name in OURS:
                seconds = convert.convert(source, path, replace(options.settings, type=type_name)).seconds
            elif type_name in STOCK:
                imatrix = imatrix or measure_imatrix(source, full, options.settings, folder / f"{stem}-imatrix.gguf")
                start = time.monotonic()
                stock_quantize(full.path, path, type_name, imatrix[0], options.settings.embedding_type)
                seconds = time.monotonic() - start + imatrix[1]
            row = describe(type_name, path, full, seconds)
            row.scores = {
                text.name: evaluate.score(path, text, base, options.n_ctx, options.n_chunks)
                for text, base in bases.items()
            }
            row.prompt_speed, row.generation_speed = speeds(path, Path(name) / "bench.log")
            result.rows.append(row)
    content = {
        "comparison.json": json.dumps(asdict(result), indent=1, default=str) + "\n",
        "comparison.html": page.render(result),
    }
    for file_name, text_content in content.items():
        with atomic(folder / file_name) as f:
            f.write(text_content.encode())
    return result


def _checked(name: str) -> str:
    if name.endswith(".gguf"):
        if not Path(name).is_file():
            raise AaacError(f"--types {name}: no such file")
        return name
    if name.upper() not in (*OURS, *STOCK):
        raise AaacError(
            f"--types {name}: unknown type; choose from {', '.join((*OURS, *STOCK))}, or give a .gguf file of the same model"
        )
    return name.upper()


def self_text(source: Path, out: Path, settings: Settings) -> Path:
    """Text that the model writes itself, from another seed than its calibration tokens."""
    model, tokenizer = checkpoint.load_model(source), checkpoint.load_tokenizer(source)
    tokens = tokens_module.self_tokens(model, SELF_SEQUENCES, settings.sequence_length, settings.seed + 1)
    out.write_text("\n".join(tokenizer.batch_decode(tokens, skip_special_tokens=True)) + "\n", encoding="utf-8")
    return out


def measure_imatrix(source: Path, full: GgufFile, settings: Settings, out: Path) -> tuple[Path | None, float]:
    """The importance file of the same calibration for llama-quantize, None where there is no calibration, and the seconds it took."""
    start = time.monotonic()
    job = prepare(source, full, replace(settings, feedback=False))
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        imatrix = calibrate(job, full, Path(folder)).imatrix
    if not imatrix.entries:
        return None, 0.0
    write_imatrix(out, imatrix)
    return out, time.monotonic() - start


def stock_quantize(full: Path, out: Path, recipe: str, imatrix: Path | None, embedding_type: str) -> None:
    """llama-quantize's recipe with the importance file, embeddings and output matrix in the type that ours have."""
    importance: list[str | Path] = ["--imatrix", imatrix] if imatrix else []
    embeddings = ["--token-embedding-type", embedding_type.lower(), "--output-tensor-type", embedding_type.lower()]
    partial, log = out.with_name(out.name + ".partial"), out.with_suffix(".log")
    tools.run_logged_tool("llama-quantize", [*importance, *embeddings, full, partial, recipe], log)
    partial.replace(out)


def describe(name: str, path: Path, full: GgufFile, seconds: float | None) -> Row:
    """What a file says of itself beside the full-precision one."""
    file, errors = gguf_io.read(path), verify.Verification()
    verify.compare_shapes(file, full)
    verify.compare_tensors(errors, file, full, Imatrix({}))
    return Row(
        name=Path(name).name.removesuffix(".gguf"),
        n_bytes=path.stat().st_size,
        bits_per_weight=8
        * sum(t.n_bytes for t in file.tensors.values())
        / sum(t.n_elements for t in file.tensors.values()),
        seconds=seconds,
        tensor_errors={t.name: t.relative for t in errors.tensors},
        codebooks={tensor: codec.codebooks.tolist() for tensor, codec in file.codecs.items()},
    )


def speeds(path: Path, log: Path) -> tuple[Speed, Speed]:
    """Tokens per second of a prompt of 512 tokens and of generating 128, by llama-bench."""
    runs = json.loads(
        tools.tool_output("llama-bench", ["-m", path, "-p", "512", "-n", "128", "-r", "3", "-o", "json"], log)
    )
    prompt, generation = ((run["avg_ts"], run["stddev_ts"]) for run in sorted(runs, key=lambda run: run["n_gen"]))
    return prompt, generation
