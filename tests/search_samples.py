"""Matrices with outliers, second moments, and what two searches must agree on."""

import numpy as np
import pytest
import torch

from aaac_gguf.quantizer.moments import output_error


def samples(n_rows: int, k: int) -> torch.Tensor:
    """Weights with a constant row, groups of zeros, an outlier and, where there is room, a row of zeros."""
    w = np.random.default_rng(n_rows).standard_t(4, (n_rows, k)).astype(np.float32) * 0.05
    w[0, 16:48], w[n_rows // 2] = 0, 0.01
    w[n_rows - 1, 5] = 3
    w[1:2] = 0
    return torch.from_numpy(w)


def moment(k: int, n_tokens: int) -> torch.Tensor:
    """Of coupled channels, among them one that was never active, and 16 together."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal((n_tokens, k)) @ (np.eye(k) + 0.2 * rng.standard_normal((k, k))) * rng.lognormal(0, 1, k)
    x[:, 7], x[:, 32:48] = 0, 0
    return torch.from_numpy(x.T @ x / n_tokens).float()


def check_alike(w, a, b, inputs, o):
    # Here all are equal; on other machines a tie within rounding may be decided otherwise and move the weights behind it.
    assert float((a == b).float().mean()) > 0.9
    assert output_error(w - a, inputs.hessian, o) == pytest.approx(output_error(w - b, inputs.hessian, o), rel=0.01)
