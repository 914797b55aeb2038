"""Quantize one tensor: the entry point of the quantizer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as T
from numpy.typing import NDArray
from torch import Tensor

from ..errors import AaacError
from ..files.format import Codec
from ..files.gguf import dequantize
from .backends import choose_backend
from .grid import row_chunks
from .moments import factor, output_error
from .types import TENSOR_TYPES, Method, Quantizer
from .weighted import WeightedTensor

# A channel that calibration saw inactive keeps this share of the mean importance, so that its weights are still rounded
# sensibly.
_IMPORTANCE_FLOOR = 1e-8


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A tensor as it is written to a file, and how far it is from the weights.

    type            the type of the tensor
    data            blocks, uint8 [..., row bytes], with the outer dimensions of the weights
    codec           the codebooks, scale base and mantissa bits of an AAAC type; None for other types
    relative_error  sum (w - q)^2 / sum w^2
    weighted_error  the same with each square times the importance; with a Hessian tr(O (W - Q) H (W - Q)^T) /
                    tr(O W H W^T), where O is the identity if no outputs are given
    damping         the number that was added to the diagonal of the Hessian, relative to its mean. It is the largest
                    over the experts, and 0 without a Hessian.
    """

    type: T
    data: NDArray[np.uint8]
    codec: Codec | None
    relative_error: float
    weighted_error: float
    damping: float

    def dequantize(self) -> NDArray[np.float32]:
        """Return the weights that a reader of the file sees, float32 [..., K]."""
        return dequantize(self.data, self.type, self.codec)


def quantize(
    weight: Tensor,
    type: T,
    importance: Tensor | None = None,
    hessian: Tensor | Sequence[Tensor] | None = None,
    outputs: Tensor | None = None,
    *,
    method: Method = "aaac",
    seed: int = 0,
    backend: str | None = None,
) -> QuantizedTensor:
    """Quantize `weight`, float32 [N, K] or [E, N, K] for E experts that share the codebooks, on the device where it is.

    type: a type that TENSOR_TYPES has a quantizer for.
    importance: [K] or [E, K], the mean of x^2 for each input channel. An expert whose importance is all zero was never
    routed to, and counts as 1.
    hessian: [K, K], or [E, K, K] or a sequence of E of [K, K], the mean of x x^T. It replaces the importance, and there
    is error feedback.
    outputs: [N, N], the mean of g g^T for the gradients g at the outputs, up to a factor. With it there is feedback
    between rows too. It needs a Hessian and a single matrix.
    method: "aaac", or "paper" for Algorithm 1 of the paper with absmax scales. The latter takes no Hessian, and makes
    AAAC types only.
    seed: the same seed gives the same bytes.
    backend: "torch", "native" or "cuda"; None for the fastest that works.

    Weights must be finite. Raises AaacError for rows that are not whole blocks and for a type or backend that cannot be
    used, and ValueError for arguments that exclude each other.
    """
    quantizer = _quantizer(type, weight.shape[-1])
    if method == "paper" and (hessian is not None or method not in quantizer.methods):
        raise ValueError("the paper's method has no error feedback and no stock types")
    if outputs is not None and (hessian is None or weight.dim() != 2):
        raise ValueError("outputs go with a Hessian and a single matrix")
    experts = weight.reshape(-1, *weight.shape[-2:])
    n_experts, n_rows, n_per_row = experts.shape
    if isinstance(hessian, Tensor):
        hessian = hessian.reshape(n_experts, n_per_row, n_per_row)
    if hessian is not None:
        importance = torch.stack([of_expert.diagonal() for of_expert in hessian])
    importance = _normalised(importance, n_experts, n_per_row, weight.device)
    largest = float(weight.abs().amax())
    unit = _power_of_two(largest)
    tensor = WeightedTensor(experts, importance, unit, by_magnitude=method == "aaac" and hessian is None)
    search = choose_backend(weight.device, backend, feedback=hessian is not None)
    codec = quantizer.fit(tensor, largest / unit, method, seed, search)
    rounder = quantizer.rounder(codec, unit, weight.device, method, search)

    data, damping = [], 0.0
    errors, totals = _SquareSums(), _SquareSums()
    for expert in range(n_experts):
        metric = importance[expert] if hessian is None else hessian[expert]
        inputs = None if hessian is None else factor(metric)
        damping = max(damping, inputs.damping if inputs else 0.0)
        # With feedback, rows are cut into chunks there.
        for rows in row_chunks(experts[expert]) if inputs is None else [slice(0, n_rows)]:
            w, error_weight = tensor.rows(expert, rows)
            blocks, decoded = rounder(w, error_weight, inputs, outputs)
            data.append(blocks)
            errors.add(w - decoded, metric, outputs)
            totals.add(w, metric, outputs)
    return QuantizedTensor(
        type,
        np.concatenate(data).reshape(*weight.shape[:-1], -1),
        codec,
        errors.plain / totals.plain if totals.plain > 0 else 0.0,
        errors.weighted / totals.weighted if totals.weighted > 0 else 0.0,
        damping,
    )


@dataclass
class _SquareSums:
    """The sum of the squares of some values, and the same under an importance or a Hessian."""

    plain: float = 0.0
    weighted: float = 0.0

    def add(self, values: Tensor, metric: Tensor, outputs: Tensor | None) -> None:
        """Add values [n, K]. metric: importance [K] or Hessian [K, K]."""
        squares = values.square()
        self.plain += float((squares @ torch.ones_like(squares[0])).double().sum())
        if metric.dim() == 1:
            self.weighted += float((squares @ metric).double().sum())
        else:
            self.weighted += output_error(values, metric, outputs)


def _quantizer(type: T, n_per_row: int) -> Quantizer:
    """Return the quantizer of a type. Raises AaacError if it has none, and for rows that are not whole blocks."""
    entry = TENSOR_TYPES.get(type)
    if not entry or not entry.quantizer:
        choices = ", ".join(t.name for t, entry in TENSOR_TYPES.items() if entry.quantizer)
        raise AaacError(f"`type` {type.name}: there is no search for this type; choose from {choices}")
    block_size = GGML_QUANT_SIZES[type][0]
    if n_per_row % block_size:
        raise AaacError(
            f"{type.name}: rows of {n_per_row} weights are not whole blocks of {block_size}; "
            "use another type for this tensor"
        )
    return entry.quantizer


def _power_of_two(largest: float) -> float:
    """Return the power of two at or below the largest magnitude, at least 2^-100."""
    return 2.0 ** max(math.frexp(largest)[1] - 1, -100) if largest > 0 else 1.0


def _normalised(importance: Tensor | None, n_experts: int, n_per_row: int, device: torch.device) -> Tensor:
    """Return the importance as float32 [E, K] with a floor, of mean 1 over the experts that have any.

    It is 1 for the others.
    """
    if importance is None:
        return torch.ones(n_experts, n_per_row, device=device)
    values = importance.to(device, torch.float64).reshape(-1, n_per_row).expand(n_experts, n_per_row)
    idle = values.sum(1, keepdim=True) <= 0
    mean = values[~idle[:, 0]].mean() if not bool(idle.all()) else values.new_ones(())
    return torch.where(idle, torch.ones_like(values), values / mean).clamp_min(_IMPORTANCE_FLOOR).float()
