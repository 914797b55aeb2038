"""Read the weights of a full-precision GGUF as torch tensors."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from gguf import GGMLQuantizationType as T

from ..errors import AaacError
from ..files.gguf import GgufFile, TensorInfo, field_values, render_header
from ..progress import progress


def check_weights(file: GgufFile) -> str:
    """Return the sha256 of metadata and weights. Raises AaacError that names the first tensor with NaN or Inf."""
    infos = [
        TensorInfo(name, tuple(int(n) for n in reversed(t.shape)), t.tensor_type) for name, t in file.tensors.items()
    ]
    digest = hashlib.sha256(render_header(field_values(file.fields), infos))
    for name, tensor in progress(file.tensors.items(), desc="checking weights", unit="tensor"):
        if tensor.tensor_type in (T.F32, T.F16, T.BF16) and not torch.isfinite(_stored(file, name)).all():
            raise AaacError(f"{file.path}: tensor {name} holds NaN or Inf; the checkpoint is broken, download it again")
        digest.update(np.ascontiguousarray(tensor.data).reshape(-1).view(np.uint8).data)
        file.release()
    return digest.hexdigest()


def _stored(file: GgufFile, name: str) -> torch.Tensor:
    """Return a floating-point tensor in its own dtype, memory-mapped."""
    tensor = file.tensors[name]
    data = torch.from_numpy(np.asarray(tensor.data))
    return data.view(torch.bfloat16) if tensor.tensor_type == T.BF16 else data


def load_weight(file: GgufFile, name: str, device: str, rows: torch.Tensor | None = None) -> torch.Tensor:
    """Return the float32 weights [..., K] of a full-precision tensor on `device`.

    rows: int64 [n], those of its first dimension to return; all if None.
    """
    stored = _stored(file, name)
    return (stored if rows is None else stored[rows]).to(device).float()
