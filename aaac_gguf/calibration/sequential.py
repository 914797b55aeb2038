"""Measure second moments layer by layer, for the inputs that the quantized layers before give.

There are three sweeps over the blocks, each with all calibration sequences: forward (`activations.Activations`),
backward for the gradients at the outputs of every product (`full_model.FullModel`), and forward again while the caller
quantizes (`BlockMoments`). In memory are one block and what it computes; the rest is on disk.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..errors import AaacError
from ..files.gguf import GgufFile
from ..quantizer.moments import Moments
from .activations import Activations
from .full_model import BlockRecord, FullModel
from .places import TensorPlaces
from .recorder import InputRecorder, InputSums
from .replay import Replay


class BlockMoments:
    """Second moments by GGUF tensor, in a walk over the blocks in which the model's weights are replaced.

    position   the block whose turn it is
    looked_up  the tensor of the embeddings, if it will be quantized and is not the output matrix too
    places     where the tensors are in the model, and which were not found
    hidden     what block `position` gets from the quantized blocks before it, [n, T, d]
    drifting   whether any weight before the inputs that come next has been replaced
    """

    def __init__(
        self,
        activations: Activations,
        file: GgufFile,
        tensors: Sequence[str],
        folder: Path,
        seed: int,
        measured: bool = False,
        replaced: Sequence[str] = (),
    ):
        """Measure gradients and prepare the walk. The activations have been run; `tensors` will be quantized.

        folder: for the sums of gradients. measured: it has them already.
        replaced: tensors that are only replaced; nobody asks for their moments.
        """
        self.activations, self.blocks = activations, activations.blocks
        self.places = TensorPlaces(self.blocks, file, [*tensors, *replaced])
        only_replaced = set(replaced)
        wanted = [
            {self.places[name].parameter for name in self.tensors(i) if name not in only_replaced}
            for i in range(len(self.blocks))
        ]
        self.looked_up = self._looked_up(tensors)
        embeddings = self.places[self.looked_up].parameter if self.looked_up else None
        self.full = FullModel(activations, wanted, folder, seed, measured, embeddings)
        self.hidden = activations.hidden[0, :]
        self.position = 0
        self.drifting = False
        self._recorded: tuple[int, BlockRecord] | None = None
        self._replays = self._new_replays()  # of the quantized block at `position`, by batch

    def tensors(self, i: int) -> list[str]:
        """Return the tensors of block i, of those that will be quantized or replaced."""
        return self.places.in_block(i)

    def _looked_up(self, tensors: Sequence[str]) -> str | None:
        modules = self.blocks.model.get_input_embeddings(), self.blocks.model.get_output_embeddings()
        embeddings, output = (getattr(module, "weight", None) for module in modules)
        if embeddings is output:
            return None
        in_head = (name for name in self.tensors(len(self.blocks) - 1) if name in tensors)
        return next((name for name in in_head if self.places.parameter(name) is embeddings), None)

    def pending(self, name: str) -> bool:
        """Return whether a tensor belongs to the block at `position` or to one after it."""
        return name in self.places and self.places[name].block >= self.position

    def moments(self, name: str) -> Moments | None:
        """Return the moments of a tensor in the full model; None if no product with it was seen."""
        if name not in self.places:
            return None
        i, parameter = self.places[name]
        record = self.record(i)
        if parameter not in record.same_input_as:
            return None
        layer = self._layer_moments(i, record, record.same_input_as[parameter], drifting=False)
        return self._of_tensor(name, record, layer)

    def embedding_moments(self) -> Moments | None:
        """Return the moments of `looked_up`, or None if measurements lack them.

        A row is added to the hidden state wherever its token comes. So the moments of its channels are those of the
        gradient there, and rows do not depend on each other.
        """
        assert self.looked_up
        squares = self.full.at_embeddings(self.places[self.looked_up].parameter)
        return None if squares is None else Moments(squares / self.activations.sequences.numel(), None)

    def layers(self) -> Iterator[dict[str, Moments]]:
        """Yield the moments of the tensors of the block at `position`, in the order in which the block multiplies.

        Tensors with the same inputs come together. The caller must `replace` them before it asks for the next. After
        the last ones the walk advances to the next block.
        """
        i, record = self.position, self.record(self.position)
        for first in dict.fromkeys(record.same_input_as.values()):
            layer = self._layer_moments(i, record, first, self.drifting)
            for inputs in record.inputs:
                inputs.pop((first, 0), None)  # a block's inputs take more memory than the block
            yield {
                name: self._of_tensor(name, record, layer)
                for name in self.tensors(i)
                if record.same_input_as.get(self.places[name].parameter) == first
            }
        self.advance()

    def replace(self, name: str, weight: Tensor) -> None:
        """Give a tensor the decoded values float32 [..., K] in the model, for the layers after it to see.

        A tensor whose rows were not found (`places.without_rows`) stays as it is.
        """
        rows = self.places.row_map(name)
        if rows:
            rows.replace(self.places.parameter(name), weight)
            # A model without blocks would have to run whole for every layer.
            self.drifting = len(self.blocks) > 1
        if name == self.looked_up and self.position == 0:
            with torch.no_grad():
                for batch in self.activations.batches(0):
                    self.hidden[batch] = self.blocks.embed(self.activations.sequences[batch])

    def advance(self) -> None:
        """Go on to the next block."""
        self._recorded = None
        if self.position < self.places.last_block():
            for batch, replay in zip(self.activations.batches(self.position), self._replays, strict=True):
                with torch.no_grad(), replay.again(is_final=lambda: False):
                    self.hidden[batch] = self.activations.run_block(self.position, batch, self.hidden[batch])
        self.position += 1
        self._replays = self._new_replays()

    def _new_replays(self) -> list[Replay]:
        return [Replay() for _ in self.activations.batches(min(self.position, len(self.blocks) - 1))]

    def record(self, i: int) -> BlockRecord:
        """Return the full model's products in block i. The last one asked for is kept."""
        if not self._recorded or self._recorded[0] != i:
            self._recorded = i, self.full.record(i)
        return self._recorded[1]

    def _layer_moments(self, i: int, record: BlockRecord, parameter: str, drifting: bool) -> tuple[Moments, float]:
        """Return the moments of a parameter's inputs, and over how many tokens they are means.

        drifting: take the inputs that the parameter has now, and compare them with the full model's, or its outputs
        where they are added to something.
        """
        sums = InputSums(self.blocks.parameters(i)[parameter])
        if not drifting:
            for inputs in record.inputs:
                for (name, expert), x in inputs.items():
                    if name == parameter:
                        sums.add(expert, x)
            return sums.moments(self.activations.sequences.numel()), sum(sums.counts)
        batches = self.activations.batches(i)
        runs = zip(batches, self._quantized(i, parameter, record), record.inputs, record.sums, strict=True)
        for batch, now, inputs, totals in runs:
            for (name, expert), x in now.inputs.items():
                sums.add(expert, x)
                # Experts may get other tokens in the full model, and so may a module that only some tokens reach.
                if sums.has_experts or len(x) != self.activations.sequences[batch].numel():
                    continue
                if name in totals:
                    sums.add_drift("outputs", totals[name] - now.sums[name], x)
                else:
                    sums.add_drift("inputs", inputs[name, expert] - x, x)
        if not sums.squares:  # no token reaches the parameter any more
            return self._layer_moments(i, record, parameter, drifting=False)
        return sums.moments(self.activations.sequences.numel()), sum(sums.counts)

    def _quantized(self, i: int, parameter: str, record: BlockRecord) -> Iterator[InputRecorder]:
        """Yield by batch what block i does with one parameter, as the model is now; the same recorder every time."""
        self.blocks.load(i)
        parameters = self.blocks.parameters(i)
        # Experts have more than one product.
        last = parameter if parameters[parameter].dim() == 2 else None
        has_sum = parameter in record.sums[0]
        recorder = InputRecorder(parameters, [parameter], *((None, last) if has_sum else (last, None)))
        for batch, replay in zip(self.activations.batches(i), self._replays, strict=True):
            recorder.inputs, recorder.sums = {}, {}
            with torch.no_grad(), recorder, replay.again(is_final=lambda: not recorder.inputs):
                self.activations.run_block(i, batch, self.hidden[batch])
            yield recorder

    def _of_tensor(self, name: str, record: BlockRecord, layer: tuple[Moments, float]) -> Moments:
        """Add to a layer's moments those of a tensor's outputs, in the order of the tensor's rows."""
        moments, n_tokens = layer
        assert isinstance(moments.inputs, Tensor)
        if not moments.inputs.isfinite().all():
            raise AaacError(
                f"`calibration`: the squares of the inputs of {name} overflow; "
                "check the model's norms, calibrate with `imatrix`, or set `calibration` to 'none'"
            )
        shape = self.places.file.shapes.get(name, ())
        if len(shape) == 3 and moments.inputs.dim() == 2:  # the heads of a projection that is one matrix in the model
            self.places.row_map(name)
            return Moments(moments.inputs.expand(shape[0], -1, -1), None)
        outputs, rows = record.outputs.get(self.places[name].parameter), self.places.row_map(name)
        drift = moments.output_drift
        return dataclasses.replace(
            moments,
            outputs=None if outputs is None or rows is None else rows.of_outputs(outputs / n_tokens),
            output_drift=None if drift is None or rows is None else drift[rows.order.to(drift.device)],
        )
