"""search.c against the torch code that it stands in for."""

import numpy as np
import pytest
import torch
from search_samples import AAAC_TYPES, G16, GRID_TYPES, NEEDS_C, search_for

from aaac_gguf.quantizer.feedback import feedback
from aaac_gguf.quantizer.moments import factor, output_error

pytestmark = NEEDS_C
K = 384  # three blocks of columns


def samples(n_rows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weights with a row of zeros, a constant row and an outlier; and their error weights."""
    rng = np.random.default_rng(seed)
    w = (rng.standard_t(4, (n_rows, K)) * 0.05).astype(np.float32)
    w[0], w[1], w[2, 5] = 0, 0.01, 3
    return torch.from_numpy(w), torch.from_numpy(rng.lognormal(0, 1, (1, K)).astype(np.float32))


def both(type, w: torch.Tensor):
    """Return the search by search.c and the one by torch, over the same values."""
    return search_for(type, w, "native"), search_for(type, w, "torch")


def same(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a == b).float().mean())


@GRID_TYPES
def test_search_finds_what_torch_finds(type):
    w, a = samples(45)
    native, reference = both(type, w)
    for n_starts in (1, None):
        (codes, selectors, errors), expected = (search.search(w, a, n_starts) for search in (native, reference))
        assert same(codes, expected[0]) > 0.995
        nonzero = expected[0] > 0
        assert same(selectors[nonzero], expected[1][nonzero]) > 0.995
        assert torch.allclose(errors, expected[2], rtol=1e-4, atol=1e-12)
    found, wanted = (search.encode(w, a) for search in (native, reference))
    assert same(native.decode(found), native.decode(wanted)) > 0.99


@AAAC_TYPES
def test_lloyd_sums_are_those_of_torch(type):
    w, a = samples(45)
    native, reference = both(type, w)
    groups, weights = (t.expand(w.shape).reshape(-1, native.group_size) for t in (w, a))
    found, expected = (search.lloyd_sums(groups, weights, 2) for search in (native, reference))
    assert torch.allclose(found, expected, rtol=0.02, atol=1e-3 * float(expected[1].max()))
    assert torch.allclose(found.sum(1), expected.sum(1), rtol=1e-3)


@GRID_TYPES
@pytest.mark.parametrize("n_rows", [3, 45], ids=["one chunk", "ragged"])
@pytest.mark.parametrize("between_rows", [False, True], ids=["columns", "columns and rows"])
def test_feedback_is_that_of_torch(type, n_rows, between_rows):
    w, _ = samples(n_rows)
    rng = np.random.default_rng(3)
    x = torch.from_numpy(rng.standard_normal((1000, K)) @ (np.eye(K) + 0.1 * rng.standard_normal((K, K)))).float()
    x[:, 7] = 0
    g = torch.from_numpy(
        rng.standard_normal((1000, n_rows)) @ (np.eye(n_rows) + 0.3 * rng.standard_normal((n_rows, n_rows)))
    ).float()
    h, o = x.T @ x / len(x), g.T @ g if between_rows else None
    searches = both(type, w)
    for sweeps in (0, 1):
        found, expected = (feedback(w, factor(h), search, o, sweeps) for search in searches)
        # One tie decided otherwise moves all later weights. Two scales may give the same weights (MXFP4, NVFP4).
        indices = same(found.indices, expected.indices)
        found, expected = (searches[0].decode(encoded) for encoded in (found, expected))
        assert max(indices, same(found, expected)) > 0.6
        errors = [output_error(w - q, h, o) for q in (found, expected)]
        assert errors[0] == pytest.approx(errors[1], rel=0.03)


def test_the_number_of_threads_changes_nothing():
    w, a = samples(200)
    search = search_for(G16, w, "native")
    groups, weights = w.reshape(-1, 16), a.expand(w.shape).reshape(-1, 16)
    before = torch.get_num_threads()
    results = []
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            results.append((search.lloyd_sums(groups, weights, 2), *search.search(w, a)))
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, *results))
