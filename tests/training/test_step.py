"""The shared step: phases, lazy phases, repeats, microbatches, averages."""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from genai_jax.config import ConfigError
from genai_jax.tasks.protocol import LossOutput, Phase
from genai_jax.training.ema import EmaConfig
from genai_jax.training.step import init_state, make_step, phase_ran

RATE = 0.1


def dirac_gan(penalty: float) -> tuple[Phase, ...]:
    """The Dirac-GAN of Mescheder et al. 2018: real data at 0, a generator theta, a critic psi x."""

    def critic_loss(params, mutables, batch, info):
        psi, theta = params["critic"], params["generator"]
        loss = -jax.nn.log_sigmoid(psi * 0.0) - jax.nn.log_sigmoid(-psi * theta)
        return LossOutput(loss + penalty / 2 * psi**2, {}, mutables)

    def generator_loss(params, mutables, batch, info):
        loss = jax.nn.log_sigmoid(-params["critic"] * params["generator"])
        return LossOutput(loss, {}, mutables)

    return (
        Phase("critic", ("critic",), critic_loss, optax.sgd(RATE)),
        Phase("generator", ("generator",), generator_loss, optax.sgd(RATE)),
    )


class Toy:
    """A task of given phases and parameters, enough for `init_state`."""

    partition_rules: ClassVar = ()

    def __init__(self, phases, params, mutables=()):
        self._phases, self._params, self._mutables = phases, params, mutables

    def init(self, rng):
        return jax.tree.map(jnp.float32, self._params), self._mutables

    def phases(self, params):
        return self._phases


def begin(phases, params, mutables=(), averages=None):
    return init_state(Toy(phases, params, mutables), jax.random.key(0), averages or {})


@pytest.mark.parametrize(
    ("penalty", "expected"), [(1.0, [0.9375, 0.96]), (0.0, [1.0, 1.0])], ids=["r1", "none"]
)
def test_alternating_dirac_gan_has_the_eigenvalues_of_the_closed_form(penalty, expected):
    """Near (0, 0) the step is [[1-hg, h/2], [-h/2 (1-hg), 1-h^2/4]] on (psi, theta)."""
    phases = dirac_gan(penalty)
    step = jax.jit(make_step(phases))
    tiny = 1e-2

    def moved(critic, generator):
        state, _ = step(begin(phases, {"critic": critic, "generator": generator}), {})
        return np.array([state.params["critic"], state.params["generator"]], np.float64) / tiny

    jacobian = np.stack([moved(tiny, 0.0), moved(0.0, tiny)], 1)
    eigenvalues = np.linalg.eigvals(jacobian)
    np.testing.assert_allclose(np.sort(np.abs(eigenvalues)), expected, atol=2e-4)


def quadratic(name, group, every=1, repeats=1, optimizer=None):
    """Half the squared distance of params[group] to the mean of the batch."""

    def loss(params, mutables, batch, info):
        value = 0.5 * jnp.mean(jnp.square(params[group] - batch["x"]))
        metrics = {"mean": batch["x"].mean(), "noise": jax.random.normal(info.rng)}
        return LossOutput(value, metrics, mutables + 1)

    return Phase(name, (group,), loss, optimizer or optax.sgd(RATE), every, repeats)


BATCH = {"x": jnp.arange(8.0)}


def test_a_phase_changes_its_own_groups_alone():
    phases = (quadratic("a", "one"),)
    state = begin(phases, {"one": 1.0, "two": 2.0}, 0)
    state, report = jax.jit(make_step(phases))(state, BATCH)
    assert float(state.params["one"]) == pytest.approx(1 - RATE * (1 - 3.5))
    assert float(state.params["two"]) == 2.0
    assert set(report.metrics) == {"loss", "grad_norm", "mean", "noise"}


def test_a_lazy_phase_runs_on_its_steps_exactly():
    phases = (quadratic("a", "one"), quadratic("b", "two", every=3))
    state = begin(phases, {"one": 1.0, "two": 2.0}, 0)
    step = jax.jit(make_step(phases))
    for i in range(7):
        before = float(state.params["two"])
        state, report = step(state, BATCH)
        assert (float(state.params["two"]) != before) == (i % 3 == 0)
        assert phase_ran(phases, "b/loss", i) == (i % 3 == 0) and phase_ran(phases, "a/loss", i)
        assert (float(report.metrics["b/loss"]) != 0) == (i % 3 == 0)
    assert int(state.mutables) == 7 + 3


def test_every_phase_reports_the_norm_of_its_gradient_before_it_is_clipped():
    clipped = optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(RATE))
    phases = (quadratic("a", "one"), quadratic("b", "two", optimizer=clipped))
    state = begin(phases, {"one": 1.0, "two": jnp.array([2.0, 5.5])[:, None]}, 0)
    _, report = jax.jit(make_step(phases))(state, BATCH)
    assert float(report.metrics["a/grad_norm"]) == pytest.approx(3.5 - 1)
    # Each of the two entries has half of the mean: (1.5^2 + 2^2)^(1/2) / 2.
    assert float(report.metrics["b/grad_norm"]) == pytest.approx(2.5 / 2)


def test_repeats_see_different_slices_of_the_batch():
    phases = (quadratic("a", "one", repeats=4),)
    state, report = jax.jit(make_step(phases))(begin(phases, {"one": 0.0}, 0), BATCH)
    expected = 0.0
    for i in range(4):
        expected -= RATE * (expected - np.mean(np.arange(8.0)[i::4]))
    assert float(state.params["one"]) == pytest.approx(expected, rel=1e-6)
    assert float(report.metrics["mean"]) == 5.0  # rows 3 and 7
    assert int(state.mutables) == 4


def test_microbatches_give_the_gradient_of_the_whole_batch_weighted_by_targets():
    def loss(params, mutables, batch, info):
        weight = batch["mask"].sum()
        total = jnp.sum(batch["mask"] * jnp.square(params["one"] - batch["x"]))
        loss = total / jnp.maximum(weight, 1)
        return LossOutput(loss, {}, mutables, weight)

    batch = {"x": jnp.arange(8.0), "mask": jnp.array([1.0, 1, 0, 1, 0, 0, 0, 1])}
    phases = (Phase("a", ("one",), loss, optax.sgd(RATE)),)
    results = [
        jax.jit(make_step(phases, accumulate=n))(begin(phases, {"one": 0.5}), batch)
        for n in (1, 2, 4)
    ]
    for state, report in results[1:]:
        assert float(state.params["one"]) == pytest.approx(float(results[0][0].params["one"]))
        expected = results[0][1].metrics["loss"]
        assert float(report.metrics["loss"]) == pytest.approx(float(expected))


def test_randomness_differs_by_step_and_phase_and_repeats_by_seed():
    phases = (quadratic("a", "one"), quadratic("b", "one"))
    step = jax.jit(make_step(phases))
    state, seen = begin(phases, {"one": 0.0}, 0), []
    for _ in range(2):
        state, report = step(state, BATCH)
        seen += [float(report.metrics["a/noise"]), float(report.metrics["b/noise"])]
    assert len(set(seen)) == 4
    _, again = step(begin(phases, {"one": 0.0}, 0), BATCH)
    assert float(again.metrics["a/noise"]) == seen[0]


def test_averages_start_at_the_parameters_and_follow_the_closed_form():
    averages = EmaConfig(decay="0.9,0.5").averages()
    phases = (quadratic("a", "one"),)
    state = begin(phases, {"one": 1.0}, 0, averages)
    assert float(state.ema["0.9"]["one"]) == 1.0
    step = jax.jit(make_step(phases, averages=averages))
    expected = {"0.9": 1.0, "0.5": 1.0}
    for _ in range(5):
        state, _ = step(state, BATCH)
        for name, average in averages.items():
            decay = average.decay
            expected[name] = decay * expected[name] + (1 - decay) * float(state.params["one"])
            assert float(state.ema[name]["one"]) == pytest.approx(expected[name], rel=1e-6)


@pytest.mark.parametrize("decay", ["1.0", "-0.1", "x"])
def test_a_decay_outside_its_range_is_refused(decay):
    with pytest.raises(ConfigError, match=f"--ema.decay={decay}"):
        EmaConfig(decay=decay).averages()


def test_a_phase_can_learn_if_any_microbatch_can_and_while_it_does_not_run():
    def loss(params, mutables, batch, info):
        value = jnp.mean(jnp.square(params["one"] - batch["x"]))
        return LossOutput(value, {}, mutables, can_learn=jnp.any(batch["x"] > 6))

    phases = (quadratic("a", "one"), Phase("b", ("one",), loss, optax.sgd(RATE), every=2))
    low = {"x": jnp.minimum(BATCH["x"], 6)}
    for accumulate in (1, 4):
        step, begun = jax.jit(make_step(phases, accumulate=accumulate)), {"one": 0.0, "two": 0.0}
        _, report = step(begin(phases, begun, 0), BATCH)
        assert report.can_learn["a"] and report.can_learn["b"]
        state, report = step(begin(phases, begun, 0), low)
        assert report.can_learn["a"] and not report.can_learn["b"]
        _, report = step(state, low)
        assert report.can_learn["b"]
