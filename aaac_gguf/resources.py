"""The user's cache folder, the files that ship with the package, their checksums, and the memory in use."""

from __future__ import annotations

import hashlib
import os
import resource
from pathlib import Path

import platformdirs

DATA = Path(__file__).parent / "data"
MODEL = DATA / "demo"
SAMPLE_TEXT = DATA / "sample.txt"
CALIBRATION_TEXT = Path(__file__).parent / "calibration" / "text" / "mixture.jsonl"


def cache_dir() -> Path:
    """Return the folder for what is fetched, compiled and built: AAAC_CACHE, or else the user's cache folder."""
    return Path(os.environ.get("AAAC_CACHE") or platformdirs.user_cache_path("aaac-gguf"))


def shipped(name: str) -> Path:
    """Return a folder that ships with the package: inside it when installed, beside it in a checkout."""
    package = Path(__file__).parent
    return package / name if (package / name).is_dir() else package.parent / name


def sha256(path: Path) -> str:
    """Return the hex digest of a file."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def peak_bytes() -> int:
    """Return the most memory that this process or one that it started has had."""
    return 1024 * max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
