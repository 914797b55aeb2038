"""Our Q6_K against the gguf library's decoder, and against llama-quantize's encoder for quality."""

import gguf
import numpy as np
import torch

from aaac_gguf.kquants import quantize_q6_k

Q6_K = gguf.GGMLQuantizationType.Q6_K


def relative_error(weight: torch.Tensor) -> float:
    decoded = gguf.dequantize(quantize_q6_k(weight), Q6_K)
    return float(np.square(decoded - weight.numpy()).sum() / weight.square().sum())


def test_decodes_close_to_the_weights():
    generator = torch.Generator().manual_seed(0)
    assert relative_error(torch.randn(64, 512, generator=generator)) < 3.5e-4  # a 6-bit grid of 16 normal weights; 8e-3 with one level less
    assert relative_error(1e-3 * torch.randn(64, 512, generator=generator)) < 3.5e-4


def test_exact_on_its_own_grid():
    q = torch.randint(-32, 32, (4, 16, 16), generator=torch.Generator().manual_seed(1)).float()
    q[..., 0] = -32  # every group reaches its end
    codes = torch.full((4, 16, 1), -128.0)
    weight = (2.0**-12 * codes * q).reshape(4, 256)
    np.testing.assert_array_equal(gguf.dequantize(quantize_q6_k(weight), Q6_K), weight.numpy())


def test_zeros_and_shapes():
    assert not gguf.dequantize(quantize_q6_k(torch.zeros(2, 3, 256)), Q6_K).any()
    assert quantize_q6_k(torch.ones(2, 3, 512)).shape == (2, 3, 420)
