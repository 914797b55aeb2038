"""Show progress: a bar on a terminal, a line every half minute in a log."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

SECONDS_PER_LINE = 30.0


class _Lines(tqdm):
    """Print whole lines instead of redrawing one, for logs."""

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        if msg != "":  # tqdm clears a bar by displaying nothing
            print(msg or str(self), file=sys.stderr, flush=True)
        return True


def progress(iterable: Iterable[Any] | None = None, *, desc: str, **options: Any) -> Any:
    """Return a tqdm bar over `iterable`, or one that the caller updates.

    Where standard error is no terminal, work that takes longer than SECONDS_PER_LINE prints a line at that interval.
    options: those of tqdm, `total`, `unit` and `initial` for example.
    """
    if sys.stderr.isatty():
        return tqdm(iterable, desc=desc, leave=False, **options)
    rhythm = {"mininterval": SECONDS_PER_LINE, "delay": SECONDS_PER_LINE, "miniters": 1}
    return _Lines(iterable, desc=desc, leave=False, **rhythm, **options)
