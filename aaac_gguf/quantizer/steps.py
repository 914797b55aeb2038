"""The search for scales, offsets and levels of types with super-blocks, with error feedback.

The float16 numbers of the super-blocks are fixed. For each run of 16 or 32 columns, codes of scale and offset are tried
with feedback inside the run, as `columns.GroupSearch` tries scales of AAAC types.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .backends import Backend
from .columns import Candidate, Columns, FeedbackSearch, GroupMetric
from .grid import CELLS, Encoded
from .kquants import KQuant, Steps, products

# What is tried first: the end of a run's range is this far from the last level, in levels.
_STARTS = (0.0, 0.3, -0.3, 0.6, 0.9, -0.6)


@dataclass
class RunColumns(Columns):
    """The decisions for some rows. A code holds those of the scale (low 16 bits) and of the offset.

    halves  float16 [K / run, N, P], what the codes are multiplied by
    """

    halves: Tensor


class StepSearch(FeedbackSearch[RunColumns]):
    """The search over the values that one type with super-blocks has for a tensor.

    halves   float16 [N, K / block, P] of all rows
    backend  rounds a run with feedback inside it
    """

    def __init__(self, layout: KQuant, halves: Tensor, backend: Backend):
        self.layout, self.halves, self.backend = layout, halves, backend
        self.grid, self.group_size = layout.grid(halves.device), layout.run
        low, high = zip(*layout.codes, strict=True)
        self._low, self._high = (torch.tensor(ends, device=halves.device) for ends in (low, high))
        self._spacing = (layout.levels[-1] - layout.levels[0]) / (len(layout.levels) - 1)
        moves = ([0], [1], [-1], [2], [-2]) if len(low) == 1 else ([0, 0], [1, 0], [-1, 0], [0, 1], [0, -1])
        self._moves = torch.tensor(moves, device=halves.device)[:, None]

    def undecided(self, weight: Tensor, rows: Tensor, groups: Tensor) -> RunColumns:
        """Return memory for the decisions, as `TorchSearch.undecided` does."""
        blank = Columns.undecided(weight, self.group_size)
        halves = self.halves[rows][:, groups * self.group_size // self.layout.block].transpose(0, 1)
        return RunColumns(blank.q, blank.levels, torch.zeros_like(blank.selectors), blank.codes, halves)

    def _best(self, columns: RunColumns, group: slice, target: Tensor, metric: GroupMetric) -> Candidate:
        halves = columns.halves[group.start // self.group_size]
        found = self._try(target, metric, halves, self._nearest(self._starts(target), halves))
        refined = self._nearest(self._least_squares(target, metric, found.levels), halves)
        other = self._try(target, metric, halves, torch.cat([refined[None], self._nearby(found.codes)[1:]]))
        found.take(other.errors < found.errors, other)
        return found

    def _neighbour(self, columns: RunColumns, group: slice, target: Tensor, metric: GroupMetric) -> Candidate:
        number = group.start // self.group_size
        return self._try(target, metric, columns.halves[number], self._nearby(columns.codes[number]))

    def steps(self, encoded: Encoded) -> Steps:
        """Return the scales of what was decided on all rows."""
        codes = self._unpack(encoded.scale_codes.long()).to(torch.int16)
        return Steps(self.halves, codes, self.layout.folded)

    def _starts(self, target: Tensor) -> Tensor:
        """Return scales, and offsets, float32 [C, N, P] for a run `target` [run, N]."""
        levels = self.layout.levels
        low, high = target.amin(0), target.amax(0)
        if len(self._low) == 1:
            extreme = torch.where(high > -low, high, low)
            return torch.stack([extreme / (levels[0] + start * self._spacing) for start in _STARTS])[..., None]
        low = low.clamp_max(0)
        steps = [(high - low) / (levels[-1] - levels[0] - 2 * start) for start in _STARTS]
        return torch.stack(
            [torch.stack([step, -low - start * step], -1) for step, start in zip(steps, _STARTS, strict=True)]
        )

    def _least_squares(self, target: Tensor, metric: GroupMetric, levels: Tensor) -> Tensor:
        """Return the scales, and offsets, [N, P] of least error for `levels` [run, N]."""
        tiny = torch.finfo(levels.dtype).tiny
        white, level = metric.root @ target, metric.root @ levels
        product, square = (white * level).sum(0), level.square().sum(0)
        alone = product / square.clamp_min(tiny)
        if len(self._low) == 1:
            return alone[:, None]
        # white = scale * level - offset * one
        one = metric.root.sum(1)
        level_one, white_one, one_one = one @ level, one @ white, one @ one
        determinant = square * one_one - level_one.square()
        scale = (product * one_one - level_one * white_one) / determinant
        offset = (level_one * product - square * white_one) / determinant
        no_offset = (determinant <= 1e-6 * square * one_one) | (offset < 0)
        return torch.stack([torch.where(no_offset, alone, scale), torch.where(no_offset, 0.0, offset)], -1)

    def _try(self, target: Tensor, metric: GroupMetric, halves: Tensor, codes: Tensor) -> Candidate:
        """Return the best of the codes int64 [C, N] for `target` [run, N], with feedback inside the run."""
        steps = [t.reshape(-1).contiguous() for t in products(halves, self._unpack(codes), self.layout.folded)]
        levels = torch.empty(len(target), codes.numel(), dtype=torch.int8, device=target.device)
        errors = self.backend.round_to_steps(
            target.repeat(1, len(codes)), metric.u, steps, self.grid.nearest_level[:CELLS], levels
        )
        least, best = errors.square().sum(0).view(codes.shape).min(0)
        column = best * len(best) + torch.arange(len(best), device=best.device)
        selectors = torch.zeros(len(target) // 16, len(best), dtype=torch.bool, device=best.device)
        return Candidate(codes.view(-1)[column], selectors, levels[:, column].float(), least)

    def _nearest(self, wanted: Tensor, halves: Tensor) -> Tensor:
        """Return the codes int64 [...] nearest to scales, and offsets, [..., P]."""
        inverse = torch.where(halves == 0, 0.0, 1 / halves.float())
        return self._pack((wanted * inverse).nan_to_num_().round())

    def _nearby(self, codes: Tensor) -> Tensor:
        """Return the codes int64 [N] and four neighbours of each, [5, N]."""
        return self._pack(self._unpack(codes) + self._moves)

    def _pack(self, codes: Tensor) -> Tensor:
        """Return codes [..., P], clamped to those that there are, as int64 [...]."""
        fields = codes.clamp(self._low, self._high).long() & 0xFFFF
        return fields[..., 0] | fields[..., -1] << 16

    def _unpack(self, codes: Tensor) -> Tensor:
        """Return the codes of scales, and of offsets, [..., P]."""
        fields = torch.stack([codes << 48 >> 48, codes << 32 >> 48], -1)
        return fields[..., : len(self._low)]

    def _write(self, columns: RunColumns, group: slice, chosen: Candidate) -> None:
        q, levels, _, codes = columns.block(group, self.group_size)
        halves = columns.halves[group.start // self.group_size]
        step, offset, _ = products(halves, self._unpack(chosen.codes), self.layout.folded)
        q.copy_(chosen.levels * step - offset)
        levels.copy_(chosen.levels)
        codes[0] = chosen.codes
