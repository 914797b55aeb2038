"""The writing of a conversion, in one file or several, that an interruption does not undo.

Until the end everything lies beside the output under names with `.partial`: the data of each file in FILE.partial, a journal in OUT.partial.jsonl.
The journal's first line says what the result depends on and which files there are. Then comes one line per tensor, written when the data is on
disk, with the codec that the header will hold. So the journal never promises what the files do not have, whenever the process dies, and a run
that resumes continues after its last line. The real names appear at the very end, a split model's first file last: nothing opens the others alone.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gguf import GGUFValueType
from numpy.typing import NDArray

from ..errors import AaacError
from ..progress import progress
from . import format as fmt
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

# Stands in for codecs that are not fitted yet: a header has the same size with any codec.
_BLANK_CODEC = fmt.Codec(np.tile(np.arange(-8, 8, dtype=np.int8), (2, 1)), 1.0, 2)


@dataclass(frozen=True)
class Record:
    """What is known of a tensor that was rounded by search, beside its data; the fields of `quantize.Quantized`."""

    codec: fmt.Codec | None
    relative_error: float
    weighted_error: float
    damping: float


Encode = Callable[[TensorInfo], tuple[Any, Record | None]]  # a tensor's data, and its record if it was searched
Codecs = Mapping[str, fmt.Codec]


@dataclass(frozen=True)
class Shard:
    """One file of the output: its tensors in order, and its metadata but for the codecs."""

    path: Path
    metadata: Metadata
    tensors: Sequence[TensorInfo]
    holds_codecs: bool

    @property
    def partial(self) -> Path:
        return self.path.with_name(self.path.name + PARTIAL)

    def header(self, codecs: Codecs) -> bytes:
        return render_header(
            {**self.metadata, **(codec_values(codecs) if codecs and self.holds_codecs else {})}, self.tensors
        )

    def n_bytes(self, codecs: Codecs) -> int:
        return len(self.header(codecs)) + sum(_padded(t, self.metadata) for t in self.tensors)


def _padded(tensor: TensorInfo, metadata: Metadata) -> int:
    return tensor.n_bytes + -tensor.n_bytes % alignment(metadata)


def shards(out: Path, metadata: Metadata, tensors: Sequence[TensorInfo], max_bytes: int | None = None) -> list[Shard]:
    """The output in one file, or in files of at most `max_bytes` of tensor data each, as llama-gguf-split counts; a larger tensor has its own.

    All metadata, codecs too, is in the first file, the only one where llama.cpp looks for it.
    """
    groups: list[list[TensorInfo]] = [[]]
    used = 0
    for tensor in tensors:
        used += _padded(tensor, metadata)
        if groups[-1] and max_bytes and used > max_bytes:
            groups.append([])
            used = _padded(tensor, metadata)
        groups[-1].append(tensor)
    if len(groups) == 1:
        return [Shard(out, metadata, tensors, holds_codecs=True)]
    others = {key: value for key, value in metadata.items() if key == "general.alignment"}
    result = []
    for no, group in enumerate(groups):
        split = {
            SPLIT_NO: Value(no, GGUFValueType.UINT16),
            SPLIT_COUNT: Value(len(groups), GGUFValueType.UINT16),
            SPLIT_TENSORS: Value(len(tensors), GGUFValueType.INT32),
        }
        result.append(
            Shard(
                shard_path(out, no + 1, len(groups)),
                {**(others if no else metadata), **split},
                group,
                holds_codecs=no == 0,
            )
        )
    return result


def codecs_of(tensors: Sequence[TensorInfo], records: Mapping[str, Record | None]) -> dict[str, fmt.Codec]:
    """The codec of every AAAC tensor, a blank one where there is no record yet."""
    known = {name: record.codec for name, record in records.items() if record and record.codec}
    return {t.name: known.get(t.name, _BLANK_CODEC) for t in tensors if t.type in fmt.TYPES_BY_ID}


class Journal:
    """The state of the conversion into `out`, as a context that nobody else can be in for the same output.

    After an error files and journal stay where at least one tensor is finished, else nothing. A conversion that does not resume removes them.
    `resume` is false where there is nothing to resume.
    """

    def __init__(self, out: Path, resume: bool = False):
        self.out, self.resume = out, resume
        self.path = out.with_name(out.name + PARTIAL + ".jsonl")
        self.fingerprint: dict[str, Any] = {}
        self.files: list[str] = []
        self.records: dict[str, Record | None] = {}
        self.complete = False  # the headers are written too, and some files may have their names already
        self.grew = False

    def __enter__(self) -> Journal:
        try:
            self.file = open_alone(self.path)
        except BlockingIOError:
            raise AaacError(
                f"{self.out}: another conversion is writing it; wait for its end, or choose another output"
            ) from None
        except OSError as e:
            raise write_error(self.out, e) from None
        self._read()
        if self.resume and not self.records:
            print(f"aaac-gguf: nothing to resume for {self.out}, starting from the beginning", file=sys.stderr)
            self.resume = False
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        with self.file:
            if not kind or not self.records:
                self._clear()
                self.path.unlink(missing_ok=True)
            elif self.grew:
                print(
                    f"aaac-gguf: {len(self.records)} tensors of {self.out} are finished; --resume continues from there",
                    file=sys.stderr,
                )
        if isinstance(error, OSError):
            raise write_error(self.out, error) from None

    def _read(self) -> None:
        end = 0
        for line in self.file:
            try:
                self._take(line)
            except (ValueError, KeyError, TypeError):
                break  # the process died while it wrote this line
            end = self.file.tell()
        self._cut(end)

    def _cut(self, end: int) -> None:
        self.file.truncate(end)
        self.file.seek(end)

    def _take(self, line: bytes) -> None:
        entry = json.loads(line)
        if not line.endswith(b"\n"):
            raise ValueError
        if "files" in entry:
            self.fingerprint, self.files = entry["fingerprint"], entry["files"]
        elif "complete" in entry:
            self.complete = True
        else:
            record = entry["record"]
            if record and record["codec"]:
                codec = record["codec"]
                record["codec"] = fmt.Codec(
                    np.array(codec["codebooks"], dtype=np.int8), codec["scale_base"], codec["scale_mantissa_bits"]
                )
            self.records[entry["tensor"]] = Record(**record) if record else None

    def _clear(self) -> None:
        for name in self.files:
            (self.out.parent / Path(name).name).unlink(missing_ok=True)

    def _append(self, entry: Mapping[str, Any]) -> None:
        self.file.write(json.dumps(entry).encode() + b"\n")
        self.file.flush()
        os.fsync(self.file.fileno())

    def check(self, fingerprint: Mapping[str, Any]) -> None:
        """Raise AaacError where a run that resumes differs from the interrupted one in one of these."""
        for key, value in fingerprint.items():
            if self.resume and self.fingerprint.get(key) != value:
                now, then = (
                    text if len(text := str(v)) < 80 else f"{text[:80]}..." for v in (value, self.fingerprint.get(key))
                )
                raise AaacError(
                    f"{self.out}: cannot resume, {key} is {now} and was {then}; repeat the interrupted command, or start over without --resume"
                )

    def start(self, fingerprint: Mapping[str, Any], shards: Sequence[Shard]) -> None:
        """Begin, or continue if this is a run that resumes: `fingerprint` is all, but for the code and the machine, that the result depends on."""
        self.check(fingerprint)
        if (
            self.resume
            and not self.complete
            and (gone := [name for name in self.files if not (self.out.parent / name).is_file()])
        ):
            raise AaacError(f"{self.out}: cannot resume, {gone[0]} is missing; start over without --resume")
        if not self.resume:
            self._clear()
            self._cut(0)
            self.records.clear()
            self.complete = False
            self.files = [shard.partial.name for shard in shards]
            self._append({"fingerprint": fingerprint, "files": self.files})
            for shard in shards:
                open(shard.partial, "wb").close()

    def add(self, name: str, record: Record | None) -> None:
        """Note that the data of a tensor is on disk."""
        entry = asdict(record) if record else None
        if entry and record and record.codec:
            entry["codec"]["codebooks"] = record.codec.codebooks.tolist()
        self._append({"tensor": name, "record": entry})
        self.records[name] = record
        self.grew = True

    def finish(self) -> None:
        self._append({"complete": True})
        self.complete = True


def check_space(out: Path, n_bytes: int, scratch_bytes: int, journal: Journal) -> None:
    """Raise AaacError unless the disk has room for the output and the temporary full-precision GGUF."""
    partials = [out.parent / name for name in journal.files]
    held = sum(512 * p.stat().st_blocks for p in partials if p.is_file())
    free = shutil.disk_usage(out.parent).free
    if n_bytes + scratch_bytes > free + held:
        temporary = f" and {scratch_bytes:,} for a temporary full-precision GGUF" if scratch_bytes else ""
        raise AaacError(
            f"{out}: needs {n_bytes:,} bytes{temporary}, and {free + held:,} are free in {out.parent}; free space or choose another output"
        )


def reader(
    shards: Sequence[Shard], journal: Journal
) -> Callable[[str], tuple[NDArray[np.uint8], Record | None] | None]:
    """What gives the data of a tensor that the interrupted run has written, uint8 [..., row bytes], and its record; None for others."""
    places: dict[str, tuple[Path, TensorInfo, int]] = {}
    codecs = codecs_of([t for shard in shards for t in shard.tensors], {})
    for shard in shards if journal.records else []:
        offset = len(shard.header(codecs))
        for tensor in shard.tensors:
            if tensor.name in journal.records:
                places[tensor.name] = shard.partial, tensor, offset
            offset += _padded(tensor, shard.metadata)

    def read_back(name: str) -> tuple[NDArray[np.uint8], Record | None] | None:
        if name not in places:
            return None
        path, tensor, offset = places[name]
        data = np.fromfile(path, dtype=np.uint8, count=tensor.n_bytes, offset=offset)
        return data.reshape(*tensor.shape[:-1], -1), journal.records[name]

    return read_back


def write_shards(shards: Sequence[Shard], journal: Journal, encode: Encode) -> None:
    """Write what the journal lacks, and give the files their names."""
    tensors = [t for shard in shards for t in shard.tensors]
    n_weights = {t.name: t.n_weights for t in tensors}
    done = sum(n_weights[name] for name in journal.records)
    bar = progress(
        total=sum(n_weights.values()),
        initial=done,
        desc="quantizing",
        unit="weight",
        unit_scale=True,
    )
    with bar:
        for shard in shards if not journal.complete else []:
            with open(shard.partial, "r+b") as f:
                f.seek(len(shard.header(codecs_of(tensors, {}))))
                for tensor in shard.tensors:
                    if tensor.name in journal.records:
                        f.seek(_padded(tensor, shard.metadata), os.SEEK_CUR)
                        continue
                    data, record = encode(tensor)
                    write_tensor(f, tensor, data, alignment(shard.metadata))
                    f.flush()
                    os.fsync(f.fileno())
                    journal.add(tensor.name, record)
                    bar.update(tensor.n_weights)
    if not journal.complete:
        # The codecs are in the first shard's header and known only now; no header before this point, so that no tool takes a partial for a model.
        codecs = codecs_of(tensors, journal.records)
        for shard in shards:
            with open(shard.partial, "r+b") as f:
                f.write(shard.header(codecs))
                f.flush()
                os.fsync(f.fileno())
        journal.finish()
    if len(shards) > 1 and shards[0].partial.is_file():
        shards[0].path.unlink(missing_ok=True)  # an older model's first file must not open the new others
    for shard in reversed(shards):
        if shard.partial.is_file():
            os.replace(shard.partial, shard.path)
    _sync(shards[0].path.parent)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


PARTIAL = ".partial"


def write(path: Path, metadata: Metadata, tensors: Sequence[TensorInfo], data: Iterable[Any]) -> None:
    """Write a GGUF with the metadata as it is; `data` gives each tensor's array, in order."""
    with atomic(path) as f:
        f.write(render_header(metadata, tensors))
        for info, values in zip(tensors, data, strict=True):
            write_tensor(f, info, values, alignment(metadata))


def write_tensor(f: BinaryIO, info: TensorInfo, values: Any, align: int) -> None:
    """Write a tensor's array where `f` stands, and zeros up to the alignment."""
    raw = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    assert len(raw) == info.n_bytes, f"tensor {info.name} takes {len(raw)} bytes, planned {info.n_bytes}"
    f.write(raw.data)
    f.write(bytes(-len(raw) % align))


@contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """A file that appears under `path` only when the block ends well: written as `path`.partial, then renamed; removed after an error.

    Raises AaacError when another process is writing there.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        with open_alone(partial) as f:
            try:
                if os.fstat(f.fileno()).st_size:  # left by a run that was killed
                    f.truncate()
                yield f
                f.flush()
                os.fsync(f.fileno())
                os.replace(partial, path)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise
    except BlockingIOError:
        raise AaacError(f"{path}: another aaac-gguf is writing it; wait for it, or choose another output") from None
    except OSError as e:
        raise write_error(path, e) from None


def write_error(path: Path, e: OSError) -> AaacError:
    """What to tell the user of an error while writing `path`."""
    if e.errno in (errno.ENOSPC, errno.EDQUOT):
        return AaacError(f"{path}: the disk is full; free space or choose another output")
    return AaacError(f"{path}: cannot be written: {e.strerror or e}; choose another output")


def open_alone(path: Path) -> BinaryIO:
    """Open `path` to read and write, made where it is missing, and lock it until it is closed. Raises BlockingIOError where another process has."""
    while True:
        f = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            f.close()
            raise
        except OSError:  # a file system without locks
            return f
        # Whoever held the lock may have renamed or removed the file since it was opened here.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(f.fileno()), os.stat(path)):
                return f
        f.close()
