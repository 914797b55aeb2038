"""Remember what of a conversion is finished, so that an interruption does not undo it.

The journal is a file beside the output, OUT.partial.jsonl. Its first line says what the result depends on and which
files there are. Then comes one line per tensor, written after the tensor's data is on disk. So the journal never
promises what the files do not have, whenever the process dies.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..errors import AaacError
from . import format as fmt
from .atomic import PARTIAL, open_alone, write_error


@dataclass(frozen=True)
class Record:
    """A finished tensor, but for its data.

    rounding        how it was rounded: "copy", "nearest", "importance", "feedback" or "feedback (synthetic)"
    codec           of an AAAC tensor
    relative_error  sum (w - q)^2 / sum w^2, and the errors below: None for a tensor that was not rounded by search
    weighted_error  the same under the importance, or under the second moments if there are any
    damping         what the Hessian's diagonal took, relative to its mean
    """

    rounding: str
    codec: fmt.Codec | None = None
    relative_error: float | None = None
    weighted_error: float | None = None
    damping: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Return the record as a JSON object."""
        entry = asdict(self)
        if self.codec:
            entry["codec"]["codebooks"] = self.codec.codebooks.tolist()
        return entry

    @staticmethod
    def from_json(entry: Mapping[str, Any]) -> Record:
        """Return the record of a JSON object. Raises KeyError, TypeError or ValueError for another."""
        codec = entry["codec"]
        if codec:
            books = np.array(codec["codebooks"], dtype=np.int8)
            codec = fmt.Codec(books, codec["scale_base"], codec["scale_mantissa_bits"])
        return Record(**{**entry, "codec": codec})


class Journal:
    """The journal of the conversion into `out`, as a context that nobody else can be in for the same output.

    After an error, files and journal stay if at least one tensor is finished. Otherwise nothing stays. A conversion
    that does not resume removes them. `resume` becomes false if there is nothing to resume.
    """

    def __init__(self, out: Path, resume: bool = False):
        self.out, self.resume = out, resume
        self.path = out.with_name(out.name + PARTIAL + ".jsonl")
        self.fingerprint: dict[str, Any] = {}
        self.files: list[str] = []  # names of the partial files
        self.records: dict[str, Record] = {}  # by finished tensor
        self.complete = False  # the headers are written too, and some files may have their names already
        self._grew = False

    def __enter__(self) -> Journal:
        try:
            self._file: BinaryIO = open_alone(self.path)
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
        with self._file:
            if not kind or not self.records:
                self._clear()
                self.path.unlink(missing_ok=True)
            elif self._grew:
                done = f"{len(self.records)} tensors of {self.out} are finished"
                print(f"aaac-gguf: {done}; --resume continues from there", file=sys.stderr)
        if isinstance(error, OSError):
            raise write_error(self.out, error) from None

    def check(self, fingerprint: Mapping[str, Any]) -> None:
        """Raise AaacError if a run that resumes differs from the interrupted one in one of these."""
        for key, value in fingerprint.items():
            if self.resume and self.fingerprint.get(key) != value:
                both = (value, self.fingerprint.get(key))
                now, then = (text if len(text := str(v)) < 80 else f"{text[:80]}..." for v in both)
                raise AaacError(
                    f"{self.out}: cannot resume, {key} is {now} and was {then}; "
                    "repeat the interrupted command, or start over without `resume`"
                )

    def start(self, fingerprint: Mapping[str, Any], files: Sequence[Path]) -> None:
        """Begin, or continue if this is a run that resumes.

        fingerprint: all that the result depends on, but for the code and the machine. files: the partial files, which
        are made empty by a run that begins.
        """
        self.check(fingerprint)
        if self.resume:
            gone = [name for name in self.files if not (self.out.parent / name).is_file()]
            if gone and not self.complete:
                raise AaacError(f"{self.out}: cannot resume, {gone[0]} is missing; start over without `resume`")
            return
        self._clear()
        self._cut(0)
        self.records.clear()
        self.complete = False
        self.files = [path.name for path in files]
        self._append({"fingerprint": fingerprint, "files": self.files})
        for path in files:
            open(path, "wb").close()

    def add(self, name: str, record: Record) -> None:
        """Note that the data of a tensor is on disk."""
        self._append({"tensor": name, "record": record.to_json()})
        self.records[name] = record
        self._grew = True

    def finish(self) -> None:
        """Note that the headers are on disk too."""
        self._append({"complete": True})
        self.complete = True

    @property
    def held_bytes(self) -> int:
        """Return the disk space that the partial files take."""
        partials = (self.out.parent / name for name in self.files)
        return sum(512 * p.stat().st_blocks for p in partials if p.is_file())

    def _read(self) -> None:
        end = 0
        for line in self._file:
            try:
                self._take(line)
            except (ValueError, KeyError, TypeError):
                break  # the process died while it wrote this line
            end = self._file.tell()
        self._cut(end)

    def _take(self, line: bytes) -> None:
        entry = json.loads(line)
        if not line.endswith(b"\n"):
            raise ValueError
        if "files" in entry:
            self.fingerprint, self.files = entry["fingerprint"], entry["files"]
        elif "complete" in entry:
            self.complete = True
        else:
            self.records[entry["tensor"]] = Record.from_json(entry["record"])

    def _cut(self, end: int) -> None:
        self._file.truncate(end)
        self._file.seek(end)

    def _clear(self) -> None:
        for name in self.files:
            (self.out.parent / Path(name).name).unlink(missing_ok=True)

    def _append(self, entry: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(entry).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
