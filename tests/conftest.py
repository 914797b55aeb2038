"""Fixtures: a small GGUF, the bundled model, the patched llama.cpp if it is built, and the CUDA kernels on the host."""

from __future__ import annotations

import ctypes
import math
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from aaac_gguf import cli, progress, resources
from aaac_gguf.errors import AaacError
from aaac_gguf.files import format as fmt
from aaac_gguf.files.gguf import GgufFile
from aaac_gguf.llama import build as llama
from aaac_gguf.llama import tools
from aaac_gguf.models.source import full_precision
from aaac_gguf.resources import shipped

# Threads that spin while other programs run cost more than they give to models this small. Programs started by tests
# read the variable.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session", autouse=True)
def _exact_products():
    """Run models as on a processor without products of bfloat16 numbers, so that figures are the same everywhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cpu, "get_capabilities", dict)
        yield


@pytest.fixture(scope="session", autouse=True)
def _demo_converted_once(tmp_path_factory):
    """Keep what llama.cpp's converter makes of the bundled model: it takes seconds to start."""
    kept, convert_hf = tmp_path_factory.mktemp("demo"), tools.convert_hf

    def convert_once(source, out, outtype, header_only=False, name=None, n_bytes=None):
        file = kept / f"{name}-{outtype}-{header_only}.gguf"
        if source.resolve() != resources.MODEL or name is None:
            convert_hf(source, out, outtype, header_only, name, n_bytes)
        elif file.exists():
            shutil.copy(file, out)
        else:
            convert_hf(source, out, outtype, header_only, name, n_bytes)
            shutil.copy(out, file)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tools, "convert_hf", convert_once)
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test that needs llama.cpp's source or its build as `llama`."""
    for item in items:
        if {"llama_source", "patched"} & set(getattr(item, "fixturenames", ())):
            item.add_marker("llama")


def random_codec(rng: np.random.Generator, m: int = 3) -> fmt.Codec:
    """Return two asymmetric codebooks and a scale base."""
    books = np.stack([np.sort(rng.choice(np.arange(-127, 128), 16, replace=False)) for _ in range(2)])
    return fmt.Codec(books.astype(np.int8), float(np.float32(rng.uniform(1e-4, 1e-2))), m)


def write_source(
    path: Path,
    tensors: dict[str, np.ndarray],
    architecture: str = "llama",
    settings: Mapping[str, int | float] | None = None,
    bfloat16: bool = False,
) -> Path:
    """Write a full-precision GGUF of no real model: enough for everything that does not run it.

    settings: numbers of the architecture's metadata. bfloat16: store the matrices in it, rounded.
    """
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("made by a test")
    for key, value in (settings or {}).items():
        (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(f"{architecture}.{key}", value)
    writer.add_block_count(1)
    writer.add_token_list(["a", "bc", "d"])
    for name, values in tensors.items():
        if bfloat16 and values.ndim > 1:
            stored = gguf.quantize(values, gguf.GGMLQuantizationType.BF16)
            writer.add_tensor(name, stored, raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(autouse=True)
def no_progress_lines(monkeypatch):
    """Keep lines of progress, which depend on the time, out of what tests read from standard error."""
    monkeypatch.setattr(progress, "SECONDS_PER_LINE", math.inf)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def source(tmp_path: Path, rng: np.random.Generator) -> Path:
    """Return a GGUF of two matrices, an embedding, a norm, and a matrix whose rows fit no block of 64."""
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    return write_source(
        tmp_path / "source.gguf",
        {
            "token_embd.weight": normal(8, 256),
            "blk.0.attn_norm.weight": normal(256),
            "blk.0.attn_q.weight": normal(64, 256),
            "blk.0.ffn_down.weight": normal(128, 192).astype(np.float16),
            "blk.0.attn_k.weight": normal(8, 96),
        },
    )


@pytest.fixture(scope="session")
def llama_source() -> Path:
    """Return the patched llama.cpp source, fetched if it is not in the cache."""
    try:
        return llama.fetch()
    except AaacError as e:
        pytest.skip(f"no llama.cpp source: {e}")


@pytest.fixture(scope="session")
def patched() -> Path:
    """Return the folder of the patched llama.cpp's binaries."""
    if not llama.is_built():
        pytest.skip("patched llama.cpp is not built; run `aaac-gguf llama build`")
    return llama.build()


@pytest.fixture(scope="session")
def demo_full(llama_source: Path, tmp_path_factory: pytest.TempPathFactory):
    """Return the bundled model as a full-precision GGUF, open."""
    with full_precision(resources.MODEL, tmp_path_factory.mktemp("full")) as file:
        yield file


@pytest.fixture(scope="session")
def demo_gguf(demo_full: GgufFile) -> Path:
    return demo_full.path


def host_library(source: str, folder: Path) -> ctypes.CDLL:
    """Compile a C++ file of tests/emulation, which includes CUDA kernels, for the host in `folder`."""
    if not shutil.which("g++"):
        pytest.skip("g++ is not installed")
    library = folder / "libhost.so"
    flags = ["-std=c++17", "-O1", "-Wall", "-Wno-unknown-pragmas", "-shared", "-fPIC", f"-I{shipped('cuda_kernels')}"]
    subprocess.run(["g++", *flags, "-o", library, Path(__file__).parent / "emulation" / source], check=True)
    return ctypes.CDLL(str(library))


@pytest.fixture(scope="session")
def lib(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """Return the CUDA kernels on the host, behind the functions of cuda_host.cpp."""
    lib = host_library("cuda_host.cpp", tmp_path_factory.mktemp("cuda"))
    lib.q8_stride.restype = lib.q8_place.restype = ctypes.c_int64
    lib.q8_stride.argtypes = lib.q8_place.argtypes = [ctypes.c_int64]
    lib.launch_expression.restype = ctypes.c_bool
    return lib


@pytest.fixture
def refused(capsys):
    """Return a function of a verb's arguments: the one line that refuses bad input, with status 2."""

    def run(*args) -> str:
        assert cli.main([str(arg) for arg in args]) == 2
        err = capsys.readouterr().err
        assert err.startswith("aaac-gguf: error: ")
        assert len(err.splitlines()) == 1, err
        return err

    return run
