"""The error of a user's mistake."""


class ConfigError(ValueError):
    """A mistake by the user, in one line that names the value and what is allowed."""


class MissingFile(ConfigError):
    """What the flag `flag` names is not there; it may have moved since the run began."""

    def __init__(self, message: str, flag: str):
        super().__init__(message)
        self.flag = flag
