"""search.cu for error feedback on a GPU: one launch for a block of columns, where torch takes hundreds.

Kernels run through CuPy on torch's tensors and its current stream. Without CuPy torch does the same work. Both make the same choices but for ties
within rounding: sums are taken in another order here, products are fused with additions, and weights are counted in levels, not in table cells.
"""

from __future__ import annotations

import functools
import warnings
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
GROUP_SIZES = (16, 32, 128)
STARTS = 6
ROWS, THREADS = 4, 64  # of one block of threads
GRID = np.dtype([(name, np.uint64) for name in ("level", "scales", "middles")] + [(name, np.int32) for name in ("n_scales", "depth")])


def gpu_search(grid: Grid, group_size: int) -> GpuSearch | None:
    """The search for `grid`; None on a CPU, and, with a warning, where the kernels cannot be built."""
    if grid.levels.device.type != "cuda":
        return None
    with torch.cuda.device(grid.levels.device):
        kernels = _kernels(group_size)
    return GpuSearch(grid, kernels) if kernels else None


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

    def __init__(self, grid: Grid, kernels: dict[str, Any]):
        import cupy

        device = grid.levels.device
        self.kernels = kernels
        self.device, self.stream = cupy.cuda.Device(device.index), cupy.cuda.ExternalStream(torch.cuda.current_stream(device).cuda_stream)
        self.tensors, self.grid = grid_tables(grid)

    def call(self, name: str, n_columns: int, n_rows: int, group_size: int, *arguments: Tensor | int) -> None:
        """Launch a kernel of search.cu. Tensors live on the grid's GPU, with the shapes and dtypes that search.cu gives."""
        sizes = (n_columns, n_rows, *arguments)
        given = (a.data_ptr() if isinstance(a, Tensor) else np.int32(a) for a in sizes)
        with self.device, self.stream:
            self.kernels[name]((-(-n_rows // ROWS),), (THREADS,), (self.grid, *given))


def grid_tables(grid: Grid) -> tuple[list[Tensor], np.ndarray]:
    """`aaac_grid` of search.cu, and the tensors that it points to."""
    scales = grid.scales.contiguous()
    middles, depth = scale_borders(scales)
    tensors = [grid.nearest_level.contiguous(), scales, middles]
    return tensors, np.array((*(t.data_ptr() for t in tensors), len(scales), depth), dtype=GRID)
