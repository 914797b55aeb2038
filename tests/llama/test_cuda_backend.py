"""The patch's CUDA backend without a GPU, on the requests of test_ops.py.

Its own files, launches too, are compiled with cuda_emulator.h. ggml's headers and tensors are real. In place of its
pool, of cuBLAS and of its sorting of experts is tests/emulation/cuda_mock. Only a GPU can show the rest: the real
instructions in place of the emulated ones, timing, and races.
"""

import re
import shutil
import subprocess

import numpy as np
import pytest
import test_ops as ops
from aaac_samples import codec, random_blocks
from test_ops import (  # noqa: F401, collected here as well
    ALL_TYPES,
    test_decode_every_index_selector_and_scale_code,
    test_decode_hand_written_blocks,
    test_decode_random_bytes,
    test_decode_to_16_bits,
    test_mul_mat_broadcasts_and_batches,
    test_mul_mat_id,
    test_views_keep_the_codebooks,
)

from aaac_gguf.files.format import decode
from aaac_gguf.resources import shipped

pytestmark = pytest.mark.llama
run_op = ops.run_op  # which runs the program below


def host_source() -> str:
    """Return the backend's .cu files as C++: kernel<<<...>>>(arguments) becomes a call of the emulator."""
    folder = shipped("patches") / "new/ggml/src/ggml-cuda"
    text = "".join((folder / name).read_text() for name in ("aaac-decode.cu", "aaac.cu"))
    kernel = r"(\w+(?:<(?:[^<>;]|<[^<>;]*>)*>)?)"
    text, n = re.subn(kernel + r"<<<(.*?)>>>\(", r"emulator::call({\2}, \1, ", text, flags=re.DOTALL)
    assert n == 5
    assert "<<<" not in text
    return text


@pytest.fixture(scope="module")
def program(request, patched, llama_source, tmp_path_factory):
    """Build test-aaac with the emulated backend."""
    if not shutil.which("g++"):
        pytest.skip("g++ is not installed")
    folder = tmp_path_factory.mktemp("backend")
    emulation, new = request.config.rootpath / "tests" / "emulation", shipped("patches") / "new"
    source = folder / "cuda_files.inc"
    source.write_text(host_source())
    ours = [emulation, emulation / "cuda_mock", new / "ggml/src/ggml-cuda", new / "tests", shipped("cuda_kernels")]
    include = [*ours, llama_source / "ggml/include", llama_source / "ggml/src"]
    libraries = [patched.parent / "ggml/src" / f"lib{name}.a" for name in ("ggml", "ggml-cpu", "ggml-base")]
    flags = ["-std=c++17", "-O1", "-w", f'-DAAAC_CUDA_FILES="{source}"', *(f"-I{path}" for path in include)]
    command = [
        "g++",
        *flags,
        emulation / "cuda_backend_host.cpp",
        "-o",
        folder / "test-aaac-cuda",
        *libraries,
        "-fopenmp",
        "-lpthread",
        "-ldl",
        "-lm",
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    return folder / "test-aaac-cuda"


@ALL_TYPES
@pytest.mark.parametrize("n_cols", [1, 2, 3, 4, 7, 8, 9, 19, 32])
def test_mul_mat_few_columns(run_op, qtype, n_cols):
    """Activations have 8 bits, as on the CPU. With enough results the mean square of the error is checked too."""
    blocks, x = random_blocks(qtype, 67, 1152, seed=n_cols, max_code=50), ops.activations(n_cols, 1152)
    got = np.frombuffer(run_op(ops.MUL_MAT, qtype, blocks, codec(4), x), np.float32).reshape(n_cols, 67)
    ops.check_product(got, decode(qtype, blocks, codec(4)), x, mean_square=n_cols > 4)


@ALL_TYPES
@pytest.mark.parametrize("n_cols", [33, 70])
def test_mul_mat_many_columns(run_op, qtype, n_cols):
    """Weights and activations are rounded to float16.

    Each is off by half a unit of 2^-10, so the error is far inside the bound for 8 bits.
    """
    blocks, x = random_blocks(qtype, 21, 256, seed=n_cols, max_code=50), ops.activations(n_cols, 256)
    got = np.frombuffer(run_op(ops.MUL_MAT, qtype, blocks, codec(4), x), np.float32).reshape(n_cols, 21)
    w, x = decode(qtype, blocks, codec(4)).astype(np.float64), x.astype(np.float64)
    bound = 2.01 * 2.0**-11 * (np.abs(x) @ np.abs(w).T) + 2.0**-25 * (
        np.abs(x).sum(1)[:, None] + np.abs(w).sum(1)[None, :]
    )
    assert (np.abs(got - x @ w.T) <= bound).all()


def fused(y: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Return what cuda_backend_host.cpp asks for, of the product y that one launch without fusion gives."""
    gate = 2 * y.astype(np.float64) - 0.5
    return (y + bias) * gate / (1 + np.exp(-gate))


@ALL_TYPES
def test_fused_gate_and_biases(run_op, qtype, monkeypatch):
    blocks, x = random_blocks(qtype, 37, 384, seed=1, max_code=20), 0.1 * ops.activations(1, 384)
    y = np.frombuffer(run_op(ops.MUL_MAT, qtype, blocks, codec(4), x), np.float32)
    monkeypatch.setenv("AAAC_FUSE", "1")
    got = np.frombuffer(run_op(ops.MUL_MAT, qtype, blocks, codec(4), x), np.float32)
    np.testing.assert_allclose(got, fused(y, np.arange(37) * 0.01), rtol=1e-4, atol=1e-6)


@ALL_TYPES
def test_fused_experts(run_op, qtype, monkeypatch):
    n_experts, n_used, n_tokens, n_rows, k = 4, 2, 3, 37, 384
    blocks = random_blocks(qtype, n_experts * n_rows, k, seed=2, max_code=20).reshape(n_experts, n_rows, -1)
    ids = np.array([[3, 0], [1, 3], [2, 1]], np.int32)
    x = 0.1 * ops.activations(n_tokens, n_used, k)
    y = np.frombuffer(run_op(ops.MUL_MAT_ID, qtype, blocks, codec(4), x, ids), np.float32).reshape(
        n_tokens, n_used, n_rows
    )
    monkeypatch.setenv("AAAC_FUSE", "1")
    got = np.frombuffer(run_op(ops.MUL_MAT_ID, qtype, blocks, codec(4), x, ids), np.float32).reshape(y.shape)
    np.testing.assert_allclose(got, fused(y, ids[..., None] * 10.0 + np.arange(n_rows) * 0.01), rtol=1e-4, atol=1e-6)
