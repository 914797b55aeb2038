"""Record what a block multiplies its parameters with, and sum second moments of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from ..models.blocks import StopForward
from ..quantizer.moments import Moments
from .activations import Products

# A parameter with more outputs has no O: that of a vocabulary of 128,256 would take 61 GiB.
MAX_OUTPUTS = 1 << 15

# Inputs [tokens, K] by parameter name and expert (0 for a parameter without experts).
LayerInputs = dict[tuple[str, int], Tensor]


class InputRecorder(Products):
    """Keeps the inputs of parameters while a block runs, and sums g g^T of their output gradients g in a backward pass.

    inputs         of the sequences that run; the caller empties it before each batch
    outputs        float32 [N, N] by parameter: the sum of g g^T
    same_input_as  by parameter, in the order of the products: the first parameter with the same inputs, which may be
                   itself. For Q, K and V it is Q. Only this first one is in `inputs`.
    """

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], wanted: Collection[str], last: str | None = None):
        """Record the parameters `wanted`; stop the forward pass at the parameter `last`, if given."""
        super().__init__(parameters, self._record)
        self.wanted, self.last = wanted, last
        self.dims = {name: p.dim() for name, p in parameters.items()}
        self.inputs: LayerInputs = {}
        self.outputs: dict[str, Tensor] = {}
        self.same_input_as: dict[str, str] = {}
        self._product: str | None = None  # the 2-D parameter of the product that runs

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._product = None
        out = super().__torch_function__(func, types, args, kwargs)
        if (name := self._product) and self.has_rows and out.requires_grad and out.shape[-1] <= MAX_OUTPUTS:
            out.register_hook(lambda g: self._add_gradient(name, g.detach().reshape(-1, g.shape[-1])))
        return out

    def _record(self, name: str, expert: int, inputs: Tensor) -> None:
        if name not in self.wanted:
            return
        if self.dims[name] == 2:
            self._product = name
            matrices = (first for first, _ in reversed(self.inputs) if self.dims[first] == 2)
            if first := next(matrices, None):
                latest = self.inputs[first, 0]
                # `self.inputs` keeps its tensors alive, so an equal address is the same tensor.
                if latest.data_ptr() == inputs.data_ptr() and latest.shape == inputs.shape:
                    self.same_input_as[name] = first
                    return
        self.same_input_as[name] = name
        seen = self.inputs.get((name, expert))
        self.inputs[name, expert] = inputs if seen is None else torch.cat([seen, inputs])
        if name == self.last:
            raise StopForward(inputs)

    def _add_gradient(self, name: str, g: Tensor) -> None:
        add_product(self.outputs, name, g, g)


class InputSums:
    """Sums over tokens of x x^T, and of the drift (x_full - x) x^T, for the inputs x of one parameter.

    squares  float32 [K, K] by expert (0 for a parameter without experts); an expert that no token reached is missing
    drift    float32 [K, K] under the key 0
    counts   the tokens, by expert
    """

    def __init__(self, parameter: Tensor):
        """parameter: [N, K], or [E, N, K] for E experts."""
        self.has_experts = parameter.dim() == 3
        self.squares: dict[int, Tensor] = {}
        self.drift: dict[int, Tensor] = {}
        self.counts = [0] * (len(parameter) if self.has_experts else 1)

    def add(self, expert: int, x: Tensor, full: Tensor | None = None) -> None:
        """Add the inputs x [tokens, K] of an expert.

        full: the same tokens' inputs in the full model. With experts it is ignored: the router may have chosen other
        tokens there.
        """
        add_product(self.squares, expert, x, x)
        self.counts[expert] += len(x)
        if full is not None and not self.has_experts:
            add_product(self.drift, expert, full - x, x)

    def moments(self, n_tokens: int) -> Moments:
        """Return the means: moments without `outputs`. n_tokens: of all sequences."""
        zero = torch.zeros_like(next(iter(self.squares.values())))
        means = [self.squares[e] / count if e in self.squares else zero for e, count in enumerate(self.counts)]
        inputs = torch.stack(means) if self.has_experts else means[0]
        return Moments(inputs, None, self.drift[0] / self.counts[0] if self.drift else None, n_tokens)


def add_product(sums: dict[Any, Tensor], key: Any, a: Tensor, b: Tensor) -> None:
    """Add a^T b to the float32 sum under `key`, for a [n, K] and b [n, M] of any floating-point type.

    On a CPU a product of bfloat16 numbers is rounded to bfloat16, once per batch. This is 1e-3 of a sum in the end;
    damping adds 3e-2.
    """
    if a.is_cuda and a.dtype != torch.float32:
        product = torch.mm(a.T, b, out_dtype=torch.float32)
    else:
        product = a.T @ b if a is not b or a.is_cuda else _square(a)
    if key not in sums:
        sums[key] = torch.zeros(product.shape, device=product.device)
    sums[key].add_(product)


def _square(a: Tensor) -> Tensor:
    """Return a^T a for a [n, K]. Stripes of its lower triangle are little more than half of the work."""
    square = a.new_empty(a.shape[1], a.shape[1])
    for stripe in torch.arange(a.shape[1]).chunk(8):
        first, end = int(stripe[0]), int(stripe[-1]) + 1
        square[first:end, :end] = a[:, first:end].T @ a[:, :end]
        square[:first, first:end] = square[first:end, :first].T
    return square
