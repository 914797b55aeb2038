"""Find the rows of a GGUF tensor in the checkpoint's parameter that it was made of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowMap:
    """Where the rows of a GGUF tensor [..., K] are in the parameter that it was made of: `order` int64, in the parameter or in its transpose.

    llama.cpp's converter permutes Q and K for its rotary embedding and cuts fused projections apart; GPT-2 holds its matrices transposed.
    """

    order: Tensor
    transposed: bool

    @classmethod
    def find(cls, parameter: Tensor, weight: Tensor) -> RowMap | None:
        """Rows are known by their values; None where one is not found, since the converter changed the weights."""
        wanted = weight.float().cpu().reshape(-1, weight.shape[-1])
        for transposed in (False, True):
            values = _turned(parameter.detach(), transposed).float().cpu()
            if (
                values.shape[-1] == wanted.shape[-1]
                and (order := _places(values.reshape(-1, values.shape[-1]), wanted)) is not None
            ):
                return cls(order, transposed)
        return None

    def of_outputs(self, outputs: Tensor) -> Tensor:
        """Moments of the parameter's outputs [N, N] as those of the tensor's."""
        order = self.order.to(outputs.device)
        return outputs[order][:, order]

    def replace(self, parameter: Tensor, weight: Tensor) -> None:
        """Give the tensor's place in the parameter other values, `weight` [..., K]."""
        values = _turned(parameter.data, self.transposed)
        order = self.order.to(values.device)
        index = (order,) if values.dim() == 2 else (order // values.shape[1], order % values.shape[1])
        values[index] = weight.reshape(-1, weight.shape[-1]).to(values)


def _turned(parameter: Tensor, transposed: bool) -> Tensor:
    return parameter.transpose(-2, -1) if transposed else parameter


def _places(rows: Tensor, wanted: Tensor) -> Tensor | None:
    """Where in `rows` each row of `wanted` is, int64; None when one is nowhere. Equal rows are taken in turn."""
    if torch.equal(rows, wanted):
        return torch.arange(len(rows))
    places: dict[int, list[int]] = {}
    for place, row in enumerate(rows.contiguous().numpy()):
        places.setdefault(hash(row.tobytes()), []).append(place)
    order = []
    for row in wanted.contiguous().numpy():
        found = places.get(hash(row.tobytes()))
        if not found:
            return None
        order.append(found.pop(0) if len(found) > 1 else found[0])
    return torch.tensor(order)
