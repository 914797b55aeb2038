"""Q6_K, llama.cpp's type for embeddings and output: the encoder that the gguf library lacks (it has the decoder)."""

from __future__ import annotations

import numpy as np
import torch

from .format import U8

QK_K = 256  # weights per super-block
GROUP_SIZE = 16  # weights per 8-bit scale
N_MAX = 32  # quants are -32 .. 31
CHUNK = 1 << 22  # weights at a time


def quantize_q6_k(weight: torch.Tensor) -> U8:
    """Q6_K blocks uint8 [..., K / 256 * 210] of weights [..., K], K a multiple of 256. Mirrors `quantize_row_q6_K_ref` in ggml-quants.c."""
    *outer, n_per_row = weight.shape
    blocks = weight.reshape(-1, QK_K)
    step = CHUNK // QK_K
    packed = [_quantize_blocks(blocks[i : i + step].float()) for i in range(0, len(blocks), step)]
    return np.concatenate(packed).reshape(*outer, n_per_row // QK_K * 210)


def _quantize_blocks(x: torch.Tensor) -> U8:
    groups = x.reshape(-1, QK_K // GROUP_SIZE, GROUP_SIZE)
    scales = _best_scales(groups)
    # The scale of largest magnitude becomes -128 so that int8's longer side is used.
    extreme = scales.gather(1, scales.abs().argmax(1, keepdim=True))
    d = (extreme / -128).half()
    inv_d = torch.where(d == 0, 0.0, 1 / d.float())
    codes = (scales * inv_d).round().clamp(-128, 127)
    step = d.float() * codes
    inv_step = torch.where(step == 0, 0.0, 1 / step)
    q = ((groups * inv_step[..., None]).round().clamp(-N_MAX, N_MAX - 1) + N_MAX).to(torch.uint8)

    q1, q2, q3, q4 = q.reshape(-1, 2, 4, 32).unbind(2)  # each half of 128: four runs of 32 that share bytes
    low = torch.cat([q1 & 15 | (q3 & 15) << 4, q2 & 15 | (q4 & 15) << 4], dim=-1)
    high = q1 >> 4 | q2 >> 4 << 2 | q3 >> 4 << 4 | q4 >> 4 << 6
    parts = [low.flatten(1), high.flatten(1), codes.to(torch.int8).view(torch.uint8), d.view(torch.uint8)]
    return torch.cat(parts, dim=1).cpu().numpy()


def _best_scales(groups: torch.Tensor) -> torch.Tensor:
    """Per group of 16 the scale of least squared error weighted by x^2, of 19 candidates around the largest weight: `make_qx_quants`."""
    extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    weight = groups * groups
    best = torch.zeros_like(extreme)
    best_gain = torch.zeros_like(extreme)
    for shift in range(-9, 10):
        inv = torch.where(extreme == 0, 0.0, -(N_MAX + 0.1 * shift) / extreme)
        q = (groups * inv).round().clamp(-N_MAX, N_MAX - 1)
        dot = (weight * groups * q).sum(-1, keepdim=True)
        norm = (weight * q * q).sum(-1, keepdim=True)
        gain = torch.where(norm > 0, dot * dot / norm, 0.0)
        best = torch.where(gain > best_gain, dot / norm, best)
        best_gain = torch.maximum(gain, best_gain)
    return best.squeeze(-1)
