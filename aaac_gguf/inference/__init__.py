"""Run AAAC files outside llama.cpp: CuPy kernels, and a linear layer for torch and transformers."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import kernels as kernels
    from . import torch as torch


def __getattr__(name: str) -> Any:
    if name in ("kernels", "torch"):  # imported at first use: `torch` loads transformers
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
