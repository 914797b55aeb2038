"""Decide which files of a checkpoint folder hold its weights, and read from their headers what tensors they hold."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import AaacError

# What transformers looks for, in this order: all weights in one file, or an index of shards.
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
# The same weights in another format. Neither transformers nor llama.cpp's converter reads them beside _WEIGHTS.
_OTHER_FORMATS = ("consolidated*.safetensors", "pytorch_model*.bin")

_ADAPTER = ("adapter_model.safetensors", "adapter_model.bin")

_LFS = b"version https://git-lfs"

_FLOATS = {"F64": "float32", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class StoredTensor(NamedTuple):
    """A tensor of a checkpoint: its dtype as safetensors names it, its shape, and its size in the file."""

    dtype: str
    shape: tuple[int, ...]
    n_bytes: int


def weight_files(source: Path) -> list[Path]:
    """Return the files of a checkpoint folder that hold its weights, which transformers and llama.cpp's converter read.

    Raises AaacError that names the files if one is missing, and if the folder holds others that could be the weights:
    then the two programs, or the user, may mean different ones.
    """
    single = next((n for n in _WEIGHTS if (source / n).is_file() or _index(source, n).is_file()), None)
    adapter = [name for name in _ADAPTER if (source / name).is_file()]
    if single is None:
        raise AaacError(f"{source}: {_without_weights(source, adapter)}")
    if adapter:
        raise AaacError(
            f"{source / adapter[0]}: a LoRA adapter beside the model's own weights; merge it into them, or move it away"
        )
    index = _index(source, single)
    names = _listed(index) if index.is_file() else [single]
    if (source / single).is_file() and single not in names:
        raise AaacError(
            f"{source}: {single} and {index.name} are there, and the index does not list the file; "
            "move the weights that are not meant to another folder"
        )
    for name in names:
        if not (source / name).is_file():
            raise AaacError(f"{source / name}: is listed in {index.name} and missing; download it")
    suffix = Path(single).suffix
    others = [path.name for path in sorted(source.glob(f"*{suffix}")) if path.name not in names]
    if suffix == ".bin":
        others = [name for name in others if name.startswith("pytorch_model")]
    others = [name for name in others if not Path(name).match(_OTHER_FORMATS[0])]
    if others:
        raise AaacError(
            f"{source}: beside {few(names)} there could be weights in {few(others)}; "
            "move the files that are not meant to another folder"
        )
    return [source / name for name in names]


def ignored_files(source: Path) -> list[str]:
    """Return the names of files with the same weights in other formats, which nothing reads."""
    used = {path.name for path in weight_files(source)}
    return sorted({path.name for pattern in _OTHER_FORMATS for path in source.glob(pattern)} - used)


def stored_tensors(source: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a checkpoint folder by name. Only headers are read.

    Raises AaacError that names the file that is damaged or cut short, or lacks a tensor that the index lists.
    """
    tensors: dict[str, StoredTensor] = {}
    files = weight_files(source)
    for path in files:
        with path.open("rb") as f:
            if f.read(len(_LFS)) == _LFS:
                raise AaacError(f"{path}: only a Git LFS pointer to the weights; fetch them with `git lfs pull`")
        tensors |= _read_bin(path) if path.suffix == ".bin" else _read_safetensors(path)
    for single in _WEIGHTS:
        index = _index(source, single)
        if index.is_file() and Path(single).suffix == files[0].suffix:
            for name, file in read_json(index)["weight_map"].items():
                if name not in tensors:
                    raise AaacError(f"{source / file}: lacks {name}, which {index.name} lists; download both again")
    return tensors


def main_dtype(tensors: Mapping[str, StoredTensor]) -> str:
    """Return the dtype of most bytes of all weights that are not quantized: float32, float16 or bfloat16.

    It is empty if all are quantized.
    """
    sizes: dict[str, int] = {}
    for tensor in tensors.values():
        if kind := _FLOATS.get(tensor.dtype):
            sizes[kind] = sizes.get(kind, 0) + tensor.n_bytes
    return max(sizes, key=lambda kind: sizes[kind], default="")


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON file's object. Raises AaacError for a file that holds none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as e:
        raise AaacError(f"{path}: not valid JSON ({e}); download it again") from None
    if not isinstance(value, dict):
        raise AaacError(f"{path}: not a JSON object; download it again")
    return value


def _index(source: Path, single: str) -> Path:
    return source / f"{single}.index.json"


def _listed(index: Path) -> list[str]:
    """Return the names of the files that an index lists."""
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not files or not all(isinstance(name, str) for name in files.values()):
        raise AaacError(f"{index}: has no weight_map from tensors to files; download it again")
    return sorted(set(files.values()))


def _without_weights(source: Path, adapter: list[str]) -> str:
    """Return the reason why a folder without weights of a usual name has none, and what to do."""
    if adapter or (source / "adapter_config.json").is_file():
        return (
            "holds a LoRA adapter and not the weights of its model; merge it into the model with peft's "
            "merge_and_unload, and give the folder that this saves"
        )
    shards = sorted(p.name for pattern in ("model-*-of-*.safetensors", "pytorch_model-*-of-*.bin")
                    for p in source.glob(pattern))  # fmt: skip
    if shards:
        index = f"{'model.safetensors' if shards[0].endswith('s') else 'pytorch_model.bin'}.index.json"
        return f"has {few(shards)} and no {index}, which lists the shards; download it"
    if others := sorted(p.name for p in source.glob("*.safetensors")):
        return (
            f"has {few(others)}, and neither model.safetensors nor model.safetensors.index.json; "
            "rename the file to model.safetensors if it holds the weights in transformers' names"
        )
    return "has no *.safetensors files; give the folder of a Hugging Face model with its weights"


def _read_safetensors(path: Path) -> dict[str, StoredTensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np"):  # checks the file's size
            pass
        with path.open("rb") as f:
            header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
    except (SafetensorError, OSError) as e:
        raise AaacError(f"{path}: damaged or cut short ({e}); download it again") from None
    return {
        name: StoredTensor(t["dtype"], tuple(t["shape"]), t["data_offsets"][1] - t["data_offsets"][0])
        for name, t in header.items()
        if name != "__metadata__"
    }


def _read_bin(path: Path) -> dict[str, StoredTensor]:
    import torch

    try:
        content = torch.load(path, map_location="meta", mmap=True, weights_only=True)
        tensors = {name: t for name, t in content.items() if isinstance(t, torch.Tensor)}
    except Exception as e:  # whatever a damaged pickle raises
        reason = str(e).strip().splitlines()[:1] or [type(e).__name__]
        raise AaacError(f"{path}: damaged, or not only weights ({reason[0][:200]}); download it again") from None
    names = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    return {
        name: StoredTensor(names.get(t.dtype, str(t.dtype)), tuple(t.shape), t.numel() * t.element_size())
        for name, t in tensors.items()
    }


def few(names: list[str]) -> str:
    """Return at most three names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
