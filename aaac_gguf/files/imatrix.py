"""Read llama.cpp's importance files, GGUF and legacy .dat, write GGUF, and say what they do not cover.

An importance matrix holds the sum of x_k^2 for every weight tensor and input channel k, over the tokens that reached
the tensor, and the number of those tokens.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import gguf
import numpy as np

from ..errors import AaacError
from .format import F32
from .gguf import TensorInfo, Value, read
from .output import write

SUFFIX_SUMS, SUFFIX_COUNTS = ".in_sum2", ".counts"


@dataclass(frozen=True)
class Entry:
    """The statistics of one tensor: `sums` float32 [E, K] of x^2, and `counts` float32 [E] of tokens.

    E is 1, or the number of experts.
    """

    sums: F32
    counts: F32

    def importance(self) -> F32:
        """Return the mean of x^2 per channel: float32 [K], or [E, K] for experts.

        An expert that no token reached weighs as much as the mean of those that tokens reached, or 1 if there are none.
        """
        reached = self.counts > 0
        means = np.divide(self.sums, self.counts[:, None], out=np.zeros_like(self.sums), where=reached[:, None])
        means[~reached] = means[reached].mean() if reached.any() else 1
        return means[0] if len(means) == 1 else means


@dataclass(frozen=True)
class Coverage:
    """The `share` of the weights that calibration reached, and the tensors that it `missed`.

    A tensor of which it missed only some experts is listed with them.
    """

    share: float
    missed: list[str]


@dataclass(frozen=True)
class Imatrix:
    """Entries by GGUF tensor name, and where they came from."""

    entries: Mapping[str, Entry]
    datasets: list[str] = field(default_factory=list)
    n_chunks: int = 0
    chunk_size: int = 0

    def fitted(self, path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Imatrix:
        """Return the entries of the model whose tensors have `shapes`, in numpy order.

        Legacy files store an expert tensor's channels in one run [1, E * K] with one count. Here they become [E, K],
        and an expert of zeros is one that no token reached. Raises AaacError for an imatrix of another model.
        """
        fitted = {}
        for name, entry in self.entries.items():
            if name not in shapes:
                continue
            shape = shapes[name]
            n_experts = shape[0] if len(shape) == 3 else 1
            if entry.sums.shape == (1, n_experts * shape[-1]):
                sums = entry.sums.reshape(n_experts, -1)
                entry = Entry(sums, np.where(sums.any(axis=1), entry.counts, 0).astype(np.float32))
            if entry.sums.shape != (n_experts, shape[-1]):
                raise AaacError(
                    f"{path}: tensor {name} has {entry.sums.size} channels, the model's has {n_experts * shape[-1]}; "
                    "is it of another model?"
                )
            if not all(np.isfinite(values).all() and (values >= 0).all() for values in (entry.sums, entry.counts)):
                raise AaacError(
                    f"{path}: tensor {name} has values that are not finite or negative; make the imatrix again"
                )
            fitted[name] = entry
        if not fitted:
            raise AaacError(f"{path}: names no tensor of this model; give the imatrix that was made from it")
        return replace(self, entries=fitted)

    def coverage(self, sizes: Mapping[str, int]) -> Coverage:
        """Return what calibration reached of the tensors with `sizes` in weights."""
        reached, missed = 0.0, []
        for name, n_weights in sizes.items():
            counts = self.entries[name].counts if name in self.entries else np.zeros(1)
            idle = np.flatnonzero(counts == 0)
            reached += n_weights * (1 - len(idle) / len(counts))
            if len(idle) == len(counts):
                missed.append(name)
            elif len(idle):
                missed.append(f"{name} (expert{'s' * (len(idle) > 1)} {', '.join(map(str, idle))})")
        return Coverage(reached / max(sum(sizes.values()), 1), missed)


def read_imatrix(path: str | Path) -> Imatrix:
    """Read the output of llama-imatrix, GGUF or legacy .dat by its first bytes. Raises AaacError for anything else."""
    path = Path(path)
    try:
        with open(path, "rb") as f:
            magic = f.read(4)
        return _read_gguf(path) if magic == b"GGUF" else _read_dat(path)
    except FileNotFoundError:
        raise AaacError(f"`imatrix` {path}: no such file; make one with llama-imatrix") from None
    except OSError as e:
        raise AaacError(f"`imatrix` {path}: cannot be read: {e.strerror or e}") from None


def _read_gguf(path: Path) -> Imatrix:
    file = read(path)
    if file.get("general.type") != "imatrix":
        raise AaacError(f"{path}: a GGUF file, but not an importance matrix; give the output of llama-imatrix")
    entries = {}
    for name, sums in file.tensors.items():
        if name.endswith(SUFFIX_SUMS):
            base = name.removesuffix(SUFFIX_SUMS)
            counts = file.tensors.get(base + SUFFIX_COUNTS)
            if counts is None:
                raise AaacError(f"{path}: tensor {base} has sums and no counts; make the imatrix again")
            if {sums.tensor_type, counts.tensor_type} != {
                gguf.GGMLQuantizationType.F32
            } or sums.n_elements % counts.n_elements:
                raise AaacError(
                    f"{path}: tensor {base} has sums and counts that are not F32 or do not agree; "
                    "make the imatrix again"
                )
            entries[base] = Entry(
                np.asarray(sums.data).reshape(counts.n_elements, -1), np.asarray(counts.data).reshape(-1)
            )
    datasets, n_chunks, chunk_size = (file.get(f"imatrix.{key}") for key in ("datasets", "chunk_count", "chunk_size"))
    if not (
        isinstance(datasets, list | None) and isinstance(n_chunks, int | None) and isinstance(chunk_size, int | None)
    ):
        raise AaacError(
            f"{path}: imatrix.datasets, imatrix.chunk_count or imatrix.chunk_size is of the wrong type; "
            "make the imatrix again"
        )
    return Imatrix(entries, [str(name) for name in datasets or []], n_chunks or 0, chunk_size or 0)


def _read_dat(path: Path) -> Imatrix:
    """Read the legacy layout.

    n_entries, then for each its name, n_calls and n values (mean x^2 times n_calls), then n_chunks and the data set's
    name.
    """
    n_bytes = path.stat().st_size
    with open(path, "rb") as f:

        def take(n: int) -> bytes:
            if n < 0 or f.tell() + n > n_bytes:  # before anything is read: the length may be a lie
                raise AaacError(
                    f"{path}: not an importance matrix, or cut short at byte {f.tell()}; "
                    "make it again with llama-imatrix"
                )
            return f.read(n)

        def take_int() -> int:
            return int(struct.unpack("<i", take(4))[0])

        entries = {}
        for _ in range(take_int()):
            name = take(take_int()).decode("utf-8", errors="replace")
            n_calls, n_values = take_int(), take_int()
            values = np.frombuffer(take(4 * n_values), dtype="<f4").astype(np.float32)
            entries[name] = Entry(values[None], np.array([max(n_calls, 1)], dtype=np.float32))
        if not entries:
            raise AaacError(f"{path}: an importance matrix without entries; make it again with llama-imatrix")
        if f.tell() == n_bytes:  # files of before the data set's name was added
            return Imatrix(entries)
        n_chunks = take_int()
        return Imatrix(entries, [take(take_int()).decode("utf-8", errors="replace")], n_chunks)


def write_imatrix(path: Path, imatrix: Imatrix) -> None:
    """Write the GGUF form, which llama-quantize and llama-imatrix read."""
    metadata = {
        "general.architecture": Value("imatrix", gguf.GGUFValueType.STRING),
        "general.type": Value("imatrix", gguf.GGUFValueType.STRING),
        "imatrix.datasets": Value(imatrix.datasets, gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.STRING),
        "imatrix.chunk_count": Value(imatrix.n_chunks, gguf.GGUFValueType.UINT32),
        "imatrix.chunk_size": Value(imatrix.chunk_size, gguf.GGUFValueType.UINT32),
    }
    tensors, infos = [], []
    for name, entry in sorted(imatrix.entries.items()):
        for suffix, values in ((SUFFIX_SUMS, entry.sums), (SUFFIX_COUNTS, entry.counts[:, None])):
            infos.append(TensorInfo(name + suffix, values.shape, gguf.GGMLQuantizationType.F32))
            tensors.append(np.asarray(values, dtype="<f4"))
    write(path, metadata, infos, tensors)
