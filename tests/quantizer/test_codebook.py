"""Fitting codebooks: the paper's algorithm against a literal transcription, and what holds for any input."""

import numpy as np
import pytest
import torch
from search_samples import AAAC_TYPES, G16, G32, G128, heavy_tailed

from aaac_gguf.files.format import TYPES
from aaac_gguf.quantizer.codebook import fit_paper, kmeans_step, round_levels
from aaac_gguf.quantizer.quantize import quantize


def test_rounded_levels_ascend_and_stay_near():
    rng = np.random.default_rng(1)
    for spread in (0, 1, 3, 20, 300):
        levels = np.sort(rng.uniform(-spread, spread, (200, 2, 16)), axis=-1)
        for pair in levels:
            rounded = round_levels(torch.from_numpy(pair)).astype(int)
            assert (np.diff(rounded) > 0).all()
            assert rounded.min() >= -127
            assert rounded.max() <= 127
            if (np.diff(np.rint(pair)) > 0).all():
                assert np.array_equal(rounded, np.clip(np.rint(pair), np.arange(16) - 127, np.arange(16) + 112))


def literal_algorithm_1(x: np.ndarray, a: np.ndarray, start: list[np.ndarray]) -> list[np.ndarray]:
    """Algorithm 1 of the paper, one group and one level at a time."""
    books = [list(book) for book in start]
    for _ in range(3):
        member: list[list[int]] = [[], []]
        for g in range(len(x)):
            errors = [
                sum(ai * min((xi - level) ** 2 for level in book) for xi, ai in zip(x[g], a[g], strict=True))
                for book in books
            ]
            member[int(errors[1] < errors[0])].append(g)
        for r in (0, 1):
            values, weights = x[member[r]].ravel(), a[member[r]].ravel()
            for _ in range(10):
                nearest = np.abs(values[:, None] - np.array(books[r])).argmin(1)
                for level in range(16):
                    cell = nearest == level
                    if weights[cell].sum() > 0:
                        books[r][level] = (weights[cell] * values[cell]).sum() / weights[cell].sum()
    return [np.array(book) for book in books]


def test_paper_method_is_algorithm_1():
    rng = np.random.default_rng(2)
    # Groups whose largest magnitude is 127: their scale is exactly 1, so that x is w.
    x = np.clip(rng.standard_t(5, (400, 16)) * 40, -126, 126)
    x[np.arange(400), rng.integers(0, 16, 400)] = 127 * rng.choice([-1, 1], 400)
    a = rng.uniform(0.1, 3, (400, 16))
    x, a = x.astype(np.float32), a.astype(np.float32)

    codec = fit_paper(
        torch.from_numpy(x), torch.from_numpy(a), TYPES[G16.name], 127.0, torch.Generator().manual_seed(5)
    )

    drawn = torch.randint(x.size, (x.size,), generator=torch.Generator().manual_seed(5)).numpy()
    steps = np.arange(16) / 15
    start = [np.quantile(x.ravel()[drawn], steps), np.quantile(x.ravel()[drawn], 1 / 30 + (1 - 1 / 30) * steps)]
    expected = np.stack(literal_algorithm_1(x.astype(np.float64), a.astype(np.float64), start))
    assert np.abs(codec.codebooks - expected).max() <= 0.5 + 1e-3


def test_an_empty_cell_keeps_its_value():
    book = torch.linspace(-1, 1, 16)
    moved = kmeans_step(torch.full((1, 16), 0.9), torch.ones(1, 16), book)
    assert moved.tolist() == [*book[:14].tolist(), pytest.approx(0.9), 1.0]


def test_levels_serve_the_groups_with_large_scales():
    """A level's error counts with the square of the scale, so groups of a third the size hardly move the codebooks."""
    large = heavy_tailed(256, 512)
    small = 0.3 * torch.from_numpy(np.random.default_rng(6).uniform(-1, 1, (256, 512)).astype(np.float32)) * large.std()
    alone, mixed = (quantize(w, G16).codec.codebooks.astype(int) for w in (large, torch.cat([large, small])))
    assert np.abs(alone - mixed).mean() < 0.3


@AAAC_TYPES
def test_ours_is_better_than_the_paper_and_the_paper_than_nothing(type):
    weight = heavy_tailed(128)
    importance = torch.from_numpy(np.random.default_rng(3).lognormal(0, 1, 256).astype(np.float32))
    ours, paper = (quantize(weight, type, importance, method=m).weighted_error for m in ("aaac", "paper"))
    assert ours < 0.95 * paper
    assert paper < 0.02


def test_more_scales_are_better():
    errors = [quantize(heavy_tailed(128, 512), type).relative_error for type in (G128, G32, G16)]
    assert errors == sorted(errors, reverse=True)
