"""The hidden Markov model: filtering, and expectation maximization (Baum et al. 1970).

A sequence x_0 .. x_T has hidden states z_0 .. z_T: P(z_0) = initial, P(z_t | z_t-1) = transition
[from, to], P(x_t | z_t) = emission [state, token]. Parameters are the logarithms of the three, and
messages are kept as logarithms. A product with a matrix shifts each message to a maximum of 0,
multiplies, and takes the logarithm again, so that no length of a sequence underflows.

Rows of a batch are packed: position p holds x_t and its target x_t+1 of some sequence, which begins
where `positions` is 0. Padding, where `real` is 0, changes nothing.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

TINY = 1e-37  # below it, a probability counts as this
Params = Mapping[str, jax.Array]


class Expected(NamedTuple):
    """Expected counts given the data, summed over sequences."""

    initial: jax.Array  # [states]
    transition: jax.Array  # [states, states]
    emission: jax.Array  # [tokens, states]
    log_likelihood: jax.Array  # of x_0 .. x_T, in nats, [rows]
    tokens: jax.Array  # how many they are, [rows]


def init(key: jax.Array, states: int, tokens: int) -> dict[str, jax.Array]:
    """Distributions sampled uniformly: where all states are alike, EM does not move."""
    keys = jax.random.split(key, 3)
    shapes = {"initial": (states,), "transition": (states, states), "emission": (states, tokens)}
    draws = {
        name: 1e-3 + jax.random.exponential(k, shape)
        for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    return {name: jnp.log(x / jnp.sum(x, -1, keepdims=True)) for name, x in draws.items()}


def _times(message: jax.Array, matrix: jax.Array) -> jax.Array:
    """log(exp(message) @ matrix), for messages [rows, n] and a matrix [n, m] of probabilities."""
    top = jnp.max(message, -1, keepdims=True)
    return jnp.log(jnp.maximum(jnp.exp(message - top) @ matrix, TINY)) + top


def _observe(params: Params, message: jax.Array, tokens: jax.Array) -> jax.Array:
    """Adds log P(token | state); [rows, states]."""
    return message + params["emission"].T[tokens]


def predict(params: Params, message: jax.Array) -> jax.Array:
    """log P(z_t+1, ...) from log P(z_t, ...), [rows, states]."""
    return _times(message, jnp.exp(params["transition"]))


def token_logits(params: Params, message: jax.Array) -> jax.Array:
    """log P(next token, ...) from the message of `predict`, [rows, tokens]."""
    return _times(message, jnp.exp(params["emission"]))


def _normalized(message: jax.Array) -> jax.Array:
    return jax.nn.log_softmax(message, -1)


def advance(params: Params, message, tokens, begins, real) -> jax.Array:
    """log P(z_t | x_0 .. x_t) of each row after one more token, [rows, states].

    Args:
      params: of the model.
      message: the same one token before.
      tokens: x_t, [rows].
      begins: whether t is 0, [rows] bool.
      real: whether the token counts, [rows] bool; other rows keep their message.
    """
    before = jnp.where(begins[:, None], params["initial"], predict(params, message))
    after = _normalized(_observe(params, before, tokens))
    return jnp.where(real[:, None], after, message)


def empty_message(params: Params, rows: int) -> jax.Array:
    return jnp.zeros((rows, params["initial"].shape[0]))


def filtered(params: Params, tokens, positions, real) -> jax.Array:
    """log P(z_t | x_0 .. x_t) at every position of packed rows, [length, rows, states]."""

    def step(message, at):
        tokens, positions, real = at
        message = advance(params, message, tokens, positions == 0, real)
        return message, message

    start = empty_message(params, len(tokens))
    return jax.lax.scan(step, start, (tokens.T, positions.T, real.T > 0))[1]


def scores(params: Params, tokens, targets, positions, real) -> tuple[jax.Array, jax.Array]:
    """log P(target | tokens up to each position), and whether it is the likeliest.

    Both [rows, length].
    """

    def of_position(at):
        message, targets = at
        log_probs = _normalized(token_logits(params, predict(params, message)))
        chosen = jnp.take_along_axis(log_probs, targets[:, None], 1)[:, 0]
        return chosen, jnp.argmax(log_probs, -1) == targets

    messages = filtered(params, tokens, positions, real)
    log_probs, correct = jax.lax.map(of_position, (messages, targets.T))
    return log_probs.T, correct.T


def expected_counts(params: Params, tokens, targets, positions, real) -> Expected:
    """The E-step on packed rows [rows, length]: forward and backward messages (Rabiner 1989).

    Every position is a transition from the state of its token to that of its target; a sequence
    goes on at the next position unless that begins another one or is padding.
    """
    matrix = jnp.exp(params["transition"])
    begins, real = (positions == 0) & (real > 0), real > 0
    goes_on = jnp.pad(real[:, 1:] & ~begins[:, 1:], ((0, 0), (0, 1)))
    forward = filtered(params, tokens, positions, real)

    def back(carry, at):
        later, transition = carry
        forward, targets, real, begins, goes_on = at
        later = jnp.where(goes_on[:, None], later, 0)  # log P(what follows | state of the target)
        arriving = _observe(params, later, targets)
        top = jnp.max(arriving, -1, keepdims=True)
        v = jnp.exp(arriving - top)
        u = jnp.exp(forward)
        predicted = u @ matrix
        seen = jnp.maximum(jnp.sum(predicted * v, -1, keepdims=True), TINY)
        u = jnp.where(real[:, None], u / seen, 0)
        transition += u.T @ v
        target_states = jnp.where(real[:, None], predicted * v / seen, 0)
        message = jnp.log(jnp.maximum(v @ matrix.T, TINY)) + top
        # Of the first token, whose evidence is in `forward` already.
        first = jnp.where(begins[:, None], u * (v @ matrix.T), 0)
        return (message, transition), (target_states, first)

    rows, states = len(tokens), matrix.shape[0]
    start = (jnp.zeros((rows, states)), jnp.zeros((states, states)))
    by_position = (forward, targets.T, real.T, begins.T, goes_on.T)
    (_, transition), (target_states, first) = jax.lax.scan(back, start, by_position, reverse=True)
    count = params["emission"].shape[1]
    sums = lambda x, ids: jax.ops.segment_sum(x.reshape(-1, states), ids.T.reshape(-1), count)
    emission = sums(target_states, targets) + sums(first, tokens)
    log_probs = _joint_log_probs(params, forward, tokens, targets, begins, real)
    total = jnp.sum(real, 1) + jnp.sum(begins, 1)
    return Expected(jnp.sum(first, (0, 1)), transition * matrix, emission, log_probs, total)


def _joint_log_probs(params: Params, forward, tokens, targets, begins, real) -> jax.Array:
    """log P of the sequences of each row, first tokens included."""
    of_first = jax.nn.logsumexp(_observe(params, params["initial"], tokens), -1)

    def of_target(at):
        message, targets = at
        return jax.nn.logsumexp(_observe(params, predict(params, message), targets), -1)

    of_targets = jax.lax.map(of_target, (forward, targets.T)).T
    return jnp.sum(jnp.where(real, of_targets, 0) + jnp.where(begins, of_first, 0), 1)


def maximized(expected: Expected, smoothing: float = 0.0) -> dict[str, np.ndarray]:
    """The M-step, in float64: the parameters under which the expected counts are likeliest.

    Args:
      expected: summed over all sequences.
      smoothing: counts that each state adds to its emissions, in equal parts to all tokens.
    """
    initial, transition, emission = (np.asarray(x, np.float64) for x in expected[:3])
    emission = emission.T + smoothing / emission.shape[0]
    counts = {"initial": initial, "transition": transition, "emission": emission}
    return {name: _log_shares(x) for name, x in counts.items()}


def _log_shares(counts: np.ndarray) -> np.ndarray:
    """log of counts over their sum along the last axis; uniform where there are none."""
    total = counts.sum(-1, keepdims=True)
    uniform = np.full_like(counts, 1 / counts.shape[-1])
    shares = np.divide(counts, total, out=uniform, where=total > 0)
    return np.log(np.maximum(shares, TINY)).astype(np.float32)
