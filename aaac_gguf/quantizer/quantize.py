"""Quantize one tensor: the entry point of the quantizer."""

from __future__ import annotations

import math
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

# A channel that calibration saw inactive keeps this share of the mean importance, so its weights are still rounded sensibly.
_IMPORTANCE_FLOOR = 1e-8


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A tensor as it is written.

    type             its type
    data             blocks, uint8 [..., row bytes], with the outer dimensions of the weight
    codec            codebooks, scale base and mantissa bits of an AAAC type; None for other types
    relative_error   sum (w - q)^2 / sum w^2
    weighted_error   the same under the importance; with a Hessian tr(O (W - Q) H (W - Q)^T) / tr(O W H W^T), O the identity if no outputs are given
    damping          what was added to the Hessian's diagonal, relative to its mean, the largest over the experts; 0 without a Hessian
    """

    type: T
    data: NDArray[np.uint8]
    codec: Codec | None
    relative_error: float
    weighted_error: float
    damping: float

    def dequantize(self) -> NDArray[np.float32]:
        """Return the weights that a reader of the file sees, float32 in the shape of the weight."""
        return dequantize(self.data, self.type, self.codec)


def quantize(
    weight: Tensor,
    type: T,
    importance: Tensor | None = None,
    hessian: Tensor | None = None,
    outputs: Tensor | None = None,
    *,
    method: Method = "aaac",
    seed: int = 0,
    backend: str | None = None,
) -> QuantizedTensor:
    """Quantize `weight`, float32 [N, K] or [E, N, K] with E experts that share the codebooks, on the device where it is.

    importance: mean of x^2 per input channel, [K] or [E, K]; an expert whose importance is zero throughout was never routed to and counts as 1.
    hessian: mean of x x^T, [K, K] or [E, K, K], taken instead of an importance: the weights are encoded with error feedback.
    outputs: [N, N], mean of g g^T of the gradient at the outputs, up to a factor, for feedback between rows as well; goes with a Hessian and a single
    matrix (ValueError).
    method: "aaac", or "paper" for Algorithm 1 of the paper with absmax scales, which takes no Hessian and makes AAAC types only (ValueError).
    Weights must be finite. The same seed gives the same bytes. Raises AaacError for rows that are not whole blocks.
    """
    quantizer = _quantizer(type, weight.shape[-1])
    if method == "paper" and (hessian is not None or method not in quantizer.methods):
        raise ValueError("the paper's method has no error feedback and no stock types")
    if outputs is not None and (hessian is None or weight.dim() != 2):
        raise ValueError("outputs go with a Hessian and a single matrix")
    experts = weight.reshape(-1, *weight.shape[-2:])
    n_experts, n_rows, n_per_row = experts.shape
    largest = float(weight.abs().amax())
    unit = _power_of_two(largest)
    if hessian is not None:
        hessian = hessian.reshape(n_experts, n_per_row, n_per_row)
        importance = hessian.diagonal(dim1=1, dim2=2)
    importance = _normalised(importance, n_experts, n_per_row, weight.device)
    tensor = WeightedTensor(experts, importance, unit, by_magnitude=method == "aaac" and hessian is None)
    chosen = choose_backend(weight.device, backend, feedback=hessian is not None)
    codec = quantizer.fit(tensor, largest / unit, method, seed, chosen)
    rounder = quantizer.rounder(codec, unit, weight.device, method, chosen)

    data = []
    sums = np.zeros((2, 2))
    damping = 0.0
    for expert in range(n_experts):
        inputs = None
        if hessian is not None:
            inputs = factor(hessian[expert])
            damping = max(damping, inputs.damping)
        for rows in row_chunks(experts[expert]) if hessian is None else [slice(0, n_rows)]:
            w, error_weight = tensor.rows(expert, rows)
            packed, decoded = rounder(w, error_weight, inputs, outputs)
            data.append(packed)
            for row, values in enumerate((w - decoded, w)):
                weighted = (
                    _weighted_square(values, importance[expert])
                    if hessian is None
                    else output_error(values, hessian[expert], outputs)
                )
                sums[row] += _weighted_square(values, torch.ones_like(importance[expert])), weighted
    relative, weighted = np.divide(sums[0], sums[1], out=np.zeros(2), where=sums[1] > 0)
    return QuantizedTensor(
        type, np.concatenate(data).reshape(*weight.shape[:-1], -1), codec, float(relative), float(weighted), damping
    )


def _quantizer(type: T, n_per_row: int) -> Quantizer:
    """Return the quantizer of a type. Raises AaacError for a type without one, and for rows that are not whole blocks."""
    entry = TENSOR_TYPES.get(type)
    if not entry or not entry.quantizer:
        raise AaacError(f"`type` {type.name}: it is not rounded by search; choose a quantized type")
    block_size = GGML_QUANT_SIZES[type][0]
    if n_per_row % block_size:
        raise AaacError(
            f"{type.name}: rows of {n_per_row} weights are not whole blocks of {block_size}; use another type for this tensor"
        )
    return entry.quantizer


def _power_of_two(largest: float) -> float:
    """Return the power of two at or below the largest magnitude, at least 2^-100."""
    return 2.0 ** max(math.frexp(largest)[1] - 1, -100) if largest > 0 else 1.0


def _normalised(importance: Tensor | None, n_experts: int, n_per_row: int, device: torch.device) -> Tensor:
    """Return importance float32 [E, K] with mean 1 over the experts that have any, 1 for the others, and a floor."""
    if importance is None:
        return torch.ones(n_experts, n_per_row, device=device)
    values = importance.to(device, torch.float64).reshape(-1, n_per_row).expand(n_experts, n_per_row)
    idle = values.sum(1, keepdim=True) <= 0
    mean = values[~idle[:, 0]].mean() if not bool(idle.all()) else values.new_ones(())
    return torch.where(idle, torch.ones_like(values), values / mean).clamp_min(_IMPORTANCE_FLOOR).float()


def _weighted_square(values: Tensor, weight: Tensor) -> float:
    return float((values.square() @ weight).double().sum())
