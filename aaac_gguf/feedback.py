"""Error feedback with the full second moment of the activations, the GPTQ / LDLQ family, for groups with searched scales and two codebooks.

The layer's output error is `tr((W - Q) H (W - Q)^T)` with `H = E[x x^T]`. With `H^-1 = U^T U`, U upper triangular, columns are quantized from left to
right, and the error of column j moves every later column by `-(w_j - q_j) U_jk / U_jj`, which is where the best later weights are once column j is
fixed. What remains of the error is `sum_j (w_j - q_j)^2 / U_jj^2`, so `1 / U_jj^2` is the weight under which scales and selectors are searched.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .encode import CELLS, Encoded, Grid, search
from .format import N_LEVELS, SELECTOR_SIZE, AaacType

DAMPING = 0.01  # of the mean of H's diagonal, added to the diagonal
_BLOCK = 128  # columns whose updates to the columns behind them are applied in one matrix product


def factor(hessian: Tensor, damping: float = DAMPING) -> tuple[Tensor, float]:
    """U upper triangular float32 [K, K] with (H + damping)^-1 = U^T U, and the damping that it took, relative to the mean of H's diagonal.

    hessian: [K, K], symmetric, positive semidefinite up to rounding. Channels that were never active get the mean diagonal and no neighbours: their
    weights are rounded for themselves. Damping grows tenfold until the factorisation holds, as for fewer tokens than channels.
    """
    h = hessian.to(torch.float64, copy=True)
    diagonal = h.diagonal()
    dead = diagonal <= 0
    mean = diagonal[~dead].mean() if not bool(dead.all()) else h.new_ones(())
    h[dead] = 0
    h[:, dead] = 0
    diagonal[dead] = mean
    h /= mean  # any overall factor leaves the updates as they are; this one keeps 1 / U_jj^2 near 1
    while True:
        # H = R R^T with R upper triangular is the Cholesky factorisation from the last column to the first; U = R^-1.
        damped = h + damping * torch.eye(len(h), dtype=h.dtype, device=h.device)
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not int(failed):
            break
        damping *= 10
    identity = torch.eye(len(h), dtype=h.dtype, device=h.device)
    return torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True).float(), damping


def feedback(weight: Tensor, u: Tensor, grid: Grid, qtype: AaacType) -> Encoded:
    """Encode `weight` float32 [N, K] with error feedback by `u` [K, K] from `factor`.

    At the start of each group its scale is searched for the weights as they then are; a later run of 16 in the group chooses its selector for it.
    """
    n_rows, n_per_row = weight.shape
    group_size = qtype.group_size
    w = weight.T.contiguous()  # columns are what is read and written: make them contiguous
    indices = torch.empty(n_per_row, n_rows, dtype=torch.uint8, device=weight.device)
    selectors = torch.empty(n_per_row // SELECTOR_SIZE, n_rows, dtype=torch.uint8, device=weight.device)
    codes = torch.empty(n_per_row // group_size, n_rows, dtype=torch.uint8, device=weight.device)
    conditional = u.diagonal().square().reciprocal()
    levels = grid.levels.reshape(-1)
    for start in range(0, n_per_row, _BLOCK):
        stop = min(start + _BLOCK, n_per_row)
        errors = torch.empty(stop - start, n_rows, device=weight.device)
        for run in range(start, stop, SELECTOR_SIZE):
            run_stop = run + SELECTOR_SIZE
            if run % group_size == 0:
                group = slice(run, run + group_size)
                code, second, _ = search(w[group].T.contiguous(), conditional[group], grid, group_size)
                codes[run // group_size] = code.to(torch.uint8)
                scale = grid.scales[code]
                inverse = torch.where(scale > 0, 1 / scale, torch.zeros_like(scale))
                book = second[:, 0].long()
            else:
                book = _best_book(w[run:run_stop] * inverse, conditional[run:run_stop], grid)
            selectors[run // SELECTOR_SIZE] = book.to(torch.uint8)
            for j in range(run, run_stop):
                index = grid.nearest_index[grid.cells(w[j] * inverse) + book * CELLS]
                indices[j] = index
                error = (w[j] - scale * levels[book * N_LEVELS + index]) / u[j, j]
                errors[j - start] = error
                if j + 1 < run_stop:
                    w[j + 1 : run_stop].addr_(u[j, j + 1 : run_stop], error, alpha=-1)
            w[run_stop:stop].addmm_(u[run:run_stop, run_stop:stop].T, errors[run - start : run_stop - start], alpha=-1)
        w[stop:].addmm_(u[start:stop, stop:].T, errors, alpha=-1)
    return Encoded(indices.T.contiguous(), selectors.T.contiguous(), codes.T.contiguous())


def _best_book(x: Tensor, error_weight: Tensor, grid: Grid) -> Tensor:
    """The better codebook, int64 [N], for 16 weights x [16, N] in units of their scale."""
    cells = grid.cells(x)
    errors = [(error_weight[:, None] * (x - grid.nearest_level[cells + r * CELLS]).square()).sum(0) for r in (0, 1)]
    return (errors[1] < errors[0]).long()


def output_error(difference: Tensor, hessian: Tensor) -> float:
    """tr(D H D^T) for D = `difference` float32 [N, K]: the mean squared error of the layer's outputs, summed over them."""
    return float(torch.linalg.vecdot(difference @ hessian.to(difference.dtype), difference).double().sum())
