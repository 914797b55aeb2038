"""llama.cpp's own types through our search and error feedback, decoded by the gguf library."""

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as T

from aaac_gguf.quantizer.grid import Encoded
from aaac_gguf.quantizer.quantize import quantize
from aaac_gguf.quantizer.search import TorchSearch
from aaac_gguf.quantizer.stock import STOCK_TYPES

# What normally distributed weights lose.
LIMITS = {"Q4_0": 0.0085, "Q5_0": 0.002, "IQ4_NL": 0.007, "Q8_0": 3e-5, "MXFP4": 0.016, "NVFP4": 0.011}
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
    assert error < LIMITS[type.name]


@pytest.mark.parametrize("type", [T.MXFP4, T.NVFP4], ids=lambda t: t.name)
def test_scales_are_those_of_the_gguf_library(type):
    """One level times every scale, with a group of zeros among them."""
    layout = STOCK_TYPES[type]
    scales = layout.scales()
    top = layout.levels[-1]
    codes = torch.arange(len(scales)).view(1, -1)[:, : len(scales) // 4 * 4].int()
    indices = torch.full((1, codes.numel() * layout.group_size), layout.levels.index(top), dtype=torch.uint8)
    blocks = layout.pack(Encoded(indices, indices.new_empty(0), codes))
    values = torch.from_numpy(gguf.dequantize(blocks, type)).view(-1, layout.group_size)
    assert torch.equal(values, (scales[: codes.numel()] * top)[:, None].expand_as(values))
    assert not values[0].any()
    assert (scales.diff() > 0).all()


def test_the_best_power_of_two_is_found(weight):
    layout = STOCK_TYPES[T.MXFP4]
    search = TorchSearch(layout.grid("cpu", 1.0), layout.group_size)
    codes, _, errors = search.search(weight, torch.ones_like(weight))
    groups, levels = weight.view(-1, 32), torch.tensor(layout.levels).float()
    for near in (-2, -1, 1, 2):
        scale = layout.scales()[codes + near][:, None]
        rounded = levels[(groups[..., None] / scale[..., None] - levels).abs().argmin(-1)] * scale
        assert (errors <= (rounded - groups).square().sum(1) * 1.001).all()


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
