"""Lay out a model in one GGUF file or several: headers, and the place of every tensor, before any data is known."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGUFValueType

from . import format as fmt
from .atomic import PARTIAL
from .gguf import (
    SPLIT_COUNT,
    SPLIT_NO,
    SPLIT_TENSORS,
    Metadata,
    TensorInfo,
    Value,
    alignment,
    codec_values,
    render_header,
    shard_path,
)

Codecs = Mapping[str, fmt.Codec]

# Stands in for codecs that are not fitted yet: a header has the same size with any codec.
_BLANK_CODEC = fmt.Codec(np.tile(np.arange(-8, 8, dtype=np.int8), (2, 1)), 1.0, 2)


@dataclass(frozen=True)
class Shard:
    """One file of the output: its tensors in order, and its metadata but for the codecs."""

    path: Path
    metadata: Metadata
    tensors: Sequence[TensorInfo]
    holds_codecs: bool

    @property
    def partial(self) -> Path:
        """Return the name under which the file is written."""
        return self.path.with_name(self.path.name + PARTIAL)

    def header(self, codecs: Codecs) -> bytes:
        """Return all that precedes the tensor data."""
        return render_header(
            {**self.metadata, **(codec_values(codecs) if codecs and self.holds_codecs else {})}, self.tensors
        )

    def padded_bytes(self, tensor: TensorInfo) -> int:
        """Return the bytes that a tensor takes up to the next one's start."""
        return tensor.n_bytes + -tensor.n_bytes % alignment(self.metadata)


@dataclass(frozen=True)
class Layout:
    """The files of the output, in order."""

    shards: Sequence[Shard]

    @property
    def tensors(self) -> list[TensorInfo]:
        """Return the tensors of all files."""
        return [tensor for shard in self.shards for tensor in shard.tensors]

    @property
    def n_bytes(self) -> int:
        """Return the size of all files together."""
        codecs = self.codecs({})
        return sum(len(s.header(codecs)) + sum(map(s.padded_bytes, s.tensors)) for s in self.shards)

    def codecs(self, known: Mapping[str, fmt.Codec | None]) -> dict[str, fmt.Codec]:
        """Return the codec of every AAAC tensor: a blank one for those that are not known yet."""
        return {t.name: known.get(t.name) or _BLANK_CODEC for t in self.tensors if t.type in fmt.TYPES_BY_ID}

    def places(self) -> Iterator[tuple[Shard, TensorInfo, int]]:
        """Yield every tensor with its file and its offset there in bytes."""
        codecs = self.codecs({})
        for shard in self.shards:
            offset = len(shard.header(codecs))
            for tensor in shard.tensors:
                yield shard, tensor, offset
                offset += shard.padded_bytes(tensor)


def lay_out(out: Path, metadata: Metadata, tensors: Sequence[TensorInfo], max_bytes: int | None = None) -> Layout:
    """Lay out `tensors` in one file, or in files of at most `max_bytes` of tensor data each.

    Bytes are counted as in llama-gguf-split. A larger tensor has a file of its own. All metadata, codecs too, is in the
    first file, the only one in which llama.cpp looks for it.
    """
    whole = Shard(out, metadata, tensors, holds_codecs=True)
    groups: list[list[TensorInfo]] = [[]]
    used = 0
    for tensor in tensors:
        used += whole.padded_bytes(tensor)
        if groups[-1] and max_bytes and used > max_bytes:
            groups.append([])
            used = whole.padded_bytes(tensor)
        groups[-1].append(tensor)
    if len(groups) == 1:
        return Layout([whole])
    others = {key: value for key, value in metadata.items() if key == "general.alignment"}
    shards = []
    for no, group in enumerate(groups):
        split = {
            SPLIT_NO: Value(no, GGUFValueType.UINT16),
            SPLIT_COUNT: Value(len(groups), GGUFValueType.UINT16),
            SPLIT_TENSORS: Value(len(tensors), GGUFValueType.INT32),
        }
        path = shard_path(out, no + 1, len(groups))
        shards.append(Shard(path, {**(others if no else metadata), **split}, group, holds_codecs=no == 0))
    return Layout(shards)
