"""Run calibration sequences through a model, and measure the importance of every matrix's input channels.

The importance of input channel k of a linear layer is I_k = sum_t x_tk^2 (arXiv 2605.08692). It is the diagonal of the
activations' second moment, and llama.cpp calls it an importance matrix.
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

from ..errors import AaacError
from ..files.imatrix import Entry, Imatrix
from ..models.blocks import Blocks, fast_products
from ..models.checkpoint import gguf_names
from ..models.finite import is_finite, not_finite
from ..models.mla import by_queries, key_matrices
from ..progress import progress

# Called with a parameter's name, the expert (0 for a parameter without experts) and the inputs [tokens, K].
Observer = Callable[[str, int, torch.Tensor], None]

# Tokens that run together, in sequences of at most this many.
BATCH_TOKENS = 2048


_LEFT = (
    torch.matmul,
    torch.Tensor.matmul,
    torch.Tensor.__matmul__,
    torch.mm,
    torch.Tensor.mm,
    torch.bmm,
    torch.Tensor.bmm,
)
_ADDED = (torch.addmm, torch.Tensor.addmm, torch.baddbmm, torch.Tensor.baddbmm)
_GROUPED = {getattr(torch, "_grouped_mm", None), getattr(torch.nn.functional, "grouped_mm", None)} - {None}


class Products(TorchFunctionMode):
    """While active, reports the input of every matrix product whose weight is one of `parameters`, or a view of one.

    It watches products instead of modules, so it also sees experts that share one 3-D parameter, one at a time or all
    in one product, and GPT-2's transposed Conv1D. A row of zeros in a product of all experts is a token that was routed
    elsewhere, and is not reported.

    The keys' matrices of `models.mla` are reported with the queries that llama.cpp multiplies them with, for each head.

    has_rows  whether the outputs of the last product that was reported are [..., N], a row for each input
    """

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], observer: Observer | None = None):
        """observer: None for a subclass, which overrides `observe`."""
        super().__init__()
        self.keys = by_queries(parameters)
        self.channels = {name: parameters[name].shape[::2] for name in self.keys.values()}  # heads, channels
        views = set(self.keys.values())
        matrices = [(p.data_ptr(), name, p) for name, p in parameters.items() if p.dim() >= 2 and name not in views]
        matrices.sort(key=lambda item: item[0])
        self.starts = [start for start, _, _ in matrices]
        self.parameters = [(name, p) for _, name, p in matrices]
        self.observer = observer
        self.has_rows = True

    def observe(self, name: str, expert: int, inputs: torch.Tensor) -> None:
        """Take a product's inputs [tokens, K].

        A method of one's own as the observer would be a cycle, in which what was recorded outlives its last use.
        """
        assert self.observer
        self.observer(name, expert, inputs)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.has_rows = True
        if func is torch.nn.functional.linear:
            self._report(args[0], args[1] if len(args) > 1 else kwargs["weight"])
        elif func in _ADDED:
            self._report(args[1], args[2])
        elif func in _LEFT or func is torch.Tensor.__rmatmul__:
            left, right = reversed(args) if func is torch.Tensor.__rmatmul__ else args
            if self._place(right) is not None:
                self._report(left, right)
            elif left.dim() > 1 and right.dim() > 1 and self._place(left) is not None:
                self.has_rows = False
                self._report(right.mT, left)
        elif func is torch.einsum:
            self._report_einsum(args[0], *(args[1] if isinstance(args[1], list | tuple) else args[1:]))
        elif func in _GROUPED:
            self._report_groups(args[0], args[1], kwargs.get("offs", args[2] if len(args) > 2 else None))
        out = func(*args, **kwargs)
        if self.keys and func is torch.nn.functional.linear:
            self._report_queries(args[1] if len(args) > 1 else kwargs["weight"], out)
        return out

    def _place(self, weight: torch.Tensor) -> tuple[str, torch.nn.Parameter, int] | None:
        """Return the parameter whose memory a tensor shares, its name, and the offset in it; None if there is none."""
        i = bisect.bisect_right(self.starts, weight.data_ptr()) - 1
        if i < 0:
            return None
        name, parameter = self.parameters[i]
        offset = (weight.data_ptr() - parameter.data_ptr()) // parameter.element_size()
        return (name, parameter, offset) if offset < parameter.numel() else None

    def _report(self, inputs: torch.Tensor, weight: torch.Tensor) -> None:
        """Report a product of inputs [..., K] with a matrix, or of [E, ..., K] or [..., K] with E experts' matrices."""
        place = self._place(weight)
        if place is None or inputs.shape[-1] not in weight.shape[-2:]:
            return
        name, parameter, offset = place
        if parameter.dim() != 3:
            if weight.dim() == 2:
                self.observe(name, 0, inputs.detach().reshape(-1, inputs.shape[-1]))
        elif weight.dim() == 2:
            expert = offset // parameter.stride(0)
            self.observe(name, expert, inputs.detach().reshape(-1, inputs.shape[-1]))
        elif weight.dim() == 3 and weight.stride(0) % parameter.stride(0) == 0:
            by_expert = (
                inputs.detach().expand(len(weight), *inputs.shape[1:])
                if inputs.dim() > 2
                else [inputs.detach()] * len(weight)
            )
            for i, x in enumerate(by_expert):
                rows = x.reshape(-1, x.shape[-1])
                rows = rows[rows.any(-1)]
                if len(rows):
                    self.observe(name, (offset + i * weight.stride(0)) // parameter.stride(0), rows)

    def _report_einsum(self, equation: Any, *operands: torch.Tensor) -> None:
        """Report an einsum of two operands as the matrix product that it is."""
        if not isinstance(equation, str) or len(operands) != 2 or "." in equation:
            return
        terms, _, result = equation.replace(" ", "").partition("->")
        pairs = list(zip(terms.split(","), operands, strict=True))
        for (x_names, x), (w_names, w) in (pairs, pairs[::-1]):
            if self._place(w) is None:
                continue
            channels = [c for c in w_names if c in x_names and c not in result]
            experts = [c for c in w_names if c in x_names and c in result]
            outputs = [c for c in w_names if c not in x_names]
            if len(channels) == len(outputs) == 1 and len(experts) == w.dim() - 2 <= 1:
                others = [c for c in x_names if c not in channels + experts]
                order = [*experts, *others, *channels]
                self.has_rows = result.endswith(outputs[0])
                x = x.permute([x_names.index(c) for c in order])
                if w.dim() == 3 and not experts:
                    x = x[None]
                self._report(x, w.permute([w_names.index(c) for c in (*experts, *outputs, *channels)]))
                return

    def _report_groups(self, inputs: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor | None) -> None:
        """Report a product of inputs [tokens, K], sorted by expert, with E experts' matrices; `ends` of each group."""
        if ends is None:
            self._report(inputs, weight)
            return
        start = 0
        for i, end in enumerate(ends.tolist()):
            if end > start:
                self._report(inputs[start:end], weight[i])
            start = end

    def _report_queries(self, weight: torch.Tensor, outputs: torch.Tensor) -> None:
        """Report the outputs [..., heads * (channels + rotated)] of a product as inputs of the keys' matrix."""
        place = self._place(weight)
        if place is None or place[0] not in self.keys:
            return
        keys = self.keys[place[0]]
        heads, channels = self.channels[keys]
        queries = outputs.detach().reshape(-1, heads, outputs.shape[-1] // heads)[..., :channels]
        for head in range(heads):
            self.observe(keys, head, queries[:, head])


class Activations:
    """The inputs of every block of a model for every calibration sequence.

    hidden  [blocks, n, T, d] in the model's dtype, indexed by block and batch, filled by `run`
    """

    def __init__(
        self,
        blocks: Blocks,
        sequences: torch.Tensor,
        n_text: int,
        folder: Path | None = None,
        measured: bool = False,
    ):
        """sequences: tokens int64 [n, T], of which the first `n_text` are text.

        folder: for the file of `hidden`. Without it only the inputs of one block are kept: [1, n, T, d].
        measured: the file is there already, from the same model and sequences. Raises AaacError if it does not fit.
        """
        self.blocks, self.sequences, self.n_text = blocks, sequences, n_text
        with torch.no_grad():
            first = blocks.embed(sequences[:1])
        shape = (*sequences.shape, first.shape[-1])
        self.hidden: OnDisk | torch.Tensor = (
            OnDisk(folder / "activations", (len(blocks), *shape), first.dtype, measured)
            if folder
            else torch.empty(1, *shape, dtype=first.dtype)
        )

    def batches(self, i: int, text: bool = False) -> list[slice]:
        """Split the sequences, or only those of `text`, into batches that run through block i together.

        Text and other sequences are kept apart. In the head each sequence is alone, since it has a row of logits for
        every token.
        """
        size = max(BATCH_TOKENS // self.sequences.shape[1], 1) if i < len(self.blocks) - 1 else 1
        parts = ((0, self.n_text), (self.n_text, self.n_text if text else len(self.sequences)))
        return [slice(start, min(start + size, stop)) for first, stop in parts for start in range(first, stop, size)]

    def run(self, observer: Observer) -> None:
        """Fill `hidden`, and report the products of text to the observer. The head runs on text only."""
        blocks, head = self.blocks, len(self.blocks) - 1
        bar = progress(total=head * len(self.sequences) + self.n_text, desc="calibrating")
        with bar, torch.no_grad():
            for batch in self.batches(0):
                self.hidden[0, batch] = blocks.embed(self.sequences[batch])
            for i in range(len(blocks)):
                blocks.load(i)
                watch = Products(blocks.parameters(i), observer)
                for batch in self.batches(i, text=i == head):
                    with watch if batch.stop <= self.n_text else nullcontext():
                        out = self.run_block(i, batch, self.hidden[i % len(self.hidden), batch])
                    if i < head:
                        self.hidden[(i + 1) % len(self.hidden), batch] = out
                    bar.update(batch.stop - batch.start)

    def run_block(self, i: int, batch: slice, hidden: torch.Tensor) -> torch.Tensor:
        """Run block i on the inputs `hidden` [n, T, d] of a batch. Return its outputs, of the head the logits.

        Raises AaacError that names the first module whose output is not finite.
        """
        hidden = hidden.to(self.blocks.model.device)

        def run() -> torch.Tensor:
            with fast_products():
                return self.blocks.run(i, self.sequences[batch], hidden)

        out = run()
        if not (is_finite(out) if i == len(self.blocks) - 1 else out.isfinite().all()):
            raise not_finite(self.blocks.model, run)
        return out


class OnDisk:
    """A tensor [blocks, n, ...] in a file, read and written by block and batch: `tensor[i, start:stop]`."""

    def __init__(self, path: Path, shape: Sequence[int], dtype: torch.dtype, measured: bool = False):
        """Make the file; if it is `measured` already, open it to be read.

        Raises OSError if the disk has no room, and AaacError if a measured file has another size.
        """
        self.shape, self.dtype = tuple(shape), dtype
        n_bytes = math.prod(shape) * dtype.itemsize
        self._file: Any = open(path, "rb" if measured else "w+b")  # noqa: SIM115  until nobody needs the tensor
        if not measured:
            os.posix_fallocate(self._file.fileno(), 0, n_bytes)
        elif (found := os.fstat(self._file.fileno()).st_size) != n_bytes:
            raise AaacError(
                f"`moments` {path}: has {found:,} bytes and not {n_bytes:,}: it is cut short, or was measured on a "
                "`device` that computes in another type; measure again"
            )

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: tuple[int, slice]) -> torch.Tensor:
        values = torch.empty(self._seek(*key), *self.shape[2:], dtype=self.dtype)
        self._file.readinto(values.view(torch.uint8).numpy().data)
        return values

    def __setitem__(self, key: tuple[int, slice], values: torch.Tensor) -> None:
        self._seek(*key)
        self._file.write(values.to("cpu", self.dtype).contiguous().view(torch.uint8).numpy().data)

    def _seek(self, i: int, batch: slice) -> int:
        """Go to where a batch of a block begins. Return the number of its sequences."""
        start, stop, _ = batch.indices(self.shape[1])
        self._file.seek((i * self.shape[1] + start) * math.prod(self.shape[2:]) * self.dtype.itemsize)
        return stop - start


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
        """Return the sums by GGUF tensor name.

        tokens: int64 [n, T], those that were summed over; present: the GGUF file's tensor names; dataset: a name for
        the text. Raises AaacError for sums that overflow.
        """
        n_layers = model.config.get_text_config().num_hidden_layers
        entries: dict[str, Entry] = {}
        parameters = dict(model.named_parameters())
        for name, parameter in (parameters | key_matrices(model, parameters)).items():
            n_experts = len(parameter) if parameter.dim() == 3 else 1
            seen = [expert for expert in range(n_experts) if (name, expert) in self.sums]
            if not seen:
                continue
            total = np.zeros((n_experts, len(self.sums[name, seen[0]])), dtype=np.float32)
            count = np.zeros(n_experts, dtype=np.float32)
            for expert in seen:
                total[expert], count[expert] = self.sums[name, expert].cpu().numpy(), self.counts[name, expert]
            if not np.isfinite(total).all():
                raise AaacError(
                    f"`calibration`: the squares of the inputs of {name} overflow; "
                    "check the model's norms, calibrate with `imatrix`, or set `calibration` to 'none'"
                )
            for gguf_name in gguf_names(name, architecture, n_layers, present):
                entries[gguf_name] = Entry(total, count)
        return Imatrix(entries, [dataset], len(tokens), tokens.shape[1])


def importance(model: Any, tokens: torch.Tensor, architecture: str, present: Collection[str], dataset: str) -> Imatrix:
    """Run `tokens` int64 [n, T] through the model and return the importance matrix; see `Squares.imatrix`."""
    squares = Squares()
    Activations(Blocks(model, tokens[:1]), tokens, len(tokens)).run(squares)
    return squares.imatrix(model, tokens, architecture, present, dataset)
