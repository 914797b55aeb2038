"""The search for scale codes, selectors and indices of least error, for given codebooks.

Without error feedback, the search minimises `sum_k a_k (w_k - S(code) C[selector][index])^2` for each group over all
three at once. For a fixed scale, the best indices are the nearest levels, and the best selectors follow from them. For
fixed indices and selectors, the best scale is a weighted least-squares quotient. The search starts from a few scales
near "the largest weight meets the largest level", and refits each once.

`TorchSearch` is the reference and runs on every device. The other backends, `NativeSearch` and `CudaSearch`, inherit
from it and replace the methods that they make faster. They make the same choices, except for ties within rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from ..files.format import MAX_LEVEL, N_LEVELS, SELECTOR_SIZE
from .columns import Candidate, Columns, FeedbackSearch, GroupMetric, GroupSearch
from .grid import CELLS, CELLS_PER_UNIT, Encoded, Grid, row_chunks, scale_starts


class WeightedGroups:
    """Groups of weights and their error weights, [G, g / 16, 16] each, with one selector for every 16."""

    def __init__(self, weight: Tensor, error_weight: Tensor, group_size: int):
        self.w = weight.reshape(-1, group_size // SELECTOR_SIZE, SELECTOR_SIZE)
        self.a = error_weight.expand(weight.shape).reshape(self.w.shape)

    def at_scale(self, scale: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
        """Assign levels at the scales [G] of the groups.

        Return errors [G], selectors bool [G, g / 16], and the least-squares scales [G] for this assignment.
        """
        x = self.w * (1 / scale)[:, None, None]
        ax = x * self.a
        cells = grid.cells(x).reshape(-1)
        errors, products, squares = [], [], []
        for table in (grid.nearest_level[:CELLS], grid.nearest_level[CELLS:]):
            v = table.index_select(0, cells).view(x.shape)
            products.append(torch.linalg.vecdot(ax, v))
            squares.append(torch.linalg.vecdot(self.a * v, v))
            delta = v.sub_(x)
            errors.append(torch.linalg.vecdot(self.a * delta, delta))
        selectors = errors[1] < errors[0]
        error = torch.minimum(*errors).sum(1) * scale.square()
        product = torch.where(selectors, products[1], products[0]).sum(1)
        square = torch.where(selectors, squares[1], squares[0]).sum(1)
        return error, selectors, scale * product / square.clamp_min(torch.finfo(square.dtype).tiny)


class TorchSearch(FeedbackSearch[Columns]):
    """The search over the values of one grid, in torch.

    Methods take weights float32 [N, K] and error weights float32 that are not negative and broadcastable to [N, K].
    Rows are searched all at once: the caller bounds their number (`row_chunks`).
    """

    def __init__(self, grid: Grid, group_size: int):
        self.grid, self.group_size = grid, group_size
        self.starts = scale_starts(group_size, grid.levels.device) if grid.starts is None else grid.starts

    def search(
        self, weight: Tensor, error_weight: Tensor, n_starts: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return scale codes int64 [G], selectors bool [G, g / 16] and errors float32 [G] of the groups in row order.

        n_starts: how many of the first scales are tried; None for all. A group keeps code 0 (all weights zero) if no
        scale is better.
        """
        groups = WeightedGroups(weight, error_weight, self.group_size)
        largest = groups.w.abs().amax((1, 2))
        best_errors = torch.linalg.vecdot(groups.w * groups.a, groups.w).sum(1)
        best_codes = torch.zeros_like(best_errors, dtype=torch.int64)
        best_selectors = torch.zeros(groups.w.shape[:2], dtype=torch.bool, device=weight.device)
        for start in self.starts[:n_starts]:
            codes = self.grid.scale_codes(largest * start)
            for refit in (True, False):
                errors, selectors, least_squares = groups.at_scale(self.grid.scales[codes], self.grid)
                better = errors < best_errors
                best_errors = torch.where(better, errors, best_errors)
                best_codes = torch.where(better, codes, best_codes)
                best_selectors = torch.where(better[:, None], selectors, best_selectors)
                if refit:
                    codes = self.grid.scale_codes(least_squares)
        return best_codes, best_selectors, best_errors

    def encode(self, weight: Tensor, error_weight: Tensor) -> Encoded:
        """Return the encoding that `search` finds."""
        codes, selectors, _ = self.search(weight, error_weight)
        return self._encoded(self._nearest_indices(weight, codes, selectors), selectors, codes)

    def encode_absmax(self, weight: Tensor, error_weight: Tensor) -> Encoded:
        """Return the encoding with the paper's scales, of which only selectors and indices are chosen.

        The largest magnitude of each group goes to the largest level.
        """
        groups = WeightedGroups(weight, error_weight, self.group_size)
        codes = self.grid.scale_codes(groups.w.abs().amax((1, 2)) / MAX_LEVEL)
        _, selectors, _ = groups.at_scale(self.grid.scales[codes], self.grid)
        return self._encoded(self._nearest_indices(weight, codes, selectors), selectors, codes)

    def decode(self, encoded: Encoded) -> Tensor:
        """Return weights float32 [N, K], bit for bit those of `format.decode`."""
        n_rows, n_per_row = encoded.indices.shape
        codebook = encoded.selectors.long().repeat_interleave(SELECTOR_SIZE, 1)
        levels = self.grid.levels.reshape(-1)[codebook * self.grid.levels.shape[1] + encoded.indices.long()]
        scales = self.grid.scales[encoded.scale_codes.long()]
        return (scales[..., None] * levels.view(n_rows, scales.shape[1], -1)).view(n_rows, n_per_row)

    def lloyd_sums(self, weight: Tensor, error_weight: Tensor, n_starts: int) -> Tensor:
        """Search, and return the sums that give the best levels for the assignment found: float64 [2, 32].

        The levels that minimise sum a (w - s level)^2 are sums[0] / sums[1], in the order of codebook and index. They
        are sum(a s^2 x) / sum(a s^2) with x = w / s: the error of a level counts with the square of its scale.
        Arguments are [G, group_size].
        """
        sums = torch.zeros(2, 2 * N_LEVELS, dtype=torch.float64, device=weight.device)
        for rows in row_chunks(weight):
            codes, selectors, _ = self.search(weight[rows], error_weight[rows], n_starts)
            scale = self.grid.scales[codes][:, None, None]
            groups = weight[rows].reshape(*selectors.shape, SELECTOR_SIZE)
            x = torch.where(scale > 0, groups / scale, torch.zeros_like(groups))
            cells = self.grid.cells(x) + selectors[..., None] * CELLS
            key = (self.grid.nearest_index[cells].long() + selectors[..., None] * N_LEVELS).reshape(-1)
            a = error_weight[rows].reshape(groups.shape) * scale.square()
            sums[0] += torch.bincount(key, (a * x).reshape(-1).double(), 2 * N_LEVELS)
            sums[1] += torch.bincount(key, a.reshape(-1).double(), 2 * N_LEVELS)
        return sums

    def undecided(self, weight: Tensor, rows: Tensor, groups: Tensor) -> Columns:
        """Return memory for the decisions on `weight` float32 [K, N]: on `rows` of the tensor, groups in that order."""
        return Columns.undecided(weight, self.group_size)

    def _best(self, columns: Columns, group: slice, target: Tensor, metric: GroupMetric) -> Candidate:
        codes = self.grid.scale_codes(target.abs().amax(0) * self.starts[:, None])
        return self._groups.best(target, metric, codes)

    def _neighbour(self, columns: Columns, group: slice, target: Tensor, metric: GroupMetric) -> Candidate:
        codes = columns.codes[group.start // self.group_size]
        nearby = codes + torch.arange(-2, 3, device=codes.device)[:, None]
        return self._groups.try_codes(target, metric, nearby.clamp(1, len(self.grid.scales) - 1))

    @staticmethod
    def round_to_steps(w: Tensor, u: Tensor, steps: Sequence[Tensor], table: Tensor, levels: Tensor) -> Tensor:
        """Round a run of columns `w` [n, N] from left to right, with feedback inside the run.

        u: the factor of the run, upper triangular [n, n]. steps: step, offset and 1 / step, [N] each. table: float32
        [CELLS], the nearest level for each cell. levels: int8 [n, N], which is written. `w` may be overwritten. Return
        the errors as `feed_back` does.
        """
        step, offset, inverse = steps
        errors = torch.empty_like(w)
        for j, error in enumerate(errors):
            cells = ((w[j] + offset) * inverse * CELLS_PER_UNIT + CELLS / 2).clamp_(0, CELLS - 1)
            level = table[cells.long()]
            levels[j] = level
            torch.sub(w[j], level * step - offset, out=error).div_(u[j, j])
            w[j + 1 :].addr_(u[j, j + 1 :], error, alpha=-1)
        return errors

    @cached_property
    def _groups(self) -> GroupSearch:
        return GroupSearch(self.grid, self.group_size)

    def _write(self, columns: Columns, group: slice, chosen: Candidate) -> None:
        q, levels, selectors, codes = columns.block(group, self.group_size)
        q.copy_(self.grid.scales[chosen.codes] * chosen.levels)
        levels.copy_(chosen.levels)
        selectors.copy_(chosen.selectors)
        codes[0] = chosen.codes

    def _nearest_indices(self, weight: Tensor, codes: Tensor, selectors: Tensor) -> Tensor:
        """Return the indices uint8 [N, K] of the nearest levels for scale codes [G] and selectors bool [G, g / 16]."""
        scale = self.grid.scales[codes]
        inverse = torch.where(scale > 0, 1 / scale, torch.zeros_like(scale))
        x = weight.reshape(*selectors.shape, SELECTOR_SIZE) * inverse[:, None, None]
        return self.grid.nearest_index[self.grid.cells(x) + selectors[..., None] * CELLS].view(weight.shape)

    @staticmethod
    def _encoded(indices: Tensor, selectors: Tensor, codes: Tensor) -> Encoded:
        n_rows = len(indices)
        return Encoded(indices, selectors.view(n_rows, -1).to(torch.uint8), codes.view(n_rows, -1).to(torch.int32))
