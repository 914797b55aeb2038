"""Random tokens beside the text, targets, and the rows of a tensor in the parameter that it was made of."""

from dataclasses import replace

import pytest
import torch

from aaac_gguf.calibration import tokens as tokens_module
from aaac_gguf.models.rows import Rows
from aaac_gguf.quantizer.moments import Moments


def random_tokens(vocab_size: int, n: int = 3, length: int = 16) -> torch.Tensor:
    return torch.randint(0, vocab_size, (n, length), generator=torch.Generator().manual_seed(0))


def test_random_tokens_come_beside_the_text():
    tokens = random_tokens(4096, 8)
    both, weights = tokens_module.with_random(tokens, 4096, seed=1)
    assert torch.equal(both[:8], tokens)
    assert both.shape == (10, tokens.shape[1])
    assert torch.equal(both[8:, 0], tokens[:2, 0])
    assert (both[8:, 1:] != tokens[:2, 1:]).float().mean() > 0.9
    assert int(both.min()) >= 0
    assert int(both.max()) < 4096
    assert weights.tolist() == [1] * 8 + [4] * 2


def test_rows_are_found_permuted_and_cut():
    parameter = torch.randn(12, 4)
    parameter[3] = parameter[7]  # equal rows are each taken once
    outputs = torch.arange(144.0).view(12, 12)
    order = torch.tensor([3, 1, 0, 7, 9, 11])
    rows = Rows.find(parameter, parameter[order])
    assert torch.equal(rows.of_outputs(outputs), outputs[order][:, order])
    assert torch.equal(Rows.find(parameter, parameter).of_outputs(outputs), outputs)
    assert Rows.find(parameter, parameter + 1) is None


@pytest.mark.parametrize("shape", [(6, 4), (4, 4), (3, 6, 4)])
@pytest.mark.parametrize("transposed", [False, True])
def test_rows_are_put_back_where_they_were_found(shape, transposed):
    """Also half of the rows of every expert, as gate and up of a fused parameter are."""
    stored = torch.randn(shape)
    parameter = torch.nn.Parameter(stored.transpose(-2, -1).contiguous() if transposed else stored.clone())
    tensor = stored[..., 1::2, :]
    rows = Rows.find(parameter, tensor)
    assert rows.transposed == transposed
    rows.put(parameter, 2 * tensor)
    after = parameter.data.transpose(-2, -1) if transposed else parameter.data
    assert torch.equal(after[..., 1::2, :], 2 * tensor)
    assert torch.equal(after[..., ::2, :], stored[..., ::2, :])


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
