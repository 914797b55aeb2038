"""Hugging Face checkpoints to 4-bit GGUF with two learned codebooks per matrix (AAAC, arXiv 2605.08692).

The functions here are what the command line calls. Importing the package loads neither torch nor transformers: each
function imports what it needs.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np
    import torch

    from . import inference as inference
    from .conversion.convert import DryRun, Report
    from .conversion.measure import MeasureReport
    from .conversion.settings import Settings
    from .files.gguf import GgufFile
    from .quantizer.quantize import QuantizedTensor
    from .reporting.results import Comparison, Verification

__version__ = "0.1.0"
__all__ = ["card", "compare", "inference", "load", "measure", "plan", "quantize", "quantize_tensor", "verify"]


def quantize(
    source: str | Path,
    output: str | Path,
    *,
    type: str = "AAAC4_G16",
    calibration: str | Path | None = None,
    imatrix: str | Path | None = None,
    embedding_type: str | None = None,
    tensor_types: Mapping[str, str] | Sequence[tuple[str, str]] = (),
    bpw: float | None = None,
    size: int | None = None,
    stock: bool = False,
    method: Literal["aaac", "paper"] = "aaac",
    feedback: bool = True,
    sequences: int = 64,
    sequence_length: int = 512,
    seed: int = 0,
    device: str = "cpu",
    split_max_size: int | None = None,
    allow_requantize: bool = False,
    strict: bool = False,
    moments: str | Path | None = None,
    base: str | Path | None = None,
    resume: bool = False,
) -> Report:
    """Quantize a model to a GGUF file, as `aaac-gguf convert` does.

    source: a Hugging Face model folder, a full-precision GGUF file, or a model on the Hugging Face Hub ("owner/name").
    calibration: a text file, "bundled" for the text that comes with the package, "self" for tokens that the model
    samples from itself, or "none". The default is "bundled" for a folder and "none" for a GGUF.
    imatrix: an importance file of llama.cpp instead. moments: a folder of `measure` instead.
    base: a finished file of the model. What `tensor_types` names is quantized anew, the rest is copied from it.
    tensor_types: maps regular expressions to types. The other settings: see `conversion.settings.Settings`.

    Returns what was made: files, errors by tensor, what calibration did not reach. Raises AaacError, a ValueError, for
    bad input.
    """
    from .conversion.convert import convert

    settings = _settings(
        type=type,
        embedding_type=embedding_type,
        tensor_types=tensor_types,
        calibration=calibration,
        imatrix=imatrix,
        sequences=sequences,
        sequence_length=sequence_length,
        method=method,
        feedback=feedback,
        seed=seed,
        device=device,
        bpw=bpw,
        size=size,
        stock=stock,
        split_max_size=split_max_size,
        allow_requantize=allow_requantize,
        strict=strict,
        moments=moments,
        base=base,
    )
    return convert(_located(source), Path(output), settings, resume)


def measure(
    source: str | Path,
    output: str | Path,
    *,
    calibration: str | Path | None = None,
    imatrix: str | Path | None = None,
    embedding_type: str | None = None,
    sequences: int = 64,
    sequence_length: int = 512,
    seed: int = 0,
    device: str = "cpu",
    allow_requantize: bool = False,
    strict: bool = False,
) -> MeasureReport:
    """Run a model's calibration once, and keep it in the folder `output`, as `aaac-gguf measure` does.

    `quantize` with `moments` makes any types and sizes from it, to the same bytes as with the same settings here.
    embedding_type: measure the embeddings and the output matrix too, if they will have less than 5 bits. The other
    settings are those of `quantize`. Raises AaacError for bad input.
    """
    from .conversion.measure import measure as measure_model

    settings = _settings(
        calibration=calibration,
        imatrix=imatrix,
        embedding_type=embedding_type,
        sequences=sequences,
        sequence_length=sequence_length,
        seed=seed,
        device=device,
        allow_requantize=allow_requantize,
        strict=strict,
    )
    return measure_model(_located(source), Path(output), settings)


def plan(source: str | Path, output: str | Path, **settings: Any) -> DryRun:
    """Plan what `quantize` would write with the same settings: each tensor's type and rounding, and the exact bytes."""
    from .conversion.convert import dry_run

    return dry_run(_located(source), Path(output), _settings(**settings))


def load(path: str | Path) -> GgufFile:
    """Open a GGUF file, or a split one by any of its files.

    `file["blk.0.attn_q.weight"]` is a tensor's decoded weights, float32 in numpy order. Raises AaacError for whatever
    is not a whole, valid file.
    """
    from .files.gguf import read

    return read(path)


def quantize_tensor(
    weight: np.ndarray | torch.Tensor,
    type: str = "AAAC4_G16",
    *,
    importance: np.ndarray | torch.Tensor | None = None,
    hessian: np.ndarray | torch.Tensor | None = None,
    outputs: np.ndarray | torch.Tensor | None = None,
    method: Literal["aaac", "paper"] = "aaac",
    seed: int = 0,
) -> QuantizedTensor:
    """Quantize one weight matrix float [N, K], or [E, N, K] with E experts.

    importance: mean of x^2 per input channel, [K] or [E, K]. hessian: mean of x x^T, [K, K] or [E, K, K], instead: then
    there is error feedback. outputs: mean of g g^T of the gradient at the outputs, [N, N], for feedback between rows.
    Raises AaacError for rows that are not whole blocks of the type, and for weights that are not finite.
    """
    import torch

    from .conversion.settings import parse_type
    from .errors import AaacError
    from .quantizer.quantize import quantize as quantize_weight

    def tensor(values: np.ndarray | torch.Tensor | None) -> torch.Tensor | None:
        return None if values is None else torch.as_tensor(values, dtype=torch.float32)

    matrix = torch.as_tensor(weight, dtype=torch.float32)
    if not torch.isfinite(matrix).all():
        raise AaacError("weight holds NaN or Inf")
    moments = tensor(hessian), tensor(outputs)
    return quantize_weight(matrix, parse_type(type, "type"), tensor(importance), *moments, method=method, seed=seed)


def compare(
    source: str | Path,
    output: str | Path,
    *,
    types: Sequence[str] | None = None,
    texts: Sequence[str | Path] = (),
    calibration: str | Path | None = None,
    imatrix: str | Path | None = None,
    embedding_type: str = "Q6_K",
    device: str = "cpu",
    n_ctx: int = 512,
    n_chunks: int = 64,
    cache_types: Sequence[str] = (),
) -> Comparison:
    """Quantize a model to several types and measure each against the full model, as `aaac-gguf compare` does.

    types: those of `quantize`, llama-quantize's recipes, and finished .gguf files. What both programs make is there
    twice. texts: what to measure on; by default one that the model writes. cache_types: of the KV cache, to measure
    each file with besides F16. Writes comparison.json and comparison.html into the folder `output`. Raises AaacError
    for bad input.
    """
    from .reporting import compare as comparing

    settings = _settings(calibration=calibration, imatrix=imatrix, embedding_type=embedding_type, device=device)
    options = comparing.Options(
        types or comparing.DEFAULT_TYPES, [Path(text) for text in texts], settings, n_ctx, n_chunks, cache_types
    )
    return comparing.compare(_located(source), Path(output), options)


def verify(
    file: str | Path,
    source: str | Path | None = None,
    *,
    text: str | Path | None = None,
    imatrix: str | Path | None = None,
    gpu: bool = False,
) -> Verification:
    """Check a file's structure, and with its `source` also every tensor and llama.cpp's logits on a text.

    gpu: decode every tensor on the GPU as well and compare it to the bit. An empty `.failures` is a pass. Raises
    AaacError for a file that cannot be read at all.
    """
    from .reporting.verify import verify as verify_file

    found = source if source is None else _located(source)
    return verify_file(Path(file), found, Path(text) if text else None, Path(imatrix) if imatrix else None, gpu)


def card(file: str | Path, comparison: str | Path | None = None) -> str:
    """Return a model card for the Hugging Face Hub, in Markdown, as `aaac-gguf card` writes it.

    comparison: the comparison.json of `compare`, for a table of what was measured. Raises AaacError for bad input.
    """
    from .reporting.card import card as make_card

    return make_card(Path(file), Path(comparison) if comparison else None)


def _located(source: str | Path) -> Path:
    from .models.source import locate

    return locate(str(source))


def _settings(
    *,
    tensor_types: Mapping[str, str] | Sequence[tuple[str, str]] = (),
    calibration: str | Path | None = None,
    imatrix: str | Path | None = None,
    moments: str | Path | None = None,
    base: str | Path | None = None,
    **others: Any,
) -> Settings:
    from .conversion.settings import Settings

    return Settings(
        tensor_types=tuple(tensor_types.items() if isinstance(tensor_types, Mapping) else tensor_types),
        calibration=None if calibration is None else str(calibration),
        imatrix=None if imatrix is None else Path(imatrix),
        moments=None if moments is None else Path(moments),
        base=None if base is None else Path(base),
        **others,
    )


def __getattr__(name: str) -> Any:
    if name == "inference":  # imported at first use
        return importlib.import_module(".inference", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
