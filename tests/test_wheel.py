"""The distribution: a wheel made from the sdist, installed elsewhere, has the patch, the kernels and the demo model, and starts."""

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
    where = run(
        installed,
        "-c",
        "from aaac_gguf import patch; print(resources.shipped('patches')); print(resources.shipped('cuda_kernels')); print(patch.digest())",
    )
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
