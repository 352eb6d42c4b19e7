"""The restricted Boltzmann machine: two layers of binary units.

Parameters are {"weights" [visible, hidden], "visible_bias" [visible], "hidden_bias" [hidden]}.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np


def init(rng: jax.Array, num_visible: int, num_hidden: int, mean: jax.Array) -> dict:
    """Small random weights, and visible biases with which the units have the data's mean [visible].

    That holds if the weights are zero; means are clipped to [0.01, 0.99].
    """
    scale = 0.1 / (num_visible + num_hidden) ** 0.5
    return {
        "weights": scale * jax.random.normal(rng, (num_visible, num_hidden)),
        "visible_bias": jax.scipy.special.logit(jnp.clip(mean, 0.01, 0.99)),
        "hidden_bias": jnp.zeros(num_hidden),
    }


def hidden_logits(params: dict, v: jax.Array) -> jax.Array:
    """Logits of the hidden units given the visible ones: [..., visible] -> [..., hidden]."""
    return v @ params["weights"] + params["hidden_bias"]


def visible_logits(params: dict, h: jax.Array) -> jax.Array:
    """Logits of the visible units given the hidden ones: [..., hidden] -> [..., visible]."""
    return h @ params["weights"].T + params["visible_bias"]


def free_energy(params: dict, v: jax.Array) -> jax.Array:
    """-log of the sum of exp(-energy) over all hidden states: [..., visible] -> [...], nats."""
    hidden = jnp.sum(jax.nn.softplus(hidden_logits(params, v)), -1)
    return -v @ params["visible_bias"] - hidden


def sweep(params: dict, v: jax.Array, rng: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Samples the hidden units given `v`, then the visible units given those.

    Returns:
      The new visible units and their probabilities, both in the shape of `v`.
    """
    hidden_rng, visible_rng = jax.random.split(rng)
    h = _binary(hidden_rng, hidden_logits(params, v))
    logits = visible_logits(params, h)
    return _binary(visible_rng, logits), jax.nn.sigmoid(logits)


def gibbs(params: dict, v: jax.Array, rng: jax.Array, sweeps: int) -> tuple[jax.Array, jax.Array]:
    """Applies `sweep` `sweeps` times, at least once; returns the last result."""
    step = lambda carry, rng: (sweep(params, carry[0], rng), None)
    return jax.lax.scan(step, (v, v), jax.random.split(rng, sweeps))[0]


def exact_log_z(params: dict) -> float:
    """The log-partition function by enumerating the smaller layer, in float64.

    Raises:
      ValueError: the smaller layer has more than 20 units.
    """
    visible, hidden = np.shape(params["weights"])
    names = ("weights", "visible_bias", "hidden_bias")
    w, a, b = (np.asarray(params[name], np.float64) for name in names)
    if hidden < visible:
        w, a, b, visible = w.T, b, a, hidden
    if visible > 20:
        raise ValueError(
            f"{visible} units in the smaller layer are too many to enumerate; the limit is 20"
        )
    states = np.array(list(itertools.product((0.0, 1.0), repeat=visible)))
    return float(np.logaddexp.reduce(states @ a + np.logaddexp(0, states @ w + b).sum(1)))


def annealed_log_z(
    params: dict, base_bias: jax.Array, rng: jax.Array, *, chains: int, temperatures: int
) -> tuple[jax.Array, jax.Array]:
    """The log-partition function by annealed importance sampling (Neal 2001).

    The annealing starts from independent visible units with biases `base_bias` and ends at the
    given machine, with `temperatures` machines in all, whose parameters are interpolated
    (Salakhutdinov and Murray 2008, section 3).

    Returns:
      The estimate, and the relative standard error e of the mean importance weight: two standard
      errors are about log(1 + 2 e) nats.
    """
    visible, hidden = params["weights"].shape
    start_rng, rng = jax.random.split(rng)
    v = _binary(start_rng, jnp.broadcast_to(base_bias, (chains, visible)))

    def machine(beta):
        """The interpolated machine; at beta 0 it is the base, with unbiased hidden units."""
        return {
            "weights": beta * params["weights"],
            "visible_bias": (1 - beta) * base_bias + beta * params["visible_bias"],
            "hidden_bias": beta * params["hidden_bias"],
        }

    def step(carry, inputs):
        v, log_weight = carry
        beta, next_beta, rng = inputs
        log_weight += free_energy(machine(beta), v) - free_energy(machine(next_beta), v)
        return (sweep(machine(next_beta), v, rng)[0], log_weight), None

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


# Parameter path -> logical axes; the first pattern that matches applies.
PARTITION_RULES = (
    (r"weights", ("embed", "mlp")),
    (r"visible_bias", ("embed",)),
    (r"hidden_bias", ("mlp",)),
)
