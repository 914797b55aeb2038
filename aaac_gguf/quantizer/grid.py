"""The values that the weights of one tensor can take, as tables for the search."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..files.format import MAX_LEVEL, AaacType, Codec

# The scales that the search tries first, by group size, relative to the scale that maps the largest weight of a group
# to the largest level. With a scale above 1 this weight gets the second level from an end, or the end of the shorter
# codebook. With a scale below 1 it is clipped, which pays in large groups. The starts were picked greedily on trained
# weights. All of 24 starts between 0.56 and 1.28 lower the error by less than 0.5 % more.
SCALE_STARTS = {
    16: (1.0, 1.16, 1.08, 0.94, 1.24, 0.88),
    32: (1.0, 1.12, 0.94, 0.88, 1.06, 0.82),
    128: (0.94, 1.0, 0.88, 0.82, 1.04, 0.75),
}

# The nearest level is looked up in a table over [-128, 128) with this many cells per level unit. The levels of a
# written codec are integers, so the boundaries between them are half-integers and the table is exact. While codebooks
# are being fitted, a boundary is off by at most one cell.
CELLS_PER_UNIT = 8
CELLS = 256 * CELLS_PER_UNIT

# Weights per chunk: enough that starting threads or kernels costs nothing, and few enough that the temporary arrays
# are small.
CHUNK_WEIGHTS = {"cpu": 1 << 20, "cuda": 1 << 22}


def row_chunks(rows: Tensor) -> list[slice]:
    """Return slices of the first dimension of `rows` [N, K] that bound the memory of a search over each."""
    step = max(1, CHUNK_WEIGHTS.get(rows.device.type, 1 << 20) // rows.shape[-1])
    return [slice(start, start + step) for start in range(0, len(rows), step)]


def scale_starts(group_size: int, device: torch.device | str = "cpu") -> Tensor:
    """Return float32 [n]: the scales that the search tries first, for a group whose largest weight is 1."""
    return torch.tensor(SCALE_STARTS[group_size], device=device) / MAX_LEVEL


@dataclass(frozen=True)
class Grid:
    """The values that the weights of one tensor can take, as tables on the device of the search.

    levels         float32 [2, 16], each row ascending (stock types have up to 256 levels)
    scales         float32 [n_scale_codes], S(i), with S(0) = 0
    nearest_index  uint8 [2 * CELLS], the index of the nearest level for each codebook and cell
    nearest_level  float32 [2 * CELLS], the value of this level
    starts         float32 [n], the scales that are tried first, for a group whose largest weight is 1;
                   None for those of `scale_starts`
    """

    levels: Tensor
    scales: Tensor
    nearest_index: Tensor
    nearest_level: Tensor
    starts: Tensor | None = None

    @staticmethod
    def from_levels(levels: Tensor, scales: Tensor, starts: Tensor | None = None) -> Grid:
        """Return the tables for levels float32 [2, 16] within [-127, 127] and scales float32 [n_scale_codes]."""
        centres = (torch.arange(CELLS, device=levels.device) + 0.5) / CELLS_PER_UNIT - 128
        boundaries = (levels[:, 1:] + levels[:, :-1]) / 2
        nearest = torch.stack([torch.bucketize(centres, b) for b in boundaries])
        tables = nearest.to(torch.uint8).reshape(-1), levels.gather(1, nearest).reshape(-1)
        return Grid(levels, scales, *tables, starts)

    @staticmethod
    def from_codec(codec: Codec, layout: AaacType, device: torch.device | str, unit: float = 1.0) -> Grid:
        """Return the tables for a codec, for weights that were divided by `unit`, a power of two."""
        levels = torch.from_numpy(codec.codebooks).to(device, torch.float32)
        scales = torch.from_numpy(codec.scales()[: layout.n_scale_codes]).to(device) / unit
        return Grid.from_levels(levels, scales)

    def scale_codes(self, scales: Tensor) -> Tensor:
        """Return the code of the nearest nonzero scale for each of `scales`, int64 of the same shape."""
        nonzero = self.scales[1:]
        return 1 + torch.bucketize(scales, (nonzero[1:] + nonzero[:-1]) / 2)

    def scale_borders(self) -> tuple[Tensor, int]:
        """Return the borders between neighbouring nonzero scales, and the number of steps of a bisection over them.

        The borders are padded with infinity to 2^steps - 1.
        """
        borders = (self.scales[2:] + self.scales[1:-1]) / 2
        n_steps = len(borders).bit_length()
        padding = borders.new_full(((1 << n_steps) - 1 - len(borders),), torch.inf)
        return torch.cat([borders, padding]), n_steps

    def cells(self, x: Tensor) -> Tensor:
        """Return the table cell of each of `x`, in level units, for codebook 0: int64. Add CELLS for codebook 1."""
        return (x * CELLS_PER_UNIT + CELLS / 2).clamp_(0, CELLS - 1).to(torch.int64)


@dataclass(frozen=True)
class Encoded:
    """The content of the blocks of some rows.

    indices      uint8 [N, K]
    selectors    uint8 [N, K / 16]
    scale_codes  int32 [N, K / group_size]
    """

    indices: Tensor
    selectors: Tensor
    scale_codes: Tensor
