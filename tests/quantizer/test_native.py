"""search.c against the torch code that it stands in for."""

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as T

from aaac_gguf import compiler
from aaac_gguf.files.format import TYPES
from aaac_gguf.quantizer import native as compiled
from aaac_gguf.quantizer.codebook import _lloyd_sums, fit
from aaac_gguf.quantizer.feedback import feedback
from aaac_gguf.quantizer.grid import Grid
from aaac_gguf.quantizer.moments import factor, output_error
from aaac_gguf.quantizer.search import decode as decode_encoded
from aaac_gguf.quantizer.search import encode, search
from aaac_gguf.quantizer.stock import STOCK_TYPES

pytestmark = pytest.mark.skipif(not compiled.native(), reason="no C compiler builds search.c here")
ALL_TYPES = pytest.mark.parametrize(
    "qtype", [*TYPES.values(), STOCK_TYPES[T.IQ4_NL], STOCK_TYPES[T.Q8_0]], ids=[*TYPES, "IQ4_NL", "Q8_0"]
)
K = 384  # three blocks of columns


def samples(n_rows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights with a row of zeros, a constant row and an outlier; and their error weights."""
    rng = np.random.default_rng(seed)
    w = (rng.standard_t(4, (n_rows, K)) * 0.05).astype(np.float32)
    w[0], w[1], w[2, 5] = 0, 0.01, 3
    return torch.from_numpy(w), torch.from_numpy(rng.lognormal(0, 1, (1, K)).astype(np.float32))


def grids(qtype, w: torch.Tensor) -> tuple[Grid, Grid]:
    """A grid that search.c serves, and an equal one that it does not."""
    if hasattr(qtype, "grid"):
        pair = qtype.grid("cpu", 1.0), qtype.grid("cpu", 1.0)
    else:
        codec = fit(
            w.reshape(-1, qtype.group_size),
            torch.ones_like(w).reshape(-1, qtype.group_size),
            qtype,
            float(w.abs().max()),
        )
        pair = Grid.of_codec(codec, qtype, "cpu"), Grid.of_codec(codec, qtype, "cpu")
    pair[1].__dict__["compiled"] = None
    assert pair[0].compiled
    return pair


def same(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a == b).float().mean())


@ALL_TYPES
def test_search(qtype):
    w, a = samples(45)
    ours, reference = grids(qtype, w)
    for n_starts in (1, None):
        (code, second, error), expected = (search(w, a, g, qtype.group_size, n_starts) for g in (ours, reference))
        assert same(code, expected[0]) > 0.995
        nonzero = expected[0] > 0
        assert same(second[nonzero], expected[1][nonzero]) > 0.995
        assert torch.allclose(error, expected[2], rtol=1e-4, atol=1e-12)
    found, wanted = (encode(w, a, g, qtype.group_size) for g in (ours, reference))
    difference = decode_encoded(found, ours) - decode_encoded(wanted, ours)
    assert float((difference == 0).float().mean()) > 0.99


@pytest.mark.parametrize("qtype", TYPES.values(), ids=TYPES)
def test_lloyd_sums(qtype):
    w, a = samples(45)
    groups, weights = w.reshape(-1, qtype.group_size), a.expand(w.shape).reshape(-1, qtype.group_size)
    found, expected = (torch.stack(_lloyd_sums(groups, weights, g, qtype)) for g in grids(qtype, w))
    assert torch.allclose(found, expected, rtol=0.02, atol=1e-3 * float(expected[1].max()))
    assert torch.allclose(found.sum(1), expected.sum(1), rtol=1e-3)


@ALL_TYPES
@pytest.mark.parametrize("n_rows", [3, 45], ids=["one chunk", "ragged"])
@pytest.mark.parametrize("rows_too", [False, True], ids=["columns", "columns and rows"])
def test_feedback(qtype, n_rows, rows_too):
    w, _ = samples(n_rows)
    rng = np.random.default_rng(3)
    x = torch.from_numpy(rng.standard_normal((1000, K)) @ (np.eye(K) + 0.1 * rng.standard_normal((K, K)))).float()
    x[:, 7] = 0
    g = torch.from_numpy(
        rng.standard_normal((1000, n_rows)) @ (np.eye(n_rows) + 0.3 * rng.standard_normal((n_rows, n_rows)))
    ).float()
    h, o = x.T @ x / len(x), g.T @ g if rows_too else None
    ours, reference = grids(qtype, w)
    for sweeps in (0, 1):
        found, expected = (feedback(w, factor(h), grid, qtype, o, sweeps) for grid in (ours, reference))
        # One tie decided otherwise moves all the weights behind it.
        assert same(found.indices, expected.indices) > 0.9
        errors = [output_error(w - decode_encoded(e, ours), h, o) for e in (found, expected)]
        assert errors[0] == pytest.approx(errors[1], rel=0.01)


def test_threads_change_nothing():
    qtype = TYPES["AAAC4_G16"]
    w, a = samples(200)
    grid, _ = grids(qtype, w)
    groups, weights = w.reshape(-1, 16), a.expand(w.shape).reshape(-1, 16)
    before = torch.get_num_threads()
    results = []
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            results.append((torch.stack(_lloyd_sums(groups, weights, grid, qtype)), *search(w, a, grid, 16)))
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, *results))


def test_without_a_compiler_torch_does_it(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    compiler.c_library.cache_clear()
    try:
        with pytest.warns(UserWarning, match="no C compiler"):
            assert compiled.native() is None
        w, a = samples(5)
        qtype = TYPES["AAAC4_G32"]
        grid = Grid.of_codec(fit(w.view(-1, 32), torch.ones_like(w).view(-1, 32), qtype, 3.0), qtype, "cpu")
        assert grid.compiled is None
        encode(w, a, grid, 32)
    finally:
        compiler.c_library.cache_clear()
