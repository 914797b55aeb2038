"""Estimate second moments where transformers runs no model, from the weights, a text and an importance matrix.

The tokens of the bundled text become embeddings and go through the decoder blocks, whose parts are known by the names
of their tensors. This is the model's own forward pass as far as those names tell it: what an architecture does besides
is left out. That costs accuracy, and no more: moments decide what is rounded how, not what a file means.

An importance matrix holds the mean of x_k^2 of every input channel k: the diagonal of `H = E[x x^T]`. If there is one,
every channel is scaled to it before each matrix, so that errors do not grow from block to block.

Parts of a block other than attention, experts and a dense feed-forward network add nothing here, and have no moments.
Nor have the experts of a block whose attention is of another kind: what they are sent is not known well enough.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..errors import AaacError, warn
from ..files.gguf import GgufFile, block_number
from ..files.imatrix import Imatrix
from ..models.blocks import fast_products
from ..models.weights import load_weight
from ..quantizer.moments import Moments, gram
from ..resources import CALIBRATION_TEXT
from .experts import ExpertHessians, ExpertInputs, shrunk
from .tokens import text_tokens

# So many sequences of so many tokens go through the blocks.
N_SEQUENCES, LENGTH = 16, 512

_ATTENTION = ("attn_q", "attn_k", "attn_v", "attn_qkv")  # the matrices that multiply the normalised residual stream
_FEED_FORWARD = ("ffn_gate", "ffn_up")
# Architectures whose chosen experts' weights do not sum to 1. Others say so in the metadata, or have weights that do.
_UNEVEN_EXPERTS = ("deepseek", "llada-moe", "olmoe", "qwen2moe")

# Architectures whose rotary positions turn neighbouring channels. In others a head's first half goes with its second.
_NEIGHBOURS_TURN = """
    arcee arctic baichuan bailingmoe chameleon chatglm cohere2 command-r deci deepseek deepseek2 ernie4_5 ernie4_5-moe
    glm4 granite granitehybrid granitemoe internlm2 llama llama-embed llama4 minicpm mistral3 mistral4 neo-bert olmo plm
    smollm3 starcoder xverse
""".split()  # noqa: SIM905


def estimation_tokens(source: Path, file: GgufFile, seed: int = 0) -> Tensor:
    """Return int64 [N_SEQUENCES, LENGTH] of the bundled text, or shorter sequences if the model has fewer positions.

    source: the model, for its tokenizer. If transformers cannot load that, tokens are drawn at random, with a warning.
    """
    length, n_vocab = file.positions(LENGTH), file.shapes["token_embd.weight"][0]
    try:
        tokens, _ = text_tokens(source, CALIBRATION_TEXT, N_SEQUENCES * LENGTH // length, length)
        if int(tokens.max()) < n_vocab:
            return tokens
        reason = f"{source}: its tokenizer makes tokens that have no embeddings"
    except AaacError as e:
        reason = str(e).partition("; set ")[0]  # without what to do about a calibration
    warn(f"{reason}; moments are estimated from random tokens, which is less exact")
    return torch.randint(n_vocab, (N_SEQUENCES, length), generator=torch.Generator().manual_seed(seed))


class SyntheticMoments:
    """Second moments by GGUF tensor.

    They must be asked for in the order of the blocks, since only one block's inputs are in memory.

    position  the next block to run; the number of blocks stands for the head
    inputs    float32 [n * T, K] by tensor, of the block before `position`; those of experts apart
    residual  float32 [n * T, d]: the residual stream after it
    """

    def __init__(self, file: GgufFile, tokens: Tensor, imatrix: Imatrix, device: str = "cpu"):
        """file: the full-precision model; tokens: int64 [n, T].

        imatrix: may lack tensors, whose inputs are then not scaled.
        """
        self.file, self.shapes, self.imatrix, self.device = file, file.shapes, imatrix, device
        self.n_blocks = 1 + max(block_number(name, -1) for name in self.shapes)
        self.position = 0
        self.inputs: dict[str, Tensor | ExpertInputs] = {}
        self.n_sequences, self.length = tokens.shape
        self.epsilon = self._setting(
            "attention.layer_norm_rms_epsilon", self._setting("attention.layer_norm_epsilon", 1e-5)
        )
        width = self.shapes["token_embd.weight"][1]
        # Gemma's factor is not in the metadata.
        factor = width**0.5 if self._is_gemma else self._setting("embedding_scale", 1.0)
        self.residual = load_weight(file, "token_embd.weight", device, tokens.flatten()) * factor
        self.has_positions = "position_embd.weight" in self.shapes
        if self.has_positions:
            positions = torch.arange(self.length).repeat(self.n_sequences)
            self.residual += load_weight(file, "position_embd.weight", device, positions)

    @property
    def _is_gemma(self) -> bool:
        return self.file.architecture.startswith("gemma")

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
        if isinstance(x, ExpertInputs):
            if not x.x.isfinite().all():
                return None
            entry = self.imatrix.entries.get(name)
            importance = None if entry is None else torch.from_numpy(entry.importance()).view(len(x.rows), -1)
            some_idle = not all(map(len, x.rows))
            of_layer = shrunk(gram(x.x) / len(x.x), len(x.x)) if x.of_tokens and some_idle else None
            return Moments(ExpertHessians(x, importance, of_layer), None)
        hessian = shrunk(gram(x) / len(x), len(x))
        return Moments(hessian, None) if hessian.isfinite().all() else None

    def _run_block(self, block: str) -> None:
        """Send the residual stream through a block, and keep the inputs of the block's matrices."""
        scale = self._setting("residual_scale", 1.0)
        # Norms are of what goes into a half, of what comes out, or both. In some architectures `post_attention_norm` is
        # what others call `ffn_norm`. Without either, attention and feed-forward network have the same inputs.
        has_ffn_norm, has_post_norm = self._has(block + "ffn_norm"), self._has(block + "post_attention_norm")
        only_of_outputs = self._has(block + "post_ffw_norm") and not self._has(block + "attn_norm")
        before = self.residual
        x = before if only_of_outputs else self._normalised(before, block + "attn_norm")
        x = self._input([block + stem for stem in _ATTENTION], x)
        heads = self._heads(block, x)
        if heads is not None:
            out = self._product(self._input([block + "attn_output"], heads), block + "attn_output")
            if has_post_norm and (has_ffn_norm or only_of_outputs):
                out = self._normalised(out, block + "post_attention_norm")
            self.residual = self.residual + scale * out
        norm = "ffn_norm" if has_ffn_norm else "post_attention_norm" if has_post_norm else "attn_norm"
        given = self.residual if has_ffn_norm or has_post_norm else before
        given = given if only_of_outputs else self._normalised(given, block + norm)
        if self._has(block + "ffn_gate_inp"):
            fed = None if heads is None else self._mixture(block, given)
        else:
            fed = self._dense(block, given)
        if fed is None:
            return
        if self._has(block + "post_ffw_norm"):
            fed = self._normalised(fed, block + "post_ffw_norm")
        self.residual = self.residual + scale * fed

    def _heads(self, block: str, x: Tensor) -> Tensor | None:
        """Return the inputs of `attn_output` for the inputs x of attention; None if they are not known."""
        if not self._writes(block + "attn_output"):
            return None
        width = self.shapes[block + "attn_output.weight"][1]
        if all(self._has(block + stem, x.shape[1]) for stem in ("attn_q", "attn_k", "attn_v")):
            q, k, v = (self._product(x, block + stem) for stem in ("attn_q", "attn_k", "attn_v"))
        elif self._has(block + "attn_qkv", x.shape[1]):
            fused = self._product(x, block + "attn_qkv")
            # Queries, as wide as the heads, come first, then keys, then as many values.
            q, rest = fused[:, :width], fused[:, width:]
            k, v = rest.tensor_split(2, 1)
        else:
            return None
        n_groups = int(self._setting("attention.head_count_kv", self._setting("attention.head_count", 1)))
        if not n_groups or k.shape[1] % n_groups or v.shape[1] % n_groups or q.shape[1] % (k.shape[1] // n_groups):
            return None
        n_heads = q.shape[1] // (k.shape[1] // n_groups)
        if n_heads % n_groups or n_heads * (v.shape[1] // n_groups) != width:
            return None
        q, k = (
            self._normalised_heads(q, n_heads, block + "attn_q_norm"),
            self._normalised_heads(k, n_groups, block + "attn_k_norm"),
        )
        v = v.view(self.n_sequences, self.length, n_groups, -1).transpose(1, 2)
        if not self.has_positions:
            q, k = self._rotated(q), self._rotated(k)
        out = torch.nn.functional.scaled_dot_product_attention(
            q,
            k,
            v,
            is_causal=bool(self._setting("attention.causal", True)),
            scale=self._setting("attention.scale", 0) or None,
            enable_gqa=True,
        )
        return out.transpose(1, 2).reshape(len(x), width)

    def _normalised_heads(self, x: Tensor, n_heads: int, norm: str) -> Tensor:
        """Return queries or keys [n * T, heads * d] as [n, heads, T, d], normalised if the file has their norm."""
        shape = self.shapes.get(f"{norm}.weight")
        if shape == (x.shape[1],):
            x = self._normalised(x, norm)
        heads = x.view(self.n_sequences, self.length, n_heads, -1).transpose(1, 2)
        return self._normalised(heads, norm) if shape == (heads.shape[-1],) else heads

    def _rotated(self, x: Tensor) -> Tensor:
        """Apply rotary positions to queries or keys [n, heads, T, d].

        Return their channels in another order, the same for both: their products are what counts.
        """
        n = min(int(self._setting("rope.dimension_count", x.shape[-1])), x.shape[-1]) // 2 * 2
        frequencies = self._setting("rope.freq_base", 10000.0) ** -(torch.arange(0, n, 2, device=x.device) / n)
        factors = self._vector("rope_freqs.weight")
        if factors is not None and factors.shape == frequencies.shape:
            frequencies = frequencies / factors
        angles = torch.arange(self.length, device=x.device)[:, None] * frequencies
        turned, rest = x[..., :n], x[..., n:]
        neighbours = self.file.architecture in _NEIGHBOURS_TURN
        a, b = (turned[..., ::2], turned[..., 1::2]) if neighbours else turned.chunk(2, -1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([a * cos - b * sin, a * sin + b * cos, rest], -1)

    def _dense(self, block: str, x: Tensor, suffix: str = "") -> Tensor | None:
        """Return the outputs of a feed-forward network for its inputs x; None if they are not known.

        suffix: of the names of its matrices.
        """
        down = f"{block}ffn_down{suffix}"
        if not self._has(f"{block}ffn_up{suffix}", x.shape[1]) or not self._writes(down):
            return None
        x = self._input([block + stem + suffix for stem in _FEED_FORWARD], x)
        up = self._product(x, f"{block}ffn_up{suffix}")
        gate = self._product(x, f"{block}ffn_gate{suffix}") if self._has(f"{block}ffn_gate{suffix}") else None
        return self._product(self._input([down], self._activated(gate, up, self.shapes[f"{down}.weight"][1])), down)

    def _mixture(self, block: str, x: Tensor) -> Tensor | None:
        """Return the outputs of experts and of shared ones for their inputs x; None if they are not known."""
        router, gate, up, down = (
            self.shapes.get(f"{block}{stem}.weight", ())
            for stem in ("ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
        )
        if len(router) != 2 or len(down) != 3:
            return None
        (n_experts, width), n_inner = router, down[2]
        inwards, outwards = (n_experts, n_inner, width), (n_experts, width, n_inner)
        if width != x.shape[1] or gate not in ((), inwards) or up != inwards or down != outwards:
            return None
        out = self._experts(block, x)
        shared = self._dense(block, x, "_shexp")
        if shared is not None:
            share = self._vector(block + "ffn_gate_inp_shexp.weight")
            out += shared if share is None else shared * (x @ share.view(-1, 1)).sigmoid()
        return out

    def _activated(self, gate: Tensor | None, up: Tensor, width: int) -> Tensor:
        """Return the inputs [n, width] of `ffn_down`. Without a gate, `up` may hold both."""
        if gate is None and up.shape[1] == 2 * width:
            gate, up = up.chunk(2, 1)
        if gate is None:
            return torch.nn.functional.gelu(up)
        gelu, silu = torch.nn.functional.gelu, torch.nn.functional.silu
        return (gelu if self._is_gemma else silu)(gate) * up

    def _experts(self, block: str, x: Tensor) -> Tensor:
        """Send every token to the experts that its router chooses, and keep their inputs. Return outputs [n, d]."""
        names = {stem: f"{block}{stem}_exps.weight" for stem in ("ffn_gate", "ffn_up", "ffn_down")}
        n_experts, _, width = self.shapes[names["ffn_down"]]
        chosen, weights = self._routed(block, x)
        out, inner = torch.zeros_like(x), x.new_empty(chosen.numel(), width)
        rows: list[Tensor] = []
        own: list[Tensor] = []
        for expert in range(n_experts):
            tokens, nth = (chosen == expert).nonzero(as_tuple=True)
            start = sum(len(of_expert) for of_expert in rows)
            rows.append(tokens)
            own.append(torch.arange(start, start + len(tokens), device=x.device))
            if not len(tokens):
                continue
            number = torch.tensor([expert])
            gate, up, down = (
                load_weight(self.file, name, self.device, number)[0].T if name in self.shapes else None
                for name in names.values()
            )
            self.file.release()
            assert up is not None
            assert down is not None
            with fast_products():
                opened = None if gate is None else (x[tokens] @ gate).float()
                inner[own[-1]] = self._activated(opened, (x[tokens] @ up).float(), width)
                made = (inner[own[-1]] @ down).float()
            out.index_add_(0, tokens, made * weights[tokens, nth, None])
        self.inputs |= {
            names["ffn_gate"]: ExpertInputs(x, rows, True),
            names["ffn_up"]: ExpertInputs(x, rows, True),
            names["ffn_down"]: ExpertInputs(inner, own, False),
        }
        return out

    def _routed(self, block: str, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the experts [n, k] that the router chooses for each token, and the weights of their outputs."""
        logits = self._product(x, block + "ffn_gate_inp")
        scores = logits.sigmoid() if self._setting("expert_gating_func", 1) == 2 else logits.softmax(1)
        bias = self._vector(block + "exp_probs_b.bias")
        n_used = min(int(self._setting("expert_used_count", 1)), scores.shape[1])
        chosen = (scores if bias is None else scores + bias).topk(n_used, 1).indices
        weights = scores.gather(1, chosen)
        if self._setting("expert_weights_norm", self.file.architecture not in _UNEVEN_EXPERTS):
            weights = weights / weights.sum(1, keepdim=True)
        return chosen, weights * (self._setting("expert_weights_scale", 0) or 1)

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
        """Apply LayerNorm to the last dimension if the norm has a bias, else RMSNorm."""
        bias = self._vector(f"{stem}.bias")
        if bias is not None:
            x = x - x.mean(-1, keepdim=True)
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.epsilon)
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
