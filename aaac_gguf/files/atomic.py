"""Write files that appear whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from ..errors import AaacError

PARTIAL = ".partial"  # in the name of everything that is not finished


@contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """Open a file that appears under `path` only if the block ends well.

    It is written as `path`.partial and then renamed. After an error it is removed. Raises AaacError if another process
    is writing there.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        with open_alone(partial) as f:
            try:
                if os.fstat(f.fileno()).st_size:  # left by a run that was killed
                    f.truncate()
                yield f
                f.flush()
                os.fsync(f.fileno())
                os.replace(partial, path)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise
    except BlockingIOError:
        raise AaacError(f"{path}: another aaac-gguf is writing it; wait for it, or choose another output") from None
    except OSError as e:
        raise write_error(path, e) from None


def write_error(path: Path, e: OSError) -> AaacError:
    """Return what to tell the user of an error that happened while `path` was written."""
    if e.errno in (errno.ENOSPC, errno.EDQUOT):
        return AaacError(f"{path}: the disk is full; free space or choose another output")
    other = f" ({e.filename})" if e.filename and not str(e.filename).startswith(str(path)) else ""
    return AaacError(f"{path}: cannot be written: {e.strerror or e}{other}; choose another output")


def open_alone(path: Path) -> BinaryIO:
    """Open `path` to read and write, and lock it until it is closed. The file is made if it is missing.

    Raises BlockingIOError if another process holds the lock.
    """
    while True:
        f = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            f.close()
            raise
        except OSError:  # a file system without locks
            return f
        # Whoever held the lock may have renamed or removed the file since it was opened here.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(f.fileno()), os.stat(path)):
                return f
        f.close()


def sync_folder(folder: Path) -> None:
    """Make the names in a folder last: a rename is on disk only after this."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
