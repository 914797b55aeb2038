"""Run the checks of test_gpu.py at small sizes without a GPU: NumPy stands for CuPy, and kernels run in the emulator.

This tests the names, grids and arguments of launches.
"""

import functools

import pytest
import test_gpu
from emulation.emulated_cupy import Cupy, numpy
from numpy.lib.stride_tricks import as_strided
from test_gpu import (  # noqa: F401, collected here as well
    test_errors_say_what_is_wrong,
    test_every_tensor_of_a_file,
    test_file_errors_name_the_type,
)

from aaac_gguf.files.format import G32
from aaac_gguf.inference import kernels

ALL_TYPES = test_gpu.ALL_TYPES


@pytest.fixture
def cp(lib, monkeypatch):
    cupy = Cupy(lib)
    monkeypatch.setattr(kernels, "_cupy", lambda: cupy)
    monkeypatch.setattr(kernels, "np", numpy)
    kernels.kernel.cache_clear()
    yield cupy
    kernels.kernel.cache_clear()
    test_gpu.sample.cache_clear()


@ALL_TYPES
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_dequant(cp, qtype, dtype):
    test_gpu.test_dequant_is_exact(cp, qtype, 4, dtype)
    test_gpu.test_dequant_sizes(cp, qtype, 3, 384)


@ALL_TYPES
@pytest.mark.parametrize("n", [1, 2, 3, 8])
def test_matvec(cp, qtype, n):
    test_gpu.test_matvec(cp, qtype, 7, 384, n)


@ALL_TYPES
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_matvec_with_float_activations(cp, qtype, dtype):
    test_gpu.test_matvec_with_float_activations(cp, qtype, 3, 128, dtype)


@ALL_TYPES
def test_matmul(cp, qtype):
    test_gpu.test_matmul(cp, qtype, 3, 128, 17)


def test_the_stride_of_a_single_row_does_not_count(cp):
    """DLPack may hand over any."""
    blocks, params, w = test_gpu.sample(cp, G32, 1, 192)
    x = cp.random.default_rng(0).standard_normal((1, 192), dtype=cp.float32)
    blocks, odd = (as_strided(array, strides=(array.itemsize,) * 2, subok=True) for array in (blocks, x))
    assert (kernels.dequant(G32, blocks, params) == w).all()
    for product in (kernels.matvec, functools.partial(kernels.matvec, quantized=False), kernels.matmul):
        assert product(G32, blocks, params, odd) == product(G32, blocks, params, x)
