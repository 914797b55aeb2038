"""Progress in a log is whole lines, at most so many; on a terminal it is tqdm's bar."""

import re
import sys
import time

import pytest

from aaac_gguf import progress as module
from aaac_gguf.progress import progress

LINE = re.compile(r"(\w+): (\d+) of (\d+|\?) (?:step|weight)s, \d\d:\d\d elapsed, [\d:?]+ left")


@pytest.fixture
def log(monkeypatch, capsys):
    """Standard error as a log's is: captured, no terminal. A line is due every 0.2 s instead of every half minute."""
    monkeypatch.setattr(module, "SECONDS_PER_LINE", 0.2)
    monkeypatch.setattr(module.LogBar, "latest", time.monotonic())
    return capsys


def lines(log) -> list[re.Match]:
    """The log's lines, each whole and with nothing that redraws."""
    text = log.readouterr().err
    assert "\r" not in text
    assert "\x1b" not in text
    assert text == "" or text.endswith("\n")
    found = [LINE.fullmatch(line) for line in text.splitlines()]
    assert None not in found, text
    return found


def test_long_work_prints_a_line_at_every_interval(log):
    start = time.monotonic()
    for _ in progress(range(20), desc="working"):
        time.sleep(0.05)
    found = lines(log)
    assert 2 <= len(found) <= (time.monotonic() - start) / 0.2
    counts = [int(line[2]) for line in found]
    assert counts == sorted(set(counts))
    assert {line[1] for line in found} == {"working"}
    assert {line[3] for line in found} == {"20"}


def test_short_work_prints_nothing(log):
    assert list(progress(range(1000), desc="working")) == list(range(1000))
    assert log.readouterr().err == ""


def test_many_short_works_in_a_row_are_not_silent(log):
    start = time.monotonic()
    for i in range(8):
        for _ in progress(range(10), desc=f"part{i}"):
            time.sleep(0.01)
    assert 2 <= len(lines(log)) <= (time.monotonic() - start) / 0.2


def test_nested_bars_both_print(log):
    for _ in progress(range(3), desc="outer"):
        for _ in progress(range(10), desc="inner"):
            time.sleep(0.03)
    names = [line[1] for line in lines(log)]
    assert names.count("outer") >= 2
    assert names.count("inner") >= 2


def test_a_bar_that_the_caller_updates_and_that_learns_its_total_late(log):
    with progress(desc="building", unit="weight") as bar:
        time.sleep(0.25)
        bar.update(1)
        bar.total = 9
        time.sleep(0.25)
        bar.update(1)
    assert [(line[2], line[3]) for line in lines(log)] == [("1", "?"), ("2", "9")]


def test_a_terminal_gets_one_bar_that_is_redrawn_and_removed(log, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    for _ in progress(range(5), desc="working"):
        time.sleep(0.15)
    text = log.readouterr().err
    assert "\n" not in text
    assert "working:" in text
    assert text.endswith("\r")
