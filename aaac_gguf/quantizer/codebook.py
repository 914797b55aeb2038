"""Fit the two codebooks, the scale base and the scale mantissa bits of one tensor.

`fit` is this project's method. `fit_paper` is Algorithm 1 of "AAAC" (arXiv 2605.08692), rounded to the format. Both
take groups [G, g] with the error weight of every weight. Both return a codec that `Codec.check` accepts for any
weights: constant, zero, of few values, or with outliers.
"""

from __future__ import annotations

import gguf
import numpy as np
import torch
from torch import Tensor

from ..files.format import MANTISSA_BITS, MAX_LEVEL, N_LEVELS, SELECTOR_SIZE, AaacType, Codec, scale_factors
from .backends import Backend
from .grid import Grid, row_chunks
from .search import TorchSearch

# `fit` starts from llama.cpp's IQ4_NL table and its mirror image. An asymmetric table has one more level on one side.
# With the mirror image, each 16 weights can choose the side.
_IQ4_NL: tuple[int, ...] = gguf.quants.IQ4_NL.kvalues

# The scale of a group may be larger than "largest weight on the largest level", so the largest scale code must be too.
SCALE_HEADROOM = 1.08
FIT_STARTS = 2
_FIT_ITERATIONS = 8
_MANTISSA_SAMPLE = 1 << 17  # weights

_PAPER_OUTER = 3
_PAPER_INNER = 10
_PAPER_MANTISSA_BITS = 3  # the paper's scales are E4M3
QUANTILE_SAMPLE = 1 << 20  # weights


def round_levels(levels: Tensor) -> np.ndarray:
    """Return int8 [2, 16], strictly ascending within [-127, 127], nearest to the ascending float levels [2, 16]."""
    low = np.arange(N_LEVELS) - MAX_LEVEL
    rounded = np.clip(np.rint(levels.double().cpu().numpy()), -MAX_LEVEL, MAX_LEVEL).astype(np.int64)
    # Strictly ascending means that level - position does not descend. Push equal levels up, then keep the top in range.
    rounded = np.maximum.accumulate(np.maximum(rounded, low) - np.arange(N_LEVELS), axis=1) + np.arange(N_LEVELS)
    return np.minimum(rounded, low + 2 * MAX_LEVEL - N_LEVELS + 1).astype(np.int8)


def scale_base(largest: float, mantissa_bits: int, layout: AaacType) -> float:
    """Return d such that the largest scale code puts `largest` on the largest level; 1 for a tensor of zeros."""
    top = float(scale_factors(mantissa_bits)[layout.n_scale_codes - 1]) * MAX_LEVEL
    return float(np.float32(largest / top)) if largest > 0 else 1.0


def fit(w: Tensor, a: Tensor, layout: AaacType, largest: float, backend: Backend) -> Codec:
    """Fit a codec by Lloyd's algorithm. Every iteration searches scales, selectors and indices again.

    w, a: float32 [G, group_size], a sample of the tensor's groups and their error weights.
    largest: the largest magnitude in the whole tensor.
    """
    book = torch.tensor(_IQ4_NL, dtype=torch.float32, device=w.device)
    levels = torch.stack([book, -book.flip(0)])
    few = slice(0, max(1, _MANTISSA_SAMPLE // layout.group_size))
    candidates = {}
    for m in MANTISSA_BITS:
        d = scale_base(SCALE_HEADROOM * largest, m, layout)
        scales = d * torch.from_numpy(scale_factors(m)[: layout.n_scale_codes]).to(w.device)
        search = backend(Grid.from_levels(levels, scales), layout.group_size)
        candidates[m] = (_total_error(w[few], a[few], search), d, scales)
    m = min(candidates, key=lambda m: candidates[m][0])
    _, d, scales = candidates[m]
    for _ in range(_FIT_ITERATIONS):
        search = backend(Grid.from_levels(levels, scales), layout.group_size)
        numerators, denominators = search.lloyd_sums(w, a, FIT_STARTS)
        means = (numerators / denominators.clamp_min(torch.finfo(torch.float64).tiny)).float()
        levels = torch.where(denominators > 0, means, levels.reshape(-1)).view(2, N_LEVELS).sort(1).values
        # One factor for both codebooks keeps their proportion. The largest level becomes 127, and the scales take the
        # factor up.
        factor = float(levels.abs().amax()) / MAX_LEVEL
        if factor > 0:
            levels, scales, d = levels / factor, scales * factor, d * factor
    return Codec(round_levels(levels), float(np.float32(d)), m)


def _total_error(w: Tensor, a: Tensor, search: TorchSearch) -> float:
    return sum(float(search.search(w[rows], a[rows])[2].double().sum()) for rows in row_chunks(w))


def fit_paper(w: Tensor, a: Tensor, layout: AaacType, largest: float, generator: torch.Generator) -> Codec:
    """Fit a codec by Algorithm 1 of the paper, importance-weighted k-means of two codebooks in turn.

    Groups are scaled by their largest magnitude. A selector chooses a codebook for 16 weights.
    w, a: float32 [G, 16 or group_size], all groups and not a sample, with a_k = I_k = sum_t x_tk^2.
    """
    d = scale_base(largest, _PAPER_MANTISSA_BITS, layout)
    scales = d * torch.from_numpy(scale_factors(_PAPER_MANTISSA_BITS)[: layout.n_scale_codes]).to(w.device)
    grid = Grid.from_levels(torch.zeros(2, N_LEVELS, device=w.device), scales)
    scale = grid.scales[grid.scale_codes(w.abs().amax(1) / MAX_LEVEL)]
    x = (w / scale[:, None]).view(-1, SELECTOR_SIZE)
    a = a.reshape(x.shape)

    # T1 = quantiles over the full range, T2 = quantiles shifted by half a step.
    sample = torch.randint(x.numel(), (min(x.numel(), QUANTILE_SAMPLE),), generator=generator).to(w.device)
    values = x.reshape(-1)[sample]
    steps = torch.arange(N_LEVELS, device=w.device) / (N_LEVELS - 1)
    half = 1 / (2 * (N_LEVELS - 1))
    books = [torch.quantile(values, steps), torch.quantile(values, half + (1 - half) * steps)]

    for _ in range(_PAPER_OUTER):
        errors = [torch.cat([_book_error(x[rows], a[rows], book) for rows in row_chunks(x)]) for book in books]
        selector = errors[1] < errors[0]
        for r in (0, 1):
            members = selector == bool(r)
            for _ in range(_PAPER_INNER):
                books[r] = kmeans_step(x[members], a[members], books[r])
    return Codec(round_levels(torch.stack(books)), d, _PAPER_MANTISSA_BITS)


def _assign(x: Tensor, book: Tensor) -> Tensor:
    return torch.bucketize(x, (book[1:] + book[:-1]) / 2)


def _book_error(x: Tensor, a: Tensor, book: Tensor) -> Tensor:
    return (a * (x - book[_assign(x, book)]).square()).sum(1)


def kmeans_step(x: Tensor, a: Tensor, book: Tensor) -> Tensor:
    """Move the levels `book` [16] by one step of k-means of `x` with weights `a`; a level without members stays."""
    numerator = torch.zeros(N_LEVELS, dtype=torch.float64, device=x.device)
    denominator = torch.zeros_like(numerator)
    for rows in row_chunks(x):
        key = _assign(x[rows], book).reshape(-1)
        numerator += torch.bincount(key, (a[rows] * x[rows]).reshape(-1).double(), N_LEVELS)
        denominator += torch.bincount(key, a[rows].reshape(-1).double(), N_LEVELS)
    means = (numerator / denominator.clamp_min(torch.finfo(torch.float64).tiny)).float()
    return torch.where(denominator > 0, means, book).sort().values
