"""Per-channel importance of every weight matrix: run text, or tokens that the model writes itself, through transformers and watch the products.

The importance of input channel k of a linear layer is I_k = sum_t x_tk^2 (arXiv 2605.08692), the diagonal of the activations' second
moment and what llama.cpp calls an importance matrix.
"""

from __future__ import annotations

import bisect
import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from ..files.imatrix import Entry, Imatrix
from ..models.blocks import Blocks
from ..models.checkpoint import gguf_names
from ..progress import progress

Observer = Callable[[str, int, torch.Tensor], None]  # parameter name, expert (0 where there is one), inputs [tokens, K]


class Products(TorchFunctionMode):
    """While active, reports the input of every matrix product whose weight is one of `parameters`, or a slice of one.

    Watching products instead of modules also sees experts that share one 3-D parameter, and GPT-2's transposed Conv1D.
    """

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], observer: Observer):
        super().__init__()
        named = sorted(
            ((p.data_ptr(), name, p) for name, p in parameters.items() if p.dim() >= 2), key=lambda item: item[0]
        )
        self.starts = [start for start, _, _ in named]
        self.parameters = [(name, p) for _, name, p in named]
        self.observer = observer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.linear:
            self._report(args[0], args[1] if len(args) > 1 else kwargs["weight"])
        elif func is torch.addmm:
            self._report(args[1], args[2])
        elif func in (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__):
            self._report(args[0], args[1])
        return func(*args, **kwargs)

    def _report(self, inputs: torch.Tensor, weight: torch.Tensor) -> None:
        i = bisect.bisect_right(self.starts, weight.data_ptr()) - 1
        if i < 0:
            return
        name, parameter = self.parameters[i]
        offset = (weight.data_ptr() - parameter.data_ptr()) // parameter.element_size()
        if offset < parameter.numel() and inputs.shape[-1] in weight.shape:
            self.observer(
                name,
                offset // parameter.stride(0) if parameter.dim() == 3 else 0,
                inputs.detach().reshape(-1, inputs.shape[-1]),
            )


# Tokens that run together, in sequences of at most so many.
BATCH_TOKENS = 2048


class Activations:
    """What every block of a model gets for every calibration sequence: `hidden`, in the model's dtype [blocks, n, T, d]."""

    def __init__(self, blocks: Blocks, sequences: torch.Tensor, n_text: int, folder: Path | None = None):
        """sequences: tokens int64 [n, T], of which the first `n_text` are text.

        Without a folder for the file only what one block gets is kept: [1, n, T, d].
        """
        self.blocks, self.sequences, self.n_text = blocks, sequences, n_text
        with torch.no_grad():
            first = blocks.embed(sequences[:1])
        shape = (*sequences.shape, first.shape[-1])
        self.hidden = (
            on_disk(folder / "activations", (len(blocks), *shape), first.dtype)
            if folder
            else torch.empty(1, *shape, dtype=first.dtype)
        )

    def batches(self, n_sequences: int) -> list[slice]:
        """The first `n_sequences` in parts that run together, text and other sequences apart."""
        size = max(BATCH_TOKENS // self.sequences.shape[1], 1)
        parts = ((0, min(self.n_text, n_sequences)), (self.n_text, n_sequences))
        return [slice(start, min(start + size, stop)) for first, stop in parts for start in range(first, stop, size)]

    def run(self, observer: Observer) -> None:
        """Fill `hidden`; the products of text go to the observer. The head runs on text only."""
        blocks, every, text = self.blocks, self.batches(len(self.sequences)), self.batches(self.n_text)
        bar = progress(total=(len(blocks) - 1) * len(every) + len(text), desc="calibrating")
        with bar, torch.no_grad():
            for batch in every:
                self.hidden[0, batch] = blocks.embed(self.sequences[batch])
            for i in range(len(blocks)):
                blocks.hold(i)
                watch, is_head = Products(blocks.parameters(i), observer), i == len(blocks) - 1
                for batch in text if is_head else every:
                    with watch if batch in text else nullcontext():
                        out = blocks.run(
                            i, self.sequences[batch], self.hidden[i % len(self.hidden), batch].to(blocks.model.device)
                        )
                    if not is_head:
                        self.hidden[(i + 1) % len(self.hidden), batch] = out
                    bar.update()


def on_disk(path: Path, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A tensor in a new file, which the system keeps in memory as far as there is room. Raises OSError where the disk has none."""
    size = math.prod(shape)
    with open(path, "wb") as f:
        os.posix_fallocate(f.fileno(), 0, size * dtype.itemsize)
    return torch.from_file(str(path), shared=True, size=size, dtype=dtype).view(*shape)


class Squares:
    """An observer that sums the squared inputs of every product."""

    def __init__(self) -> None:
        self.sums: dict[tuple[str, int], torch.Tensor] = {}
        self.counts: dict[tuple[str, int], int] = {}

    def __call__(self, name: str, expert: int, inputs: torch.Tensor) -> None:
        key = (name, expert)
        squares = inputs.float().square().sum(0).double()
        self.sums[key] = self.sums[key] + squares if key in self.sums else squares
        self.counts[key] = self.counts.get(key, 0) + len(inputs)

    def imatrix(
        self, model: Any, tokens: torch.Tensor, architecture: str, present: Collection[str], dataset: str
    ) -> Imatrix:
        """The sums over `tokens` int64 [n, T] by GGUF tensor name; `present` are the file's tensor names."""
        n_layers = model.config.get_text_config().num_hidden_layers
        entries: dict[str, Entry] = {}
        for name, parameter in model.named_parameters():
            n_experts = len(parameter) if parameter.dim() == 3 else 1
            seen = [expert for expert in range(n_experts) if (name, expert) in self.sums]
            if not seen:
                continue
            total = np.zeros((n_experts, len(self.sums[name, seen[0]])), dtype=np.float32)
            count = np.zeros(n_experts, dtype=np.float32)
            for expert in seen:
                total[expert], count[expert] = self.sums[name, expert].cpu().numpy(), self.counts[name, expert]
            for gguf_name in gguf_names(name, architecture, n_layers, present):
                entries[gguf_name] = Entry(total, count)
        return Imatrix(entries, [dataset], len(tokens), tokens.shape[1])


def importance(model: Any, tokens: torch.Tensor, architecture: str, present: Collection[str], dataset: str) -> Imatrix:
    """Sums of squared inputs of every product over `tokens` int64 [n, T], by GGUF tensor name; `present` are the file's tensor names."""
    squares = Squares()
    Activations(Blocks(model, tokens[:1]), tokens, len(tokens)).run(squares)
    return squares.imatrix(model, tokens, architecture, present, dataset)
