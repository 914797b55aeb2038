"""Comparing types: bad input, the tables and the page, and a small comparison the whole way."""

import itertools
import json
import re
import xml.etree.ElementTree as ET

import pytest

from aaac_gguf import cli, resources
from aaac_gguf.conversion.settings import Settings
from aaac_gguf.llama import evaluate
from aaac_gguf.reporting import compare, page
from aaac_gguf.reporting import tables as report


def score(kld):
    return evaluate.Score(37.0, 0.5, kld, kld / 10, 10 * kld, 20 * kld, 1.5, 96.0)


def row(name, n_bytes, kld, layers=3):
    errors = {f"blk.{i}.attn_q.weight": kld * (i + 1) for i in range(layers)} | {"token_embd.weight": 1e-4}
    books = {"blk.0.attn_q.weight": [list(range(-8, 8)), list(range(-7, 9))]} if name.startswith("AAAC") else {}
    return compare.Row(
        name,
        n_bytes,
        4.5,
        12.0,
        (100.0, 1.0),
        (50.0, 0.5),
        {"a.txt": score(kld), "b.txt": score(2 * kld)},
        errors,
        books,
    )


@pytest.fixture
def result():
    rows = [row("AAAC4_G16", 4_500_000, 0.004), row("Q4_0", 4_500_000, 0.017), row("<Q5>", 5_500_000, 0.0041)]
    texts = {"a.txt": "1" * 64, "b.txt": "2" * 64}
    return compare.Comparison(
        "m & m",
        "BF16",
        9_000_000,
        texts,
        {"n_ctx": 256, "n_chunks": 8},
        {"a.txt": (36.0, 0.4), "b.txt": (40.0, 0.4)},
        rows,
    )


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


def test_a_source_that_is_not_there(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["compare", "absent"]) == 2
    assert "absent: no such file or directory" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_tables(result):
    text = report.comparison_text(result)
    for cell in (
        "4,500,000",
        "12.0 s",
        "100.0 ± 1.0",
        "50.0 ± 0.5",
        "36.000 ± 0.400",
        "0.00400 ± 0.00040",
        "0.0400",
        "0.0800",
        "1.50 %",
        "96.00 %",
    ):
        assert cell in text, cell
    assert text.index("a.txt") < text.index("0.00400") < text.index("b.txt") < text.index("0.00800")


def test_the_page_needs_nothing_else(result):
    html = page.render(result)
    assert not re.search(r"https?:|<script|<link|<img|@import|url\(", html)
    assert "m &amp; m" in html
    assert "&lt;Q5&gt;" in html
    assert "<Q5>" not in html
    plots = [ET.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL)]
    assert len(plots) == 2 + 2 + 1  # a scatter for each text, attn_q and token_embd, one file's codebooks


def test_the_scatter_puts_points_where_they_belong(result):
    plot = ET.fromstring(page._scatter(result.rows, "a.txt"))
    points = {
        g.find("title").text.split(":")[0]: (float(g.find("circle").get("cx")), float(g.find("circle").get("cy")))
        for g in plot.iter("g")
    }
    assert points["AAAC4_G16"][1] > points["<Q5>"][1] > points["Q4_0"][1]  # less divergence lies lower
    assert points["AAAC4_G16"][0] == points["Q4_0"][0] < points["<Q5>"][0]
    for x, y in points.values():
        assert 70 < x < 830
        assert 14 <= y <= 334


def test_labels_do_not_overlap():
    rows = [row(f"T{i}", 4_500_000, 0.004 + 0.00001 * i) for i in range(5)]
    labels = sorted(
        float(t.get("y")) for t in ET.fromstring(page._scatter(rows, "a.txt")).iter("text") if t.get("class") == "label"
    )
    assert all(b - a >= 14 for a, b in itertools.pairwise(labels))


@pytest.mark.parametrize("values", [[0.004, 0.017], [1e-5, 2.0], [0.0], [0.01, 0.01]])
def test_axes_hold_their_values(values):
    y, ticks = page._log_axis(values, 10, 110)
    assert 2 <= len(ticks) <= 9
    assert y(ticks[0]) == pytest.approx(110)
    assert y(ticks[-1]) == pytest.approx(10)
    assert all(10 <= y(v) <= 110.001 for v in values)


@pytest.mark.llama
def test_a_small_comparison(patched, demo_gguf, tmp_path):
    """A type of ours, one of llama.cpp's and a finished file, on text that the model writes; the imatrix comes from the same calibration."""
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
