"""Read and check the weights of a GGUF, as torch tensors."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType as T

from ..errors import AaacError
from ..files.gguf import GgufFile, TensorInfo, dequantize, field_values, render_header
from ..progress import progress


def check_weights(file: GgufFile, largest: Mapping[str, float] | None = None) -> str:
    """Return the sha256 of metadata and weights.

    largest: the largest magnitude that the output can hold, by tensor. Raises AaacError that names the first tensor
    with NaN or Inf, or with a weight beyond that.
    """
    infos = [TensorInfo(name, shape, file.tensors[name].tensor_type) for name, shape in file.shapes.items()]
    digest = hashlib.sha256(render_header(field_values(file.fields), infos))
    for name, tensor in progress(file.tensors.items(), desc="checking weights", unit="tensor"):
        if tensor.tensor_type not in (T.I8, T.I16, T.I32, T.I64, T.F64):
            stored = _stored(file, name)
            if not torch.isfinite(stored).all():
                what = "holds NaN or Inf; the checkpoint is broken, download it again"
                raise AaacError(f"{file.path}: tensor {name} {what}")
            check_largest(file.path, name, stored, (largest or {}).get(name, math.inf))
        digest.update(np.ascontiguousarray(tensor.data).reshape(-1).view(np.uint8).data)
        file.release()
    return digest.hexdigest()


def check_largest(path: Path, name: str, weight: torch.Tensor, largest: float) -> None:
    """Raise AaacError if a weight is beyond the largest magnitude that its new type can hold."""
    if math.isfinite(largest) and (found := float(weight.abs().max())) > largest:
        raise AaacError(
            f"{path}: tensor {name} holds {found:.6g}, and its new type at most {largest:.6g}; "
            "choose another `type`, or one for this tensor with `tensor_types`"
        )


def _stored(file: GgufFile, name: str, rows: torch.Tensor | None = None) -> torch.Tensor:
    """Return a floating-point tensor in its own dtype, memory-mapped, and a quantized one decoded to float32."""
    tensor = file.tensors[name]
    data = np.asarray(tensor.data)
    if tensor.tensor_type not in (T.F32, T.F16, T.BF16):
        some = data if rows is None else data[rows.numpy()]
        return torch.from_numpy(dequantize(some, tensor.tensor_type, file.codecs.get(name)))
    stored = torch.from_numpy(data)
    if tensor.tensor_type == T.BF16:
        stored = stored.view(torch.bfloat16)
    return stored if rows is None else stored[rows]


def load_weight(file: GgufFile, name: str, device: str, rows: torch.Tensor | None = None) -> torch.Tensor:
    """Return the float32 weights [..., K] of a tensor on `device`.

    rows: int64 [n], those of its first dimension to return; all if None.
    """
    return _stored(file, name, rows).to(device).float()
