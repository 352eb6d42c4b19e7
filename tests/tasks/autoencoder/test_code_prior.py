"""Two stages: an autoencoder with codes, and a transformer that learns and samples them."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genai_jax import evaluate, sample, train
from genai_jax.components import parse_run
from genai_jax.config import ConfigError
from genai_jax.networks.latent import quantization
from genai_jax.tasks.autoencoder.code_prior import CodePrior
from genai_jax.tasks.autoencoder.task import Autoencoder
from genai_jax.tasks.language.sampling import Settings, TokenSampler
from genai_jax.training.step import init_state, make_step
from tests.tasks.runs import transferred

COMMON = (
    "--data.batch_size=8",
    "--optimizer.schedule=constant",
    "--optimizer.warmup_steps=0",
    "--train.progress=false",
    "--eval.batches=1",
)
FIRST = (
    *COMMON, "--task=autoencoder", "--autoencoder.channels=4", "--train.steps=2",
    "--autoencoder.channel_multipliers=1,1,1", "--autoencoder.latent=rvq",
    "--quantizer.codebooks=2", "--quantizer.codes=8",
)  # fmt: skip
SECOND = (
    *COMMON, "--task=code_prior", "--code_prior.condition=class", "--transformer.num_layers=1",
    "--transformer.embed_dim=8", "--transformer.num_heads=1", "--transformer.scan_layers=false",
)  # fmt: skip


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp("first")
    assert train.main([*FIRST, f"--workdir={workdir}"]) == 0
    return workdir


@pytest.fixture(scope="module")
def task(first) -> CodePrior:
    return CodePrior(parse_run([*SECOND, f"--code_prior.autoencoder={first}"]))


@pytest.fixture(scope="module")
def state(task):
    """A state whose prior is random, and the autoencoder as trained."""
    key, rng = jax.random.key(0), np.random.default_rng(0)
    shapes = jax.eval_shape(lambda key: init_state(task, key, {}), key)
    prior = jax.tree.map(
        lambda x: rng.normal(size=x.shape).astype(np.float32), shapes.params["prior"]
    )
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes.opt_state)
    params = {"prior": prior, **transferred(task)}
    return shapes.replace(step=np.int32(0), params=params, opt_state=zeros, rng=key)


def batch_of(task):
    return task.data.loader.gather(task.data.loader.open("train"), np.arange(8))


def test_codes_become_tokens_and_images_again(task, state):
    batch, group = batch_of(task), state.params["autoencoder"]
    x = task.data.scaled(jnp.asarray(batch["image"]))
    codes = jax.jit(task.codec.codes)(**group, x=x)
    assert codes.shape == (8, *task.code_shape) == (8, 2, 2, 2)
    tokens = task.tokens_of(codes)
    np.testing.assert_array_equal(task.codes_of(tokens), codes)
    assert np.all(np.asarray(tokens) // 8 == np.tile([0, 1], 4))  # codebooks take turns
    autoencoder = Autoencoder(task.latents.config)
    model = {"autoencoder": group["params"]}, group["mutables"]
    expected = jax.jit(lambda x: autoencoder.decode(*model, autoencoder.encode(*model, x)))(x)
    decoded = jax.jit(task.codec.decode_codes)(**group, codes=codes)
    np.testing.assert_allclose(decoded, expected, atol=1e-5)
    np.testing.assert_array_equal(task.front(batch["labels"], 8)[:, 0], 16 + batch["labels"][:, 0])


def test_codes_of_a_grid_give_its_vectors():
    z = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32) * 2
    quantized = quantization.finite_scalar(z, (4, 5, 2))
    grid = quantization.on_grid(quantized.codes, (4, 5, 2))
    np.testing.assert_allclose(grid, quantized.vectors)


def test_only_the_prior_moves_and_the_loss_counts_codes_alone(task, state):
    batch = batch_of(task)
    after, report = jax.jit(make_step(task.phases(state.params)))(state, batch)
    equal = lambda group: jax.tree.map(np.array_equal, state.params[group], after.params[group])
    assert all(jax.tree.leaves(equal("autoencoder")))
    assert not all(jax.tree.leaves(equal("prior")))
    # By hand: every code's log-softmax, given the class and the codes before it.
    group, variables = state.params["autoencoder"], {"params": state.params["prior"]}
    x = task.data.scaled(jnp.asarray(batch["image"]))
    tokens = task.tokens_of(jax.jit(task.codec.codes)(**group, x=x))
    sequence = jnp.concatenate([task.front(batch["labels"], 8), tokens], 1)

    @jax.jit
    def log_probs(tokens):
        hidden, _ = task.model.apply(variables, tokens)
        return jax.nn.log_softmax(task.model.apply(variables, hidden, method="logits"))

    logits = log_probs(sequence[:, :-1])
    nll = -jnp.take_along_axis(logits, tokens[..., None], -1).mean()
    assert float(report.metrics["loss"]) == pytest.approx(float(nll), rel=1e-5)


def test_both_stages_through_the_commands(first, tmp_path, capsys):
    second = tmp_path / "second"
    flags = (*SECOND, f"--code_prior.autoencoder={first}", f"--workdir={second}")
    assert train.main([*flags, "--train.steps=2"]) == 0
    capsys.readouterr()
    assert evaluate.main([f"--workdir={second}", "--batches=1"]) == 0
    assert json.loads(capsys.readouterr().out)["bits_per_code"] > 2
    assert sample.main([f"--workdir={second}", "--num_samples=4", "--label=3", "--top_k=2"]) == 0
    assert pathlib.Path(capsys.readouterr().out.strip()).read_bytes().startswith(b"\x89PNG")


def test_samples_keep_to_the_codebook_whose_turn_it_is(task, state):
    sampler, settings = TokenSampler(task.decoder()), Settings(task.num_codes, temperature=2.0)
    prompts = list(np.asarray(task.front(np.arange(6, dtype=np.int32)[:, None], 6)))
    sampled = sampler(state.params, prompts, jax.random.key(0), settings)
    codes = np.asarray(task.codes_of(sampled.tokens[:, task.prefix :]))
    assert codes.min() >= 0 and codes.max() < 8 and len(np.unique(codes)) > 4


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--code_prior.autoencoder=",), "--code_prior.autoencoder is not set"),
        (
            ("--transformer.positions=learned", "--transformer.max_length=8"),
            "--transformer.max_length=8 is less than the 9 tokens",
        ),
        (("--data.dataset=shapes",), r"--code_prior.autoencoder=.* was trained on images of shape"),
    ],
    ids=["none", "length", "shape"],
)
def test_bad_flags_are_refused_in_one_line(flags, said, first):
    with pytest.raises(ConfigError, match=said) as error:
        CodePrior(parse_run([*SECOND, f"--code_prior.autoencoder={first}", *flags]))
    assert "\n" not in str(error.value)


def test_an_autoencoder_without_codes_is_refused(tmp_path):
    (tmp_path / "flags.txt").write_text("--task=autoencoder\n")
    with pytest.raises(
        ConfigError, match=r"latent=kl, which has no codes; only vq, rvq, and fsq do"
    ):
        CodePrior(parse_run([*SECOND, f"--code_prior.autoencoder={tmp_path}"]))
