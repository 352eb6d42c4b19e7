"""A network from outside this project, in place of one that a flag could choose."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from genai_jax.config import Config, ConfigError
from genai_jax.outside import load_outside
from genai_jax.outside_flags import config_of

EVERYWHERE = ((r"", (...,)),)  # partition rules of a network without any: each device has it all


def outside_network(
    flag: str,
    name: str,
    config: Config,
    given: Mapping[str, Any],
    needs: Mapping[str, str] | None = None,
    methods: Sequence[str] = (),
) -> nn.Module:
    """An instance of the class that a flag names; its fields are filled by name.

    Args:
      flag: "--diffusion.network".
      name: "my_package.my_module:MyNetwork".
      config: of the run.
      given: values for fields that the class may declare, besides `config`, its own flags, and
        `dtype`, that of the matmuls.
      needs: field that the class must declare -> the flag because of which.
      methods: what it must have.

    Raises:
      ConfigError: it is not a Flax module, lacks a field or method, or has a field without a value.
    """
    cls = load_outside(flag, name, methods)
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise ConfigError(f"{flag}={name} is not a class of flax.linen.Module")
    values, needs = {**given, "dtype": jnp.dtype(config.run.dtype)}, dict(needs or {})
    if (own := config_of(config, cls, name)) is not None:
        values["config"] = own
    if config.run.dtype != "float32":
        needs["dtype"] = f"--dtype={config.run.dtype}"
    declared = {f.name: f for f in dataclasses.fields(cls) if f.name not in ("parent", "name")}
    for field, why in needs.items():
        if field not in declared:
            raise ConfigError(f"{flag}={name} has no field {field}, which {why} needs")
    for field, f in declared.items():
        bare = f.default is f.default_factory is dataclasses.MISSING
        if bare and field not in values:
            raise ConfigError(
                f"{flag}={name} has a field {field} without a default; those that are filled are "
                f"{', '.join(values)}"
            )
    return cls(**{field: values[field] for field in declared if field in values})


def partition_rules_of(network: nn.Module) -> Sequence[tuple[str, tuple]]:
    return getattr(type(network), "PARTITION_RULES", EVERYWHERE)


def with_fields(network: nn.Module, **values: Any) -> nn.Module:
    """A copy with other values in those of the fields that the network has."""
    declared = {f.name for f in dataclasses.fields(network)}
    return network.clone(**{name: x for name, x in values.items() if name in declared})
