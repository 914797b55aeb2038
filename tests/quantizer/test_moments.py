"""Second moments: factors of damped Hessians, and targets."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from aaac_gguf.errors import AaacError
from aaac_gguf.quantizer.moments import LARGEST_MOVE, Moments, factor, inverse_root, output_error

K = 256


def hessian() -> torch.Tensor:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((2048, K)) @ (np.eye(K) + 0.15 * rng.standard_normal((K, K))) * rng.lognormal(0, 0.7, K)
    return torch.from_numpy(x.T @ x / 2048).float()


def test_the_root_is_that_of_the_damped_hessian():
    h = hessian()
    factored = factor(h, 0.01)
    root = factored.root.double()
    assert factored.damping == 0.01
    assert torch.equal(root, root.triu())
    damped = h.double() / h.diagonal().mean() + 0.01 * torch.eye(K)
    assert torch.allclose(factored.hessian.double(), damped)
    assert torch.allclose(root @ root.T, damped, atol=1e-5)
    right = torch.randn(K, 3, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(damped @ factored.solve(right).double(), right.double(), atol=1e-4)


def test_the_move_of_a_block_suits_the_errors_before_it():
    """The error is a quadratic function of the block's, and least where its gradient is zero."""
    factored = factor(hessian(), 0.01)
    errors = torch.randn(128, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    block, rest = slice(128, 160), slice(160, K)
    h = factored.hessian.double()
    # What comes after the block is free to move.
    left = h[:160, :160] - h[:160, rest] @ torch.linalg.solve(h[rest, rest], h[rest, :160])
    expected = torch.linalg.solve(left[block, block], left[block, :128] @ errors)
    torch.testing.assert_close(factored.move(block, errors.float()).double(), expected, atol=1e-4, rtol=1e-3)


def test_a_dead_channel_has_no_neighbours():
    h = hessian()
    h[32:64] = 0
    h[:, 32:64] = 0
    root = factor(h, 0.01).root
    assert torch.allclose(root.diagonal()[32:64], torch.tensor(1.01**0.5))
    assert (root[32:64, 64:] == 0).all()
    assert (root[:32, 32:64] == 0).all()


def test_a_hessian_that_is_not_definite_takes_more_damping_and_says_so():
    h = torch.ones(K, K) - 0.05 * torch.eye(K)  # smallest eigenvalue -0.05, diagonal 0.95
    factored = factor(h, 0.01)
    assert factored.damping == pytest.approx(0.1)
    assert torch.isfinite(factored.root).all()


def test_inverse_roots_of_many_matrices():
    h = torch.stack([hessian()[i : i + 16, i : i + 16] for i in (0, 64)]).double() + torch.eye(16)
    u = inverse_root(h)
    assert torch.equal(u, u.triu())
    assert torch.allclose(u.mT @ u @ h, torch.eye(16, dtype=torch.float64).expand(2, 16, 16), atol=1e-9)


def test_output_error_is_the_mean_square_of_the_outputs():
    generator = torch.Generator().manual_seed(0)
    x, difference = (torch.randn(n, K, generator=generator) for n in (1000, 24))
    products = (x @ difference.T).double()
    assert output_error(difference, x.T @ x / 1000) == pytest.approx(float(products.square().sum() / 1000), rel=1e-5)
    g = torch.randn(100, 24, generator=generator)
    expected = float((products @ g.T.double()).square().sum() / 1000 / 100)
    assert output_error(difference, x.T @ x / 1000, g.T @ g / 100) == pytest.approx(expected, rel=1e-5)


def test_the_target_meets_the_full_outputs_best():
    generator = torch.Generator().manual_seed(0)
    full = torch.randn(4000, 8, generator=generator) @ torch.randn(8, 8, generator=generator)
    x = full + 0.3 * full.roll(1, dims=1)
    weight = torch.randn(5, 8, generator=generator)
    moments = Moments(x.T @ x / len(x), None, (full - x).T @ x / len(x), n_tokens=len(x))
    best = torch.linalg.lstsq(x, full @ weight.T).solution.T
    before, after, least = (
        float((x @ w.T - full @ weight.T).square().mean()) for w in (weight, moments.target(weight), best)
    )
    assert least < 1e-3 * before
    assert after < 0.1 * before  # damped
    assert Moments(moments.inputs, None).target(weight) is weight
    by_outputs = Moments(moments.inputs, None, None, 0.1 * weight @ moments.drift, len(x))
    torch.testing.assert_close(by_outputs.target(weight) - weight, 0.1 * (moments.target(weight) - weight))
    far = replace(by_outputs, output_drift=100 * by_outputs.output_drift).target(weight)
    assert float((far - weight).norm() / weight.norm()) == pytest.approx(LARGEST_MOVE)
    few = replace(moments, n_tokens=8).target(weight)
    assert (few - weight).norm() < 0.7 * (moments.target(weight) - weight).norm()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_hessian_that_is_not_finite_is_refused(bad):
    h = hessian()
    h[3, 5] = h[5, 3] = bad
    with pytest.raises(AaacError, match="NaN or Inf"):
        factor(h)
