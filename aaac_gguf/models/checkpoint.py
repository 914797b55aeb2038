"""What transformers runs, a Hugging Face checkpoint folder or a GGUF: checked before anything slow starts, its parameters named as in GGUF."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import gguf

from ..errors import AaacError
from ..files.gguf import read_model
from .blocks import block_list


def check(source: Path) -> dict[str, Any]:
    """The parsed config.json of a folder whose files are whole. Raises AaacError that names what is missing or cut short."""
    from safetensors import SafetensorError, safe_open

    if not source.exists():
        raise AaacError(f"{source}: no such file or directory; give a Hugging Face model folder or a GGUF file")
    if not source.is_dir():
        raise AaacError(f"{source}: neither a folder nor a GGUF file; give a Hugging Face model folder or a GGUF file")
    if not (source / "config.json").is_file():
        raise AaacError(f"{source}: has no config.json; give the folder of a Hugging Face model")
    config = _read_json(source / "config.json")
    if not config.get("architectures"):
        raise AaacError(
            f'{source / "config.json"}: names no architectures; add the model class, for example ["LlamaForCausalLM"]'
        )
    index = source / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(_read_json(index).get("weight_map", {}).values()))
        for name in names:
            if not (source / name).is_file():
                raise AaacError(f"{source / name}: is listed in {index.name} and missing; download it")
    if not any(next(source.glob(pattern), None) for pattern in ("*.safetensors", "*.bin")):
        raise AaacError(
            f"{source}: has no *.safetensors files; give the folder of a Hugging Face model with its weights"
        )
    for path in sorted(source.glob("*.safetensors")):
        try:
            with safe_open(path, framework="np"):
                pass
        except (SafetensorError, OSError) as e:
            raise AaacError(f"{path}: damaged or cut short ({e}); download it again") from None
    return config


def stored_dtype(config: dict[str, Any]) -> str:
    """The dtype that a config.json names, by either of its keys; empty if none."""
    return str(config.get("dtype", config.get("torch_dtype", "")))


def left_out(source: Path) -> str:
    """What of a source's model does not go into the file, in one line; empty if all does."""
    if not source.is_dir():
        return ""
    config = _read_json(source / "config.json")
    parts = [
        part
        for part in ("vision", "audio")
        if any(f"{part}_{kind}" in config for kind in ("config", "tower", "encoder"))
    ]
    if not parts:
        return ""
    return f"the {' and '.join(parts)} part is left alone: make its mmproj file with llama.cpp's convert_hf_to_gguf.py --mmproj and use it as it is"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as e:
        raise AaacError(f"{path}: not valid JSON ({e}); download it again") from None
    if not isinstance(value, dict):
        raise AaacError(f"{path}: not a JSON object; download it again")
    return value


# Of the device's memory, for the weights of a model that need not be in memory.
WEIGHTS_SHARE = 0.5


def load_model(source: Path, device: str = "cpu", exact: bool = True, folder: Path | None = None) -> Any:
    """The causal language model of a folder or of a GGUF file in evaluation mode: float32 on a CPU, the weights' own dtype on a GPU.

    Unless `exact`, a CPU that multiplies bfloat16 numbers runs a bfloat16 checkpoint as it is, in half the time. With a `folder` the blocks of a
    model that would take more than WEIGHTS_SHARE of the device's memory stay on disk, most in the checkpoint itself, and are loaded as they run; a
    GGUF's never do. Raises AaacError for what transformers cannot load.
    """
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)  # it warns of what is on disk, as it was told
    logging.getLogger("transformers").setLevel(logging.ERROR)  # it would rather have a GGUF in float32
    stored = check_gguf(source) if source.is_file() else stored_dtype(_read_json(source / "config.json"))
    multiplies = stored == "bfloat16" and any(
        torch.cpu.get_capabilities().get(feature) for feature in ("avx512_bf16", "amx_bf16", "bf16")
    )
    dtype = "float32" if device == "cpu" and (exact or not multiplies) else stored if source.is_file() else "auto"
    try:
        where = (
            {"device_map": _device_map(source, device, dtype), "offload_folder": folder}
            if folder and source.is_dir()
            else {}
        )
        # Experts one product at a time, so that each product's input can be seen.
        model = transformers.AutoModelForCausalLM.from_pretrained(
            **_place(source), dtype=dtype, experts_implementation="eager", **where
        )
    except Exception as e:  # transformers raises whatever the model's own code raises
        raise _cannot_load(source, e) from None
    return (model if hasattr(model, "hf_device_map") else model.to(device)).eval()


def _cannot_load(source: Path, error: Exception) -> AaacError:
    return AaacError(
        f"{source}: transformers cannot load it ({one_line(error)}); calibrate with --imatrix, or --calib none"
    )


def _place(source: Path) -> dict[str, Any]:
    """How transformers wants to be told of a folder or of a GGUF file."""
    folder, name = (source.parent, source.name) if source.is_file() else (source, None)
    return {"pretrained_model_name_or_path": folder, "gguf_file": name}


def check_gguf(source: Path) -> str:
    """The dtype of most of a GGUF's weights. Raises AaacError for what transformers cannot run: split files, architectures that it does not read, and
    models that memory does not hold in float32."""
    import transformers

    file = read_model(source)
    if len(file.maps) > 1:
        raise AaacError(
            f"{source}: transformers runs no split files; join them with llama-gguf-split --merge, or calibrate with --imatrix"
        )
    sizes = {
        kind: sum(int(t.n_elements) for t in file.tensors.values() if t.tensor_type.name == kind)
        for kind in ("F32", "F16", "BF16")
    }
    needed = 4 * sum(sizes.values())
    if needed > _memory():
        raise AaacError(
            f"{source}: to run it takes {needed / 2**30:.0f} GiB of memory; give the Hugging Face folder, or calibrate with --imatrix"
        )
    try:
        transformers.AutoConfig.from_pretrained(**_place(source))
    except Exception as e:
        raise _cannot_load(source, e) from None
    return {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[max(sizes, key=lambda kind: sizes[kind])]


def _device_map(source: Path, device: str, dtype: str) -> dict[str, str] | None:
    """Where accelerate shall keep what; None for all on the device."""
    import torch
    import transformers

    with torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(source)
        model = transformers.AutoModelForCausalLM.from_config(config)
    itemsize = 4 if dtype == "float32" else 2
    memory = torch.cuda.mem_get_info()[1] if device != "cpu" else _memory()
    if itemsize * sum(p.numel() for p in model.parameters()) <= WEIGHTS_SHARE * memory:
        return None
    blocks = block_list(model)
    around = [
        name for name, module in model.named_modules() if blocks in module.modules()
    ]  # from the model itself to the blocks
    inside = [
        f"{name}.{child}".lstrip(".") for name in around[:-1] for child, _ in model.get_submodule(name).named_children()
    ]
    return {**{name: device for name in inside if name not in around}, **dict.fromkeys(around[-1:], "disk")}


def _memory() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def load_tokenizer(source: Path) -> Any:
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(**_place(source))
    except Exception as e:
        raise AaacError(
            f"{source}: transformers cannot load the tokenizer ({one_line(e)}); calibrate with --calib self or --imatrix"
        ) from None


def gguf_names(parameter: str, architecture: str, n_layers: int, present: Collection[str]) -> list[str]:
    """The GGUF tensors among `present` that hold the checkpoint parameter, by the gguf library's own map; [] if there is none.

    One parameter can be two tensors: experts' fused gate and up projections, which llama.cpp stores apart.
    """
    arch = next((a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), None)
    if arch is None:
        return []
    names = gguf.get_tensor_name_map(arch, n_layers)
    # transformers fuses what most checkpoints, and llama.cpp, hold apart: the experts' gate and up projections.
    parts = (
        [parameter.replace("gate_up_proj", part) for part in ("gate_proj", "up_proj")]
        if ".experts." in parameter
        else []
    )
    candidates = [names.get_name(key, try_suffixes=(".weight", ".bias")) for key in (parameter, *parts)]
    stems = [name.removesuffix(".weight") for name in candidates if name]
    return [f"{stem}.weight" for stem in dict.fromkeys(stems) if f"{stem}.weight" in present]


def one_line(error: Exception) -> str:
    """The first line of an exception's message, or its name."""
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
