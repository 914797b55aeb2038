"""A checkpoint or full-precision GGUF becomes an AAAC GGUF: plan, calibrate, fit, encode, write, one tensor in memory at a time."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as T
from gguf import GGUFValueType, LlamaFileType
from tqdm import tqdm

from . import __version__, calibrate, checkpoint, llama
from . import format as fmt
from .errors import AaacError
from .feedback import DAMPING
from .gguf_io import GgufFile, Metadata, TensorInfo, Value, alignment, atomic, codec_values, dequantize, field_values, read, render_header
from .hessian import Moments, collect, in_rows_of, passes, with_random
from .imatrix import Imatrix, read_imatrix, sha256
from .kquants import KQUANTS, quantize_rounded
from .plan import Override, TensorPlan, make_plan
from .quantize import Method, quantize
from .stock import STOCK_TYPES

# general.file_type, what llama.cpp prints as the model's type. For AAAC types it is the type id, in the patch's llama_ftype too.
FILE_TYPES = {
    T.F32: LlamaFileType.ALL_F32,
    T.F16: LlamaFileType.MOSTLY_F16,
    T.BF16: LlamaFileType.MOSTLY_BF16,
    T.Q8_0: LlamaFileType.MOSTLY_Q8_0,
    T.Q6_K: LlamaFileType.MOSTLY_Q6_K,
    T.Q4_0: LlamaFileType.MOSTLY_Q4_0,
    T.IQ4_NL: LlamaFileType.MOSTLY_IQ4_NL,
    **{T[name]: qtype.type_id for name, qtype in fmt.TYPES.items()},
}

# Stands in for codecs that are not fitted yet: a header has the same size with any codec.
BLANK_CODEC = fmt.Codec(np.tile(np.arange(-8, 8, dtype=np.int8), (2, 1)), 1.0, 2)


# What the sums of second moments may take at a time; a model whose matrices need more is run several times.
MOMENTS_BYTES = {"cpu": 4 << 30, "cuda": 32 << 30}


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

    def feeds_back(self, inputs: Inputs) -> bool:
        """Error feedback needs second moments, and those a model that runs."""
        return self.feedback and self.method == "aaac" and inputs.description["source"] in ("self", "text")


@dataclass(frozen=True)
class TensorReport:
    """What became of one quantized tensor; errors are relative squared errors."""

    plan: TensorPlan
    relative_error: float
    weighted_error: float


@dataclass(frozen=True)
class Report:
    """What a conversion made, and what calibration did not reach."""

    n_bytes: int
    tensors: list[TensorReport]
    not_covered: list[str]
    seconds: float
    damped: list[str]  # tensors whose Hessian needed more damping than usual: too few tokens, or channels that never vary


@contextmanager
def full_precision(source: Path, scratch: Path, header_only: bool = False) -> Iterator[GgufFile]:
    """The full-precision GGUF of a checkpoint folder or of a GGUF file. A folder's is made in `scratch` and removed after use."""
    if source.is_file():
        yield read(source)
        return
    config = checkpoint.check(source)
    dtype = str(config.get("dtype", config.get("torch_dtype", "")))
    with tempfile.TemporaryDirectory(dir=scratch, prefix=".aaac-source-") as folder:
        out = Path(folder) / "source.gguf"
        llama.convert_hf(source, out, "f32" if dtype == "float32" else "auto", header_only)
        yield read(out)


def convert(source: Path, out: Path, settings: Settings) -> Report:
    """Quantize `source` into `out`. Raises AaacError for bad input, before anything slow where that is possible, and leaves no file behind."""
    start = time.monotonic()
    check_output(out)
    if settings.device != "cpu" and not torch.cuda.is_available():
        raise AaacError(f"--device {settings.device}: torch finds no CUDA device here; use --device cpu")
    # In the first seconds: everything that can be refused without reading the weights.
    with full_precision(source, out.parent, header_only=True) as header:
        plans, quantized, inputs = outline(source, header, settings)
    with full_precision(source, out.parent) as file:
        check_finite(file)
        imatrix, moments = measure(source, file, inputs, settings, quantized)
        metadata = output_metadata(file, settings, inputs, quantized)
        codecs = blank_codecs(plans)
        reports: list[TensorReport] = []
        damped: list[str] = []

        def encode(plan: TensorPlan) -> Any:
            tensor = file.tensors[plan.name]
            if plan.type == plan.source_type:
                return np.ascontiguousarray(tensor.data)
            weight = load_weight(file, plan.name, settings.device)
            if plan.name not in quantized:
                return encode_stock(weight, plan.type)
            entry = imatrix.entries.get(plan.name)
            importance = torch.from_numpy(entry.importance()).to(settings.device) if entry else None
            seen = moments.of(plan.name, weight) if moments else None
            if plan.type in (T.Q8_0, T.Q4_0) and not seen:
                # Importance changes next to nothing at 8 bits, and Q4_0's own rounding may turn a block's sign round, which the search does not.
                return encode_stock(weight, plan.type)
            hessian, outputs = (seen.inputs, seen.outputs) if seen else (None, None)
            qtype = fmt.TYPES_BY_ID.get(plan.type) or STOCK_TYPES[plan.type]
            method = settings.method if plan.type in fmt.TYPES_BY_ID else "aaac"
            result = quantize(weight, qtype, importance, hessian, outputs, method=method, seed=settings.calibration.seed)
            if result.codec:
                codecs[plan.name] = result.codec
            if result.damping > DAMPING:
                damped.append(plan.name)
            reports.append(TensorReport(plan, result.relative_error, result.weighted_error))
            return result.data

        write_gguf(out, metadata, plans, encode, codecs)
    # At 8 bits it makes no difference worth a word.
    low_bit = [p.name for p in plans if p.name in quantized and p.type != T.Q8_0]
    not_covered = imatrix.not_covered(low_bit) if inputs.description["source"] != "none" else []
    return Report(out.stat().st_size, reports, not_covered, time.monotonic() - start, damped)


def searched(plans: Sequence[TensorPlan]) -> list[str]:
    """The tensors that are rounded by search, and so are worth calibrating for."""
    return [p.name for p in plans if (p.type in fmt.TYPES_BY_ID or p.type in STOCK_TYPES) and p.type != p.source_type]


def blank_codecs(plans: Sequence[TensorPlan]) -> dict[str, fmt.Codec]:
    return {p.name: BLANK_CODEC for p in plans if p.type in fmt.TYPES_BY_ID}


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
    return plans, quantized, prepare(source, header, settings.calibration) if quantized else Inputs({"source": "none"})


def prepare(source: Path, header: GgufFile, calibration: Calibration) -> Inputs:
    """Check and read the calibration input. Raises AaacError for text that is too short, an imatrix of another model, and so on."""
    if calibration.imatrix:
        imatrix = read_imatrix(calibration.imatrix)
        imatrix = imatrix.fitted(calibration.imatrix, {name: tuple(int(n) for n in reversed(t.shape)) for name, t in header.tensors.items()})
        description = {"source": "imatrix", "file": calibration.imatrix.name, "sha256": sha256(calibration.imatrix), "datasets": imatrix.datasets}
        return Inputs({**description, "tokens": imatrix.n_chunks * imatrix.chunk_size}, imatrix=imatrix)
    if calibration.source == "none":
        return Inputs({"source": "none"})
    if source.is_file():
        raise AaacError(
            f"--calib {calibration.source}: needs a Hugging Face folder to run, and {source} is a GGUF file; use --imatrix, or --calib none"
        )
    n, length = calibration.n_sequences, calibration.sequence_length
    if calibration.source == "self":
        return Inputs({"source": "self", "seed": calibration.seed, "tokens": n * length, "sequence_length": length})
    text = Path(calibration.source)
    tokens, digest = calibrate.text_tokens(source, text, n, length)
    return Inputs({"source": "text", "file": text.name, "sha256": digest, "tokens": tokens.numel(), "sequence_length": length}, tokens=tokens)


def measure(source: Path, file: GgufFile, inputs: Inputs, settings: Settings, quantized: Sequence[str]) -> tuple[Imatrix, MomentsByTensor | None]:
    """The importance of the model's matrices, run through transformers unless an imatrix gives it, and where feedback is wanted their moments."""
    if inputs.imatrix:
        return inputs.imatrix, None
    if inputs.description["source"] == "none":
        return Imatrix({}), None
    calibration = settings.calibration
    model = checkpoint.load_model(source, settings.device)
    tokens = inputs.tokens
    if tokens is None:
        tokens = calibrate.self_tokens(model, calibration.n_sequences, calibration.sequence_length, calibration.seed)
    imatrix = calibrate.importance(model, tokens, file.architecture, file.tensors, calibration.source)
    return imatrix, MomentsByTensor(model, tokens, file, quantized, calibration.seed) if settings.feeds_back(inputs) else None


class MomentsByTensor:
    """Second moments by GGUF tensor. Measured in passes as tensors are asked for, in file order: memory holds the sums of one pass."""

    def __init__(self, model: Any, tokens: torch.Tensor, file: GgufFile, quantized: Sequence[str], seed: int):
        vocab_size = min(len(file.get("tokenizer.ggml.tokens", [])), model.get_input_embeddings().num_embeddings)
        self.model, self.seed = model, seed
        self.sequences, self.sequence_weights = with_random(tokens, vocab_size, seed)
        self.weights = dict(model.named_parameters())
        n_layers = model.config.get_text_config().num_hidden_layers
        self.parameter: dict[str, str] = {}  # by GGUF name
        for name in self.weights:
            for gguf_name in checkpoint.gguf_names(name, file.architecture, n_layers, quantized):
                self.parameter[gguf_name] = name
        wanted = dict.fromkeys(self.parameter[name] for name in quantized if name in self.parameter)
        self.runs = passes(model, list(wanted), MOMENTS_BYTES[model.device.type])
        self.held: dict[str, Moments] = {}
        self.held_run: list[str] = []

    def of(self, gguf_name: str, weight: torch.Tensor) -> Moments | None:
        """The moments of a tensor with the outputs in the order of its rows, `weight`; None where calibration saw no product with it."""
        name = self.parameter.get(gguf_name)
        if name is None:
            return None
        if name not in self.held_run:
            self.held.clear()
            self.held_run = next(run for run in self.runs if name in run)
            self.held = collect(self.model, self.sequences, self.held_run, self.seed, self.sequence_weights)
        return in_rows_of(self.held[name], self.weights[name], weight) if name in self.held else None


def check_output(out: Path) -> None:
    """Raise AaacError unless a file can be made at `out`."""
    if out.is_dir():
        raise AaacError(f"{out}: is a directory; name a file")
    if not out.parent.is_dir():
        raise AaacError(f"{out}: there is no directory {out.parent}; make it first")
    if not os.access(out.parent, os.W_OK):
        raise AaacError(f"{out}: {out.parent} cannot be written; choose another output")


def check_finite(file: GgufFile) -> None:
    """Raise AaacError that names the first tensor with NaN or Inf."""
    for name in tqdm(file.tensors, desc="checking weights", unit="tensor", disable=None, leave=False):
        if file.tensors[name].tensor_type in (T.F32, T.F16, T.BF16) and not torch.isfinite(_stored(file, name)).all():
            raise AaacError(f"{file.path}: tensor {name} holds NaN or Inf; the checkpoint is broken, download it again")


def _stored(file: GgufFile, name: str) -> torch.Tensor:
    """A floating-point tensor in its own dtype, memory-mapped."""
    tensor = file.tensors[name]
    data = torch.from_numpy(np.asarray(tensor.data))
    return data.view(torch.bfloat16) if tensor.tensor_type == T.BF16 else data


def load_weight(file: GgufFile, name: str, device: str) -> torch.Tensor:
    """Float32 weights [..., K] of a full-precision tensor on `device`."""
    return _stored(file, name).to(device).float()


def encode_stock(weight: torch.Tensor, ggml_type: T) -> np.ndarray:
    """The data of a type that every llama.cpp reads."""
    if ggml_type in KQUANTS:
        return quantize_rounded(KQUANTS[ggml_type], weight)
    return gguf.quantize(weight.cpu().numpy(), ggml_type)


def output_metadata(file: GgufFile, settings: Settings, inputs: Inputs, quantized: Sequence[str]) -> dict[str, Value]:
    """The source's metadata, with what the new file must say differently; codecs come later."""
    metadata = {key: value for key, value in field_values(file.fields).items() if not key.startswith(("split.", "aaac."))}
    metadata["general.file_type"] = Value(int(FILE_TYPES[settings.type]), GGUFValueType.UINT32)
    metadata["general.quantization_version"] = Value(gguf.GGML_QUANT_VERSION, GGUFValueType.UINT32)
    if quantized:
        description = {**inputs.description, "method": settings.method, "feedback": settings.feeds_back(inputs)}
        metadata[fmt.KEY_QUANTIZER] = Value(f"aaac-gguf {__version__}", GGUFValueType.STRING)
        metadata[fmt.KEY_CALIBRATION] = Value(json.dumps(description), GGUFValueType.STRING)
    return metadata


def dry_run(source: Path, out: Path, settings: Settings) -> tuple[list[TensorPlan], int]:
    """The plan and the exact bytes of the file that `convert` would write."""
    check_output(out)
    with full_precision(source, out.parent, header_only=True) as header:
        plans, quantized, inputs = outline(source, header, settings)
        metadata = output_metadata(header, settings, inputs, quantized)
        return plans, file_bytes(metadata, [p.info for p in plans], blank_codecs(plans))


def file_bytes(metadata: Metadata, tensors: Sequence[TensorInfo], codecs: Mapping[str, fmt.Codec]) -> int:
    """The size of the GGUF that `write_gguf` makes of these."""
    align = alignment(metadata)
    return len(_header(metadata, tensors, codecs)) + sum(t.n_bytes + -t.n_bytes % align for t in tensors)


def _header(metadata: Metadata, tensors: Sequence[TensorInfo], codecs: Mapping[str, fmt.Codec]) -> bytes:
    return render_header({**metadata, **(codec_values(codecs) if codecs else {})}, tensors)


def write_gguf(
    out: Path, metadata: Metadata, plans: Sequence[TensorPlan], encode: Callable[[TensorPlan], Any], codecs: Mapping[str, fmt.Codec]
) -> None:
    """Write a GGUF tensor by tensor. `encode` returns one tensor's data and may fill in its entry of `codecs`, which keeps the header's size."""
    infos = [p.info for p in plans]
    align = alignment(metadata)
    header = _header(metadata, infos, codecs)
    bar = tqdm(total=sum(p.n_weights for p in plans), desc="quantizing", unit="weight", unit_scale=True, disable=None, leave=False)
    with bar, atomic(out) as f:
        f.write(header)
        for plan in plans:
            data = encode(plan)
            if data.nbytes != plan.n_bytes:
                raise AssertionError(f"tensor {plan.name} takes {data.nbytes} bytes, planned {plan.n_bytes}")
            f.write(memoryview(data).cast("B"))
            f.write(bytes(-plan.n_bytes % align))
            bar.update(plan.n_weights)
        final = _header(metadata, infos, codecs)
        assert len(final) == len(header)
        f.seek(0)
        f.write(final)


def dequantize_file(source: Path, out: Path, ggml_type: T) -> int:
    """Write the decoded weights of `source` as F32, F16 or BF16, a file that stock llama.cpp runs. Returns its bytes."""
    check_output(out)
    file = read(source)
    plans = []
    for name, tensor in file.tensors.items():
        shape = tuple(int(n) for n in reversed(tensor.shape))
        floating = tensor.tensor_type not in (T.I8, T.I16, T.I32, T.I64, T.F64)
        wanted = (ggml_type if len(shape) > 1 else T.F32) if floating else tensor.tensor_type
        plans.append(TensorPlan(name, shape, tensor.tensor_type, wanted, ""))

    def decode(plan: TensorPlan) -> Any:
        tensor = file.tensors[plan.name]
        if plan.type == plan.source_type:
            return np.ascontiguousarray(tensor.data)
        return encode_stock(torch.from_numpy(dequantize(tensor.data, tensor.tensor_type, file.codecs.get(plan.name))), plan.type)

    settings = Settings(type=ggml_type)
    write_gguf(out, output_metadata(file, settings, Inputs({"source": "none"}), []), plans, decode, {})
    return out.stat().st_size
