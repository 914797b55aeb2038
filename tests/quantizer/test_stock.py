"""llama.cpp's own types through our search and error feedback, decoded by the gguf library."""

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as T

from aaac_gguf.quantizer.quantize import quantize
from aaac_gguf.quantizer.stock import STOCK_TYPES

STOCK = pytest.mark.parametrize("type", STOCK_TYPES, ids=lambda t: t.name)


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(48, 256, generator=torch.Generator().manual_seed(0)) * 0.02


def decoded(result, type) -> torch.Tensor:
    return torch.from_numpy(gguf.dequantize(result.data, type))


@STOCK
def test_the_file_decodes_to_what_was_searched(weight, type):
    result = quantize(weight, type)
    assert result.codec is None
    error = float((decoded(result, type) - weight).square().sum() / weight.square().sum())
    assert error == pytest.approx(result.relative_error, rel=1e-3)
    assert error < {"Q4_0": 0.0085, "IQ4_NL": 0.007, "Q8_0": 3e-5}[type.name]


@pytest.mark.parametrize("type", [T.IQ4_NL, T.Q8_0], ids=lambda t: t.name)
def test_values_that_the_type_holds_stay(weight, type):
    held = decoded(quantize(weight, type), type)
    torch.testing.assert_close(decoded(quantize(held, type), type), held, rtol=2e-3, atol=1e-6)


@STOCK
def test_zeros_stay_zero(type):
    assert not decoded(quantize(torch.zeros(3, 64), type), type).any()


@STOCK
def test_feedback_lowers_the_layers_error(weight, type):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2000, 256, generator=generator) @ torch.randn(256, 256, generator=generator)
    hessian = x.T @ x / len(x)
    difference = weight - decoded(quantize(weight, type, hessian.diagonal()), type)
    without = float(torch.trace(difference @ hessian @ difference.T))
    difference = weight - decoded(quantize(weight, type, hessian=hessian), type)
    assert float(torch.trace(difference @ hessian @ difference.T)) < 0.6 * without


def test_experts_have_scales_of_their_own(weight):
    experts = torch.stack([weight, 2 * weight])
    type = T.IQ4_NL
    result = quantize(experts, type)
    assert result.data.shape == (2, 48, 256 // 32 * 18)
    torch.testing.assert_close(decoded(result, type)[1], 2 * decoded(result, type)[0])
