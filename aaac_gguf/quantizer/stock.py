"""Q4_0, IQ4_NL and Q8_0, llama.cpp's types of 32 weights with a float16 scale.

They are made by the same search and error feedback as AAAC types, and every llama.cpp runs them.
"""

from __future__ import annotations

from dataclasses import dataclass

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as T
from numpy.typing import NDArray

from .grid import Encoded, Grid

GROUP_SIZE = 32
_FLOAT16_CODES = 0x7C00  # the finite float16 values from 0 up; the code of each is its bits


@dataclass(frozen=True)
class StockType:
    """The layout of one type.

    levels   ascending
    stretch  the factor by which the search multiplies levels, to use its range of [-127, 127]
    """

    levels: tuple[int, ...]
    stretch: int
    group_size: int = GROUP_SIZE

    def grid(self, device: torch.device | str, unit: float) -> Grid:
        """Return the search tables for weights that were divided by `unit`, a power of two.

        Scale codes are the bits of float16 numbers, and both codebooks are the same.
        """
        levels = torch.tensor(self.levels, dtype=torch.float32, device=device) * self.stretch
        scales = (
            torch.arange(_FLOAT16_CODES, dtype=torch.int16).view(torch.float16).to(device, torch.float32) / self.stretch
        )
        return Grid.from_levels(levels.repeat(2, 1), scales / unit)

    def pack(self, encoded: Encoded) -> NDArray[np.uint8]:
        """Return blocks uint8 [N, row bytes].

        A block is the scale, and then either indices as nibbles (weight j low, j + 16 high), or levels as bytes.
        """
        n_rows = len(encoded.indices)
        d = encoded.scale_codes.cpu().numpy().astype("<u2")[..., None].view(np.uint8)
        indices = encoded.indices.cpu().numpy().reshape(n_rows, -1, GROUP_SIZE)
        if len(self.levels) == 16:
            qs = indices[..., :16] | indices[..., 16:] << 4
        else:
            qs = (indices.astype(np.int16) + self.levels[0]).astype(np.int8).view(np.uint8)
        return np.concatenate([d, qs], axis=-1).reshape(n_rows, -1)


STOCK_TYPES = {
    T.Q4_0: StockType(tuple(range(-8, 8)), 15),
    T.IQ4_NL: StockType(gguf.quants.IQ4_NL.kvalues, 1),
    T.Q8_0: StockType(tuple(range(-127, 128)), 1),
}
