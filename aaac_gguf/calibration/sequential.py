"""Second moments of a model's matrices, block by block, as far as the matrices before them are quantized.

Three sweeps over the blocks, each with all calibration sequences: forward (`calibrate.Activations`), backward for the gradients at the blocks'
inputs, and forward again, now quantizing. In memory are one block and what it computes; the rest is on disk.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files.gguf import GgufFile
from ..models.blocks import Reached
from ..models.checkpoint import gguf_names
from ..models.rows import RowMap
from ..models.weights import load_weight
from ..progress import progress
from ..quantizer.moments import Moments
from .activations import Activations, Products, on_disk

# O of a vocabulary of 128,256 would take 61 GiB.
MAX_OUTPUTS = 1 << 15

LayerInputs = dict[
    tuple[str, int], Tensor
]  # what some sequences multiply a parameter with, or an expert of it: [tokens, K]


class InputRecorder(Products):
    """Keeps the inputs of the parameters `wanted`, and sums the second moments of their output gradients where gradients are on."""

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], wanted: Collection[str], last: str | None = None):
        """last: the parameter behind whose product nothing is wanted."""
        super().__init__(parameters, self._observe)
        self.wanted, self.last = wanted, last
        self.dims = {name: p.dim() for name, p in parameters.items()}
        self.inputs: LayerInputs = {}  # of the sequences that run
        self.weight = 1.0  # each of these sequences'
        self.outputs: dict[str, Tensor] = {}
        # By parameter, in the order of the products, the first that multiplies the same inputs: Q for Q, K and V.
        self.same_input_as: dict[str, str] = {}
        self.product: str | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.product = None
        out = super().__torch_function__(func, types, args, kwargs)
        if (name := self.product) and out.requires_grad and out.shape[-1] <= MAX_OUTPUTS:
            out.register_hook(lambda g: self._add_gradient(name, g.detach().reshape(-1, g.shape[-1])))
        return out

    def _observe(self, name: str, expert: int, inputs: Tensor) -> None:
        if name not in self.wanted:
            return
        if self.dims[name] == 2:
            self.product = name
            before, latest = next(reversed(self.inputs.items()), (None, None))
            # The record keeps its tensors alive, so an equal address is the same tensor.
            if (
                before
                and latest is not None
                and latest.data_ptr() == inputs.data_ptr()
                and latest.shape == inputs.shape
            ):
                self.same_input_as[name] = before[0]
                return
        self.same_input_as[name] = name
        seen = self.inputs.get((name, expert))
        self.inputs[name, expert] = inputs if seen is None else torch.cat([seen, inputs])
        if name == self.last:
            raise Reached(inputs)

    def _add_gradient(self, name: str, g: Tensor) -> None:
        _add(self.outputs, name, self.weight, g, g)


def _add(sums: dict[Any, Tensor], key: Any, weight: float, a: Tensor, b: Tensor) -> None:
    """Add weight * a^T b to a float32 sum, a [n, K] and b [n, M] of any floating-point type.

    On a CPU a product of bfloat16 numbers is rounded to bfloat16, once per batch: 1e-3 of a sum in the end, where damping adds 3e-2.
    """
    product = torch.mm(a.T, b, out_dtype=torch.float32) if a.is_cuda and a.dtype != torch.float32 else a.T @ b
    if key not in sums:
        sums[key] = torch.zeros(product.shape, device=product.device)
    sums[key].add_(product, alpha=weight)


@dataclass
class _Block:
    """What the full model does in one block: by batch the inputs of its products, their same_input_as (see `InputRecorder`), and sums of g g^T."""

    number: int
    inputs: list[LayerInputs]
    same_input_as: dict[str, str]
    outputs: dict[str, Tensor]


class BlockMoments:
    """Second moments by GGUF tensor; the model's weights are replaced as blocks are quantized."""

    def __init__(
        self,
        activations: Activations,
        weights: Tensor,
        file: GgufFile,
        quantized: Sequence[str],
        folder: Path,
        seed: int,
    ):
        """activations: have been run; quantized: the tensors that are asked for.

        weights: how much each sequence counts, float32 [n], equal for all text and for all others.
        """
        self.blocks, self.sequences, self.file = activations.blocks, activations.sequences, file
        self.batches = activations.batches(len(self.sequences))
        self.weights = [float(weights[batch.start]) for batch in self.batches]
        self.full = activations.hidden
        # What block `position` gets from the quantized ones before it.
        self.hidden = on_disk(folder / "quantized", self.full[0].shape, self.full.dtype)
        self.hidden.copy_(self.full[0])
        self.position = 0
        self.quantizing = False  # whether anything before the inputs that are measured is quantized
        model = self.blocks.model
        self.uniform = torch.rand(*self.sequences.shape, 1, generator=torch.Generator().manual_seed(seed))
        self.place: dict[str, tuple[int, str]] = {}  # of each tensor: the block, and the parameter's name
        n_layers = model.config.get_text_config().num_hidden_layers
        for i in range(len(self.blocks)):
            for name in self.blocks.parameters(i):
                self.place |= dict.fromkeys(gguf_names(name, file.architecture, n_layers, quantized), (i, name))
        self.held: _Block | None = None
        self.rows: dict[str, RowMap | None] = {}
        self.gradients = on_disk(folder / "gradients", self.full.shape, self.full.dtype)
        for i in self._bar(range(len(self.blocks) - 1, 0, -1), "measuring sensitivities"):
            for batch in self.batches:
                self.gradients[i, batch] = self._backward(i, batch)

    def moments(self, name: str) -> Moments | None:
        """The moments of a tensor in the full model; None where no product with it was seen."""
        if name not in self.place:
            return None
        number, parameter = self.place[name]
        block = self._open(number)
        if parameter not in block.same_input_as:
            return None
        return self._in_rows(
            name, self._summed(block, block.same_input_as[parameter], block.inputs, drifting=False), block
        )

    def tensors(self, number: int) -> list[str]:
        """The tensors of a block among those that are asked for."""
        return [name for name, (i, _) in self.place.items() if i == number]

    def pending(self, name: str) -> bool:
        """Whether a tensor belongs to the block at `position` or to one behind it."""
        return name in self.place and self.place[name][0] >= self.position

    def layers(self) -> Iterator[dict[str, Moments]]:
        """The tensors of the block at `position` in the order in which it multiplies with them; those of one stage have the same inputs.

        What a stage becomes must be `replace`d in place before the next is asked for. After the last comes the next block.
        """
        number = self.position
        block = self._open(number)
        for leader in dict.fromkeys(block.same_input_as.values()):
            runs = self._quantized_inputs(number, leader) if self.quantizing else block.inputs
            seen = self._summed(block, leader, runs, drifting=self.quantizing)
            names = [name for name in self.tensors(number) if block.same_input_as.get(self.place[name][1]) == leader]
            yield {name: self._in_rows(name, seen, block) for name in names}
        self.advance()

    def replace(self, name: str, weight: Tensor) -> None:
        """Let the blocks behind see the decoded values float32 [..., K] of a tensor. Where its rows are not known they see the full ones."""
        number, parameter = self.place[name]
        rows = self._rows(name)
        if rows:
            rows.replace(self._parameters(number)[parameter], weight)
            # A model without blocks would have to run whole for every stage.
            self.quantizing = len(self.blocks) > 1

    def advance(self) -> None:
        """Go on to the next block."""
        self.held = None
        self.rows.clear()
        if any(i > self.position for i, _ in self.place.values()):
            with torch.no_grad():
                for batch in self.batches:
                    self.hidden[batch] = self._run(self.position, batch, self.hidden[batch])
        self.position += 1

    def _bar(self, blocks: Iterable[int], title: str) -> Any:
        return progress(blocks, desc=title, unit="block")

    def _parameters(self, number: int) -> dict[str, torch.nn.Parameter]:
        self.blocks.hold(number)
        return self.blocks.parameters(number)

    def _run(self, i: int, batch: slice, hidden: Tensor) -> Tensor:
        return self.blocks.run(i, self.sequences[batch], hidden.to(self.blocks.model.device))

    def _backward(self, i: int, batch: slice, record: InputRecorder | None = None) -> Tensor:
        """Run block i of the full model forward and backward. Returns the gradient at its inputs [n, T, d]."""
        hidden = self.full[i, batch].to(self.blocks.model.device, copy=True).requires_grad_(True)
        with torch.enable_grad():
            with record or nullcontext():
                out = self._run(i, batch, hidden)
            if i < len(self.blocks) - 1:
                out.backward(self.gradients[i + 1, batch].to(out.device))
            else:
                logits = out.float()
                # One uniform number per token, drawn on the CPU: the same on every device, and no probabilities cross over.
                uniform = self.uniform[batch].to(logits.device)
                drawn = (logits.detach().softmax(-1).cumsum(-1) < uniform).sum(-1).clamp_max(logits.shape[-1] - 1)
                torch.nn.functional.cross_entropy(logits.flatten(0, 1), drawn.flatten(), reduction="sum").backward()
        assert hidden.grad is not None
        return hidden.grad

    def _open(self, number: int) -> _Block:
        if not self.held or self.held.number != number:
            self.rows.clear()
            wanted = {parameter for i, parameter in self.place.values() if i == number}
            record = InputRecorder(self._parameters(number), wanted)
            inputs = []
            for batch, weight in zip(self.batches, self.weights, strict=True):
                record.inputs, record.weight = {}, weight
                self._backward(number, batch, record)
                inputs.append(record.inputs)
            self.held = _Block(number, inputs, record.same_input_as, record.outputs)
        return self.held

    def _quantized_inputs(self, number: int, leader: str) -> Iterator[LayerInputs]:
        parameters = self._parameters(number)
        record = InputRecorder(parameters, [leader], last=leader if parameters[leader].dim() == 2 else None)
        for batch in self.batches:
            record.inputs = {}
            with torch.no_grad(), record:
                self._run(number, batch, self.hidden[batch])
            yield record.inputs

    def _summed(self, block: _Block, leader: str, runs: Iterable[LayerInputs], drifting: bool) -> tuple[Moments, float]:
        """The mean moments of a leader's inputs over the sequences, and over how many tokens."""
        parameter = self._parameters(block.number)[leader]
        n_experts = len(parameter) if parameter.dim() == 3 else 1
        sums: dict[int, Tensor] = {}
        drift: dict[int, Tensor] = {}
        counts = [0.0] * n_experts
        for batch, full, weight, run in zip(self.batches, block.inputs, self.weights, runs, strict=True):
            for (name, expert), x in run.items():
                if name == leader:
                    _add(sums, expert, weight, x, x)
                    counts[expert] += weight * len(x)
                    # Experts may see other tokens than in the full model.
                    if drifting and parameter.dim() == 2 and len(x) == self.sequences[batch].numel():
                        _add(drift, expert, weight, full[name, expert] - x, x)
        if not sums:  # an expert that only the full model reaches
            return self._summed(block, leader, block.inputs, drifting=False)
        zero = torch.zeros_like(next(iter(sums.values())))
        means = [sums[e] / counts[e] if e in sums else zero for e in range(n_experts)]
        inputs = means[0] if parameter.dim() == 2 else torch.stack(means)
        return Moments(inputs, None, drift[0] / counts[0] if drift else None, self.sequences.numel()), sum(counts)

    def _in_rows(self, name: str, seen: tuple[Moments, float], block: _Block) -> Moments:
        """A tensor's moments, with the second moment of its outputs in the order of its rows."""
        moments, count = seen
        parameter = self.place[name][1]
        rows = self._rows(name)
        if rows is None or parameter not in block.outputs:
            return moments
        return dataclasses.replace(moments, outputs=rows.of_outputs(block.outputs[parameter] / count))

    def _rows(self, name: str) -> RowMap | None:
        if name not in self.rows:
            number, parameter = self.place[name]
            self.rows[name] = RowMap.find(self._parameters(number)[parameter], load_weight(self.file, name, "cpu"))
        return self.rows[name]
