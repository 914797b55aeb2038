"""The values that one tensor can take, as tables for the search."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..files.format import MAX_LEVEL, AaacType, Codec
from .native import CompiledGrid, native

# Where the search starts, by group size, relative to the scale that maps a group's largest weight onto the largest level. Above 1 that weight meets
# the second level from an end, or the shorter end of a codebook; below 1 it is clipped, which pays in large groups. Picked greedily on trained
# weights; all of 24 starts between 0.56 and 1.28 gain less than 0.5 % over these.
SCALE_STARTS = {
    16: (1.0, 1.16, 1.08, 0.94, 1.24, 0.88),
    32: (1.0, 1.12, 0.94, 0.88, 1.06, 0.82),
    128: (0.94, 1.0, 0.88, 0.82, 1.04, 0.75),
}


# The nearest level is found in a table over [-128, 128) with this many cells per level unit. Levels of a written codec are integers, so the
# boundaries between them are half-integers and the table is exact; while codebooks are being fitted a boundary is off by at most one cell.
CELLS_PER_UNIT = 8


_CELLS = 256 * CELLS_PER_UNIT


# Weights per chunk: large enough that starting threads or kernels costs nothing, small enough for its temporaries not to matter.
_CHUNK_WEIGHTS = {"cpu": 1 << 20, "cuda": 1 << 22}


def row_chunks(rows: Tensor) -> list[slice]:
    """Slices of the first dimension of `rows` [N, K] that bound the memory which a search over them takes."""
    step = max(1, _CHUNK_WEIGHTS.get(rows.device.type, 1 << 20) // rows.shape[-1])
    return [slice(start, start + step) for start in range(0, len(rows), step)]


@dataclass(frozen=True)
class Grid:
    """The values that one tensor can take, as tables on the device of the search.

    levels         float32 [2, 16], ascending (any number of levels up to 256 for stock types)
    scales         float32 [n_scale_codes], S(i), with S(0) = 0
    nearest_index  uint8 [2 * cells], the nearest level's index for each codebook and cell
    nearest_level  float32 [2 * cells], the same level's value
    """

    levels: Tensor
    scales: Tensor
    nearest_index: Tensor
    nearest_level: Tensor

    @staticmethod
    def of_levels(levels: Tensor, scales: Tensor) -> Grid:
        """Tables for float32 levels [2, 16] within [-127, 127] and scales [n_scale_codes]."""
        centres = (torch.arange(_CELLS, device=levels.device) + 0.5) / CELLS_PER_UNIT - 128
        boundaries = (levels[:, 1:] + levels[:, :-1]) / 2
        nearest = torch.stack([torch.bucketize(centres, b) for b in boundaries])
        return Grid(levels, scales, nearest.to(torch.uint8).reshape(-1), levels.gather(1, nearest).reshape(-1))

    @staticmethod
    def of_codec(codec: Codec, qtype: AaacType, device: torch.device | str, unit: float = 1.0) -> Grid:
        """Tables for a codec, for weights that were divided by `unit`, a power of two."""
        levels = torch.from_numpy(codec.codebooks).to(device, torch.float32)
        scales = torch.from_numpy(codec.scales()[: qtype.n_scale_codes]).to(device) / unit
        return Grid.of_levels(levels, scales)

    @cached_property
    def compiled(self) -> CompiledGrid | None:
        """The same tables for search.c; None where that does not serve: on a GPU, and without a C compiler."""
        return CompiledGrid(self) if self.levels.device.type == "cpu" and native() else None

    def scale_codes(self, scales: Tensor) -> Tensor:
        """The nearest nonzero scale's code for each of `scales` (any shape): int64."""
        nonzero = self.scales[1:]
        return 1 + torch.bucketize(scales, (nonzero[1:] + nonzero[:-1]) / 2)

    def cells(self, x: Tensor) -> Tensor:
        """The table cell of each level-unit value in `x`, for codebook 0: int64. Add 2048 for codebook 1."""
        return (x * CELLS_PER_UNIT + _CELLS / 2).clamp_(0, _CELLS - 1).to(torch.int64)


CELLS = _CELLS


@dataclass(frozen=True)
class Encoded:
    """What the blocks of rows hold: indices uint8 [N, K], selectors uint8 [N, K / 16], scale_codes int32 [N, K / group_size]."""

    indices: Tensor
    selectors: Tensor
    scale_codes: Tensor


def scale_starts(group_size: int, device: torch.device | str = "cpu") -> Tensor:
    """SCALE_STARTS times the largest weight are scales: float32 [n]."""
    return torch.tensor(SCALE_STARTS[group_size], device=device) / MAX_LEVEL
