"""Write GGUF files: whole ones at once, and those of a conversion tensor by tensor.

Until its end everything of a conversion is beside the output under names with `.partial`: the data of each file in
FILE.partial, the journal in OUT.partial.jsonl. Tensors come in any order, since all offsets are known before any data.
The real names appear at the very end, a split model's first file last: nothing opens the others alone.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..errors import AaacError
from . import format as fmt
from .atomic import atomic, sync_folder
from .gguf import Metadata, TensorInfo, alignment, is_shard, render_header, shards
from .journal import Journal, Record
from .layout import Layout


def write(path: Path, metadata: Metadata, tensors: Sequence[TensorInfo], data: Iterable[Any]) -> None:
    """Write a GGUF file with the metadata as it is. `data` gives each tensor's array, in order."""
    with atomic(path) as f:
        f.write(render_header(metadata, tensors))
        for info, values in zip(tensors, data, strict=True):
            write_tensor(f, info, values, alignment(metadata))


def write_tensor(f: BinaryIO, info: TensorInfo, values: Any, align: int) -> None:
    """Write a tensor's array at the position of `f`, and zeros up to the alignment."""
    raw = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    assert len(raw) == info.n_bytes, f"tensor {info.name} takes {len(raw)} bytes, planned {info.n_bytes}"
    f.write(raw.data)
    f.write(bytes(-len(raw) % align))


class Output:
    """The files of a conversion that is under way."""

    def __init__(self, layout: Layout, journal: Journal, fingerprint: Mapping[str, Any]):
        """Begin, or continue if the journal is that of a run that resumes.

        fingerprint: see `Journal.start`. Raises AaacError if the interrupted run was another.
        """
        self.layout, self.journal = layout, journal
        journal.start(fingerprint, [shard.partial for shard in layout.shards])
        self._places = {tensor.name: (shard, tensor, offset) for shard, tensor, offset in layout.places()}

    @property
    def finished(self) -> Mapping[str, Record]:
        """Return the records of the tensors that are on disk."""
        return self.journal.records

    def put(self, name: str, data: Any, record: Record) -> None:
        """Write the data of a tensor where it belongs, and note in the journal that it is there."""
        shard, tensor, offset = self._places[name]
        with open(shard.partial, "r+b") as f:
            f.seek(offset)
            write_tensor(f, tensor, data, alignment(shard.metadata))
            f.flush()
            os.fsync(f.fileno())
        self.journal.add(name, record)

    def read(self, name: str) -> fmt.U8:
        """Return the data of a tensor that is finished: uint8 [..., row bytes]."""
        shard, tensor, offset = self._places[name]
        data = np.fromfile(shard.partial, dtype=np.uint8, count=tensor.n_bytes, offset=offset)
        return data.reshape(*tensor.shape[:-1], -1)

    def finish(self) -> None:
        """Write the headers and give the files their names."""
        shards = self.layout.shards
        if not self.journal.complete:
            # The codecs are in the first header and known only now. There is no header before this point, so that no
            # tool takes a partial file for a model.
            codecs = self.layout.codecs({name: record.codec for name, record in self.finished.items()})
            for shard in shards:
                with open(shard.partial, "r+b") as f:
                    f.write(shard.header(codecs))
                    f.flush()
                    os.fsync(f.fileno())
            self.journal.finish()
        if len(shards) > 1 and shards[0].partial.is_file():
            shards[0].path.unlink(missing_ok=True)  # an older model's first file must not open the new others
        for shard in reversed(shards):
            if shard.partial.is_file():
                os.replace(shard.partial, shard.path)
        sync_folder(shards[0].path.parent)


def check_output(out: Path, source: Path) -> None:
    """Raise AaacError unless a file can be made at `out` that is no part of `source`, a file or a folder."""
    if out.is_dir():
        raise AaacError(f"{out}: is a directory; name a file")
    if out.exists() and not out.is_file():
        raise AaacError(f"{out}: is no ordinary file, and would be replaced; choose another output")
    if is_shard(out):
        raise AaacError(f"{out}: is named like one file of a split model; choose another name, or set `split_max_size`")
    parts = shards(source) if source.is_file() else source.iterdir() if source.is_dir() else ()
    if out.exists() and any(path.is_file() and path.samefile(out) for path in parts):
        raise AaacError(f"{out}: belongs to the source, which would be lost; choose another output")
    if not out.parent.is_dir():
        raise AaacError(f"{out}: there is no directory {out.parent}; make it first")
    if not os.access(out.parent, os.W_OK):
        raise AaacError(f"{out}: {out.parent} cannot be written; choose another output")


def check_space(out: Path, n_bytes: int, scratch_bytes: int, held_bytes: int) -> None:
    """Raise AaacError unless the disk has room for the output and for temporary files.

    held_bytes: what an interrupted run holds already.
    """
    free = shutil.disk_usage(out.parent).free + held_bytes
    if n_bytes + scratch_bytes > free:
        temporary = f" and {scratch_bytes:,} for temporary files" if scratch_bytes else ""
        raise AaacError(
            f"{out}: needs {n_bytes:,} bytes{temporary}, and {free:,} are free in {out.parent}; "
            "free space or choose another output"
        )
