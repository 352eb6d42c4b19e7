"""The error of a user's mistake, and how its text is shown."""


class ConfigError(ValueError):
    """A mistake by the user, in one line that names the value and what is allowed."""

    def _render_traceback_(self) -> list[str]:
        """What notebooks show: IPython calls this."""
        return [f"{type(self).__name__}: {printable(str(self))}"]


class MissingFile(ConfigError):
    """What the flag `flag` names is not there; it may have moved since the run began."""

    def __init__(self, message: str, flag: str):
        super().__init__(message)
        self.flag = flag


class NothingHeldOut(ConfigError):
    """A data set of a single document, which is all trained on."""


class NotFinite(ConfigError):
    """Samples with values that are not finite; `what` says how many, without any advice."""

    def __init__(self, count: int, total: int):
        self.what = f"{count} of {total} samples have values that are not finite"
        super().__init__(
            f"{self.what}: nothing is written; try other sampling flags or another checkpoint"
        )


def printable(text: str) -> str:
    """`text` on one line, without anything that a terminal would obey."""
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
