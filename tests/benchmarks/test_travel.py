"""The benchmark of calibration texts on the bundled model."""

import sys
from pathlib import Path

from aaac_gguf import resources

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import travel


def test_each_text_is_best_for_itself(llama_source, monkeypatch, capsys):
    monkeypatch.setattr(travel, "CONTEXT", 64)
    texts = (str(resources.SAMPLE_TEXT), str(resources.CALIBRATION_TEXT))
    sizes = ["--blocks", "1", "--calib-sequences", "8", "--test-sequences", "8"]
    pairs = [arg for text in texts for arg in ("--calib", text, "--test", text)]
    monkeypatch.setattr(sys, "argv", ["travel.py", str(resources.MODEL), *pairs, *sizes])
    travel.main()
    header, *rows = (line.split() for line in capsys.readouterr().out.splitlines())
    assert header == ["calibrated", "on", "sample", "mixture"]
    errors = {row[0]: [float(value) for value in row[1:]] for row in rows}
    assert errors["sample"][0] < 0.8 * errors["mixture"][0]
    assert errors["mixture"][1] < 0.8 * errors["sample"][1]
