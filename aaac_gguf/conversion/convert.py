"""A checkpoint or full-precision GGUF becomes an AAAC GGUF: plan, calibrate, fit, encode, write, one tensor in memory at a time."""

from __future__ import annotations

import hashlib
import json
import math
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import gguf
import torch
from gguf import GGMLQuantizationType as T
from gguf import GGUFValueType, LlamaFileType

from .. import __version__
from ..calibration import activations as calibrate
from ..calibration import tokens as tokens_module
from ..calibration.sequential import BlockMoments
from ..calibration.synthetic import SyntheticMoments
from ..calibration.tokens import RANDOM_SHARE, with_random
from ..errors import AaacError
from ..files import format as fmt
from ..files.gguf import GgufFile, Metadata, TensorInfo, Value, dequantize, field_values, read_model
from ..files.imatrix import Coverage, Imatrix, read_imatrix
from ..files.output import PARTIAL, Journal, Shard, check_space, codecs_of, reader, shards, write, write_shards
from ..models import checkpoint
from ..models.blocks import Blocks
from ..models.source import full_precision
from ..models.weights import check_weights, load_weight
from ..progress import progress
from ..quantizer.kquants import KQUANTS
from ..quantizer.moments import DAMPING
from ..quantizer.quantize import Method
from ..quantizer.stock import STOCK_TYPES
from ..resources import sha256
from .encoder import Encoder, Rounding, encode_stock
from .mixed import choose, measured
from .plan import EMBEDDINGS, Override, TensorPlan, make_plan

# general.file_type, what llama.cpp prints as the model's type. For AAAC types it is the type id, in the patch's llama_ftype too.
FILE_TYPES = {
    T.F32: LlamaFileType.ALL_F32,
    T.F16: LlamaFileType.MOSTLY_F16,
    T.BF16: LlamaFileType.MOSTLY_BF16,
    T.Q8_0: LlamaFileType.MOSTLY_Q8_0,
    T.Q6_K: LlamaFileType.MOSTLY_Q6_K,
    T.Q5_K: LlamaFileType.MOSTLY_Q5_K_S,
    T.Q4_0: LlamaFileType.MOSTLY_Q4_0,
    T.IQ4_NL: LlamaFileType.MOSTLY_IQ4_NL,
    **{T[name]: qtype.type_id for name, qtype in fmt.TYPES.items()},
}


@dataclass(frozen=True)
class Calibration:
    """Where importance comes from. source: "none", "self" or the path of a text; or an importance file."""

    source: str = "self"
    imatrix: Path | None = None
    n_sequences: int = 64
    sequence_length: int = 512
    seed: int = 0


@dataclass(frozen=True)
class Settings:
    """What `convert` was asked for; the flags of the same names."""

    type: T = T["AAAC4_G16"]
    overrides: Sequence[Override] = ()
    embedding: T = T.Q6_K
    calibration: Calibration = Calibration()
    method: Method = "aaac"
    feedback: bool = True
    device: str = "cpu"
    split_max_size: int | None = None  # bytes of tensor data per file; None for one file
    bpw: float | None = None  # mixed precision: bits per weight of all tensor data together, at most
    size: int | None = None  # the same as bytes of all files together

    def moments(self, inputs: Inputs) -> Literal["measured", "synthetic", "none"]:
        """Where error feedback has its second moments from: a model that runs, or else the weights and what importance there is."""
        if not self.feedback or self.method != "aaac":
            return "none"
        return "measured" if inputs.description["source"] in ("self", "text") else "synthetic"

    @property
    def mixes(self) -> bool:
        return self.bpw is not None or self.size is not None


@dataclass(frozen=True)
class TensorReport:
    """What became of one quantized tensor; errors are relative squared errors."""

    plan: TensorPlan
    relative_error: float
    weighted_error: float


@dataclass(frozen=True)
class Report:
    """What a conversion made, and what calibration did not reach."""

    files: list[Path]
    tensors: list[TensorReport]
    coverage: Coverage | None  # None without calibration
    seconds: float
    peak_bytes: int  # of memory, in this process or in llama.cpp's converter, whichever took more
    damped: list[
        str
    ]  # tensors whose Hessian needed more damping than usual: too few tokens, or channels that never vary
    left_out: str = ""  # what of the source is in no file

    @property
    def n_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files)


def convert(source: Path, out: Path, settings: Settings, resume: bool = False) -> Report:
    """Quantize `source` into `out`; with `resume`, continue a conversion that was interrupted, to the same bytes.

    Raises AaacError for bad input, before anything slow where that is possible. What is finished when an error or an interruption ends it stays for
    `resume` in files with `.partial` in their names; nothing else stays.
    """
    start = time.monotonic()
    check_output(out)
    if settings.device != "cpu" and not torch.cuda.is_available():
        raise AaacError(f"--device {settings.device}: torch finds no CUDA device here; use --device cpu")
    with Journal(out, resume) as journal, scratch_folder(out) as scratch:
        # In the first seconds: everything that can be refused without reading the weights.
        with full_precision(source, scratch, header_only=True) as header:
            plans, quantized, inputs = outline(source, header, settings)
            metadata = output_metadata(header, settings, inputs, quantized)
            layout = shards(out, metadata, [p.info for p in plans], settings.split_max_size)
            check_space(
                out, settings.size or layout_bytes(layout), scratch_bytes(source, header, settings, inputs), journal
            )
            fingerprint = fingerprint_of(settings, inputs, plans)
            journal.check(fingerprint)
        with full_precision(source, scratch) as file:
            fingerprint["source"] = check_weights(file)
            journal.check(fingerprint)
            imatrix, moments = measure(source, file, inputs, settings, quantized, scratch)
            if settings.mixes:
                plans = mixed_plans(file, plans, metadata, settings, moments)
                layout = shards(out, metadata, [p.info for p in plans], settings.split_max_size)
                fingerprint["types"] = plan_digest(plans)
            journal.start(fingerprint, layout)
            rounding = Rounding(settings.method, settings.device, settings.calibration.seed)
            synthetic = None
            if quantized and settings.moments(inputs) == "synthetic" and "token_embd.weight" in file.tensors:
                synthetic = SyntheticMoments(file, imatrix, settings.device, settings.calibration.seed)
            encoder = Encoder(file, plans, rounding, imatrix, quantized, moments, synthetic, reader(layout, journal))
            write_shards(layout, journal, encoder)
    coverage = None
    if inputs.description["source"] != "none":
        # At 8 bits it makes no difference worth a word.
        coverage = imatrix.coverage({p.name: p.n_weights for p in plans if p.name in quantized and p.type != T.Q8_0})
    by_name = {p.name: p for p in plans}
    records = {name: record for name, record in journal.records.items() if record}
    n_tokens = (
        inputs.description["tokens"] if settings.moments(inputs) == "measured" else math.inf
    )  # synthetic moments allow for few
    return Report(
        files=[shard.path for shard in layout],
        tensors=[TensorReport(by_name[name], r.relative_error, r.weighted_error) for name, r in records.items()],
        coverage=coverage,
        seconds=time.monotonic() - start,
        peak_bytes=1024
        * max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)),
        damped=[
            name
            for name, r in records.items()
            if r.damping > DAMPING or (r.damping and n_tokens < by_name[name].shape[-1])
        ],
        left_out=checkpoint.left_out(source),
    )


@contextmanager
def scratch_folder(out: Path) -> Iterator[Path]:
    """Where the full-precision GGUF goes beside the output, under a name by which the next conversion removes what a killed one left."""
    folder = out.with_name(f"{out.name}{PARTIAL}.source")
    shutil.rmtree(folder, ignore_errors=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def fingerprint_of(settings: Settings, inputs: Inputs, plans: Sequence[TensorPlan]) -> dict[str, Any]:
    """What the result depends on besides the source's weights: a conversion that resumes must agree with the interrupted one."""
    flags = {field.name: getattr(settings, field.name) for field in fields(settings) if field.name != "calibration"}
    return {
        "version": f"aaac-gguf {__version__}, torch {torch.__version__}",
        **{name: value.name if isinstance(value, T) else str(value) for name, value in flags.items()},
        "calibration": {**inputs.description, "seed": settings.calibration.seed},
        "plan": plan_digest(plans),
    }


def plan_digest(plans: Sequence[TensorPlan]) -> str:
    return hashlib.sha256(repr([(p.name, p.shape, p.type) for p in plans]).encode()).hexdigest()


def mixed_plans(
    file: GgufFile, plans: Sequence[TensorPlan], metadata: Metadata, settings: Settings, moments: BlockMoments | None
) -> list[TensorPlan]:
    """The plans with a type for every matrix that no flag gave one, the best for `settings.bpw` or `settings.size`."""
    assert moments
    free = [p for p in plans if p.type in fmt.TYPES_BY_ID and not p.reason]
    fixed_bytes = sum(p.n_bytes for p in plans) - sum(p.n_bytes for p in free)
    if settings.bpw is not None:
        budget = int(settings.bpw * sum(p.n_weights for p in plans) / 8) - fixed_bytes
    else:
        assert settings.size is not None
        # Each tensor may need some bytes up to its alignment, and less of the header if it becomes a stock type.
        layout = shards(Path(file.path), metadata, [p.info for p in plans], settings.split_max_size)
        budget = settings.size - layout_bytes(layout) + sum(p.n_bytes for p in free)
    choices = measured(
        free, lambda name: load_weight(file, name, settings.device), moments.moments, settings.calibration.seed
    )
    chosen = choose(choices, budget)
    if chosen is None:
        least = fixed_bytes + sum(options[0].n_bytes for options in choices.values())
        bpw = 8 * least / sum(p.n_weights for p in plans)
        raise AaacError(
            f"--bpw or --size: too little, the smallest possible is {bpw:.3f} bits per weight; raise it, or choose an --embedding-type"
        )
    reason = "--bpw" if settings.bpw is not None else "--size"
    return [
        replace(p, type=chosen[p.name].type, reason=f"{reason}: KLD {chosen[p.name].loss:.2e}")
        if p.name in chosen
        else p
        for p in plans
    ]


def searched(plans: Sequence[TensorPlan]) -> list[str]:
    """The tensors that are rounded by search, and so are worth calibrating for."""
    known = {*fmt.TYPES_BY_ID, *STOCK_TYPES, *KQUANTS}
    return [
        p.name
        for p in plans
        if p.type in known and p.type != p.source_type and not (p.name in EMBEDDINGS and p.type in (T.Q8_0, *KQUANTS))
    ]


@dataclass(frozen=True)
class Inputs:
    """Calibration as far as it is known before the weights are read: what the file will say of it, and its tokens or importance."""

    description: Mapping[str, Any]
    tokens: torch.Tensor | None = None
    imatrix: Imatrix | None = None


def outline(source: Path, header: GgufFile, settings: Settings) -> tuple[list[TensorPlan], list[str], Inputs]:
    """The plan, the tensors that are rounded by search, and the calibration input, of which there is none where nothing is searched."""
    plans = make_plan(header, settings.type, settings.overrides, settings.embedding)
    quantized = searched(plans)
    inputs = prepare(source, header, settings.calibration) if quantized else Inputs({"source": "none"})
    if settings.mixes and settings.moments(inputs) != "measured":
        raise AaacError(
            "--bpw and --size: choose types by measured second moments; give --calib TEXT or --calib self, without --no-feedback"
        )
    return plans, quantized, inputs


def prepare(source: Path, header: GgufFile, calibration: Calibration) -> Inputs:
    """Check and read the calibration input. Raises AaacError for text that is too short, an imatrix of another model, and so on."""
    if calibration.imatrix:
        imatrix = read_imatrix(calibration.imatrix)
        imatrix = imatrix.fitted(calibration.imatrix, header.shapes)
        description = {
            "source": "imatrix",
            "file": calibration.imatrix.name,
            "sha256": sha256(calibration.imatrix),
            "datasets": imatrix.datasets,
        }
        return Inputs({**description, "tokens": imatrix.n_chunks * imatrix.chunk_size}, imatrix=imatrix)
    if calibration.source == "none":
        return Inputs({"source": "none"})
    if source.is_file():
        checkpoint.check_gguf(source)
    n, length = calibration.n_sequences, calibration.sequence_length
    if calibration.source == "self":
        return Inputs({"source": "self", "seed": calibration.seed, "tokens": n * length, "sequence_length": length})
    text = Path(calibration.source)
    tokens, digest = tokens_module.text_tokens(source, text, n, length)
    return Inputs(
        {"source": "text", "file": text.name, "sha256": digest, "tokens": tokens.numel(), "sequence_length": length},
        tokens=tokens,
    )


def scratch_bytes(source: Path, header: GgufFile, settings: Settings, inputs: Inputs) -> int:
    """What a conversion needs on disk beside its output: a folder's weights as GGUF, and activations and gradients to measure moments."""
    weights = header.n_bytes if source.is_dir() else 0
    if settings.moments(inputs) != "measured":
        return weights
    n_blocks, width = (int(header.setting(key, 0)) for key in ("block_count", "embedding_length"))
    n_tokens = int(inputs.description["tokens"] * (1 + RANDOM_SHARE))
    return weights + 4 * (2 * (n_blocks + 1) + 1) * n_tokens * width


def measure(
    source: Path, file: GgufFile, inputs: Inputs, settings: Settings, quantized: Sequence[str], folder: Path
) -> tuple[Imatrix, BlockMoments | None]:
    """The importance of the model's matrices, run through transformers unless an imatrix gives it, and where feedback is wanted their moments.

    folder: for activations and gradients, which take `scratch_bytes`.
    """
    if inputs.imatrix:
        return inputs.imatrix, None
    if inputs.description["source"] == "none":
        return Imatrix({}), None
    calibration = settings.calibration
    folder.mkdir(exist_ok=True)
    model = checkpoint.load_model(source, settings.device, exact=False, folder=folder)
    tokens = inputs.tokens
    if tokens is None:
        tokens = tokens_module.self_tokens(
            model, calibration.n_sequences, calibration.sequence_length, calibration.seed
        )
    if settings.moments(inputs) != "measured":
        return calibrate.importance(model, tokens, file.architecture, file.tensors, calibration.source), None
    vocab_size = min(len(file.get("tokenizer.ggml.tokens", [])), model.get_input_embeddings().num_embeddings)
    sequences, weights = with_random(tokens, vocab_size, calibration.seed)
    activations = calibrate.Activations(Blocks(model, tokens[:1]), sequences, len(tokens), folder)
    squares = calibrate.Squares()
    activations.run(squares)
    imatrix = squares.imatrix(model, tokens, file.architecture, file.tensors, calibration.source)
    return imatrix, BlockMoments(activations, weights, file, quantized, folder, calibration.seed)


def check_output(out: Path) -> None:
    """Raise AaacError unless a file can be made at `out`."""
    if out.is_dir():
        raise AaacError(f"{out}: is a directory; name a file")
    if not out.parent.is_dir():
        raise AaacError(f"{out}: there is no directory {out.parent}; make it first")
    if not os.access(out.parent, os.W_OK):
        raise AaacError(f"{out}: {out.parent} cannot be written; choose another output")


def output_metadata(file: GgufFile, settings: Settings, inputs: Inputs, quantized: Sequence[str]) -> dict[str, Value]:
    """The source's metadata, with what the new file must say differently; codecs come later."""
    metadata = {
        key: value for key, value in field_values(file.fields).items() if not key.startswith(("split.", "aaac."))
    }
    metadata["general.file_type"] = Value(int(FILE_TYPES[settings.type]), GGUFValueType.UINT32)
    metadata["general.quantization_version"] = Value(gguf.GGML_QUANT_VERSION, GGUFValueType.UINT32)
    if quantized:
        description = {**inputs.description, "method": settings.method, "feedback": settings.moments(inputs)}
        metadata[fmt.KEY_QUANTIZER] = Value(f"aaac-gguf {__version__}", GGUFValueType.STRING)
        metadata[fmt.KEY_CALIBRATION] = Value(json.dumps(description), GGUFValueType.STRING)
    return metadata


def dry_run(source: Path, out: Path, settings: Settings) -> tuple[list[TensorPlan], int, int]:
    """The plan, the exact bytes that `convert` would write, and in how many files. For mixed precision it calibrates and measures."""
    check_output(out)
    with tempfile.TemporaryDirectory(prefix="aaac-") as folder:
        scratch = Path(folder)
        with full_precision(source, scratch, header_only=True) as header:
            plans, quantized, inputs = outline(source, header, settings)
            metadata = output_metadata(header, settings, inputs, quantized)
        if settings.mixes:
            with full_precision(source, scratch) as file:
                _, moments = measure(source, file, inputs, settings, quantized, scratch)
                plans = mixed_plans(file, plans, metadata, settings, moments)
        layout = shards(out, metadata, [p.info for p in plans], settings.split_max_size)
        return plans, layout_bytes(layout), len(layout)


def layout_bytes(layout: Sequence[Shard]) -> int:
    """The size of all files together."""
    codecs = codecs_of([t for shard in layout for t in shard.tensors], {})
    return sum(shard.n_bytes(codecs) for shard in layout)


def dequantize_file(source: Path, out: Path, ggml_type: T) -> int:
    """Write the decoded weights of `source` as F32, F16 or BF16, a file that stock llama.cpp runs. Returns its bytes."""
    check_output(out)
    file = read_model(source)
    infos = []
    for name, tensor in file.tensors.items():
        shape = tuple(int(n) for n in reversed(tensor.shape))
        floating = tensor.tensor_type not in (T.I8, T.I16, T.I32, T.I64, T.F64)
        wanted = (ggml_type if len(shape) > 1 else T.F32) if floating else tensor.tensor_type
        infos.append(TensorInfo(name, shape, wanted))

    def decode(info: TensorInfo) -> Any:
        file.release()
        tensor = file.tensors[info.name]
        if info.type == tensor.tensor_type:
            return tensor.data
        return encode_stock(
            torch.from_numpy(dequantize(tensor.data, tensor.tensor_type, file.codecs.get(info.name))), info.type
        )

    metadata = output_metadata(file, Settings(type=ggml_type), Inputs({"source": "none"}), [])
    write(
        out,
        metadata,
        infos,
        (decode(info) for info in progress(infos, desc="decoding", unit="tensor")),
    )
    return out.stat().st_size
