"""Run the programs of benchmarks/gpu.sh without a GPU: a tiny model, and NumPy for CuPy under kernels that do nothing.

The figures mean nothing; what runs here has no name that is missing and no flag that llama.cpp refuses.
"""

import json
import sys
from pathlib import Path

import pytest
import torch
from emulation.emulated_cupy import Cupy, numpy

from aaac_gguf.files.format import TYPES
from aaac_gguf.inference import kernels

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import gpu
import gpu_models
from random_models import Shape, one_layer


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(gpu_models, "TESTS", ("pp8", "tg2"))
    monkeypatch.setattr(gpu_models, "RATIOS", (("tg2", "IQ4_NL"),))
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")  # threads that spin while other programs run take minutes


@pytest.mark.llama
def test_models(patched, short, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(
        gpu_models, "SHAPE", Shape(n_layers=1, n_embd=256, n_ff=512, n_head=4, n_head_kv=2, n_vocab=320, tied=False)
    )
    monkeypatch.setattr(gpu_models, "DEVICE", "cpu")
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


def test_kernels(monkeypatch, tmp_path, capsys):
    kernels.kernel.cache_clear()
    cupy = Cupy()
    monkeypatch.setattr(kernels, "_cupy", lambda: cupy)
    monkeypatch.setattr(kernels, "np", numpy)
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


@pytest.mark.llama
def test_a_run_without_a_gpu_is_no_measurement(patched, short, tmp_path):
    model = tmp_path / "model.gguf"
    one_layer(model, Shape(n_layers=1, n_embd=64, n_ff=64, n_head=1, n_head_kv=1, n_vocab=32, tied=False))
    with pytest.raises(SystemExit, match="no GPU"):
        gpu_models.bench(patched, model, repetitions=1)
