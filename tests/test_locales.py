"""Any locale and any path: what is printed fits the locale, and a path that is not UTF-8 works or is named."""

import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from comparison_samples import comparison

from aaac_gguf import cli, resources
from aaac_gguf.reporting import compare

ODD = os.fsdecode(b"\xff")


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [("ascii", b"36.000 +- 0.400"), ("iso8859-1", b"36.000 \xb1 0.400"), ("utf-8", "36.000 ± 0.400".encode())],
)
def test_tables_in_any_encoding(monkeypatch, tmp_path, encoding, shown):
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding=encoding))
    monkeypatch.setattr(cli, "compare", lambda *args, **settings: comparison())
    assert cli.main(["compare", str(tmp_path), "-o", ODD]) == 0
    sys.stdout.flush()
    assert shown in out.getvalue()
    assert rb"wrote \xff/comparison.json" in out.getvalue()


@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_output_and_source_with_paths_that_are_not_utf8(source, tmp_path, locale):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xc3\xa9\xff"))
    folder.mkdir()
    odd = folder / f"{ODD}.gguf"
    shutil.copy(source, odd)
    env = os.environ | {"LC_ALL": locale, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}

    def run(*args):
        command = [sys.executable, "-m", "aaac_gguf", *args]
        result = subprocess.run(command, capture_output=True, env=env)
        return result.returncode, result.stdout, result.stderr

    status, out, err = run("convert", odd, "-o", folder / "out.gguf")
    assert status == 0
    assert err.count(b"\n") == 1, err
    assert rb"\xff.gguf: transformers cannot load the tokenizer" in err
    assert rb"\xff/out.gguf: " in out
    status, out, err = run("inspect", folder / "out.gguf", "--plot", folder / f"{ODD}.png")
    assert (status, err) == (0, b"")
    assert (folder / f"{ODD}.png").is_file()
    status, out, err = run("inspect", folder / "missing")
    assert status == 2
    assert rb"\xff/missing: no such file" in err


@pytest.mark.parametrize("name", [ODD, f"in/{ODD}.safetensors"])
def test_a_folder_with_a_name_that_is_not_utf8_is_named(tmp_path, refused, name):
    folder = tmp_path / name.split("/")[0]
    shutil.copytree(resources.MODEL, folder)
    if "/" in name:
        (folder / "model.safetensors").rename(tmp_path / name)
    for verb in ("convert", "compare"):
        err = refused(verb, folder, "-o", tmp_path / "out.gguf")
        assert f"{tmp_path / name}".replace(ODD, r"\xff") in err
        assert "rename it" in err


def test_calibration_beside_an_output_that_is_not_utf8(tmp_path, llama_source):
    text = tmp_path / f"{ODD}.txt"
    shutil.copy(resources.SAMPLE_TEXT, text)
    out = tmp_path / f"{ODD}.gguf"
    flags = ["--calib", str(text), "--calib-sequences", "2", "--calib-length", "64", "--type", "Q4_0"]
    assert cli.main(["convert", str(resources.MODEL), "-o", str(out), *flags]) == 0
    assert out.is_file()


def test_a_comparison_of_a_text_whose_name_is_not_utf8(tmp_path):
    result = comparison()
    result.model = ODD
    compare.write(tmp_path, result)
    assert (tmp_path / "comparison.html").stat().st_size
