"""llama.cpp's own types through our search and error feedback, decoded by the gguf library."""

import gguf
import pytest
import torch

from aaac_gguf.quantizer.quantize import quantize
from aaac_gguf.quantizer.stock import STOCK_TYPES

by_type = pytest.mark.parametrize("ggml_type", STOCK_TYPES, ids=lambda t: t.name)


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(48, 256, generator=torch.Generator().manual_seed(0)) * 0.02


def decoded(result, ggml_type) -> torch.Tensor:
    return torch.from_numpy(gguf.dequantize(result.data, ggml_type))


@by_type
def test_the_file_decodes_to_what_was_searched(weight, ggml_type):
    result = quantize(weight, ggml_type)
    assert result.codec is None
    error = float((decoded(result, ggml_type) - weight).square().sum() / weight.square().sum())
    assert error == pytest.approx(result.relative_error, rel=1e-3)
    assert error < {"Q4_0": 0.0085, "IQ4_NL": 0.007, "Q8_0": 3e-5}[ggml_type.name]


@pytest.mark.parametrize(
    "ggml_type", [gguf.GGMLQuantizationType.IQ4_NL, gguf.GGMLQuantizationType.Q8_0], ids=lambda t: t.name
)
def test_values_that_the_type_holds_stay(weight, ggml_type):
    held = decoded(quantize(weight, ggml_type), ggml_type)
    torch.testing.assert_close(decoded(quantize(held, ggml_type), ggml_type), held, rtol=2e-3, atol=1e-6)


@by_type
def test_zeros(ggml_type):
    assert not decoded(quantize(torch.zeros(3, 64), ggml_type), ggml_type).any()


@by_type
def test_feedback_lowers_the_layers_error(weight, ggml_type):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2000, 256, generator=generator) @ torch.randn(256, 256, generator=generator)
    hessian = x.T @ x / len(x)
    difference = weight - decoded(quantize(weight, ggml_type, hessian.diagonal()), ggml_type)
    without = float(torch.trace(difference @ hessian @ difference.T))
    difference = weight - decoded(quantize(weight, ggml_type, hessian=hessian), ggml_type)
    assert float(torch.trace(difference @ hessian @ difference.T)) < 0.6 * without


def test_experts(weight):
    experts = torch.stack([weight, 2 * weight])
    ggml_type = gguf.GGMLQuantizationType.IQ4_NL
    result = quantize(experts, ggml_type)
    assert result.data.shape == (2, 48, 256 // 32 * 18)
    torch.testing.assert_close(decoded(result, ggml_type)[1], 2 * decoded(result, ggml_type)[0])


def test_the_papers_method_makes_no_stock_types(weight):
    with pytest.raises(ValueError, match="no stock types"):
        quantize(weight, gguf.GGMLQuantizationType.Q4_0, method="paper")
