"""A torch layer whose weights stay in AAAC blocks, on a CPU by linear.c and on a GPU by the CUDA kernels.

linear.c is compiled at its first use. Without a C compiler NumPy decodes, by tiles too, and slowly.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..compiler import c_library
from ..errors import AaacError
from ..files import format as fmt
from ..files.gguf import GgufFile
from . import kernels

_SOURCE = Path(__file__).with_name("linear.c")
MAX_FUSED_COLUMNS = 4  # MAX_COLUMNS of linear.c
TILE = 1 << 18  # weights that are decoded at a time on a CPU: 1 MiB


def decode(qtype: fmt.AaacType, blocks: Tensor, codec: fmt.Codec) -> Tensor:
    """Return the float32 weights [N, K] of blocks uint8 [N, row bytes] on a CPU, bit for bit as `format.decode`."""
    return _decode(qtype, blocks, codec, kernels.codec_params(qtype, codec))


def _decode(qtype: fmt.AaacType, blocks: Tensor, codec: fmt.Codec, params: np.ndarray) -> Tensor:
    n_rows, k = kernels.check_shape(qtype, blocks)
    if c_library(_SOURCE) is None:
        return torch.from_numpy(fmt.decode(qtype, blocks.numpy(), codec))
    out = torch.empty(n_rows, k)
    _call("aaac_decode", qtype.type_id, params, blocks, blocks.stride(0), n_rows, k, out)
    return out


def _call(name: str, *arguments: Tensor | np.ndarray | int) -> None:
    """Call a function of linear.c on as many threads as torch uses."""
    library = c_library(_SOURCE)
    assert library is not None
    if set_threads := getattr(library, "omp_set_num_threads", None):
        set_threads(torch.get_num_threads())
    function = getattr(library, name)
    function.restype = None
    given: list[Any] = []
    for a in arguments:
        if isinstance(a, int):
            given.append(ctypes.c_int64(a))
        else:
            given.append(ctypes.c_void_p(a.data_ptr() if isinstance(a, Tensor) else a.ctypes.data))
    function(*given)


class Linear(torch.nn.Module):
    """A linear layer y = x W^T + bias that holds W [out_features, in_features] in AAAC blocks.

    blocks  buffer uint8 [out_features, row bytes]; its codec goes into the state dict with it
    bias    parameter [out_features], or None

    It is for inference: no gradient flows through it. On a GPU up to 8 columns of x are rounded to 8 bits, as
    llama.cpp does, and more are multiplied on the tensor cores in 16 bits.
    """

    blocks: Tensor
    bias: torch.nn.Parameter | None

    def __init__(self, qtype: fmt.AaacType, blocks: Tensor, codec: fmt.Codec, bias: Tensor | None = None):
        super().__init__()
        self.out_features, self.in_features = kernels.check_shape(qtype, blocks)
        self.qtype = qtype
        self.register_buffer("blocks", blocks.contiguous())
        if bias is not None and not isinstance(bias, torch.nn.Parameter):
            bias = torch.nn.Parameter(bias, requires_grad=False)
        self.register_parameter("bias", bias)
        self._set_codec(codec)

    @classmethod
    def from_file(
        cls, file: GgufFile, name: str, bias: Tensor | None = None, rows: np.ndarray | Tensor | None = None
    ) -> Linear:
        """Return a layer with the tensor `name` of a GGUF. Row i of the layer is row `rows[i]` of the tensor, if given.

        Raises AaacError for a tensor of another type, and for the experts of a mixture, which are 3-D.
        """
        tensor = file.tensors[name]
        if tensor.tensor_type not in fmt.TYPES_BY_ID:
            raise AaacError(f"{file.path}: tensor {name} is {tensor.tensor_type.name}, not of an AAAC type; decode it")
        blocks = torch.from_numpy(np.array(tensor.data))
        if rows is not None:
            blocks = blocks[torch.as_tensor(rows).long()]
        return cls(fmt.TYPES_BY_ID[tensor.tensor_type], blocks, file.codecs[name], bias)

    def _set_codec(self, codec: fmt.Codec) -> None:
        self.codec, self._params = codec, kernels.codec_params(self.qtype, codec)

    def get_extra_state(self) -> Tensor:
        """Return the codec for the state dict: struct aaac_params as uint8."""
        return torch.from_numpy(np.frombuffer(self._params.tobytes(), np.uint8).copy())

    def set_extra_state(self, state: Tensor) -> None:
        """Take the codec from a state dict."""
        books, d, m = np.frombuffer(state.cpu().numpy().tobytes(), kernels.PARAMS)[0]
        self._set_codec(fmt.Codec(books.reshape(fmt.N_CODEBOOKS, fmt.N_LEVELS).copy(), float(d), int(m)))

    @property
    def weight(self) -> Tensor:
        """Decode the weights, float32 [out_features, in_features], for code that reads them. They are not kept."""
        if self.blocks.is_cuda:
            decoded: Tensor = kernels.dequant(self.qtype, self.blocks, self.codec)
            return decoded
        return _decode(self.qtype, self.blocks, self.codec, self._params)

    def forward(self, x: Tensor) -> Tensor:
        """Return the products [..., out_features] of x [..., in_features], in the dtype of x."""
        if x.shape[-1] != self.in_features:
            raise AaacError(f"x has shape {list(x.shape)}, expected [..., {self.in_features}] for these weights")
        columns = x.detach().reshape(-1, self.in_features)
        if not len(columns):
            y = columns.new_empty(0, self.out_features)
        elif self.blocks.is_cuda:
            y = self._gpu_product(columns)
        else:
            y = self._cpu_product(columns.float().contiguous())
        if self.bias is not None:
            y = y + self.bias
        return y.to(x.dtype).reshape(*x.shape[:-1], self.out_features)

    def _cpu_product(self, x: Tensor) -> Tensor:
        """Return float32 [n, out_features] for x float32 [n, in_features]."""
        n = len(x)
        y = torch.empty(n, self.out_features)
        sizes = (self.blocks.stride(0), self.out_features, self.in_features)
        if n <= MAX_FUSED_COLUMNS and c_library(_SOURCE) is not None:
            _call("aaac_multiply", self.qtype.type_id, self._params, self.blocks, *sizes, x, n, y)
            return y
        rows = max(1, TILE // self.in_features)
        for start in range(0, self.out_features, rows):
            blocks = self.blocks[start : start + rows]
            y[:, start : start + rows] = x @ _decode(self.qtype, blocks, self.codec, self._params).T
        return y

    def _gpu_product(self, x: Tensor) -> Tensor:
        """Return float32 [n, out_features] for x [n, in_features]."""
        x = (x if x.dtype in (torch.float16, torch.bfloat16) else x.float()).contiguous()
        if x.data_ptr() % 16:
            x = x.clone()  # a slice of a larger tensor; the kernels read 16 bytes at a time
        product = kernels.matvec if len(x) <= kernels.MAX_MATVEC_COLUMNS else kernels.matmul
        y: Tensor = product(self.qtype, self.blocks, self.codec, x)
        return y

    def extra_repr(self) -> str:
        """Describe the layer in one line."""
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, type={self.qtype.name}"
