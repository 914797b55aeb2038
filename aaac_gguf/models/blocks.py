"""A causal language model run one decoder block at a time: only that block's weights and activations need to be at hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Reached(Exception):
    """Ends the model's forward where nothing behind is wanted; `run` then returns what it brings."""

    def __init__(self, hidden: Tensor):
        self.hidden = hidden


def block_list(model: Any) -> torch.nn.ModuleList | None:
    """The list of a model's decoder blocks."""
    n_layers = model.config.get_text_config().num_hidden_layers
    return next((m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == n_layers), None)


class Blocks:
    """The decoder blocks of a transformers model in order, and its head, all that comes behind them, as the last.

    A block runs inside the model's own forward, which makes the masks and positions that it wants; the blocks before it hand on what they get.
    A model whose blocks share more than hidden states has none here: what comes behind its embeddings is all head.
    """

    def __init__(self, model: Any, tokens: Tensor):
        """tokens: sequences int64 [n, T] on which the blocks one by one must give what the model gives."""
        self.model = model.requires_grad_(False)
        self.layers = list(block_list(model) or ())
        self.return_tuples = False
        self.held = -1  # the block whose weights are in memory, of a model that stays on disk
        self.on_disk: list[Any] = []  # its modules
        with torch.no_grad():
            if not self._agree(tokens):
                self.layers, self.held = [], -1

    def __len__(self) -> int:
        return len(self.layers) + 1

    def parameters(self, i: int) -> dict[str, torch.nn.Parameter]:
        """The parameters of block i by their names in the model; the head's are those of no block.

        Of a model that stays on disk they have values from `hold` until another block is held.
        """
        of_layer = [{id(p) for p in layer.parameters()} for layer in self.layers]
        inside = of_layer[i] if i < len(self.layers) else set().union(*of_layer)
        return {name: p for name, p in self.model.named_parameters() if (id(p) in inside) == (i < len(self.layers))}

    def hold(self, i: int) -> None:
        """Load the weights of block i if they are on disk. Those of the block before are let go, with whatever was put into them."""
        if i == self.held:
            return
        # By accelerate's hooks, which otherwise load a module whenever it runs.
        for module in self.on_disk:
            module._hf_hook.offload = True
            module._hf_hook.post_forward(module, None)
        inside = {m for layer in self.layers for m in layer.modules()}
        modules: Any = (
            self.layers[i].modules() if i < len(self.layers) else [m for m in self.model.modules() if m not in inside]
        )
        self.held, self.on_disk = i, [m for m in modules if hasattr(m, "_hf_hook") and m._hf_hook.offload]
        for module in self.on_disk:
            module._hf_hook.pre_forward(module)
            module._hf_hook.offload = False

    def embed(self, tokens: Tensor) -> Tensor:
        """What the first block gets for the sequences `tokens` int64 [n, T]: [n, T, d]."""
        if not self.layers:
            return self.model.get_input_embeddings()(tokens.to(self.model.device))

        def stop(i: int, given: Tensor, call: Callable[[Tensor], Any]) -> Any:
            raise Reached(given)

        return self._run(tokens, stop)

    def run(self, i: int, tokens: Tensor, hidden: Tensor) -> Tensor:
        """What block i makes of its input `hidden` [n, T, d]: [n, T, d], or the head's logits [n, T, V]."""
        self.hold(i)
        if not self.layers:
            hook = self.model.get_input_embeddings().register_forward_hook(lambda *_: hidden)
            try:
                return self._run(tokens, None)
            finally:
                hook.remove()

        def pass_on(j: int, given: Tensor, call: Callable[[Tensor], Any]) -> Any:
            if j == i:
                out = call(hidden)
                self.return_tuples = isinstance(out, tuple)
                raise Reached(out[0] if self.return_tuples else out)
            passed = hidden if j == len(self.layers) - 1 else given
            return (passed,) if self.return_tuples else passed

        return self._run(tokens, pass_on)

    def _run(self, tokens: Tensor, instead: Callable[[int, Tensor, Callable[[Tensor], Any]], Any] | None) -> Tensor:
        """The model's logits, `instead` called in place of every block: with its number, its input and a function that runs it on another input."""

        def replacing(i: int, forward: Callable[..., Any]) -> Callable[..., Any]:
            def replaced(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
                assert instead
                return instead(i, hidden_states, lambda hidden: forward(hidden, *args, **kwargs))

            return replaced

        layers = self.layers if instead else []
        forwards = [layer.forward for layer in layers]
        for i, layer in enumerate(layers):
            layer.forward = replacing(i, layer.forward)
        try:
            logits: Tensor = self.model(input_ids=tokens.to(self.model.device), use_cache=False).logits
            return logits
        except Reached as reached:
            return reached.hidden
        finally:
            for layer, forward in zip(layers, forwards, strict=True):
                layer.forward = forward

    def _agree(self, tokens: Tensor) -> bool:
        expected = self._run(tokens, None).float()
        try:
            hidden = self.embed(tokens)
            for i in range(len(self.layers)):
                before, hidden = hidden, self.run(i, tokens, hidden)
                if hidden.shape != before.shape or hidden.shape[:2] != tokens.shape:
                    return False
            logits = self.run(len(self.layers), tokens, hidden)
        except Exception:  # the model's own code, which is not made for this, raises whatever it raises
            return False
        return bool((logits.float() - expected).norm() <= 1e-3 * expected.norm())
