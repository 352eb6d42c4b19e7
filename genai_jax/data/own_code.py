"""Data sets that a function outside this project returns: ``--data.dataset=my_data:my_images``.

The function gets the flags of the data, as `config`, and returns all examples or, as a mapping with
"train" and "validation", those of each split.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from genai_jax.config import ConfigError
from genai_jax.outside import is_outside, load_outside

# What is read by kind, as in text:PATH or addition:3; no function.
KINDS = (
    "text", "images", "hf", "webdataset", "addition", "modular_addition", "modular_division",
)  # fmt: skip
SPLITS = ("train", "validation")


def own_data(dataset: str | None) -> tuple[str, ...]:
    """The outside code that a data set is: (dataset,), or () for one that is read by its name."""
    if dataset is None or not is_outside(dataset) or dataset.partition(":")[0] in KINDS:
        return ()
    return (dataset,)


def read_own(config: Any) -> Any:
    """What the function returns for the flags of the data; called once for both splits.

    Raises:
      ConfigError: it cannot be imported, is not a function, or returns splits of other names.
    """
    return _returned(load_outside("--data.dataset", config.dataset, ["__call__"]), config)


@functools.lru_cache(maxsize=1)
def _returned(function: Callable, config: Any) -> Any:
    returned = function(config)
    if isinstance(returned, Mapping) and set(returned) != set(SPLITS):
        names = ", ".join(map(str, returned)) or "nothing"
        raise ConfigError(
            f"--data.dataset={config.dataset} returned a mapping with {names}; the splits are "
            f"{' and '.join(SPLITS)}"
        )
    return returned
