"""The table of tensor types, and rounding to nearest."""

import gguf
import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as T
from search_samples import K_TYPES, heavy_tailed

from aaac_gguf.files.format import TYPES_BY_ID
from aaac_gguf.quantizer.kquants import KQUANTS
from aaac_gguf.quantizer.types import TENSOR_TYPES, round_to_nearest

EVERY_TYPE = pytest.mark.parametrize("type", TENSOR_TYPES, ids=lambda t: t.name)


@EVERY_TYPE
def test_fallbacks_have_shorter_blocks(type):
    """The last one has blocks of 32. After it comes the source's own type, which the plan knows."""
    seen = [type]
    while fallback := TENSOR_TYPES[seen[-1]].fallback:
        seen.append(fallback)
    blocks = [GGML_QUANT_SIZES[t][0] for t in seen]
    assert blocks == sorted(set(blocks), reverse=True)
    assert blocks[-1] in (1, 32)


@EVERY_TYPE
def test_the_file_type_names_the_type(type):
    """llama.cpp's names of file types begin with the type; AAAC ids are the same in both lists."""
    file_type = TENSOR_TYPES[type].file_type
    if type in TYPES_BY_ID:
        assert file_type == int(type)
    else:
        assert gguf.LlamaFileType(file_type).name.split("_", 1)[1].startswith(type.name)


@pytest.mark.parametrize("type", [T.Q8_0, T.Q4_0, T.BF16, T.F16, T.F32], ids=lambda t: t.name)
def test_rounding_to_nearest_is_that_of_the_gguf_library(type):
    weight = heavy_tailed().reshape(2, 32, 256)
    data = round_to_nearest(weight, type)
    assert np.array_equal(data, gguf.quantize(weight.numpy(), type))
    assert data.shape[:2] == (2, 32)


@K_TYPES
def test_k_quants_round_to_nearest_as_the_gguf_library_decodes(type):
    weight = heavy_tailed().reshape(2, 32, 256)
    difference = torch.from_numpy(gguf.dequantize(round_to_nearest(weight, type), type)) - weight
    n_levels = len(KQUANTS[type].levels)
    assert difference.square().sum() < 2.5 / n_levels**2 * weight.square().sum()


def test_types_of_less_than_five_bits_are_searched_under_importance():
    """Q4_0 is not: rounding to nearest may choose the sign of a scale. What cannot be rounded to nearest is."""
    for type, entry in TENSOR_TYPES.items():
        n_weights, n_bytes = GGML_QUANT_SIZES[type]
        assert entry.by_importance == (8 * n_bytes < 5 * n_weights and type != T.Q4_0), type.name
        if type not in KQUANTS and not entry.by_importance:
            round_to_nearest(torch.ones(1, 256), type)
