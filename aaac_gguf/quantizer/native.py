"""search.c compiled for this machine: the searches of encode.py, codebook.py and feedback.py on a CPU, several times as fast as in torch.

The library is built on first use with the C compiler that building llama.cpp needs anyway, and kept in the cache folder. Without a compiler torch
does the same work. Both make the same choices but for ties within rounding.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..compiler import c_library

if TYPE_CHECKING:
    from .grid import Grid

_SOURCE = Path(__file__).with_name("search.c")


def native() -> ctypes.CDLL | None:
    """Return the compiled library, or None, with a warning, if it cannot be built."""
    return c_library(_SOURCE)


def scale_borders(scales: Tensor) -> tuple[Tensor, int]:
    """The borders between neighbouring nonzero scales of float32 [n], padded with infinity to 2^depth - 1; and depth, the steps of a bisection."""
    borders = (scales[2:] + scales[1:-1]) / 2
    depth = len(borders).bit_length()
    padding = borders.new_full(((1 << depth) - 1 - len(borders),), torch.inf)
    return torch.cat([borders, padding]), depth


class CompiledGrid(ctypes.Structure):
    """`grid` of search.c."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("level", "index", "scales", "middles")] + [
        (name, ctypes.c_int32) for name in ("n_scales", "depth")
    ]

    def __init__(self, grid: Grid):
        scales = grid.scales.contiguous()
        middles, depth = scale_borders(scales)
        self._alive = (grid.nearest_level.contiguous(), grid.nearest_index.contiguous(), scales, middles)
        super().__init__(*(t.data_ptr() for t in self._alive), len(scales), depth)

    def call(self, name: str, *arguments: Tensor | int) -> None:
        """Call a function of search.c with this grid. Tensors live on the CPU, with the shapes and dtypes that search.c gives."""
        function = getattr(native(), name)
        function.restype = None
        if set_threads := getattr(native(), "omp_set_num_threads", None):
            set_threads(torch.get_num_threads())
        given = (ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else ctypes.c_int64(a) for a in arguments)
        function(ctypes.byref(self), *given)
