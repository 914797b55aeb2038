"""The choice of a search backend, and what happens if there is no compiler or no CuPy."""

from contextlib import nullcontext

import pytest
import torch
from search_samples import G32, NEEDS_C, samples

from aaac_gguf import compiler
from aaac_gguf.errors import AaacError
from aaac_gguf.quantizer import cuda
from aaac_gguf.quantizer.backends import BACKENDS, choose_backend
from aaac_gguf.quantizer.cuda import CudaSearch
from aaac_gguf.quantizer.native import NativeSearch
from aaac_gguf.quantizer.quantize import quantize
from aaac_gguf.quantizer.search import TorchSearch

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def no_compiler(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    compiler.c_library.cache_clear()
    yield
    compiler.c_library.cache_clear()


@pytest.fixture
def gpu(monkeypatch):
    """Pretend that torch has a GPU. Return a function that sets what comes of building kernels."""

    def builds(kernel):
        monkeypatch.setattr(cuda, "kernel", kernel)
        cuda.available.cache_clear()

    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    yield builds
    cuda.available.cache_clear()


@NEEDS_C
def test_on_a_cpu_search_c_is_chosen():
    assert choose_backend(CPU) is NativeSearch


def test_without_a_compiler_torch_is_chosen(no_compiler):
    with pytest.warns(UserWarning, match="no C compiler"):
        assert choose_backend(CPU) is TorchSearch
    w = samples(5, 64)
    assert quantize(w, G32).data.tobytes() == quantize(w, G32, backend="torch").data.tobytes()
    with pytest.raises(AaacError, match=r"`backend` native: search\.c could not be compiled"):
        quantize(w, G32, backend="native")


def test_on_a_gpu_search_cu_is_chosen_for_feedback(gpu):
    built = []
    gpu(lambda file, name: built.append(name))
    assert choose_backend(GPU, feedback=False) is TorchSearch
    assert not built
    assert choose_backend(GPU) is CudaSearch
    assert built


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (AaacError("CuPy is not installed"), "CuPy is not installed"),
        (RuntimeError("NVRTC is too old"), "CuPy could not compile search.cu: NVRTC is too old"),
    ],
)
def test_without_cupy_torch_is_chosen_after_one_warning(gpu, recwarn, error, reason):
    def missing(file, name):
        raise error

    gpu(missing)
    assert [choose_backend(GPU) for _ in range(3)] == [TorchSearch] * 3
    assert [str(warning.message) for warning in recwarn] == [
        f"{reason}; error feedback takes many times as long on the GPU without it"
    ]
    with pytest.raises(AaacError, match=reason):
        cuda.launcher(GPU, "aaac_sweep<16>")


@NEEDS_C
def test_a_name_decides(gpu):
    for name, backend in BACKENDS.items():
        assert choose_backend(CPU, name) is backend
    with pytest.raises(AaacError, match="`backend` fortran: unknown; choose from torch, native, cuda"):
        choose_backend(CPU, "fortran")
