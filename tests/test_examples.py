"""The examples run as the documents say, and every file that an example folder lists is there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import families
import pytest

from aaac_gguf.files import gguf as gguf_io
from aaac_gguf.llama import tools
from aaac_gguf.resources import SAMPLE_TEXT

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"


def run_example(name, *args, cwd):
    """Run one example with this interpreter's programs first on PATH, and return what it prints."""
    program = [sys.executable, EXAMPLES / name] if name.endswith(".py") else ["bash", EXAMPLES / name]
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    result = subprocess.run([*program, *args], cwd=cwd, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_examples_readme_lists_every_example():
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for path in EXAMPLES.iterdir():
        assert path.name == "README.md" or f"({path.name})" in text


def test_quantize_tensor_has_less_output_error_with_hessian(tmp_path):
    out = run_example("quantize_tensor.py", cwd=tmp_path)
    errors = {line[:26].strip(): float(line.split()[-1]) for line in out.splitlines() if "outputs" in line}
    assert errors["with the hessian"] < 0.8 * errors["with importance"] < 0.8 * errors["the weights alone"]
    assert "4.500 bits per weight" in out


def test_quantize_tensor_takes_weight_and_importance_files(tmp_path, rng):
    import numpy as np

    np.save(tmp_path / "w.npy", rng.normal(size=(8, 128)).astype(np.float32))
    np.save(tmp_path / "i.npy", rng.uniform(1, 2, size=128).astype(np.float32))
    out = run_example("quantize_tensor.py", "w.npy", "--importance", "i.npy", "--type", "AAAC4_G128", cwd=tmp_path)
    assert "4.125 bits per weight" in out
    assert "with importance" in out


@pytest.mark.slow
def test_quantize_folder_writes_the_bundled_model(tmp_path):
    out = run_example("quantize_folder.py", "--sequences", "4", cwd=tmp_path)
    file = gguf_io.read(tmp_path / "model.gguf")
    assert file.tensors["blk.0.attn_q.weight"].tensor_type.name == "AAAC4_G16"
    assert "model.gguf: " in out
    assert "float32 (256, 256)" in out


@pytest.mark.slow
def test_run_in_transformers_goes_on_after_the_prompt(tmp_path):
    out = run_example("run_in_transformers.py", "--prompt", "The old gentleman", "--tokens", "16", cwd=tmp_path)
    assert out.startswith("The old gentleman")
    assert len(out.split()) > 5


@pytest.fixture
def tiny(tmp_path):
    """A model that is quickly converted."""
    return families.save(families.DENSE["Llama 3"](), tmp_path / "tiny")


@pytest.mark.slow
@pytest.mark.llama
def test_from_gguf_and_imatrix_verifies_its_file(tiny, tmp_path, patched):
    full = tmp_path / "full.gguf"
    tools.convert_hf(tiny, full, "f16")
    out = run_example("from_gguf_and_imatrix.sh", full, SAMPLE_TEXT, tmp_path, cwd=tmp_path)
    assert out.rstrip().endswith("verified")
    file = gguf_io.read(tmp_path / "model.gguf")
    assert '"source": "imatrix"' in file.get("aaac.calibration")


@pytest.mark.slow
@pytest.mark.llama
def test_compare_types_prints_a_row_for_each_type(tiny, tmp_path, patched):
    out = run_example("compare_types.py", tiny, "--types", "AAAC4_G16,IQ4_NL", "--calibration", "none", cwd=tmp_path)
    rows = re.finditer(r"^(\w+(?: \(\S+\))?) +[\d,]+ +([\d.]+)", out, re.MULTILINE)
    klds = {row[1]: float(row[2]) for row in rows}
    assert klds["AAAC4_G16"] < klds["IQ4_NL (llama-quantize)"]
    assert (tmp_path / "comparison" / "comparison.html").is_file()
