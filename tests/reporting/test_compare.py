"""Comparing types: bad input, and a small comparison the whole way."""

import json
from pathlib import Path

import pytest

from aaac_gguf import cli, resources
from aaac_gguf.conversion.settings import Settings
from aaac_gguf.errors import AaacError
from aaac_gguf.reporting import compare


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--types", "Q9_9"], "--types Q9_9: unknown type; choose from AAAC4_G16, AAAC4_G32, AAAC4_G128, Q4_0"),
        (["--types", "absent.gguf"], "--types absent.gguf: no such file"),
        (["--types", "Q4_0", "--text", "absent.txt"], "--text absent.txt: no such file"),
        (
            ["--text", f"{resources.SAMPLE_TEXT}", "--text", f"{resources.SAMPLE_TEXT}"],
            "--text: two texts of the same name",
        ),
        (["--calib", "self", "--imatrix", "i.gguf"], "--calib and --imatrix: give one of them"),
    ],
)
def test_bad_input(args, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["compare", str(resources.MODEL), *args]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"types": ["Q9_9"]}, r"^`types` Q9_9: unknown type; choose from AAAC4_G16"),
        ({"types": ["absent.gguf"]}, r"^`types` absent\.gguf: no such file"),
        ({"texts": [Path("absent.txt")]}, r"^`texts` absent\.txt: no such file"),
        ({"texts": [resources.SAMPLE_TEXT] * 2}, r"^`texts`: two texts of the same name"),
    ],
)
def test_errors_of_the_library_name_settings(options, message, tmp_path):
    with pytest.raises(AaacError, match=message):
        compare.compare(resources.MODEL, tmp_path / "out", compare.Options(**options))
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_is_not_there(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["compare", "absent"]) == 2
    assert "absent: no such file or directory" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.llama
def test_a_small_comparison(patched, demo_gguf, tmp_path):
    """A type of ours, one of llama.cpp's and a finished file, on text that the model writes.

    llama.cpp's type has an imatrix of the same calibration.
    """
    settings = Settings(calibration="self", sequences=2, sequence_length=128, feedback=False)
    compare.stock_quantize(demo_gguf, tmp_path / "q8.gguf", "Q8_0", None, "Q8_0")
    options = compare.Options(
        ("AAAC4_G128", "Q4_0", str(tmp_path / "q8.gguf")), settings=settings, n_ctx=128, n_chunks=4
    )
    result = compare.compare(resources.MODEL, tmp_path / "out", options)
    ours, theirs, finished = result.rows
    assert (ours.name, theirs.name, finished.name) == ("AAAC4_G128", "Q4_0", "q8")
    assert finished.scores["self-generated.txt"].mean_kld < 0.1 * ours.scores["self-generated.txt"].mean_kld
    assert ours.bits_per_weight < theirs.bits_per_weight < finished.bits_per_weight
    assert finished.seconds is None
    assert all(r.prompt_speed[0] > 0 and r.generation_speed[0] > 0 for r in result.rows)
    assert set(ours.codebooks) == {name for name in ours.tensor_errors if name.startswith("blk.")}
    assert set(theirs.tensor_errors) == set(ours.tensor_errors)
    assert "load_imatrix" in (tmp_path / "out" / "demo-Q4_0.log").read_text()
    saved = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert saved["rows"][0]["scores"]["self-generated.txt"]["mean_kld"] == ours.scores["self-generated.txt"].mean_kld
    assert "AAAC4_G128" in (tmp_path / "out" / "comparison.html").read_text()
    assert [
        path.name
        for path in (tmp_path / "out").iterdir()
        if path.name.startswith(".") or path.name.endswith(".partial")
    ] == []
