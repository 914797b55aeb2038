"""Make Llama models with random weights, to measure speed with: it does not depend on the values."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from gguf import GGUFValueType

from aaac_gguf.files import format as fmt
from aaac_gguf.files.gguf import GgufFile, TensorInfo, Value, codec_values, field_values
from aaac_gguf.files.output import write


@dataclass(frozen=True)
class Shape:
    """A Llama's dimensions. If it is `tied`, the output matrix is the embedding."""

    n_layers: int
    n_embd: int
    n_ff: int
    n_head: int
    n_head_kv: int
    n_vocab: int
    tied: bool

    @property
    def linear(self) -> dict[str, tuple[int, int]]:
        """Return the shapes of a layer's matrices, [N, K]."""
        kv = self.n_embd // self.n_head * self.n_head_kv
        return {
            "attn_q": (self.n_embd, self.n_embd),
            "attn_k": (kv, self.n_embd),
            "attn_v": (kv, self.n_embd),
            "attn_output": (self.n_embd, self.n_embd),
            "ffn_gate": (self.n_ff, self.n_embd),
            "ffn_up": (self.n_ff, self.n_embd),
            "ffn_down": (self.n_embd, self.n_ff),
        }

    def matrix(self, name: str) -> tuple[int, int] | None:
        """Return the shape [N, K] of the tensor of that name, None for a norm."""
        part = name.removesuffix(".weight").split(".")[-1]
        return (self.n_vocab, self.n_embd) if part in ("token_embd", "output") else self.linear.get(part)


def one_layer(path: Path, shape: Shape, n_rows: int | None = None) -> None:
    """Write a Llama of one layer with random F16 weights and no tokenizer.

    n_rows: rows of every matrix, at most. Such a file is a seed for `grow`.
    """
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(8192)
    writer.add_embedding_length(shape.n_embd)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(shape.n_head_kv)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500000.0)
    writer.add_vocab_size(shape.n_vocab)
    writer.add_tokenizer_model("none")
    names = ["token_embd", *([] if shape.tied else ["output"]), *(f"blk.0.{name}" for name in shape.linear)]
    for name in names:
        n, k = shape.matrix(name) or (0, 0)
        weight = 0.02 * rng.standard_normal((min(n, n_rows or n), k), dtype=np.float32)
        writer.add_tensor(f"{name}.weight", weight.astype(np.float16))
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(shape.n_embd, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def grow(source: GgufFile, shape: Shape, out: Path) -> None:
    """Write the model of `shape` whose layers and rows repeat those of `source`.

    Each has memory of its own, so that as much is read as in a trained model.
    """
    infos, origin, codecs = [], {}, {}
    for name, tensor in source.tensors.items():
        for i in range(shape.n_layers if name.startswith("blk.0.") else 1):
            new = name.replace("blk.0.", f"blk.{i}.")
            full = shape.matrix(name) or tuple(int(n) for n in reversed(tensor.shape))
            infos.append(TensorInfo(new, full, tensor.tensor_type))
            origin[new] = name
            if name in source.codecs:
                codecs[new] = source.codecs[name]
    metadata = {
        key: value
        for key, value in field_values(source.fields).items()
        if not key.startswith("aaac.") or key == fmt.KEY_QUANTIZER
    }
    metadata["llama.block_count"] = Value(shape.n_layers, GGUFValueType.UINT32)
    metadata |= codec_values(codecs) if codecs else {}

    def data(info: TensorInfo) -> np.ndarray:
        rows = source.tensors[origin[info.name]].data
        return np.resize(rows, (info.shape[0], *rows.shape[1:]))

    write(out, metadata, infos, map(data, infos))
