"""The denoising network that ``--diffusion.network`` chooses."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from genai_jax.config import Config, ConfigError, name_flags
from genai_jax.networks.image import dit, unet
from genai_jax.networks.image.dit import Dit, DitConfig
from genai_jax.networks.image.unet import Unet, UnetConfig
from genai_jax.outside import check_call
from genai_jax.tasks.arrays.data import ArrayData
from genai_jax.tasks.outside_network import outside_network, partition_rules_of

NETWORKS = {
    "unet": (Unet, UnetConfig, unet.PARTITION_RULES),
    "dit": (Dit, DitConfig, dit.PARTITION_RULES),
}
FLAG = "--diffusion.network"


def denoising_network(
    config: Config, data: ArrayData, sample_shape: tuple[int, ...], *, uses_step_size: bool
) -> tuple[nn.Module, Sequence[tuple[str, tuple]]]:
    """The network and its partition rules.

    A network maps (x [batch, *space, channels], noise level [batch], `Condition`, step size [batch]
    or None) to the shape of x.

    Args:
      config: of the run.
      data: of the run.
      sample_shape: of what is denoised, (*space, channels).
      uses_step_size: whether the step size of a solver is an input.
    """
    chosen = config.diffusion
    channels = sample_shape[-1]
    given = dict(
        label_sizes=data.conditional_labels(chosen.condition, "--diffusion.condition"),
        vocab_size=data.loader.vocab_size if chosen.condition == "text" else 0,
        uses_step_size=uses_step_size,
        backend=config.run.attention,
    )
    if chosen.network in NETWORKS:
        cls, _, rules = NETWORKS[chosen.network]
        parallel = {"parallel": config.parallel} if chosen.network == "dit" else {}
        shape, dtype = getattr(config, chosen.network), jnp.dtype(config.run.dtype)
        return cls(shape, channels, **given, **parallel, dtype=dtype), rules
    field = {"class": "label_sizes", "text": "vocab_size"}.get(chosen.condition)
    needs = {field: f"--diffusion.condition={chosen.condition}"} if field else {}
    if uses_step_size:
        needs["uses_step_size"] = "--few_step.method"
    given["channels"] = channels
    network = outside_network(FLAG, chosen.network, config, given, needs)
    return network, partition_rules_of(network)


def check_network(network: nn.Module, config: Config, inputs: tuple):
    """Raises `ConfigError` if the network does not support such inputs, or changes their shape."""
    name, (x, *_) = config.diffusion.network, inputs
    if name not in NETWORKS:
        check_call(FLAG, name, network, 4, "x, noise, condition, step_size")
    try:
        variables = jax.eval_shape(network.init, jax.random.key(0), *inputs)
    except ValueError as error:  # sizes that the network does not support
        if name not in NETWORKS:
            raise
        message = name_flags(str(error), name, NETWORKS[name][1])
        raise ConfigError(f"--data.dataset={config.data.dataset}: {message}") from None
    if name in NETWORKS:
        return
    if others := sorted(set(variables) - {"params"}):
        raise ConfigError(
            f"{FLAG}={name} has the collections {', '.join(others)}; denoising networks have "
            "parameters only"
        )
    output: Any = jax.eval_shape(network.apply, variables, *inputs)
    if getattr(output, "shape", None) != x.shape:
        returned = getattr(output, "shape", f"a {type(output).__name__}")
        raise ConfigError(f"{FLAG}={name} returns {returned} for x of shape {x.shape}")
    if not variables:
        raise ConfigError(f"{FLAG}={name} has no parameters to train")
