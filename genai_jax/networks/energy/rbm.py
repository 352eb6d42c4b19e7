"""The restricted Boltzmann machine: binary units in two layers, and what is known of them exactly.

Parameters are {"weights" [visible, hidden], "visible_bias" [visible], "hidden_bias" [hidden]}.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np


def init(rng: jax.Array, num_visible: int, num_hidden: int, mean: jax.Array) -> dict:
    """Small weights, and visible biases that alone would give the data its mean [visible]."""
    scale = 0.1 / (num_visible + num_hidden) ** 0.5
    return {
        "weights": scale * jax.random.normal(rng, (num_visible, num_hidden)),
        "visible_bias": jax.scipy.special.logit(jnp.clip(mean, 0.01, 0.99)),
        "hidden_bias": jnp.zeros(num_hidden),
    }


def hidden_logits(params: dict, v: jax.Array) -> jax.Array:
    """[..., visible] -> [..., hidden]."""
    return v @ params["weights"] + params["hidden_bias"]


def visible_logits(params: dict, h: jax.Array) -> jax.Array:
    """[..., hidden] -> [..., visible]."""
    return h @ params["weights"].T + params["visible_bias"]


def free_energy(params: dict, v: jax.Array) -> jax.Array:
    """-log of the sum of exp(-energy) over the hidden units: [..., visible] -> [...], nats."""
    hidden = jnp.sum(jax.nn.softplus(hidden_logits(params, v)), -1)
    return -v @ params["visible_bias"] - hidden


def sweep(params: dict, v: jax.Array, rng: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Hidden units given the visible ones, and these anew: (v, its probabilities), as `v`."""
    hidden_rng, visible_rng = jax.random.split(rng)
    h = _binary(hidden_rng, hidden_logits(params, v))
    logits = visible_logits(params, h)
    return _binary(visible_rng, logits), jax.nn.sigmoid(logits)


def gibbs(params: dict, v: jax.Array, rng: jax.Array, sweeps: int) -> tuple[jax.Array, jax.Array]:
    """`sweeps` sweeps, at least one."""
    step = lambda carry, rng: (sweep(params, carry[0], rng), None)
    return jax.lax.scan(step, (v, v), jax.random.split(rng, sweeps))[0]


def exact_log_z(params: dict) -> float:
    """The log-normalizer by enumeration of the smaller layer, of at most 20 units; float64."""
    visible, hidden = np.shape(params["weights"])
    names = ("weights", "visible_bias", "hidden_bias")
    w, a, b = (np.asarray(params[name], np.float64) for name in names)
    if hidden < visible:
        w, a, b, visible = w.T, b, a, hidden
    if visible > 20:
        raise ValueError(f"{visible} units in the smaller layer are too many to enumerate")
    states = np.array(list(itertools.product((0.0, 1.0), repeat=visible)))
    return float(np.logaddexp.reduce(states @ a + np.logaddexp(0, states @ w + b).sum(1)))


def annealed_log_z(
    params: dict, base_bias: jax.Array, rng: jax.Array, *, chains: int, temperatures: int
) -> tuple[jax.Array, jax.Array]:
    """The log-normalizer by annealed importance sampling (Neal 2001).

    From independent visible units of biases `base_bias` through `temperatures` machines, in which
    the weights grow and the biases go over, to this one (Salakhutdinov and Murray 2008, section 3).

    Returns:
      The estimate, and the standard error of the mean weight relative to it: two standard errors
      e are about log(1 + 2 e) nats.
    """
    visible, hidden = params["weights"].shape
    start_rng, rng = jax.random.split(rng)
    v = _binary(start_rng, jnp.broadcast_to(base_bias, (chains, visible)))

    def machine(beta):
        """In between: at beta 0 the base, whose hidden units are free."""
        return {
            "weights": beta * params["weights"],
            "visible_bias": (1 - beta) * base_bias + beta * params["visible_bias"],
            "hidden_bias": beta * params["hidden_bias"],
        }

    def step(carry, inputs):
        v, log_weight = carry
        before, after, rng = inputs
        log_weight += free_energy(machine(before), v) - free_energy(machine(after), v)
        return (sweep(machine(after), v, rng)[0], log_weight), None

    betas = jnp.linspace(0.0, 1.0, temperatures)
    inputs = betas[:-1], betas[1:], jax.random.split(rng, temperatures - 1)
    (_, log_weight), _ = jax.lax.scan(step, (v, jnp.zeros(chains)), inputs)
    base = jnp.sum(jax.nn.softplus(base_bias)) + hidden * jnp.log(2.0)
    highest = jnp.max(log_weight)
    weights = jnp.exp(log_weight - highest)
    mean = jnp.mean(weights)
    error = jnp.std(weights) / mean / jnp.sqrt(chains)
    return base + highest + jnp.log(mean), error


def _binary(rng: jax.Array, logits: jax.Array) -> jax.Array:
    return jax.random.bernoulli(rng, jax.nn.sigmoid(logits)).astype(jnp.float32)


# Parameter path -> logical axes. The first pattern found in the path decides.
PARTITION_RULES = (
    (r"weights", ("embed", "mlp")),
    (r"visible_bias", ("embed",)),
    (r"hidden_bias", ("mlp",)),
)
