"""Run the full-precision model backward, block by block, with hidden states and gradients on disk."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ..errors import AaacError
from ..progress import progress
from .activations import Activations
from .recorder import InputRecorder, LayerInputs, add_product


@dataclass(frozen=True)
class BlockRecord:
    """The full model's products in one block; see `InputRecorder`. `inputs` and `sums` have an entry per batch."""

    inputs: list[LayerInputs]
    sums: list[dict[str, Tensor]]
    same_input_as: dict[str, str]
    outputs: dict[str, Tensor]


class FullModel:
    """Passes of the full model, one block at a time: backward for the gradients, then forward again for the inputs.

    The loss is the negative log-likelihood of one token per position that the model itself draws, summed.

    hidden     what every block gets in the full model, [blocks, n, T, d]
    gradients  of the loss with respect to the input of the last block that was run backward, [n, T, d]
    """

    def __init__(
        self,
        activations: Activations,
        wanted: Sequence[Collection[str]],
        folder: Path,
        seed: int,
        measured: bool = False,
        embeddings: str | None = None,
    ):
        """Sum the products of gradients. The activations have been run; no weight of the model has been replaced.

        wanted: the parameters, by block, whose moments will be asked for.
        embeddings: the parameter of the embeddings, if they are only looked up and their moments will be asked for.
        folder: for the sums, half of float32 [N, N] a parameter.
        measured: the sums are in the folder already. Raises AaacError if one of their files is cut short.
        """
        self.activations, self.blocks, self.hidden = activations, activations.blocks, activations.hidden
        self.wanted, self.folder = wanted, folder
        if measured:
            for i in range(len(self.blocks)):
                self._outputs(i)
            return
        self.uniform = torch.rand(*activations.sequences.shape, 1, generator=torch.Generator().manual_seed(seed))
        self.gradients = torch.empty(self.hidden.shape[1:], dtype=self.hidden.dtype)
        last = len(self.blocks) - 1
        first = 0 if embeddings else next((i for i, parameters in enumerate(wanted) if parameters), last)
        for i in progress(range(last, first - 1, -1), desc="measuring sensitivities", unit="block"):
            self.blocks.load(i)
            recorder = InputRecorder(self.blocks.parameters(i), wanted[i])
            for batch in activations.batches(i):
                recorder.inputs = {}
                gradient = self._backward(i, batch, recorder)
                if not gradient.isfinite().all():
                    raise AaacError(
                        f"`calibration`: the gradient at decoder block {i} of {last} is not finite; "
                        "check the model's weights, or set `feedback` to False"
                    )
                self.gradients[batch] = gradient
                if i == 0 and embeddings:
                    g = gradient.flatten(0, 1)
                    add_product(recorder.outputs, embeddings, g, g)
            # Bytes, since safetensors opens no path that is not UTF-8.
            self._outputs_file(i).write_bytes(save({n: _packed(sums) for n, sums in recorder.outputs.items()}))

    def record(self, i: int) -> BlockRecord:
        """Run block i on all sequences and return its products. It must still have its full-precision weights."""
        self.blocks.load(i)
        recorder = InputRecorder(self.blocks.parameters(i), self.wanted[i])
        inputs, sums = [], []
        for batch in self.activations.batches(i):
            recorder.inputs, recorder.sums = {}, {}
            with torch.no_grad(), recorder:
                self.activations.run_block(i, batch, self.hidden[i, batch])
            inputs.append(recorder.inputs)
            sums.append(recorder.sums)
        outputs = {name: _unpacked(sum_).to(self.blocks.model.device) for name, sum_ in self._outputs(i).items()}
        return BlockRecord(inputs, sums, recorder.same_input_as, outputs)

    def at_embeddings(self, parameter: str) -> Tensor | None:
        """Return the sum of g g^T float32 [d, d] of the gradients at the first block's input; None if there is none."""
        packed = self._outputs(0).get(parameter)
        return None if packed is None else _unpacked(packed).to(self.blocks.model.device)

    def _outputs(self, i: int) -> dict[str, Tensor]:
        """Return the packed sums of block i. Raises AaacError for a file that is not whole."""
        try:
            return load(self._outputs_file(i).read_bytes())
        except (OSError, SafetensorError) as e:
            raise AaacError(f"`moments` {self._outputs_file(i)}: cannot be read ({e}); measure again") from None

    def _outputs_file(self, i: int) -> Path:
        return self.folder / f"outputs-{i}.safetensors"

    def _backward(self, i: int, batch: slice, recorder: InputRecorder) -> Tensor:
        """Run block i forward, and backward from `gradients`. Return the gradient at its inputs, [n, T, d]."""
        hidden = self.hidden[i, batch].to(self.blocks.model.device).requires_grad_(True)
        with torch.enable_grad():
            with recorder:
                out = self.activations.run_block(i, batch, hidden)
            if i < len(self.blocks) - 1:
                out.backward(self.gradients[batch].to(out.device))
            else:
                probabilities = out.detach().float().softmax(-1)
                # One uniform number per token, drawn on the CPU: the same on every device.
                uniform = self.uniform[batch].to(out.device)
                drawn = torch.searchsorted(probabilities.cumsum(-1), uniform).clamp_max(out.shape[-1] - 1)
                # The gradient of the negative log-likelihood is the probabilities, less 1 for the token drawn.
                out.backward(probabilities.scatter_add_(-1, drawn, -torch.ones_like(uniform)).to(out.dtype))
        assert hidden.grad is not None
        return hidden.grad


def _packed(symmetric: Tensor) -> Tensor:
    """Return the upper triangle of a matrix [N, N] row by row, on the CPU."""
    return torch.cat([row[i:] for i, row in enumerate(symmetric.cpu())])


def _unpacked(packed: Tensor) -> Tensor:
    """Return the symmetric matrix of `_packed`."""
    n = math.isqrt(2 * len(packed))
    symmetric = torch.empty(n, n)
    for i, row in enumerate(packed.split(list(range(n, 0, -1)))):
        symmetric[i, i:] = symmetric[i:, i] = row
    return symmetric
