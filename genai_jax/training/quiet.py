"""Keeps messages of libraries out of notebooks, whose own logging stays as it is."""

import contextlib
import logging
import os
from collections.abc import Iterator

import absl.logging


class _NotOrbax(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return f"{os.sep}orbax{os.sep}" not in record.pathname


@contextlib.contextmanager
def without_orbax_messages() -> Iterator[None]:
    """Drops what orbax logs: its options at length, and every error that it raises as well."""
    logger, no_orbax = absl.logging.get_absl_logger(), _NotOrbax()
    logger.addFilter(no_orbax)
    try:
        yield
    finally:
        logger.removeFilter(no_orbax)
