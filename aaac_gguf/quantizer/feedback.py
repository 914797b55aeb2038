"""Error feedback with the second moments of a layer, of the GPTQ / LDLQ family, with searched scales and two codebooks.

The output error of the layer is `tr(E H E^T)` with `E = W - Q` and `H = E[x x^T]`. Let `H = R R^T` with R upper
triangular (Cholesky from the last column on). Then the error is `|E R|^2`, and column j of `E R` knows the errors of
columns up to j only. So columns are quantized from left to right. The target of column j is
`w_j + sum_{i<j} e_i R_ij / R_jj`, which makes up for the errors before it, and what is left of it counts `R_jj^2`.

A group is decided at once. Several scales and both codebooks are tried with feedback inside the group, and the
candidate of least error is kept. Groups of the most active columns come first: their errors can still be made up for.

If the second moment O of the loss's gradient at the outputs of the layer is known too, the error is
`tr(O (W - Q) H (W - Q)^T)`. Then rows are fed back as columns are: the error of a block of rows moves the later rows by
the factor of O, before they are encoded (YAQA, Tseng et al., 2025).

At the end a sweep decides every group again with all other groups fixed, those of all other blocks of rows too. This is
coordinate descent on the same error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

import torch
from torch import Tensor

from .columns import AnyColumns, FeedbackSearch, LayerMetrics, column_blocks
from .grid import Encoded
from .moments import Factor, factor

OUTPUT_DAMPING = 0.6  # as DAMPING, for O, which differs more from text to text
SWEEPS = 1  # a second one lowers the error by 0.6 % more

# With O, rows of one block do not see each other's errors. With so many blocks, 15 of 16 pairs of rows do.
_ROW_BLOCKS = 16

# Without O rows are independent. On a CPU, the candidates for one group of so many rows fit the cache.
_CHUNK_ROWS = {"cpu": 512}


def feedback(
    weight: Tensor,
    inputs: Factor,
    search: FeedbackSearch[AnyColumns],
    outputs: Tensor | None = None,
    sweeps: int = SWEEPS,
) -> Encoded:
    """Encode `weight` float32 [N, K] for least error under `inputs`, the damped H, and O, if it is given.

    search: the search over the grid of the tensor, by any backend. outputs: O [N, N] as it was measured.
    """
    groups = inputs.hessian.diagonal().view(-1, search.group_size).sum(1).argsort(descending=True, stable=True)
    order = torch.arange(weight.shape[1], device=weight.device).view(-1, search.group_size)[groups].view(-1)
    metrics = LayerMetrics(inputs.reordered(order), search.group_size)

    def decide(rows: Tensor, numbers: Tensor) -> tuple[Tensor, AnyColumns]:
        w = rows.T.contiguous()
        columns = search.undecided(w, numbers, groups)
        _decide_columns(w, columns, metrics, search)
        return columns.q.T, columns

    def sweep(rows: Tensor, columns: AnyColumns) -> Tensor:
        _sweep_columns(rows.T.contiguous(), columns, metrics, search)
        return columns.q.T

    parts, rows = _in_row_blocks(weight[:, order], outputs, decide, sweep, sweeps)
    encoded = [part.in_order(groups.argsort()).encoded(search.grid) for part in parts]
    return Encoded(*(torch.cat([getattr(part, field.name) for part in encoded])[rows] for field in fields(Encoded)))


def _decide_columns(
    weight: Tensor, columns: AnyColumns, metrics: LayerMetrics, search: FeedbackSearch[AnyColumns]
) -> None:
    """Decide all columns of some rows, `weight` [K, N]."""
    errors = torch.empty_like(weight)
    for block in column_blocks(len(weight)):
        search.feed_back(columns, metrics, block, weight[block] + metrics.inputs.move(block, errors[: block.start]))
        errors[block] = weight[block] - columns.q[block]


def _sweep_columns(
    weight: Tensor, columns: AnyColumns, metrics: LayerMetrics, search: FeedbackSearch[AnyColumns]
) -> None:
    """Decide all columns of some rows again, `weight` [K, N], each group with the others as they are."""
    gradient = metrics.hessian @ (weight - columns.q)
    for block in column_blocks(len(weight)):
        before = columns.q[block].clone()
        search.sweep(columns, metrics, block, gradient[block])
        change = columns.q[block] - before
        gradient[block.stop :].addmm_(metrics.hessian[block.stop :, block], change, alpha=-1)


def _in_row_blocks(
    weight: Tensor,
    outputs: Tensor | None,
    decide: Callable[[Tensor, Tensor], tuple[Tensor, AnyColumns]],
    sweep: Callable[[Tensor, AnyColumns], Tensor],
    n_sweeps: int,
) -> tuple[list[AnyColumns], Tensor]:
    """Decide some rows of `weight` [N, K] at a time, with feedback between them if there are `outputs` O.

    `decide` takes rows as the errors of earlier rows have moved them, and their numbers. It returns what they decode to
    [n, K], and the decisions. `sweep` takes rows as the errors of all other rows move them, and their decisions, which
    it changes. It returns what they decode to. Return the decisions, and the order that sorts their rows.
    """
    n_rows = len(weight)
    if outputs is None:
        numbers = torch.arange(n_rows, device=weight.device)
        parts = []
        for chunk in numbers.split(_CHUNK_ROWS.get(weight.device.type, n_rows)):
            parts.append(decide(weight[chunk], chunk)[1])
            for _ in range(n_sweeps):
                sweep(weight[chunk], parts[-1])
        return parts, numbers

    order = _deal(outputs.diagonal().argsort(descending=True, stable=True), _ROW_BLOCKS)
    coupling = factor(outputs[order][:, order], OUTPUT_DAMPING)
    weight = weight[order]
    blocks = [slice(int(i[0]), int(i[-1]) + 1) for i in torch.arange(n_rows).split(-(-n_rows // _ROW_BLOCKS))]
    error, parts = torch.empty_like(weight), []
    for block in blocks:
        decoded, part = decide(weight[block] + coupling.move(block, error[: block.start]), order[block])
        error[block] = weight[block] - decoded
        parts.append(part)
    for _ in range(n_sweeps):
        for block, part in zip(blocks, parts, strict=True):
            # If nothing were rounded, the error of this block that suits the others best is -O_bb^-1 O_br E_r.
            o = coupling.hessian[block]
            pull = torch.linalg.solve(o[:, block], o @ error) - error[block]
            error[block] = weight[block] - sweep(weight[block] + pull, part)
    return parts, order.argsort()


def _deal(rows: Tensor, n_blocks: int) -> Tensor:
    """Return numbers of rows in an order in which the block that comes first has the first, the 17th, and so on.

    Neighbours are often coupled, as in one attention head. So they see each other's errors.
    """
    return torch.cat([rows[first::n_blocks] for first in range(min(n_blocks, len(rows)))])
