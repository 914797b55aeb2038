"""The one exception that a user is meant to read."""


class AaacError(ValueError):
    """Bad input, in one line that names the file, the tensor or the setting and says what to do.

    Settings are in backquotes, which the command line replaces by flags; it exits with status 2.
    """

    def __init__(self, message: str) -> None:
        # Names from a damaged file may hold anything: line ends, terminal escapes.
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in message))
