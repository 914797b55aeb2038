"""The operations of patched llama.cpp's CPU backend on AAAC weights, through the patch's test-aaac program.

Decoding (GET_ROWS, CPY) is compared with the numpy oracle bit for bit. Products are compared with float64 products of
the decoded weights and the float activations, within the bound that 8-bit activations allow:

    Activations are rounded to x' = q * d with d = max |x| / 127 over each block b of 32, so |x - x'| <= d / 2 (1 + e).
    A product therefore misses the true one by at most   sum_b  max_b |x| / 254 * sum_{i in b} |w_i|.
    Rounding in float32 adds at most   (K / 16 + 4) * 2^-24 * sum |w x|   (see test_cpu_kernels.py).
    No result may be outside that bound.

    The rounding errors are spread evenly over [-d/2, d/2] and independent. So the error has the variance
    sum_b d_b^2 / 12 * sum_{i in b} w_i^2. Over many results the mean square must be that. A coarser scale or a lost bit
    would not pass.
"""

import struct
import subprocess

import numpy as np
import pytest
from aaac_samples import codec, every_combination, hand_written, random_blocks

from aaac_gguf.errors import AaacError
from aaac_gguf.files.format import G128, TYPES, decode
from aaac_gguf.llama import tools

pytestmark = pytest.mark.llama

ALL_TYPES = pytest.mark.parametrize("qtype", TYPES.values(), ids=TYPES)
GET_ROWS, CPY_F32, CPY_F16, CPY_BF16, MUL_MAT, MUL_MAT_ID = range(6)


@pytest.fixture(scope="module")
def program():
    try:
        return tools.tool("test-aaac")
    except AaacError as e:
        pytest.skip(str(e))


@pytest.fixture(scope="module")
def run_op(program):
    """Return run_op(op, qtype, blocks, codec, src1=None, ids=None) -> bytes.

    Arrays have ggml's dimensions, the last one first.
    """

    def run(op, qtype, blocks, codec, src1=None, ids=None, first_row=0, n_threads=2):
        def shape(array):
            return (*array.shape[::-1], 1, 1, 1, 1)[:4] if array is not None else (1, 1, 1, 1)

        ne0 = (blocks.shape[-1] // qtype.type_size * qtype.block_size, *shape(blocks)[1:])
        request = struct.pack("<4i", op, qtype.type_id, n_threads, first_row) + struct.pack(
            "<12q", *ne0, *shape(src1), *shape(ids)
        )
        request += struct.pack("<32sfB", codec.codebooks.tobytes(), codec.scale_base, codec.scale_mantissa_bits)
        request += b"".join(np.ascontiguousarray(a).tobytes() for a in (blocks, src1, ids) if a is not None)
        result = subprocess.run([program], input=request, capture_output=True)
        assert result.returncode == 0, result.stderr.decode()
        return result.stdout

    return run


def bits_equal(result: bytes, expected: np.ndarray) -> bool:
    return result == np.ascontiguousarray(expected).tobytes()


def bfloat16(x: np.ndarray) -> np.ndarray:
    """Round to nearest even, as uint16."""
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


@ALL_TYPES
@pytest.mark.parametrize("m", [2, 3, 4, 5])
def test_decode_every_index_selector_and_scale_code(run_op, qtype, m):
    blocks = every_combination(qtype)
    expected = decode(qtype, blocks, codec(m))
    rows = np.arange(len(blocks), dtype=np.int32)
    assert bits_equal(run_op(GET_ROWS, qtype, blocks, codec(m), rows), expected)
    assert bits_equal(run_op(CPY_F32, qtype, blocks, codec(m)), expected)


@ALL_TYPES
def test_decode_random_bytes(run_op, qtype):
    data = np.random.default_rng(1).integers(0, 256, (64, 8 * qtype.type_size), dtype=np.uint8)
    if qtype is G128:
        data[:, :: qtype.type_size] &= 0x7F  # the one bit that the layouts leave undefined
    assert bits_equal(run_op(CPY_F32, qtype, data, codec(5)), decode(qtype, data, codec(5)))


@ALL_TYPES
def test_decode_hand_written_blocks(run_op, qtype):
    blocks, weights = hand_written(qtype)
    assert bits_equal(run_op(CPY_F32, qtype, blocks, codec(3, 1.0)), weights.astype(np.float32))


@ALL_TYPES
def test_decode_to_16_bits(run_op, qtype):
    blocks = random_blocks(qtype, 9, 512, seed=2, max_code=40)
    expected = decode(qtype, blocks, codec(3))
    assert bits_equal(run_op(CPY_F16, qtype, blocks, codec(3)), expected.astype(np.float16))
    assert bits_equal(run_op(CPY_BF16, qtype, blocks, codec(3)), bfloat16(expected))


@ALL_TYPES
def test_views_keep_the_codebooks(run_op, qtype):
    blocks = random_blocks(qtype, 9, 256, seed=3)
    expected = decode(qtype, blocks, codec(2))
    assert bits_equal(run_op(CPY_F32, qtype, blocks, codec(2), first_row=4), expected[4:])
    assert bits_equal(
        run_op(GET_ROWS, qtype, blocks, codec(2), np.array([3, 0, 4], np.int32), first_row=4), expected[[7, 4, 8]]
    )


def activations(*shape: int) -> np.ndarray:
    """Return activations with blocks of very different size, some all zero."""
    rng = np.random.default_rng(4)
    size = rng.choice([0, 1e-3, 0.1, 1, 30], (*shape[:-1], shape[-1] // 32))
    return (rng.standard_normal(shape) * np.repeat(size, 32, axis=-1)).astype(np.float32)


def check_product(got: np.ndarray, weights: np.ndarray, x: np.ndarray, mean_square: bool = True) -> None:
    """Check `got`, float32 [n, N], the product of weights [N, K] and x [n, K]."""
    w, x = weights.astype(np.float64), x.astype(np.float64)
    k = x.shape[-1]
    step = np.repeat(np.abs(x).reshape(len(x), -1, 32).max(-1) / 127, 32, axis=-1)
    bound = step / 2 * (1 + 1e-4) @ np.abs(w).T + (k / 16 + 4) * 2.0**-24 * np.abs(x) @ np.abs(w).T
    error = got - x @ w.T
    assert (np.abs(error) <= bound).all()
    if mean_square:
        assert np.sqrt((error**2).sum() / (step**2 / 12 @ (w**2).T).sum()) == pytest.approx(1, abs=0.1)


@ALL_TYPES
@pytest.mark.parametrize("n_cols", [1, 2, 3, 4, 7, 16, 33])
@pytest.mark.parametrize("n_threads", [1, 2, 5])
def test_mul_mat(run_op, qtype, n_cols, n_threads):
    n_rows, k = 301, 1152
    blocks = random_blocks(qtype, n_rows, k, seed=n_cols, max_code=50)
    x = activations(n_cols, k)
    got = np.frombuffer(run_op(MUL_MAT, qtype, blocks, codec(4), x, n_threads=n_threads), np.float32).reshape(
        n_cols, n_rows
    )
    check_product(got, decode(qtype, blocks, codec(4)), x)


@ALL_TYPES
@pytest.mark.parametrize("n_cols", [1, 6])
def test_mul_mat_broadcasts_and_batches(run_op, qtype, n_cols):
    blocks = random_blocks(qtype, 2 * 3 * 20, 256, seed=5, max_code=50)
    x = activations(4, 6, n_cols, 256)
    got = np.frombuffer(run_op(MUL_MAT, qtype, blocks.reshape(2, 3, 20, -1), codec(4), x), np.float32).reshape(
        4, 6, n_cols, 20
    )
    weights = decode(qtype, blocks, codec(4)).reshape(2, 3, 20, 256)
    for i3 in range(4):
        for i2 in range(6):
            check_product(got[i3, i2], weights[i3 // 2, i2 // 2], x[i3, i2], mean_square=False)


@ALL_TYPES
@pytest.mark.parametrize("n_tokens", [1, 3, 40])
@pytest.mark.parametrize("shared", [False, True], ids=["one input per slot", "one input per token"])
def test_mul_mat_id(run_op, qtype, n_tokens, shared):
    n_experts, n_used, n_rows, k = 6, 2, 37, 384
    blocks = random_blocks(qtype, n_experts * n_rows, k, seed=6, max_code=50)
    rng = np.random.default_rng(7)
    ids = np.stack([rng.choice(n_experts - 1, n_used, replace=False) for _ in range(n_tokens)]).astype(
        np.int32
    )  # the last one stays idle
    x = activations(n_tokens, 1 if shared else n_used, k)
    result = run_op(MUL_MAT_ID, qtype, blocks.reshape(n_experts, n_rows, -1), codec(4), x, ids)
    got = np.frombuffer(result, np.float32).reshape(n_tokens, n_used, n_rows)
    weights = decode(qtype, blocks, codec(4)).reshape(n_experts, n_rows, k)
    for token in range(n_tokens):
        for slot in range(n_used):
            check_product(
                got[token, slot][None],
                weights[ids[token, slot]],
                x[token, 0 if shared else slot][None],
                mean_square=False,
            )


def test_backend_ops():
    """llama.cpp's own operation tests pass on the patch's cases: fast kernels against the backend's reference mode."""
    try:
        program = tools.tool("test-backend-ops")
    except AaacError as e:
        pytest.skip(str(e))
    result = subprocess.run([program, "test", "-b", "CPU", "-p", "aaac"], capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-2000:]
    for op in ("MUL_MAT(", "MUL_MAT_ID(", "GET_ROWS(", "CPY("):
        for qtype in TYPES.values():
            assert any(
                op in line and qtype.name.lower() in line and "OK" in line for line in result.stdout.splitlines()
            )
    assert "not supported" not in "".join(line for line in result.stdout.splitlines() if "aaac" in line)
