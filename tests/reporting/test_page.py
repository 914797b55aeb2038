"""The page of a comparison, and its plots."""

import itertools
import re
import xml.etree.ElementTree as ET

import pytest
from comparison_samples import comparison, row

from aaac_gguf.reporting import page


def test_the_page_needs_no_other_file():
    html = page.render(comparison())
    assert not re.search(r"https?:|<script|<link|<img|@import|url\(", html)
    assert "m &amp; m" in html
    assert "&lt;Q5&gt;" in html
    assert "<Q5>" not in html
    plots = [ET.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL)]
    assert len(plots) == 2 + 2 + 1  # a scatter for each text, attn_q and token_embd, one file's codebooks


def test_the_scatter_puts_points_where_they_belong():
    plot = ET.fromstring(page.scatter(comparison().rows, "a.txt"))
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
        float(t.get("y")) for t in ET.fromstring(page.scatter(rows, "a.txt")).iter("text") if t.get("class") == "label"
    )
    assert all(b - a >= 14 for a, b in itertools.pairwise(labels))


@pytest.mark.parametrize("values", [[0.004, 0.017], [1e-5, 2.0], [0.0], [0.01, 0.01]])
def test_axes_hold_their_values(values):
    y, ticks = page.log_axis(values, 10, 110)
    assert 2 <= len(ticks) <= 9
    assert y(ticks[0]) == pytest.approx(110)
    assert y(ticks[-1]) == pytest.approx(10)
    assert all(10 <= y(v) <= 110.001 for v in values)
