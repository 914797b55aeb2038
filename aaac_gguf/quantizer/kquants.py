"""llama.cpp's types with super-blocks of 256 weights, K-quants and IQ4_XS, and types with a float16 offset.

The float16 numbers of the super-blocks are chosen first, from the weights as they are, with codes that suit them.
Levels follow by rounding to nearest, or codes and levels together by error feedback (`steps.StepSearch`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as T
from torch import Tensor

from ..files.format import U8
from . import klayout
from .grid import Grid

_CHUNK = 1 << 22  # weights at a time
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Steps:
    """The scales of some rows. A weight is `step * level - offset`.

    halves  float16 [N, K / block, P]: d, and with P = 2 dmin too
    codes   int16 [N, K / run, P]: what d and dmin are multiplied by
    folded  whether the file has the products as float16 numbers, and neither halves nor codes
    """

    halves: Tensor
    codes: Tensor
    folded: bool = False

    def products(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return step, offset and 1 / step of every run, as `products` does, float32 [N, K / run, 1] each."""
        n_runs = self.codes.shape[1] // self.halves.shape[1]
        step, offset, inverse = products(self.halves.repeat_interleave(n_runs, 1), self.codes, self.folded)
        return step[..., None], offset[..., None], inverse[..., None]


def products(halves: Tensor, codes: Tensor, folded: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return step, offset and 1 / step, float32 [...] each, for halves and codes [..., P]. 1 / step is 0 for 0."""
    values = halves.float() * codes
    values = values.half().float() if folded else values
    step = values[..., 0]
    offset = values[..., 1] if values.shape[-1] == 2 else torch.zeros_like(step)
    return step, offset, torch.where(step.abs() < _TINY, 0.0, 1 / step)


@dataclass(frozen=True)
class KQuant:
    """The layout of one type.

    levels  what the scales are multiplied by, ascending
    run     the number of weights that share a scale
    codes   the least and the largest code of scales, and of offsets if there are any
    pack    packs indices of levels, codes and float16 numbers: a function of `klayout`
    block   the number of weights that share the float16 numbers
    folded  that of `Steps`
    """

    levels: tuple[int, ...]
    run: int
    codes: tuple[tuple[int, int], ...]
    pack: Callable[[Tensor, Tensor, Tensor], Tensor]
    block: int = 256
    folded: bool = False

    def grid(self, device: torch.device | str) -> Grid:
        """Return the tables of nearest levels. There are no scales in them."""
        levels = torch.tensor(self.levels, dtype=torch.float32, device=device)
        return Grid.from_levels(levels.repeat(2, 1), levels.new_zeros(1))

    def nearest(self, x: Tensor) -> Tensor:
        """Return the nearest level to each of `x`, float32."""
        if len(self.levels) == self.levels[-1] - self.levels[0] + 1:
            return x.round().clamp_(self.levels[0], self.levels[-1])
        grid = self.grid(x.device)
        return grid.nearest_level[grid.cells(x)]

    def round_to(self, steps: Steps, weight: Tensor) -> Tensor:
        """Return the indices of the nearest levels for weights [N, K], uint8 [N, K]."""
        _, offset, inverse = steps.products()
        grid = self.grid(weight.device)
        runs = weight.reshape(*offset.shape[:2], self.run)
        return grid.nearest_index[grid.cells((runs + offset) * inverse)].view(weight.shape)

    def weights(self, indices: Tensor, steps: Steps) -> Tensor:
        """Return the weights that indices uint8 [N, K] stand for, float32 [N, K], bit for bit those of a reader."""
        step, offset, _ = steps.products()
        levels = torch.tensor(self.levels, dtype=torch.float32, device=indices.device)[indices.int()]
        return (levels.view(*step.shape[:2], self.run) * step - offset).view(indices.shape)

    def packed(self, indices: Tensor, steps: Steps) -> U8:
        """Return blocks uint8 [N, row bytes] of indices uint8 [N, K]."""
        n_blocks = indices.numel() // self.block
        codes = steps.codes.to(torch.uint8).view(n_blocks, self.block // self.run, -1)
        halves = torch.cat(steps.products()[:2], 2).half() if self.folded else steps.halves
        halves = halves.reshape(n_blocks, -1).view(torch.uint8)
        return self.pack(indices.view(n_blocks, self.block), codes, halves).view(len(indices), -1).cpu().numpy()

    def round_to_nearest(self, weight: Tensor) -> U8:
        """Return blocks uint8 [..., row bytes] of weights [..., K], with K a multiple of the block.

        For the choice of scales, an error counts with the weight's square.
        """
        *outer, n_per_row = weight.shape
        packed = []
        for rows in weight.reshape(-1, n_per_row).split(max(1, _CHUNK // n_per_row)):
            rows = rows.float()
            steps = self.steps(rows, rows.square())
            packed.append(self.packed(self.round_to(steps, rows), steps))
        return np.concatenate(packed).reshape(*outer, -1)

    def steps(self, weight: Tensor, error_weight: Tensor) -> Steps:
        """Choose scales and offsets for weights [N, K], for least squares under error weights [N, K]."""
        groups = weight.reshape(-1, self.run)
        a = error_weight.reshape(-1, self.run).clamp_min(_TINY)
        wanted = self._scales_and_offsets(groups, a) if len(self.codes) == 2 else self._scales(groups, a)
        n_rows = len(weight)
        return self.nearest_steps(wanted.view(n_rows, weight.shape[1] // self.block, self.block // self.run, -1))

    def nearest_steps(self, wanted: Tensor) -> Steps:
        """Return the steps nearest to scales, and offsets, float32 [N, K / block, block / run, P]."""
        low, high = (torch.tensor(ends, device=wanted.device) for ends in zip(*self.codes, strict=True))
        extreme = wanted.gather(2, wanted.abs().argmax(2, keepdim=True))
        # With signed codes, the scale of largest magnitude gets the least one, which is on the longer side.
        end = high // 2 if self.folded else torch.where(low < 0, low, high)
        halves = (extreme / end).half()
        inverse = torch.where(halves == 0, 0.0, 1 / halves.float())
        codes = (wanted * inverse).round().clamp(low, high).to(torch.int16)
        return Steps(halves.squeeze(2), codes.flatten(1, 2), self.folded)

    def _scales(self, groups: Tensor, a: Tensor) -> Tensor:
        """Return the best of 19 scales that map the largest weight of each group to about the first level, [G, 1]."""
        extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
        best, best_gain = torch.zeros_like(extreme), torch.zeros_like(extreme)
        spacing = (self.levels[-1] - self.levels[0]) / (len(self.levels) - 1)
        for shift in range(-9, 10):
            q = self.nearest(
                groups * torch.where(extreme == 0, 0.0, (self.levels[0] + 0.1 * shift * spacing) / extreme)
            )
            dot = (a * groups * q).sum(-1, keepdim=True)
            norm = (a * q * q).sum(-1, keepdim=True)
            gain = torch.where(norm > 0, dot * dot / norm, 0.0)
            best = torch.where(gain > best_gain, dot / norm, best)
            best_gain = torch.maximum(gain, best_gain)
        return best

    def _scales_and_offsets(self, groups: Tensor, a: Tensor) -> Tensor:
        """Return the best of 19 scales and offsets that map the range of each group to about that of levels, [G, 2].

        llama.cpp cannot store negative ones.
        """
        low, high = groups.amin(-1, keepdim=True).clamp_max(0), groups.amax(-1, keepdim=True)
        span = (high - low).clamp_min(_TINY)
        sw, swx = a.sum(-1, keepdim=True), (a * groups).sum(-1, keepdim=True)
        best = torch.full_like(span, torch.inf)
        scale, offset = torch.zeros_like(span), torch.zeros_like(span)
        for top in (self.levels[-1] + 0.1 * shift for shift in range(-9, 10)):
            q = self.nearest((groups - low) * (top / span))
            aq = a * q
            swq, swqq, swqx = (t.sum(-1, keepdim=True) for t in (aq, aq * q, aq * groups))
            determinant = sw * swqq - swq * swq
            # x = s q - m by least squares. m is 0 if all weights have the same level, or if it would be negative.
            s, m = (sw * swqx - swx * swq) / determinant, (swq * swqx - swqq * swx) / determinant
            alone = (determinant <= 1e-6 * sw * swqq) | (m < 0)
            s, m = torch.where(alone, swqx / swqq.clamp_min(_TINY), s), torch.where(alone, 0.0, m)
            error = (a * (s * q - m - groups).square()).sum(-1, keepdim=True)
            better = (error < best) & (s >= 0)
            best = torch.where(better, error, best)
            scale, offset = torch.where(better, s, scale), torch.where(better, m, offset)
        return torch.cat([scale, offset], -1)


KQUANTS = {
    T.Q2_K: KQuant(tuple(range(4)), 16, ((0, 15), (0, 15)), klayout.q2_k),
    T.Q3_K: KQuant(tuple(range(-4, 4)), 16, ((-32, 31),), klayout.q3_k),
    T.Q4_K: KQuant(tuple(range(16)), 32, ((0, 63), (0, 63)), klayout.q4_k),
    T.Q5_K: KQuant(tuple(range(32)), 32, ((0, 63), (0, 63)), klayout.q5_k),
    T.Q6_K: KQuant(tuple(range(-32, 32)), 16, ((-128, 127),), klayout.q6_k),
    T.IQ4_XS: KQuant(gguf.quants.IQ4_NL.kvalues, 32, ((-32, 31),), klayout.iq4_xs),
    T.Q4_1: KQuant(tuple(range(16)), 32, ((0, 127), (0, 127)), klayout.q4_1, 32, True),
    T.Q5_1: KQuant(tuple(range(32)), 32, ((0, 255), (0, 255)), klayout.q5_1, 32, True),
}
