"""Second moments for error feedback: of every linear layer's inputs, and of the loss's gradient with respect to its outputs.

To second order the KL divergence that a change D of one layer's weights causes is `E[(g^T D x)^2] / 2`, x the layer's inputs and g the gradient, with
respect to its outputs, of the log-likelihood of a token that the model itself drew. Taken as independent, as in K-FAC (Martens and Grosse, 2015) and
YAQA (Tseng et al., 2025), that is `tr(O D H D^T) / 2` with `H = E[x x^T]` and `O = E[g g^T]`: H tells which inputs matter, O which outputs.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .calibrate import Products
from .checkpoint import gguf_names
from .gguf_io import GgufFile

# What the sums of second moments may take at a time; a model whose matrices need more is run several times.
MOMENTS_BYTES = {"cpu": 4 << 30, "cuda": 32 << 30}

# A vocabulary of 128,256 would take 61 GiB.
MAX_OUTPUTS = 1 << 15


@dataclass(frozen=True)
class Moments:
    """What calibration saw of one parameter, on the model's device.

    inputs   float32 [K, K], or [E, K, K] for E experts: mean of x x^T over the tokens that reached it; zero for an expert that none reached
    outputs  float32 [N, N]: mean of g g^T over the same tokens; None for experts, and for more outputs than MAX_OUTPUTS
    """

    inputs: Tensor
    outputs: Tensor | None


class _Watch(Products):
    """Sums moments of the parameters `wanted` while a model runs forward, and backward where gradients are on."""

    def __init__(self, model: torch.nn.Module, wanted: Collection[str]):
        super().__init__(model, self._observe)
        self.wanted = set(wanted)
        self.dims = {name: p.dim() for name, p in self.parameters}
        self.inputs: dict[tuple[str, int], Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self.counts: dict[tuple[str, int], float] = {}
        self.weight = 1.0  # of the sequence that runs
        self.same_inputs: dict[str, str] = {}  # parameter -> the one before it that multiplies the same inputs, as K and V do after Q
        self.last: tuple[str, Tensor] | None = None
        self.product: str | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.product = None
        out = super().__torch_function__(func, types, args, kwargs)
        if self.product and out.requires_grad and out.shape[-1] <= MAX_OUTPUTS:
            name = self.product
            out.register_hook(lambda g: self._add(self.outputs, name, g.detach().reshape(-1, g.shape[-1])))
        return out

    def _observe(self, name: str, expert: int, inputs: Tensor) -> None:
        if name not in self.wanted:
            return
        if self.dims[name] == 2:
            self.product = name
            # `last` keeps its tensor alive, so that an equal address is the same tensor.
            if self.last and self.last[1].data_ptr() == inputs.data_ptr() and self.last[1].shape == inputs.shape:
                self.same_inputs[name] = self.last[0]
                return
            self.last = (name, inputs)
        self._add(self.inputs, (name, expert), inputs)
        self.counts[name, expert] = self.counts.get((name, expert), 0) + self.weight * len(inputs)

    def _add(self, sums: dict[Any, Tensor], key: Any, rows: Tensor) -> None:
        # Float32 holds: one rounding per sequence and product, 1e-5 of a sum at the very most, against a damping of 1e-2.
        rows = rows.float()
        if key in sums:
            sums[key].addmm_(rows.T, rows, alpha=self.weight)
        else:
            sums[key] = self.weight * (rows.T @ rows)

    def moments(self, name: str, n_experts: int) -> Moments | None:
        """The means for a parameter; None where no product was seen."""
        leader = self.same_inputs.get(name, name)
        seen = [(leader, expert) for expert in range(n_experts) if (leader, expert) in self.inputs]
        if not seen:
            return None
        means = {expert: self.inputs[key, expert] / self.counts[key, expert] for key, expert in seen}
        if n_experts == 1:
            outputs = self.outputs.get(name)
            return Moments(means[0], None if outputs is None else outputs / self.counts[leader, 0])
        zero = torch.zeros_like(means[seen[0][1]])
        return Moments(torch.stack([means.get(expert, zero) for expert in range(n_experts)]), None)


def with_random(tokens: Tensor, vocab_size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The sequences int64 [n, T] and a quarter as many of uniformly drawn tokens, each after a first token as the text's; and weights for `collect`.

    A text shows few of the directions that activations can take; what it does not show would count as free. Random tokens show the others: without
    them an error of the layer that only other text excites goes unseen. Together they weigh as much as the text; more of them change nothing.
    """
    n_random = -(-len(tokens) // 4)
    drawn = torch.randint(vocab_size, (n_random, tokens.shape[1]), generator=torch.Generator().manual_seed(seed))
    drawn[:, 0] = tokens[:n_random, 0]
    weights = torch.ones(len(tokens) + n_random)
    weights[len(tokens) :] = len(tokens) / n_random
    return torch.cat([tokens, drawn]), weights


def collect(model: Any, tokens: Tensor, parameters: Collection[str], seed: int = 0, weights: Tensor | None = None) -> dict[str, Moments]:
    """Moments of the named parameters of a causal language model over `tokens` int64 [n, T]; the same for the same seed on a CPU.

    weights: how much each sequence counts, float32 [n]; 1 unless given.

    Runs one sequence forward and backward at a time; only activations are differentiated, so the model's parameters take no gradients. In memory are
    one sequence's activations and the sums (`passes` bounds these).
    """
    generator = torch.Generator().manual_seed(seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.requires_grad_(False)
    embeddings = model.get_input_embeddings().register_forward_hook(lambda _, __, out: out.requires_grad_(True))
    watch = _Watch(model, parameters)
    try:
        bar = tqdm(tokens, desc="measuring sensitivities", unit="sequence", disable=None, leave=False)
        for sequence, weight in zip(bar, torch.ones(len(tokens)) if weights is None else weights, strict=True):
            watch.weight = float(weight)
            with torch.enable_grad(), watch:
                logits = model(input_ids=sequence[None].to(model.device), use_cache=False).logits[0].float()
            watch.last = None
            # One uniform number per token, drawn on the CPU: the same on every device, and no probabilities cross over.
            uniform = torch.rand(len(logits), 1, generator=generator).to(logits.device)
            drawn = (logits.detach().softmax(-1).cumsum(-1) < uniform).sum(-1).clamp_max(logits.shape[-1] - 1)
            with torch.enable_grad():
                torch.nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()
    finally:
        embeddings.remove()
        for p in trained:
            p.requires_grad_(True)
    sizes = {name: len(p) if p.dim() == 3 else 1 for name, p in model.named_parameters()}
    found = {name: watch.moments(name, sizes[name]) for name in parameters}
    return {name: moments for name, moments in found.items() if moments}


def passes(model: Any, parameters: Sequence[str], budget: int) -> list[list[str]]:
    """`parameters` in runs whose moments take at most `budget` bytes, one parameter at least: what to give `collect` at a time."""
    by_name = dict(model.named_parameters())
    runs: list[list[str]] = [[]]
    used = 0
    for name in parameters:
        *experts, n, k = by_name[name].shape
        # Which of the two is the inputs' side depends on the model; both count, unless too large to be kept as outputs.
        size = 4 * (experts[0] * max(n, k) ** 2 if experts else sum(side**2 for side in (n, k) if side <= MAX_OUTPUTS))
        if runs[-1] and used + size > budget:
            runs.append([])
            used = 0
        runs[-1].append(name)
        used += size
    return runs


def in_rows_of(moments: Moments, parameter: Tensor, weight: Tensor) -> Moments:
    """The moments with outputs in the order of `weight` [N', K], the GGUF tensor made of `parameter`'s rows [N, K] (or of its columns).

    llama.cpp's converter permutes Q and K for its rotary embedding and cuts fused projections apart. Rows are found by their values; where one is not
    found, the weights were changed on the way, and the outputs are left out.
    """
    if moments.outputs is None or weight.dim() != 2 or parameter.dim() != 2:
        return Moments(moments.inputs, None)
    wanted = weight.float().cpu()
    values = parameter.detach().float().cpu()
    for rows in (values, values.T):  # GPT-2 holds its matrices transposed
        order = _places(rows, wanted) if rows.shape[1] == wanted.shape[1] and len(rows) == len(moments.outputs) else None
        if order is not None:
            index = order.to(moments.outputs.device)
            return Moments(moments.inputs, moments.outputs[index][:, index])
    return Moments(moments.inputs, None)


def _places(rows: Tensor, wanted: Tensor) -> Tensor | None:
    """Where in `rows` each row of `wanted` is, int64; None when one is nowhere. Equal rows are taken in turn."""
    if torch.equal(rows, wanted):
        return torch.arange(len(rows))
    places: dict[bytes, list[int]] = {}
    for place, row in enumerate(rows.contiguous().numpy()):
        places.setdefault(row.tobytes(), []).append(place)
    order = []
    for row in wanted.numpy():
        found = places.get(row.tobytes())
        if not found:
            return None
        order.append(found.pop(0) if len(found) > 1 else found[0])
    return torch.tensor(order)


class MomentsByTensor:
    """Second moments by GGUF tensor. Measured in passes as tensors are asked for, in file order: memory holds the sums of one pass."""

    def __init__(self, model: Any, tokens: torch.Tensor, file: GgufFile, quantized: Sequence[str], seed: int):
        vocab_size = min(len(file.get("tokenizer.ggml.tokens", [])), model.get_input_embeddings().num_embeddings)
        self.model, self.seed = model, seed
        self.sequences, self.sequence_weights = with_random(tokens, vocab_size, seed)
        self.weights = dict(model.named_parameters())
        n_layers = model.config.get_text_config().num_hidden_layers
        self.parameter: dict[str, str] = {}  # by GGUF name
        for name in self.weights:
            for gguf_name in gguf_names(name, file.architecture, n_layers, quantized):
                self.parameter[gguf_name] = name
        wanted = dict.fromkeys(self.parameter[name] for name in quantized if name in self.parameter)
        self.runs = passes(model, list(wanted), MOMENTS_BYTES[model.device.type])
        self.held: dict[str, Moments] = {}
        self.held_run: list[str] = []

    def of(self, gguf_name: str, weight: torch.Tensor) -> Moments | None:
        """The moments of a tensor with the outputs in the order of its rows, `weight`; None where calibration saw no product with it."""
        name = self.parameter.get(gguf_name)
        if name is None:
            return None
        if name not in self.held_run:
            self.held.clear()
            self.held_run = next(run for run in self.runs if name in run)
            self.held = collect(self.model, self.sequences, self.held_run, self.seed, self.sequence_weights)
        return in_rows_of(self.held[name], self.weights[name], weight) if name in self.held else None
