"""Boltzmann machines small enough to know everything about, and a run on digits."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genai_jax import evaluate, sample
from genai_jax.components import parse_run
from genai_jax.config import ConfigError
from genai_jax.networks.energy import rbm
from genai_jax.tasks.energy.rbm import Rbm
from genai_jax.tasks.protocol import StepInfo
from tests.tasks.runs import resumed, run_to

TINY = (
    "--task=rbm",
    "--data.batch_size=8",
    "--rbm.num_hidden=6",
    "--rbm.chains=10",
    "--rbm.sweeps=2",
    "--rbm.ais_chains=8",
    "--rbm.ais_temperatures=20",
    "--optimizer.schedule=constant",
    "--optimizer.warmup_steps=0",
)


def machine(visible: int, hidden: int, scale: float = 1.0) -> dict:
    rng = np.random.default_rng(0)
    draw = lambda *shape: scale * rng.normal(size=shape).astype(np.float32)
    return {
        "weights": draw(visible, hidden), "visible_bias": draw(visible),
        "hidden_bias": draw(hidden),
    }  # fmt: skip


def states(count: int) -> np.ndarray:
    return np.array(list(itertools.product((0.0, 1.0), repeat=count)), np.float32)


def test_the_normalizer_sums_the_free_energies_of_all_states():
    for params in (machine(5, 3), machine(3, 5)):
        every = states(len(params["visible_bias"]))
        total = np.logaddexp.reduce(-np.asarray(rbm.free_energy(params, every), np.float64))
        assert rbm.exact_log_z(params) == pytest.approx(total, abs=1e-5)
    with pytest.raises(ValueError, match="21 units in the smaller layer are too many"):
        rbm.exact_log_z(machine(21, 30))


def test_a_sweep_keeps_the_distribution_of_the_machine():
    """The Boltzmann distribution is the fixed point of a sweep's exact transition matrix."""
    params = machine(4, 3)
    v, h = states(4), states(3)

    def conditional(logits, outcome):
        """[of, to]: probability of each outcome."""
        return np.exp(-np.logaddexp(0, np.where(outcome > 0, -1, 1) * logits[:, None]).sum(-1))

    to_hidden = conditional(np.asarray(rbm.hidden_logits(params, v)), h)
    to_visible = conditional(np.asarray(rbm.visible_logits(params, h)), v)
    p = np.exp(-np.asarray(rbm.free_energy(params, v)) - rbm.exact_log_z(params))
    np.testing.assert_allclose(p @ to_hidden @ to_visible, p, atol=1e-6)
    # And `sweep` draws from that matrix.
    many = np.repeat(v[5:6], 20_000, 0)
    drawn, _ = jax.jit(rbm.sweep)(params, many, jax.random.key(0))
    counts = np.bincount((np.asarray(drawn) @ [8, 4, 2, 1]).astype(int), minlength=16)
    np.testing.assert_allclose(counts / 20_000, (to_hidden @ to_visible)[5], atol=0.015)


@pytest.mark.parametrize(("hidden", "scale"), [(6, 1.0), (12, 0.7)])
def test_annealing_finds_the_normalizer_of_ten_visible_units(hidden, scale):
    params = machine(10, hidden, scale)
    run = jax.jit(lambda key: rbm.annealed_log_z(params, jnp.zeros(10), key, chains=500, temperatures=1000))  # fmt: skip  # noqa: E501
    estimate, error = run(jax.random.key(1))
    assert abs(float(estimate) - rbm.exact_log_z(params)) < 0.1
    assert 0 < float(error) < 0.05


def test_the_gradient_is_that_of_the_log_likelihood_when_chains_are_in_equilibrium():
    """With every state as a chain, weighted as the model weighs it."""
    params = machine(4, 3)
    v, data = states(4), states(4)[[3, 9, 12]]
    p = np.exp(-np.asarray(rbm.free_energy(params, v)) - rbm.exact_log_z(params))

    def exact(params):
        energies = rbm.free_energy(params, v)
        return jnp.mean(rbm.free_energy(params, data)) + jax.nn.logsumexp(-energies)

    def contrast(params):
        model = jnp.sum(p * rbm.free_energy(params, v))
        return jnp.mean(rbm.free_energy(params, data)) - model

    one, other = jax.grad(exact)(params), jax.grad(contrast)(params)
    for name in params:
        np.testing.assert_allclose(one[name], other[name], atol=1e-5)


def test_the_loss_is_a_contrast_and_its_chains_go_on():
    task = Rbm(parse_run(TINY))
    params, mutables = task.init(jax.random.key(0))
    batch = task.data.loader.gather(task.data.loader.open("train"), np.arange(8))
    loss, info = jax.jit(task._loss), StepInfo(jax.random.key(1), jnp.int32(0))
    output = loss(params, mutables, batch, info)
    metrics = output.metrics
    assert float(output.loss) == pytest.approx(
        float(metrics["data_free_energy"] - metrics["model_free_energy"]), abs=1e-4
    )
    chains = output.mutables["chains"]
    assert chains.shape == (10, 64) and set(np.unique(chains)) == {0, 1}
    held = {"machine": machine(64, 6, 3.0)}  # whose next state depends on the one before
    after = loss(held, mutables, batch, info).mutables
    further = loss(held, after, batch, info).mutables
    assert not np.array_equal(further["chains"], after["chains"])


def test_the_gradient_of_the_loss_is_the_statistics_of_the_chains_less_those_of_the_data():
    task = Rbm(parse_run(TINY))
    params, mutables = task.init(jax.random.key(0))
    params = {"machine": machine(64, 6, 0.5)}
    batch = task.data.loader.gather(task.data.loader.open("train"), np.arange(8))
    key = jax.random.key(1)

    @jax.jit
    def gradient_and_chains(params):
        def loss(params):
            output = task._loss(params, mutables, batch, StepInfo(key, jnp.int32(0)))
            return output.loss, output.mutables["chains"]

        return jax.grad(loss, has_aux=True)(params)

    gradient, chains = gradient_and_chains(params)

    def statistics(v):
        h = jax.nn.sigmoid(rbm.hidden_logits(params["machine"], v))
        return {
            "weights": v.T @ h / len(v), "visible_bias": v.mean(0), "hidden_bias": h.mean(0)
        }  # fmt: skip

    data = statistics(task._visible(batch["image"], jax.random.split(key, 3)[0]))
    model = statistics(chains)
    for name, value in gradient["machine"].items():
        np.testing.assert_allclose(value, model[name] - data[name], atol=1e-6)


@pytest.mark.parametrize("flag", ["chains", "num_hidden", "sweeps"])
def test_bad_flags_are_refused_in_one_line(flag):
    with pytest.raises(ConfigError, match=f"--rbm.{flag}=0: 0 is not a whole number") as error:
        parse_run([*TINY, f"--rbm.{flag}=0"])
    assert "\n" not in str(error.value)


def test_a_run_goes_on_is_scored_and_shown(tmp_path, capsys):
    flags = (*TINY, "--checkpoint.every=2")
    whole = run_to(tmp_path / "whole", 4, *flags)
    assert resumed(tmp_path / "whole", 2, tmp_path / "on", 4, *flags) == whole and len(whole) == 4
    capsys.readouterr()
    workdir = f"--workdir={tmp_path / 'whole'}"
    assert evaluate.main([workdir]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["images"] == 355 and 0.2 < scores["bits_per_dim"] < 1
    for flags in (("--sweeps=2",), ("--sweeps=3",), ("--seed=1", "--sweeps=2"), ("--sweeps=2",)):
        assert sample.main([workdir, "--num_samples=3", *flags]) == 0
    names = [line.rpartition("/")[2] for line in capsys.readouterr().out.split()]
    assert names[0] == names[3] == "draws_seed0_step-4_num_samples-3_sweeps-2.png"
    assert len(set(names)) == 3  # requests with other settings do not overwrite it
    pictures = [tmp_path / "whole" / "samples" / name for name in names]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)
    for name in ("x.tif", "x.txt", "x"):
        with pytest.raises(ConfigError, match=rf"--output={name} must end in \.png"):
            sample.main([workdir, f"--output={name}"])
