"""The figures of README and docs/."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import plot_figures as plot

TABLES = """
## A real checkpoint: Small-1.5B

| mean KL divergence | bytes | one | two |
|---|---|---|---|
| **`AAAC4_G16`, the default** | 1,000 | **0.01 ± 0.001** | 0.04 ± 0.002 |
| ratio | | 0.4 | 0.3 |

| 99.9 % quantile | one |
|---|---|
| Q4_0 | 3 |

## Another model

| mean KL divergence | bytes | one |
|---|---|---|
| Q4_0 | 1,000 | 0.5 |
"""


def test_tables_of_real_models_are_read():
    models = plot.read_tables(TABLES)
    assert list(models) == ["Small-1.5B"]
    (point,) = models["Small-1.5B"]
    assert (point.name, point.n_bytes) == ("`AAAC4_G16`, the default", 1000)
    assert point.divergence == pytest.approx(0.02)


def test_the_committed_figure_is_that_of_the_tables(tmp_path):
    plot.draw_quality(plot.ROOT / "docs" / "results.md", tmp_path / "quality.svg")
    assert (tmp_path / "quality.svg").read_bytes() == (plot.ROOT / "docs" / "images" / "quality.svg").read_bytes()
