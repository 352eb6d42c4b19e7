"""Tasks that lack something."""


class Incomplete:
    components = {}  # noqa: RUF012

    def init(self, key):
        return {}, {}
