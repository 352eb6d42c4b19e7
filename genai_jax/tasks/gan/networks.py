"""The players' networks, as ``--generator.network`` and ``--critic.network`` choose them."""

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp

from genai_jax.config import Config, ConfigError, name_flags, refuse_set
from genai_jax.networks.adversarial import critic, generator
from genai_jax.networks.adversarial.critic import Critic
from genai_jax.networks.adversarial.generator import Generator
from genai_jax.tasks.outside_network import outside_network, partition_rules_of

PLAYERS = ("generator", "critic")
_CLASSES = {"generator": Generator, "critic": Critic}
_MODULES = {"generator": generator, "critic": critic}
_METHODS = {"generator": ("styles", "synthesize"), "critic": ()}
# Flags of a generator that hold for one from outside as well.
_SHARED = ("network", "latent_dim")


def player(
    name: str, config: Config, shape: tuple[int, ...], label_sizes: tuple[int, ...]
) -> nn.Module:
    """The network of a player, which has the methods of `Generator` or `Critic`.

    Args:
      name: one of PLAYERS.
      config: of the run.
      shape: (*space, channels) of an image.
      label_sizes: number of values of each attribute to condition on; empty for none.

    Raises:
      ConfigError: it does not support such images, or a flag that it does not use is set.
    """
    component, grows = getattr(config, name), bool(config.gan.grow_from)
    given = dict(shape=shape, label_sizes=label_sizes, grows=grows)
    if component.network in _MODULES[name].NETWORKS:
        try:
            component.check_shape(shape, grows)
        except ValueError as error:
            raise ConfigError(name_flags(str(error), name, type(component))) from None
        return _CLASSES[name](component, **given, dtype=jnp.dtype(config.run.dtype))
    flag = f"--{name}.network"
    unused = [f for f in component.__dataclass_fields__ if f not in _SHARED]
    refuse_set(name, component, unused, f"has no effect with {flag}={component.network}")
    needs = {"label_sizes": "--gan.condition=class"} if label_sizes else {}
    needs |= {"grows": "--gan.grow_from"} if grows else {}
    if name == "generator":
        given["latent_dim"] = component.latent_dim
    return outside_network(flag, component.network, config, given, needs, _METHODS[name])


def player_rules(name: str, config: Config, network: nn.Module) -> Sequence[tuple[str, tuple]]:
    """Partition rules of a player's network."""
    module = _MODULES[name]
    own = getattr(config, name).network not in module.NETWORKS
    return partition_rules_of(network) if own else module.PARTITION_RULES
