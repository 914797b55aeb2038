"""Open the source of a conversion, a folder, a GGUF or a model on the Hugging Face Hub, as a full-precision GGUF."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import AaacError
from ..files.gguf import GgufFile, read, read_model
from ..files.scratch import check_room
from ..llama import tools
from . import checkpoint
from .completeness import check_blocks, check_tensors
from .files import main_dtype, stored_tensors

HUB = "hf://"
# The converter's names of dtypes. It guesses from the first matrix, which may be one of a few of another dtype.
_OUTTYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
# Kinds of quantized checkpoints that the converter decodes: a level times a scale, which 16 bits would round.
_PRODUCTS = ("compressed-tensors", "gptq")
# Configuration, tokenizer, weights, and the model card, from which llama.cpp's converter takes the licence.
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.tiktoken", "*.txt", "*.jinja", "README.md"]
_NOT_HUB_FILES = ["*/*", "consolidated*"]  # the same weights in other formats

# GGUF files that hold no language model, by general.type.
_OTHER_FILES = {
    "mmproj": "a vision or audio projector, which AAAC leaves as it is; "
    "give it to llama.cpp beside the model with --mmproj, and convert the model",
    "adapter": "a LoRA adapter, which AAAC leaves as it is; "
    "merge it into the model, or give it to llama.cpp beside the model with --lora",
    "imatrix": "an importance matrix; give it as `imatrix`",
}


def locate(text: str) -> Path:
    """Return the path of a source: `text` is a path, `hf://owner/name`, or `owner/name` if no such path exists.

    A model of the Hub is downloaded into huggingface_hub's own cache, with its token and its rules for working offline.
    Raises AaacError if that fails.
    """
    path = Path(text)
    if not text.startswith(HUB) and (
        path.exists() or path.suffix == ".gguf" or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", text)
    ):
        _check_names(path)
        return path
    import huggingface_hub
    from huggingface_hub import errors

    name = text.removeprefix(HUB)
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=_HUB_FILES, ignore_patterns=_NOT_HUB_FILES))
    except errors.GatedRepoError:
        how = f"accept its terms at https://huggingface.co/{name}, then log in with `hf auth login` or set HF_TOKEN"
        raise AaacError(f"{text}: access to this model is restricted; {how}") from None
    except errors.RepositoryNotFoundError:
        raise AaacError(
            f"{text}: neither a local path nor a model on the Hugging Face Hub; "
            "check the name, or log in with `hf auth login` if it is private"
        ) from None
    except errors.LocalEntryNotFoundError:
        raise AaacError(
            f"{text}: no such local path, the Hugging Face cache does not hold all of it, "
            "and the Hub cannot be reached; go online (HF_HUB_OFFLINE must not be set) to download it"
        ) from None
    except errors.HFValidationError:
        raise AaacError(f"{text}: not a name on the Hugging Face Hub; expected {HUB}OWNER/NAME") from None
    except OSError as e:
        raise AaacError(f"{text}: cannot be downloaded: {checkpoint.one_line(e)}; try again") from None


def _check_names(source: Path) -> None:
    """Raise AaacError for a folder with a name that the libraries that read its files cannot open."""
    for path in (source, *source.iterdir()) if source.is_dir() else ():
        if os.fsencode(path) != str(path).encode(errors="replace"):
            raise AaacError(
                f"{path}: the path is not UTF-8, or the locale is not, and then safetensors and tokenizers cannot open "
                "it; rename it, or set LC_ALL=C.UTF-8"
            )


def model_name(source: Path) -> str:
    """Return the name of a source: its file's or folder's, or the repository's of a folder in the Hub's cache."""
    if source.is_file():
        return source.stem
    folder = source.resolve()
    name = source.name if source.name not in ("", "..") else folder.name
    repository = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repository.startswith("models--") and name == folder.name:
        return repository.split("--", 2)[-1]
    return name


@contextmanager
def full_precision(source: Path, scratch: Path, header_only: bool = False) -> Iterator[GgufFile]:
    """Open the full-precision GGUF of a checkpoint folder or of a GGUF file.

    A folder's is made in the folder `scratch` and removed after use. header_only: it has no weights, and is made at
    once. Raises AaacError for a source that cannot be read.
    """
    if source.is_file():
        file = read_model(source)
        kind = file.get("general.type", "model")
        if kind == "model" and file.architecture == "clip":  # older writers' projector files name no type
            kind = "mmproj"
        if kind in _OTHER_FILES:
            raise AaacError(f"{source}: is {_OTHER_FILES[kind]}")
        yield file
        return
    config = checkpoint.check(source)
    if header_only:
        check_tensors(source, config)
    tensors = stored_tensors(source)
    outtype = _OUTTYPES.get(main_dtype(tensors), "auto")
    method = checkpoint.quantization(source).get("quant_method")
    if method in _PRODUCTS:
        outtype = "f32"
    scratch.mkdir(exist_ok=True)
    n_bytes = sum(tensor.n_bytes for tensor in tensors.values())
    if not header_only:
        check_room(scratch, n_bytes)
    with tempfile.TemporaryDirectory(dir=scratch, prefix=".aaac-source-") as folder:
        out = Path(folder) / "source.gguf"
        try:
            tools.convert_hf(source, out, outtype, header_only, model_name(source), n_bytes)
        except AaacError as e:
            if not method or "refuses this model" not in str(e):
                raise
            what = f"the checkpoint is quantized ({method}); give one that is not, or one with decoded weights"
            raise AaacError(f"{e}; {what}") from None
        file = read(out)
        check_blocks(source, file)
        yield file
