"""The programs of benchmarks/gpu.sh without a GPU: a tiny model through the CPU build, and NumPy for CuPy under kernels that do nothing.

The figures mean nothing; what runs here has no name that is missing and no flag that llama.cpp refuses.
"""

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from aaac_gguf import kernels
from aaac_gguf.format import TYPES

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import gpu
import gpu_models
from random_models import Shape


@pytest.mark.llama
def test_models(patched, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu_models, "SHAPE", Shape(n_layers=2, n_embd=256, n_ff=512, n_head=4, n_head_kv=2, n_vocab=320, tied=False))
    monkeypatch.setattr(gpu_models, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_models, "TESTS", ("pp8", "pp16", "tg4"))
    monkeypatch.setattr(gpu_models, "RATIOS", (("tg4", "IQ4_NL"),))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "no GPU")
    out, work = tmp_path / "out", tmp_path / "work"
    monkeypatch.setattr(sys, "argv", ["gpu_models.py", str(patched), str(out), str(work), "--rounds", "1"])
    gpu_models.main()
    results = json.loads((out / "gpu-models.json").read_text())
    names = {"F16", *TYPES, *gpu_models.STOCK}
    assert set(results["bytes"]) == names
    assert all(set(tests) == set(gpu_models.TESTS) for tests in results["rounds"][0].values())
    assert all(f"\n{name} " in (out / "gpu-models.txt").read_text() for name in names)
    assert not list(work.glob("tmp*"))
    before = {path: path.stat().st_mtime_ns for path in work.iterdir()}
    assert len(before) == len(names)
    gpu_models.main()
    assert {path: path.stat().st_mtime_ns for path in work.iterdir()} == before, "models that WORK holds are made again"


class Array(np.ndarray):
    """NumPy's array with what CuPy's has besides."""

    device = nullcontext()

    @property
    def data(self):
        return SimpleNamespace(ptr=self.ctypes.data, copy_from_device_async=lambda source, n_bytes, stream: None)


class Stream:
    """Captures nothing: a graph of it launches nothing."""

    def __init__(self, non_blocking=False):
        self.capturing = False

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def begin_capture(self):
        self.capturing = True

    def end_capture(self):
        self.capturing = False
        return SimpleNamespace(launch=lambda stream: None)

    def synchronize(self):
        assert not self.capturing


def fake_cupy():
    def array(make):
        return lambda *args, **kwargs: make(*args, **kwargs).view(Array)

    class Kernel(SimpleNamespace):
        def __call__(self, grid, block, args):
            assert all(n > 0 for n in (*grid, *block))

    event = SimpleNamespace(record=lambda: None, synchronize=lambda: None)
    runtime = SimpleNamespace(
        getDeviceProperties=lambda i: {"name": b"no GPU", "l2CacheSize": 1 << 16, "multiProcessorCount": 1},
        runtimeGetVersion=lambda: 0,
        driverGetVersion=lambda: 0,
    )
    return SimpleNamespace(
        **{name: array(getattr(np, name)) for name in ("asarray", "empty", "ones", "tile")},
        **{name: getattr(np, name) for name in ("float16", "float32", "matmul", "ndarray", "uint8")},
        RawModule=lambda **options: SimpleNamespace(get_function=lambda name: Kernel(num_regs=1, local_size_bytes=0, shared_size_bytes=0)),
        cuda=SimpleNamespace(
            Device=lambda: SimpleNamespace(id=0),
            Event=lambda: event,
            Stream=Stream,
            get_current_stream=lambda: None,
            get_elapsed_time=lambda start, end: 1.0,
            runtime=runtime,
        ),
        get_default_memory_pool=lambda: SimpleNamespace(free_all_blocks=lambda: None),
        random=SimpleNamespace(default_rng=lambda seed: SimpleNamespace(standard_normal=array(np.random.default_rng(seed).standard_normal))),
    )


def test_kernels(monkeypatch, tmp_path, capsys):
    kernels.kernel.cache_clear()
    cupy = fake_cupy()
    monkeypatch.setattr(kernels, "_cupy", lambda: cupy)
    monkeypatch.setattr(gpu, "SHAPES", {"small": (64, 256), "wide": (128, 1024)})
    monkeypatch.setattr(gpu, "MATMUL_SHAPE", (64, 256))
    monkeypatch.setattr(gpu, "MATMUL_COLUMNS", (16, 32))
    monkeypatch.setattr(gpu, "COPIED", 1024)
    monkeypatch.setattr(gpu, "BATCHES", 1)
    monkeypatch.setattr(sys, "argv", ["gpu.py", str(tmp_path)])
    gpu.main()
    kernels.kernel.cache_clear()  # or later tests would find kernels that do nothing
    results = json.loads((tmp_path / "gpu-kernels.json").read_text())
    assert [r["type"] for r in results["registers"]] == list(TYPES)
    assert len(results["matvec"]) == len(TYPES) * 2 * len(gpu.MATVEC_COLUMNS)
    assert len(results["matmul"]) == len(TYPES) * 2
    text = (tmp_path / "gpu-kernels.txt").read_text()
    assert all(name in text for name in (*TYPES, "small", "wide"))
