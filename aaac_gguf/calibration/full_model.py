"""Run the full-precision model backward, block by block, with hidden states and gradients on disk."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import AaacError
from ..progress import progress
from .activations import Activations, on_disk
from .recorder import InputRecorder, LayerInputs


@dataclass(frozen=True)
class BlockRecord:
    """The full model's products in one block; see `InputRecorder` for the fields. `inputs` has an entry per batch."""

    inputs: list[LayerInputs]
    same_input_as: dict[str, str]
    outputs: dict[str, Tensor]


class FullModel:
    """Backward passes of the full model, one block at a time.

    The loss is the negative log-likelihood of one token per position that the model itself draws, summed.

    hidden     what every block gets in the full model, [blocks, n, T, d]
    gradients  of the loss with respect to it, same shape; that of block 0 is not computed
    batches    the sequences that run together
    weights    how much each sequence of a batch counts, by batch
    """

    def __init__(self, activations: Activations, weights: Tensor, folder: Path, seed: int):
        """Compute the gradients. The activations have been run; no weight of the model has been replaced.

        weights: how much each sequence counts, float32 [n], equal for all text and for all others.
        """
        self.activations, self.blocks, self.hidden = activations, activations.blocks, activations.hidden
        self.batches = activations.batches(len(activations.sequences))
        self.weights = [float(weights[batch.start]) for batch in self.batches]
        self.uniform = torch.rand(*activations.sequences.shape, 1, generator=torch.Generator().manual_seed(seed))
        self.gradients = on_disk(folder / "gradients", self.hidden.shape, self.hidden.dtype)
        for i in progress(range(len(self.blocks) - 1, 0, -1), desc="measuring sensitivities", unit="block"):
            for batch in self.batches:
                gradient = self.backward(i, batch)
                if not gradient.isfinite().all():
                    raise AaacError(
                        f"`calibration`: the gradient at decoder block {i} of {len(self.blocks) - 1} is not finite; "
                        "check the model's weights, or set `feedback` to False"
                    )
                self.gradients[i, batch] = gradient

    def record(self, i: int, wanted: Collection[str]) -> BlockRecord:
        """Run block i forward and backward on all sequences and record its parameters `wanted`.

        The block must still have its full-precision weights.
        """
        self.blocks.load(i)
        recorder = InputRecorder(self.blocks.parameters(i), wanted)
        inputs = []
        for batch, weight in zip(self.batches, self.weights, strict=True):
            recorder.inputs, recorder.weight = {}, weight
            self.backward(i, batch, recorder)
            inputs.append(recorder.inputs)
        return BlockRecord(inputs, recorder.same_input_as, recorder.outputs)

    def backward(self, i: int, batch: slice, recorder: InputRecorder | None = None) -> Tensor:
        """Run block i forward and backward. Return the gradient at its inputs, [n, T, d]."""
        hidden = self.hidden[i, batch].to(self.blocks.model.device, copy=True).requires_grad_(True)
        with torch.enable_grad():
            with recorder or nullcontext():
                out = self.activations.run_block(i, batch, hidden)
            if i < len(self.blocks) - 1:
                out.backward(self.gradients[i + 1, batch].to(out.device))
            else:
                logits = out.float()
                # One uniform number per token, drawn on the CPU: the same on every device.
                uniform = self.uniform[batch].to(logits.device)
                drawn = (logits.detach().softmax(-1).cumsum(-1) < uniform).sum(-1).clamp_max(logits.shape[-1] - 1)
                torch.nn.functional.cross_entropy(logits.flatten(0, 1), drawn.flatten(), reduction="sum").backward()
        assert hidden.grad is not None
        return hidden.grad
