"""search.cu without a GPU: its kernels run on the host, one fiber per thread, against torch and against search.c."""

import ctypes
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from conftest import host_library
from gguf import GGMLQuantizationType as T
from search_samples import check_alike, moment, samples

from aaac_gguf.errors import AaacError
from aaac_gguf.files.format import G16, G32, G128
from aaac_gguf.quantizer import cuda as gpu_search
from aaac_gguf.quantizer import feedback as module
from aaac_gguf.quantizer.feedback import feedback, feedback_on_steps
from aaac_gguf.quantizer.grid import SCALE_STARTS, Grid
from aaac_gguf.quantizer.kquants import KQUANTS
from aaac_gguf.quantizer.moments import factor
from aaac_gguf.quantizer.quantize import quantize
from aaac_gguf.quantizer.search import decode
from aaac_gguf.quantizer.stock import STOCK_TYPES

KERNELS = ("aaac_feed_back", "aaac_sweep")


@pytest.fixture(scope="module")
def lib(tmp_path_factory):
    return host_library("search_host.cpp", tmp_path_factory.mktemp("search"))


def as_cupy_passes(argument):
    """A structure, an int or a pointer, by its type in Python."""
    if isinstance(argument, np.ndarray):
        return argument.ctypes
    return ctypes.c_int32(int(argument)) if isinstance(argument, np.int32) else ctypes.c_void_p(argument)


@pytest.fixture
def on_host(lib, monkeypatch):
    """Makes feedback.py launch the kernels, here, unless search.c does the work; returns the names of those launched."""
    launched = []

    def kernel(name):
        function, _, group_size = name.removesuffix(">").partition("<")

        def launch(blocks, threads, args):
            launched.append(function)
            getattr(lib, function)(int(group_size or 0), *blocks, *threads, *map(as_cupy_passes, args))

        return launch

    def launcher(device, *names):
        return gpu_search.Launcher({name: kernel(name) for name in names}, nullcontext(), nullcontext())

    monkeypatch.setattr(gpu_search, "launcher", launcher)
    return launched


def grid_of(qtype, w: torch.Tensor, compiled: bool) -> Grid:
    grid = (
        qtype.grid("cpu", 1.0)
        if hasattr(qtype, "grid")
        else Grid.of_codec(quantize(w, T[qtype.name]).codec, qtype, "cpu")
    )
    if not compiled:
        grid.__dict__["compiled"] = None
    return grid


FULL, FEW = 2000, 40  # tokens: H of full rank, and H that only damping makes definite


@pytest.mark.parametrize(
    ("qtype", "n_rows", "k", "n_tokens", "rows_too"),
    [
        (G16, 5, 64, FULL, False),
        (G16, 1, 192, FULL, False),
        (G16, 5, 192, FEW, True),
        (G32, 9, 192, FULL, False),
        (G32, 18, 64, FEW, True),
        (G128, 7, 384, FULL, False),
        (G128, 3, 256, FEW, True),
        (STOCK_TYPES[T.IQ4_NL], 6, 96, FULL, False),
        (STOCK_TYPES[T.Q8_0], 3, 160, FEW, False),
    ],
)
def test_kernels_choose_as_torch_and_c_do(on_host, monkeypatch, qtype, n_rows, k, n_tokens, rows_too):
    w, inputs = samples(n_rows, k), factor(moment(k, n_tokens))
    o = torch.eye(n_rows) + 0.3 if rows_too else None
    for sweeps in (0, 2):
        on_host.clear()
        found = feedback(w, inputs, grid_of(qtype, w, compiled=False), qtype, o, sweeps)
        blocks = -(-k // 128) * (len(range(0, n_rows, -(-n_rows // 16))) if rows_too else 1)
        assert [on_host.count(name) for name in KERNELS] == [blocks, sweeps * blocks]
        grids = [grid_of(qtype, w, compiled) for compiled in (False, True)]
        with monkeypatch.context() as patch:
            patch.setattr(gpu_search, "launcher", lambda device, *names: None)
            wanted = [feedback(w, inputs, grid, qtype, o, sweeps) for grid in grids]
        for other in wanted:
            check_alike(w, decode(found, grids[0]), decode(other, grids[0]), inputs, o)


@pytest.mark.parametrize("n_tokens", [FULL, FEW])
@pytest.mark.parametrize("rows_too", [False, True], ids=["columns", "columns and rows"])
@pytest.mark.parametrize("kind", KQUANTS.values(), ids=[t.name for t in KQUANTS])
def test_rounding_to_steps(on_host, monkeypatch, kind, rows_too, n_tokens):
    w, inputs = samples(7, 512), factor(moment(512, n_tokens))
    steps = kind.steps(w, torch.ones_like(w))
    o = torch.eye(7) + 0.3 if rows_too else None
    found = feedback_on_steps(w, inputs, steps, o)
    assert on_host == ["aaac_feed_back_on_steps"] * (4 * 7 if rows_too else 4)
    monkeypatch.setattr(gpu_search, "launcher", lambda device, *names: None)
    check_alike(w, steps.weights(found), steps.weights(feedback_on_steps(w, inputs, steps, o)), inputs, o)


def test_constants_match(lib):
    constants = (ctypes.c_int * 5)()
    lib.constants(constants)
    assert list(constants) == [
        gpu_search.ROWS,
        gpu_search.THREADS,
        gpu_search.STARTS,
        module._BLOCK,
        gpu_search.GRID.itemsize,
    ]
    assert {len(starts) for starts in SCALE_STARTS.values()} == {gpu_search.STARTS}


def test_without_cupy_torch_does_it(monkeypatch):
    def missing(file, expression):
        raise AaacError("CuPy is not installed")

    monkeypatch.setattr(gpu_search, "kernel", missing)
    gpu_search._kernels.cache_clear()
    try:
        with pytest.warns(UserWarning, match="CuPy is not installed; error feedback takes many times as long"):
            assert gpu_search._kernels("aaac_sweep<16>") is None
    finally:
        gpu_search._kernels.cache_clear()
    assert gpu_search.gpu_search(grid_of(G16, samples(2, 64), compiled=False), 16) is None
