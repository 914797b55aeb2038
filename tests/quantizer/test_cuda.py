"""search.cu without a GPU: its kernels run on the host, one fiber per thread, against torch and against search.c."""

import ctypes
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from conftest import host_library
from gguf import GGMLQuantizationType as T
from search_samples import G16, G32, G128, K_TYPES, NEEDS_C, check_alike, moment, samples, search_for

from aaac_gguf.quantizer import cuda
from aaac_gguf.quantizer.columns import BLOCK_COLUMNS
from aaac_gguf.quantizer.cuda import CudaSearch, Launcher
from aaac_gguf.quantizer.feedback import feedback
from aaac_gguf.quantizer.grid import SCALE_STARTS
from aaac_gguf.quantizer.kquants import KQUANTS
from aaac_gguf.quantizer.moments import factor
from aaac_gguf.quantizer.native import NativeSearch
from aaac_gguf.quantizer.search import TorchSearch
from aaac_gguf.quantizer.steps import StepSearch

KERNELS = ("aaac_feed_back", "aaac_sweep")


@pytest.fixture(scope="module")
def lib(tmp_path_factory):
    return host_library("search_host.cpp", tmp_path_factory.mktemp("search"))


def as_cupy_passes(argument):
    """Return a structure, an int or a pointer, by its type in Python."""
    if isinstance(argument, np.ndarray):
        return argument.ctypes
    return ctypes.c_int32(int(argument)) if isinstance(argument, np.int32) else ctypes.c_void_p(argument)


@pytest.fixture
def launched(lib, monkeypatch):
    """Make CudaSearch launch its kernels here. The names of those that it launches are in the list."""
    names = []

    def kernel(name):
        function, _, group_size = name.removesuffix(">").partition("<")

        def launch(blocks, threads, args):
            names.append(function)
            getattr(lib, function)(int(group_size or 0), *blocks, *threads, *map(as_cupy_passes, args))

        return launch

    monkeypatch.setattr(
        cuda, "launcher", lambda _, *names: Launcher({name: kernel(name) for name in names}, nullcontext)
    )
    return names


FULL, FEW = 2000, 40  # tokens: H of full rank, and H that only damping makes definite


@NEEDS_C
@pytest.mark.parametrize(
    ("type", "n_rows", "k", "n_tokens", "between_rows"),
    [
        (G16, 5, 64, FULL, False),
        (G16, 1, 192, FULL, False),
        (G16, 5, 192, FEW, True),
        (G32, 9, 192, FULL, False),
        (G32, 18, 64, FEW, True),
        (G128, 7, 384, FULL, False),
        (G128, 3, 256, FEW, True),
        (T.IQ4_NL, 6, 96, FULL, False),
        (T.Q8_0, 3, 160, FEW, False),
        (T.MXFP4, 6, 96, FULL, False),
        (T.NVFP4, 3, 128, FEW, False),
    ],
)
def test_feedback_is_that_of_torch_and_of_search_c(launched, type, n_rows, k, n_tokens, between_rows):
    w, inputs = samples(n_rows, k), factor(moment(k, n_tokens))
    o = torch.eye(n_rows) + 0.3 if between_rows else None
    search, *others = (search_for(type, w, backend) for backend in ("cuda", "torch", "native"))
    for sweeps in (0, 2):
        launched.clear()
        found = search.decode(feedback(w, inputs, search, o, sweeps))
        blocks = -(-k // 128) * (len(range(0, n_rows, -(-n_rows // 16))) if between_rows else 1)
        assert [launched.count(name) for name in KERNELS] == [blocks, sweeps * blocks]
        for other in others:
            check_alike(w, found, other.decode(feedback(w, inputs, other, o, sweeps)), inputs, o)


@NEEDS_C
@pytest.mark.parametrize(
    ("between_rows", "n_tokens"), [(False, FULL), (True, FEW)], ids=["columns", "columns and rows"]
)
@K_TYPES
def test_steps_are_those_of_torch_and_of_search_c(launched, type, between_rows, n_tokens):
    w, inputs = samples(3, 512), factor(moment(512, n_tokens))
    layout = KQUANTS[type]
    halves = layout.steps(w, torch.ones_like(w)).halves
    o = torch.eye(3) + 0.3 if between_rows else None

    def decided(backend):
        search = StepSearch(layout, halves, backend)
        encoded = feedback(w, inputs, search, o)
        return layout.weights(encoded.indices, search.steps(encoded))

    found = decided(CudaSearch)
    # Twice in feedback and once in the sweep, for each run of each block of rows.
    assert launched == ["aaac_round_to_steps"] * (3 * 512 // layout.run * (3 if between_rows else 1))
    for backend in (TorchSearch, NativeSearch):
        check_alike(w, found, decided(backend), inputs, o)


def test_constants_are_those_of_search_cu(lib):
    constants = (ctypes.c_int * 5)()
    lib.constants(constants)
    assert list(constants) == [cuda.ROWS, cuda.THREADS, cuda.STARTS, BLOCK_COLUMNS, cuda.GRID.itemsize]
    assert {len(starts) for starts in SCALE_STARTS.values()} == {cuda.STARTS}
