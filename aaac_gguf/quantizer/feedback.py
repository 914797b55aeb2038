"""Error feedback with the second moments of a layer, of the GPTQ / LDLQ family, with searched scales and two codebooks.

The output error of the layer is `tr((W - Q) H (W - Q)^T)` with `H = E[x x^T]`. Let `H^-1 = U^T U` with U upper
triangular. Columns are quantized from left to right. The error of column j moves every later column k by
`-(w_j - q_j) U_jk / U_jj`: these are the best later weights once column j is fixed. The remaining error is
`sum_j (w_j - q_j)^2 / U_jj^2`.

A group is decided at once. Several scales and both codebooks are tried with feedback inside the group, and the
candidate of least error is kept. After the last column, sweeps decide every group again with all other groups fixed.
This is coordinate descent on the same error.

If the second moment O of the loss's gradient at the outputs of the layer is known too, the error is
`tr(O (W - Q) H (W - Q)^T)`. Then rows are fed back as columns are: the error of a block of rows moves the later rows by
the factor of O, before they are encoded (YAQA, Tseng et al., 2025).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import TypeVar

import torch
from torch import Tensor

from .backends import Backend
from .columns import Columns, LayerMetrics, column_blocks
from .grid import Encoded
from .kquants import Steps
from .moments import Factor, factor
from .search import TorchSearch

OUTPUT_DAMPING = 0.6  # as DAMPING, for O, which differs more from text to text
SWEEPS = 1  # the first lowers the error by 6 to 10 %, a second one by 2 % more

# With O, rows of one block do not see each other's errors. With so many blocks, 15 of 16 pairs of rows do.
_ROW_BLOCKS = 16

# Without O rows are independent. On a CPU, the candidates for one group of so many rows fit the cache.
_CHUNK_ROWS = {"cpu": 512}


def feedback(
    weight: Tensor, inputs: Factor, search: TorchSearch, outputs: Tensor | None = None, sweeps: int = SWEEPS
) -> Encoded:
    """Encode `weight` float32 [N, K] for least error under `inputs`, the factored H, and O, if it is given.

    search: the search over the grid of the tensor, by any backend. outputs: O [N, N] as it was measured.
    """
    metrics = LayerMetrics(inputs, search.group_size)

    def encode(rows: Tensor, _: Tensor) -> tuple[Tensor, Encoded]:
        columns = _decide_columns(rows.T.contiguous(), metrics, search, sweeps)
        return columns.q.T, columns.encoded(search.grid)

    parts, order = _in_row_blocks(weight, outputs, encode)
    joined = (torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Encoded))
    return Encoded(*(values[order] for values in joined))


def _decide_columns(weight: Tensor, metrics: LayerMetrics, search: TorchSearch, sweeps: int) -> Columns:
    """Decide all columns of some rows, `weight` [K, N]."""
    columns = Columns.undecided(weight, search.group_size)
    blocks = column_blocks(len(weight))
    moved = weight.clone()
    for block in blocks:
        errors = search.feed_back(columns, metrics, block, moved[block])
        moved[block.stop :].addmm_(metrics.u[block, block.stop :].T, errors, alpha=-1)
    for _ in range(sweeps):
        gradient = metrics.hessian @ (weight - columns.q)
        for block in blocks:
            before = columns.q[block].clone()
            search.sweep(columns, metrics, block, gradient[block])
            change = columns.q[block] - before
            gradient[block.stop :].addmm_(metrics.hessian[block.stop :, block], change, alpha=-1)
    return columns


def feedback_on_steps(
    weight: Tensor, inputs: Factor, steps: Steps, table: Tensor, backend: Backend, outputs: Tensor | None = None
) -> Tensor:
    """Return levels int8 [N, K] for `weight` float32 [N, K], for scales that are chosen already.

    table: the nearest level for each cell. The moments are given as for `feedback`.
    """
    u = inputs.u

    def encode(rows: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        w = rows.T.clone(memory_format=torch.contiguous_format)
        levels = torch.empty(w.shape, dtype=torch.int8, device=w.device)
        chosen = steps.of_rows(numbers)
        by_run = [t.T.contiguous() for t in chosen.products]
        size = len(w) // len(by_run[0])
        for block in column_blocks(len(w)):
            runs = slice(block.start // size, block.stop // size)
            errors = backend.round_to_steps(w[block], u[block, block], [t[runs] for t in by_run], table, levels[block])
            w[block.stop :].addmm_(u[block, block.stop :].T, errors, alpha=-1)
        by_row = levels.T.contiguous()
        return chosen.weights(by_row), by_row

    parts, order = _in_row_blocks(weight, outputs, encode)
    return torch.cat(parts)[order]


_Part = TypeVar("_Part")


def _in_row_blocks(
    weight: Tensor, outputs: Tensor | None, encode: Callable[[Tensor, Tensor], tuple[Tensor, _Part]]
) -> tuple[list[_Part], Tensor]:
    """Encode some rows of `weight` [N, K] at a time, with feedback between them if there are `outputs` O.

    `encode` takes rows as the errors of earlier rows have moved them, and their numbers. It returns what they decode to
    [n, K], and the encoding. Return the encodings, and the order that sorts their rows.
    """
    n_rows = len(weight)
    numbers = torch.arange(n_rows, device=weight.device)
    if outputs is None:
        size = _CHUNK_ROWS.get(weight.device.type, n_rows)
        chunks = zip(weight.split(size), numbers.split(size), strict=True)
        return [encode(rows, chunk)[1] for rows, chunk in chunks], numbers

    # A block takes every 16th row. Neighbours are often coupled (one attention head); so they see each other's errors.
    order = torch.cat([numbers[first::_ROW_BLOCKS] for first in range(min(_ROW_BLOCKS, n_rows))])
    u = factor(outputs[order][:, order], OUTPUT_DAMPING).u
    target = weight[order]
    parts = []
    for index in torch.arange(n_rows).split(-(-n_rows // _ROW_BLOCKS)):
        block = slice(int(index[0]), int(index[-1]) + 1)
        q, part = encode(target[block], order[block])
        parts.append(part)
        error = torch.linalg.solve_triangular(u[block, block].T, target[block] - q, upper=False)
        target[block.stop :].addmm_(u[block, block.stop :].T, error, alpha=-1)
    return parts, order.argsort()
