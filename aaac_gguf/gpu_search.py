"""search.cu for error feedback on a GPU: one launch for a block of columns, where torch takes hundreds.

Kernels run through CuPy on torch's tensors and its current stream. Without CuPy torch does the same work. Both make the same choices but for ties
within rounding: sums are taken in another order here, products are fused with additions, and weights are counted in levels, not in table cells.
"""

from __future__ import annotations

import functools
import warnings
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .compiled import scale_borders
from .errors import AaacError
from .kernels import kernel

if TYPE_CHECKING:
    from .encode import Grid

# cuda_kernels/search.cu
STARTS = 6
ROWS, THREADS = 4, 64  # of one block of threads
GRID = np.dtype([(name, np.uint64) for name in ("level", "scales", "middles")] + [(name, np.int32) for name in ("n_scales", "depth")])


def gpu_search(grid: Grid, group_size: int) -> GpuSearch | None:
    """The search for `grid`; None on a CPU, and, with a warning, where the kernels cannot be built."""
    device = grid.levels.device
    if device.type != "cuda":
        return None
    with torch.cuda.device(device):
        kernels = _kernels(group_size)
    if not kernels:
        return None
    import cupy

    return GpuSearch(grid, kernels, cupy.cuda.Device(device.index), cupy.cuda.ExternalStream(torch.cuda.current_stream(device).cuda_stream))


@functools.cache
def _kernels(group_size: int) -> dict[str, Any] | None:
    try:
        return {name: kernel("search.cu", f"{name}<{group_size}>") for name in ("aaac_feed_back", "aaac_sweep")}
    except AaacError as e:
        reason = str(e)
    except Exception as e:  # CuPy's errors, for NVRTC that is missing or too old, have no common base
        reason = f"CuPy could not compile search.cu: {e}"
    warnings.warn(f"{reason}; error feedback takes many times as long on the GPU without it", stacklevel=2)
    return None


class GpuSearch:
    """As `compiled.CompiledGrid`, for feedback.py alone."""

    def __init__(self, grid: Grid, kernels: dict[str, Any], device: AbstractContextManager, stream: AbstractContextManager):
        scales = grid.scales.contiguous()
        middles, depth = scale_borders(scales)
        self._alive = (grid.nearest_level.contiguous(), scales, middles)
        self.grid = np.array((*(t.data_ptr() for t in self._alive), len(scales), depth), dtype=GRID)
        self.kernels, self.device, self.stream = kernels, device, stream

    def call(self, name: str, n_columns: int, n_rows: int, group_size: int, *arguments: Tensor | int) -> None:
        """Launch a kernel of search.cu. Tensors live on the grid's GPU, with the shapes and dtypes that search.cu gives."""
        given = (a.data_ptr() if isinstance(a, Tensor) else np.int32(a) for a in (n_columns, n_rows, *arguments))
        with self.device, self.stream:
            self.kernels[name]((-(-n_rows // ROWS),), (THREADS,), (self.grid, *given))
