"""Second moments: factors of damped Hessians, and targets."""

from dataclasses import replace

import torch

from aaac_gguf.quantizer.moments import Moments


def test_the_target_meets_the_full_outputs_best():
    generator = torch.Generator().manual_seed(0)
    full = torch.randn(4000, 8, generator=generator) @ torch.randn(8, 8, generator=generator)
    x = full + 0.3 * full.roll(1, dims=1)
    weight = torch.randn(5, 8, generator=generator)
    moments = Moments(x.T @ x / len(x), None, (full - x).T @ x / len(x), len(x))
    best = torch.linalg.lstsq(x, full @ weight.T).solution.T
    before, after, least = (
        float((x @ w.T - full @ weight.T).square().mean()) for w in (weight, moments.target(weight), best)
    )
    assert least < 1e-3 * before
    assert after < 0.1 * before  # damped
    assert Moments(moments.inputs, None).target(weight) is weight
    few = replace(moments, n_tokens=8).target(weight)
    assert (few - weight).norm() < 0.7 * (moments.target(weight) - weight).norm()
