"""The exception and the warning that a user is meant to read."""

from __future__ import annotations

import warnings


class AaacError(ValueError):
    """Bad input, in one line that names the file, the tensor or the setting and says what to do.

    Settings are in backquotes, which the command line replaces by flags; it exits with status 2.
    """

    def __init__(self, message: str) -> None:
        # Names from a damaged file may hold anything: line ends, terminal escapes.
        super().__init__(printable(message))


def escaped(character: str) -> str:
    """Return a character as an escape in ASCII. Python has a byte of a path that is no text as U+DC80 to U+DCFF."""
    if "\udc80" <= character <= "\udcff":
        return f"\\x{ord(character) - 0xDC00:02x}"
    return ascii(character)[1:-1]


def printable(text: str) -> str:
    """Return a text with escapes for all characters that have no picture."""
    return "".join(c if c.isprintable() else escaped(c) for c in text)


class AaacWarning(UserWarning):
    """A file is made all the same, and something about it is worth knowing. Settings are in backquotes."""


def warn(message: str) -> None:
    """Warn the user. The command line prints the message at once."""
    warnings.warn(message, AaacWarning, stacklevel=3)
