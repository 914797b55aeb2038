"""Find an encoding without loss of weights that are 4-bit by nature, and prove it by decoding.

Some checkpoints hold few values in every group: those trained for a 4-bit type, and those decoded from one. Such a
group is a scale times levels of a grid. The checkpoint's dtype has rounded the products, so each weight allows an
interval of scales. A scale of the type inside all intervals of a group encodes the group.

Without loss means: each decoded weight, rounded to the dtype of the source, is the source's weight. -0 counts as 0.
Weights stored as float32 may be a copy of a narrower dtype. Then the narrowest that holds them all is their dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import gguf
import numpy as np
import torch
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as T
from torch import Tensor

from ..files import format as fmt
from ..files.format import U8, AaacType, Codec
from ..files.gguf import dequantize
from .grid import Encoded, row_chunks
from .stock import STOCK_TYPES

# From the smallest to the largest. Of two with as many bits the first is the one that more programs run fast.
EXACT_TYPES = (T["AAAC4_G128"], T.MXFP4, T["AAAC4_G32"], T.Q4_0, T.IQ4_NL, T["AAAC4_G16"], T.Q5_0, T.Q8_0)

# Different values among 16 weights, on average, at most. 16 levels that are drawn at random give 10.3, and
# full-precision weights nearly 16.
_FEW_VALUES = 13
# So many of the groups with most values tell the levels and scales of an AAAC type.
_TELLING_GROUPS = 64

# Beyond this level the largest weight, rounded to bfloat16, tells the scale too roughly to tell levels apart.
_ROUGH_TOP = 32


@dataclass(frozen=True, eq=False)
class Exact:
    """An encoding without loss: blocks uint8 [..., row bytes], and the codec of an AAAC type."""

    data: U8
    codec: Codec | None = None


def has_few_values(weight: Tensor) -> bool:
    """Return whether groups of 16 weights [..., K] hold so few values that they may be 4-bit by nature."""
    if weight.shape[-1] % fmt.SELECTOR_SIZE or not bool(weight.any()):
        return False
    return float(_n_values(weight.reshape(-1, fmt.SELECTOR_SIZE)).double().mean()) <= _FEW_VALUES


def encode_exactly(weight: Tensor, dtype: torch.dtype, type: T) -> Exact | None:
    """Return the encoding of `weight`, float32 [..., K] on the CPU, as a type of EXACT_TYPES; None if there is none.

    dtype: the source's, float32, float16 or bfloat16.
    """
    rows = weight.reshape(-1, weight.shape[-1])
    if rows.shape[1] % GGML_QUANT_SIZES[type][0]:
        return None
    if dtype == torch.float32:
        dtype = next((d for d in (torch.bfloat16, torch.float16) if torch.equal(rows.to(d).float(), rows)), dtype)
    if type in fmt.TYPES_BY_ID:
        found = _encode_aaac(rows, dtype, fmt.TYPES_BY_ID[type])
    else:
        found = _in_chunks(rows, type, dtype, lambda chunk: _encode_stock(chunk, dtype, type))
    return Exact(found.data.reshape(*weight.shape[:-1], -1), found.codec) if found else None


def _in_chunks(
    rows: Tensor, type: T, dtype: torch.dtype, encode: Callable[[Tensor], U8 | None], codec: Codec | None = None
) -> Exact | None:
    """Encode rows chunk by chunk. Return None at the first that does not decode to the same weights."""
    data = []
    for part in row_chunks(rows):
        blocks = encode(rows[part])
        if blocks is None:
            return None
        decoded = torch.from_numpy(dequantize(blocks, type, codec))
        if not bool((decoded.to(dtype).float() == rows[part]).all()):
            return None
        data.append(blocks)
    return Exact(np.concatenate(data), codec)


def _encode_stock(rows: Tensor, dtype: torch.dtype, type: T) -> U8 | None:
    if type == T.MXFP4:  # its scales are powers of two, so the largest weight of a group tells the scale
        return np.asarray(gguf.quantize(rows.numpy(), type))
    levels = STOCK_TYPES[type].levels
    tops = sorted({abs(level) for level in levels} - {0}, reverse=type != T.Q8_0)
    signed = [float(sign * top) for top in tops for sign in (1, -1)] if levels[0] != -levels[-1] else tops
    fitted = _fit(rows.double().reshape(-1, 32), dtype, levels, signed, lambda scale: scale.half().double())
    if fitted is None:
        return None
    codes = fitted.scales.half().view(torch.int16).int().reshape(len(rows), -1) & 0xFFFF
    indices = fitted.indices.reshape(len(rows), -1)
    return STOCK_TYPES[type].pack(Encoded(indices, indices.new_empty(0), codes))


def _encode_aaac(rows: Tensor, dtype: torch.dtype, layout: AaacType) -> Exact | None:
    """Find levels and scales that all groups share, then the scale code of every group."""
    groups = rows.reshape(-1, layout.group_size)
    grid = _ScaleGrid.find(groups, dtype)
    if grid is None:
        return None
    tops = sorted({abs(level) for level in grid.levels} - {0}, reverse=True)
    fits = [_fit(rows[part].double().reshape(-1, layout.group_size), dtype, grid.levels, tops, grid.nearest)
            for part in row_chunks(rows)]  # fmt: skip
    if any(fit is None for fit in fits):
        return None
    scales = torch.cat([fit.scales for fit in fits if fit])
    codes, base = grid.codes(scales)
    if int(codes.max()) >= layout.n_scale_codes:
        return None
    # The codebook has 16 levels, of which the weights may use fewer.
    book = sorted([*grid.levels, *(n for n in range(fmt.MAX_LEVEL) if n not in grid.levels)][: fmt.N_LEVELS])
    place = torch.tensor([book.index(level) for level in grid.levels], dtype=torch.uint8)
    indices = torch.cat([place[fit.indices.long()] for fit in fits if fit]).reshape(rows.shape)
    codec = Codec(np.array([book, book], np.int8), base, grid.mantissa_bits)
    blocks = fmt.pack(
        layout,
        indices.numpy(),
        np.zeros((len(rows), rows.shape[1] // fmt.SELECTOR_SIZE), np.uint8),
        codes.to(torch.uint8).reshape(len(rows), -1).numpy(),
    )
    start = 0

    def next_rows(chunk: Tensor) -> U8:
        nonlocal start
        start += len(chunk)
        return blocks[start - len(chunk) : start]

    return _in_chunks(rows, T(layout.type_id), dtype, next_rows, codec)


@dataclass(frozen=True, eq=False)
class _ScaleGrid:
    """Levels and scales of an AAAC type: base * 2^k * (1 + j / 2^mantissa_bits), for k of any size."""

    levels: Sequence[int]
    base: float
    mantissa_bits: int

    @classmethod
    def find(cls, groups: Tensor, dtype: torch.dtype) -> _ScaleGrid | None:
        """Return what the groups with most values have in common; None if there is nothing."""
        telling = groups[_n_values(groups).argsort(descending=True, stable=True)[:_TELLING_GROUPS]].double()
        integers = range(-fmt.MAX_LEVEL, fmt.MAX_LEVEL + 1)
        first = _fit(telling, dtype, integers, range(1, fmt.MAX_LEVEL + 1), lambda scale: scale, partly=True)
        used = (
            [set((indices.int() - fmt.MAX_LEVEL).tolist()) for indices in first.indices[first.found]] if first else []
        )
        levels: set[int] = set()
        for more in used:
            levels = levels | more if len(levels | more) <= fmt.N_LEVELS else levels
        tops = sorted({abs(level) for level in levels} - {0}, reverse=True)
        fit = _fit(telling, dtype, sorted(levels), tops, lambda scale: scale, partly=True) if tops else None
        if fit is None or not bool(fit.found.any()):
            return None
        low, high = (bounds[fit.found] for bounds in (fit.low, fit.high))
        middle = (low + high) / 2
        reference = middle[((high - low) / middle).argmin()]
        for bits in fmt.MANTISSA_BITS:
            for j in range(1 << bits):
                factors = _nearest_factors(middle / (reference / (1 + j / 2**bits)), bits)
                least, most = float((low / factors).max()), float((high / factors).min())
                if least <= most * (1 + 2.0**-23):
                    return cls(sorted(levels), _roundest(least, most), bits)
        return None

    def nearest(self, scales: Tensor) -> Tensor:
        """Return the nearest scale of the grid to each of `scales`, float64."""
        return (_nearest_factors(scales / self.base, self.mantissa_bits) * self.base).float().double()

    def codes(self, scales: Tensor) -> tuple[Tensor, float]:
        """Return scale codes int64, 0 for scales of 0, and the scale base that they refer to."""
        used = scales > 0
        mantissas, exponents = torch.frexp(_nearest_factors(scales / self.base, self.mantissa_bits))
        steps = ((2 * mantissas - 1) * 2**self.mantissa_bits).round().long()
        codes = (exponents.long() - 1 << self.mantissa_bits) + steps
        least = int(codes[used].min()) - 1 >> self.mantissa_bits  # the smallest code is above 0
        return torch.where(used, codes - (least << self.mantissa_bits), 0), self.base * 2.0**least


def _roundest(low: float, high: float) -> float:
    """Return a float32 number in an interval, one of as few bits as possible: most likely it was the checkpoint's."""
    middle = (low + high) / 2
    mantissa, exponent = math.frexp(middle)
    rounded = (math.ldexp(round(math.ldexp(mantissa, bits)), exponent - bits) for bits in range(1, 25))
    return next((number for number in rounded if low <= number <= high), float(np.float32(middle)))


def _nearest_factors(ratios: Tensor, bits: int) -> Tensor:
    """Return the nearest 2^k (1 + j / 2^bits) to each ratio, float64, and 0 for 0."""
    mantissas, exponents = torch.frexp(ratios)
    return torch.ldexp((mantissas * 2 ** (bits + 1)).round() / 2 ** (bits + 1), exponents)


@dataclass(frozen=True, eq=False)
class _Fit:
    """Groups as scales times levels.

    found    bool [n]
    scales   float64 [n], 0 for a group of zeros
    low, high  float64 [n], the interval that the scale must be in
    indices  uint8 [n, g] into the levels
    """

    found: Tensor
    scales: Tensor
    low: Tensor
    high: Tensor
    indices: Tensor


def _fit(
    groups: Tensor,
    dtype: torch.dtype,
    levels: Sequence[int],
    tops: Sequence[float],
    nearest_scale: Callable[[Tensor], Tensor],
    partly: bool = False,
) -> _Fit | None:
    """Write groups float64 [n, g] as a scale times levels; None if that cannot be, unless `partly`.

    tops: what the largest magnitude of a group may be, in levels, in the order in which it is tried; negative for
    a negative scale. nearest_scale: rounds scales to those that there are.
    """
    values = torch.tensor(levels, dtype=torch.float64)
    borders = (values[1:] + values[:-1]) / 2
    below, above = _rounding_interval(groups, dtype)
    peak = groups.abs().amax(1)
    zero = peak == 0
    scales, low, high = (torch.zeros(len(groups), dtype=torch.float64) for _ in range(3))
    indices = torch.zeros(groups.shape, dtype=torch.uint8)
    indices[zero] = int(torch.bucketize(torch.zeros(()), borders))
    found = zero.clone()
    for top in tops:
        left = (~found).nonzero()[:, 0]
        if not len(left):
            break
        index = torch.bucketize(groups[left] / (peak[left, None] / top), borders)
        level = values[index]
        if abs(top) > _ROUGH_TOP:
            scale = nearest_scale((groups[left] * level).sum(1) / level.square().sum(1).clamp_min(1))
            index = torch.bucketize(groups[left] / scale[:, None], borders)
            level = values[index]
        ends = torch.stack([below[left] / level, above[left] / level])
        least = torch.where(level == 0, -torch.inf, ends.amin(0)).amax(1)
        most = torch.where(level == 0, torch.inf, ends.amax(0)).amin(1)
        scale = nearest_scale((least + most) / 2)
        decoded = (scale.float()[:, None] * level.float()).to(dtype).double()
        good = (decoded == groups[left]).all(1)
        place = left[good]
        found[place], scales[place], indices[place] = True, scale[good], index[good].to(torch.uint8)
        low[place], high[place] = least[good], most[good]
    if not partly and not bool(found.all()):
        return None
    if partly:
        found &= ~zero
    return _Fit(found, scales, low, high, indices)


def _rounding_interval(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the ends of the numbers that round to each weight in a dtype, float64."""
    limits = torch.finfo(dtype)
    mantissas, exponents = torch.frexp(weight.abs())
    step = torch.ldexp(torch.full_like(weight, limits.eps / 2), exponents).clamp_min(limits.tiny * limits.eps)
    # Towards zero from a power of two, numbers are twice as dense.
    inner = torch.where(mantissas == 0.5, step / 2, step)
    positive = weight > 0
    return weight - torch.where(positive, inner, step) / 2, weight + torch.where(positive, step, inner) / 2


def _n_values(groups: Tensor) -> Tensor:
    """Return the number of different values in each group [n, g], int64 [n]."""
    return (groups.sort(1).values.diff(dim=1) != 0).sum(1) + 1
