"""Types with super-blocks against the gguf library's decoders, with and without error feedback."""

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as T
from search_samples import K_TYPES

from aaac_gguf.quantizer.kquants import KQUANTS
from aaac_gguf.quantizer.moments import output_error
from aaac_gguf.quantizer.quantize import quantize


def decoded(type, weight: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(gguf.dequantize(KQUANTS[type].round_to_nearest(weight), type))


def relative_error(type, weight: torch.Tensor) -> float:
    return float((decoded(type, weight) - weight).square().sum() / weight.square().sum())


# What normally distributed weights lose. Others lose less; 8e-3 for Q6_K with one level less.
LIMITS = {
    T.Q2_K: 0.093,
    T.Q3_K: 0.024,
    T.Q4_K: 5.7e-3,
    T.Q5_K: 1.4e-3,
    T.Q6_K: 3.5e-4,
    T.IQ4_XS: 6.3e-3,
    T.Q4_1: 5.7e-3,
    T.Q5_1: 1.4e-3,
}


@pytest.mark.parametrize(("type", "limit"), LIMITS.items(), ids=lambda t: getattr(t, "name", ""))
def test_decodes_close_to_the_weights(type, limit):
    normal = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    for weight in (normal, 1e-3 * normal, normal.abs() + 0.5, torch.full((1, 256), 0.3)):
        assert relative_error(type, weight) < limit


def test_q6_k_is_exact_on_its_own_grid():
    q = torch.randint(-32, 32, (4, 16, 16), generator=torch.Generator().manual_seed(1)).float()
    q[..., 0] = -32  # every group reaches its end
    codes = torch.full((4, 16, 1), -128.0)
    weight = (2.0**-12 * codes * q).reshape(4, 256)
    assert torch.equal(decoded(T.Q6_K, weight), weight)


def test_q5_k_is_exact_on_its_own_grid():
    q = torch.randint(0, 32, (4, 8, 32), generator=torch.Generator().manual_seed(1)).float()
    q[..., 0], q[..., 1] = 0, 31
    weight = (2.0**-12 * (q * torch.arange(56, 64)[:, None] - 2 * torch.arange(60, 64).repeat(2)[:, None])).reshape(
        4, 256
    )
    assert relative_error(T.Q5_K, weight) < 1e-5  # the offsets are found among many; half of a quant would be 1e-3


@K_TYPES
def test_zeros_and_shapes(type):
    assert not decoded(type, torch.zeros(2, 3, 256)).any()
    blocks = KQUANTS[type].round_to_nearest(torch.ones(2, 3, 512))
    n_weights, n_bytes = gguf.GGML_QUANT_SIZES[type]
    assert blocks.shape == (2, 3, 512 // n_weights * n_bytes)


@K_TYPES
def test_steps_say_what_is_decoded(type):
    weight = torch.randn(8, 512, generator=torch.Generator().manual_seed(2))
    layout = KQUANTS[type]
    steps = layout.steps(weight, weight.square())
    assert torch.equal(layout.weights(layout.round_to(steps, weight), steps), decoded(type, weight))


@K_TYPES
def test_feedback_lowers_the_output_error(type):
    rng = np.random.default_rng(4)
    weight = torch.from_numpy(rng.standard_normal((40, 512))).float()
    x, g = (
        torch.from_numpy(rng.standard_normal((2000, n)) @ (np.eye(n) + 0.15 * rng.standard_normal((n, n)))).float()
        for n in (512, 40)
    )
    h, o = x.T @ x / 2000, g.T @ g / 2000

    def error(**moments) -> float:
        q = quantize(weight, type, **moments)
        difference = torch.from_numpy(gguf.dequantize(q.data, type)) - weight
        if "outputs" in moments:
            assert q.weighted_error == pytest.approx(
                output_error(difference, h, o) / output_error(weight, h, o), rel=1e-3
            )
        return output_error(difference, h, o)

    rounded, columns, between_rows = error(importance=h.diagonal()), error(hessian=h), error(hessian=h, outputs=o)
    assert columns < 0.7 * rounded
    assert between_rows < columns
