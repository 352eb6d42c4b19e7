"""A schedule inside a loss follows the steps of the run, however many microbatches a step has."""

import jax
import numpy as np
import pytest

from genai_jax.components import make_task, parse_run
from genai_jax.diffusion.few_step import consistency_steps
from genai_jax.training.step import init_state, make_step

ACCUMULATE = (1, 4)
COMMON = ("--data.batch_size=8", "--optimizer.warmup_steps=0", "--optimizer.schedule=constant")


def task_of(*flags: str):
    return make_task(parse_run([*COMMON, *flags]))


def steps_of(task, step: int, *names: str) -> list:
    """(state after, metrics) of step number `step`, for each of ACCUMULATE.

    Args:
      task: its parameters are random: a fresh network puts out 0.
      step: completed steps.
      names: of the phases to run; all if none is given.
    """
    rng, key = np.random.default_rng(0), jax.random.key(0)
    shapes = jax.eval_shape(lambda key: init_state(task, key, {}), key)
    zeros = lambda tree: jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), tree)
    normal = lambda x: 0.2 * rng.normal(size=x.shape).astype(np.float32)
    state = shapes.replace(
        step=np.int32(step), params=jax.tree.map(normal, shapes.params), rng=key,
        mutables=zeros(shapes.mutables), opt_state=zeros(shapes.opt_state),
    )  # fmt: skip
    batch = task.data.loader.gather(task.data.loader.open("train"), np.arange(8))
    phases = tuple(p for p in task.phases(state.params) if not names or p.name in names)
    taken = []
    for count in ACCUMULATE:
        after, report = jax.jit(make_step(phases, accumulate=count))(state, batch)
        assert int(after.step) == step + 1
        taken.append((after, report.metrics))
    return taken


def test_the_curriculum_of_a_consistency_model():
    task = task_of(
        "--task=few_step", "--diffusion.network=dit", "--dit.num_layers=1", "--dit.embed_dim=16",
        "--dit.num_heads=2", "--dit.patch_size=4", "--sampler.solver=consistency",
        "--train.steps=8", "--few_step.first_intervals=10", "--few_step.last_intervals=80",
    )  # fmt: skip
    expected = {step: int(consistency_steps(step, 8, 10, 80)) for step in (1, 3)}
    assert expected[1] != expected[3]
    for step, intervals in expected.items():
        assert [m["intervals"] for _, m in steps_of(task, step)] == [intervals] * len(ACCUMULATE)


def test_the_warm_up_of_a_divergence():
    task = task_of(
        "--task=vae", "--vae.kl_warmup=4", "--vae.beta=2", "--dense_vae.latent_dim=3",
        "--dense_vae.hidden_dim=16", "--dense_vae.num_layers=1",
    )  # fmt: skip
    for step, weight in ((0, 0.5), (2, 1.5)):
        for _, metrics in steps_of(task, step):
            expected = (metrics["reconstruction"] + weight * metrics["kl"]) / task.dimensions
            assert float(metrics["loss"]) == pytest.approx(float(expected), rel=1e-5)


def test_the_start_of_a_discriminator():
    task = task_of(
        "--task=autoencoder", "--autoencoder.channels=4", "--autoencoder.channel_multipliers=1,1",
        "--autoencoder_loss.discriminator_weight=0.5", "--discriminator.channels=4",
        "--discriminator.num_layers=1", "--autoencoder_loss.discriminator_start=3",
        "--autoencoder_loss.kl_weight=0",
    )  # fmt: skip
    for step, started in ((2, False), (3, True)):
        for _, metrics in steps_of(task, step):
            assert (float(metrics["discriminator/loss"]) > 0) == started
            heard = metrics["autoencoder/loss"] - metrics["autoencoder/l1"]
            assert (abs(float(heard)) > 1e-5) == started


def test_the_fade_of_a_gan_that_grows():
    task = task_of(
        "--task=gan", "--gan.grow_from=x", "--gan.fade_steps=4", "--generator.channels=4",
        "--generator.latent_dim=6", "--critic.channels=4",
    )  # fmt: skip
    verdicts = {}
    for step in (1, 2):
        taken = steps_of(task, step, "critic")
        for after, _ in taken:
            assert float(after.mutables["fade"]) == (step + 1) / 4
        one, other = (float(metrics["real"]) for _, metrics in taken)
        assert other == pytest.approx(one, rel=1e-5)
        verdicts[step] = one
    assert verdicts[1] != pytest.approx(verdicts[2], rel=1e-3)
