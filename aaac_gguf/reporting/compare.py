"""Compare quantized types of one model: each at its own best, all with the same calibration, against the full model.

A mixture of llama-quantize that `convert` makes too is made by both programs, for two rows of the same size.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median, stdev
from typing import Literal

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

from .. import __version__
from ..calibration import tokens as tokens_module
from ..conversion.calibrate import calibrate
from ..conversion.convert import convert
from ..conversion.job import prepare
from ..conversion.measure import MeasureReport, measure
from ..conversion.plan import check_quantized, make_plan
from ..conversion.recipes import RECIPES
from ..conversion.settings import Settings
from ..errors import AaacError
from ..files import format as fmt
from ..files import gguf as gguf_io
from ..files.atomic import atomic
from ..files.gguf import GgufFile
from ..files.imatrix import Imatrix, write_imatrix
from ..files.scratch import temporary_folder
from ..llama import evaluate, patch, tools
from ..llama.build import build
from ..llama.evaluate import Score
from ..models import checkpoint
from ..models.source import full_precision, model_name
from ..progress import progress
from ..resources import sha256
from . import page, verify
from .results import Comparison, Row, Speed, Verification

# The recipes of llama-quantize, some of which give some matrices more bits. `convert` makes most of them too.
STOCK = tuple(
    name.removeprefix("MOSTLY_")
    for name in LlamaFileType.__members__
    if name.startswith("MOSTLY_") and "F16" not in name
)
DEFAULT_TYPES = ("AAAC4_G16", "Q4_0", "IQ4_NL", "Q4_K_M", "Q5_K_M")

# `kv_cache_types` of llama.cpp's common/arg.cpp. Every comparison has F16.
CACHE_TYPES = ("F32", "BF16", "Q8_0", "Q4_0", "Q4_1", "IQ4_NL", "Q5_0", "Q5_1")

SELF_SEQUENCES = 20  # in the text that the model writes
SPEED_ROUNDS = 3


@dataclass(frozen=True)
class Options:
    """The settings of a comparison.

    types        those of `convert`, llama-quantize's recipes, and paths of finished .gguf files
    texts        to measure on; by default one that the model writes
    settings     of the conversions: embedding type, calibration and device
    n_ctx        tokens in a chunk of text
    n_chunks     chunks of each text, at most
    cache_types  of the KV cache, to measure each file with besides F16
    """

    types: Sequence[str] = DEFAULT_TYPES
    texts: Sequence[Path] = ()
    settings: Settings = field(default_factory=Settings)
    n_ctx: int = 512
    n_chunks: int = 64
    cache_types: Sequence[str] = ()


@dataclass(frozen=True)
class Candidate:
    """One file of a comparison: its name in the tables, its path, and the type and the program that make it."""

    name: str
    path: Path
    type: str
    program: Literal["aaac-gguf", "llama-quantize"] | None = None  # None for a finished file


def compare(source: Path, folder: Path, options: Options) -> Comparison:
    """Make each type's file in `folder`, measure it, and write comparison.json and comparison.html there.

    Raises AaacError for bad input, before anything slow if that is possible.
    """
    types = [_checked(name) for name in options.types]
    options = replace(options, cache_types=[_checked_cache(name) for name in options.cache_types])
    _check_texts(options.texts)
    if not source.is_file():
        checkpoint.check(source)
    try:
        folder.mkdir(exist_ok=True)
    except OSError as e:
        raise AaacError(f"`output` {folder}: cannot be made: {e.strerror}") from None
    build()
    stem = model_name(source)
    with (
        temporary_folder(".aaac-compare-", folder) as scratch,
        full_precision(source, scratch) as full,
    ):
        if source.is_file():
            check_quantized(full, allowed=False, advice="compare types with the full-precision file")
        if not checkpoint.is_causal(full):
            raise AaacError(
                f"{source}: {full.architecture} has an encoder and is no model of the next token, by which types are "
                "compared; convert it, and verify it"
            )
        length = tokens_module.fitting_length(full, options.settings.sequence_length, "sequence_length")
        _check_heads(full, options.cache_types)
        n_ctx = tokens_module.fitting_length(full, options.n_ctx, "n_ctx")
        options = replace(options, n_ctx=n_ctx, settings=replace(options.settings, sequence_length=length))
        texts = options.texts or [self_text(source, folder / "self-generated.txt", options.settings)]
        result = _begin(stem, source, full, texts, options)
        bases = {text: scratch / f"{text.stem}-logits" for text in texts}
        for text, base in bases.items():  # first, because a text may be too short
            perplexity = evaluate.save_logits(full.path, text, base, options.n_ctx, options.n_chunks)
            result.perplexities[text.name] = perplexity
            result.cache_scores[text.name] = _cache_scores(full.path, text, base, options)
        imatrix: tuple[Path | None, float] | None = None
        measured: MeasureReport | None = None
        files = candidates(types, folder, stem)
        for file in progress(files, desc="comparing", unit="file"):
            seconds = None
            if file.program == "aaac-gguf":
                measured = measured or measure(source, scratch / "moments", options.settings)
                settings = replace(options.settings, type=file.type, moments=measured.folder)
                seconds = measured.seconds + convert(source, file.path, settings).seconds
            elif file.program == "llama-quantize":
                imatrix = imatrix or measure_imatrix(source, full, options.settings, folder / f"{stem}-imatrix.gguf")
                embedding_type = fitting_embedding_type(full, options.settings)
                start = time.monotonic()
                stock_quantize(full.path, file.path, file.type, imatrix[0], embedding_type)
                seconds = time.monotonic() - start + imatrix[1]
            row = describe(file.name, file.path, full, seconds)
            for text, base in bases.items():
                row.scores[text.name] = evaluate.score(file.path, text, base, options.n_ctx, options.n_chunks)
                row.cache_scores[text.name] = _cache_scores(file.path, text, base, options)
            result.rows.append(row)
        found = speeds([file.path for file in files], full, scratch / "bench.log")
        for row, of_row in zip(result.rows, found, strict=True):
            row.prompt_speed, row.generation_speed = of_row
    write(folder, result)
    return result


def _checked(name: str) -> str:
    """Return a type's name in capitals, or the path of a finished file. Raises AaacError for what is neither."""
    if name.endswith(".gguf"):
        if not Path(name).is_file():
            raise AaacError(f"`types` {name}: no such file")
        return name
    known = dict.fromkeys((*fmt.TYPES, *STOCK, *RECIPES))
    if name.upper() not in known:
        choices = f"choose from {', '.join(known)}, or give a .gguf file of the same model"
        raise AaacError(f"`types` {name}: unknown type; {choices}")
    return name.upper()


def candidates(types: Sequence[str], folder: Path, stem: str) -> list[Candidate]:
    """Return the files of a comparison in `folder`: for a mixture that both programs make one of each, theirs first."""
    files = []
    for name in types:
        if name.endswith(".gguf"):
            files.append(Candidate(Path(name).name.removesuffix(".gguf"), Path(name), ""))
            continue
        theirs, ours = name in STOCK, name in RECIPES
        if theirs:
            shown = f"{name} (llama-quantize)" if ours else name
            files.append(Candidate(shown, folder / f"{stem}-{name}-llama-quantize.gguf", name, "llama-quantize"))
        if ours:
            shown = f"{name} (aaac-gguf)" if theirs else name
            files.append(Candidate(shown, folder / f"{stem}-{name}.gguf", name, "aaac-gguf"))
    return files


def _checked_cache(name: str) -> str:
    """Return the name of a KV cache's type in capitals. Raises AaacError for one that llama.cpp has not."""
    if name.upper() not in CACHE_TYPES:
        raise AaacError(f"`cache_types` {name}: choose from {', '.join(CACHE_TYPES)}; F16 is always measured")
    return name.upper()


def _check_heads(full: GgufFile, cache_types: Sequence[str]) -> None:
    """Raise AaacError if llama.cpp cannot cut the keys and values of a head into whole blocks of the types."""
    n_heads = full.setting("attention.head_count", 1)
    if not cache_types or not isinstance(n_heads, int):
        return  # an array has a number for each block, and llama.cpp checks them
    of_head = int(full.setting("embedding_length", 0)) // max(n_heads, 1)
    for name in cache_types:
        block_size = GGML_QUANT_SIZES[GGMLQuantizationType[name]][0]
        for key in ("attention.key_length", "attention.value_length"):
            if (length := int(full.setting(key, of_head))) % block_size:
                raise AaacError(
                    f"`cache_types` {name}: heads of {length} are not whole blocks of {block_size}; leave it out"
                )


def _cache_scores(model: Path, text: Path, base: Path, options: Options) -> dict[str, Score]:
    """Return the scores of a file on one text with each type of the KV cache."""
    return {
        name: evaluate.score(model, text, base, options.n_ctx, options.n_chunks, cache_type=name)
        for name in options.cache_types
    }


def _check_texts(texts: Sequence[Path]) -> None:
    """Raise AaacError for a text that is not there, and for two of the same name: results are by name."""
    for text in texts:
        if not text.is_file():
            raise AaacError(f"`texts` {text}: no such file")
    if len({text.name for text in texts}) < len(texts):
        raise AaacError("`texts`: two texts of the same name; rename one")


def _begin(stem: str, source: Path, full: GgufFile, texts: Sequence[Path], options: Options) -> Comparison:
    """Return a comparison with its settings and without results."""
    settings = options.settings
    return Comparison(
        model=stem,
        full_type=max(full.tensors.values(), key=lambda t: t.n_elements).tensor_type.name,
        full_bytes=full.path.stat().st_size,
        texts={text.name: sha256(text) for text in texts},
        settings={
            "calibration": settings.calibration_kind(source),
            "sequences": settings.sequences,
            "sequence_length": settings.sequence_length,
            "seed": settings.seed,
            "embedding": fitting_embedding_type(full, settings),
            "n_ctx": options.n_ctx,
            "n_chunks": options.n_chunks,
            "aaac_gguf": __version__,
            "llama_cpp_python": patch.upstream().version,
            "cpus": os.cpu_count(),
        },
    )


def write(folder: Path, result: Comparison) -> None:
    """Write comparison.json and comparison.html."""
    content = {
        "comparison.json": json.dumps(asdict(result), indent=1, default=str) + "\n",
        "comparison.html": page.render(result),
    }
    for name, text in content.items():
        with atomic(folder / name) as f:
            f.write(text.encode(errors="backslashreplace"))  # a path may hold bytes that are no text


def self_text(source: Path, out: Path, settings: Settings) -> Path:
    """Write a text that the model samples from itself, with another seed than the calibration tokens. Returns `out`."""
    model, tokenizer = checkpoint.load_model(source), checkpoint.load_tokenizer(source)
    tokens = tokens_module.self_tokens(model, SELF_SEQUENCES, settings.sequence_length, settings.seed + 1)
    out.write_text("\n".join(tokenizer.batch_decode(tokens, skip_special_tokens=True)) + "\n", encoding="utf-8")
    return out


def measure_imatrix(source: Path, full: GgufFile, settings: Settings, out: Path) -> tuple[Path | None, float]:
    """Write the importance of the same calibration, for llama-quantize. Returns `out` and the seconds it took.

    Without calibration there is no file, and None in its place.
    """
    start = time.monotonic()
    job = prepare(source, full, replace(settings, feedback=False))
    with temporary_folder(".aaac-imatrix-", out.parent) as folder:
        imatrix = calibrate(job, full, folder).imatrix
    if not imatrix.entries:
        return None, 0.0
    write_imatrix(out, imatrix)
    return out, time.monotonic() - start


def fitting_embedding_type(full: GgufFile, settings: Settings) -> str:
    """Return the type that the embeddings have in our files.

    It is not that of the settings if their rows are not whole blocks of it, of which llama-quantize would die.
    """
    return next(p.type.name for p in make_plan(full, settings, "none") if p.name == "token_embd.weight")


def stock_quantize(full: Path, out: Path, recipe: str, imatrix: Path | None, embedding_type: str) -> None:
    """Quantize by llama-quantize's recipe, with embeddings and output matrix in the type that ours have."""
    importance: list[str | Path] = ["--imatrix", imatrix] if imatrix else []
    embeddings = ["--token-embedding-type", embedding_type.lower(), "--output-tensor-type", embedding_type.lower()]
    partial, log = out.with_name(out.name + ".partial"), out.with_suffix(".log")
    args = ["--allow-requantize", *importance, *embeddings, full, partial, recipe]
    tools.run_logged_tool("llama-quantize", args, log)
    partial.replace(out)


def describe(name: str, path: Path, full: GgufFile, seconds: float | None) -> Row:
    """Return a file's row without what is measured by running it. Raises AaacError for a file of another model."""
    file, errors = gguf_io.read(path), Verification()
    verify.compare_shapes(file, full)
    verify.compare_tensors(errors, file, full, Imatrix({}))
    n_bytes = sum(t.n_bytes for t in file.tensors.values())
    n_weights = sum(t.n_elements for t in file.tensors.values())
    return Row(
        name=name,
        n_bytes=path.stat().st_size,
        bits_per_weight=8 * n_bytes / n_weights,
        seconds=seconds,
        tensor_errors={t.name: t.relative for t in errors.tensors},
        codebooks={tensor: codec.codebooks.tolist() for tensor, codec in file.codecs.items()},
    )


def speeds(paths: Sequence[Path], full: GgufFile, log: Path) -> list[tuple[Speed, Speed]]:
    """Return for each file the tokens per second of a prompt of 512 tokens and of generating 128, by llama-bench.

    They are fewer if the model has fewer positions. The files take turns, so that what else the machine does slows all.
    """
    sizes = ["-p", str(full.positions(512)), "-n", str(full.positions(128))]
    rounds: list[list[list[float]]] = [[] for _ in paths]
    for i in progress([*range(len(paths))] * SPEED_ROUNDS, desc="measuring speed", unit="run"):
        args: list[str | Path] = ["-m", paths[i], *sizes, "-r", "1", "-o", "json"]
        runs = json.loads(tools.tool_output("llama-bench", args, log))
        rounds[i].append([run["avg_ts"] for run in sorted(runs, key=lambda run: run["n_gen"])])
    both = (zip(*of_file, strict=True) for of_file in rounds)
    return [((median(prompt), stdev(prompt)), (median(generated), stdev(generated))) for prompt, generated in both]
