"""`Linear` on a CPU, by linear.c for each instruction set that it has code for and without a compiler, and on a GPU.

A product of K float32 weights and activations, summed in any order, is off by at most (K + 5) * 2^-24 * sum |w x|. The
GPU's bounds are those of test_cuda_host.py.
"""

import ctypes
import platform
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from aaac_samples import codec, every_combination, hand_written, random_blocks
from conftest import write_source
from emulation.emulated_cupy import Cupy, numpy

import aaac_gguf as aaac
from aaac_gguf.errors import AaacError
from aaac_gguf.files.format import G16, TYPES
from aaac_gguf.files.format import decode as decode_in_numpy
from aaac_gguf.inference import kernels, linear
from aaac_gguf.inference.linear import Linear

ALL_TYPES = pytest.mark.parametrize("qtype", TYPES.values(), ids=TYPES)
INSTRUCTION_SETS = {"SSE2": ("x86-64", "sse2"), "AVX2": ("haswell", "avx2"), "AVX-512": ("skylake-avx512", "avx512bw")}


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    """linear.c compiled for every instruction set that this machine has, by name."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    source, folder = Path(linear.__file__).with_name("linear.c"), tmp_path_factory.mktemp("linear")
    found = {}
    for name, (architecture, feature) in INSTRUCTION_SETS.items():
        if platform.machine() == "x86_64" and shutil.which("gcc") and feature in flags:
            options = [f"-march={architecture}", "-O2", "-Wno-psabi", "-shared", "-fPIC", "-fopenmp"]
            subprocess.run(["gcc", *options, source, "-o", folder / f"{name}.so"], check=True)
            found[name] = ctypes.CDLL(str(folder / f"{name}.so"))
    return found


@pytest.fixture(params=["this machine", *INSTRUCTION_SETS, "no compiler"])
def library(request, monkeypatch, libraries):
    """Make linear.py use a library compiled for one instruction set, or none."""
    if request.param in INSTRUCTION_SETS and request.param not in libraries:
        pytest.skip(f"no gcc, or this machine has no {request.param}")
    if request.param != "this machine":
        monkeypatch.setattr(linear, "c_library", lambda source: libraries.get(request.param))


def layer_of(qtype, n_rows, k, bias=None):
    """A layer of random blocks, and its weights in float64."""
    blocks, params = random_blocks(qtype, n_rows, k, seed=n_rows + k, max_code=60), codec(4)
    w = torch.from_numpy(decode_in_numpy(qtype, blocks, params)).double()
    return Linear(qtype, torch.from_numpy(blocks), params, bias), w


def check_bound(y, w, x, relative):
    x = x.double()
    assert ((y.double() - x @ w.T).abs() <= relative * (x.abs() @ w.abs().T)).all()


@ALL_TYPES
@pytest.mark.parametrize("m", [2, 3, 4, 5])
def test_decode_is_that_of_the_format_to_the_bit(library, qtype, m):
    """Every index with both selectors under every scale code, zero scales among them."""
    for blocks, params in (
        (every_combination(qtype), codec(m, 1e-4)),
        (random_blocks(qtype, 7, 896, seed=m), codec(m)),
        (hand_written(qtype)[0], codec(m, 1.0)),
    ):
        found = linear.decode(qtype, torch.from_numpy(blocks), params).numpy()
        expected = decode_in_numpy(qtype, blocks, params)
        np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))


@ALL_TYPES
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize(("n_rows", "k"), [(1, 128), (5, 384), (3, 8448)])
def test_products(library, qtype, n_rows, k, n):
    layer, w = layer_of(qtype, n_rows, k)
    x = torch.randn(n, k, generator=torch.Generator().manual_seed(n))
    y = layer(x)
    assert y.dtype == torch.float32
    check_bound(y, w, x, (k + 5) * 2.0**-24)


@pytest.mark.parametrize("n", [2, 5])
def test_products_of_several_tiles(library, monkeypatch, n):
    """The last tile of 7 rows in tiles of 3 has one row."""
    monkeypatch.setattr(linear, "TILE", 3 * 256 + 255)
    layer, w = layer_of(G16, 7, 256)
    x = torch.randn(n, 256)
    check_bound(layer(x), w, x, (256 + 5) * 2.0**-24)


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float16, 2.0**-11), (torch.bfloat16, 2.0**-8)])
@pytest.mark.parametrize("shape", [(192,), (3, 192), (2, 0, 192), (2, 3, 4, 192)])
def test_any_dtype_and_leading_dimensions(dtype, rounding, shape):
    bias = torch.linspace(-1, 1, 5)
    layer, w = layer_of(G16, 5, 192, bias)
    x = torch.randn(shape).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    assert y.shape == (*shape[:-1], 5)
    exact = x.double() @ w.T + bias
    assert ((y.double() - exact).abs() <= rounding * exact.abs() + 1e-4).all()


def test_columns_that_are_not_contiguous():
    layer, w = layer_of(G16, 5, 192)
    x = torch.randn(192, 3).T
    check_bound(layer(x), w, x, 197 * 2.0**-24)


def test_no_float_copy_of_the_weights_is_kept():
    layer, w = layer_of(G16, 64, 256, torch.zeros(64))
    layer(torch.randn(1, 256))
    layer(torch.randn(9, 256))
    assert layer.weight.numel() == w.numel()
    held = [*layer.parameters(), *layer.buffers(), *(v for v in vars(layer).values() if isinstance(v, torch.Tensor))]
    assert sum(t.numel() * t.element_size() for t in held) == 64 * G16.row_bytes(256) + 4 * 64


def test_state_dict_brings_blocks_codec_and_bias(tmp_path):
    layer, _ = layer_of(G16, 5, 192, torch.linspace(-1, 1, 5))
    torch.save(layer.state_dict(), tmp_path / "state.pt")
    other = Linear(G16, torch.zeros_like(layer.blocks), codec(2, 1.0), torch.zeros(5))
    x = torch.randn(3, 192)
    assert not torch.equal(other(x), layer(x))
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert torch.equal(other(x), layer(x))
    assert torch.equal(other.weight, layer.weight)


def test_other_dtypes_and_devices_leave_blocks_as_they_are():
    layer, _ = layer_of(G16, 5, 192, torch.zeros(5))
    layer.half()
    assert (layer.blocks.dtype, layer.bias.dtype) == (torch.uint8, torch.float16)
    assert layer.to("meta").blocks.is_meta


@pytest.fixture
def file(tmp_path, rng):
    names = {"blk.0.attn_q.weight": (8, 192), "output_norm.weight": (192,)}
    weights = {name: rng.normal(size=shape).astype(np.float32) for name, shape in names.items()}
    aaac.quantize(write_source(tmp_path / "source.gguf", weights), tmp_path / "out.gguf", calibration="none")
    return aaac.load(tmp_path / "out.gguf")


def test_from_file_takes_the_rows_that_it_is_told(file):
    name, rows = "blk.0.attn_q.weight", [3, 2, 1, 0, 4, 5, 7, 6]
    assert torch.equal(Linear.from_file(file, name).weight, torch.from_numpy(file[name]))
    bias = torch.arange(8.0)
    layer = Linear.from_file(file, name, bias, rows)
    assert torch.equal(layer.weight, torch.from_numpy(file[name])[rows])
    assert torch.equal(layer(torch.zeros(192)), bias)


def test_errors_say_what_is_wrong(file):
    layer, _ = layer_of(G16, 5, 192)
    for call, message in (
        (lambda: layer(torch.zeros(2, 96)), "x has shape [2, 96], expected [..., 192]"),
        (lambda: Linear.from_file(file, "output_norm.weight"), "output_norm.weight is F32, not of an AAAC type"),
        (lambda: Linear(G16, torch.zeros(5, 35, dtype=torch.uint8), codec(3)), "35 bytes"),
    ):
        with pytest.raises(AaacError, match=re.escape(message)):
            call()


@pytest.fixture
def launched(lib, monkeypatch):
    """Pretend that tensors are on a GPU, which the emulator is. Return the kernels that were launched."""
    cupy, names = Cupy(lib), []
    monkeypatch.setattr(kernels, "_cupy", lambda: cupy)
    monkeypatch.setattr(kernels, "np", numpy)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)

    def kernel(file, expression):
        names.append(expression.partition("<")[0])
        return cupy.RawModule().get_function(expression)

    monkeypatch.setattr(kernels, "kernel", kernel)
    return names


@ALL_TYPES
@pytest.mark.parametrize(("n", "expected"), [(1, "aaac_matvec_q8"), (8, "aaac_matvec_q8"), (9, "aaac_matmul")])
def test_a_gpu_multiplies_few_and_many_columns_with_its_kernels(launched, qtype, n, expected):
    layer, w = layer_of(qtype, 7, 384, torch.ones(7))
    x = torch.randn(n + 1, 384).flatten()[1 : n * 384 + 1].reshape(n, 384)  # not at a multiple of 16 bytes
    y = layer(x)
    assert launched[-1] == expected
    rounding = 2.0**-11 * 2.1 if n > 8 else 0.0
    step = x.abs().max(1, keepdim=True).values.double() / 127 * 0.51 if n <= 8 else 0.0  # of 8-bit activations
    bound = (rounding + 400 * 2.0**-23) * (x.double().abs() @ w.abs().T) + step * w.abs().sum(1)
    assert ((y.double() - 1 - x.double() @ w.T).abs() <= bound + 1e-6).all()


def test_a_gpu_decodes_and_takes_bfloat16(launched):
    layer, w = layer_of(G16, 7, 384)
    assert torch.equal(layer.weight, w.float())
    assert launched == ["aaac_dequant"]
    x = (1e6 * torch.randn(2, 9, 384)).bfloat16()  # beyond float16
    y = layer(x)
    assert (launched[-1], y.dtype, y.shape) == ("aaac_matmul", torch.bfloat16, (2, 9, 7))
    bound = 2.0**-7 * (x.double().abs() @ w.abs().T)
    assert ((y.double() - x.double() @ w.T).abs() <= bound).all()
