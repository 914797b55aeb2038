"""Documents: links lead somewhere, files that are named exist, and README's flags are those of `convert`."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "patches" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
CODE_PATH = re.compile(r"`((?:(?:aaac_gguf|benchmarks|cuda_kernels|docs|patches)/[\w./-]*\w|tests/[\w/]*\.py))`")


def anchors(path):
    """The names that GitHub gives to the headings of a document."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(document):
    broken = []
    for target in LINK.findall(document.read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        path = (document.parent / name).resolve() if name else document
        if not path.exists() or (anchor and anchor not in anchors(path)):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_are_named_exist(document):
    named = CODE_PATH.findall(document.read_text(encoding="utf-8"))
    assert not [name for name in named if "NAME" not in name and not list(ROOT.glob(name))]


def test_every_plot_is_shown():
    shown = {
        (document.parent / target).resolve()
        for document in DOCUMENTS
        for target in LINK.findall(document.read_text(encoding="utf-8"))
        if target.endswith((".svg", ".png"))
    }
    plots = [p for folder in ("docs/images", "benchmarks/results") for p in (ROOT / folder).glob("*.[sp][vn]g")]
    assert plots
    assert not [str(p) for p in plots if p not in shown]


def test_readme_lists_the_flags_of_convert():
    command = [sys.executable, "-m", "aaac_gguf", "convert", "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    flags = set(re.findall(r"--[a-z][a-z-]+", text.partition("positional arguments")[2])) - {"--help"}
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = readme.partition("## Flags of `convert`")[2].partition("\n\nOther verbs")[0]
    assert set(re.findall(r"--[a-z][a-z-]+", table)) == flags
