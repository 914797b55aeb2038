"""One tensor in, blocks and codec out: the entry point of the quantizer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
import torch
from gguf import GGMLQuantizationType as T
from numpy.typing import NDArray
from torch import Tensor

from ..files.format import MAX_LEVEL, TYPES_BY_ID, AaacType, Codec, pack, scale_factors
from .codebook import fit, fit_paper
from .feedback import feedback, feedback_on_steps
from .grid import Encoded, Grid, row_chunks
from .kquants import KQUANTS, KQuant
from .moments import Factor, factor, output_error
from .search import decode, encode, encode_absmax
from .stock import STOCK_TYPES, StockType

Method = Literal["aaac", "paper"]

# Weights from which a codebook pair is fitted; the scales are searched for every group all the same. Of a 4096 x 4096 matrix (Student's t, two seeds)
# the error is 0.00427 and 0.00433 with so many, 0.00427 with all.
_FIT_SAMPLE = 1 << 20
# A channel that calibration saw inactive keeps this share of the mean importance, so that its weights are still rounded sensibly.
_IMPORTANCE_FLOOR = 1e-8


def quantizer_type(ggml_type: T) -> AaacType | StockType | KQuant:
    """What `quantize` takes for a type that is rounded by search."""
    return TYPES_BY_ID.get(ggml_type) or STOCK_TYPES.get(ggml_type) or KQUANTS[ggml_type]


@dataclass(frozen=True, eq=False)
class Quantized:
    """A tensor in the format.

    data             uint8 [..., row bytes], the outer dimensions of the weight
    codec            its codebooks, scale base and mantissa bits; None for a stock type
    relative_error   sum (w - q)^2 / sum w^2
    weighted_error   the same under the importance, or tr(O (W - Q) H (W - Q)^T) / tr(O W H W^T) with a Hessian; O is 1 where no outputs are given
    damping          what the Hessian's diagonal took, relative to its mean, at most over the experts; 0 without a Hessian
    """

    data: NDArray[np.uint8]
    codec: Codec | None
    relative_error: float
    weighted_error: float
    damping: float


class _Source:
    """The weights [E, N, K] in units that keep squares inside float32, and the error weight of each.

    With `by_magnitude` the error weight is importance * sqrt(mean(w^2) + w^2), the mean over the row, as in llama.cpp's quantizers: the importance
    is known for the calibration text only, and large weights are the ones that other text can turn into large errors.
    """

    def __init__(self, weight: Tensor, importance: Tensor, unit: float, by_magnitude: bool):
        self.weight, self.importance, self.unit, self.by_magnitude = weight, importance, unit, by_magnitude
        flat = weight.reshape(-1, weight.shape[-1])
        self.mean_square = (torch.linalg.vector_norm(flat, dim=1) / unit).square() / flat.shape[1]

    def rows(self, expert: int, rows: slice) -> tuple[Tensor, Tensor]:
        """Weights float32 [n, K] and their error weights, broadcastable to them."""
        w = self.weight[expert, rows] / self.unit
        return w, self._error_weight(
            w, self.importance[expert], self.mean_square.view(self.weight.shape[:2])[expert, rows, None]
        )

    def groups(self, group_size: int, limit: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Groups [G, group_size] and their error weights: all, or `limit` weights' worth drawn at random (on the CPU: the same for every device)."""
        n_experts, n_rows, n_per_row = self.weight.shape
        per_row = n_per_row // group_size
        total, wanted = n_experts * n_rows * per_row, limit // group_size
        drawn = torch.arange(total) if total <= wanted else torch.randint(total, (wanted,), generator=generator)
        drawn = drawn.to(self.weight.device)
        row = drawn // per_row
        w = self.weight.reshape(-1, group_size)[drawn] / self.unit
        importance = self.importance.view(n_experts, per_row, group_size)[row // n_rows, drawn % per_row]
        return w, self._error_weight(w, importance, self.mean_square[row, None])

    def _error_weight(self, w: Tensor, importance: Tensor, mean_square: Tensor) -> Tensor:
        return importance * torch.sqrt(mean_square + w.square()) if self.by_magnitude else importance


def quantize(
    weight: Tensor,
    qtype: AaacType | StockType | KQuant,
    importance: Tensor | None = None,
    hessian: Tensor | None = None,
    outputs: Tensor | None = None,
    *,
    method: Method = "aaac",
    seed: int = 0,
) -> Quantized:
    """Quantize `weight`, float32 [N, K] or [E, N, K] with E experts that share the codebooks, on the device where it is.

    importance: mean of x^2 per input channel, [K] or [E, K]; an expert whose importance is zero throughout was never routed to and counts as 1.
    hessian: mean of x x^T, [K, K] or [E, K, K], taken instead of an importance: the weights are encoded with error feedback.
    outputs: [N, N], mean of g g^T of the gradient at the outputs, up to a factor, for feedback between rows as well; goes with a Hessian and a single
    matrix (ValueError).
    method: "aaac", or "paper" for Algorithm 1 of the paper with absmax scales, which takes no Hessian and makes AAAC types only (ValueError).
    Weights must be finite. The same seed gives the same bytes. Raises AaacError for rows that are not whole blocks.
    """
    if method == "paper" and (hessian is not None or not isinstance(qtype, AaacType)):
        raise ValueError("the paper's method has no error feedback and no stock types")
    if outputs is not None and (hessian is None or weight.dim() != 2):
        raise ValueError("outputs go with a Hessian and a single matrix")
    if isinstance(qtype, AaacType):
        qtype.row_bytes(weight.shape[-1])  # refuses ragged rows
    experts = weight.reshape(-1, *weight.shape[-2:])
    n_experts, n_rows, n_per_row = experts.shape
    largest = float(weight.abs().amax())
    unit = _power_of_two(largest)
    if hessian is not None:
        hessian = hessian.reshape(n_experts, n_per_row, n_per_row)
        importance = hessian.diagonal(dim1=1, dim2=2)
    importance = _normalised(importance, n_experts, n_per_row, weight.device)
    source = _Source(experts, importance, unit, by_magnitude=method == "aaac" and hessian is None)

    codec = None
    if isinstance(qtype, KQuant):
        rounded = _k_rounding(qtype, unit)
    elif isinstance(qtype, StockType):
        rounded = _grid_rounding(qtype, qtype.grid(weight.device, unit), qtype.pack)
    else:
        codec = _in_range(_fitted(source, qtype, largest / unit, method, seed), unit)
        rounded = _grid_rounding(
            qtype, Grid.of_codec(codec, qtype, weight.device, unit), partial(_pack, qtype), absmax=method == "paper"
        )

    data = []
    sums = np.zeros((2, 2))
    damping = 0.0
    for expert in range(n_experts):
        inputs = None
        if hessian is not None:
            inputs = factor(hessian[expert])
            damping = max(damping, inputs.damping)
        for rows in row_chunks(experts[expert]) if hessian is None else [slice(0, n_rows)]:
            w, error_weight = source.rows(expert, rows)
            packed, decoded = rounded(w, error_weight, inputs, outputs)
            data.append(packed)
            for row, values in enumerate((w - decoded, w)):
                weighted = (
                    _weighted_square(values, importance[expert])
                    if hessian is None
                    else output_error(values, hessian[expert], outputs)
                )
                sums[row] += _weighted_square(values, torch.ones_like(importance[expert])), weighted
    relative, weighted = np.divide(sums[0], sums[1], out=np.zeros(2), where=sums[1] > 0)
    return Quantized(
        np.concatenate(data).reshape(*weight.shape[:-1], -1), codec, float(relative), float(weighted), damping
    )


# Weights [n, K] and their error weights, the factored H and O if there are any -> blocks uint8 [n, row bytes] and what they decode to.
Rounding = Callable[[Tensor, Tensor, Factor | None, Tensor | None], tuple[NDArray[np.uint8], Tensor]]


def _grid_rounding(
    qtype: AaacType | StockType, grid: Grid, pack: Callable[[Encoded], NDArray[np.uint8]], absmax: bool = False
) -> Rounding:
    def rounded(
        w: Tensor, error_weight: Tensor, inputs: Factor | None, outputs: Tensor | None
    ) -> tuple[NDArray[np.uint8], Tensor]:
        if inputs:
            encoded = feedback(w, inputs, grid, qtype, outputs)
        else:
            encoded = (encode_absmax if absmax else encode)(w, error_weight, grid, qtype.group_size)
        return pack(encoded), decode(encoded, grid)

    return rounded


def _k_rounding(kind: KQuant, unit: float) -> Rounding:
    def rounded(
        w: Tensor, error_weight: Tensor, inputs: Factor | None, outputs: Tensor | None
    ) -> tuple[NDArray[np.uint8], Tensor]:
        w = w * unit
        steps = kind.steps(w, error_weight.expand(w.shape))
        quants = feedback_on_steps(w, inputs, steps, outputs) if inputs else steps.quants(w)
        return kind.packed(quants, steps), steps.weights(quants) / unit

    return rounded


def _fitted(source: _Source, qtype: AaacType, largest: float, method: Method, seed: int) -> Codec:
    generator = torch.Generator().manual_seed(seed)
    if method == "paper":
        return fit_paper(*source.groups(qtype.group_size, source.weight.numel(), generator), qtype, largest, generator)
    return fit(*source.groups(qtype.group_size, _FIT_SAMPLE, generator), qtype, largest)


def _power_of_two(largest: float) -> float:
    """The power of two at or below the largest magnitude, at least 2^-100."""
    return 2.0 ** max(math.frexp(largest)[1] - 1, -100) if largest > 0 else 1.0


def _in_range(codec: Codec, unit: float) -> Codec:
    """The codec for weights that are `unit` times as large, the scale base kept a normal number and no scale times a level beyond float32."""
    reach = float(scale_factors(codec.scale_mantissa_bits)[-1]) * MAX_LEVEL
    limits = np.finfo(np.float32)
    base = min(max(codec.scale_base * unit, float(limits.tiny)), 0.999 * float(limits.max) / reach)
    return replace(codec, scale_base=float(np.float32(base)))


def _normalised(importance: Tensor | None, n_experts: int, n_per_row: int, device: torch.device) -> Tensor:
    """Importance float32 [E, K] with mean 1 over the experts that have any, 1 for the others, and a floor."""
    if importance is None:
        return torch.ones(n_experts, n_per_row, device=device)
    values = importance.to(device, torch.float64).reshape(-1, n_per_row).expand(n_experts, n_per_row)
    idle = values.sum(1, keepdim=True) <= 0
    mean = values[~idle[:, 0]].mean() if not bool(idle.all()) else values.new_ones(())
    return torch.where(idle, torch.ones_like(values), values / mean).clamp_min(_IMPORTANCE_FLOOR).float()


def _weighted_square(values: Tensor, weight: Tensor) -> float:
    return float((values.square() @ weight).double().sum())


def _pack(qtype: AaacType, encoded: Encoded) -> NDArray[np.uint8]:
    parts = (encoded.indices, encoded.selectors, encoded.scale_codes.to(torch.uint8))
    return pack(qtype, *(part.cpu().numpy() for part in parts))
