"""A wheel made from the sdist and installed elsewhere has the patch, the kernels and the demo model, and starts."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from aaac_gguf import __version__
from aaac_gguf.llama import patch

ROOT = Path(__file__).parents[1]


def files(folder):
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and "__pycache__" not in p.parts
    }


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder that the wheel was installed into."""
    setuptools = pytest.importorskip("setuptools", "77", reason="setuptools 77 or newer builds the distribution")
    assert setuptools
    tmp = tmp_path_factory.mktemp("dist")
    shutil.copytree(
        ROOT, tmp / "src", ignore=shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "*.gguf", "__pycache__")
    )
    code = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, tmp], cwd=tmp / "src", check=True, capture_output=True)
    shutil.rmtree(tmp / "src")
    (sdist,) = tmp.glob("*.tar.gz")
    pip = [sys.executable, "-m", "pip"]
    subprocess.run(
        [*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp, sdist],
        check=True,
        capture_output=True,
        cwd=tmp,
    )
    (wheel,) = tmp.glob("*.whl")
    subprocess.run(
        [*pip, "install", "-q", "--no-deps", "--target", tmp / "site", wheel], check=True, capture_output=True, cwd=tmp
    )
    return tmp / "site"


def run(installed, *args):
    env = os.environ | {"PYTHONPATH": str(installed)}
    return subprocess.run(
        [sys.executable, *args], cwd=installed.parent, env=env, capture_output=True, text=True, check=True
    ).stdout.strip()


def test_it_starts(installed):
    assert run(installed, "-m", "aaac_gguf", "--version") == f"aaac-gguf {__version__}"


def test_patch_and_kernels_are_inside(installed):
    code = (
        "from aaac_gguf.llama import patch; from aaac_gguf.resources import shipped;"
        "print(shipped('patches')); print(shipped('cuda_kernels')); print(patch.digest())"
    )
    where = run(installed, "-c", code)
    assert where.splitlines() == [str(installed / "aaac_gguf" / name) for name in ("patches", "cuda_kernels")] + [
        patch.digest()
    ]
    assert files(installed / "aaac_gguf" / "cuda_kernels") == files(ROOT / "cuda_kernels")
    assert files(installed / "aaac_gguf" / "patches") == files(ROOT / "patches")


def test_nothing_of_the_package_is_left_out(installed):
    """Code, C source, py.typed, demo model."""
    packaged = {
        name: data
        for name, data in files(installed / "aaac_gguf").items()
        if not name.startswith(("cuda_kernels/", "patches/"))
    }
    assert packaged == files(ROOT / "aaac_gguf")


def test_importing_loads_neither_torch_nor_transformers(installed):
    code = "import sys, aaac_gguf; print(sorted({'torch', 'transformers', 'numpy', 'gguf'} & set(sys.modules)))"
    assert run(installed, "-c", code) == "[]"


def test_the_python_api(installed, source, tmp_path):
    """Plan, quantize, load, quantize_tensor and verify, each called once."""
    code = """
import sys
import numpy as np
import aaac_gguf as aaac

source, out = sys.argv[1:]
planned = aaac.plan(source, out, type="AAAC4_G32")
report = aaac.quantize(source, out, type="AAAC4_G32", tensor_types={"ffn_down": "Q8_0"}, embedding_type="F16")
assert str(report.files[0]) == out and report.n_bytes > 0, report
assert planned.n_files == 1 and planned.n_bytes != report.n_bytes

model, full = aaac.load(out), aaac.load(source)
weight, expected = model["blk.0.attn_q.weight"], full["blk.0.attn_q.weight"]
assert weight.dtype == np.float32 and weight.shape == expected.shape == (64, 256)
assert np.square(weight - expected).sum() < 0.01 * np.square(expected).sum()

x = np.random.default_rng(0).standard_normal((512, 256)).astype(np.float32)
for given in ({}, {"importance": (x * x).mean(0)}, {"hessian": x.T @ x / len(x)}):
    quantized = aaac.quantize_tensor(expected, "AAAC4_G16", **given)
    assert quantized.codec is not None and quantized.dequantize().shape == expected.shape
    assert quantized.relative_error < 0.01
try:
    aaac.quantize_tensor(expected, "Q9")
except ValueError as error:
    assert "`type` Q9: unknown type" in str(error), error
assert aaac.verify(out).failures == []
print("done")
"""
    assert run(installed, "-c", code, source, tmp_path / "out.gguf") == "done"


@pytest.mark.slow
def test_the_python_api_with_llama_cpp(installed, patched, demo_gguf, tmp_path):
    """Compare, verify against the source, and run in transformers."""
    code = """
import sys
from pathlib import Path

import aaac_gguf as aaac
from aaac_gguf.resources import SAMPLE_TEXT

source, out = sys.argv[1:]
compared = aaac.compare(source, out, types=["AAAC4_G128"], texts=[SAMPLE_TEXT], n_ctx=128, n_chunks=2)
(row,) = compared.rows
assert 0 < row.scores["sample.txt"].mean_kld < 1
(file,) = [p for p in Path(out).glob("*-AAAC4_G128.gguf")]
assert aaac.verify(file, source).failures == []
model = aaac.inference.torch.load_model(file)
tokenizer = aaac.inference.torch.load_tokenizer(file)
tokens = model.generate(**tokenizer("The old gentleman", return_tensors="pt"), max_new_tokens=4, do_sample=False)
assert tokens.shape[1] > 4
print("done")
"""
    assert run(installed, "-c", code, demo_gguf, tmp_path / "out").splitlines()[-1] == "done"
