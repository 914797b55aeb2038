"""Make folders for temporary files whose disk, and whose logs, an error can name."""

from __future__ import annotations

import errno
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import AaacError
from ..resources import cache_dir
from .atomic import PARTIAL

# A disk with less room than this has made whatever was writing to it fail.
_FULL = 1 << 20

_ADVICE = "free space, or name another folder in the variable TMPDIR"


@contextmanager
def temporary_folder(prefix: str, parent: Path | None = None) -> Iterator[Path]:
    """Make a folder for temporary files in `parent`, by default where TMPDIR says, and remove it at the end.

    An error that comes of a full disk becomes one that names the disk. The logs that an error names are kept.
    """
    try:
        made = tempfile.TemporaryDirectory(dir=parent, prefix=prefix, ignore_cleanup_errors=True)
    except OSError as e:
        raise AaacError(f"{parent or tempfile.gettempdir()}: cannot be written: {e.strerror}") from None
    with made as name:
        folder = Path(name)
        try:
            yield folder
        except OSError as e:
            if e.errno in (errno.ENOSPC, errno.EDQUOT):
                raise disk_full(folder.parent) from None
            raise
        except AaacError as e:
            if shutil.disk_usage(folder).free < _FULL and not str(e).startswith(f"{folder.parent}: "):
                raise disk_full(folder.parent) from None
            kept = _kept_logs(folder, str(e))
            if kept == str(e):
                raise
            raise AaacError(kept) from None


@contextmanager
def folder_beside(out: Path) -> Iterator[Path]:
    """Name a folder for temporary files beside an output that nobody else writes, and remove it at the end.

    By its name the next run removes what a killed one left.
    """
    folder = out.with_name(f"{out.name}{PARTIAL}.source")
    shutil.rmtree(folder, ignore_errors=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_room(folder: Path, n_bytes: int) -> None:
    """Raise AaacError unless a folder for temporary files has room for `n_bytes`."""
    free = shutil.disk_usage(folder).free
    if n_bytes > free:
        needed = f"{n_bytes:,} bytes are needed for temporary files"
        raise AaacError(f"{folder.parent}: {needed}, and {free:,} are free; {_ADVICE}")


def disk_full(folder: Path) -> AaacError:
    """Return the error of a disk that temporary files have filled."""
    return AaacError(f"{folder}: the disk is full, which has to hold temporary files; {_ADVICE}")


def _kept_logs(folder: Path, message: str) -> str:
    """Copy the logs in `folder` that a message names into the cache folder. Return the message with their new paths."""
    for log in folder.glob("*.log"):
        if str(log) in message:
            kept = cache_dir() / "logs" / log.name
            try:
                kept.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(log, kept)
            except OSError:
                continue
            message = message.replace(str(log), str(kept))
    return message
