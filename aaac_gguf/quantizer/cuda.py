"""Error feedback on a GPU by search.cu: one launch for a block of columns, where torch takes hundreds.

The kernels run through CuPy, on torch's tensors and its current stream. Ties within rounding may be decided otherwise
than in torch, because sums are taken in another order here, products are fused with additions, and weights are counted
in levels and not in table cells.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import AaacError
from ..inference.kernels import kernel
from .columns import Columns, LayerMetrics
from .search import TorchSearch

# cuda_kernels/search.cu
STARTS = 6
ROWS, THREADS = 4, 64  # of one block of threads; for ON_STEPS each thread has a row
GRID = np.dtype(
    [(name, np.uint64) for name in ("level", "scales", "borders")]
    + [(name, np.int32) for name in ("n_scales", "depth")]
)
ON_STEPS = "aaac_round_to_steps"


class Launcher:
    """Kernels by name, and a function that makes a context in which they are launched.

    Tensors are on the GPU, with the shapes and dtypes that search.cu states.
    """

    def __init__(self, kernels: Mapping[str, Any], context: Callable[[], AbstractContextManager]):
        self.kernels, self.context = kernels, context

    def __call__(self, name: str, n_blocks: int, *arguments: Tensor | np.ndarray | int) -> None:
        given = tuple(
            a.data_ptr() if isinstance(a, Tensor) else np.int32(a) if isinstance(a, int) else a for a in arguments
        )
        with self.context():
            self.kernels[name]((n_blocks,), (THREADS,), given)


def launcher(device: torch.device, *names: str) -> Launcher:
    """Build kernels, named as C++ names them, for a GPU. Raises AaacError if they cannot be built."""
    try:
        with torch.cuda.device(device):
            kernels = {name: kernel("search.cu", name) for name in names}
    except AaacError:
        raise
    except Exception as e:  # CuPy's errors, for NVRTC that is missing or too old, have no common base
        raise AaacError(f"CuPy could not compile search.cu: {e}") from None
    return Launcher(kernels, functools.partial(_on_current_stream, device))


@contextmanager
def _on_current_stream(device: torch.device) -> Iterator[None]:
    import cupy

    stream = cupy.cuda.ExternalStream(torch.cuda.current_stream(device).cuda_stream)
    with cupy.cuda.Device(device.index), stream:
        yield


@functools.cache
def available(device: torch.device) -> bool:
    """Return whether the kernels can be built for a GPU, and warn once if they cannot."""
    try:
        launcher(device, ON_STEPS)
    except AaacError as e:
        warnings.warn(f"{e}; error feedback takes many times as long on the GPU without it", stacklevel=2)
        return False
    return True


class CudaSearch(TorchSearch):
    """The search over the values of one grid on a GPU: error feedback by search.cu, and the rest in torch."""

    def feed_back(self, columns: Columns, metrics: LayerMetrics, block: slice, w: Tensor) -> None:
        u, decided = metrics.u(block), columns.block(block, self.group_size)
        start = (u, len(u), self.starts, len(self.starts))
        self._launch("aaac_feed_back", *w.shape, *start, w, *decided)

    def sweep(self, columns: Columns, metrics: LayerMetrics, block: slice, gradient: Tensor) -> None:
        h, decided = metrics.hessian, columns.block(block, self.group_size)
        roots = metrics.fixed_roots[block.start // self.group_size :]
        self._launch("aaac_sweep", *gradient.shape, h[block, block], len(h), roots, gradient, *decided)

    @staticmethod
    def round_to_steps(w: Tensor, u: Tensor, steps: Sequence[Tensor], table: Tensor, levels: Tensor) -> Tensor:
        errors = torch.empty_like(w)
        launch = launcher(w.device, ON_STEPS)
        launch(ON_STEPS, -(-w.shape[1] // THREADS), *w.shape, u, u.stride(0), table, *steps, w, levels, errors)
        return errors

    def _launch(self, name: str, n_columns: int, n_rows: int, *arguments: Tensor | int) -> None:
        """Launch a kernel of search.cu, with the arguments of the function of search.c."""
        grid, _ = self._cuda_grid
        self._launcher(f"{name}<{self.group_size}>", -(-n_rows // ROWS), grid, n_columns, n_rows, *arguments)

    @functools.cached_property
    def _launcher(self) -> Launcher:
        names = (f"{name}<{self.group_size}>" for name in ("aaac_feed_back", "aaac_sweep"))
        return launcher(self.grid.levels.device, *names)

    @functools.cached_property
    def _cuda_grid(self) -> tuple[np.ndarray, tuple[Tensor, ...]]:
        """The structure `aaac_grid` of search.cu, and the tensors that it points to."""
        scales = self.grid.scales.contiguous()
        borders, depth = self.grid.scale_borders()
        alive = (self.grid.nearest_level.contiguous(), scales, borders)
        return np.array((*(t.data_ptr() for t in alive), len(scales), depth), dtype=GRID), alive
