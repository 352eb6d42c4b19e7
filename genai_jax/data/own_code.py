"""Data sets that a function outside this project returns: ``--data.dataset=my_data:my_images``.

The function gets the flags of the data, as `config`, and returns all examples or, as a mapping with
"train" and "validation", those of each split.
"""

from collections.abc import Mapping
from typing import Any

from genai_jax.config import ConfigError
from genai_jax.outside import check_call, is_outside, load_outside

FILES = ("text", "images", "hf", "webdataset", "pairs")  # read from a path, as in text:PATH
# No functions.
KINDS = (
    *FILES, "addition", "modular_addition", "modular_division", "repeats", "needles",
    "number_names",
)  # fmt: skip
SPLITS = ("train", "validation")


def own_data(dataset: str | None) -> tuple[str, ...]:
    """The outside code that a data set is: (dataset,), or () for one that is read by its name."""
    if dataset is None or not is_outside(dataset) or dataset.partition(":")[0] in KINDS:
        return ()
    return (dataset,)


def is_users_own(dataset: str) -> bool:
    """Whether a data set is somebody's files or code, which another machine may lack."""
    return dataset.partition(":")[0] in FILES or bool(own_data(dataset))


def read_own(config: Any) -> Any:
    """What the function returns for the flags of the data.

    Raises:
      ConfigError: it cannot be imported, is not a function, or returns splits of other names.
    """
    flag, name = "--data.dataset", config.dataset
    function = load_outside(flag, name, ["__call__"])
    check_call(flag, name, function, 1, "config")
    returned = function(config)
    if isinstance(returned, Mapping) and set(returned) != set(SPLITS):
        names = ", ".join(map(str, returned)) or "nothing"
        raise ConfigError(
            f"--data.dataset={config.dataset} returned a mapping with {names}; the splits are "
            f"{' and '.join(SPLITS)}"
        )
    return returned
