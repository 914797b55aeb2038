"""Estimate second moments where no model runs, from the weights and an importance matrix.

An importance matrix holds the mean of x_k^2 of every input channel k: the diagonal of `H = E[x x^T]`. The weights tell
how channels go together, because the residual stream is the sum of embeddings and of all that the blocks before have
added to it. So random tokens go through the blocks, whose parts are known by the names of their tensors. Nobody knows
which tokens attend to which, so each head attends at random. Before each matrix every channel is scaled to the mean
square that the importance matrix gives.

Parts of a block other than attention and a dense feed-forward network add nothing here, and have no moments.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..files.gguf import GgufFile, block_number
from ..files.imatrix import Imatrix
from ..models.blocks import fast_products
from ..models.weights import load_weight
from ..quantizer.moments import Moments, gram

# Random tokens that go through the blocks.
N_TOKENS = 8192
# How far correlations between channels shrink towards zero, however many tokens show them.
SHRINKAGE = 0.05
# Every head attends to this many tokens, by the softmax of normal scores of this standard deviation.
ATTENDED, SCORE_DEVIATION = 8, 4.0

_NORM_EPSILON = 1e-5
_ATTENTION = ("attn_q", "attn_k", "attn_v", "attn_qkv")  # the matrices that multiply the normalised residual stream
_FEED_FORWARD = ("ffn_gate", "ffn_up")


class SyntheticMoments:
    """Second moments by GGUF tensor.

    They must be asked for in the order of the blocks, since only one block's inputs are in memory.

    position  the next block to run; the number of blocks stands for the head
    inputs    float32 [N_TOKENS, K] by tensor, of the block before `position`
    residual  float32 [N_TOKENS, d]: the residual stream after it
    """

    def __init__(self, file: GgufFile, imatrix: Imatrix, device: str = "cpu", seed: int = 0):
        """Draw tokens. file: the full-precision model; imatrix: may lack tensors, whose inputs are then not scaled."""
        self.file, self.shapes, self.imatrix, self.device = file, file.shapes, imatrix, device
        self.n_blocks = 1 + max(block_number(name, -1) for name in self.shapes)
        self.position = 0
        self.inputs: dict[str, Tensor] = {}
        n_vocab, width = self.shapes["token_embd.weight"]
        self.generator = torch.Generator().manual_seed(seed)
        drawn = torch.randint(n_vocab, (N_TOKENS,), generator=self.generator)
        # Gemma's factor is not in the metadata.
        factor = width**0.5 if file.architecture.startswith("gemma") else self._setting("embedding_scale", 1.0)
        self.residual = load_weight(file, "token_embd.weight", device, drawn) * factor

    def moments(self, name: str) -> Moments | None:
        """Return the moments of a tensor's inputs; None if nothing is known of them, or if they overflow.

        Raises ValueError for a tensor of a block before the one that was asked for last.
        """
        number = self.n_blocks if name == "output.weight" else block_number(name, -1)
        if number < 0:
            return None
        if number < self.position - 1:
            raise ValueError(f"{name}: block {number} has gone by")
        while self.position <= number:
            self.inputs.clear()
            if self.position < self.n_blocks:
                self._run_block(f"blk.{self.position}.")
            else:
                self._input(["output"], self._normalised(self.residual, "output_norm"))
            self.position += 1
        if name not in self.inputs:
            return None
        x = self.inputs[name]
        moments = gram(x) / len(x)
        diagonal = moments.diagonal().clone()
        # As if as many tokens as there are channels had shown no correlation at all, and then SHRINKAGE.
        moments *= (1 - SHRINKAGE) * len(x) / sum(x.shape)
        moments.diagonal().copy_(diagonal)
        return Moments(moments, None) if moments.isfinite().all() else None

    def _run_block(self, block: str) -> None:
        """Send the residual stream through a block, and keep the inputs of the block's matrices."""
        scale = self._setting("residual_scale", 1.0)
        # In some architectures `post_attention_norm` is what others call `ffn_norm`. Without either, attention and
        # feed-forward network have the same inputs.
        has_ffn_norm, has_post_norm = self._has(block + "ffn_norm"), self._has(block + "post_attention_norm")
        before = self.residual
        x = self._input([block + stem for stem in _ATTENTION], self._normalised(before, block + "attn_norm"))
        heads = self._heads(block, x)
        if heads is not None:
            out = self._product(self._input([block + "attn_output"], heads), block + "attn_output")
            if has_ffn_norm and has_post_norm:
                out = self._normalised(out, block + "post_attention_norm")
            self.residual = self.residual + scale * out
        if not self._has(block + "ffn_up", before.shape[1]) or not self._writes(block + "ffn_down"):
            return
        norm = "ffn_norm" if has_ffn_norm else "post_attention_norm" if has_post_norm else "attn_norm"
        source = self.residual if has_ffn_norm or has_post_norm else before
        x = self._input([block + stem for stem in _FEED_FORWARD], self._normalised(source, block + norm))
        out = self._product(self._input([block + "ffn_down"], self._activated(block, x)), block + "ffn_down")
        if self._has(block + "post_ffw_norm"):
            out = self._normalised(out, block + "post_ffw_norm")
        self.residual = self.residual + scale * out

    def _heads(self, block: str, x: Tensor) -> Tensor | None:
        """Return the inputs of `attn_output` for the inputs x of attention; None if they are not known.

        Every head mixes the values of several tokens, other heads those of other tokens.
        """
        if not self._writes(block + "attn_output"):
            return None
        width = self.shapes[block + "attn_output.weight"][1]
        if self._has(block + "attn_v", x.shape[1]):
            values = self._product(x, block + "attn_v")
        elif self._has(block + "attn_qkv", x.shape[1]):
            values = self._product(x, block + "attn_qkv")
            # Queries, as wide as the heads, come first, then keys, then as many values.
            values = values[:, (values.shape[1] + width) // 2 :]
        else:
            return None
        n_groups = int(self._setting("attention.head_count_kv", self._setting("attention.head_count", 1)))
        if not n_groups or values.shape[1] % n_groups or width % values.shape[1]:
            return None
        grouped = values.view(N_TOKENS, n_groups, 1, -1)
        n_heads = width // values.shape[1]  # in each group
        scores = SCORE_DEVIATION * torch.randn(N_TOKENS, n_groups, n_heads, ATTENDED, generator=self.generator)
        attention = scores.softmax(-1).to(x.device)
        out = torch.zeros(N_TOKENS, n_groups, n_heads, grouped.shape[-1], device=x.device)
        for i, weight in enumerate(attention.unbind(-1)):
            # Tokens are drawn at random, so the one i places before each is a random one.
            seen = torch.cat([grouped.roll(ATTENDED * head + i, 0) for head in range(n_heads)], 2)
            out += weight[..., None] * seen
        return out.view(N_TOKENS, width)

    def _activated(self, block: str, x: Tensor) -> Tensor:
        """Return the inputs of `ffn_down` for the inputs x of the feed-forward network."""
        up = self._product(x, block + "ffn_up")
        if self._has(block + "ffn_gate"):
            return torch.nn.functional.silu(self._product(x, block + "ffn_gate")) * up
        if up.shape[1] == 2 * self.shapes[block + "ffn_down.weight"][1]:  # gate and up are one matrix
            gate, up = up.chunk(2, 1)
            return torch.nn.functional.silu(gate) * up
        return torch.nn.functional.gelu(up)

    def _input(self, stems: list[str], x: Tensor) -> Tensor:
        """Scale x [n, K] to the importance of the matrices `stems`, and keep it as their inputs. Return it.

        Matrices that the file lacks are ignored. The others have the same importance.
        """
        names = [f"{stem}.weight" for stem in stems if self._has(stem, x.shape[1])]
        entry = next((self.imatrix.entries[name] for name in names if name in self.imatrix.entries), None)
        if entry:
            wanted = torch.from_numpy(entry.importance()).to(x)
            x = x * (wanted / x.square().mean(0).clamp_min(torch.finfo(x.dtype).tiny)).sqrt()
        self.inputs |= dict.fromkeys(names, x)
        return x

    def _normalised(self, x: Tensor, stem: str) -> Tensor:
        """Apply LayerNorm if the norm has a bias, else RMSNorm."""
        bias = self._vector(f"{stem}.bias")
        if bias is not None:
            x = x - x.mean(1, keepdim=True)
        x = x * torch.rsqrt(x.square().mean(1, keepdim=True) + _NORM_EPSILON)
        weight = self._vector(f"{stem}.weight")
        if weight is not None:
            x = x * weight
        return x if bias is None else x + bias

    def _product(self, x: Tensor, stem: str) -> Tensor:
        with fast_products():
            out = (x @ load_weight(self.file, f"{stem}.weight", self.device).T).float()
        self.file.release()
        bias = self._vector(f"{stem}.bias")
        return out if bias is None else out.add_(bias)

    def _has(self, stem: str, n_inputs: int | None = None) -> bool:
        """Return whether the file has the weight, and, if `n_inputs` is given, as a matrix of so many inputs."""
        shape = self.shapes.get(f"{stem}.weight")
        return shape is not None and (n_inputs is None or (len(shape) == 2 and shape[1] == n_inputs))

    def _writes(self, stem: str) -> bool:
        """Return whether the file has the matrix, with outputs as wide as the residual stream."""
        shape = self.shapes.get(f"{stem}.weight", ())
        return len(shape) == 2 and shape[0] == self.residual.shape[1]

    def _vector(self, name: str) -> Tensor | None:
        return load_weight(self.file, name, self.device) if name in self.shapes else None

    def _setting(self, key: str, default: float) -> float:
        """Return a number of the architecture's metadata; of an array, the value for the block at `position`."""
        value = self.file.setting(key, default)
        return float(value[self.position] if isinstance(value, list) else value)
