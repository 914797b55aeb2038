"""The one exception that a user is meant to read."""


class AaacError(ValueError):
    """Bad input. The message is one line that names the file, tensor or flag and says what to do; the CLI exits with status 2."""
