"""Run a causal language model one decoder block at a time, with only that block's weights and activations at hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .finite import is_finite, not_finite
from .mla import key_matrices

# Runs a block on an input [n, T, d]; the block's other arguments are those that the model gave.
RunBlock = Callable[[Tensor], Any]


def fast_products() -> torch.autocast:
    """Return a context in which a float32 model on a CPU multiplies bfloat16 numbers, if the CPU has products of them.

    That takes less than half the time. What products are added to, such as the residual stream, stays float32.
    """
    features = torch.cpu.get_capabilities()
    return torch.autocast("cpu", torch.bfloat16, any(features.get(f) for f in ("avx512_bf16", "amx_bf16", "bf16")))


class StopForward(Exception):
    """Ends the model's forward pass early. `Blocks.run` and `Blocks.embed` then return `hidden`."""

    def __init__(self, hidden: Tensor):
        self.hidden = hidden


def block_list(model: Any) -> torch.nn.ModuleList | None:
    """Return the list of a model's decoder blocks.

    A vision tower may have as many blocks. Those of the text are nearest to the text's embeddings.
    """
    n_layers, embeddings = model.config.get_text_config().num_hidden_layers, model.get_input_embeddings()
    around = [m for m in model.modules() if embeddings in m.modules()]  # from the model inwards
    lists = (m for outer in reversed(around) for m in outer.modules() if isinstance(m, torch.nn.ModuleList))
    return next((m for m in lists if len(m) == n_layers), None)


class Blocks:
    """The decoder blocks of a transformers model in order. The last one is the head: all that comes after them.

    A block runs inside the model's own forward pass, which makes the masks and positions that the block takes. The
    blocks before it return their input unchanged.

    A model whose blocks share more than hidden states has only a head: all that comes after its embeddings.
    """

    def __init__(self, model: Any, tokens: Tensor):
        """Test whether the blocks one by one give what the model gives.

        tokens: sequences int64 [n, T] for this test. Raises AaacError if the model's logits are not finite.
        """
        self.model = model.requires_grad_(False)
        self.blocks = list(block_list(model) or ())
        self.return_tuples = False
        # Of a model that stays on disk: the block whose weights are in memory, and its modules.
        self.loaded = -1
        self.loaded_modules: list[Any] = []
        with torch.no_grad():
            if not self._same_as_model(tokens):
                self.blocks, self.loaded = [], -1

    def __len__(self) -> int:
        return len(self.blocks) + 1

    def parameters(self, i: int) -> dict[str, torch.nn.Parameter]:
        """Return the parameters of block i by their names in the model. The head's are those of no block.

        The matrices of `mla.key_matrices` are among them. In a model that stays on disk they have values from `load`
        until another block is loaded.
        """
        by_block = [{id(p) for p in block.parameters()} for block in self.blocks]
        inside = by_block[i] if i < len(self.blocks) else set().union(*by_block)
        own = {name: p for name, p in self.model.named_parameters() if (id(p) in inside) == (i < len(self.blocks))}
        return own | key_matrices(self.model, own)

    def load(self, i: int) -> None:
        """Load the weights of block i if they are on disk.

        Those of the block loaded before are dropped, with all changes made to them.
        """
        if i == self.loaded:
            return
        # accelerate's hooks load a module whenever it runs. Their own methods are called here, once for a whole block.
        for module in self.loaded_modules:
            module._hf_hook.offload = True
            module._hf_hook.post_forward(module, None)
        inside = {m for block in self.blocks for m in block.modules()}
        modules: Any = (
            self.blocks[i].modules() if i < len(self.blocks) else [m for m in self.model.modules() if m not in inside]
        )
        self.loaded = i
        self.loaded_modules = [m for m in modules if hasattr(m, "_hf_hook") and m._hf_hook.offload]
        for module in self.loaded_modules:
            module._hf_hook.pre_forward(module)
            module._hf_hook.offload = False

    def embed(self, tokens: Tensor) -> Tensor:
        """Return the first block's input [n, T, d] for the sequences `tokens` int64 [n, T]."""
        if not self.blocks:
            return self.model.get_input_embeddings()(tokens.to(self.model.device))

        def stop(i: int, given: Tensor, run_block: RunBlock) -> Any:
            raise StopForward(given)

        return self._run(tokens, stop)

    def run(self, i: int, tokens: Tensor, hidden: Tensor) -> Tensor:
        """Run block i on `hidden` [n, T, d]. Return its output [n, T, d], or the head's logits [n, T, V]."""
        self.load(i)
        if not self.blocks:
            hook = self.model.get_input_embeddings().register_forward_hook(lambda *_: hidden)
            try:
                return self._run(tokens, None)
            finally:
                hook.remove()

        def run_only_i(j: int, given: Tensor, run_block: RunBlock) -> Any:
            if j == i:
                out = run_block(hidden)
                self.return_tuples = isinstance(out, tuple)
                raise StopForward(out[0] if self.return_tuples else out)
            passed = hidden if j == len(self.blocks) - 1 else given
            return (passed,) if self.return_tuples else passed

        return self._run(tokens, run_only_i)

    def _run(self, tokens: Tensor, in_place_of_block: Callable[[int, Tensor, RunBlock], Any] | None) -> Tensor:
        """Return the model's logits. If given, `in_place_of_block` is called with every block's number and input."""

        def replacement(i: int, forward: Callable[..., Any]) -> Callable[..., Any]:
            def replaced(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
                assert in_place_of_block
                return in_place_of_block(i, hidden_states, lambda hidden: forward(hidden, *args, **kwargs))

            return replaced

        blocks = self.blocks if in_place_of_block else []
        forwards = [block.forward for block in blocks]
        for i, block in enumerate(blocks):
            block.forward = replacement(i, block.forward)
        try:
            logits: Tensor = self.model(input_ids=tokens.to(self.model.device), use_cache=False).logits
            return logits
        except StopForward as stopped:
            return stopped.hidden
        finally:
            for block, forward in zip(blocks, forwards, strict=True):
                block.forward = forward

    def _same_as_model(self, tokens: Tensor) -> bool:
        """Return whether the blocks one by one give the model's logits."""
        expected = self._run(tokens, None).float()
        if not is_finite(expected):
            raise not_finite(self.model, lambda: self._run(tokens, None))
        try:
            hidden = self.embed(tokens)
            for i in range(len(self.blocks)):
                before, hidden = hidden, self.run(i, tokens, hidden)
                if hidden.shape != before.shape or hidden.shape[:2] != tokens.shape:
                    return False
            logits = self.run(len(self.blocks), tokens, hidden)
        except Exception:  # the model's own code is not made for this and may raise anything
            return False
        return bool((logits.float() - expected).norm() <= 1e-3 * expected.norm())
