"""search.cu for error feedback on a GPU: one launch for a block of columns, where torch takes hundreds.

Kernels run through CuPy on torch's tensors and its current stream. Without CuPy torch does the same work. Both make the same choices but for ties
within rounding: sums are taken in another order here, products are fused with additions, and weights are counted in levels, not in table cells.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..errors import AaacError
from ..inference.kernels import kernel
from .native import scale_borders

if TYPE_CHECKING:
    from .grid import Grid

# cuda_kernels/search.cu
STARTS = 6
ROWS, THREADS = 4, 64  # of one block of threads
GRID = np.dtype(
    [(name, np.uint64) for name in ("level", "scales", "middles")]
    + [(name, np.int32) for name in ("n_scales", "depth")]
)


class Launcher:
    """Kernels by name, and what is current while they are launched. Tensors live on the GPU, with the shapes and dtypes that search.cu gives."""

    def __init__(self, kernels: dict[str, Any], device: AbstractContextManager, stream: AbstractContextManager):
        self.kernels, self.device, self.stream = kernels, device, stream

    def __call__(self, name: str, n_rows: int, *arguments: Tensor | np.ndarray | int) -> None:
        given = tuple(
            a.data_ptr() if isinstance(a, Tensor) else np.int32(a) if isinstance(a, int) else a for a in arguments
        )
        with self.device, self.stream:
            self.kernels[name]((-(-n_rows // ROWS),), (THREADS,), given)


def launcher(device: torch.device, *names: str) -> Launcher | None:
    """For kernels named as C++ names them; None on a CPU, and, with a warning, where they cannot be built."""
    if device.type != "cuda":
        return None
    with torch.cuda.device(device):
        kernels = _kernels(*names)
    if not kernels:
        return None
    import cupy

    return Launcher(
        kernels, cupy.cuda.Device(device.index), cupy.cuda.ExternalStream(torch.cuda.current_stream(device).cuda_stream)
    )


@functools.cache
def _kernels(*names: str) -> dict[str, Any] | None:
    try:
        return {name: kernel("search.cu", name) for name in names}
    except AaacError as e:
        reason = str(e)
    except Exception as e:  # CuPy's errors, for NVRTC that is missing or too old, have no common base
        reason = f"CuPy could not compile search.cu: {e}"
    warnings.warn(f"{reason}; error feedback takes many times as long on the GPU without it", stacklevel=2)
    return None


class GpuSearch:
    """As `compiled.CompiledGrid`, for feedback.py alone."""

    def __init__(self, grid: Grid, launch: Launcher):
        scales = grid.scales.contiguous()
        middles, depth = scale_borders(scales)
        self._alive = (grid.nearest_level.contiguous(), scales, middles)
        self.grid = np.array((*(t.data_ptr() for t in self._alive), len(scales), depth), dtype=GRID)
        self.launch = launch

    def call(self, name: str, n_columns: int, n_rows: int, group_size: int, *arguments: Tensor | int) -> None:
        """Launch a kernel of search.cu, with the arguments of the function of search.c."""
        self.launch(f"{name}<{group_size}>", n_rows, self.grid, n_columns, n_rows, *arguments)


def gpu_search(grid: Grid, group_size: int) -> GpuSearch | None:
    """The search for `grid`; None where `launcher` has none."""
    launch = launcher(grid.levels.device, *(f"{name}<{group_size}>" for name in ("aaac_feed_back", "aaac_sweep")))
    return GpuSearch(grid, launch) if launch else None


def gpu_rounding(device: torch.device) -> Callable[..., Tensor] | None:
    """What does the work of `feedback._round_columns`, whose arguments it takes; None where `launcher` has none."""
    name = "aaac_feed_back_on_steps"
    launch = launcher(device, name)
    if not launch:
        return None

    def round_columns(w: Tensor, u: Tensor, of_runs: Sequence[Tensor], n_levels: int, quants: Tensor) -> Tensor:
        errors = torch.empty_like(w)
        run = len(w) // len(of_runs[0])
        launch(name, w.shape[1], *w.shape, u, u.stride(0), run, n_levels, *of_runs, w, quants, errors)
        return errors

    return round_columns
