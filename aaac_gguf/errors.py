"""The one exception that a user is meant to read."""


class AaacError(ValueError):
    """Bad input. The message is one line that names the file, tensor or flag and says what to do; the CLI exits with status 2."""

    def __init__(self, message: str) -> None:
        # Names out of a damaged file may hold anything: line ends, terminal escapes.
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in message))
