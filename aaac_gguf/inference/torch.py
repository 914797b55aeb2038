"""Run an AAAC GGUF in transformers, with linear layers that keep their weights in blocks.

    model, tokenizer = load_model("model.gguf"), load_tokenizer("model.gguf")

No float copy of a linear layer's weights is kept. Its products are those of float32 weights on a CPU, and those of the
CUDA kernels on a GPU.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import AaacError
from ..files.gguf import GgufFile, block_number, read_model
from ..models.checkpoint import one_line, tokenizer_of
from .linear import Linear


def load_model(
    path: str | os.PathLike[str], dtype: torch.dtype = torch.float32, device: str = "cpu", config: Any = None
) -> Any:
    """Return the causal language model of an AAAC GGUF as transformers runs it, in evaluation mode.

    Linear layers of AAAC tensors are `Linear`. All other parameters are decoded to `dtype`; so are embeddings and the
    experts of a mixture, even those of an AAAC type. transformers reads the commonest settings of a model from a GGUF.
    `config`, that of its checkpoint from transformers' AutoConfig, has them all. Raises AaacError for what transformers
    cannot read.
    """
    import accelerate  # type: ignore[import-untyped]
    import transformers

    file = read_model(Path(path))
    own = _config(file)
    if config is None:
        _check_rotary(own, file)
    try:
        with accelerate.init_empty_weights():  # parameters take no memory until they have values
            model = transformers.AutoModelForCausalLM.from_config(config or own, dtype=dtype)
        loader = _Loader(model, file)
        loader.load()
    except AaacError:
        raise
    except Exception as e:  # transformers raises whatever the model's own code raises
        raise _cannot_load(file, e, remedy=_GIVE_CONFIG) from None
    if empty := [name for name, p in model.named_parameters() if p.is_meta]:
        raise _cannot_load(file, f"no tensor holds its parameter {empty[0]}", remedy=_GIVE_CONFIG)
    if homeless := [name for name in loader.homeless if not _may_be_left(name, model)]:
        raise _cannot_load(file, f"no parameter of its model holds tensor {homeless[0]}", remedy=_GIVE_CONFIG)
    if config is None:
        _scale_rotary(model, file)
    return model.to(device).eval()


def load_tokenizer(path: str | os.PathLike[str]) -> Any:
    """Return the tokenizer of a GGUF as transformers makes it. Raises AaacError if it cannot."""
    file = read_model(Path(path))
    try:
        return tokenizer_of(file.path)
    except Exception as e:
        raise _cannot_load(file, e, "its tokenizer") from None


def replace_linear(model: Any, file: GgufFile) -> dict[str, str]:
    """Give a transformers `model` the weights of `file`, linear layers in blocks; return AAAC tensors not in blocks.

    The model may have values, on any device, or be on the meta device. transformers' own map of names and its
    processors of GGUF tensors say which parameter a tensor belongs to and how llama.cpp's converter changed it. A
    tensor that is returned has the parameter that holds its decoded values: an embedding, the experts of a mixture, or
    another parameter that is not just a linear layer's weight. The parameter is "" if transformers has none for it.
    Raises AaacError for an architecture that transformers does not read from a GGUF.
    """
    _config(file)
    return _Loader(model, file).load()


class _Loader:
    """The way from the tensors of a GGUF to the parameters of a transformers model, by transformers' own tables.

    homeless  the tensors that no parameter holds
    """

    def __init__(self, model: Any, file: GgufFile):
        from transformers.modeling_gguf_pytorch_utils import (
            TENSOR_PROCESSORS,
            TensorProcessor,
            get_gguf_hf_weights_map,
        )

        self.model, self.file = model, file
        config = model.config.get_text_config()
        self.processor = TENSOR_PROCESSORS.get(file.architecture, TensorProcessor)(config=config.to_dict())
        self.places: dict[str, str] = get_gguf_hf_weights_map(
            model, self.processor, file.architecture, config.num_hidden_layers
        )
        self.homeless: list[str] = []

    def load(self) -> dict[str, str]:
        """Load every tensor. Return the AAAC tensors that are not in blocks with the parameters that they are in."""
        decoded = {}
        for name in self.file.tensors:
            if self.replace(name):
                continue
            parameter = self.fill(name)
            if not parameter:
                self.homeless.append(name)
            if name in self.file.codecs:
                decoded[name] = parameter
        self.model.tie_weights()
        return decoded

    def replace(self, name: str) -> bool:
        """Put a `Linear` in the place of the layer whose weight an AAAC tensor is. Return whether that can be."""
        parameter = self.places.get(name, "")
        if name not in self.file.codecs or not parameter.endswith(".weight"):
            return False
        path = parameter.removesuffix(".weight")
        layer = self.model.get_submodule(path)
        if not _is_linear(layer):
            return False
        order = self._rows(name, layer)
        if order is None:
            return False
        linear = Linear.from_file(self.file, name, layer.bias, order)
        if (linear.out_features, linear.in_features) != _shape(layer):
            raise self._wrong_shape(name, parameter)
        if not layer.weight.is_meta:
            linear.to(layer.weight.device)
        parent, _, child = path.rpartition(".")
        setattr(self.model.get_submodule(parent), child, linear)
        return True

    def _rows(self, name: str, layer: torch.nn.Module) -> np.ndarray | None:
        """Return the tensor's row that each row of the layer is, or None if rows do not stay whole.

        A matrix of row numbers goes the way of the weights.
        """
        n_rows, k = self.file.shapes[name]
        numbers = np.broadcast_to(np.arange(n_rows, dtype=np.int32)[:, None], (n_rows, k))
        there = self._process(numbers, name, {})[1]
        if not isinstance(layer, torch.nn.Linear):  # Conv1D
            there = there.T
        whole = there.shape == numbers.shape and bool((there == there[:, :1]).all())
        return there[:, 0].copy() if whole else None

    def fill(self, name: str) -> str:
        """Decode a tensor into the parameter that holds it. Return the parameter's name, or "" if there is none."""
        experts = self.places.get(name.removesuffix(".weight"), "")  # as transformers names them
        given = {}
        if experts:
            # gate and up are two tensors of one parameter; each is put into its part
            if self._get(experts).is_meta:
                self._set(experts, torch.full(self._get(experts).shape, torch.nan))
            given[experts] = self._get(experts).data
        new_name, values = self._process(self.file[name], name, given)
        if new_name in self.places:
            given[self.places[new_name]] = torch.from_numpy(np.ascontiguousarray(values))
        for parameter, tensor in given.items():
            self._set(parameter, tensor)
        return next(iter(given), "")

    def _process(self, values: np.ndarray, name: str, given: dict[str, Tensor]) -> tuple[str | None, np.ndarray]:
        """Undo what llama.cpp's converter did to a tensor. Processors fill parameters in `given` themselves."""
        result = self.processor.process(
            weights=values, name=name, tensor_key_mapping=self.places, parsed_parameters={"tensors": given}
        )
        return result.name, result.weights

    def _get(self, parameter: str) -> Tensor:
        owner, _, leaf = parameter.rpartition(".")
        found: Tensor = getattr(self.model.get_submodule(owner), leaf)
        return found

    def _set(self, parameter: str, values: Tensor) -> None:
        before = self._get(parameter)
        if before.shape != values.shape:
            raise self._wrong_shape(parameter, parameter)
        if before.is_meta:
            owner, _, leaf = parameter.rpartition(".")
            value = torch.nn.Parameter(values.to(before.dtype), requires_grad=False)
            setattr(self.model.get_submodule(owner), leaf, value)
        elif before.data_ptr() != values.data_ptr():
            before.data.copy_(values)

    def _wrong_shape(self, name: str, parameter: str) -> AaacError:
        return _cannot_load(self.file, f"{name} has another shape than {parameter}", remedy=_GIVE_CONFIG)


def _is_linear(layer: torch.nn.Module) -> bool:
    """Return whether a layer is torch's Linear, or the transposed one of GPT-2, and nothing besides."""
    from transformers.pytorch_utils import Conv1D

    return type(layer).forward in (torch.nn.Linear.forward, Conv1D.forward)


def _shape(layer: Any) -> tuple[int, int]:
    n, k = layer.weight.shape if isinstance(layer, torch.nn.Linear) else layer.weight.T.shape
    return int(n), int(k)


def _config(file: GgufFile) -> Any:
    """Return the model's configuration as transformers reads it. Raises AaacError if it cannot."""
    import transformers

    if len(file.maps) > 1:
        raise _cannot_load(file, "it reads no split files", remedy="join them with llama-gguf-split --merge")
    try:
        config = transformers.AutoConfig.from_pretrained(file.path.parent, gguf_file=file.path.name)
    except Exception as e:
        raise _cannot_load(file, e) from None
    return config


def _check_rotary(config: Any, file: GgufFile) -> None:
    """Raise AaacError for a scaling of the rotary embedding that transformers does not read from the file."""
    scaling = file.setting("rope.scaling.type", "none")
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    if scaling != "none" and rope.get("rope_type", "default") == "default":
        raise _cannot_load(file, f"it does not read the {scaling} scaling of a rotary embedding", remedy=_GIVE_CONFIG)


def _may_be_left(name: str, model: Any) -> bool:
    """Return whether a model runs without a tensor: `_scale_rotary` reads it, or it predicts more than one token."""
    n_layers = model.config.get_text_config().num_hidden_layers
    return name == "rope_freqs.weight" or block_number(name, 0) >= n_layers


def _scale_rotary(model: Any, file: GgufFile) -> None:
    """Divide the rotary frequencies by the file's factors, which transformers does not read: Llama 3's scaling."""
    if "rope_freqs.weight" in file.tensors:
        for module in model.modules():
            if isinstance(getattr(module, "inv_freq", None), Tensor):
                module.inv_freq /= torch.from_numpy(file["rope_freqs.weight"]).to(module.inv_freq)


_RUN_ELSEWHERE = "run it in patched llama.cpp, or run what `aaac-gguf dequantize` makes of it elsewhere"
_GIVE_CONFIG = "give `config`, that of its checkpoint, or run it in patched llama.cpp"


def _cannot_load(file: GgufFile, why: Exception | str, what: str = "it", remedy: str = _RUN_ELSEWHERE) -> AaacError:
    reason = why if isinstance(why, str) else one_line(why)
    return AaacError(f"{file.path}: transformers cannot load {what} ({reason}); {remedy}")
