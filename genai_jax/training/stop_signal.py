"""SIGTERM and SIGINT ask a run to save and leave; a second one ends it at once."""

import signal


class Stopped(Exception):
    """Raised where work is abandoned because a signal arrived."""


class StopSignal:
    """While entered, remembers the first SIGTERM or SIGINT in `received`."""

    def __init__(self):
        self.received: int | None = None
        self._before = {}

    def __enter__(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number, _frame):
        self.received = number
        for each in self._before:
            signal.signal(each, signal.SIG_DFL)

    def watch(self, items):
        """Passes `items` on, and raises `Stopped` once a signal has arrived."""
        for item in items:
            if self.received:
                raise Stopped
            yield item
