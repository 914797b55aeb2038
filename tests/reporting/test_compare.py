"""Comparing types: bad input, and a small comparison the whole way."""

import json
from pathlib import Path

import pytest
from conftest import write_source

from aaac_gguf import cli, resources
from aaac_gguf.conversion.settings import Settings
from aaac_gguf.errors import AaacError
from aaac_gguf.files.gguf import read
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
        (["--cache-types", "Q8_0,Q4_K"], "--cache-types Q4_K: choose from F32, BF16, Q8_0, Q4_0"),
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


def test_what_both_programs_make_is_there_twice(tmp_path):
    files = compare.candidates(["AAAC4_G16", "Q4_K_M", "IQ3_S", "Q4_K", "some/x.gguf"], tmp_path, "m")
    assert [(file.name, file.path.name, file.program) for file in files] == [
        ("AAAC4_G16", "m-AAAC4_G16.gguf", "aaac-gguf"),
        ("Q4_K_M (llama-quantize)", "m-Q4_K_M-llama-quantize.gguf", "llama-quantize"),
        ("Q4_K_M (aaac-gguf)", "m-Q4_K_M.gguf", "aaac-gguf"),
        ("IQ3_S", "m-IQ3_S-llama-quantize.gguf", "llama-quantize"),
        ("Q4_K", "m-Q4_K.gguf", "aaac-gguf"),
        ("x", "x.gguf", None),
    ]


def test_heads_that_are_no_whole_blocks_of_a_cache_type(tmp_path, rng, refused, monkeypatch):
    """llama.cpp would end with an error after the first file was made."""
    monkeypatch.setattr(compare, "build", lambda: None)
    settings = {"attention.head_count": 4, "embedding_length": 192}
    path = write_source(tmp_path / "s.gguf", {"blk.0.attn_q.weight": rng.normal(size=(64, 192))}, settings=settings)
    flags = ("--text", resources.SAMPLE_TEXT, "--cache-types", "BF16,Q8_0")
    err = refused("compare", path, "-o", tmp_path / "out", *flags)
    assert "--cache-types Q8_0: heads of 48 are not whole blocks of 32; leave it out" in err


def test_files_take_turns_in_the_measurement_of_speed(demo_full, tmp_path, monkeypatch):
    """Take medians: what slows one of three rounds does not count."""
    order, generation = [], iter([10, 20, 1, 2, 12, 22])

    def bench(name, args, log):
        order.append(args[1].name)
        return json.dumps([{"n_gen": 128, "avg_ts": next(generation)}, {"n_gen": 0, "avg_ts": 100}])

    monkeypatch.setattr(compare.tools, "tool_output", bench)
    found = compare.speeds([Path("a"), Path("b")], demo_full, tmp_path / "log")
    assert order == ["a", "b"] * 3
    assert [(prompt, generation[0]) for prompt, generation in found] == [((100, 0), 10), ((100, 0), 20)]


@pytest.mark.llama
def test_a_small_comparison(patched, demo_gguf, tmp_path, monkeypatch):
    """A type of ours, one that both programs make and a finished file, on text that the model writes.

    llama-quantize has an imatrix of the same calibration. All files have a Q4_0 cache too.
    """
    monkeypatch.setattr(compare, "SPEED_ROUNDS", 2)
    settings = Settings(calibration="self", sequences=2, sequence_length=128, feedback=False)
    compare.stock_quantize(demo_gguf, tmp_path / "q8.gguf", "Q8_0", None, "Q8_0")
    options = compare.Options(
        ("AAAC4_G128", "Q4_K_S", str(tmp_path / "q8.gguf")),
        settings=settings,
        n_ctx=128,
        n_chunks=4,
        cache_types=["q4_0"],
    )
    result = compare.compare(resources.MODEL, tmp_path / "out", options)
    ours, theirs, same, finished = result.rows
    names = ["AAAC4_G128", "Q4_K_S (llama-quantize)", "Q4_K_S (aaac-gguf)", "q8"]
    assert [row.name for row in result.rows] == names
    assert same.bits_per_weight == theirs.bits_per_weight
    types = [
        {t.name: t.tensor_type for t in read(tmp_path / "out" / f"demo-Q4_K_S{end}.gguf").tensors.values()}
        for end in ("", "-llama-quantize")
    ]
    assert types[0] == types[1]
    for measured in (result, *result.rows):
        assert list(measured.cache_scores["self-generated.txt"]) == ["Q4_0"]
    with_cache = [row.cache_scores["self-generated.txt"]["Q4_0"].mean_kld for row in (result, *result.rows)]
    assert min(with_cache) > 0
    assert with_cache[4] > 2 * finished.scores["self-generated.txt"].mean_kld  # of Q8_0, the cache costs most
    assert finished.scores["self-generated.txt"].mean_kld < 0.1 * ours.scores["self-generated.txt"].mean_kld
    assert ours.bits_per_weight < theirs.bits_per_weight < finished.bits_per_weight
    assert finished.seconds is None
    assert all(r.prompt_speed[0] > 0 and r.generation_speed[0] > 0 for r in result.rows)
    assert set(ours.codebooks) == {name for name in ours.tensor_errors if name.startswith("blk.")}
    assert set(theirs.tensor_errors) == set(ours.tensor_errors)
    assert "load_imatrix" in (tmp_path / "out" / "demo-Q4_K_S-llama-quantize.log").read_text()
    saved = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert saved["rows"][0]["scores"]["self-generated.txt"]["mean_kld"] == ours.scores["self-generated.txt"].mean_kld
    assert "AAAC4_G128" in (tmp_path / "out" / "comparison.html").read_text()
    assert [
        path.name
        for path in (tmp_path / "out").iterdir()
        if path.name.startswith(".") or path.name.endswith(".partial")
    ] == []
