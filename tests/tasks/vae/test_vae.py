"""Variational autoencoders: likelihoods, bounds, and a linear one whose evidence is known."""

import itertools
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from genai_jax import evaluate, sample
from genai_jax.components import parse_run
from genai_jax.config import ConfigError
from genai_jax.losses.bounds import importance_weighted, kl_with_free_bits, normal_kl
from genai_jax.losses.likelihoods import LIKELIHOODS, gaussian_log_density
from genai_jax.networks.latent.dense_vae import DenseVae, DenseVaeConfig
from genai_jax.tasks.arrays.walks import path, traversal
from genai_jax.tasks.protocol import LossOutput, Phase, StepInfo
from genai_jax.tasks.vae.sampling import VaeRequest, latent_traversal
from genai_jax.tasks.vae.task import Vae, kl_of, log_ratio
from genai_jax.training.step import init_state, make_step
from tests.tasks.runs import resumed, run_to

TINY = (
    "--task=vae",
    "--data.batch_size=8",
    "--eval.batches=1",
    "--optimizer.warmup_steps=0",
    "--optimizer.schedule=constant",
)
DENSE = ("--dense_vae.latent_dim=3", "--dense_vae.hidden_dim=16", "--dense_vae.num_layers=1")
LADDER = (
    "--vae.network=ladder", "--ladder_vae.stages=1x1,8x2", "--ladder_vae.channels=4",
    "--ladder_vae.latent_channels=2",
)  # fmt: skip


def make(*flags: str) -> Vae:
    return Vae(parse_run([*TINY, *flags]))


@pytest.mark.parametrize("name", ["bernoulli", "discretized_logistic", "categorical"])
def test_the_probabilities_of_all_levels_sum_to_one(name):
    levels = 2 if name == "bernoulli" else 5
    likelihood = LIKELIHOODS[name](levels, 1)
    outputs = np.random.default_rng(0).normal(size=(1, 3, 1, likelihood.outputs_per_value))
    outputs = 2 * outputs.astype(np.float32)
    every = np.array(list(itertools.product(range(levels), repeat=3)), np.uint8)[:, :, None]
    _, target = likelihood.observe(every, jax.random.key(0))
    repeated = np.repeat(outputs, len(every), 0)
    assert float(jnp.sum(jnp.exp(likelihood.log_prob({}, repeated, target)))) == pytest.approx(
        1, abs=1e-5
    )
    drawn = likelihood.sample({}, repeated, jax.random.key(1))
    assert drawn.shape == every.shape == likelihood.mean(repeated).shape


def test_a_gaussian_gives_back_the_levels_it_was_shown():
    gaussian, image = LIKELIHOODS["gaussian"](17, 1), np.arange(17, dtype=np.uint8).repeat(50)
    _, target = gaussian.observe(image, jax.random.key(0))
    shown = gaussian.mean(target[..., None])
    np.testing.assert_array_equal(np.round((np.clip(shown, -1, 1) + 1) * 8), image)


def test_a_discretized_logistic_is_finite_far_from_its_mean_and_the_gaussian_bounds_bytes():
    logistic = LIKELIHOODS["discretized_logistic"](256, 1)
    outputs = np.zeros((1, 2, 1, 2), np.float32)
    outputs[..., 1] = -20  # clipped
    grey = np.array([[[0], [200]]], np.uint8)
    value, gradient = jax.value_and_grad(lambda o: logistic.log_prob({}, o, grey)[0])(outputs)
    assert np.isfinite(value) and np.isfinite(gradient).all()
    # A wide Gaussian is flat over [-1, 1]: every one of the levels is about equally likely.
    gaussian = LIKELIHOODS["gaussian"](256, 1)
    _, target = gaussian.observe(grey, jax.random.key(0))
    wide = {"log_scale": np.full(1, math.log(30.0))}
    density = 2 * (math.log(2 / 256) - math.log(30) - math.log(2 * math.pi) / 2)
    value = gaussian.log_prob(wide, np.zeros((1, 2, 1, 1), np.float32), target)
    assert float(value[0]) == pytest.approx(density, abs=2e-3)


def test_the_importance_weighted_bound_does_not_fall_with_more_samples():
    """Means over all subsets of eight draws: each larger one is at least as good, by Jensen."""
    weights = np.random.default_rng(0).normal(size=(8, 5)).astype(np.float32)
    means = []
    for k in range(1, 9):
        subsets = np.array(list(itertools.combinations(range(8), k)))
        bounds = jax.vmap(lambda rows: importance_weighted(jnp.asarray(weights)[rows]))(subsets)
        means.append(np.mean(bounds))
    assert np.all(np.diff(means) > 0)
    assert means[0] == pytest.approx(weights.mean(), abs=1e-5)
    evidence = np.log(np.mean(np.exp(weights), 0)).mean()
    assert means[-1] == pytest.approx(evidence, abs=1e-5)


def test_divergences_and_free_bits():
    kl = normal_kl(1.0, math.log(0.5), -1.0, math.log(2.0))
    assert float(kl) == pytest.approx(math.log(4) + (0.25 + 4) / 8 - 0.5)
    groups = jnp.array([[0.1, 2.0], [0.3, 4.0]])
    assert float(kl_with_free_bits(groups, 0.5)) == pytest.approx(0.5 + 3.0)
    gradient = jax.grad(lambda x: kl_with_free_bits(x, 0.5))(groups)
    np.testing.assert_allclose(gradient, [[0, 0.5], [0, 0.5]])


class LinearVae:
    """A linear model of normal data in six dimensions, through the shared step."""

    def __init__(self):
        rng = np.random.default_rng(0)
        mixing = rng.normal(size=(6, 2)) * [1.5, 0.7]
        self.x = rng.normal(size=(400, 2)) @ mixing.T + 0.3 * rng.normal(size=(400, 6)) + 0.5
        self.network = DenseVae(DenseVaeConfig(latent_dim=2, num_layers=0), (6, 1))

    def init(self, rng):
        params = self.network.init(rng, jnp.zeros((1, 6, 1)))["params"]
        # Log-scales start the same for all data: a random linear map of it would be huge at some.
        kernel = params["posterior"]["kernel"].at[:, 2:].set(0)
        params = {**params, "posterior": {**params["posterior"], "kernel": kernel}}
        return {"vae": params, "likelihood": {"log_scale": jnp.float32(0)}}, ()

    def phases(self, params):
        rate = optax.cosine_decay_schedule(0.02, 1000)
        return (Phase("bound", ("vae", "likelihood"), self._loss, optax.adam(rate)),)

    def _loss(self, params, mutables, batch, info):
        """With the expectation over the latents of a linear decoder taken exactly."""
        variables = {"params": params["vae"]}
        features = self.network.apply(variables, batch["x"], None, method="bottom_up")
        decode = lambda z: self.network.apply(
            variables, None, None, batch=z.shape[0], given=[z], method="top_down"
        )[0][..., 0]
        mean, log_scale = features
        scale = params["likelihood"]["log_scale"]
        fit = gaussian_log_density(batch["x"], decode(mean), scale)
        kernel = params["vae"]["last"]["kernel"]
        spread = jnp.exp(2 * log_scale) @ jnp.sum(jnp.square(kernel), 1)
        kl = jnp.sum(normal_kl(mean, log_scale), 1)
        bound = fit - spread * jnp.exp(-2 * scale) / 2 - kl
        return LossOutput(-jnp.mean(bound), {}, mutables)

    def evidence(self) -> float:
        """Of probabilistic PCA at its best (Tipping and Bishop 1999, equations 4, 7 and 8)."""
        values = np.sort(np.linalg.eigvalsh(np.cov(self.x.T, bias=True)))[::-1]
        noise = values[2:].mean()
        determinant = np.log(values[:2]).sum() + 4 * math.log(noise)
        return -(6 * math.log(2 * math.pi) + determinant + 6) / 2


def test_a_linear_vae_reaches_the_evidence_of_probabilistic_pca():
    task = LinearVae()
    state = init_state(task, jax.random.key(0), {})
    step = make_step(task.phases(state.params))
    batch = {"x": jnp.asarray(task.x, jnp.float32)[..., None]}
    run = jax.jit(lambda s: jax.lax.scan(lambda s, _: (step(s, batch)[0], None), s, None, 1000)[0])
    state = run(state)
    _, report = jax.jit(step)(state, batch)
    bound, evidence = -float(report.metrics["loss"]), task.evidence()
    assert evidence - 1e-2 < bound < evidence + 1e-3

    def drawn(key):
        """Log importance weights, as the task takes them."""
        variables = {"params": state.params["vae"]}
        features = task.network.apply(variables, batch["x"], None, method="bottom_up")
        outputs, latents = task.network.apply(
            variables, features, None, batch=400, method="top_down", rngs={"latents": key}
        )
        scale = state.params["likelihood"]["log_scale"]
        return gaussian_log_density(batch["x"], outputs[..., 0], scale) + log_ratio(latents)

    # The posterior is exact there: every draw weighs about as much as the evidence of its example.
    weights = jax.jit(jax.vmap(drawn))(jax.random.split(jax.random.key(1), 16))
    one, many = float(weights.mean()), float(importance_weighted(weights).mean())
    assert evidence - 2e-2 < one < many < evidence + 2e-2
    assert float(weights.std(0).mean()) < 0.2


@pytest.fixture(scope="module", params=["dense", "ladder"])
def conditional(request):
    """A conditional task and random parameters of it."""
    return filled(make("--vae.condition=class", *(DENSE if request.param == "dense" else LADDER)))


def filled(task: Vae) -> tuple:
    """The task, random parameters of it, and a batch."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(task.init, jax.random.key(0))[0]
    params = jax.tree.map(lambda x: 0.3 * rng.normal(size=x.shape).astype(np.float32), shapes)
    return task, params, task.data.loader.gather(task.data.loader.open("train"), np.arange(8))


def test_latents_decode_the_same_again_and_labels_count(conditional):
    task, params, batch = conditional

    @jax.jit
    def both(params, x, labels):
        features = task.bottom_up(params, x, labels)
        y, latents = task.top_down(params, features, labels, jax.random.key(0))
        given = [stage.z for stage in latents]
        again, _ = task.top_down(params, None, labels, batch=8, given=given)
        other, _ = task.top_down(params, None, (labels + 1) % 10, batch=8, given=given)
        return y, again, other, kl_of(latents), log_ratio(latents)

    y, again, other, kl, ratio = both(params, task.data.scaled(batch["image"]), batch["labels"])
    assert y.shape == (8, 8, 8, 1, 17)
    np.testing.assert_allclose(y, again, atol=1e-4)
    assert np.abs(y - other).max() > 1e-3
    assert kl.shape == (8, 3) and ratio.shape == (8,) and np.all(kl >= 0)


def test_a_traversal_starts_at_the_image_of_its_seed():
    task, params, _ = filled(make(*DENSE))
    request = lambda **more: VaeRequest(show="traversal", num_samples=2, columns=3, **more)
    walk = lambda seed: latent_traversal(task, params, request(seed=seed))[0]
    first = walk(0)
    assert first.shape == (6, 8, 8, 1) and np.any(first[0] != first[2])
    assert np.any(first != walk(1))
    shown = task.sample(params, {}, request())
    assert shown.columns == 3 and shown.around.columns == ("-3", "+0", "+3")
    dimensions = latent_traversal(task, params, request())[2]
    assert shown.around.rows == tuple(f"latent {dimension}" for dimension in dimensions)


def test_the_weight_of_the_divergence_rises_and_the_bound_is_what_it_is_made_of():
    warm, params, batch = filled(make("--vae.kl_warmup=4", "--vae.beta=2", *DENSE))

    @jax.jit
    def losses(params, step):
        output = warm._loss(params, {}, batch, StepInfo(jax.random.key(1), step))
        return output.loss, output.metrics["reconstruction"], output.metrics["kl"]

    for step, weight in ((0, 0.5), (1, 1.0), (3, 2.0), (9, 2.0)):
        loss, reconstruction, kl = losses(params, np.int32(step))
        expected = (reconstruction + weight * kl) / 64
        assert float(loss) == pytest.approx(float(expected), rel=1e-5)


def test_a_ladder_is_trained_and_walked_through(tmp_path, capsys):
    run_to(tmp_path, 1, *TINY, *LADDER, "--eval.batches=0")
    capsys.readouterr()
    request = ("--show=traversal", "--num_samples=3", "--columns=3")
    assert sample.main([f"--workdir={tmp_path}", *request]) == 0
    assert pathlib.Path(capsys.readouterr().out.strip()).read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match="--seed=1 is for --show=prior or traversal, not interp"):
        sample.main([f"--workdir={tmp_path}", "--show=interpolation", "--seed=1"])


@pytest.mark.smoke
def test_a_run_goes_on_is_scored_and_shown(tmp_path, capsys):
    flags = (*TINY, *DENSE, "--vae.likelihood=gaussian", "--vae.samples=2", "--checkpoint.every=2")
    whole = run_to(tmp_path / "whole", 4, *flags)
    assert resumed(tmp_path / "whole", 2, tmp_path / "on", 4, *flags) == whole and len(whole) == 4
    capsys.readouterr()
    request = (f"--workdir={tmp_path / 'whole'}", "--batches=1", "--importance_samples=4")
    assert evaluate.main(request) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["importance_bits_per_dim"] <= scores["elbo_bits_per_dim"]
    assert scores["bits_per_dim"] == pytest.approx(scores["elbo_bits_per_dim"], rel=0.3)
    for show in ("prior", "reconstructions", "interpolation", "traversal"):
        request = [f"--workdir={tmp_path / 'whole'}", f"--show={show}", "--num_samples=3"]
        if show in ("interpolation", "traversal"):
            request.append("--columns=3")
        assert sample.main(request) == 0
        written = pathlib.Path(capsys.readouterr().out.strip())
        assert written.read_bytes().startswith(b"\x89PNG") and show in written.name


def test_walks():
    first, second = jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 2.0]])
    linear, round_trip = path(first, second, 3, "linear"), path(first, second, 3, "spherical")
    np.testing.assert_allclose(linear[:, 0], [[1, 0], [0.5, 1], [0, 2]])
    np.testing.assert_allclose(round_trip[:, 0], [[1, 0], [0.5**0.5, 2**0.5], [0, 2]], atol=1e-6)
    points = traversal(np.zeros(3), np.array([2, 0]), np.array([[1.0, 2.0], [3.0, 4.0]]))
    np.testing.assert_allclose(points, [[0, 0, 1], [0, 0, 2], [3, 0, 0], [4, 0, 0]])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--vae.samples=5", "--vae.beta=2"), "importance-weighted bound, which has no"),
        (("--vae.network=ladder", "--ladder_vae.stages=3x1,6x1"), "does not fit images of 8x8"),
        (("--vae.network=ladder", "--ladder_vae.stages=4x1,6x1"), "multiple of the one before"),
        (("--vae.network=ladder", "--ladder_vae.stages=8"), "is not like 1x1,4x2,8x2"),
        (("--dense_vae.num_layers=0", "--dense_vae.hidden_dim=8"), "has no hidden layer"),
        (("--ladder_vae.channels=8",), "--ladder_vae.* is set, but --vae.network=dense"),
    ],
)
def test_bad_flags_are_refused_in_one_line(flags, said):
    with pytest.raises(ConfigError, match=said.replace("*", r"\*")) as error:
        make(*flags)
    assert "\n" not in str(error.value)
