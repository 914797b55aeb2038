"""The choice of what does the search: torch, search.c or search.cu."""

from __future__ import annotations

import torch

from ..errors import AaacError
from . import cuda, native
from .cuda import CudaSearch
from .native import NativeSearch
from .search import TorchSearch

Backend = type[TorchSearch]

BACKENDS: dict[str, Backend] = {"torch": TorchSearch, "native": NativeSearch, "cuda": CudaSearch}


def choose_backend(device: torch.device, name: str | None = None, *, feedback: bool = True) -> Backend:
    """Return the fastest backend that works for tensors on `device`, or the one called `name`.

    feedback: whether there will be error feedback. The CUDA kernels do nothing else, so without it they are not built.
    Raises AaacError for a name that does not exist, and for "native" without a C compiler.
    """
    if name is None:
        if device.type == "cpu" and native.compiled():
            return NativeSearch
        if device.type == "cuda" and feedback and cuda.available(device):
            return CudaSearch
        return TorchSearch
    if name not in BACKENDS:
        raise AaacError(f"`backend` {name}: unknown; choose from {', '.join(BACKENDS)}")
    if name == "native" and not native.compiled():
        raise AaacError("`backend` native: search.c could not be compiled; install a C compiler, or choose 'torch'")
    return BACKENDS[name]
