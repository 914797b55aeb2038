"""The search on a CPU by search.c, several times as fast as in torch.

The library is compiled on first use, with the C compiler that building llama.cpp needs too, and is kept in the cache
folder.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..compiler import c_library
from ..files.format import N_LEVELS, SELECTOR_SIZE
from .columns import Columns, LayerMetrics
from .grid import Encoded, Grid
from .search import TorchSearch

_SOURCE = Path(__file__).with_name("search.c")


def compiled() -> ctypes.CDLL | None:
    """Return the compiled search.c, or None, with a warning, if it cannot be built."""
    return c_library(_SOURCE)


class _NativeGrid(ctypes.Structure):
    """`grid` of search.c."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("level", "index", "scales", "borders")] + [
        (name, ctypes.c_int32) for name in ("n_scales", "depth")
    ]

    def __init__(self, grid: Grid):
        scales = grid.scales.contiguous()
        borders, depth = grid.scale_borders()
        self._alive = (grid.nearest_level.contiguous(), grid.nearest_index.contiguous(), scales, borders)
        super().__init__(*(t.data_ptr() for t in self._alive), len(scales), depth)


class NativeSearch(TorchSearch):
    """The search over the values of one grid on a CPU, by search.c."""

    def __init__(self, grid: Grid, group_size: int):
        super().__init__(grid, group_size)
        self._native_grid = _NativeGrid(grid)

    def search(
        self, weight: Tensor, error_weight: Tensor, n_starts: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self._search(weight, error_weight, n_starts)[:3]

    def encode(self, weight: Tensor, error_weight: Tensor) -> Encoded:
        codes, selectors, _, indices = self._search(weight, error_weight)
        return self._encoded(indices.view(weight.shape), selectors, codes)

    def decode(self, encoded: Encoded) -> Tensor:
        n_rows, n_per_row = encoded.indices.shape
        out = torch.empty(n_rows, n_per_row)
        n_groups = encoded.scale_codes.numel()
        kinds = (encoded.indices, torch.uint8), (encoded.selectors, torch.uint8), (encoded.scale_codes, torch.int32)
        parts = (t.to(dtype).contiguous() for t, dtype in kinds)
        levels = self.grid.levels.contiguous()
        self._call("aaac_decode", n_groups, out.numel() // n_groups, levels, levels.shape[1], *parts, out)
        return out

    def lloyd_sums(self, weight: Tensor, error_weight: Tensor, n_starts: int) -> Tensor:
        sums = torch.zeros(2, 2 * N_LEVELS, dtype=torch.float64)
        w, a = self._groups_of(weight, error_weight)
        starts = self.starts[:n_starts]
        self._call("aaac_lloyd_sums", len(w), self.group_size, w, a, starts, len(starts), sums)
        return sums

    def feed_back(self, columns: Columns, metrics: LayerMetrics, block: slice, w: Tensor) -> None:
        u, decided = metrics.u(block), columns.block(block, self.group_size)
        start = (u, len(u), self.starts, len(self.starts))
        self._call("aaac_feed_back", *w.shape, self.group_size, *start, w, *decided)

    def sweep(self, columns: Columns, metrics: LayerMetrics, block: slice, gradient: Tensor) -> None:
        h, decided = metrics.hessian, columns.block(block, self.group_size)
        roots = metrics.fixed_roots[block.start // self.group_size :]
        self._call("aaac_sweep", *gradient.shape, self.group_size, h[block, block], len(h), roots, gradient, *decided)

    @staticmethod
    def round_to_steps(w: Tensor, u: Tensor, steps: Sequence[Tensor], table: Tensor, levels: Tensor) -> Tensor:
        errors = torch.empty_like(w)
        _call("aaac_round_to_steps", *w.shape, u, u.stride(0), table, *steps, w, levels, errors)
        return errors

    def _search(
        self, weight: Tensor, error_weight: Tensor, n_starts: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return what `search` returns, and the indices of the nearest levels, uint8 [G, g]."""
        w, a = self._groups_of(weight, error_weight)
        codes = torch.empty(len(w), dtype=torch.int64)
        selectors = torch.empty(len(w), self.group_size // SELECTOR_SIZE, dtype=torch.bool)
        errors = torch.empty(len(w))
        indices = torch.empty(w.shape, dtype=torch.uint8)
        starts = self.starts[:n_starts]
        found = (codes, selectors, errors, indices)
        self._call("aaac_search", len(w), self.group_size, w, a, starts, len(starts), *found)
        return found

    def _groups_of(self, weight: Tensor, error_weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return weights and error weights, contiguous [G, group_size] each."""
        w, a = weight, error_weight.expand(weight.shape)
        return w.reshape(-1, self.group_size).contiguous(), a.reshape(-1, self.group_size).contiguous()

    def _call(self, name: str, *arguments: Tensor | int) -> None:
        _call(name, ctypes.byref(self._native_grid), *arguments)


def _call(name: str, *arguments: Any) -> None:
    """Call a function of search.c. Tensors are on the CPU, with the shapes and dtypes that search.c states."""
    function = getattr(compiled(), name)
    function.restype = None
    if set_threads := getattr(compiled(), "omp_set_num_threads", None):
        set_threads(torch.get_num_threads())
    given = (
        ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else ctypes.c_int64(a) if isinstance(a, int) else a
        for a in arguments
    )
    function(*given)
