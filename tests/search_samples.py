"""Matrices with outliers, second moments, searches over the values of one type, and what two searches must agree on."""

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as T

from aaac_gguf.files.format import TYPES
from aaac_gguf.quantizer import native
from aaac_gguf.quantizer.backends import BACKENDS
from aaac_gguf.quantizer.kquants import KQUANTS
from aaac_gguf.quantizer.moments import output_error
from aaac_gguf.quantizer.quantize import quantize
from aaac_gguf.quantizer.search import TorchSearch
from aaac_gguf.quantizer.types import TENSOR_TYPES

G16, G32, G128 = (T[name] for name in TYPES)

# Parameters of several files of tests. GRID_TYPES have levels times a scale; the other types of llama.cpp are K_TYPES.
NEEDS_C = pytest.mark.skipif(not native.compiled(), reason="no C compiler builds search.c here")
AAAC_TYPES = pytest.mark.parametrize("type", [G16, G32, G128], ids=lambda t: t.name)
GRID_TYPES = pytest.mark.parametrize(
    "type", [G16, G32, G128, T.IQ4_NL, T.Q5_0, T.Q8_0, T.MXFP4, T.NVFP4], ids=lambda t: t.name
)
K_TYPES = pytest.mark.parametrize("type", KQUANTS, ids=lambda t: t.name)
METHODS = pytest.mark.parametrize("method", ["aaac", "paper"])
CPU_BACKENDS = pytest.mark.parametrize("backend", ["torch", pytest.param("native", marks=NEEDS_C)])


def search_for(type: T, weight: torch.Tensor, backend: str, importance: torch.Tensor | None = None) -> TorchSearch:
    """Return the search over the values that one of GRID_TYPES has for `weight`, on the weight's device."""
    quantizer = TENSOR_TYPES[type].quantizer
    grid = quantizer.grid(quantize(weight.cpu(), type, importance).codec, 1.0, weight.device)
    return BACKENDS[backend](grid, quantizer.group_size)


def heavy_tailed(n_rows: int = 64, n_per_row: int = 256) -> torch.Tensor:
    """Return weights by Student's t."""
    rng = np.random.default_rng(0)
    return torch.from_numpy((rng.standard_t(5, (n_rows, n_per_row)) * 0.05).astype(np.float32))


def uneven_rows(n_rows: int, n_per_row: int, seed: int = 0) -> torch.Tensor:
    """Return weights by Student's t, with rows of unlike size."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(
        (rng.standard_t(4, (n_rows, n_per_row)) * 0.02 * rng.uniform(0.3, 3, (n_rows, 1))).astype(np.float32)
    )


def samples(n_rows: int, k: int) -> torch.Tensor:
    """Return weights with a constant row, groups of zeros, an outlier and, if there are two rows, a row of zeros."""
    w = np.random.default_rng(n_rows).standard_t(4, (n_rows, k)).astype(np.float32) * 0.05
    w[0, 16:48], w[n_rows // 2] = 0, 0.01
    w[n_rows - 1, 5] = 3
    w[1:2] = 0
    return torch.from_numpy(w)


def moment(k: int, n_tokens: int) -> torch.Tensor:
    """Return the moment of coupled channels, of which one was never active, and 16 neighbours neither."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal((n_tokens, k)) @ (np.eye(k) + 0.2 * rng.standard_normal((k, k))) * rng.lognormal(0, 1, k)
    x[:, 7], x[:, 32:48] = 0, 0
    return torch.from_numpy(x.T @ x / n_tokens).float()


def check_alike(w, a, b, inputs, o):
    """Check that the decoded weights `a` and `b` of two searches for `w` agree.

    Here all are equal. On other machines a tie within rounding may be decided otherwise, which moves later weights.
    """
    assert float((a == b).float().mean()) > 0.9
    assert output_error(w - a, inputs.hessian, o) == pytest.approx(output_error(w - b, inputs.hessian, o), rel=0.01)
