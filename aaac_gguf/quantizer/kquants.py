"""Q5_K and Q6_K, llama.cpp's types for tensors that deserve more than 4.5 bits. The gguf library only decodes them.

Scales are chosen first, from the weights as they are. Quants follow by rounding to nearest, or by error feedback
(`feedback.feedback_on_steps`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from gguf import GGMLQuantizationType as T
from torch import Tensor

from ..files.format import U8

QK_K = 256  # weights per super-block
_CHUNK = 1 << 22  # weights at a time


@dataclass(frozen=True)
class Steps:
    """The scales of some rows. A weight is `step * quant - offset`, with a quant from 0 to n_levels - 1.

    step, offset  float32 [N, K / run], one of each for `run` weights
    stored        the bytes of the blocks that hold them, uint8 [N, K / 256, bytes]
    """

    step: Tensor
    offset: Tensor
    run: int
    n_levels: int
    stored: Tensor

    @property
    def inverse(self) -> Tensor:
        """Return 1 / step, and 0 for a step of 0."""
        return torch.where(self.step == 0, 0.0, 1 / self.step)

    def quants(self, weight: Tensor) -> Tensor:
        """Return the nearest quants for weights [N, K], uint8 [N, K]."""
        runs = weight.reshape(*self.step.shape, self.run)
        return (
            ((runs + self.offset[..., None]) * self.inverse[..., None])
            .round()
            .clamp(0, self.n_levels - 1)
            .to(torch.uint8)
            .view(weight.shape)
        )

    def weights(self, quants: Tensor) -> Tensor:
        """Return the weights that quants [N, K] stand for, float32 [N, K]."""
        runs = quants.reshape(*self.step.shape, self.run).float()
        return (runs * self.step[..., None] - self.offset[..., None]).view(quants.shape)


@dataclass(frozen=True)
class KQuant:
    """The layout of one type.

    steps  chooses scales for weights [N, K] under error weights [N, K]
    pack   packs quants uint8 [B, 256] and stored scales [B, bytes] into blocks [B, block bytes]
    """

    steps: Callable[[Tensor, Tensor], Steps]
    pack: Callable[[Tensor, Tensor], Tensor]

    def packed(self, quants: Tensor, steps: Steps) -> U8:
        """Return blocks uint8 [N, row bytes] of quants uint8 [N, K]."""
        blocks = self.pack(quants.view(-1, QK_K), steps.stored.flatten(0, 1))
        return blocks.view(len(quants), -1).cpu().numpy()

    def round_to_nearest(self, weight: Tensor) -> U8:
        """Return blocks uint8 [..., row bytes] of weights [..., K], with K a multiple of 256.

        Each weight is rounded to the nearest step. For the choice of scales, an error counts with the weight's square.
        """
        *outer, n_per_row = weight.shape
        packed = []
        for rows in weight.reshape(-1, n_per_row).split(max(1, _CHUNK // n_per_row)):
            rows = rows.float()
            steps = self.steps(rows, rows.square())
            packed.append(self.packed(steps.quants(rows), steps))
        return np.concatenate(packed).reshape(*outer, -1)


def _q6_k_steps(weight: Tensor, error_weight: Tensor) -> Steps:
    """Choose 8-bit scales for 16 weights times a float16 for 256, as `quantize_row_q6_K_ref` in ggml-quants.c does."""
    groups, a = (t.reshape(-1, QK_K // 16, 16) for t in (weight, error_weight))
    scales = _symmetric_scales(groups, a)
    # The scale of largest magnitude becomes -128, so that the longer side of int8 is used.
    extreme = scales.gather(1, scales.abs().argmax(1, keepdim=True))
    d = (extreme / -128).half()
    inv_d = torch.where(d == 0, 0.0, 1 / d.float())
    codes = (scales * inv_d).round().clamp(-128, 127)
    step = (d.float() * codes).view(len(weight), -1)
    stored = torch.cat([codes.to(torch.int8).view(torch.uint8), d.view(torch.uint8)], 1)
    return Steps(step, 32 * step, 16, 64, stored.view(len(weight), -1, stored.shape[1]))


def _symmetric_scales(groups: Tensor, a: Tensor) -> Tensor:
    """Return the best of 19 scales around the largest weight for each group of 16, as `make_qx_quants` does."""
    extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    best = torch.zeros_like(extreme)
    best_gain = torch.zeros_like(extreme)
    for shift in range(-9, 10):
        inv = torch.where(extreme == 0, 0.0, -(32 + 0.1 * shift) / extreme)
        q = (groups * inv).round().clamp(-32, 31)
        dot = (a * groups * q).sum(-1, keepdim=True)
        norm = (a * q * q).sum(-1, keepdim=True)
        gain = torch.where(norm > 0, dot * dot / norm, 0.0)
        best = torch.where(gain > best_gain, dot / norm, best)
        best_gain = torch.maximum(gain, best_gain)
    return best.squeeze(-1)


def _q6_k_pack(quants: Tensor, stored: Tensor) -> Tensor:
    q1, q2, q3, q4 = quants.reshape(-1, 2, 4, 32).unbind(2)  # each half of 128: four runs of 32 that share bytes
    low = torch.cat([q1 & 15 | (q3 & 15) << 4, q2 & 15 | (q4 & 15) << 4], dim=-1)
    high = q1 >> 4 | q2 >> 4 << 2 | q3 >> 4 << 4 | q4 >> 4 << 6
    return torch.cat([low.flatten(1), high.flatten(1), stored], dim=1)


def _q5_k_steps(weight: Tensor, error_weight: Tensor) -> Steps:
    """Choose a 6-bit scale and a 6-bit offset for 32 weights, times two float16 for 256.

    Both are found by least squares for grids around the range of the weights, as `make_qkx3_quants` does.
    """
    groups, a = (t.reshape(-1, QK_K // 32, 32) for t in (weight, error_weight))
    a = a.clamp_min(torch.finfo(torch.float32).tiny)
    low, high = groups.amin(-1, keepdim=True).clamp_max(0), groups.amax(-1, keepdim=True)
    span = (high - low).clamp_min(torch.finfo(torch.float32).tiny)
    sw, swx = a.sum(-1, keepdim=True), (a * groups).sum(-1, keepdim=True)
    best = torch.full_like(span, torch.inf)
    scale, offset = torch.zeros_like(span), torch.zeros_like(span)
    for top in (31 + 0.1 * shift for shift in range(-9, 10)):
        q = ((groups - low) * (top / span)).round().clamp(0, 31)
        swq, swqq, swqx = (
            (a * q).sum(-1, keepdim=True),
            (a * q * q).sum(-1, keepdim=True),
            (a * q * groups).sum(-1, keepdim=True),
        )
        determinant = sw * swqq - swq * swq
        # x = s q - m by least squares. m is 0 if all weights have the same quant, or if it would be negative, which
        # llama.cpp cannot store.
        s, m = (sw * swqx - swx * swq) / determinant, (swq * swqx - swqq * swx) / determinant
        alone = (determinant <= 1e-6 * sw * swqq) | (m < 0)
        s, m = torch.where(alone, swqx / swqq.clamp_min(torch.finfo(torch.float32).tiny), s), torch.where(alone, 0.0, m)
        error = (a * (s * q - m - groups).square()).sum(-1, keepdim=True)
        better = (error < best) & (s >= 0)
        best = torch.where(better, error, best)
        scale, offset = torch.where(better, s, scale), torch.where(better, m, offset)
    codes, halves = zip(*(_six_bits(t.squeeze(-1)) for t in (scale, offset)), strict=True)
    step, shift = ((c.float() * d.float()).view(len(weight), -1) for c, d in zip(codes, halves, strict=True))
    stored = torch.cat([halves[0].view(torch.uint8), halves[1].view(torch.uint8), _pack_six_bits(*codes)], 1)
    return Steps(step, shift, 32, 32, stored.view(len(weight), -1, stored.shape[1]))


def _six_bits(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes uint8 [B, 8] and a float16 [B, 1] whose products are nearest to non-negative values [B, 8]."""
    d = (values.amax(1, keepdim=True) / 63).half()
    inverse = torch.where(d == 0, 0.0, 1 / d.float())
    return (values * inverse).round().clamp(0, 63).to(torch.uint8), d


def _pack_six_bits(scales: Tensor, offsets: Tensor) -> Tensor:
    """Pack eight scales and eight offsets, uint8 [B, 8] each, into 12 bytes: the inverse of `get_scale_min_k4`."""
    low_scales = scales[:, :4] | scales[:, 4:] >> 4 << 6
    low_offsets = offsets[:, :4] | offsets[:, 4:] >> 4 << 6
    return torch.cat([low_scales, low_offsets, scales[:, 4:] & 15 | (offsets[:, 4:] & 15) << 4], 1)


def _q5_k_pack(quants: Tensor, stored: Tensor) -> Tensor:
    q = quants.view(-1, 4, 2, 32)  # runs 2i and 2i + 1 share the bytes of run i
    low = q[:, :, 0] & 15 | (q[:, :, 1] & 15) << 4
    bits = (quants.view(-1, 8, 32) >> 4) << torch.arange(8, dtype=torch.uint8, device=quants.device)[:, None]
    high = bits.sum(1, dtype=torch.uint8)
    return torch.cat([stored, high, low.flatten(1)], dim=1)


KQUANTS = {T.Q5_K: KQuant(_q5_k_steps, _q5_k_pack), T.Q6_K: KQuant(_q6_k_steps, _q6_k_pack)}
