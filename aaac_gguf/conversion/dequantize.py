"""Write the decoded weights of a GGUF as an ordinary one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType as T

from ..errors import AaacError
from ..files.gguf import TensorInfo, read_model
from ..files.output import check_output, write
from ..models.weights import check_largest
from ..progress import progress
from ..quantizer.types import TENSOR_TYPES, round_to_nearest
from .job import output_metadata
from .plan import NOT_WEIGHTS
from .recipes import PLAIN_TYPES
from .settings import parse_type


def dequantize_file(source: Path, out: Path, type_name: str = "F32") -> int:
    """Write the decoded weights of `source` as F32, F16 or BF16, a file that stock llama.cpp runs.

    Returns its bytes. Raises AaacError for another type and for a file that is no model.
    """
    ggml_type = parse_type(type_name, "type")
    if ggml_type not in PLAIN_TYPES:
        raise AaacError(f"`type` {type_name}: choose from {', '.join(t.name for t in PLAIN_TYPES)}")
    check_output(out, source)
    file = read_model(source)
    infos = []
    for name, shape in file.shapes.items():
        stored = file.tensors[name].tensor_type
        wanted = ggml_type if len(shape) > 1 else T.F32
        infos.append(TensorInfo(name, shape, stored if stored in NOT_WEIGHTS else wanted))

    def decode(info: TensorInfo) -> Any:
        file.release()
        tensor = file.tensors[info.name]
        if info.type == tensor.tensor_type:
            return tensor.data
        weight = torch.from_numpy(file[info.name])
        check_largest(file.path, info.name, weight, TENSOR_TYPES[info.type].largest)
        return round_to_nearest(weight, info.type)

    metadata = output_metadata(file, TENSOR_TYPES[ggml_type].file_type)
    write(out, metadata, infos, (decode(info) for info in progress(infos, desc="decoding", unit="tensor")))
    return out.stat().st_size
