"""The error of a user's mistake."""


class ConfigError(ValueError):
    """A mistake by the user, in one line that names the value and what is allowed."""
