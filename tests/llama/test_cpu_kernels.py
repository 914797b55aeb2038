"""The patch's CPU kernels, compiled stand-alone for each instruction set, against float64.

The reference has the activations as the kernel quantized them. On those a product has no error but float32 rounding.
The integer sum of a group is exact, with the offset of unsigned levels too: it is at most 32 * 255 * 127 < 2^24, so its
conversion to float is also exact. Three roundings make its term: S, times the scale of the activations, times the sum.
Each of at most K / 16 additions adds one rounding. So |error| <= (K / 16 + 4) * 2^-24 * sum |w x|.
"""

import platform
import shutil
import struct
import subprocess

import numpy as np
import pytest
from aaac_samples import codec, random_blocks

from aaac_gguf.files.format import TYPES, decode
from aaac_gguf.resources import shipped

ALL_TYPES = pytest.mark.parametrize("qtype", TYPES.values(), ids=TYPES)
X86 = ("x86_64", "AMD64")
AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mavx2", "-mfma")
# name: machines that run it natively, flags of cpuinfo that it needs, compiler flags
TARGETS = {
    "generic": ((), (), ("-DAAAC_GENERIC",)),
    "avx2": (X86, ("avx2", "fma"), ("-mavx2", "-mfma")),
    "avx-vnni": (X86, ("avx2", "fma", "avx_vnni"), ("-mavx2", "-mfma", "-mavxvnni")),
    # the same code where only AVX-512 has the instruction: without DQ the AVX-512 kernels are not chosen
    "avx-vnni-evex": (
        X86,
        ("avx512bw", "avx512vl", "avx512_vnni"),
        ("-mavx2", "-mfma", "-mavx512bw", "-mavx512vl", "-mavx512vnni", "-D__AVXVNNI__"),
    ),
    "avx512-vnni": (
        X86,
        ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"),
        AVX512,
    ),
    "avx512-vnni-vbmi": (
        X86,
        ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "avx512vbmi"),
        (*AVX512, "-mavx512vbmi"),
    ),
    "neon-dotprod": (("aarch64", "arm64"), (), ("-march=armv8.2-a+dotprod",)),
}


def cpu_flags() -> set[str]:
    try:
        with open("/proc/cpuinfo") as f:
            return {flag for line in f if line.startswith("flags") for flag in line.split(":")[1].split()}
    except OSError:
        return set()


def toolchain(target: str) -> tuple[str, list[str]]:
    """Return the compiler, and the command that runs its programs. Skips with a reason if one is missing."""
    machines, needed, _ = TARGETS[target]
    if not machines or platform.machine() in machines:
        if missing := set(needed) - cpu_flags():
            pytest.skip(f"this processor lacks {', '.join(sorted(missing))}")
        compiler, runner = "g++", []
    elif target == "neon-dotprod":
        emulator = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
        if emulator is None:
            pytest.skip("qemu-aarch64 is not installed (Debian: qemu-user-static)")
        compiler, runner = "aarch64-linux-gnu-g++", [emulator, "-cpu", "max"]
    else:
        pytest.skip(f"needs one of {', '.join(machines)}")
    if not shutil.which(compiler):
        pytest.skip(f"{compiler} is not installed (Debian: g++-aarch64-linux-gnu for the cross compiler)")
    return compiler, runner


@pytest.fixture(scope="module", params=TARGETS)
def kernels(request, tmp_path_factory):
    """Return run(qtype, blocks [N, bytes], codec, x [n, K]) -> x as quantized, by_row, by_tile.

    x as quantized is float64, the products by_row and by_tile are float32 [n, N].
    """
    compiler, runner = toolchain(request.param)
    program = tmp_path_factory.mktemp("kernels") / "cpu_kernels"
    include = [shipped("patches") / "new/ggml/src/ggml-cpu/aaac", shipped("cuda_kernels")]
    flags = ["-std=c++17", "-O2", "-static", *TARGETS[request.param][2], *(f"-I{folder}" for folder in include)]
    subprocess.run(
        [compiler, *flags, "-o", program, request.config.rootpath / "tests" / "llama" / "cpu_kernels.cpp"],
        check=True,
        stderr=subprocess.DEVNULL,
    )

    def run(qtype, blocks, codec, x):
        (n_rows, _), (n_cols, k) = blocks.shape, x.shape
        head = struct.pack("<4i", qtype.type_id, k, n_rows, n_cols)
        params = struct.pack("<32sfB", codec.codebooks.tobytes(), codec.scale_base, codec.scale_mantissa_bits)
        request_bytes = head + params + blocks.tobytes() + x.tobytes()
        result = subprocess.run([*runner, program], input=request_bytes, capture_output=True, check=True).stdout
        sizes = np.cumsum([4, n_cols * k, n_cols * k // 8, 4 * n_cols * n_rows])
        parts = np.split(np.frombuffer(result, np.uint8), sizes)
        _, q, d, by_row, by_tile = (np.frombuffer(part, dtype) for part, dtype in zip(parts, "ibfff", strict=True))
        quantized = q.reshape(n_cols, -1, 32).astype(np.float64) * d.reshape(n_cols, -1, 1).astype(np.float64)
        return quantized.reshape(n_cols, k), by_row.reshape(n_cols, n_rows), by_tile.reshape(n_cols, n_rows)

    return run


def activations(n_cols: int, k: int, seed: int = 1) -> np.ndarray:
    """Return activations with blocks of very different size, an all-zero block and a subnormal one."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n_cols, k)) * np.repeat(10.0 ** rng.uniform(-4, 4, (n_cols, k // 32)), 32, axis=-1)
    x[0, :32] = 0
    x[-1, 32:64] = 1e-41
    return x.astype(np.float32)


@ALL_TYPES
def test_activations_are_rounded_to_nearest(kernels, qtype):
    x = activations(5, 640)
    quantized, _, _ = kernels(qtype, random_blocks(qtype, 1, 640, seed=0), codec(3), x)
    step = np.repeat(np.abs(x.astype(np.float64)).reshape(5, -1, 32).max(-1) / 127, 32, axis=-1)
    # half a step, and what float32 adds to the scale and to its inverse; a subnormal block becomes zero
    assert (np.abs(quantized - x) <= np.maximum(step * (0.5 + 1e-4), 2e-38)).all()


@ALL_TYPES
@pytest.mark.parametrize("n_cols", [1, 2, 3, 4, 5, 8, 15, 16, 17, 37])
def test_products(kernels, qtype, n_cols):
    k, n_rows = 1280, 37  # rows that do not fill whole tiles
    blocks = random_blocks(qtype, n_rows, k, seed=n_cols, max_code=60)
    x, by_row, by_tile = kernels(qtype, blocks, codec(4), activations(n_cols, k))
    weights = decode(qtype, blocks, codec(4)).astype(np.float64)
    bound = (k / 16 + 4) * 2.0**-24 * (np.abs(x) @ np.abs(weights).T)
    for got in (by_row, by_tile):
        assert (np.abs(got - x @ weights.T) <= bound).all()


@ALL_TYPES
@pytest.mark.parametrize("n_blocks", [1, 2, 3, 5])
def test_short_rows(kernels, qtype, n_blocks):
    """No kernel may read or count past the end of a row, if it has few blocks."""
    k = n_blocks * qtype.block_size
    blocks = random_blocks(qtype, 5, k, seed=n_blocks, max_code=60)
    x, by_row, by_tile = kernels(
        qtype, blocks, codec(4), np.random.default_rng(0).standard_normal((5, k)).astype(np.float32)
    )
    reference = x @ decode(qtype, blocks, codec(4)).astype(np.float64).T
    for got in (by_row, by_tile):
        np.testing.assert_allclose(got, reference, rtol=1e-4, atol=1e-4 * np.abs(reference).max())


@ALL_TYPES
def test_every_level_and_scale_code(kernels, qtype):
    """One-hot activations read single weights back, with all 128 codes.

    A product of floats may round once more than the decode.
    """
    k = 512
    blocks = random_blocks(qtype, 64, k, seed=3)
    x = np.zeros((64, k), np.float32)
    x[np.arange(64), np.arange(64) * 8 + np.arange(64) % 8] = 1
    _, by_row, by_tile = kernels(qtype, blocks, codec(5), x)
    weights = decode(qtype, blocks, codec(5)) @ x.T
    for got in (by_row, by_tile):
        np.testing.assert_allclose(got, weights.T, rtol=1e-6)
