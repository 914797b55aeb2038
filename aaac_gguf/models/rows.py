"""Find the rows of a GGUF tensor in the model's parameter that it was made from."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowMap:
    """The places of a GGUF tensor's rows in a parameter.

    llama.cpp's converter permutes Q and K for its rotary embedding, and cuts fused projections apart. GPT-2 stores its
    matrices transposed.

    order       int64: by row of the tensor [..., K], the row of the parameter, leading dimensions flattened
    transposed  whether these are rows of the transposed parameter
    """

    order: Tensor
    transposed: bool

    @classmethod
    def find(cls, parameter: Tensor, weight: Tensor) -> RowMap | None:
        """Look up the rows of a tensor `weight` [..., K] by their values.

        The converter rounds a parameter of another dtype than most have. Return None if the parameter lacks a row even
        when rounded: then the converter changed the values.
        """
        wanted = weight.float().cpu().reshape(-1, weight.shape[-1])
        for dtype, transposed in itertools.product((torch.float32, torch.bfloat16, torch.float16), (False, True)):
            values = _oriented(parameter.detach(), transposed).to(dtype).float().cpu()
            if values.shape[-1] != wanted.shape[-1]:
                continue
            order = _find_rows(values.reshape(-1, values.shape[-1]), wanted)
            if order is not None:
                return cls(order, transposed)
        return None

    def of_outputs(self, outputs: Tensor) -> Tensor:
        """Reorder the second moments of the parameter's outputs [N, N] to those of the tensor's outputs."""
        order = self.order.to(outputs.device)
        return outputs[order][:, order]

    def replace(self, parameter: Tensor, weight: Tensor) -> None:
        """Give the parameter the values `weight` [..., K] in the tensor's rows."""
        values = _oriented(parameter.data, self.transposed)
        order = self.order.to(values.device)
        index = (order,) if values.dim() == 2 else (order // values.shape[1], order % values.shape[1])
        values[index] = weight.reshape(-1, weight.shape[-1]).to(values)


def _oriented(parameter: Tensor, transposed: bool) -> Tensor:
    return parameter.transpose(-2, -1) if transposed else parameter


def _find_rows(rows: Tensor, wanted: Tensor) -> Tensor | None:
    """Return the index in `rows` of each row of `wanted`, int64; None if one is missing.

    Equal rows are taken in turn.
    """
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
