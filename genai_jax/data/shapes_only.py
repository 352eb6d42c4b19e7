"""Whether a data set is opened for its examples, or only for their shapes."""

import contextlib
import contextvars
from collections.abc import Iterator

_SHAPES_ONLY = contextvars.ContextVar("shapes_only", default=False)


def only_shapes_matter() -> bool:
    return _SHAPES_ONLY.get()


@contextlib.contextmanager
def shapes_only() -> Iterator[None]:
    """While entered, data that are not prepared stay so: only their shapes will be asked for."""
    before = _SHAPES_ONLY.set(True)
    try:
        yield
    finally:
        _SHAPES_ONLY.reset(before)
