"""Fitting codebooks: the paper's algorithm against a literal transcription, and what holds for any input."""

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as T

from aaac_gguf.files.format import G16, TYPES, decode
from aaac_gguf.quantizer.codebook import _kmeans_step, fit_paper, round_levels
from aaac_gguf.quantizer.quantize import quantize

ALL_TYPES = pytest.mark.parametrize("qtype", TYPES.values(), ids=TYPES)


def heavy_tailed(n_rows: int = 64, n_per_row: int = 256) -> torch.Tensor:
    rng = np.random.default_rng(0)
    return torch.from_numpy((rng.standard_t(5, (n_rows, n_per_row)) * 0.05).astype(np.float32))


def outlier(value: float) -> torch.Tensor:
    weight = heavy_tailed(8)
    weight[3, 5] = value
    return weight


ODD_WEIGHTS = {
    "zeros": torch.zeros(4, 256),
    "constant": torch.full((4, 256), 0.37),
    "one value of each sign": torch.sign(heavy_tailed(4)) * 0.5,
    "three values": torch.sign(heavy_tailed(4)).masked_fill(heavy_tailed(4).abs() < 0.03, 0),
    "positive": heavy_tailed(4).abs(),
    "one weight": torch.zeros(4, 256).index_put((torch.tensor(2), torch.tensor(7)), torch.tensor(1.0)),
    "outlier": outlier(1e4),
    "huge": outlier(3e38),
    "tiny": heavy_tailed(4) * 1e-36,
    "denormal": heavy_tailed(4) * 1e-43,
}


@ALL_TYPES
@pytest.mark.parametrize("method", ["aaac", "paper"])
@pytest.mark.parametrize("name", ODD_WEIGHTS)
def test_any_weights_give_a_codec_that_readers_accept(qtype, method, name):
    weight = ODD_WEIGHTS[name]
    q = quantize(weight, T[qtype.name], method=method)
    decoded = decode(qtype, q.data, q.codec.check(name))
    assert np.isfinite(decoded).all()
    assert np.isfinite([q.relative_error, q.weighted_error]).all()
    if name in ("zeros", "constant", "one value of each sign"):
        assert q.relative_error < 1e-3


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

    codec = fit_paper(torch.from_numpy(x), torch.from_numpy(a), G16, 127.0, torch.Generator().manual_seed(5))

    drawn = torch.randint(x.size, (x.size,), generator=torch.Generator().manual_seed(5)).numpy()
    steps = np.arange(16) / 15
    start = [np.quantile(x.ravel()[drawn], steps), np.quantile(x.ravel()[drawn], 1 / 30 + (1 - 1 / 30) * steps)]
    expected = np.stack(literal_algorithm_1(x.astype(np.float64), a.astype(np.float64), start))
    assert np.abs(codec.codebooks - expected).max() <= 0.5 + 1e-3


def test_an_empty_cell_keeps_its_value():
    book = torch.linspace(-1, 1, 16)
    moved = _kmeans_step(torch.full((1, 16), 0.9), torch.ones(1, 16), book)
    assert moved.tolist() == [*book[:14].tolist(), pytest.approx(0.9), 1.0]


def test_levels_serve_the_groups_with_large_scales():
    """A level's error counts with the square of the scale, so groups of a third the size hardly move the codebooks."""
    large = heavy_tailed(256, 512)
    small = 0.3 * torch.from_numpy(np.random.default_rng(6).uniform(-1, 1, (256, 512)).astype(np.float32)) * large.std()
    alone, mixed = (quantize(w, T[G16.name]).codec.codebooks.astype(int) for w in (large, torch.cat([large, small])))
    assert np.abs(alone - mixed).mean() < 0.3


@ALL_TYPES
def test_ours_is_better_than_the_paper_and_the_paper_than_nothing(qtype):
    weight = heavy_tailed(128)
    importance = torch.from_numpy(np.random.default_rng(3).lognormal(0, 1, 256).astype(np.float32))
    ours, paper = (quantize(weight, T[qtype.name], importance, method=m).weighted_error for m in ("aaac", "paper"))
    assert ours < 0.95 * paper
    assert paper < 0.02


def test_more_scales_are_better():
    errors = [quantize(heavy_tailed(128, 512), T[qtype.name]).relative_error for qtype in TYPES.values()]
    assert errors == sorted(errors)


@pytest.mark.parametrize("method", ["aaac", "paper"])
def test_the_seed_decides(method, monkeypatch):
    monkeypatch.setattr("aaac_gguf.quantizer.types._FIT_SAMPLE", 1 << 12)
    monkeypatch.setattr("aaac_gguf.quantizer.codebook._QUANTILE_SAMPLE", 1 << 12)
    weight = heavy_tailed()
    one, same, other = (quantize(weight, T[G16.name], method=method, seed=seed) for seed in (0, 0, 1))
    assert one.data.tobytes() == same.data.tobytes()
    assert np.array_equal(one.codec.codebooks, same.codec.codebooks)
    assert not np.array_equal(one.codec.codebooks, other.codec.codebooks)


def test_a_sample_is_nearly_as_good_as_all(monkeypatch):
    weight = heavy_tailed(256, 512)
    everything = quantize(weight, T[G16.name])
    monkeypatch.setattr("aaac_gguf.quantizer.types._FIT_SAMPLE", 1 << 15)
    assert quantize(weight, T[G16.name]).relative_error < 1.01 * everything.relative_error
