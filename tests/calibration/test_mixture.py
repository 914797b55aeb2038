"""The bundled calibration text parses, keeps its shares in every part, and has no long or doubled piece."""

import json
from collections import Counter
from pathlib import Path

import pytest

import aaac_gguf.calibration

TEXT = Path(aaac_gguf.calibration.__file__).parent / "text"
SHARES = {"web": 0.30, "prose": 0.15, "code": 0.15, "math": 0.10, "dialogue": 0.15, "languages": 0.15}


@pytest.fixture(scope="module")
def pieces():
    return [json.loads(line) for line in (TEXT / "mixture.jsonl").read_text(encoding="utf-8").splitlines()]


def content(piece):
    return piece["text"] if "text" in piece else "\n".join(m["content"] for m in piece["messages"])


def test_form(pieces):
    for piece in pieces:
        assert set(piece) == {"kind", "messages" if piece["kind"] == "dialogue" else "text"}
        if piece["kind"] == "dialogue":
            roles = [m["role"] for m in piece["messages"]]
            turns = roles[1:] if roles[0] == "system" else roles
            assert turns == ["user", "assistant"] * (len(turns) // 2)
            assert turns
            assert all(set(m) == {"role", "content"} and m["content"].strip() for m in piece["messages"])
        else:
            assert piece["text"].strip()


@pytest.mark.parametrize("quarters", [(0, 4), (0, 1), (1, 2), (2, 3), (3, 4)])
def test_shares(pieces, quarters):
    first, end = (q * len(pieces) // 4 for q in quarters)
    sizes = Counter()
    for piece in pieces[first:end]:
        sizes[piece["kind"]] += len(content(piece))
    assert {kind: size / sizes.total() for kind, size in sizes.items()} == pytest.approx(SHARES, abs=0.02)


def test_size_and_no_doubles(pieces):
    texts = [content(piece) for piece in pieces]
    assert 800_000 < sum(map(len, texts)) < 1_100_000
    assert max(map(len, texts)) <= 3000
    assert len({" ".join(text.split()).casefold() for text in texts}) == len(texts)


def test_licences_are_beside_it():
    licences = (TEXT / "LICENSES.txt").read_text(encoding="utf-8")
    for name in ("MIT", "BSD-3-Clause", "PostgreSQL", "PSF-2.0", "Apache-2.0"):
        assert name in (TEXT / "README.md").read_text(encoding="utf-8")
        assert f"\n{name}" in licences
