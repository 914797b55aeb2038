"""Check a Hugging Face checkpoint folder or a GGUF before anything slow starts, and load it with transformers."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import gguf

from ..errors import AaacError
from ..files.gguf import GgufFile, read_model
from .agreement import complete_config, scale_positions
from .blocks import block_list
from .files import few, main_dtype, read_json, stored_tensors, weight_files

# The share of the device's memory that a model's weights may take before they stay on disk.
WEIGHTS_SHARE = 0.5


def check(source: Path) -> dict[str, Any]:
    """Return the parsed config.json of a checkpoint folder.

    Raises AaacError that names the file that is missing, damaged or cut short.
    """
    if not source.exists():
        raise AaacError(f"{source}: no such file or directory; give a Hugging Face model folder or a GGUF file")
    if not source.is_dir():
        raise AaacError(f"{source}: neither a folder nor a GGUF file; give a Hugging Face model folder or a GGUF file")
    if not (source / "config.json").is_file():
        raise AaacError(f"{source}: has no config.json; give the folder of a Hugging Face model")
    config = read_json(source / "config.json")
    if not config.get("architectures"):
        raise AaacError(
            f'{source / "config.json"}: names no architectures; add the model class, for example ["LlamaForCausalLM"]'
        )
    if (named := config.get("transformers_weights")) and not any(p.name in named for p in weight_files(source)):
        raise AaacError(
            f"{source / 'config.json'}: transformers_weights names {named}, which llama.cpp's converter does not read; "
            "rename that file to model.safetensors, and remove the key"
        )
    stored_tensors(source)
    return config


def check_gguf(source: Path) -> str:
    """Return the dtype of most of a GGUF's weights that are not quantized: float32, float16 or bfloat16.

    Raises AaacError for what transformers cannot run: split files, architectures that it does not read, and models that
    memory does not hold in float32.
    """
    file = read_model(source)
    if len(file.maps) > 1:
        raise AaacError(
            f"{source}: transformers runs no split files; join them with llama-gguf-split --merge, "
            "or calibrate with `imatrix`"
        )
    sizes = {
        kind: sum(int(t.n_elements) for t in file.tensors.values() if t.tensor_type.name == kind)
        for kind in ("F32", "F16", "BF16")
    }
    needed = 4 * sum(int(t.n_elements) for t in file.tensors.values())  # those of other types are decoded
    if needed > _memory():
        raise AaacError(
            f"{source}: to run it takes {needed / 2**30:.0f} GiB of memory; "
            "give the Hugging Face folder, or calibrate with `imatrix`"
        )
    try:
        _config_of_gguf(source)
    except AaacError:
        raise
    except Exception as e:
        raise _cannot_load(source, e) from None
    return {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[max(sizes, key=lambda kind: sizes[kind])]


def stored_dtype(source: Path) -> str:
    """Return the dtype of a folder's weights, as `main_dtype`. What config.json says of it is not always true."""
    return main_dtype(stored_tensors(source))


def _config_of_gguf(source: Path) -> Any:
    config = quiet_transformers().AutoConfig.from_pretrained(**_location(source))
    complete_config(config, read_model(source))
    return config


def quantization(source: Path) -> Mapping[str, Any]:
    """Return the quantization_config of a folder's config.json, also that of a text model inside; {} if it has none."""
    config = read_json(source / "config.json")
    inner = config.get("text_config")
    found = config.get("quantization_config") or (inner.get("quantization_config") if isinstance(inner, dict) else None)
    return found if isinstance(found, dict) else {}


def is_causal(file: GgufFile) -> bool:
    """Return whether a GGUF holds a model of the next token, and not one with an encoder, like T5 or BERT."""
    return file.setting("attention.causal", True) and not any(name.startswith("enc.") for name in file.tensors)


def left_out(source: Path) -> str:
    """Return one line on the parts of a source's model that do not go into the file; empty if all do."""
    if not source.is_dir():
        return ""
    config = read_json(source / "config.json")
    parts = [
        part
        for part in ("vision", "audio")
        if any(f"{part}_{kind}" in config for kind in ("config", "tower", "encoder"))
    ]
    if not parts:
        return ""
    return (
        f"the {' and '.join(parts)} part is left alone: make its mmproj file with llama.cpp's "
        "convert_hf_to_gguf.py --mmproj and use it as it is"
    )


def load_model(source: Path, device: str = "cpu", folder: Path | None = None) -> Any:
    """Load the causal language model of a folder or of a GGUF file, in evaluation mode.

    It is float32 on a CPU and has the weights' own dtype on a GPU.

    folder: scratch space. With it, a model that would take more than WEIGHTS_SHARE of the device's memory has its
    blocks on disk, most in the checkpoint itself, and loads them as they run. A GGUF is always loaded whole.

    Raises AaacError for what transformers cannot load.
    """
    transformers = quiet_transformers()
    stored = check_gguf(source) if source.is_file() else stored_dtype(source)
    dtype = "float32" if device == "cpu" else stored or "auto"
    options: dict[str, Any] = {}
    if source.is_file() and hasattr(transformers, "GgufConfig"):  # versions without it have only plain weights
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        if source.is_file():
            options["config"] = _config_of_gguf(source)
        if folder and source.is_dir():
            options |= {"device_map": _device_map(source, device, dtype), "offload_folder": folder}
        # No setting of transformers hides the progress bar that it has for a GGUF.
        with contextlib.redirect_stderr(io.StringIO()) if source.is_file() else contextlib.nullcontext():
            model, loaded = _model_class(source).from_pretrained(
                **_location(source),
                dtype=dtype,
                output_loading_info=True,
                experts_implementation="eager",  # one expert's product at a time, so that its inputs can be seen
                **options,
            )
    except Exception as e:  # transformers raises whatever the model's own code raises
        raise _cannot_load(source, e) from None
    if missing := loaded["missing_keys"]:
        raise AaacError(f"{source}: lacks weights that the model needs: {few(sorted(missing))}; download it again")
    if source.is_file():
        scale_positions(model, read_model(source))
    return (model if hasattr(model, "hf_device_map") else model.to(device)).eval()


def load_tokenizer(source: Path) -> Any:
    """Load the tokenizer of a folder or of a GGUF file. Raises AaacError for what transformers cannot load."""
    try:
        return tokenizer_of(source)
    except Exception as e:
        raise AaacError(
            f"{source}: transformers cannot load the tokenizer ({one_line(e)}); "
            "set `calibration` to 'self', or calibrate with `imatrix`"
        ) from None


def tokenizer_of(source: Path) -> Any:
    """Load the tokenizer of a folder or of a GGUF file, so that it makes the tokens that llama.cpp makes.

    transformers does not read from a GGUF that a sentencepiece tokenizer puts no space before a text. Raises
    an exception of any kind for what transformers cannot load.
    """
    from tokenizers import decoders, pre_tokenizers

    tokenizer = quiet_transformers().AutoTokenizer.from_pretrained(**_location(source))
    if source.is_file() and read_model(source).get("tokenizer.ggml.add_space_prefix") is False:
        backend = tokenizer.backend_tokenizer
        if isinstance(backend.pre_tokenizer, pre_tokenizers.Metaspace):
            backend.pre_tokenizer.prepend_scheme = "never"
            parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
            backend.decoder = decoders.Sequence(parts)
    return tokenizer


def gguf_names(parameter: str, architecture: str, n_layers: int, present: Collection[str]) -> list[str]:
    """Return the GGUF tensors that hold a checkpoint's parameter, by the gguf library's own map; [] if there is none.

    One parameter can be two tensors: transformers fuses experts' gate and up projections, llama.cpp stores them apart.

    present: the tensor names of the GGUF file.
    """
    arch = next((a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), None)
    if arch is None:
        return []
    names = gguf.get_tensor_name_map(arch, n_layers)
    parameter = re.sub(r"(language_model|text_model)\.", "", parameter, count=1)  # inside one that reads images too
    spellings = [parameter]
    # The gguf library knows the names of checkpoints on disk. transformers gives all mixtures the same names inside.
    spellings += [re.sub(r"(layers\.\d+\.)\w+\.(experts\.)", r"\1mlp.\2", parameter)]
    spellings += [re.sub(r"shared_mlp\.input_linear", "mlp.shared_expert.gate_up_proj", parameter)]
    if "expert" in spellings[-1]:
        spellings += [key.replace("gate_up_proj", part) for part in ("gate_proj", "up_proj") for key in spellings]
    if "in_proj_qkvz" in parameter:
        spellings += [parameter.replace("in_proj_qkvz", part) for part in ("in_proj_qkv", "in_proj_z")]
    candidates = [names.get_name(key, try_suffixes=(".weight", ".bias")) for key in spellings]
    stems = [name.removesuffix(".weight") for name in candidates if name]
    # The converter cuts MLA's projection of keys and values in two. That of the keys is transposed: it gets queries.
    stems += [stem.replace("attn_kv_b", "attn_v_b") for stem in stems]
    return [f"{stem}.weight" for stem in dict.fromkeys(stems) if f"{stem}.weight" in present]


def one_line(error: Exception) -> str:
    """Return the first line of an exception's message, or the exception's name if it has no message."""
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__


def quiet_transformers() -> Any:
    """Import transformers with progress bars and warnings off, also those of accelerate.

    They warn of what is meant to be so: weights on disk, a reference implementation in place of a GPU kernel.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    for name in ("transformers", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return transformers


def _model_class(source: Path) -> Any:
    """Return the class of transformers that loads a source's model with its language model and its head.

    That is the class for causal language models, unless transformers has none and config.json names one that reads
    images or sounds too.
    """
    from transformers.models.auto import modeling_auto

    transformers = quiet_transformers()
    config = read_json(source / "config.json") if source.is_dir() else {}
    if config.get("model_type") in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return transformers.AutoModelForCausalLM
    for kind in ("IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM"):
        wrappers = getattr(modeling_auto, f"MODEL_FOR_{kind}_MAPPING_NAMES", {})
        if wrappers.get(config.get("model_type")) in config.get("architectures", ()):
            return {
                "IMAGE_TEXT_TO_TEXT": transformers.AutoModelForImageTextToText,
                "MULTIMODAL_LM": transformers.AutoModelForMultimodalLM,
            }[kind]
    return transformers.AutoModelForCausalLM


def concrete_class(source: Path, config: Any) -> Any:
    """Return the class of the model that config.json names, or else the one that `load_model` loads.

    config: transformers' own of the source. Raises an exception of any kind for what transformers does not know.
    """
    named = getattr(quiet_transformers(), config.architectures[0], None)
    return named or _model_class(source)._model_mapping[type(config)]


def _cannot_load(source: Path, error: Exception) -> AaacError:
    return AaacError(
        f"{source}: transformers cannot load it ({one_line(error)}); "
        "calibrate with `imatrix`, or set `calibration` to 'none'"
    )


def _location(source: Path) -> dict[str, Any]:
    """Return the arguments of from_pretrained that name a folder or a GGUF file."""
    folder, name = (source.parent, source.name) if source.is_file() else (source, None)
    return {"pretrained_model_name_or_path": folder, "gguf_file": name}


def _device_map(source: Path, device: str, dtype: str) -> dict[str, str] | None:
    """Return accelerate's map from modules to a device or "disk"; None if all fits on the device."""
    import torch

    transformers = quiet_transformers()
    with torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(source)
        model = _model_class(source).from_config(config)
    itemsize = 4 if dtype == "float32" else 2
    memory = torch.cuda.mem_get_info()[1] if device != "cpu" else _memory()
    if itemsize * sum(p.numel() for p in model.parameters()) <= WEIGHTS_SHARE * memory:
        return None
    blocks = block_list(model)
    # The modules that contain the blocks, from the model itself (named "") to the list of blocks.
    around = [name for name, module in model.named_modules() if blocks in module.modules()]
    beside = [
        f"{name}.{child}".lstrip(".") for name in around[:-1] for child, _ in model.get_submodule(name).named_children()
    ]
    return {**{name: device for name in beside if name not in around}, **dict.fromkeys(around[-1:], "disk")}


def _memory() -> int:
    """Return the bytes of this machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
