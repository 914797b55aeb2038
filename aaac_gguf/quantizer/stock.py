"""llama.cpp's types with one scale for 16 or 32 weights.

They are made by the same search and error feedback as AAAC types, and every llama.cpp runs them.
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
from .grid import SCALE_STARTS, Encoded, Grid


def _float16() -> Tensor:
    """Return the finite float16 numbers from 0 up. The code of each is its bits."""
    return torch.arange(0x7C00, dtype=torch.int16).view(torch.float16).float()


def _power_of_two() -> Tensor:
    """Return the scales of MXFP4 from 2^-64 to 2^64. Others would overflow in the search."""
    return torch.cat([torch.zeros(1), torch.ldexp(torch.ones(129), torch.arange(-64, 65))])


def _float8() -> Tensor:
    """Return the scales of NVFP4: half of the unsigned float8 numbers with three mantissa bits."""
    codes = torch.arange(0x7F)
    exponent, mantissa = codes >> 3, codes & 7
    return torch.ldexp(mantissa + 8.0 * (exponent > 0), exponent.clamp_min(1) - 11)


def _nibbles(indices: U8) -> U8:
    """Pack indices [..., n] into bytes [..., n / 2], weight j low and j + n / 2 high."""
    low, high = np.split(indices & 15, 2, axis=-1)
    return low | high << 4


def _q5_0(indices: U8) -> U8:
    return np.concatenate([np.packbits(indices >> 4, axis=-1, bitorder="little"), _nibbles(indices)], axis=-1)


@dataclass(frozen=True)
class StockType:
    """The layout of one type.

    levels      ascending
    stretch     the factor by which the search multiplies levels, to use its range of [-128, 127]
    pack_group  packs indices of levels uint8 [..., group_size] into bytes
    scales      the scales from 0 up, by their code
    code_dtype  of a code in the file
    group_size  the weights that share a scale
    block_size  the weights of a block, which has the codes of its groups first
    first_code  the code of the least scale above 0
    spread      the power to which the scales are raised that the search tries first: above 1 if scales are far apart
    """

    levels: tuple[int, ...]
    stretch: int
    pack_group: Callable[[U8], U8]
    scales: Callable[[], Tensor] = _float16
    code_dtype: str = "<u2"
    group_size: int = 32
    block_size: int = 32
    first_code: int = 1
    spread: int = 1

    def grid(self, device: torch.device | str, unit: float) -> Grid:
        """Return the search tables for weights that were divided by `unit`, a power of two.

        Both codebooks are the same.
        """
        levels = torch.tensor(self.levels, dtype=torch.float32, device=device) * self.stretch
        starts = None
        if self.spread > 1:
            starts = torch.tensor(SCALE_STARTS[self.group_size], device=device) ** self.spread / levels[-1]
        return Grid.from_levels(levels.repeat(2, 1), self.scales().to(device) / self.stretch / unit, starts)

    def pack(self, encoded: Encoded) -> U8:
        """Return blocks uint8 [N, row bytes]."""
        n_rows = len(encoded.indices)
        codes = encoded.scale_codes.cpu().numpy()
        indices = encoded.indices.cpu().numpy().reshape(*codes.shape, self.group_size)
        if self.first_code > 1:  # the file has no scale of 0
            indices = np.where(codes[..., None] == 0, np.uint8(self.levels.index(0)), indices)
            codes = np.where(codes == 0, 0, codes + self.first_code - 1)
        codes = codes.astype(self.code_dtype)
        n_blocks = encoded.indices.numel() // self.block_size
        parts = codes.view(np.uint8).reshape(n_blocks, -1), self.pack_group(indices).reshape(n_blocks, -1)
        return np.concatenate(parts, axis=-1).reshape(n_rows, -1)


_MX_LEVELS = tuple(sorted(set(gguf.quants.MXFP4.kvalues)))
_MX_NIBBLES = np.array([gguf.quants.MXFP4.kvalues.index(level) for level in _MX_LEVELS], np.uint8)


def _mx_nibbles(indices: U8) -> U8:
    return _nibbles(_MX_NIBBLES[indices])


STOCK_TYPES = {
    T.Q4_0: StockType(tuple(range(-8, 8)), 15, _nibbles),
    T.Q5_0: StockType(tuple(range(-16, 16)), 8, _q5_0),
    T.IQ4_NL: StockType(gguf.quants.IQ4_NL.kvalues, 1, _nibbles),
    T.Q8_0: StockType(tuple(range(-127, 128)), 1, lambda indices: indices - np.uint8(127)),
    T.MXFP4: StockType(_MX_LEVELS, 8, _mx_nibbles, _power_of_two, "u1", first_code=64, spread=4),
    T.NVFP4: StockType(_MX_LEVELS, 8, _mx_nibbles, _float8, "u1", 16, 64, spread=2),
}
