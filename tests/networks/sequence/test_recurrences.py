"""Recurrences: in parallel and in chunks they equal their loops over tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genai_jax.networks.sequence.recurrences import diagonal
from genai_jax.networks.sequence.recurrences.boundaries import Boundaries
from genai_jax.networks.sequence.recurrences.delta_rule import (
    delta_rule,
    delta_rule_step,
    unit_inverse,
)
from genai_jax.networks.sequence.recurrences.diagonal import linear_recurrence, linear_step
from genai_jax.networks.sequence.recurrences.exponential_gate import (
    Memory,
    memory_read,
    memory_step,
)
from genai_jax.networks.sequence.recurrences.linear_attention import (
    linear_attention,
    linear_attention_step,
)
from genai_jax.networks.sequence.recurrences.loop import loop
from genai_jax.networks.sequence.recurrences.state_space import (
    diagonal_system,
    hippo_legs,
    low_rank_response,
    low_rank_system,
    normal_plus_low_rank,
)
from genai_jax.networks.sequence.recurrences.time_invariant import (
    by_chunks,
    convolution,
    impulse_response,
    system_step,
)

BATCH, LENGTH, HEADS, KEYS, VALUES = 2, 11, 2, 3, 4
rng = np.random.default_rng(0)
normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
decays = lambda *shape: -jnp.asarray(rng.exponential(0.5, shape), jnp.float32)
q, k = normal(BATCH, LENGTH, HEADS, KEYS), normal(BATCH, LENGTH, HEADS, KEYS)
v = normal(BATCH, LENGTH, HEADS, VALUES)
unit = k / jnp.linalg.norm(k, axis=-1, keepdims=True)
by_head, by_key = decays(BATCH, LENGTH, HEADS), decays(BATCH, LENGTH, HEADS, KEYS)
matrix = normal(BATCH, HEADS, KEYS, VALUES)
memory = Memory(matrix, normal(BATCH, HEADS, KEYS), normal(BATCH, HEADS))
gates = 4 * normal(BATCH, LENGTH, HEADS)
channels = normal(BATCH, LENGTH, HEADS)
# Row 0: padding, then two documents; row 1: a document, padding, a document, padding.
IDS = np.array([[0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 2], [1, 1, 1, 0, 0, 2, 2, 2, 2, 0, 0]])
PACKED = Boundaries(jnp.asarray(IDS != 0), jnp.asarray((IDS == 2) & (np.cumsum(IDS == 2, 1) == 1)))

CASES = {
    "diagonal": (linear_recurrence, linear_step,
                 (jnp.exp(by_head), channels), normal(BATCH, HEADS)),
    "one decay a head": (linear_attention, linear_attention_step, (q, k, v, by_head), matrix),
    "one decay a key": (linear_attention, linear_attention_step, (q, k, v, by_key), matrix),
    "delta rule": (delta_rule, delta_rule_step,
                   (q, unit, v, by_head, jax.nn.sigmoid(gates)), matrix),
    "exponential gate": (memory_read, memory_step, (q, k, v, gates, by_head), memory),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_in_parallel_it_is_the_loop(name):
    parallel, step, inputs, state = CASES[name]
    chunked = {} if name == "diagonal" else {"chunk": 4}
    for bounds in (Boundaries(), PACKED):
        fresh = jax.tree.map(jnp.zeros_like, state)
        want, end = loop(step, inputs, state, bounds, fresh=fresh)
        y, after = jax.jit(functools.partial(parallel, **chunked))(*inputs, state, bounds)
        real = (
            1 if bounds.real is None else bounds.real.reshape(BATCH, LENGTH, *(1,) * (y.ndim - 2))
        )
        np.testing.assert_allclose(y * real, want * real, atol=1e-5)
        if name == "exponential gate":  # the scale of a state may differ, not what it stands for
            after, end = (
                (
                    m.matrix * jnp.exp(m.scale)[..., None, None],
                    m.normalizer * jnp.exp(m.scale)[..., None],
                )
                for m in (after, end)
            )
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-6), after, end
        )


def test_off_the_cpu_a_diagonal_recurrence_takes_all_tokens_at_once(monkeypatch):
    """By a parallel scan, which has the values and the gradients of the loop."""
    _, step, inputs, state = CASES["diagonal"]
    weights, real = normal(BATCH, LENGTH, HEADS), PACKED.real[..., None]

    def loss(run, inputs, state):
        y, end = run(inputs, state)
        return jnp.sum(weights * jnp.sin(y * real)) + jnp.sum(end)

    def gradient(run):
        return jax.value_and_grad(functools.partial(loss, run), argnums=(0, 1))

    monkeypatch.setattr(diagonal.device, "platform", lambda: "tpu")
    at_once = gradient(lambda inputs, state: linear_recurrence(*inputs, state, PACKED))
    fresh = jnp.zeros_like(state)
    one_by_one = gradient(lambda *x: loop(step, *x, PACKED, fresh=fresh))
    assert "scan" not in str(jax.make_jaxpr(at_once)(inputs, state))
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, atol=1e-5),
        jax.jit(at_once)(inputs, state), jax.jit(one_by_one)(inputs, state),
    )  # fmt: skip


@pytest.mark.parametrize("name", [name for name in CASES if name != "diagonal"])
def test_strong_decays_have_the_gradients_of_the_loop(name):
    """Documents end within a chunk after decays whose inverse overflows float32."""
    parallel, step, (*inputs, decay), state = CASES[name]
    at = 3 if name == "delta rule" else len(inputs)
    inputs = (*inputs, decay)
    inputs = (*inputs[:at], 300 * inputs[at], *inputs[at + 1 :])
    fresh = jax.tree.map(jnp.zeros_like, state)
    real = PACKED.real[..., None, None]
    chunked = lambda inputs: parallel(*inputs, state, PACKED, chunk=8)
    one_by_one = lambda inputs: loop(step, inputs, state, PACKED, fresh=fresh)

    def gradient(run):
        return jax.jit(jax.grad(lambda inputs: jnp.sum(jnp.sin(run(inputs)[0] * real))))(inputs)

    for got, want in zip(gradient(chunked), gradient(one_by_one), strict=True):
        np.testing.assert_allclose(got, want, atol=2e-4, rtol=1e-3)


def test_the_delta_rule_replaces_what_a_key_had_stored():
    twice = jnp.stack([unit[:, 0], unit[:, 0]], 1)
    values = v[:, :2]
    one = jnp.ones((BATCH, 2, HEADS))
    y, _ = delta_rule(twice, twice, values, 0 * one, one, jnp.zeros_like(matrix))
    np.testing.assert_allclose(y[:, 1], values[:, 1], atol=1e-5)
    y, _ = linear_attention(twice, twice, values, 0 * one, jnp.zeros_like(matrix))
    np.testing.assert_allclose(y[:, 1], values[:, 0] + values[:, 1], atol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 5, 32])
def test_inverses_of_triangular_matrices_are_those_in_float64(size):
    """Also of ones, the keys of a repeated token, whose powers overflow."""
    lower = np.tril(np.stack([np.ones((size, size)), rng.uniform(-1, 1, (size, size))]), -1)
    want = np.linalg.inv(np.eye(size) + lower)
    got = unit_inverse(jnp.asarray(lower, jnp.float32))
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())
    slope = rng.standard_normal((2, size, size))
    (grad,) = jax.vjp(unit_inverse, jnp.asarray(lower, jnp.float32))[1](jnp.float32(slope))
    of_inverse = -np.tril(want.swapaxes(1, 2) @ slope @ want.swapaxes(1, 2), -1)
    np.testing.assert_allclose(grad, of_inverse, atol=1e-4 * np.abs(of_inverse).max(initial=1))


def test_exponential_gates_do_not_overflow():
    loud = jnp.full_like(gates, 200.0)
    y, state = memory_read(q, k, v, loud, by_head, Memory.empty(BATCH, HEADS, KEYS, VALUES))
    assert np.isfinite(y).all() and all(np.isfinite(a).all() for a in state)
    quiet, _ = memory_read(q, k, v, loud + 10, by_head, Memory.empty(BATCH, HEADS, KEYS, VALUES))
    np.testing.assert_allclose(y, quiet, rtol=1e-4)  # a common factor cancels


def test_hippo_has_the_eigenvalues_of_its_paper():
    size = 16
    eigenvalues = np.sort(np.linalg.eigvals(hippo_legs(size)).real)[::-1]
    np.testing.assert_allclose(eigenvalues, -np.arange(1, size + 1))
    parts = normal_plus_low_rank(size)
    a = np.diag(parts.values) - np.outer(parts.p, parts.p.conj())
    n = np.arange(size)
    want = hippo_legs(size)
    # The same map of inputs to states: the moments b* A^i b do not depend on the basis.
    b, power, power_want = np.sqrt(2 * n + 1), parts.b, np.sqrt(2.0 * n + 1)
    for _ in range(3):
        power, power_want = a @ power, want @ power_want
        np.testing.assert_allclose(parts.b.conj() @ power, b @ power_want, rtol=1e-9)


def _systems(size=6, channel_count=3):
    step = jnp.log(jnp.linspace(0.02, 0.2, channel_count))
    complex_ = lambda *shape: jax.lax.complex(normal(*shape), normal(*shape))
    diagonal = diagonal_system(step, jax.lax.complex(decays(channel_count, size) - 0.1, 3 * normal(
        channel_count, size)), complex_(channel_count, size))  # fmt: skip
    start = normal_plus_low_rank(size)
    copies = lambda a: jnp.broadcast_to(jnp.asarray(a, jnp.complex64), (channel_count, size))
    parts = dict(values=copies(start.values), p=copies(start.p + 0j), b=copies(start.b + 0j),
                 c=complex_(channel_count, size))  # fmt: skip
    dense = low_rank_system(step, **parts)
    response = lambda length: low_rank_response(step, **parts, length=length, discrete=dense.a)
    return {
        "s4d": (diagonal, functools.partial(impulse_response, diagonal)),
        "s4": (dense, response),
    }


SYSTEMS = _systems()


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_convolution_is_the_recurrence(name):
    system, response = SYSTEMS[name]
    x = normal(BATCH, LENGTH, 3)
    state = jnp.zeros((BATCH, *system.b.shape, 2))
    want, _ = loop(system_step(system), x, state)
    np.testing.assert_allclose(convolution(x, response(LENGTH)), want, atol=1e-5)
    want, _ = loop(system_step(system), x, state, PACKED)
    y = jax.jit(by_chunks, static_argnames="chunk")(system, x, PACKED, chunk=4)
    real = PACKED.real[..., None]
    np.testing.assert_allclose(y * real, want * real, atol=1e-5)


def test_a_low_rank_system_of_the_usual_size_is_its_convolution():
    """64 states and 256 tokens, with steps from 0.001 to 0.1."""
    channel_count, size, length = 4, 64, 256
    start = normal_plus_low_rank(size)
    copies = lambda a: jnp.broadcast_to(jnp.asarray(a, jnp.complex64), (channel_count, size))
    step = jnp.log(jnp.geomspace(0.001, 0.1, channel_count))
    noise = np.random.default_rng(1).standard_normal((2, channel_count, size))
    parts = dict(values=copies(start.values), p=copies(start.p + 0j), b=copies(start.b + 0j),
                 c=copies((noise[0] + 1j * noise[1]) / 2**0.5))  # fmt: skip
    system = low_rank_system(step, **parts)
    response = low_rank_response(step, **parts, length=length, discrete=system.a)
    x = jnp.asarray(np.random.default_rng(2).standard_normal((1, length, channel_count)))
    x = x.astype(jnp.float32)
    want, _ = jax.jit(lambda x: loop(system_step(system), x, jnp.zeros((1, *system.b.shape, 2))))(x)
    np.testing.assert_allclose(convolution(x, response), want, atol=1e-4)
    np.testing.assert_allclose(jax.jit(by_chunks)(system, x, Boundaries()), want, atol=1e-4)


def test_a_low_rank_system_is_the_bilinear_one_of_hippo():
    """In float64, by the definition, from the matrix itself."""
    size, step = 6, 0.1
    a, b = hippo_legs(size), np.sqrt(2 * np.arange(size) + 1.0)
    eye = np.eye(size)
    inverse = np.linalg.inv(eye - step / 2 * a)
    discrete, entry = inverse @ (eye + step / 2 * a), inverse @ b * step
    start = normal_plus_low_rank(size)
    basis = np.linalg.eigh((a + np.outer(start_p := np.sqrt(np.arange(size) + 0.5), start_p)
                            + 0.5 * eye) * -1j)[1]  # fmt: skip
    c = rng.standard_normal(size)
    copies = lambda v: jnp.asarray(v, jnp.complex64)[None]
    system = low_rank_system(jnp.log(jnp.array([step])), copies(start.values), copies(start.p),
                             copies(start.b), copies(c @ basis))  # fmt: skip
    want = [c @ np.linalg.matrix_power(discrete, t) @ entry for t in range(8)]
    np.testing.assert_allclose(impulse_response(system, 8)[:, 0], want, atol=1e-4)
