"""Run the CUDA kernels on the host, one fiber per thread, and compare them with the NumPy oracle.

Decoding must match to the bit. Products are compared with float64 on the activations that the kernel multiplied with,
which may be quantized:

* matvec: the integer dot of 16 weights is exact. A term f * scale * dot is rounded 3 times, the sum of K / 16 terms at
  most K / 16 times, and the factor d comes at the end: |error| <= (K / 16 + 5) * 2^-24 * sum |w x|.
* matvec with float activations: K products and sums instead: (K + 5) * 2^-24 * sum |w x|.
* matmul: weights and float32 activations are rounded to 16 bits, a relative 2^-11 each (2^-8 for bfloat16). Sums are
  in float32. Below the smallest normal float16 the rounding of a weight or activation is absolute, 2^-25.
"""

import ctypes

import numpy as np
import pytest
from aaac_samples import BOOKS, codec, every_combination, hand_written, random_blocks

from aaac_gguf.files.format import TYPES, Codec, decode, pack

ALL_TYPES = pytest.mark.parametrize("qtype", TYPES.values(), ids=TYPES)
F32, F16, BF16, Q8 = 0, 1, 2, -1
ROUNDING = {F16: 2.0**-11, BF16: 2.0**-8, F32: 2.0**-24, Q8: 2.0**-24}


class Params(ctypes.Structure):
    _fields_ = [("codebooks", ctypes.c_int8 * 32), ("d", ctypes.c_float), ("m", ctypes.c_uint8)]

    def __init__(self, codec: Codec):
        super().__init__(
            (ctypes.c_int8 * 32)(*codec.codebooks.reshape(-1).tolist()), codec.scale_base, codec.scale_mantissa_bits
        )


def aligned(data: np.ndarray, offset: int = 0) -> np.ndarray:
    """A copy that starts `offset` bytes after a multiple of 64, with poison around it."""
    flat = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
    buffer = np.full(flat.size + 192, 0xA5, np.uint8)
    start = -buffer.ctypes.data % 64 + 64 + offset
    buffer[start : start + flat.size] = flat
    return buffer[start : start + flat.size].view(data.dtype).reshape(data.shape)


def to_format(x: np.ndarray, fmt: int) -> np.ndarray:
    if fmt == BF16:
        bits = x.astype(np.float32).view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return x.astype(np.float16 if fmt == F16 else np.float32)


def from_format(x: np.ndarray, fmt: int) -> np.ndarray:
    return (x.astype(np.uint32) << 16).view(np.float32) if fmt == BF16 else x.astype(np.float32)


def dequant(lib, qtype, blocks, codec, fmt):
    n_rows, row_bytes = blocks.shape
    k = row_bytes // qtype.type_size * qtype.block_size
    blocks = aligned(blocks)
    out = aligned(to_format(np.full((n_rows, k), np.nan, np.float32), fmt))
    lib.dequant(
        qtype.type_id, fmt, ctypes.byref(Params(codec)), blocks.ctypes, ctypes.c_int64(row_bytes), n_rows, k, out.ctypes
    )
    return out


def quantize(lib, x, fmt=F32):
    """Activations [n, K] as the kernel stores them, and what they stand for in float64."""
    n, k = x.shape
    q8 = aligned(np.full((n, lib.q8_stride(k)), 0x77, np.uint8))
    lib.quantize_q8(fmt, aligned(to_format(x, fmt)).ctypes, k, n, q8.ctypes)
    place = np.array([lib.q8_place(i) for i in range(k)])
    scales = q8[:, k : k + k // 8].copy().view(np.float32)
    return q8, q8.view(np.int8)[:, place].astype(np.float64) * np.repeat(scales, 32, axis=1).astype(np.float64)


def matvec(lib, qtype, blocks, codec, x, fmt):
    """y [n, N] and the activations it is made of, float64."""
    (n_rows, row_bytes), (n, k) = blocks.shape, x.shape
    if fmt == Q8:
        data, seen = quantize(lib, x)
    else:
        data = aligned(to_format(x, fmt))
        seen = from_format(data, fmt).astype(np.float64)
    y = np.full((n, n_rows), np.nan, np.float32)
    blocks = aligned(blocks)
    lib.matvec(
        qtype.type_id,
        fmt,
        ctypes.byref(Params(codec)),
        blocks.ctypes,
        ctypes.c_int64(row_bytes),
        n_rows,
        k,
        data.ctypes,
        n,
        y.ctypes,
    )
    return y, seen


@pytest.mark.parametrize(
    "books",
    [BOOKS, np.stack([np.arange(-127, -111), np.arange(112, 128)]), np.stack([np.arange(-8, 8), np.arange(-1, 15)])],
)
def test_lookups(lib, books):
    out = np.zeros((3, 2, 16), np.int8)
    lib.lookups(ctypes.byref(Params(Codec(books.astype(np.int8), 1.0, 3))), out.ctypes)
    np.testing.assert_array_equal(out, np.broadcast_to(books, out.shape))


def test_split_levels_exist_for_every_pair(lib):
    assert all(lib.split_level(first, second) for first in range(-127, 128) for second in range(first + 1, 128))


@ALL_TYPES
@pytest.mark.parametrize("fmt", [F32, F16, BF16], ids=["f32", "f16", "bf16"])
@pytest.mark.parametrize("m", [2, 3, 4, 5])
def test_dequant_is_exact(lib, qtype, m, fmt):
    for blocks, params in (
        (every_combination(qtype), codec(m, 1e-4)),
        (random_blocks(qtype, 7, 896, seed=m), codec(m)),
        (hand_written(qtype)[0], codec(m, 1.0)),
    ):
        with np.errstate(over="ignore"):  # the largest scales are beyond float16 in both
            expected = to_format(decode(qtype, blocks, params), fmt)
        np.testing.assert_array_equal(dequant(lib, qtype, blocks, params, fmt).view(np.uint8), expected.view(np.uint8))


def test_quantized_activations(lib):
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((3, 320)) * np.repeat(10.0 ** rng.uniform(-4, 4, (3, 10)), 32, axis=1)).astype(np.float32)
    x[0, :32], x[1, :32] = 0, 1e-41
    assert sorted(lib.q8_place(i) for i in range(320)) == list(range(320))
    _, seen = quantize(lib, x)
    step = np.repeat(np.abs(x.astype(np.float64)).reshape(3, -1, 32).max(-1) / 127, 32, axis=1)
    assert (np.abs(seen - x) <= np.maximum(step * (0.5 + 1e-4), 2e-38)).all()


@ALL_TYPES
@pytest.mark.parametrize("n_cols", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("fmt", [Q8, F16, BF16, F32], ids=["q8", "f16", "bf16", "f32"])
def test_matvec(lib, qtype, n_cols, fmt):
    rng = np.random.default_rng(n_cols)
    for n_rows, k in ((1, qtype.block_size), (5, 384), (3, 8448)):
        blocks, params = random_blocks(qtype, n_rows, k, seed=k, max_code=60), codec(4)
        y, x = matvec(lib, qtype, blocks, params, rng.standard_normal((n_cols, k)).astype(np.float32), fmt)
        w = decode(qtype, blocks, params).astype(np.float64)
        bound = ((k / 16 if fmt == Q8 else k) + 5) * 2.0**-24 * (np.abs(x) @ np.abs(w).T)
        assert (np.abs(y - x @ w.T) <= bound).all()


@ALL_TYPES
@pytest.mark.parametrize("n_cols", [1, 4])
def test_matvec_reads_every_weight(lib, qtype, n_cols):
    """One-hot activations give single weights back, under every scale code that keeps the product finite."""
    k, params = 256, codec(5)
    blocks = every_combination(qtype)[:6]
    w = decode(qtype, blocks, params)
    for first in range(0, k, 16 * n_cols):
        x = np.zeros((n_cols, k), np.float32)
        hot = (first + 17 * np.arange(n_cols)) % k
        x[np.arange(n_cols), hot] = 127
        y, _ = matvec(lib, qtype, blocks, params, x, Q8)
        np.testing.assert_allclose(y, 127 * w[:, hot].T, rtol=3e-7)


@ALL_TYPES
@pytest.mark.parametrize("fmt", [F32, F16, BF16], ids=["f32", "f16", "bf16"])
def test_matmul(lib, qtype, fmt):
    rng = np.random.default_rng(fmt)
    for n_rows, k, n_cols in ((1, qtype.block_size, 1), (130, 256, 9), (67, 384, 131)):
        blocks, params = random_blocks(qtype, n_rows, k, seed=k, max_code=60), codec(4)
        x = to_format(rng.standard_normal((n_cols, k)).astype(np.float32), fmt)
        y = run_matmul(lib, qtype, blocks, params, x, fmt, n_cols, n_rows)
        check_product(y, decode(qtype, blocks, params), from_format(x, fmt), fmt)


def run_matmul(lib, qtype, blocks, params, x, fmt, n_cols, n_rows, experts=(1, None, None, None), n_out=None):
    y = np.full((n_out or n_cols, n_rows), np.nan, np.float32)
    count, *arrays = experts
    pointers = [a if a is None else a.ctypes for a in arrays]
    data, blocks = aligned(x), aligned(blocks)
    args = (ctypes.c_int64(blocks.shape[-1]), n_rows, x.shape[1], data.ctypes, n_cols, y.ctypes, count, *pointers)
    lib.matmul(qtype.type_id, fmt, ctypes.byref(Params(params)), blocks.ctypes, *args)
    return y


def check_product(y, w, x, fmt):
    w, x = w.astype(np.float64), x.astype(np.float64)
    k = x.shape[1]
    unit = ROUNDING[BF16 if fmt == BF16 else F16]
    relative = (2 if fmt == F32 else 1) * unit * 1.01 + (k + 5) * 2.0**-24
    tiny = 0 if fmt == BF16 else 2.0**-25
    bound = relative * (np.abs(x) @ np.abs(w).T) + tiny * (np.abs(x).sum(1)[:, None] + np.abs(w).sum(1)[None, :])
    assert (np.abs(y - x @ w.T) <= bound).all()


@ALL_TYPES
def test_matmul_of_experts(lib, qtype):
    """Columns sorted by expert, one expert without any and one with more than a tile."""
    n_experts, n_rows, k, n_tokens = 3, 33, 256, 150
    rng = np.random.default_rng(1)
    expert = np.where(rng.random(n_tokens) < 0.9, 0, 2)
    order = np.argsort(expert, kind="stable").astype(np.int32)
    bounds = np.searchsorted(expert[order], np.arange(n_experts + 1)).astype(np.int32)
    blocks, params = random_blocks(qtype, n_experts * n_rows, k, seed=4, max_code=60), codec(3)
    x = rng.standard_normal((n_tokens, k)).astype(np.float32)
    targets = order[::-1].copy()
    experts = (n_experts, bounds, order, targets)
    y = run_matmul(lib, qtype, blocks, params, x, F32, n_tokens, n_rows, experts)
    w = decode(qtype, blocks, params).reshape(n_experts, n_rows, k)
    for place, token in enumerate(order):
        check_product(y[targets[place]][None], w[expert[token]], x[token][None], F32)


@ALL_TYPES
def test_rows_may_start_at_any_even_address(lib, qtype):
    """Rows of an odd number of 34-byte blocks alternate their alignment; a view of the rows keeps working."""
    blocks, params = random_blocks(qtype, 4, 3 * qtype.block_size, seed=2), codec(3)
    expected = decode(qtype, blocks, params)
    np.testing.assert_array_equal(dequant(lib, qtype, blocks, params, F32), expected)
    indices = np.zeros((1, qtype.block_size), np.uint8)
    zero = pack(
        qtype,
        indices,
        np.zeros((1, qtype.block_size // 16), np.uint8),
        np.zeros((1, qtype.block_size // qtype.group_size), np.uint8),
    )
    assert (dequant(lib, qtype, zero, params, F32) == 0).all()
