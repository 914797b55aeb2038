"""Weights that are 4-bit by nature are encoded without loss, in every dtype that a checkpoint has."""

import gguf
import numpy as np
import pytest
import torch
from conftest import random_codec
from gguf import GGMLQuantizationType as T

from aaac_gguf.files import format as fmt
from aaac_gguf.files.gguf import dequantize
from aaac_gguf.quantizer.exact import EXACT_TYPES, encode_exactly, has_few_values

N, K = 48, 256
G16, G32, G128 = T["AAAC4_G16"], T["AAAC4_G32"], T["AAAC4_G128"]
INT4, E2M1 = range(-8, 8), [x * sign / 2 for x in (0, 1, 2, 3, 4, 6, 8, 12) for sign in (1, -1)]
ODD = [-119, -92, -66, -62, -59, -50, -23, -21, -14, -4, 0, 75, 82, 90, 103, 107]


def on_grid(rng, levels, group_size, scales, zeros=False):
    """Random levels times scales(shape), float32 [N, K]. zeros: subtract a random integer from every group."""
    drawn = rng.choice(np.array(list(levels), np.float32), (N, K))
    if zeros:
        drawn -= rng.integers(0, 16, (N, K // group_size)).repeat(group_size, 1)
    return torch.from_numpy(drawn * scales((N, K // group_size)).astype(np.float32).repeat(group_size, 1))


def smallest(weight, dtype, rounded_to=None):
    """The first type that holds the weights, checked by decoding it. rounded_to: by default the dtype."""
    assert has_few_values(weight)
    for ggml_type in EXACT_TYPES:
        if found := encode_exactly(weight, dtype, ggml_type):
            assert found.data.shape[:-1] == weight.shape[:-1]
            decoded = torch.from_numpy(dequantize(found.data, ggml_type, found.codec))
            assert torch.equal(decoded.to(rounded_to or dtype).float() + 0.0, weight + 0.0)
            return ggml_type
    return None


KINDS = {
    "Q4_0": (INT4, 32, "float16", T.Q4_0),
    "Q4_0 with negative scales": (INT4, 32, "negative", T.Q4_0),
    "INT4 of 128, bfloat16 scales": (INT4, 128, "bfloat16", T.Q4_0),
    "IQ4_NL": (gguf.quants.IQ4_NL.kvalues, 32, "float16", T.IQ4_NL),
    "MXFP4": (E2M1, 32, "power of two", T.MXFP4),
    "NVFP4": (E2M1, 16, "e4m3", G16),
    "INT4 of 16, powers of two": (INT4, 16, "power of two", G16),
    "16 odd levels of 32, powers of two": (ODD, 32, "power of two", G32),
    "16 odd levels of a tensor": (ODD, 128, "one", G128),
    "ternary": ((-1, 0, 1), 128, "one", G128),
}
SCALES = {
    "float16": lambda rng: lambda shape: rng.uniform(1e-3, 1e-2, shape).astype(np.float16),
    "negative": lambda rng: lambda shape: -rng.uniform(1e-3, 1e-2, shape).astype(np.float16),
    "bfloat16": lambda rng: lambda shape: torch.rand(shape).add(0.1).bfloat16().float().numpy(),
    "power of two": lambda rng: lambda shape: 2.0 ** rng.integers(-9, -3, shape),
    "e4m3": lambda rng: lambda shape: torch.rand(shape).to(torch.float8_e4m3fn).float().numpy() * 0.0123,
    "one": lambda rng: lambda shape: np.full(shape, 0.00371),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_4_bit_checkpoints(kind, dtype, rng):
    levels, group_size, scales, expected = KINDS[kind]
    weight = on_grid(rng, levels, group_size, SCALES[scales](rng)).to(dtype).float()
    assert smallest(weight, dtype) == expected
    # Experts, and a group of zeros.
    weight[5, :128] = 0
    assert smallest(weight.reshape(4, N // 4, K), dtype) == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_zero_points_take_a_fifth_bit(dtype, rng):
    weight = on_grid(rng, range(16), 32, SCALES["float16"](rng), zeros=True).to(dtype).float()
    assert smallest(weight, dtype) == T.Q5_0


def test_levels_that_only_bytes_hold(rng):
    weight = on_grid(rng, ODD, 32, SCALES["float16"](rng)).half().float()
    assert smallest(weight, torch.float16) == T.Q8_0


@pytest.mark.parametrize("m", fmt.MANTISSA_BITS)
def test_one_codebook_of_ours_is_found_again(m, rng):
    codec = random_codec(rng, m)
    codes = rng.integers(1, 60, (N, K // 16)).astype(np.uint8)
    indices = rng.integers(0, 16, (N, K)).astype(np.uint8)
    blocks = fmt.pack(fmt.G16, indices, np.zeros((N, K // 16), np.uint8), codes)
    assert smallest(torch.from_numpy(fmt.decode(fmt.G16, blocks, codec)), torch.float32) == G16


def test_a_copy_in_float32_counts_as_what_it_was(rng):
    """Rounded to bfloat16 and then stored as float32, no product is exact."""
    weight = on_grid(rng, INT4, 32, SCALES["float16"](rng)).bfloat16().float()
    assert smallest(weight, torch.float32, rounded_to=torch.bfloat16) == T.Q4_0


def test_one_weight_off_the_grid_is_a_loss(rng):
    weight = on_grid(rng, INT4, 32, SCALES["float16"](rng)).bfloat16().float()
    weight[-1, -1] = weight[-1, -32:].abs().max() * 0.31
    assert not any(encode_exactly(weight, torch.bfloat16, t) for t in EXACT_TYPES)
    weight = on_grid(rng, ODD, 128, SCALES["one"](rng)).bfloat16().float()
    weight[-1, -1] = 4.5 * 0.00371  # the scale is the same everywhere
    assert not any(encode_exactly(weight.bfloat16().float(), torch.bfloat16, t) for t in EXACT_TYPES)


def test_rows_that_are_no_whole_blocks(rng):
    weight = on_grid(rng, INT4, 32, SCALES["float16"](rng))[:, :80]
    assert [encode_exactly(weight, torch.float32, t) for t in EXACT_TYPES] == [None] * len(EXACT_TYPES)


def test_full_precision_is_seen_at_once(rng):
    normal = torch.from_numpy(rng.normal(size=(N, K)).astype(np.float32))
    assert not has_few_values(normal)
    assert not has_few_values(normal.bfloat16().float())
    assert not has_few_values(on_grid(rng, range(-127, 128), 32, SCALES["float16"](rng)))
    assert not has_few_values(torch.zeros(N, K))
    assert not has_few_values(on_grid(rng, INT4, 32, SCALES["float16"](rng))[:, :40])
