"""cuda_kernels/aaac_decode.cuh, compiled for this machine as C and as C++, against the numpy oracle, bit for bit."""

import ctypes
import shutil
import subprocess

import numpy as np
import pytest
from aaac_samples import codec, every_combination, hand_written, random_blocks

from aaac_gguf.files.format import TYPES, check_blocks, decode
from aaac_gguf.resources import shipped

ALL_TYPES = pytest.mark.parametrize("qtype", TYPES.values(), ids=TYPES)
COMPILERS = {
    "c11": ("gcc", "-std=c11", "-O1"),
    "c++17": ("g++", "-std=c++17", "-xc++", "-O2"),
    # an optimizer that may fuse a product into the sum after it must not change a bit either
    "c++17-fma": ("g++", "-std=c++17", "-xc++", "-O3", "-march=native", "-ffp-contract=fast"),
}


@pytest.fixture(scope="module", params=COMPILERS)
def header(request, tmp_path_factory):
    """Compile the header and return decode(qtype, blocks, codec) -> float32."""
    compiler, *flags = COMPILERS[request.param]
    if not shutil.which(compiler):
        pytest.skip(f"{compiler} is not installed")
    library = tmp_path_factory.mktemp("decode") / "libdecode.so"
    source = request.config.rootpath / "tests" / "llama" / "decode_host.c"
    subprocess.run(
        [
            compiler,
            *flags,
            "-Wall",
            "-Werror",
            "-shared",
            "-fPIC",
            "-I",
            shipped("cuda_kernels"),
            "-o",
            library,
            source,
        ],
        check=True,
    )
    lib = ctypes.CDLL(str(library))

    def decode_with_header(qtype, blocks, codec):
        blocks = np.ascontiguousarray(blocks)
        n_blocks = blocks.size // qtype.type_size
        out = np.empty((*blocks.shape[:-1], blocks.shape[-1] // qtype.type_size * qtype.block_size), np.float32)
        lib.decode(
            qtype.type_id,
            codec.codebooks.ctypes,
            ctypes.c_float(codec.scale_base),
            ctypes.c_uint8(codec.scale_mantissa_bits),
            blocks.ctypes,
            n_blocks,
            out.ctypes,
        )
        return out

    decode_with_header.lib = lib
    return decode_with_header


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return np.array_equal(a.view(np.uint32), b.view(np.uint32))


@ALL_TYPES
def test_sizes(header, qtype):
    assert header.lib.block_bytes(qtype.type_id) == qtype.type_size
    assert header.lib.block_weights(qtype.type_id) == qtype.block_size


@ALL_TYPES
@pytest.mark.parametrize("m", [2, 3, 4, 5])
def test_every_index_selector_and_scale_code(header, qtype, m):
    blocks = every_combination(qtype)
    assert same_bits(header(qtype, blocks, codec(m)), decode(qtype, blocks, codec(m)))


@ALL_TYPES
@pytest.mark.parametrize("m", [2, 3, 4, 5])
@pytest.mark.parametrize("d", [1e-30, 0.0137, 3.0])
def test_random_blocks(header, qtype, m, d):
    blocks = random_blocks(qtype, 20, 768, seed=m)
    assert same_bits(header(qtype, blocks, codec(m, d)), decode(qtype, blocks, codec(m, d)))


@ALL_TYPES
def test_random_bytes(header, qtype):
    data = np.random.default_rng(5).integers(0, 256, (50, 6 * qtype.type_size), dtype=np.uint8)
    if qtype.name == "AAAC4_G128":
        data[:, :: qtype.type_size] &= 0x7F  # the one bit that the layouts leave undefined
    check_blocks(qtype, data, "random")
    assert same_bits(header(qtype, data, codec(4)), decode(qtype, data, codec(4)))


@ALL_TYPES
def test_hand_written_blocks(header, qtype):
    blocks, weights = hand_written(qtype)
    for got in (header(qtype, blocks, codec(3, 1.0)), decode(qtype, blocks, codec(3, 1.0))):
        np.testing.assert_array_equal(got, weights.astype(np.float32))
