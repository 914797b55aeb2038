"""Run the CUDA kernels on a GPU: decoding equals the oracle's to the bit, products are in test_cuda_host.py's bounds.

Needs CuPy and an NVIDIA GPU. torch's part needs torch with CUDA. llama.cpp's part needs AAAC_CUDA_BIN, the folder that
`aaac-gguf llama build --backend cuda` prints. A test that skips says what is missing.
"""

import functools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from aaac_samples import codec, every_combination, hand_written, random_blocks
from gguf import GGMLQuantizationType as T
from search_samples import check_alike, moment, samples, search_for

from aaac_gguf import resources
from aaac_gguf.conversion.convert import convert
from aaac_gguf.conversion.settings import Settings
from aaac_gguf.errors import AaacError
from aaac_gguf.files.format import G16, G32, TYPES, decode
from aaac_gguf.files.gguf import read
from aaac_gguf.inference import kernels
from aaac_gguf.quantizer.backends import BACKENDS, choose_backend
from aaac_gguf.quantizer.cuda import CudaSearch
from aaac_gguf.quantizer.feedback import feedback
from aaac_gguf.quantizer.kquants import KQUANTS
from aaac_gguf.quantizer.moments import factor
from aaac_gguf.quantizer.steps import StepSearch
from aaac_gguf.reporting import demo

pytestmark = pytest.mark.gpu
ALL_TYPES = pytest.mark.parametrize("qtype", TYPES.values(), ids=TYPES)
SIZES = [(n_rows, k) for k in (64, 128, 192, 2880, 14336) for n_rows in (1, 3, 4096)]
ALL_SIZES = pytest.mark.parametrize(("n_rows", "k"), SIZES, ids=lambda n: str(n))


@pytest.fixture(scope="module")
def cp():
    try:
        return kernels._cupy()
    except AaacError as e:
        pytest.skip(str(e))


def poison(cp, *shape):
    """Leave NaN in the memory that the next array of this shape will get: an output that a kernel misses shows."""
    cp.full(shape, cp.nan, cp.float32)


@functools.lru_cache(maxsize=1)  # the decorator on top of a test varies fastest, and it is not the size
def sample(cp, qtype, n_rows, k):
    """Random blocks on the GPU, their codec, and their weights in float64."""
    if k % qtype.block_size:
        pytest.skip(f"rows of {k} weights are not whole blocks of {qtype.name}")
    blocks, params = random_blocks(qtype, n_rows, k, seed=n_rows + k, max_code=60), codec(4)
    return cp.asarray(blocks), params, cp.asarray(decode(qtype, blocks, params)).astype(cp.float64)


def check_bound(cp, y, w, x, relative, absolute=0.0):
    x = x.astype(cp.float64)
    exact, size = x @ w.T, cp.abs(x) @ cp.abs(w).T
    bound = relative * size + absolute * (cp.abs(x).sum(1)[:, None] + cp.abs(w).sum(1)[None, :])
    assert bool((cp.abs(y - exact) <= bound).all()), float((cp.abs(y - exact) - bound).max())  # false for NaN too


@ALL_TYPES
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("m", [2, 3, 4, 5])
def test_dequant_is_exact(cp, qtype, m, dtype):
    """Every index with both selectors under every scale code, zero scales among them, and both codebooks asymmetric."""
    for blocks, params in ((every_combination(qtype), codec(m, 1e-4)), (hand_written(qtype)[0], codec(m, 1.0))):
        with np.errstate(over="ignore"):
            expected = decode(qtype, blocks, params).astype(dtype)
        got = cp.asnumpy(kernels.dequant(qtype, cp.asarray(blocks), params, dtype))
        np.testing.assert_array_equal(got.view(np.uint8), expected.view(np.uint8))


@ALL_TYPES
@ALL_SIZES
def test_dequant_sizes(cp, qtype, n_rows, k):
    blocks, params, w = sample(cp, qtype, n_rows, k)
    poison(cp, n_rows, k)
    assert bool((kernels.dequant(qtype, blocks, params) == w.astype(cp.float32)).all())


@pytest.mark.parametrize("n", [1, 2, 3, 8])
@ALL_SIZES
@ALL_TYPES
def test_matvec(cp, qtype, n_rows, k, n):
    blocks, params, w = sample(cp, qtype, n_rows, k)
    x = cp.random.default_rng(n).standard_normal((n, k), dtype=cp.float32)
    poison(cp, n, n_rows)
    y = kernels.matvec(qtype, blocks, params, x)
    # The activations that the kernel multiplies with. It keeps integers by unit: 16 that meet low nibbles, 16 that meet
    # high ones, each in the order of the table.
    q8 = kernels.quantize_activations(x)
    order = np.array([0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15])
    runs = np.concatenate([16 * unit + 32 * half + order for unit in (0, 1) for half in (0, 1)])
    natural = cp.empty((n, k), cp.float64)
    natural[:, cp.asarray((np.arange(0, k, 64)[:, None] + runs).reshape(-1))] = q8[:, :k].view(cp.int8)
    scales = cp.ascontiguousarray(q8[:, k : k + k // 8]).view(cp.float32)
    seen = natural * cp.repeat(scales, 32, axis=1)
    assert float(cp.abs(seen - x).max()) <= float(cp.abs(x).max()) / 127 * 0.5001
    check_bound(cp, y, w, seen, (k / 16 + 5) * 2.0**-24)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@ALL_SIZES
@ALL_TYPES
def test_matvec_with_float_activations(cp, qtype, n_rows, k, dtype):
    blocks, params, w = sample(cp, qtype, n_rows, k)
    x = cp.random.default_rng(0).standard_normal((5, k), dtype=cp.float32).astype(dtype)
    poison(cp, 5, n_rows)
    check_bound(cp, kernels.matvec(qtype, blocks, params, x, quantized=False), w, x, (k + 5) * 2.0**-24)


@pytest.mark.parametrize("n", [1, 9, 17, 128, 200, 512])
@ALL_SIZES
@ALL_TYPES
def test_matmul(cp, qtype, n_rows, k, n):
    blocks, params, w = sample(cp, qtype, n_rows, k)
    for dtype, rounded in ((cp.float16, 1), (cp.float32, 2)):
        x = cp.random.default_rng(n).standard_normal((n, k), dtype=cp.float32).astype(dtype)
        poison(cp, n, n_rows)
        y = kernels.matmul(qtype, blocks, params, x)
        # tensor cores may truncate where float32 addition rounds, hence 2 units per addition
        check_bound(cp, y, w, x, rounded * 2.0**-11 * 1.01 + (k + 5) * 2.0**-23, 2.0**-25)
        assert bool((kernels.matmul(qtype, blocks, params, x) == y).all()), "two runs differ: a race"


@ALL_TYPES
def test_torch_tensors_stay_where_they_are(cp, qtype):
    if not torch.cuda.is_available():
        pytest.skip("torch is built without CUDA")
    blocks, params, w = sample(cp, qtype, 33, 256)
    blocks = torch.from_dlpack(blocks)
    x = torch.randn(3, 256, device="cuda", dtype=torch.bfloat16)
    weights = kernels.dequant(qtype, blocks, params, "bfloat16")
    assert weights.dtype == torch.bfloat16
    assert torch.equal(weights, torch.from_dlpack(w).float().to(torch.bfloat16))
    exact = x.double() @ torch.from_dlpack(w).T
    for y, relative in (
        (kernels.matvec(qtype, blocks, params, x, quantized=False), 1e-5),
        (kernels.matmul(qtype, blocks, params, x), 2.0**-8),
    ):
        assert isinstance(y, torch.Tensor)
        assert y.is_cuda
        bound = relative * (x.double().abs() @ torch.from_dlpack(w).T.abs())
        assert ((y.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("between_rows", [False, True], ids=["columns", "columns and rows"])
@pytest.mark.parametrize(("n_rows", "k"), [(1, 128), (45, 384), (896, 1024)])
@pytest.mark.parametrize("type", [*(T[name] for name in TYPES), *KQUANTS], ids=lambda t: t.name)
def test_error_feedback_is_that_of_torch(cp, type, n_rows, k, between_rows):
    if not torch.cuda.is_available():
        pytest.skip("torch is built without CUDA")
    if type in KQUANTS:
        k = -(-k // 256) * 256
    w, inputs = samples(n_rows, k).cuda(), factor(moment(k, 4 * k).cuda())
    o = torch.eye(n_rows, device="cuda") + 0.3 if between_rows else None
    assert choose_backend(w.device) is CudaSearch, "the kernels cannot be built"

    def run(backend):
        if type in KQUANTS:
            layout = KQUANTS[type]
            steps = StepSearch(layout, layout.steps(w, torch.ones_like(w)).halves, BACKENDS[backend])
            encoded = feedback(w, inputs, steps, o)
            return layout.weights(encoded.indices, steps.steps(encoded))
        search = search_for(type, w, backend)
        return search.decode(feedback(w, inputs, search, o))

    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        found = run("cuda")
        assert torch.equal(run("cuda"), found), "two runs differ: a race"
    torch.cuda.synchronize()
    check_alike(w, found, run("torch"), inputs, o)


def test_errors_say_what_is_wrong(cp):
    blocks, params, _ = sample(cp, G32, 4, 192)
    x = cp.zeros((1, 192), cp.float32)
    for call, message in (
        (lambda: kernels.matvec(G32, blocks[:, ::2], params, x), "not whole"),
        (lambda: kernels.dequant(G32, cp.asfortranarray(blocks), params), "strides"),
        (lambda: kernels.dequant(G32, cp.zeros(2 * 34 + 2, cp.uint8)[2:].reshape(1, 68), params), "multiples of 4"),
        (lambda: kernels.matvec(G32, blocks, params, cp.zeros(193, cp.float32)[1:].reshape(1, 192)), "multiples of 16"),
        (lambda: kernels.matvec(G32, blocks, params, cp.zeros((9, 192), cp.float32)), "use matmul"),
        (lambda: kernels.matmul(G32, blocks, params, x.astype(cp.float64)), "float64"),
        (lambda: kernels.matvec(G32, blocks, params, np.zeros((1, 192), np.float32)), "x: expected a CuPy array"),
    ):
        with pytest.raises(AaacError, match=re.escape(message)):
            call()


def test_every_tensor_of_a_file(cp, demo_gguf, tmp_path):
    out = tmp_path / "demo.gguf"
    convert(demo_gguf, out, Settings(calibration="none"))
    assert kernels.compare_file(read(out)) == []


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer(cp, tool):
    """The tool runs this file's smaller products in a process of its own."""
    if not shutil.which("compute-sanitizer"):
        pytest.skip("compute-sanitizer is not installed (CUDA toolkit)")
    if os.environ.get("AAAC_SANITIZING"):
        pytest.skip("already under compute-sanitizer")
    chosen = "test_matvec and 3-192 or test_matmul and 3-192 or test_dequant_sizes and 3-192"
    command = [
        "compute-sanitizer",
        "--tool",
        tool,
        "--error-exitcode",
        "9",
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-k",
        chosen,
        __file__,
    ]
    result = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"AAAC_SANITIZING": "1", "CUPY_CACHE_IN_MEMORY": "1"}
    )
    if "Device not supported" in result.stdout + result.stderr:
        pytest.skip("compute-sanitizer does not support this GPU or driver")
    assert result.returncode == 0, result.stdout[-4000:]


#
# llama.cpp
#


CUDA, CPU = ("-ngl", 99), ("--device", "none")  # without layers on the GPU, prompts would still be computed there


@pytest.fixture(scope="module")
def cuda_bin():
    folder = os.environ.get("AAAC_CUDA_BIN")
    if not folder:
        pytest.skip("AAAC_CUDA_BIN is not set to the folder that `aaac-gguf llama build --backend cuda` prints")
    return Path(folder)


def run_tool(folder, name, *args):
    result = subprocess.run(
        [folder / name, *map(str, args)], capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    return result.stdout, result.stderr


@pytest.mark.llama
@pytest.mark.parametrize("op", ["MUL_MAT", "MUL_MAT_ID", "GET_ROWS", "CPY"])
def test_backend_ops(cuda_bin, op):
    """llama.cpp's own comparison of CUDA with the CPU passes. It skips what CUDA refuses, so what ran is counted."""
    stdout, _ = run_tool(cuda_bin, "test-backend-ops", "test", "-b", "CUDA0", "-o", op, "-p", "aaac")
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in stdout.splitlines() if "aaac" in line]
    assert len([line for line in lines if line.rstrip().endswith("OK")]) >= 12, stdout[-2000:]
    assert not [line for line in lines if "FAIL" in line or "not supported" in line]


@pytest.fixture(scope="module", params=TYPES)
def model(request, demo_gguf, tmp_path_factory):
    out = tmp_path_factory.mktemp("gpu") / f"demo-{request.param}.gguf"
    convert(demo_gguf, out, Settings(type=request.param, calibration="none"))
    return out


@pytest.mark.llama
def test_perplexity_is_that_of_the_cpu(cuda_bin, model):
    def perplexity(*device):
        out = "".join(
            run_tool(cuda_bin, "llama-perplexity", "-m", model, "-f", resources.SAMPLE_TEXT, "-c", 256, *device)
        )
        return float(re.search(r"Final estimate: PPL = ([\d.]+)", out)[1])

    # For one column both round activations to 8 bits in the same way. For prompts CUDA has float16 weights, the CPU
    # 8-bit activations.
    assert abs(perplexity(*CUDA) / perplexity(*CPU) - 1) < 0.005


@pytest.mark.llama
def test_text_is_that_of_the_cpu(cuda_bin, model):
    def text(*device):
        args = ("-m", model, "-p", demo.PROMPT, "-n", 48, "--temp", 0, "-no-cnv", "--no-warmup", *device)
        return run_tool(cuda_bin, "llama-completion", *args)[0].strip()

    cpu, cuda = text(*CPU), text(*CUDA)
    # greedy choice may part ways at a near tie, but not at once
    same = next((i for i, (a, b) in enumerate(zip(cpu, cuda, strict=False)) if a != b), min(len(cpu), len(cuda)))
    assert same >= min(len(cpu), len(demo.PROMPT) + 40), (cpu, cuda)


def test_file_errors_name_the_type(cp):
    with pytest.raises(AaacError, match="36 bytes"):
        kernels.dequant(G16, cp.zeros((1, 34), cp.uint8), codec(3))
