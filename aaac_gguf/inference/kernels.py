"""Call the CUDA kernels of cuda_kernels/ on arrays: `dequant`, `matvec` for few columns and `matmul` for many.

Blocks are uint8 [N, row bytes] as in a GGUF file, activations x are [n, K], and products are float32 [n, N]. CuPy
arrays and torch tensors on the GPU are used in place, through DLPack. Results are of the same kind as the blocks. NumPy
arrays take the reference path: the format's own decoder and a product in float64. CuPy is imported, and each kernel
compiled, at first use.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import AaacError
from ..files import format as fmt
from ..files.gguf import GgufFile
from ..resources import shipped

MAX_MATVEC_COLUMNS = 8

# The same constants as in cuda_kernels/aaac_*.cuh: threads per block, weights per unit, rows of a tile.
THREADS = 128
UNIT = 32
MATMUL_THREADS = 256
MATMUL_TILE = 128

PARAMS = np.dtype([("codebooks", np.int8, 32), ("d", np.float32), ("m", np.uint8)], align=True)  # struct aaac_params
EXPERTS = np.dtype(
    [("bounds", np.uint64), ("sources", np.uint64), ("targets", np.uint64), ("bytes", np.int64)]
)  # struct aaac_experts

C_TYPES = {"float32": "float", "float16": "aaac_f16", "bfloat16": "aaac_bf16"}
STRUCTS = {"AAAC4_G16": "aaac_g16", "AAAC4_G32": "aaac_g32", "AAAC4_G128": "aaac_g128"}


def source(name: str) -> str:
    """Return the text of cuda_kernels/`name` with our own headers inserted.

    CuPy caches binaries by the text. It does not look at included files.
    """
    seen: set[str] = set()

    def expand(file: str) -> str:
        if file in seen:
            return ""
        seen.add(file)
        text = (shipped("cuda_kernels") / file).read_text("utf-8")
        return re.sub(r'^#include "(\w+\.cuh)"$', lambda match: expand(match[1]), text, flags=re.MULTILINE)

    return expand(name)


@functools.cache
def _cupy() -> Any:
    """Import CuPy. Raises AaacError if it is not installed or finds no GPU."""
    try:
        import cupy
    except ImportError as e:
        raise AaacError(
            f"CuPy is not installed ({e}); `pip install cupy-cuda13x`, or cupy-cuda12x for CUDA 12"
        ) from None
    try:
        n_devices = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as e:
        raise AaacError(f"CuPy finds no usable GPU: {e}; check the driver with nvidia-smi") from None
    if n_devices == 0:
        raise AaacError("CuPy finds no GPU; check the driver with nvidia-smi")
    return cupy


@functools.cache
def kernel(file: str, expression: str) -> Any:
    """Return the cupy.RawKernel that a C++ expression names, for example "aaac_matvec_q8<aaac_g16, 1>" of matvec.cu.

    CuPy compiles it for each device at its first launch.
    """
    module = _cupy().RawModule(code=source(file), options=("-std=c++17",), name_expressions=(expression,))
    return module.get_function(expression)


def _is_torch(array: Any) -> bool:
    return type(array).__module__.partition(".")[0] == "torch"


def _dtype_name(array: Any) -> str:
    return str(array.dtype).removeprefix("torch.")


def _view(array: Any, what: str) -> Any:
    """Return a CuPy array on the same memory. bfloat16 becomes its bits, uint16."""
    cupy = _cupy()
    bf16 = _dtype_name(array) == "bfloat16"
    if isinstance(array, cupy.ndarray):
        return array.view(cupy.uint16) if bf16 else array
    if not _is_torch(array):
        raise AaacError(f"{what}: expected a CuPy array, a torch tensor or a NumPy array, not {type(array).__name__}")
    if not array.is_cuda:
        raise AaacError(
            f"{what} is on {array.device}; move it to the GPU with .cuda(), or pass NumPy arrays for the reference"
        )
    array = array.detach()
    if bf16:
        import torch

        array = array.view(torch.int16)
    return cupy.from_dlpack(array)


def _like(array: Any, result: Any, bf16: bool = False) -> Any:
    """Return the CuPy array `result` as the same kind as `array`. For CuPy bfloat16 stays uint16 bits."""
    if not _is_torch(array):
        return result
    import torch

    if bf16:
        return torch.from_dlpack(result.view(_cupy().int16)).view(torch.bfloat16)
    return torch.from_dlpack(result)


def _row_stride(view: Any) -> int:
    """Return the bytes from one row to the next. DLPack may give a single row any stride, which is not used."""
    n_rows, n = view.shape
    return int(view.strides[0]) if n_rows > 1 else int(n) * int(view.itemsize)


def codec_params(qtype: fmt.AaacType, codec: fmt.Codec) -> np.ndarray:
    """Return `codec` as struct aaac_params. Raises AaacError if it is not valid."""
    codec.check(f"of type {qtype.name}")
    return np.array((codec.codebooks.reshape(-1), codec.scale_base, codec.scale_mantissa_bits), dtype=PARAMS)


def check_shape(qtype: fmt.AaacType, blocks: Any) -> tuple[int, int]:
    """Return N and K of blocks uint8 [N, row bytes]. Raises AaacError if they are not whole blocks of the type."""
    if blocks.ndim != 2:
        raise AaacError(
            f"blocks have shape {list(blocks.shape)}, expected [rows, bytes]; reshape(-1, row bytes) does it"
        )
    if _dtype_name(blocks) != "uint8":
        raise AaacError(f"blocks are {_dtype_name(blocks)}, expected uint8")
    n_rows, n_bytes = blocks.shape
    if n_bytes == 0 or n_bytes % qtype.type_size:
        raise AaacError(
            f"rows of {n_bytes} bytes are not whole {qtype.name} blocks of {qtype.type_size} bytes; is the type right?"
        )
    return int(n_rows), int(n_bytes) // qtype.type_size * qtype.block_size


def _check_blocks(qtype: fmt.AaacType, blocks: Any) -> Any:
    """Return the CuPy view of blocks. Raises AaacError if the kernels cannot read them."""
    view = _view(blocks, "blocks")
    alignment = 4 if qtype.type_size % 4 == 0 else 2
    if view.strides[1] != 1 or _row_stride(view) < view.shape[1]:
        raise AaacError(
            f"blocks have strides {list(view.strides)}, expected rows of consecutive bytes; make them contiguous"
        )
    if view.data.ptr % 4 or _row_stride(view) % alignment:
        where = f"start at {view.data.ptr:#x} with rows {view.strides[0]} bytes apart"
        raise AaacError(f"blocks {where}, expected multiples of 4 and {alignment}; copy them")
    return view


def _check_width(x: Any, k: int) -> None:
    """Raise AaacError unless x is [n, k]."""
    if x.ndim != 2 or x.shape[1] != k:
        raise AaacError(f"x has shape {list(x.shape)}, expected [columns, {k}] for these weights")


def _check_activations(x: Any, k: int, blocks: Any) -> tuple[Any, str]:
    """Return the CuPy view of x [n, k] and its dtype's name. Raises AaacError if the kernels cannot read it."""
    _check_width(x, k)
    name = _dtype_name(x)
    if name not in C_TYPES:
        raise AaacError(f"x is {name}, expected one of {', '.join(C_TYPES)}")
    view = _view(x, "x")
    if view.device != blocks.device:
        raise AaacError(f"x is on GPU {view.device.id} and the blocks are on GPU {blocks.device.id}; move one")
    if view.shape[0] and (view.strides[1] != view.itemsize or _row_stride(view) < 0):
        raise AaacError(
            f"x has strides {list(view.strides)}, expected columns of consecutive values; make it contiguous"
        )
    if view.data.ptr % 16 or _row_stride(view) % 16:
        where = f"starts at {view.data.ptr:#x} with columns {view.strides[0]} bytes apart"
        raise AaacError(f"x {where}, expected multiples of 16; copy it")
    return view, name


def _operands(qtype: fmt.AaacType, blocks: Any, codec: fmt.Codec, x: Any) -> tuple[np.ndarray, Any, Any, str, int]:
    """Check a product's arguments. Return struct aaac_params, CuPy views of blocks and x, the dtype of x, and K."""
    _, k = check_shape(qtype, blocks)
    params = codec_params(qtype, codec)
    view = _check_blocks(qtype, blocks)
    return params, view, *_check_activations(x, k, view), k


def _ceil_div(a: int, b: int) -> int:
    return (a + b - 1) // b


def _reference(qtype: fmt.AaacType, blocks: np.ndarray, codec: fmt.Codec, x: Any) -> np.ndarray:
    """Return the product in float64, rounded to float32."""
    _, k = check_shape(qtype, blocks)
    codec_params(qtype, codec)
    _check_width(x, k)
    return (np.asarray(x, np.float64) @ fmt.decode(qtype, blocks, codec).astype(np.float64).T).astype(np.float32)


def dequant(qtype: fmt.AaacType, blocks: Any, codec: fmt.Codec, dtype: str = "float32") -> Any:
    """Decode blocks [N, row bytes] to weights [N, K] float32, float16 or bfloat16, bit for bit as `format.decode`.

    CuPy has no bfloat16: it gets the bits as uint16.
    """
    if dtype not in C_TYPES:
        raise AaacError(f"dtype is {dtype}, expected one of {', '.join(C_TYPES)}")
    n_rows, k = check_shape(qtype, blocks)
    params = codec_params(qtype, codec)
    if isinstance(blocks, np.ndarray):
        if dtype == "bfloat16":
            raise AaacError("NumPy has no bfloat16; decode to float32")
        return fmt.decode(qtype, blocks, codec).astype(dtype)
    view = _check_blocks(qtype, blocks)
    cupy = _cupy()
    with view.device:
        out = cupy.empty((n_rows, k), "uint16" if dtype == "bfloat16" else dtype)
        n_units = n_rows * k // UNIT
        if n_units:
            run = kernel("dequant.cu", f"aaac_dequant<{STRUCTS[qtype.name]}, {C_TYPES[dtype]}>")
            args = (params, view, np.int64(_row_stride(view)), np.int32(k), np.uint32(n_units), out, np.int64(k))
            run((_ceil_div(n_units, THREADS),), (THREADS,), args)
    return _like(blocks, out, dtype == "bfloat16")


def quantize_activations(x: Any) -> Any:
    """Round activations [n, K] to 8 bits as `matvec` takes them: uint8 [n, bytes].

    A row has the integers, in the kernels' order, and then a float32 scale for every 32 of them.
    """
    cupy = _cupy()
    k = int(x.shape[-1])
    if x.ndim != 2 or k == 0 or k % fmt.RUN_SIZE:
        raise AaacError(f"x has shape {list(x.shape)}, expected [columns, a multiple of {fmt.RUN_SIZE}]")
    if x.shape[0] > 65535:
        raise AaacError(f"x has {x.shape[0]} columns, quantize_activations takes 65535; split it")
    view, name = _check_activations(x, k, _view(x, "x"))
    with view.device:
        out = cupy.empty((view.shape[0], _ceil_div(k + k // 8, 16) * 16), cupy.uint8)
        if view.shape[0]:
            run = kernel("matvec.cu", f"aaac_quantize_q8<{C_TYPES[name]}>")
            run(
                (_ceil_div(k, THREADS), view.shape[0]),
                (THREADS,),
                (view, np.int64(_row_stride(view) // view.itemsize), np.int32(k), out),
            )
    return out


def matvec(qtype: fmt.AaacType, blocks: Any, codec: fmt.Codec, x: Any, quantized: bool = True) -> Any:
    """Multiply weights [N, K] with 1 to 8 columns x [n, K]: float32 [n, N].

    `quantized` rounds x to 8 bits first, as llama.cpp does.
    """
    if isinstance(blocks, np.ndarray):
        return _reference(qtype, blocks, codec, x)
    params, view, columns, name, k = _operands(qtype, blocks, codec, x)
    n = columns.shape[0]
    if not 1 <= n <= MAX_MATVEC_COLUMNS:
        raise AaacError(f"x has {n} columns, matvec takes 1 to {MAX_MATVEC_COLUMNS}; use matmul")
    with view.device:
        out = _cupy().empty((n, view.shape[0]), "float32")
        if out.size:
            matvec_into(
                qtype,
                params,
                view,
                quantize_activations(x) if quantized else columns,
                "" if quantized else name,
                k,
                out,
            )
    return _like(blocks, out)


def matvec_into(qtype: fmt.AaacType, params: np.ndarray, view: Any, columns: Any, name: str, k: int, out: Any) -> None:
    """Launch `matvec` on CuPy arrays that have been checked.

    name: the float dtype of `columns`, or "" for columns that `quantize_activations` made.
    """
    n, n_rows = out.shape
    width = next(w for w in (1, 2, 4, 8) if n <= w)
    args: list[Any] = [params, view, np.int64(_row_stride(view)), np.int32(n_rows), np.int32(k), columns]
    if name:
        run = kernel("matvec.cu", f"aaac_matvec<{STRUCTS[qtype.name]}, {C_TYPES[name]}, {width}>")
        args.append(np.int64(_row_stride(columns) // columns.itemsize))
        rows = 2
    else:
        run = kernel("matvec.cu", f"aaac_matvec_q8<{STRUCTS[qtype.name]}, {width}>")
        rows = 4 if width <= 2 else 2
    run((_ceil_div(n_rows, rows),), (THREADS,), (*args, np.int32(n), out, np.int64(n_rows)))


def matmul(qtype: fmt.AaacType, blocks: Any, codec: fmt.Codec, x: Any) -> Any:
    """Multiply weights [N, K] with any number of columns x [n, K] on the tensor cores: float32 [n, N].

    Weights and float32 activations are rounded to float16. If x is bfloat16, so are the weights. Sums are float32.
    """
    if isinstance(blocks, np.ndarray):
        return _reference(qtype, blocks, codec, x)
    params, view, columns, name, k = _operands(qtype, blocks, codec, x)
    with view.device:
        capability = int(view.device.compute_capability)
        if capability < (80 if name == "bfloat16" else 75):
            gpu = f"this GPU (compute capability {capability / 10})"
            raise AaacError(f"{gpu} has no tensor cores for {name}; matmul needs 7.5, for bfloat16 8.0")
        out = _cupy().empty((columns.shape[0], view.shape[0]), "float32")
        if out.size:
            matmul_into(qtype, params, view, columns, name, k, out)
    return _like(blocks, out)


def matmul_into(qtype: fmt.AaacType, params: np.ndarray, view: Any, columns: Any, name: str, k: int, out: Any) -> None:
    """Launch `matmul` on CuPy arrays that have been checked."""
    n, n_rows = out.shape
    run = kernel("matmul.cu", f"aaac_matmul<{STRUCTS[qtype.name]}, {C_TYPES[name]}>")
    args = (
        params,
        view,
        np.int64(_row_stride(view)),
        np.int32(n_rows),
        np.int32(k),
        columns,
        np.int64(_row_stride(columns) // columns.itemsize),
    )
    grid = (_ceil_div(n_rows, MATMUL_TILE), _ceil_div(n, MATMUL_TILE))
    run(grid, (MATMUL_THREADS,), (*args, np.int32(n), out, np.int64(n_rows), np.zeros((), EXPERTS)))


def compare_file(file: GgufFile, names: Sequence[str] = ()) -> list[str]:
    """Decode AAAC tensors of `file` on the GPU and with NumPy. Return one line for each that differs in a bit.

    names: tensors to compare; all of the file's if empty.
    """
    cupy = _cupy()
    failures = []
    for name in names or file.tensors:
        tensor = file.tensors[name]
        if tensor.tensor_type not in fmt.TYPES_BY_ID:
            continue
        qtype, codec = fmt.TYPES_BY_ID[tensor.tensor_type], file.codecs[name]
        blocks = np.asarray(tensor.data).reshape(-1, qtype.row_bytes(int(tensor.shape[0])))
        got = cupy.asnumpy(dequant(qtype, cupy.asarray(blocks), codec))
        different = got.view(np.uint32) != fmt.decode(qtype, blocks, codec).view(np.uint32)
        if different.any():
            row, column = np.argwhere(different)[0]
            count = f"{different.sum()} of {got.size} weights"
            failures.append(
                f"tensor {name}: the GPU decodes {count} differently, the first is row {row}, column {column}"
            )
    return failures
