"""Flags that name code outside this project, and the flags that such code brings."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from genai_jax.config import ConfigError, flag_name, last_value
from genai_jax.outside import load_outside, snake_case


def named_code(argv: Sequence[str], components: Mapping[str, type]) -> dict[str, str]:
    """The outside code that a command line without flagfiles names -> the flag; imports nothing."""
    found = {}
    for flag, outside in _flags(components):
        found |= dict.fromkeys(outside(last_value(argv, flag)), f"--{flag}")
    return found


def own_components(argv: Sequence[str], components: Mapping[str, type]) -> dict[str, type]:
    """The flag components of the outside code that a command line names.

    Such code has flags if it has an attribute `Config`, a frozen dataclass of fields: those of
    "my_package.my_module:MyNetwork" are ``--my_network.*``.

    Raises:
      ConfigError: code that cannot be imported, whose `Config` is not a dataclass of fields, or
        whose flags would be those of another component.
    """
    own: dict[str, type] = {}
    for name, flag in named_code(argv, components).items():
        if (config := getattr(load_outside(flag, name), "Config", None)) is None:
            continue
        component = snake_case(name)
        if component in components or own.get(component, config) is not config:
            raise ConfigError(
                f"{flag}={name} would have the flags --{component}.*, which exist: rename it"
            )
        fields = dataclasses.fields(config) if dataclasses.is_dataclass(config) else ()
        if not fields or not all("help" in f.metadata for f in fields):
            raise ConfigError(
                f"{flag}={name}: its Config is not a dataclass whose fields are declared with "
                "genai_jax.config.field"
            )
        own[component] = config
    return own


def config_of(config: Any, loaded: Any, name: str) -> Any:
    """The flags of outside code within a run's configuration; None if it has none."""
    return getattr(config, snake_case(name)) if hasattr(loaded, "Config") else None


def _flags(components: Mapping[str, type]) -> Iterator[tuple[str, Any]]:
    """The flags that may name outside code, and what finds the names in their values."""
    for component, cls in components.items():
        for f in dataclasses.fields(cls):
            if f.metadata.get("outside"):
                yield flag_name(component, f.name), f.metadata["outside"]
