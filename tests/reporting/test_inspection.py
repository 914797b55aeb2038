"""Check what `inspect` says of a file, and how little it loads for that."""

import re
import subprocess
import sys

import pytest
from gguf_samples import aaac_file

from aaac_gguf import cli
from aaac_gguf.errors import AaacError
from aaac_gguf.files import gguf as gguf_io
from aaac_gguf.reporting import inspection


@pytest.fixture
def file(tmp_path, rng):
    aaac_file(tmp_path / "a.gguf", rng)
    return gguf_io.read(tmp_path / "a.gguf")


def test_every_tensor_and_codebook_is_listed(file):
    text = inspection.inspect_text(file)
    for name, tensor in file.tensors.items():
        assert re.search(rf"^{re.escape(name)} .* {tensor.tensor_type.name} +{tensor.n_bytes:,} ", text, re.MULTILINE)
    for codec in file.codecs.values():
        for book in codec.codebooks:
            assert "  " + " ".join(f"{level:4}" for level in book) in text
    assert f"{len(file.tensors)} tensors, " in text
    assert text.endswith(f"file {file.path.stat().st_size:,} bytes")


def test_a_plot_that_cannot_be_drawn_names_the_setting(file, tmp_path, monkeypatch):
    with pytest.raises(AaacError, match=r"^`plot` .*nothing"):
        inspection.plot_codebooks(file, tmp_path / "out.nothing")
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(AaacError, match=r"^`plot`: needs matplotlib; pip install 'aaac-gguf\[plot\]'"):
        inspection.plot_codebooks(file, tmp_path / "out.png")


@pytest.mark.parametrize("verb", ["inspect", "--help", "inspect --help"])
def test_start_up_loads_neither_torch_nor_transformers(verb, file):
    args = [str(file.path)] if verb == "inspect" else []
    program = f"""
import sys
from aaac_gguf import cli
try:
    status = cli.main({[*verb.split(), *args]!r})
except SystemExit as e:
    status = e.code
sys.exit(status or " ".join(name for name in ("torch", "transformers", "matplotlib") if name in sys.modules) or 0)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


def test_the_verb_prints_the_text(file, capsys):
    assert cli.main(["inspect", str(file.path)]) == 0
    assert capsys.readouterr().out == inspection.inspect_text(file) + "\n"
