"""The bytes of llama.cpp's types with super-blocks of 256 weights, or with blocks of 32 and an offset.

Each function packs indices of levels uint8 [B, 256 or 32], codes uint8 [B, 256 / run, 1 or 2] of scales and offsets,
and the bytes of the float16 numbers [B, 2 or 4] that these are multiplied by, into blocks uint8 [B, bytes].
"""

from __future__ import annotations

import torch
from torch import Tensor


def _bits(fields: Tensor, n_bits: int) -> Tensor:
    """Put fields uint8 [B, n, m] of `n_bits` each into bytes [B, m], the first field lowest."""
    shifts = n_bits * torch.arange(fields.shape[1], dtype=torch.uint8, device=fields.device)
    return (fields << shifts[:, None]).sum(1, dtype=torch.uint8)


def _nibbles(indices: Tensor, run: int) -> Tensor:
    """Pack the low four bits of indices: of every two runs, the second has the high half of the bytes."""
    return _bits((indices & 15).view(-1, 2, run), 4).view(len(indices), -1)


def _pairs(indices: Tensor) -> Tensor:
    """Pack the low two bits of indices: of every 128, four runs of 32 share bytes."""
    return _bits((indices & 3).view(-1, 4, 32), 2).view(len(indices), -1)


def _six_bits(codes: Tensor) -> Tensor:
    """Pack eight scales and eight offsets, uint8 [B, 8, 2], into 12 bytes: the inverse of `get_scale_min_k4`."""
    first, last = codes[:, :4], codes[:, 4:]
    low = (first | last >> 4 << 6).transpose(1, 2).flatten(1)
    return torch.cat([low, last[..., 0] & 15 | (last[..., 1] & 15) << 4], 1)


def q2_k(indices: Tensor, codes: Tensor, halves: Tensor) -> Tensor:
    return torch.cat([codes[..., 0] | codes[..., 1] << 4, _pairs(indices), halves], 1)


def q3_k(indices: Tensor, codes: Tensor, halves: Tensor) -> Tensor:
    six = codes[..., 0] + 32
    scales = _bits((six & 15).view(-1, 2, 8), 4), _bits((six >> 4).view(-1, 4, 4), 2)
    return torch.cat([_bits((indices >> 2).view(-1, 8, 32), 1), _pairs(indices), *scales, halves], 1)


def q4_k(indices: Tensor, codes: Tensor, halves: Tensor) -> Tensor:
    return torch.cat([halves, _six_bits(codes), _nibbles(indices, 32)], 1)


def q5_k(indices: Tensor, codes: Tensor, halves: Tensor) -> Tensor:
    fifth = _bits((indices >> 4).view(-1, 8, 32), 1)
    return torch.cat([halves, _six_bits(codes), fifth, _nibbles(indices, 32)], 1)


def q6_k(indices: Tensor, codes: Tensor, halves: Tensor) -> Tensor:
    high = _bits((indices >> 4).view(-1, 4, 32), 2).view(len(indices), -1)
    return torch.cat([_nibbles(indices, 64), high, codes[..., 0], halves], 1)


def iq4_xs(indices: Tensor, codes: Tensor, halves: Tensor) -> Tensor:
    six = codes[..., 0] + 32
    high = _bits((six >> 4).view(-1, 2, 4).transpose(1, 2), 2)
    low = _bits((six & 15).view(-1, 4, 2).transpose(1, 2), 4)
    return torch.cat([halves, high, low, _nibbles(indices, 16)], 1)


def _with_minimum(halves: Tensor) -> Tensor:
    """Return the bytes of a scale and of an offset with the offset negated."""
    return halves ^ torch.tensor([0, 0, 0, 0x80], dtype=torch.uint8, device=halves.device)


def q4_1(indices: Tensor, codes: Tensor, halves: Tensor) -> Tensor:
    return torch.cat([_with_minimum(halves), _nibbles(indices, 16)], 1)


def q5_1(indices: Tensor, codes: Tensor, halves: Tensor) -> Tensor:
    fifth = _bits((indices >> 4).view(-1, 4, 8).transpose(1, 2), 1)
    return torch.cat([_with_minimum(halves), fifth, _nibbles(indices, 16)], 1)
