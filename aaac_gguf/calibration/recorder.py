"""Record what a block multiplies its parameters with, and sum second moments of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from ..models.blocks import StopForward, fast_products
from ..quantizer.moments import Moments, gram
from .activations import Products

# A parameter with more outputs has no O: that of a vocabulary of 128,256 would take 61 GiB.
MAX_OUTPUTS = 1 << 15

# The ways in which a block adds a product's output to what it has, which most often is the residual stream.
_ADDITIONS = (torch.add, torch.Tensor.add, torch.Tensor.__add__, torch.Tensor.__radd__)

# Inputs [tokens, K] by parameter name and expert (0 for a parameter without experts).
LayerInputs = dict[tuple[str, int], Tensor]


class InputRecorder(Products):
    """Keeps the inputs of parameters while a block runs, and sums g g^T of their output gradients g in a backward pass.

    inputs         of the sequences that run; the caller empties it before each batch
    outputs        float32 [N, N] by parameter: the sum of g g^T
    same_input_as  by parameter, in the order of the products: the first parameter with the same inputs, which may be
                   itself. For Q, K and V it is Q. Only this first one is in `inputs`.
    sums           [tokens, N] by parameter: the output together with what it is added to, if that is the next thing
                   that happens to it; of the sequences that run
    """

    def __init__(
        self,
        parameters: Mapping[str, torch.nn.Parameter],
        wanted: Collection[str],
        last: str | None = None,
        last_sum: str | None = None,
    ):
        """Record the parameters `wanted`.

        Stop the forward pass at the parameter `last`, or when the output of `last_sum` has been added to something.
        """
        super().__init__(parameters)
        self.wanted, self.last, self.last_sum = wanted, last, last_sum
        self.dims = {name: p.dim() for name, p in parameters.items()}
        self.inputs: LayerInputs = {}
        self.sums: dict[str, Tensor] = {}
        self._output: tuple[str, Tensor] | None = None  # of the latest product with a 2-D parameter
        self.outputs: dict[str, Tensor] = {}
        self.same_input_as: dict[str, str] = {}
        self._product: str | None = None  # the 2-D parameter of the product that runs

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._product = None
        out = super().__torch_function__(func, types, args, kwargs)
        if self._product and self.has_rows:
            self._output = self._product, out.detach()
        elif self._output and func in _ADDITIONS:
            self._record_sum(*self._output, args, out)
        if (name := self._product) and self.has_rows and out.requires_grad and out.shape[-1] <= MAX_OUTPUTS:
            out.register_hook(lambda g: self._add_gradient(name, g.detach().reshape(-1, g.shape[-1])))
        return out

    def _record_sum(self, name: str, output: Tensor, terms: tuple[Any, ...], total: Tensor) -> None:
        # `self._output` keeps its tensor alive, so an equal address is the same tensor.
        same = (isinstance(term, Tensor) and term.data_ptr() == output.data_ptr() for term in terms)
        if total.shape == output.shape and any(same):
            self._output = None
            self.sums[name] = total.detach().reshape(-1, total.shape[-1])
            if name == self.last_sum:
                raise StopForward(total)

    def observe(self, name: str, expert: int, inputs: Tensor) -> None:
        """Keep the inputs of a parameter that is wanted."""
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
    """Sums over tokens of x x^T, and of drifts, for the inputs x of one parameter.

    squares  float32 [K, K] by expert (0 for a parameter without experts); an expert that no token reached is missing
    drift    float32, under the key "inputs" of (x_full - x) x^T [K, K], under "outputs" of (y_full - y) x^T [N, K]
    counts   the tokens, by expert
    """

    def __init__(self, parameter: Tensor):
        """parameter: [N, K], or [E, N, K] for E experts."""
        self.has_experts = parameter.dim() == 3
        self.squares: dict[int, Tensor] = {}
        self.drift: dict[str, Tensor] = {}
        self.counts = [0] * (len(parameter) if self.has_experts else 1)

    def add(self, expert: int, x: Tensor) -> None:
        """Add the inputs x [tokens, K] of an expert."""
        if not x.is_cuda:  # a CPU would round sums of bfloat16 too: a large channel's by more than all of another has
            x = x.float()
        add_product(self.squares, expert, x, x)
        self.counts[expert] += len(x)

    def add_drift(self, of: Literal["inputs", "outputs"], difference: Tensor, x: Tensor) -> None:
        """Add how far the inputs x [tokens, K], or the outputs, are from those of the full model: `difference`."""
        with fast_products():
            add_product(self.drift, of, difference, x)

    def moments(self, n_tokens: int) -> Moments:
        """Return the means: moments without `outputs`. n_tokens: of all sequences."""
        zero = torch.zeros_like(next(iter(self.squares.values())))
        means = [self.squares[e] / count if e in self.squares else zero for e, count in enumerate(self.counts)]
        inputs = torch.stack(means) if self.has_experts else means[0]
        drift = {of: total / self.counts[0] for of, total in self.drift.items()}
        return Moments(inputs, None, drift.get("inputs"), drift.get("outputs"), n_tokens)


def add_product(sums: dict[Any, Tensor], key: Any, a: Tensor, b: Tensor) -> None:
    """Add a^T b to the float32 sum under `key`, for a [n, K] and b [n, M] of any floating-point type.

    On a CPU a product of bfloat16 numbers is rounded to bfloat16, once per batch. This is 1e-3 of a sum in the end;
    damping adds 3e-2.
    """
    if a.is_cuda and a.dtype != torch.float32:
        product = torch.mm(a.T, b, out_dtype=torch.float32)
    else:
        product = a.T @ b if a is not b else gram(a)
    if key not in sums:
        sums[key] = torch.zeros(product.shape, device=product.device)
    sums[key].add_(product)
