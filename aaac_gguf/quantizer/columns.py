"""Groups of columns under error feedback: what each group is aimed at, what is tried for it, and what was decided.

Arrays here are transposed, [K, N] for a weight [N, K]: the search reads and writes columns, so columns are contiguous.
A group is `group_size` columns that share a scale. A run is 16 columns that share a selector. A block of columns is up
to BLOCK_COLUMNS wide.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, TypeVar

import torch
from torch import Tensor

from ..files.format import SELECTOR_SIZE
from .grid import CELLS, CELLS_PER_UNIT, Encoded, Grid
from .moments import Factor, inverse_root, triangular_inverse

BLOCK_COLUMNS = 128  # the errors of a block move the columns after it in one matrix product


def column_blocks(n_per_row: int) -> list[slice]:
    """Return the blocks of columns of a matrix, from left to right."""
    return [slice(start, min(start + BLOCK_COLUMNS, n_per_row)) for start in range(0, n_per_row, BLOCK_COLUMNS)]


def groups_of_block(block: slice, group_size: int) -> list[tuple[slice, slice]]:
    """Return the groups of a block, each as columns of the matrix and as columns of the block."""
    return [
        (slice(k, k + group_size), slice(k - block.start, k - block.start + group_size))
        for k in range(block.start, block.stop, group_size)
    ]


class GroupMetric:
    """The error of one group, from its factor `u`, upper triangular [g, g]. Computed once for all rows.

    root    U^-T. The error of the group is the square of root (target - q).
    step    -U_jk / U_jj: the error of column j times this moves column k
    steps   for each run, the rows of `step` inside it, one vector for each column
    weight  1 / U_jj^2, shaped [g, 1, 1]
    """

    def __init__(self, u: Tensor):
        self.u = u
        self.root = torch.linalg.inv(u).T.contiguous()
        self.step = -u / u.diagonal()[:, None]
        starts = range(0, len(u), SELECTOR_SIZE)
        self.steps = [
            [self.step[j, j + 1 : start + SELECTOR_SIZE] for j in range(start, start + SELECTOR_SIZE)]
            for start in starts
        ]
        self.weight = u.diagonal().square().reciprocal()[:, None, None]


class LayerMetrics:
    """The error of every group of a layer, in two ways.

    free   the columns after the group can still move, as in feedback
    fixed  all other columns are decided, as in sweeps

    inputs       the damped H of the whole layer
    block_u      for each block of columns, U upper triangular [n, n] with U^-1 = R_BB: the factor of what is left of
                 the block's error when the columns after it are free to move
    fixed_roots  float32 [n_groups, g, g]: U upper triangular with (H_GG)^-1 = U^T U for each group G
    """

    def __init__(self, inputs: Factor, group_size: int):
        self.inputs, self.hessian, self.group_size = inputs, inputs.hessian, group_size
        blocks = column_blocks(len(inputs.hessian))
        self.block_u = [triangular_inverse(inputs.root[b, b].double()).float().contiguous() for b in blocks]
        n_groups = len(inputs.hessian) // group_size
        shape = n_groups, group_size, n_groups, group_size
        fixed = inputs.hessian.view(shape).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        self.fixed_roots = inverse_root(fixed.double()).float().contiguous()

    @cached_property
    def free(self) -> list[GroupMetric]:
        groups = (range(0, len(u), self.group_size) for u in self.block_u)
        size = self.group_size
        return [
            GroupMetric(u[i : i + size, i : i + size])
            for u, starts in zip(self.block_u, groups, strict=True)
            for i in starts
        ]

    def u(self, block: slice) -> Tensor:
        """Return the factor of a block of `column_blocks`."""
        return self.block_u[block.start // BLOCK_COLUMNS]

    @cached_property
    def fixed(self) -> list[GroupMetric]:
        return [GroupMetric(u) for u in self.fixed_roots]


@dataclass
class Candidate:
    """A way to encode one group in every row.

    codes      int64 [N]
    selectors  bool [g / 16, N]
    levels     float32 [g, N]
    errors     float32 [N], the error that remains
    """

    codes: Tensor
    selectors: Tensor
    levels: Tensor
    errors: Tensor

    def take(self, better: Tensor, other: Candidate) -> None:
        """Replace the rows in which `better`, bool [N], holds by those of `other`."""
        for name in ("codes", "selectors", "levels", "errors"):
            setattr(self, name, torch.where(better, getattr(other, name), getattr(self, name)))


class GroupSearch:
    """Tries scale codes for one group of columns at a time."""

    def __init__(self, grid: Grid, group_size: int):
        self.grid, self.group_size = grid, group_size
        # Inside a group weights are counted in table cells, so that the table is read without more arithmetic.
        self.table = grid.nearest_level.view(2, CELLS) * CELLS_PER_UNIT + CELLS / 2

    def try_codes(self, target: Tensor, metric: GroupMetric, codes: Tensor) -> Candidate:
        """Return the best of the scale codes int64 [C, N] for `target` [g, N], with feedback inside the group."""
        n_candidates, n_rows = codes.shape
        scale = self.grid.scales[codes]
        x = (target[:, None] * (CELLS_PER_UNIT / scale)).view(self.group_size, -1) + CELLS / 2
        error = torch.zeros_like(x[0])
        levels = torch.empty_like(x)
        selectors = torch.empty(self.group_size // SELECTOR_SIZE, x.shape[1], dtype=torch.bool, device=x.device)
        for start in range(0, self.group_size, SELECTOR_SIZE):
            run = slice(start, start + SELECTOR_SIZE)
            rest = slice(run.stop, self.group_size)
            values, errors = self._round_run(x[run], metric.steps[start // SELECTOR_SIZE])
            sums = (errors.square() * metric.weight[run]).sum(0)
            selector = sums[1] < sums[0]
            selectors[start // SELECTOR_SIZE] = selector
            error += torch.where(selector, sums[1], sums[0])
            levels[run] = torch.where(selector, values[:, 1], values[:, 0])
            if rest.start < rest.stop:
                x[rest].addmm_(metric.step[run, rest].T, torch.where(selector, errors[:, 1], errors[:, 0]))
        error = error.view(n_candidates, n_rows) * (scale / CELLS_PER_UNIT).square()
        least, best = error.min(0)
        column = best * n_rows + torch.arange(n_rows, device=x.device)
        level = (levels[:, column] - CELLS / 2) / CELLS_PER_UNIT
        return Candidate(codes.view(-1)[column], selectors[:, column], level, least)

    def _round_run(self, x: Tensor, steps: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Round the columns x [16, M], in cells, to each codebook, with feedback.

        Return levels and errors, float32 [16, 2, M], in cells.
        """
        x = x[:, None].repeat(1, 2, 1)
        rest = x.view(SELECTOR_SIZE, -1)
        values, errors = torch.empty_like(x), torch.empty_like(x)
        clamped, cells = torch.empty_like(x[0]), torch.empty_like(x[0], dtype=torch.int64)
        # Most of the time is spent in this loop, so it has few operations and none of them allocates.
        for step, column, value, error in zip(steps, x.unbind(), values.unbind(), errors.unbind(), strict=True):
            cells.copy_(torch.clamp(column, 0, CELLS - 1, out=clamped))
            torch.gather(self.table, 1, cells, out=value)
            torch.sub(column, value, out=error)
            if len(step):
                rest[-len(step) :].addr_(step, error.view(-1))
        return values, errors

    def best(self, target: Tensor, metric: GroupMetric, codes: Tensor) -> Candidate:
        """Return the best encoding of `target` [g, N] that is found from the scale codes int64 [C, N].

        After `codes`, these are tried: the code of the least-squares scale for the levels that were found, the
        neighbours of the best code, and zero.
        """
        zero = torch.zeros_like(codes[0])
        found = self.try_codes(target, metric, codes)
        white, level = metric.root @ target, metric.root @ found.levels
        least_squares = (white * level).sum(0) / level.square().sum(0).clamp_min(torch.finfo(level.dtype).tiny)
        refined = self.grid.scale_codes(least_squares)
        last = len(self.grid.scales) - 1
        nearby = torch.stack([refined, (found.codes + 1).clamp_max(last), (found.codes - 1).clamp_min(1)])
        other = self.try_codes(target, metric, nearby)
        found.take(other.errors < found.errors, other)
        nothing = white.square().sum(0)
        found.take(nothing <= found.errors, Candidate(zero, found.selectors, found.levels, nothing))
        return found


@dataclass
class Columns:
    """The decisions for some rows, column by column.

    q          float32 [K, N], the decoded weights
    levels     float32 [K, N]
    selectors  bool [K / 16, N]
    codes      int64 [K / group_size, N]
    """

    q: Tensor
    levels: Tensor
    selectors: Tensor
    codes: Tensor

    @staticmethod
    def undecided(weight: Tensor, group_size: int) -> Columns:
        """Return memory for the decisions on `weight` float32 [K, N]."""
        n_per_row, n_rows = weight.shape
        return Columns(
            torch.empty_like(weight),
            torch.empty_like(weight),
            torch.empty(n_per_row // SELECTOR_SIZE, n_rows, dtype=torch.bool, device=weight.device),
            torch.empty(n_per_row // group_size, n_rows, dtype=torch.int64, device=weight.device),
        )

    def block(self, block: slice, group_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return views of q, levels, selectors and codes for a block or a group of columns."""
        runs, groups = (slice(block.start // n, block.stop // n) for n in (SELECTOR_SIZE, group_size))
        return self.q[block], self.levels[block], self.selectors[runs], self.codes[groups]

    def in_order(self, groups: Tensor) -> Columns:
        """Return the decisions with the groups of columns in another order, int64 [K / group_size]."""
        parts = (self.q, self.levels, self.selectors, self.codes)
        return Columns(*(t.view(len(groups), -1, t.shape[1])[groups].view(t.shape) for t in parts))

    def encoded(self, grid: Grid) -> Encoded:
        """Return the decisions row by row."""
        runs = self.levels.view(-1, SELECTOR_SIZE, self.levels.shape[1])
        # A level is a whole number of cells from every boundary between levels, so the table gives its index.
        indices = grid.nearest_index[grid.cells(runs) + self.selectors[:, None] * CELLS].view_as(self.levels)
        parts = ((indices, torch.uint8), (self.selectors, torch.uint8), (self.codes, torch.int32))
        return Encoded(*(part.T.contiguous().to(dtype) for part, dtype in parts))


AnyColumns = TypeVar("AnyColumns", bound=Columns)


class FeedbackSearch(ABC, Generic[AnyColumns]):
    """The search for the values of one tensor with error feedback, one group after the other, for all rows at once."""

    grid: Grid
    group_size: int

    @abstractmethod
    def undecided(self, weight: Tensor, rows: Tensor, groups: Tensor) -> AnyColumns:
        """Return memory for the decisions on `weight` float32 [K, N]: on `rows` of the tensor, groups in that order."""

    @abstractmethod
    def _best(self, columns: AnyColumns, group: slice, target: Tensor, metric: GroupMetric) -> Candidate:
        """Return the best encoding that is found for a group of columns of `target` [g, N]."""

    @abstractmethod
    def _neighbour(self, columns: AnyColumns, group: slice, target: Tensor, metric: GroupMetric) -> Candidate:
        """Return the best encoding of `target` [g, N] with a scale next to the one that was decided on."""

    @abstractmethod
    def _write(self, columns: AnyColumns, group: slice, chosen: Candidate) -> None:
        """Decide on an encoding of a group."""

    def feed_back(self, columns: AnyColumns, metrics: LayerMetrics, block: slice, w: Tensor) -> None:
        """Decide the groups of a block of columns for the weights `w` [n, N], as earlier errors have moved them.

        `w` may be overwritten.
        """
        u = metrics.u(block)
        for group, inside in groups_of_block(block, self.group_size):
            metric = metrics.free[group.start // self.group_size]
            self._write(columns, group, self._best(columns, group, w[inside], metric))
            error = metric.root @ (w[inside] - columns.q[group])
            w[inside.stop :].addmm_(u[inside, inside.stop :].T, error, alpha=-1)

    def sweep(self, columns: AnyColumns, metrics: LayerMetrics, block: slice, gradient: Tensor) -> None:
        """Decide the groups of a block again, with all other groups as they are, and keep what lowers the error.

        `gradient` [n, N] is H (w - q) at the columns of the block. It may be overwritten.
        """
        for group, inside in groups_of_block(block, self.group_size):
            metric = metrics.fixed[group.start // self.group_size]
            q, levels, selectors, codes = columns.block(group, self.group_size)
            now = metric.u @ gradient[inside]
            kept = Candidate(codes[0], selectors, levels, now.square().sum(0))
            found = self._neighbour(columns, group, q + metric.u.T @ now, metric)
            # Rounding in float32 must not let a group go back and forth.
            kept.take(found.errors < kept.errors * (1 - 1e-5), found)
            before = q.clone()
            self._write(columns, group, kept)
            gradient[inside.start :].addmm_(metrics.hessian[group.start : block.stop, group], q - before, alpha=-1)
