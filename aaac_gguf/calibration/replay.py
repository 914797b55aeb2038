"""Run a block again and again without computing what stays the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# What takes most of a block's time. A product of two activations is not among it: attention's scores would fill memory.
_KEPT = {
    torch.nn.functional.linear,
    torch.addmm,
    torch.nn.functional.scaled_dot_product_attention,
    getattr(torch, "_grouped_mm", None),
    getattr(torch.nn.functional, "grouped_mm", None),
} - {None}


class Replay(TorchFunctionMode):
    """While active, gives a block's first products and attention the outputs of earlier runs on the same inputs.

    The weights of the other products may change between two runs.
    """

    def __init__(self) -> None:
        super().__init__()
        # With their versions: an output that the block has changed in place is computed again.
        self._outputs: list[tuple[Tensor, int]] = []
        self._position = 0
        self._is_final: Callable[[], bool] = lambda: False

    def again(self, is_final: Callable[[], bool]) -> Replay:
        """Begin another run. After each product, `is_final` tells whether later runs may have its output."""
        self._position, self._is_final = 0, is_final
        return self

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _KEPT:
            return func(*args, **kwargs)
        position, self._position = self._position, self._position + 1
        if position < len(self._outputs):
            out, version = self._outputs[position]
            if out._version == version:
                return out
        out = func(*args, **kwargs)
        if self._is_final():
            self._outputs[position : position + 1] = [(out, out._version)]
        return out
