"""Compare the tensors of a checkpoint with those that its model needs, before anything is converted or run."""

from __future__ import annotations

import contextlib
import copy
import io
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ..errors import AaacError, warn
from ..files.gguf import GgufFile
from . import checkpoint
from .files import StoredTensor, few, ignored_files, stored_tensors

# What a quantized matrix is named in the file, and the name that the model has for it.
_PACKED = ((".qweight", ".weight"), (".weight_packed", ".weight"), ("_blocks", ""))

# Heads of encoders, which llama.cpp's converter leaves out: it makes embedding models of them.
_HEADS = re.compile(
    r"(^|\.)pooler\.dense\.|^cls\.(predictions|seq_relationship)\.|^vocab_(transform|layer_norm|projector)\."
)

_EXPERT = re.compile(r"(?P<layer>.*\.experts\.)(?P<expert>\d+)(?P<part>\..*)")
# The number of a decoder block, or of an encoder's.
_NUMBER = re.compile(r"\.(\d+)\.")


def check_tensors(source: Path, config: Mapping[str, Any]) -> None:
    """Compare the tensors of a folder with those of transformers' model, of which no weight is made or read.

    config: the parsed config.json. Warns of tensors, and of files, that are not used. Raises AaacError that names the
    tensors that are missing or have another shape. A model that transformers does not know is left to the converter.
    """
    if ignored := ignored_files(source):
        warn(f"{source}: not read, since model.safetensors or its index goes before: {few(ignored)}")
    quantized = bool(config.get("quantization_config"))
    tensors = stored_tensors(source)
    found = _loading_info(source, tensors, quantized)
    unused = sorted(found["unexpected_keys"]) if found and not quantized else []
    needed = (name for name in (found["missing_keys"] if found else ()) if not _HEADS.search(name))
    if missing := _missing_experts(tensors) or sorted(needed):
        there = f" (and there are others, which it does not: {few(unused)})" if unused else ""
        raise AaacError(
            f"{source}: {len(missing)} tensors that the model needs are missing: {few(missing)}{there}; "
            "download the weights again, or correct config.json"
        )
    if (
        not found or quantized
    ):  # scales and zero points are no parameters of the model, and packed matrices have other shapes
        return
    if mismatched := found["mismatched_keys"]:
        name, stored, expected = next(iter(sorted(mismatched)))[:3]
        raise AaacError(
            f"{source}: tensor {name} is {list(stored)}, and config.json makes it {list(expected)}; "
            "weights and config.json are not of the same model"
        )
    if unused:
        warn(f"{source}: {len(unused)} tensors are no part of the model and are not used in it: {few(unused)}")


def check_blocks(source: Path, file: GgufFile) -> None:
    """Raise AaacError if a converted GGUF lacks embeddings, or all matrices of a decoder block.

    Blocks that predict further tokens are at the end and may be absent.
    """
    n_blocks = int(file.setting("block_count", 0)) - int(file.setting("nextn_predict_layers", 0))
    numbers = (_NUMBER.search(name) for name, shape in file.shapes.items() if len(shape) > 1)
    present = {int(number[1]) for number in numbers if number}
    empty = [f"blk.{i}" for i in range(n_blocks) if i not in present]
    if not any(name.startswith("token_embd") for name in file.tensors):
        empty.insert(0, "token_embd")
    if empty:
        raise AaacError(
            f"{source}: llama.cpp's converter finds no weights for {few(empty)}; "
            "the weights are not complete, or not of the model that config.json describes"
        )


def _loading_info(source: Path, tensors: Mapping[str, StoredTensor], quantized: bool) -> Mapping[str, Any] | None:
    """Return what transformers would say after loading such tensors; None if it cannot build the model.

    It loads tensors without data into a model without data, with all that it does to names: tied weights, prefixes,
    experts in one parameter, keys to ignore.
    """
    import torch

    transformers = checkpoint.quiet_transformers()
    dtype = torch.bfloat16  # one dtype will do: only names and shapes are compared
    state = {
        _plain(name) if quantized else name: torch.empty(t.shape, dtype=dtype, device="meta")
        for name, t in tensors.items()
    }
    try:
        config = copy.deepcopy(transformers.AutoConfig.from_pretrained(source, trust_remote_code=False))
        if quantized:
            del config.quantization_config
        model_class = checkpoint.concrete_class(source, config)
        with contextlib.redirect_stderr(io.StringIO()):
            _, info = model_class.from_pretrained(
                None,
                config=config,
                state_dict=state,
                dtype=dtype,
                device_map={"": "meta"},
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except Exception:  # whatever the model's code raises: the converter, or loading it for calibration, will say more
        return None
    return dict(info)


def _missing_experts(names: Collection[str]) -> list[str]:
    """Return the tensors that some experts of a layer lack and others have."""
    layers: dict[str, tuple[set[str], set[str]]] = {}
    for name in names:
        if found := _EXPERT.fullmatch(name):
            experts, parts = layers.setdefault(found["layer"], (set(), set()))
            experts.add(found["expert"])
            parts.add(found["part"])
    wanted = (
        f"{layer}{expert}{part}"
        for layer, (experts, parts) in layers.items()
        for expert in range(max(map(int, experts)) + 1)
        for part in parts
    )
    return sorted(set(wanted) - set(names))


def _plain(name: str) -> str:
    for packed, plain in _PACKED:
        if name.endswith(packed):
            return name.removesuffix(packed) + plain
    return name
