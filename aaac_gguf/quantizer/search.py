"""Scale codes, selectors and indices of least weighted error, for codebooks that are given.

Per group the search minimises `sum_k a_k (w_k - S(code) C[selector][index])^2` over all three at once. For a fixed scale the best indices are the
nearest levels and the best selectors follow from them; for fixed indices and selectors the best scale is a weighted least-squares quotient.
The search starts from a few scales around "the largest weight meets the largest level" and refits each once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..files.format import MAX_LEVEL, SELECTOR_SIZE
from .grid import CELLS, Encoded, Grid, scale_starts


def decode(encoded: Encoded, grid: Grid) -> Tensor:
    """Weights float32 [N, K]; bit for bit `format.decode`."""
    n_rows, n_per_row = encoded.indices.shape
    if grid.compiled:
        out = torch.empty(n_rows, n_per_row)
        n_groups = encoded.scale_codes.numel()
        kinds = (encoded.indices, torch.uint8), (encoded.selectors, torch.uint8), (encoded.scale_codes, torch.int32)
        parts = (t.to(dtype).contiguous() for t, dtype in kinds)
        grid.compiled.call(
            "aaac_decode",
            n_groups,
            out.numel() // n_groups,
            grid.levels.contiguous(),
            grid.levels.shape[1],
            *parts,
            out,
        )
        return out
    codebook = encoded.selectors.long().repeat_interleave(SELECTOR_SIZE, 1)
    levels = grid.levels.reshape(-1)[codebook * grid.levels.shape[1] + encoded.indices.long()]
    scales = grid.scales[encoded.scale_codes.long()]
    return (scales[..., None] * levels.view(n_rows, scales.shape[1], -1)).view(n_rows, n_per_row)


class _Groups:
    """Groups of one chunk: weights and error weights [G, g], seen as [G, g / 16, 16] for the selectors."""

    def __init__(self, weight: Tensor, error_weight: Tensor, group_size: int):
        self.w = weight.reshape(-1, group_size // SELECTOR_SIZE, SELECTOR_SIZE)
        self.a = error_weight.expand(weight.shape).reshape(self.w.shape)

    def at_scale(self, scale: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
        """For scale [G]: the error [G], the selectors bool [G, g / 16] and the least-squares scale [G] for the assignment found."""
        x = self.w * (1 / scale)[:, None, None]
        ax = x * self.a
        cells = grid.cells(x).reshape(-1)
        errors, products, squares = [], [], []
        for table in (grid.nearest_level[:CELLS], grid.nearest_level[CELLS:]):
            v = table.index_select(0, cells).view(x.shape)
            products.append(torch.linalg.vecdot(ax, v))
            squares.append(torch.linalg.vecdot(self.a * v, v))
            delta = v.sub_(x)
            errors.append(torch.linalg.vecdot(self.a * delta, delta))
        second = errors[1] < errors[0]
        error = torch.minimum(*errors).sum(1) * scale.square()
        product = torch.where(second, products[1], products[0]).sum(1)
        square = torch.where(second, squares[1], squares[0]).sum(1)
        return error, second, scale * product / square.clamp_min(torch.finfo(square.dtype).tiny)


def search(
    weight: Tensor, error_weight: Tensor, grid: Grid, group_size: int, n_starts: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Scale codes int64 [G], selectors bool [G, g / 16] and errors float32 [G] of the groups of `weight` [N, K], in row order.

    error_weight is a_k, float32, broadcastable to [N, K]; n_starts: how many of SCALE_STARTS are tried, all unless given.
    A group keeps code 0 (all zero) where no scale does better.
    """
    if grid.compiled:
        return _compiled_search(weight, error_weight, grid, group_size, n_starts)[:3]
    groups = _Groups(weight, error_weight, group_size)
    largest = groups.w.abs().amax((1, 2))
    best_error = torch.linalg.vecdot(groups.w * groups.a, groups.w).sum(1)
    best_code = torch.zeros_like(best_error, dtype=torch.int64)
    best_second = torch.zeros(groups.w.shape[:2], dtype=torch.bool, device=weight.device)
    for start in scale_starts(group_size, weight.device)[:n_starts]:
        code = grid.scale_codes(largest * start)
        for refit in (True, False):
            error, second, least_squares = groups.at_scale(grid.scales[code], grid)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_code = torch.where(better, code, best_code)
            best_second = torch.where(better[:, None], second, best_second)
            if refit:
                code = grid.scale_codes(least_squares)
    return best_code, best_second, best_error


def _compiled_search(
    weight: Tensor, error_weight: Tensor, grid: Grid, group_size: int, n_starts: int | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `search` returns, and the nearest levels' indices uint8 [G, g]."""
    assert grid.compiled
    w, a = groups_for_c(weight, error_weight, group_size)
    code = torch.empty(len(w), dtype=torch.int64)
    second = torch.empty(len(w), group_size // SELECTOR_SIZE, dtype=torch.bool)
    error = torch.empty(len(w))
    index = torch.empty(w.shape, dtype=torch.uint8)
    starts = scale_starts(group_size)[:n_starts]
    grid.compiled.call("aaac_search", len(w), group_size, w, a, starts, len(starts), code, second, error, index)
    return code, second, error, index


def groups_for_c(weight: Tensor, error_weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Weights and error weights as contiguous [G, group_size]."""
    return weight.reshape(-1, group_size).contiguous(), error_weight.expand(weight.shape).reshape(
        -1, group_size
    ).contiguous()


def nearest_indices(weight: Tensor, code: Tensor, second: Tensor, grid: Grid) -> Tensor:
    """Indices uint8, shaped as `weight` [N, K], of the nearest levels for given scale codes [G] and selectors bool [G, g / 16]."""
    scale = grid.scales[code]
    inverse = torch.where(scale > 0, 1 / scale, torch.zeros_like(scale))
    x = weight.reshape(*second.shape, SELECTOR_SIZE) * inverse[:, None, None]
    return grid.nearest_index[grid.cells(x) + second[..., None] * CELLS].view(weight.shape)


def encode_absmax(weight: Tensor, error_weight: Tensor, grid: Grid, group_size: int) -> Encoded:
    """As `encode`, with the paper's scales: each group's largest magnitude goes to the largest level, and only selectors and indices are chosen."""
    n_rows = len(weight)
    groups = _Groups(weight, error_weight, group_size)
    code = grid.scale_codes(groups.w.abs().amax((1, 2)) / MAX_LEVEL)
    _, second, _ = groups.at_scale(grid.scales[code], grid)
    indices = nearest_indices(weight, code, second, grid)
    return Encoded(indices, second.view(n_rows, -1).to(torch.uint8), code.view(n_rows, -1).to(torch.int32))


def encode(weight: Tensor, error_weight: Tensor, grid: Grid, group_size: int) -> Encoded:
    """The encoding of `weight` float32 [N, K] that the search finds; error_weight float32, broadcastable to [N, K], is not negative.

    Rows are searched all at once: the caller bounds their number (`row_chunks`).
    """
    n_rows = len(weight)
    if grid.compiled:
        code, second, _, found = _compiled_search(weight, error_weight, grid, group_size)
        indices = found.view(weight.shape)
    else:
        code, second, _ = search(weight, error_weight, grid, group_size)
        indices = nearest_indices(weight, code, second, grid)
    return Encoded(indices, second.view(n_rows, -1).to(torch.uint8), code.view(n_rows, -1).to(torch.int32))
