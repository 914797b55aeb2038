"""Compile every kernel with nvcc for the architectures that README names, and the patch's CUDA files in ggml's tree."""

import ctypes
import ctypes.util
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from aaac_samples import codec, random_blocks

from aaac_gguf.errors import AaacError
from aaac_gguf.files.format import G16, G32, TYPES, decode
from aaac_gguf.inference import kernels
from aaac_gguf.resources import shipped

pytestmark = pytest.mark.slow

ARCHITECTURES = (75, 80, 86, 89, 90, 120)
FILES = ("dequant.cu", "matvec.cu", "matmul.cu", "search.cu")


def nvcc(*args) -> str:
    """Standard error of nvcc, where it reports resources; skips where there is no nvcc."""
    if not shutil.which("nvcc"):
        pytest.skip("nvcc is not installed (CUDA toolkit)")
    result = subprocess.run(["nvcc", *args], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stderr


def resources(report: str) -> list[tuple[str, int, int, int]]:
    """(kernel, registers, bytes of stack and spills, bytes of shared memory) from what ptxas -v prints."""
    memory_line = r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    found = re.findall(rf"Function properties for (\S+)\n\s*{memory_line}\n.*?Used (\d+) registers(.*)", report)
    names = [name for name, *_ in found]
    if shutil.which("c++filt"):
        names = subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True).stdout.splitlines()
    rows = []
    for name, (_, *memory, registers, rest) in zip(names, found, strict=True):
        shared = re.search(r"(\d+) bytes smem", rest)
        rows.append(
            (
                name.removeprefix("void ").partition("(")[0],
                int(registers),
                sum(map(int, memory)),
                int(shared[1]) if shared else 0,
            )
        )
    return rows


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("file", FILES)
def test_kernels_compile(file, arch, tmp_path):
    report = nvcc(
        "-std=c++17",
        f"-arch=sm_{arch}",
        "-Xptxas",
        "-v",
        "--cubin",
        "-o",
        tmp_path / "k.cubin",
        shipped("cuda_kernels") / file,
    )
    rows = resources(report)
    print(f"\n{'sm_' + str(arch):50} registers  stack+spill  shared")
    for name, registers, spilled, shared in rows:
        print(f"{name:50} {registers:9} {spilled:12} {shared:7}")
        assert spilled == 0, f"{name} spills on sm_{arch}"
        assert registers <= 65536 // kernels.MATMUL_THREADS
        assert shared <= 48 * 1024
    assert len(rows) == {"dequant.cu": 9, "matvec.cu": 27, "matmul.cu": 9, "search.cu": 7}[file]


def test_nvrtc_compiles_what_cupy_will_ask_for():
    """NVRTC has no standard headers, so what nvcc compiles may still fail there."""
    name = ctypes.util.find_library("nvrtc")
    wheels = sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/**/libnvrtc.so.*"))
    if name is None and not wheels:
        pytest.skip("libnvrtc is not installed (CUDA toolkit, or nvidia-cuda-nvrtc from PyPI)")
    try:
        nvrtc = ctypes.CDLL(name or str(wheels[0]))
    except OSError as e:
        pytest.skip(f"libnvrtc cannot be loaded: {e}")
    structs, types = kernels.STRUCTS.values(), kernels.C_TYPES.values()
    expressions = {
        "dequant.cu": [f"aaac_dequant<{s}, {t}>" for s in structs for t in types],
        "matvec.cu": [f"aaac_matvec_q8<{s}, 1>" for s in structs]
        + [f"aaac_matvec<aaac_g32, {t}, 2>" for t in types]
        + ["aaac_quantize_q8<float>"],
        "matmul.cu": [f"aaac_matmul<aaac_g128, {t}>" for t in types],
        "search.cu": [f"{name}<{t.group_size}>" for name in ("aaac_feed_back", "aaac_sweep") for t in TYPES.values()]
        + ["aaac_feed_back_on_steps"],
    }
    for file, names in expressions.items():
        program = ctypes.c_void_p()
        assert (
            nvrtc.nvrtcCreateProgram(ctypes.byref(program), kernels.source(file).encode(), b"kernels.cu", 0, None, None)
            == 0
        )
        for name in names:
            nvrtc.nvrtcAddNameExpression(program, name.encode())
        options = (ctypes.c_char_p * 2)(b"-std=c++17", b"-arch=compute_80")
        status = nvrtc.nvrtcCompileProgram(program, 2, options)
        size = ctypes.c_size_t()
        nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetProgramLog(program, log)
        assert status == 0, log.value.decode()
        for name in names:
            lowered = ctypes.c_char_p()
            assert nvrtc.nvrtcGetLoweredName(program, name.encode(), ctypes.byref(lowered)) == 0
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


@pytest.mark.llama
@pytest.mark.parametrize("file", ["aaac.cu", "aaac-decode.cu"])
def test_the_patch_compiles_inside_ggml(file, llama_source, tmp_path):
    """Compile our files of the CUDA backend with ggml's headers and flags, for one architecture."""
    ggml = llama_source / "ggml"
    probe = tmp_path / "probe.cu"
    probe.write_text("#include <cublas_v2.h>\n")
    if shutil.which("nvcc") and subprocess.run(["nvcc", "-E", probe], capture_output=True).returncode:
        needs = "ggml's CUDA backend includes cuBLAS' headers"
        pytest.skip(f"{needs}, which are not installed (NVCC_APPEND_FLAGS can add a folder)")
    folders = [
        shipped("patches") / "new/ggml/src/ggml-cuda",
        ggml / "src/ggml-cuda",
        ggml / "src",
        shipped("cuda_kernels"),
        ggml / "include",
    ]
    flags = [
        "-std=c++17",
        "-O3",
        "-arch=sm_90",
        "-use_fast_math",
        "-extended-lambda",
        "-DNDEBUG",
        "-DGGML_CUDA_USE_GRAPHS",
        "-DGGML_SCHED_MAX_COPIES=4",
    ]
    report = nvcc(
        *flags, "-Xptxas", "-v", *(f"-I{folder}" for folder in folders), "-c", "-o", tmp_path / "o.o", folders[0] / file
    )
    for name, registers, spilled, shared in resources(report):
        print(f"{name:70} {registers:4} registers {spilled:4} spilled {shared:6} shared")
        assert spilled == 0 or "mul_mat_vec" not in name


def test_structures_of_arguments_match():
    """kernels.py builds aaac_params and aaac_experts by hand."""
    source = kernels.source("matmul.cu")
    assert kernels.PARAMS.itemsize == 40
    assert kernels.PARAMS.fields["d"][1] == 32
    assert kernels.PARAMS.fields["m"][1] == 36
    assert kernels.EXPERTS.itemsize == 32
    assert re.search(
        r"struct aaac_experts \{\s*const int32_t \* bounds;.*?sources;\s*const int32_t \* targets;\s*int64_t\s+bytes;",
        source,
        re.DOTALL,
    )
    assert "#include" not in source.replace("#include <", "")


def test_numpy_arrays_take_the_reference():
    blocks, params = random_blocks(G16, 3, 128, seed=0, max_code=60), codec(3)
    w = decode(G16, blocks, params)
    x = np.random.default_rng(0).standard_normal((2, 128)).astype(np.float32)
    np.testing.assert_array_equal(kernels.dequant(G16, blocks, params), w)
    np.testing.assert_array_equal(kernels.dequant(G16, blocks, params, "float16"), w.astype(np.float16))
    np.testing.assert_allclose(kernels.matvec(G16, blocks, params, x), x @ w.T, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(kernels.matmul(G16, blocks, params, x), x @ w.T, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda b, c, x: kernels.dequant(G32, b, c), "34 bytes"),
        (lambda b, c, x: kernels.dequant(G16, b[0], c), "expected [rows, bytes]"),
        (lambda b, c, x: kernels.dequant(G16, b.astype(np.int8), c), "expected uint8"),
        (lambda b, c, x: kernels.dequant(G16, b, c, "float64"), "dtype is float64"),
        (lambda b, c, x: kernels.matvec(G16, b, c, x[:, :64]), "expected [columns, 128]"),
        (lambda b, c, x: kernels.matmul(G16, b, c, x[0]), "expected [columns, 128]"),
    ],
)
def test_errors_say_what_is_wrong(call, message):
    blocks, x = random_blocks(G16, 3, 128, seed=0), np.zeros((1, 128), np.float32)
    with pytest.raises(AaacError, match=re.escape(message)):
        call(blocks, codec(3), x)
