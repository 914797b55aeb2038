"""Apply the llama.cpp patch, our new files and insertions into upstream's, to the pinned version or to another.

A hunk of `patches/*.patch` has no context. Its line number is exact for the pinned version and means nothing for any
other. So into another version each insertion is merged three ways, with the pristine pinned source as the common
ancestor. It goes between its two neighbours, wherever they are. If upstream changed these, it is reported.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import tempfile
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ..errors import AaacError
from ..resources import shipped


@dataclass(frozen=True)
class Upstream:
    """The source distribution that the patch is made for: the content of patches/UPSTREAM.toml."""

    package: str
    version: str
    sha256: str
    folder: str


@dataclass(frozen=True)
class Hunk:
    """Lines to insert after line `after` of one upstream file. Lines count from 1, and 0 is the top."""

    file: PurePosixPath
    after: int
    lines: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.file}:{self.after}: {self.lines[0].strip()}"


def upstream() -> Upstream:
    """Return the pinned source distribution."""
    with open(shipped("patches") / "UPSTREAM.toml", "rb") as f:
        table = tomllib.load(f)
    return Upstream(**{key: table[key] for key in Upstream.__dataclass_fields__})


def new_files() -> dict[PurePosixPath, Path]:
    """Return our new files by their place in llama.cpp's tree."""
    new = shipped("patches") / "new"
    files = {PurePosixPath(path.relative_to(new)): path for path in sorted(new.rglob("*")) if path.is_file()}
    for header in sorted(shipped("cuda_kernels").glob("*.cuh")):
        files[PurePosixPath("ggml/src") / header.name] = header
    return files


def hunks() -> list[Hunk]:
    """Return our insertions into upstream's files. Raises AaacError for a patch that does anything but insert."""
    found: list[Hunk] = []
    for path in sorted(shipped("patches").glob("*.patch")):
        file, after, lines = PurePosixPath(), 0, 0
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True), 1):
            if lines and line.startswith("+"):
                lines -= 1
                found[-1] = Hunk(file, after, (*found[-1].lines, line[1:]))
            elif not lines and line.startswith("+++ b/"):
                file = PurePosixPath(line[6:].strip())
            elif not lines and (header := re.match(r"@@ -(\d+),0 \+\d+(?:,(\d+))? @@", line)):
                after, lines = int(header[1]), int(header[2] or 1)
                found.append(Hunk(file, after, ()))
            elif lines or not line.startswith(("diff ", "index ", "--- ")):
                raise AaacError(
                    f"{path}:{number}: not an insertion without context; write the patch as docs/patch.md says"
                )
    return found


def summary() -> str:
    """Return a line that says how much of upstream the patch touches."""
    inserted = hunks()
    n_lines, n_files = sum(len(h.lines) for h in inserted), len({h.file for h in inserted})
    insertions = f"{n_lines} lines in {len(inserted)} insertions into {n_files} files of llama.cpp"
    return f"patch: {insertions}, {len(new_files())} new files"


def digest() -> str:
    """Return 12 hex digits that name the patch's content."""
    value = hashlib.sha256()
    patches = shipped("patches")
    for path in (*new_files().values(), patches / "UPSTREAM.toml", *sorted(patches.glob("*.patch"))):
        value.update(path.read_bytes())
    return value.hexdigest()[:12]


def apply(tree: Path, pinned: Path) -> list[Hunk]:
    """Copy our new files into a llama.cpp source tree and insert the hunks.

    pinned: the pristine source that the hunks' line numbers belong to. It may be `tree` itself.
    Returns the hunks that find no place in `tree`.
    """
    for place, path in new_files().items():
        (tree / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, tree / place)
    by_file: dict[PurePosixPath, list[Hunk]] = {}
    for hunk in hunks():
        by_file.setdefault(hunk.file, []).append(hunk)
    failed = []
    for file, group in by_file.items():
        if not (tree / file).is_file():
            failed += group
            continue
        base, text = _read(pinned / file), _read(tree / file)
        if text == base:
            text = _insert(base, group)
        else:
            for hunk in group:
                merged = _merge(text, base, _insert(base, [hunk]))
                if merged is None:
                    failed.append(hunk)
                else:
                    text = merged
        (tree / file).write_text(text, encoding="utf-8", newline="")
    return failed


def _read(path: Path) -> str:
    with open(path, encoding="utf-8", newline="") as f:
        return f.read()


def _insert(text: str, group: Sequence[Hunk]) -> str:
    lines = text.splitlines(keepends=True)
    for hunk in sorted(group, key=lambda h: h.after, reverse=True):
        if hunk.after > len(lines):
            lengths = f"has {len(lines)} lines, the patch inserts after line {hunk.after}"
            raise AaacError(f"{hunk.file}: {lengths}; it is made for {upstream().version}")
        lines[hunk.after : hunk.after] = hunk.lines
    return "".join(lines)


def _merge(text: str, base: str, other: str) -> str | None:
    """Return `text` with the changes from `base` to `other`, or None if both changed the same place."""
    if not shutil.which("git"):
        raise AaacError("git: not found; install it, `git merge-file` fits the patch to another llama.cpp")
    with tempfile.TemporaryDirectory(prefix="aaac-merge-") as scratch:
        paths = [Path(scratch) / name for name in ("text", "base", "other")]
        for path, content in zip(paths, (text, base, other), strict=True):
            path.write_text(content, encoding="utf-8", newline="")
        result = subprocess.run(["git", "merge-file", "-p", "-q", *paths], capture_output=True)
    return None if result.returncode else result.stdout.decode("utf-8")
