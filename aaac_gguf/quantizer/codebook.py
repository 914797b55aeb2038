"""Fitting the two codebooks, the scale base and the scale mantissa bits of one tensor.

`fit` is this project's method; `fit_paper` is Algorithm 1 of "AAAC" (arXiv 2605.08692), rounded to the format. Both take groups [G, g] with the error
weight of every weight, and both return a codec that `Codec.check` accepts, whatever the weights are: constant, zero, few values, outliers.
"""

from __future__ import annotations

import gguf
import numpy as np
import torch
from torch import Tensor

from ..files.format import MANTISSA_BITS, MAX_LEVEL, N_LEVELS, SELECTOR_SIZE, AaacType, Codec, scale_factors
from .grid import CELLS, Grid, row_chunks, scale_starts
from .search import groups_for_c, search

# The start of `fit`: llama.cpp's IQ4_NL table and its mirror image. An asymmetric table spends its odd level on one side; the mirror image
# lets each 16 weights choose the side.
_IQ4_NL: tuple[int, ...] = gguf.quants.IQ4_NL.kvalues

# The scale of a group may exceed "largest weight on the largest level"; the largest scale code must reach it.
_SCALE_HEADROOM = 1.08
_FIT_STARTS = 2
_FIT_ITERATIONS = 8
_MANTISSA_SAMPLE = 1 << 17  # weights

_PAPER_OUTER = 3
_PAPER_INNER = 10
_PAPER_MANTISSA_BITS = 3  # the paper's scales are E4M3
_QUANTILE_SAMPLE = 1 << 20  # weights


def round_levels(levels: Tensor) -> np.ndarray:
    """int8 [2, 16], strictly ascending within [-127, 127], nearest to the ascending float levels [2, 16]."""
    low = np.arange(N_LEVELS) - MAX_LEVEL
    rounded = np.clip(np.rint(levels.double().cpu().numpy()), -MAX_LEVEL, MAX_LEVEL).astype(np.int64)
    # Ascending is "level - position does not descend": push equal levels up, then keep the top inside the range.
    rounded = np.maximum.accumulate(np.maximum(rounded, low) - np.arange(N_LEVELS), axis=1) + np.arange(N_LEVELS)
    return np.minimum(rounded, low + 2 * MAX_LEVEL - N_LEVELS + 1).astype(np.int8)


def _scale_base(largest: float, mantissa_bits: int, qtype: AaacType) -> float:
    """d such that the largest scale code puts `largest` on the largest level; any positive number for a tensor of zeros."""
    top = float(scale_factors(mantissa_bits)[qtype.n_scale_codes - 1]) * MAX_LEVEL
    return float(np.float32(largest / top)) if largest > 0 else 1.0


def _search_error(w: Tensor, a: Tensor, grid: Grid, qtype: AaacType) -> float:
    return sum(float(search(w[rows], a[rows], grid, qtype.group_size)[2].double().sum()) for rows in row_chunks(w))


def _lloyd_sums(w: Tensor, a: Tensor, grid: Grid, qtype: AaacType) -> tuple[Tensor, Tensor]:
    """Numerators and denominators float64 [32] of the levels that minimise sum a (w - s level)^2 for the assignment that the search finds.

    The minimiser is sum(a s^2 x) / sum(a s^2) with x = w / s: the error of a level counts with the square of the scale that multiplies it.
    """
    numerator, denominator = sums = torch.zeros(2, 2 * N_LEVELS, dtype=torch.float64, device=w.device)
    if grid.compiled:
        w, a = groups_for_c(w, a, qtype.group_size)
        starts = scale_starts(qtype.group_size)[:_FIT_STARTS]
        grid.compiled.call("aaac_lloyd_sums", len(w), qtype.group_size, w, a, starts, len(starts), sums)
        return numerator, denominator
    for rows in row_chunks(w):
        code, second, _ = search(w[rows], a[rows], grid, qtype.group_size, _FIT_STARTS)
        scale = grid.scales[code][:, None, None]
        groups = w[rows].reshape(*second.shape, SELECTOR_SIZE)
        x = torch.where(scale > 0, groups / scale, torch.zeros_like(groups))
        cells = grid.cells(x) + second[..., None] * CELLS
        key = (grid.nearest_index[cells].long() + second[..., None] * N_LEVELS).reshape(-1)
        weight = a[rows].reshape(groups.shape) * scale.square()
        numerator += torch.bincount(key, (weight * x).reshape(-1).double(), 2 * N_LEVELS)
        denominator += torch.bincount(key, weight.reshape(-1).double(), 2 * N_LEVELS)
    return numerator, denominator


def fit(w: Tensor, a: Tensor, qtype: AaacType, largest: float) -> Codec:
    """The codec of least weighted error that Lloyd's algorithm finds, scales, selectors and indices being searched again in every iteration.

    w, a: float32 [G, group_size], a sample of the tensor's groups and their error weights. largest: the largest magnitude in the whole tensor.
    """
    book = torch.tensor(_IQ4_NL, dtype=torch.float32, device=w.device)
    levels = torch.stack([book, -book.flip(0)])
    few = slice(0, max(1, _MANTISSA_SAMPLE // qtype.group_size))
    candidates = {}
    for m in MANTISSA_BITS:
        d = _scale_base(_SCALE_HEADROOM * largest, m, qtype)
        scales = d * torch.from_numpy(scale_factors(m)[: qtype.n_scale_codes]).to(w.device)
        candidates[m] = (_search_error(w[few], a[few], Grid.of_levels(levels, scales), qtype), d, scales)
    m = min(candidates, key=lambda m: candidates[m][0])
    _, d, scales = candidates[m]
    for _ in range(_FIT_ITERATIONS):
        numerator, denominator = _lloyd_sums(w, a, Grid.of_levels(levels, scales), qtype)
        means = (numerator / denominator.clamp_min(torch.finfo(torch.float64).tiny)).float()
        levels = torch.where(denominator > 0, means, levels.reshape(-1)).view(2, N_LEVELS).sort(1).values
        # One factor for both books keeps their proportion; the largest level is 127 and the scales take the factor up.
        factor = float(levels.abs().amax()) / MAX_LEVEL
        if factor > 0:
            levels, scales, d = levels / factor, scales * factor, d * factor
    return Codec(round_levels(levels), float(np.float32(d)), m)


def fit_paper(w: Tensor, a: Tensor, qtype: AaacType, largest: float, generator: torch.Generator) -> Codec:
    """Algorithm 1 of the paper: importance-weighted k-means of the groups scaled by their largest magnitude, two codebooks in turn.

    w, a: float32 [G, 16 or group_size] with a_k = I_k = sum_t x_tk^2; all groups, not a sample, each chosen whole by one selector per 16 weights.
    """
    d = _scale_base(largest, _PAPER_MANTISSA_BITS, qtype)
    scales = d * torch.from_numpy(scale_factors(_PAPER_MANTISSA_BITS)[: qtype.n_scale_codes]).to(w.device)
    grid = Grid.of_levels(torch.zeros(2, N_LEVELS, device=w.device), scales)
    scale = grid.scales[grid.scale_codes(w.abs().amax(1) / MAX_LEVEL)]
    x = (w / scale[:, None]).view(-1, SELECTOR_SIZE)
    a = a.reshape(x.shape)

    # T1 = quantiles over the full range, T2 = quantiles shifted by half a step.
    sample = torch.randint(x.numel(), (min(x.numel(), _QUANTILE_SAMPLE),), generator=generator).to(w.device)
    values = x.reshape(-1)[sample]
    steps = torch.arange(N_LEVELS, device=w.device) / (N_LEVELS - 1)
    half = 1 / (2 * (N_LEVELS - 1))
    books = [torch.quantile(values, steps), torch.quantile(values, half + (1 - half) * steps)]

    for _ in range(_PAPER_OUTER):
        errors = [torch.cat([_book_error(x[rows], a[rows], book) for rows in row_chunks(x)]) for book in books]
        second = errors[1] < errors[0]
        for r in (0, 1):
            members = second == bool(r)
            for _ in range(_PAPER_INNER):
                books[r] = _kmeans_step(x[members], a[members], books[r])
    return Codec(round_levels(torch.stack(books)), d, _PAPER_MANTISSA_BITS)


def _assign(x: Tensor, book: Tensor) -> Tensor:
    return torch.bucketize(x, (book[1:] + book[:-1]) / 2)


def _book_error(x: Tensor, a: Tensor, book: Tensor) -> Tensor:
    return (a * (x - book[_assign(x, book)]).square()).sum(1)


def _kmeans_step(x: Tensor, a: Tensor, book: Tensor) -> Tensor:
    """One importance-weighted k-means step; an empty cell keeps its value."""
    numerator = torch.zeros(N_LEVELS, dtype=torch.float64, device=x.device)
    denominator = torch.zeros_like(numerator)
    for rows in row_chunks(x):
        key = _assign(x[rows], book).reshape(-1)
        numerator += torch.bincount(key, (a[rows] * x[rows]).reshape(-1).double(), N_LEVELS)
        denominator += torch.bincount(key, a[rows].reshape(-1).double(), N_LEVELS)
    means = (numerator / denominator.clamp_min(torch.finfo(torch.float64).tiny)).float()
    return torch.where(denominator > 0, means, book).sort().values
