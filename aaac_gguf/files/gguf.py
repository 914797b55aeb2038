"""Read GGUF files with AAAC tensors, and render headers: the gguf library with our types, safe for damaged files."""

from __future__ import annotations

import io
import mmap
import os
import re
import struct
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguf.gguf_reader import ReaderField, ReaderTensor
from gguf.gguf_writer import WriterState

from ..errors import AaacError
from . import format as fmt

MAX_DIMS = 4  # GGML_MAX_DIMS

# One model in several files, named and numbered as llama.cpp does it: MODEL-00001-of-00003.gguf.
SPLIT_NO, SPLIT_COUNT, SPLIT_TENSORS = (
    gguf.Keys.Split.LLM_KV_SPLIT_NO,
    gguf.Keys.Split.LLM_KV_SPLIT_COUNT,
    gguf.Keys.Split.LLM_KV_SPLIT_TENSORS_COUNT,
)
_SHARD_NAME = re.compile(r"(?P<stem>.+)-(?P<no>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


class Value(NamedTuple):
    """A metadata value with its GGUF type, and the type of its items if it is an array."""

    value: Any
    kind: GGUFValueType
    item_kind: GGUFValueType | None = None


Metadata = Mapping[str, Value]


def _register(qtype: fmt.AaacType) -> None:
    """Make one AAAC type known to the gguf library: its enum of types and its table of sizes."""
    member = int.__new__(GGMLQuantizationType, qtype.type_id)
    member._name_, member._value_ = qtype.name, qtype.type_id
    GGMLQuantizationType._member_map_[qtype.name] = member
    GGMLQuantizationType._value2member_map_[qtype.type_id] = member
    GGMLQuantizationType._member_names_.append(qtype.name)
    GGML_QUANT_SIZES[member] = (qtype.block_size, qtype.type_size)


for _qtype in fmt.TYPES.values():
    _register(_qtype)


def tensor_bytes(shape: Sequence[int], ggml_type: GGMLQuantizationType) -> int:
    """Return the bytes of a tensor of `shape`, in numpy order: the row length last."""
    block_size, type_size = GGML_QUANT_SIZES[ggml_type]
    return int(np.prod(shape, dtype=np.int64)) // block_size * type_size


class _Reader(gguf.GGUFReader):
    """gguf's reader, made safe for files that lie.

    Every access is checked against the file's end. Arrays are parsed without a view for each element.
    """

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
        n_bytes = np.dtype(dtype).itemsize * int(count)
        if int(offset) + n_bytes > self.data.size:
            raise AaacError(f"needs {n_bytes} bytes at offset {int(offset)} and the file ends at {self.data.size}")
        return super()._get(int(offset), dtype, int(count), override_order)

    def _get_str(self, offset: int) -> Any:
        length, text = super()._get_str(offset)
        str(memoryview(text), "utf-8")  # refuses here what is not text, not when somebody asks for it
        return length, text

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        if raw_type != GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        item_type = self._get(orig_offs, np.uint32)
        length = self._get(orig_offs + 4, np.uint64)
        kind, count, start = GGUFValueType(item_type[0]), int(length[0]), orig_offs + 12
        parts: list[Any] = [item_type, length]
        if kind == GGUFValueType.STRING:
            offset = start
            view = memoryview(self.data)
            for _ in range(count):
                self._get(offset, np.uint64)
                n_bytes = int.from_bytes(view[offset : offset + 8], "little")
                parts.append(self._get(offset + 8, np.uint8, n_bytes))
                str(view[offset + 8 : offset + 8 + n_bytes], "utf-8")
                offset += 8 + n_bytes
            return offset - orig_offs, parts, list(range(2, len(parts))), [GGUFValueType.ARRAY, kind]
        if kind not in self.gguf_scalar_to_np:
            raise AaacError(f"holds an array of {kind.name}, which this reader does not take")
        values = self._get(start, self.gguf_scalar_to_np[kind], count)
        return 12 + values.nbytes, [*parts, values], [2], [GGUFValueType.ARRAY, kind]

    def _build_tensors(self, start_offs: int, fields: list[ReaderField]) -> None:
        for field in fields:
            _, _, _, dims, raw_type, offset = field.parts
            if not 1 <= dims.size <= MAX_DIMS:
                raise AaacError(f"tensor {field.name} has {dims.size} dimensions, not 1 to {MAX_DIMS}")
            try:
                ggml_type = GGMLQuantizationType(raw_type[0])
            except ValueError:
                raise AaacError(f"tensor {field.name} has the unknown type id {raw_type[0]}") from None
            # Python integers: the product of hostile dimensions must not wrap around.
            block_size, type_size = GGML_QUANT_SIZES[ggml_type]
            n_elements = 1
            for dim in dims.tolist():
                n_elements *= dim
            if n_elements == 0:
                raise AaacError(f"tensor {field.name} has no weights")
            if dims[0] % block_size:
                raise AaacError(f"tensor {field.name} has rows of {dims[0]} weights, not whole blocks of {block_size}")
            end = int(start_offs) + int(offset[0]) + n_elements // block_size * type_size
            if end > self.data.size:
                raise AaacError(f"the data of tensor {field.name} ends at byte {end} and the file at {self.data.size}")
        super()._build_tensors(start_offs, fields)


@dataclass(frozen=True)
class GgufFile:
    """An open GGUF, of one file or of several. `file[name]` is a tensor's decoded weights.

    path     the file, or the first of them, which holds the metadata
    fields   metadata
    tensors  by name, data memory-mapped
    codecs   of every AAAC tensor
    """

    path: Path
    fields: Mapping[str, ReaderField]
    tensors: Mapping[str, ReaderTensor]
    codecs: Mapping[str, fmt.Codec]
    maps: Sequence[mmap.mmap] = ()

    @property
    def n_bytes(self) -> int:
        """Return the size of all files together."""
        return sum(len(m) for m in self.maps)

    def release(self) -> None:
        """Drop the tensor data read so far from this process's memory. What is used again is read again."""
        for m in self.maps:
            m.madvise(mmap.MADV_DONTNEED)

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of a metadata key, a list for an array."""
        return self.fields[key].contents() if key in self.fields else default

    @property
    def architecture(self) -> str:
        """Return the name of the model's architecture, empty if there is none."""
        return str(self.get("general.architecture", ""))

    def setting(self, key: str, default: Any = None) -> Any:
        """Return the value of one of the architecture's own metadata keys."""
        return self.get(f"{self.architecture}.{key}", default)

    def positions(self, at_most: int) -> int:
        """Return `at_most`, or the number of positions that the model has if that is smaller."""
        learned = self.shapes.get("position_embd.weight", (0,))[0]
        return min([at_most, *(n for n in (int(self.setting("context_length", 0)), learned) if n)])

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return every tensor's shape in numpy order."""
        return {name: tuple(int(n) for n in reversed(t.shape)) for name, t in self.tensors.items()}

    def __getitem__(self, name: str) -> fmt.F32:
        """Return the decoded weights of tensor `name`, float32 in numpy order. Raises KeyError for another name."""
        tensor = self.tensors[name]
        return dequantize(tensor.data, tensor.tensor_type, self.codecs.get(name))


def dequantize(data: Any, ggml_type: GGMLQuantizationType, codec: fmt.Codec | None = None) -> fmt.F32:
    """Return the float32 weights of one tensor's data as gguf's reader gives it. AAAC types need their `codec`."""
    if ggml_type in fmt.TYPES_BY_ID:
        assert codec is not None
        return fmt.decode(fmt.TYPES_BY_ID[ggml_type], np.asarray(data), codec)
    return gguf.dequantize(np.asarray(data), ggml_type).astype(np.float32, copy=False)


def shard_path(path: Path, no: int, count: int) -> Path:
    """Return the name of shard `no`, counted from 1, of the model that `path` names."""
    return path.with_name(f"{path.name.removesuffix('.gguf')}-{no:05}-of-{count:05}.gguf")


def is_shard(path: Path) -> bool:
    """Return whether a path is named like one file of a split model."""
    name = _SHARD_NAME.fullmatch(path.name)
    return name is not None and int(name["count"]) > 1


def shards(path: Path) -> list[Path]:
    """Return the files of the model of which `path` is one, by their names."""
    name = _SHARD_NAME.fullmatch(path.name)
    if not name or not is_shard(path):
        return [path]
    count = int(name["count"])
    return [shard_path(path.with_name(name["stem"]), no, count) for no in range(1, count + 1)]


def read(path: str | os.PathLike[str]) -> GgufFile:
    """Open a GGUF file, or all shards of a split one by any of them.

    Raises AaacError for whatever is not a whole, valid file: see docs/format.md.
    """
    path = Path(path)
    if not path.is_file():
        raise AaacError(
            f"{path}: {'is a directory' if path.is_dir() else 'no such file'}; give the path of a GGUF file"
        )
    paths = shards(path)
    count = len(paths)
    for shard in paths:
        if not shard.is_file():
            raise AaacError(f"{shard}: is missing, the model is split into {count} files; put them all into one folder")
    readers, tensors, codecs = [], {}, {}
    try:
        for no, shard in enumerate(paths):
            path = shard
            _check_byte_order(shard)
            reader = _Reader(shard, "c")  # copy-on-write: torch warns of arrays that it could not write to
            _check_split(reader, no, len(paths))
            for t in reader.tensors:
                if t.name in tensors:
                    raise AaacError(f"tensor {t.name} is in another shard too")
                tensors[t.name] = t
            readers.append(reader)
        path = paths[0]
        if len(paths) > 1 and (total := _number(readers[0], SPLIT_TENSORS)) != len(tensors):
            raise AaacError(
                f"{SPLIT_TENSORS} is {total}, the {count} files hold {len(tensors)}; they do not belong together"
            )
        codecs = _read_codecs(readers[0])
    except AaacError as e:
        raise AaacError(f"{path}: {e}") from None
    except OSError as e:
        raise AaacError(f"{path}: cannot be read: {e.strerror or e}") from None
    except (ValueError, KeyError, IndexError, TypeError, OverflowError, UnicodeDecodeError) as e:
        raise AaacError(f"{path}: not a whole GGUF file ({e}); download or make it again") from None
    listed, present = set(codecs), {t.name for t in tensors.values() if t.tensor_type in fmt.TYPES_BY_ID}
    if missing := sorted(present - listed):
        raise AaacError(f"{path}: AAAC tensor {missing[0]} is not in {fmt.KEY_TENSOR_NAMES}; write the file again")
    if extra := sorted(listed - present):
        raise AaacError(
            f"{path}: {fmt.KEY_TENSOR_NAMES} lists {extra[0]}, which is not an AAAC tensor of this file; "
            "write the file again"
        )
    return GgufFile(path, readers[0].fields, tensors, codecs, [reader.data.base for reader in readers])


def read_model(path: Path) -> GgufFile:
    """Open a GGUF file that holds a model. Raises AaacError for one without tensors or architecture."""
    file = read(path)
    if not file.tensors or not file.architecture:
        raise AaacError(f"{path}: has no tensors, or names no general.architecture; give a model's file")
    return file


def _check_byte_order(path: Path) -> None:
    """Raise AaacError for a GGUF whose version, a small number, is a large one as this machine reads numbers."""
    with path.open("rb") as f:
        magic, version = f.read(4), f.read(4)
    number = int.from_bytes(version, sys.byteorder)
    if magic == b"GGUF" and number and number % 2**16 == 0:
        other = "big" if sys.byteorder == "little" else "little"
        raise AaacError(
            f"is {other}-endian, for machines of another byte order; convert it with `gguf-convert-endian FILE native`"
        )


def _number(reader: gguf.GGUFReader, key: str) -> int | None:
    return int(reader.fields[key].contents()) if key in reader.fields else None


def _check_split(reader: gguf.GGUFReader, no: int, count: int) -> None:
    """Raise AaacError unless this is shard `no`, counted from 0, of `count`."""
    said = _number(reader, SPLIT_COUNT) or 1
    if said != count:
        raise AaacError(
            f"{SPLIT_COUNT} is {said}, the name says {count}; "
            "give the shards the names that llama.cpp gave them, or download them again"
        )
    if count > 1 and _number(reader, SPLIT_NO) != no:
        raise AaacError(f"{SPLIT_NO} is {_number(reader, SPLIT_NO)}, the name says {no}; download it again")


def _read_codecs(reader: gguf.GGUFReader) -> dict[str, fmt.Codec]:
    """Return the codecs that the metadata lists. A file without AAAC keys has none."""
    keys = (fmt.KEY_VERSION, fmt.KEY_TENSOR_NAMES, fmt.KEY_CODEBOOKS, fmt.KEY_SCALE_BASE, fmt.KEY_SCALE_MANTISSA_BITS)
    if not any(key in reader.fields for key in keys):
        return {}
    for key in keys:
        if key not in reader.fields:
            raise AaacError(f"metadata key {key} is missing; write the file again")
    version, names, *arrays = (reader.fields[key] for key in keys)
    if version.types != [GGUFValueType.UINT32]:
        raise AaacError(f"metadata key {fmt.KEY_VERSION} is not a UINT32; write the file again")
    wanted = (GGUFValueType.STRING, GGUFValueType.INT8, GGUFValueType.FLOAT32, GGUFValueType.UINT8)
    for field, kind in zip((names, *arrays), wanted, strict=True):
        if field.types != [GGUFValueType.ARRAY, kind]:
            raise AaacError(f"metadata key {field.name} is not an array of {kind.name}; write the file again")
    values = [field.parts[field.data[0]] for field in arrays]
    return fmt.codecs_from_metadata(version.contents(), names.contents(), *values)


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as a GGUF header describes it; `shape` in numpy order."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType

    @property
    def n_bytes(self) -> int:
        """Return the bytes of its data."""
        return tensor_bytes(self.shape, self.type)

    @property
    def n_weights(self) -> int:
        """Return the number of its weights."""
        return tensor_bytes(self.shape, GGMLQuantizationType.I8)


class _Writer(gguf.GGUFWriter):
    """gguf's writer, but for empty arrays: it refuses them, and files that hold some must be copied."""

    def _pack_val(
        self, val: Any, vtype: GGUFValueType, add_vtype: bool, sub_type: GGUFValueType | None = None
    ) -> bytes:
        if vtype == GGUFValueType.ARRAY and sub_type is not None and not val:
            return struct.pack("<IIQ", vtype, sub_type, 0)
        return bytes(super()._pack_val(val, vtype, add_vtype, sub_type))


def render_header(metadata: Metadata, tensors: Sequence[TensorInfo]) -> bytes:
    """Return all that precedes the tensor data, padding included."""
    writer = _Writer(None, "")
    writer.kv_data[
        0
    ].clear()  # the constructor has written the architecture, which only the first shard of a split model has
    architecture = "general.architecture"
    for key in sorted(metadata, key=lambda key: key != architecture):  # which comes first
        writer.add_key_value(key, metadata[key].value, metadata[key].kind, sub_type=metadata[key].item_kind)
    if "general.alignment" in metadata:
        writer.data_alignment = alignment(metadata)
    for t in tensors:
        writer.add_tensor_info(t.name, t.shape, np.dtype(np.float32), t.n_bytes, raw_dtype=t.type)
    # The library writes to named files; hand it a buffer in the state it has after opening one.
    buffer = io.BytesIO()
    writer.fout, writer.state = [buffer], WriterState.EMPTY
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.write_padding(buffer, buffer.tell())
    return buffer.getvalue()


def alignment(metadata: Metadata) -> int:
    """Return the multiple of bytes at which tensor data starts."""
    return int(metadata["general.alignment"].value) if "general.alignment" in metadata else gguf.GGUF_DEFAULT_ALIGNMENT


def field_values(fields: Mapping[str, ReaderField]) -> dict[str, Value]:
    """Return the metadata of an open file in the form that `render_header` takes, without the reader's own fields."""
    values = {}
    for name, field in fields.items():
        if not name.startswith("GGUF."):
            values[name] = Value(field.contents(), *field.types)
    return values


def codec_values(codecs: Mapping[str, fmt.Codec]) -> dict[str, Value]:
    """Return the aaac.* keys of `codecs` in the form that `render_header` takes."""
    values = fmt.codecs_to_metadata(codecs)
    kinds = {
        fmt.KEY_TENSOR_NAMES: GGUFValueType.STRING,
        fmt.KEY_CODEBOOKS: GGUFValueType.INT8,
        fmt.KEY_SCALE_BASE: GGUFValueType.FLOAT32,
        fmt.KEY_SCALE_MANTISSA_BITS: GGUFValueType.UINT8,
    }
    arrays = {key: Value(np.asarray(values[key]).tolist(), GGUFValueType.ARRAY, kind) for key, kind in kinds.items()}
    return {fmt.KEY_VERSION: Value(fmt.VERSION, GGUFValueType.UINT32), **arrays}


def block_number(name: str, otherwise: int) -> int:
    """Return the number of the decoder block that a tensor belongs to, or `otherwise`."""
    block = re.match(r"blk\.(\d+)\.", name)
    return int(block[1]) if block else otherwise
