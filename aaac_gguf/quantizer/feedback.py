"""Error feedback with the full second moments of a layer, the GPTQ / LDLQ family, for groups with searched scales and two codebooks.

The layer's output error is `tr((W - Q) H (W - Q)^T)` with `H = E[x x^T]`. With `H^-1 = U^T U`, U upper triangular, columns are quantized from left to
right, and the error of column j moves every later column by `-(w_j - q_j) U_jk / U_jj`, which is where the best later weights are once column j is
fixed. What remains of the error is `sum_j (w_j - q_j)^2 / U_jj^2`.

A group is decided at once: several scales and both codebooks are tried with feedback inside the group, and what leaves the least error stays.
After the last column, sweeps decide every group again with all other groups fixed where they are: coordinate descent on the same error.

Where the second moment O of the loss's gradient at the layer's outputs is known too, the error is `tr(O (W - Q) H (W - Q)^T)`, and rows are fed back
as columns are: what is left of a block of rows moves the rows behind it by the factor of O, before they are encoded (YAQA, Tseng et al., 2025).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from ..files.format import SELECTOR_SIZE
from .cuda import GpuSearch, gpu_rounding, gpu_search
from .grid import CELLS, CELLS_PER_UNIT, Encoded, Grid, scale_starts
from .kquants import Steps
from .moments import Factor, _inverse_root, factor
from .native import CompiledGrid

OUTPUT_DAMPING = 0.1  # the same for O, which fewer directions dominate
SWEEPS = 1  # it lowers the error by 6 to 10 %, a second one by 2 % more
_BLOCK = 128  # columns whose updates to the columns behind them are applied in one matrix product

_ROW_BLOCKS = 16  # with O: rows of one block do not see each other's errors, 15 of 16 pairs of rows do

# Without O rows are independent; on a CPU this many keep one group's candidates in the cache.
_CHUNK_ROWS = {"cpu": 512}


class Grouped(Protocol):
    """What feedback asks of a tensor type."""

    @property
    def group_size(self) -> int: ...


class _Metric:
    """What one group of columns needs of its factor `u` upper triangular [g, g], prepared once for all rows.

    root    U^-T: the square of root (target - q) is the error of the group
    step    -U_jk / U_jj, by which the error of column j moves column k; steps holds its rows inside each run of 16, one vector per column
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


@dataclass
class _Choice:
    """What one group of every row holds: scale codes int64 [N], codebooks bool [g / 16, N], levels float32 [g, N] and the error it leaves [N]."""

    code: Tensor
    second: Tensor
    level: Tensor
    error: Tensor

    def take(self, better: Tensor, other: _Choice) -> None:
        """Replace the rows where `better`, bool [N]."""
        for name in ("code", "second", "level", "error"):
            setattr(self, name, torch.where(better, getattr(other, name), getattr(self, name)))


class _Rounding:
    """Tries candidates for groups of `group_size` columns against one grid."""

    def __init__(self, grid: Grid, group_size: int):
        self.grid, self.group_size = grid, group_size
        # Inside a group weights are counted in table cells, so that the table is read without further arithmetic.
        self.table = grid.nearest_level.view(2, CELLS) * CELLS_PER_UNIT + CELLS / 2

    def __call__(self, target: Tensor, metric: _Metric, codes: Tensor) -> _Choice:
        """The best of the scale codes int64 [C, N] for `target` [g, N], with feedback inside the group."""
        n_candidates, n_rows = codes.shape
        scale = self.grid.scales[codes]
        x = (target[:, None] * (CELLS_PER_UNIT / scale)).view(self.group_size, -1) + CELLS / 2
        error = torch.zeros_like(x[0])
        levels = torch.empty_like(x)
        second = torch.empty(self.group_size // SELECTOR_SIZE, x.shape[1], dtype=torch.bool, device=x.device)
        for start in range(0, self.group_size, SELECTOR_SIZE):
            run = slice(start, start + SELECTOR_SIZE)
            rest = slice(run.stop, self.group_size)
            values, errors = self._run(x[run], metric.steps[start // SELECTOR_SIZE])
            sums = (errors.square() * metric.weight[run]).sum(0)
            pick = sums[1] < sums[0]
            second[start // SELECTOR_SIZE] = pick
            error += torch.where(pick, sums[1], sums[0])
            levels[run] = torch.where(pick, values[:, 1], values[:, 0])
            if rest.start < rest.stop:
                x[rest].addmm_(metric.step[run, rest].T, torch.where(pick, errors[:, 1], errors[:, 0]))
        error = error.view(n_candidates, n_rows) * (scale / CELLS_PER_UNIT).square()
        least, best = error.min(0)
        column = best * n_rows + torch.arange(n_rows, device=x.device)
        level = (levels[:, column] - CELLS / 2) / CELLS_PER_UNIT
        return _Choice(codes.view(-1)[column], second[:, column], level, least)

    def _run(self, x: Tensor, steps: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Levels and errors [16, 2, M], in cells, of the 16 columns x [16, M], each rounded to both codebooks with feedback."""
        x = x[:, None].repeat(1, 2, 1)
        behind = x.view(SELECTOR_SIZE, -1)
        values, errors = torch.empty_like(x), torch.empty_like(x)
        clamped, cells = torch.empty_like(x[0]), torch.empty_like(x[0], dtype=torch.int64)
        # This loop is where the time goes: few operations, and none that allocates.
        for step, column, value, error in zip(steps, x.unbind(), values.unbind(), errors.unbind(), strict=True):
            cells.copy_(torch.clamp(column, 0, CELLS - 1, out=clamped))
            torch.gather(self.table, 1, cells, out=value)
            torch.sub(column, value, out=error)
            if len(step):
                behind[-len(step) :].addr_(step, error.view(-1))
        return values, errors

    def best(self, target: Tensor, metric: _Metric, codes: Tensor) -> _Choice:
        """The best of `codes`, of the least-squares scale for what they gave, and of that code's neighbours; zero where nothing does better."""
        zero = torch.zeros_like(codes[0])
        choice = self(target, metric, codes)
        white, level = metric.root @ target, metric.root @ choice.level
        least_squares = (white * level).sum(0) / level.square().sum(0).clamp_min(torch.finfo(level.dtype).tiny)
        refined = self.grid.scale_codes(least_squares)
        last = len(self.grid.scales) - 1
        other = self(
            target, metric, torch.stack([refined, (choice.code + 1).clamp_max(last), (choice.code - 1).clamp_min(1)])
        )
        choice.take(other.error < choice.error, other)
        nothing = white.square().sum(0)
        choice.take(nothing <= choice.error, _Choice(zero, choice.second, choice.level, nothing))
        return choice


class _Metrics:
    """By group, what its error is when the columns behind it are free (feedback), and when all others are fixed (sweeps)."""

    def __init__(self, inputs: Factor, size: int):
        n_groups = len(inputs.u) // size
        free, fixed = (
            m.view(n_groups, size, n_groups, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
            for m in (inputs.u, inputs.hessian)
        )
        self.free_roots, self.fixed_roots = free, _inverse_root(fixed.double())[0].float().contiguous()

    @cached_property
    def free(self) -> list[_Metric]:
        return [_Metric(u) for u in self.free_roots]

    @cached_property
    def fixed(self) -> list[_Metric]:
        return [_Metric(u) for u in self.fixed_roots]


def feedback(
    weight: Tensor, inputs: Factor, grid: Grid, qtype: Grouped, outputs: Tensor | None = None, sweeps: int = SWEEPS
) -> Encoded:
    """Encode `weight` float32 [N, K] for least error under `inputs`, the factored H, and `outputs`, O [N, N] as it was measured, if given."""
    metrics = _Metrics(inputs, qtype.group_size)
    search = grid.compiled or gpu_search(grid, qtype.group_size)

    def encode(part: Tensor, _: Tensor) -> tuple[Tensor, Encoded]:
        given = (part, inputs, metrics, grid, qtype)
        rows = _CompiledRows(search, *given) if search else _Rows(*given)
        encoded = rows.encode(sweeps)
        return rows.q.T, encoded

    parts, order = _in_row_blocks(weight, outputs, encode)
    joined = (torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Encoded))
    return Encoded(*(values[order] for values in joined))


def feedback_on_steps(weight: Tensor, inputs: Factor, steps: Steps, outputs: Tensor | None = None) -> Tensor:
    """Quants uint8 [N, K] for `weight` float32 [N, K] where the scales are chosen already; the moments as in `feedback`."""
    u, of_runs = inputs.u, (steps.step, steps.offset, steps.inverse)
    round_columns = gpu_rounding(weight.device) or _round_columns

    def encode(part: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        w = part.T.clone(memory_format=torch.contiguous_format)
        quants = torch.empty(w.shape, dtype=torch.uint8, device=w.device)
        given = [t[index].T.contiguous() for t in of_runs]
        for block in _blocks(len(w)):
            runs = slice(block.start // steps.run, block.stop // steps.run)
            errors = round_columns(w[block], u[block, block], [t[runs] for t in given], steps.n_levels, quants[block])
            w[block.stop :].addmm_(u[block, block.stop :].T, errors, alpha=-1)
        chosen = quants.T.contiguous()
        return replace(steps, step=steps.step[index], offset=steps.offset[index]).weights(chosen), chosen

    parts, order = _in_row_blocks(weight, outputs, encode)
    return torch.cat(parts)[order]


def _round_columns(w: Tensor, u: Tensor, of_runs: Sequence[Tensor], n_levels: int, quants: Tensor) -> Tensor:
    """Round a block of columns `w` [n, N], which moves, to `quants` [n, N]; of_runs: step, offset and 1 / step [n / run, N]. Returns the errors."""
    step, offset, inverse = (t.repeat_interleave(len(w) // len(t), 0) for t in of_runs)
    errors = torch.empty_like(w)
    for j, error in enumerate(errors):
        quant = ((w[j] + offset[j]) * inverse[j]).round_().clamp_(0, n_levels - 1)
        quants[j] = quant
        torch.sub(w[j], quant * step[j] - offset[j], out=error).div_(u[j, j])
        w[j + 1 :].addr_(u[j, j + 1 :], error, alpha=-1)
    return errors


_Part = TypeVar("_Part")


def _in_row_blocks(
    weight: Tensor, outputs: Tensor | None, encode: Callable[[Tensor, Tensor], tuple[Tensor, _Part]]
) -> tuple[list[_Part], Tensor]:
    """Give `encode` some rows of `weight` [N, K] at a time, and their numbers; it returns what they became [n, K], and the encoding.

    With `outputs` O, rows come as the errors of the rows before them have moved them. Returns the encodings, and the order that sorts their rows.
    """
    n_rows = len(weight)
    numbers = torch.arange(n_rows, device=weight.device)
    if outputs is None:
        size = _CHUNK_ROWS.get(weight.device.type, n_rows)
        return [
            encode(rows, index)[1] for rows, index in zip(weight.split(size), numbers.split(size), strict=True)
        ], numbers

    # A block takes every 16th row: neighbours, which are often coupled (one attention head), then see each other's errors.
    order = torch.cat([numbers[first::_ROW_BLOCKS] for first in range(min(_ROW_BLOCKS, n_rows))])
    u = factor(outputs[order][:, order], OUTPUT_DAMPING).u
    target = weight[order]
    parts = []
    for index in torch.arange(n_rows).split(-(-n_rows // _ROW_BLOCKS)):
        block = slice(int(index[0]), int(index[-1]) + 1)
        q, part = encode(target[block], order[block])
        parts.append(part)
        error = torch.linalg.solve_triangular(u[block, block].T, target[block] - q, upper=False)
        target[block.stop :].addmm_(u[block, block.stop :].T, error, alpha=-1)
    return parts, order.argsort()


class _Rows:
    """Some rows on their way to being encoded, all [K, N]: columns are what is read and written, so they are contiguous."""

    def __init__(self, weight: Tensor, inputs: Factor, metrics: _Metrics, grid: Grid, qtype: Grouped):
        self.weight = weight.T.contiguous()
        self.h, self.u, self.metrics = inputs.hessian, inputs.u, metrics
        self.grid, self.size = grid, qtype.group_size
        self.starts = scale_starts(qtype.group_size, weight.device)
        n_per_row, n_rows = self.weight.shape
        self.q = torch.empty_like(self.weight)
        self.level = torch.empty_like(self.weight)
        self.second = torch.empty(n_per_row // SELECTOR_SIZE, n_rows, dtype=torch.bool, device=weight.device)
        self.code = torch.empty(n_per_row // self.size, n_rows, dtype=torch.int64, device=weight.device)

    @cached_property
    def rounding(self) -> _Rounding:
        return _Rounding(self.grid, self.size)

    def encode(self, sweeps: int) -> Encoded:
        self._feed_back()
        for _ in range(sweeps):
            self._sweep()
        runs = self.level.view(-1, SELECTOR_SIZE, self.level.shape[1])
        # A level is a whole number of cells from every boundary between levels, so the table that found it names its index.
        indices = self.grid.nearest_index[self.grid.cells(runs) + self.second[:, None] * CELLS].view_as(self.level)
        parts = ((indices, torch.uint8), (self.second, torch.uint8), (self.code, torch.int32))
        return Encoded(*(part.T.contiguous().to(dtype) for part, dtype in parts))

    def _write(self, group: slice, choice: _Choice) -> None:
        self.q[group] = self.grid.scales[choice.code] * choice.level
        self.level[group] = choice.level
        self.second[group.start // SELECTOR_SIZE : group.stop // SELECTOR_SIZE] = choice.second
        self.code[group.start // self.size] = choice.code

    def _feed_back(self) -> None:
        """Decide the groups from left to right, each for the weights as the errors before it have moved them."""
        w = self.weight.clone()
        for block in _blocks(len(w)):
            errors = self._decide(block, w[block])
            w[block.stop :].addmm_(self.u[block, block.stop :].T, errors, alpha=-1)

    def _decide(self, block: slice, w: Tensor) -> Tensor:
        """Decide the groups of a block of columns w [n, N]. Returns what U turns into the moves of the columns behind it, [n, N]."""
        errors = torch.empty_like(w)
        for group, inside in _groups(block, self.size):
            metric = self.metrics.free[group.start // self.size]
            codes = self.grid.scale_codes(w[inside].abs().amax(0) * self.starts[:, None])
            self._write(group, self.rounding.best(w[inside], metric, codes))
            errors[inside] = metric.root @ (w[inside] - self.q[group])
            w[inside.stop :].addmm_(self.u[group, group.stop : block.stop].T, errors[inside], alpha=-1)
        return errors

    def _sweep(self) -> None:
        """Decide every group again for the others as they are, and keep what lowers the error."""
        gradient = self.h @ (self.weight - self.q)
        for block in _blocks(len(gradient)):
            before = self.q[block].clone()
            self._revise(block, gradient[block])
            gradient[block.stop :].addmm_(self.h[block.stop :, block], self.q[block] - before, alpha=-1)

    def _revise(self, block: slice, gradient: Tensor) -> None:
        """One sweep over a block of columns, `gradient` [n, N] being H times the error at its columns."""
        last = len(self.grid.scales) - 1
        for group, inside in _groups(block, self.size):
            metric = self.metrics.fixed[group.start // self.size]
            target = self.q[group] + metric.u.T @ (metric.u @ gradient[inside])
            code = self.code[group.start // self.size]
            second = self.second[group.start // SELECTOR_SIZE : group.stop // SELECTOR_SIZE]
            kept = _Choice(code, second, self.level[group], (metric.root @ (target - self.q[group])).square().sum(0))
            nearby = code + torch.arange(-2, 3, device=code.device)[:, None]
            found = self.rounding(target, metric, nearby.clamp(1, last))
            old = self.q[group].clone()
            # Rounding in float32 must not let a group go back and forth.
            kept.take(found.error < kept.error * (1 - 1e-5), found)
            self._write(group, kept)
            gradient[inside.start :].addmm_(self.h[group.start : block.stop, group], self.q[group] - old, alpha=-1)


class _CompiledRows(_Rows):
    """The same in search.c or search.cu, a block of columns at a time."""

    def __init__(
        self,
        search: CompiledGrid | GpuSearch,
        weight: Tensor,
        inputs: Factor,
        metrics: _Metrics,
        grid: Grid,
        qtype: Grouped,
    ):
        super().__init__(weight, inputs, metrics, grid, qtype)
        self.search = search

    def _outputs(self, block: slice) -> tuple[Tensor, ...]:
        runs, groups = (slice(block.start // n, block.stop // n) for n in (SELECTOR_SIZE, self.size))
        return self.q[block], self.level[block], self.second[runs], self.code[groups]

    def _decide(self, block: slice, w: Tensor) -> Tensor:
        errors = torch.empty_like(w)
        u, starts = self.u[block, block], self.starts
        self.search.call(
            "aaac_feed_back", *w.shape, self.size, u, len(self.u), starts, len(starts), w, *self._outputs(block), errors
        )
        return errors

    def _revise(self, block: slice, gradient: Tensor) -> None:
        roots = self.metrics.fixed_roots[block.start // self.size :]
        self.search.call(
            "aaac_sweep",
            *gradient.shape,
            self.size,
            self.h[block, block],
            len(self.h),
            roots,
            gradient,
            *self._outputs(block),
        )


def _blocks(n_per_row: int) -> list[slice]:
    return [slice(start, min(start + _BLOCK, n_per_row)) for start in range(0, n_per_row, _BLOCK)]


def _groups(block: slice, size: int) -> list[tuple[slice, slice]]:
    """The groups of a block: as columns of the matrix, and as columns of the block."""
    return [
        (slice(k, k + size), slice(k - block.start, k - block.start + size))
        for k in range(block.start, block.stop, size)
    ]
