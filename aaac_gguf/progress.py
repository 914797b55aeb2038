"""Show progress: a bar on a terminal, a line every half minute in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

SECONDS_PER_LINE = 30.0


class LogBar(tqdm):
    """A bar for logs. It prints whole lines instead of redrawing one.

    A line is due SECONDS_PER_LINE after this bar's last line. So an outer bar shows each of its long steps. A line is
    also due SECONDS_PER_LINE after the last line of any bar. So many short bars in a row are not silent.
    """

    latest = time.monotonic()  # when any bar printed a line; before the first line, when the program started

    def __init__(self, *args: Any, **options: Any) -> None:
        self.printed = time.monotonic()  # when this bar printed a line; before its first line, when it started
        super().__init__(*args, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        now = time.monotonic()
        if msg != "" and now - min(self.printed, LogBar.latest) >= SECONDS_PER_LINE:  # tqdm clears a bar with ""
            print(msg or str(self), file=self.fp, flush=True)
            self.printed = LogBar.latest = now
        return False  # True would have tqdm print a carriage return when the bar closes


def progress(iterable: Iterable[Any] | None = None, *, desc: str, unit: str = "step", **options: Any) -> Any:
    """Return a tqdm bar over `iterable`, or without one a bar that the caller updates.

    If standard error is not a terminal, the bar prints a line every SECONDS_PER_LINE, and none for short work.
    unit: of the work, in the singular. options: those of tqdm, `total` and `initial` for example.
    """
    if sys.stderr.isatty():
        return tqdm(iterable, desc=desc, unit=unit, leave=False, **options)
    line = "{desc}: {n_fmt} of {total_fmt} {unit}s, {elapsed} elapsed, {remaining} left"
    return LogBar(iterable, desc=desc, unit=unit, leave=False, miniters=1, bar_format=line, **options)
