"""In bfloat16, gradients and other long sums are added up in float32, in every family."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genai_jax.components import make_task, parse_run
from genai_jax.config import ConfigError
from genai_jax.networks.layers.convolution import Conv
from genai_jax.networks.layers.embedding import Embed
from genai_jax.tasks.protocol import step_spec
from genai_jax.tasks.registry import TASKS
from genai_jax.training.execution import initializer
from genai_jax.training.phases import phases_of
from genai_jax.training.step import make_step
from tests.tasks.half_precision import half_sums

ROWS = 7  # prime, so that it divides no size but those of a batch
TRANSFORMER = (
    "--data.sequence_length=10", "--transformer.num_layers=2", "--transformer.embed_dim=16",
    "--transformer.num_heads=2",
)  # fmt: skip
DIT = (
    "--diffusion.network=dit", "--dit.num_layers=2", "--dit.embed_dim=16", "--dit.num_heads=2",
    "--dit.patch_size=4",
)  # fmt: skip
UNET = ("--unet.channels=8", "--unet.channel_multipliers=1,2", "--unet.blocks_per_level=1")
TEXT = ("--diffusion.condition=text", "--data.captions", "--data.caption_length=10")
CODEC = ("--autoencoder.channels=4", "--autoencoder.channel_multipliers=1,1")
GAN = ("--generator.channels=4", "--generator.latent_dim=6", "--critic.channels=4")
CASES = {
    "language_model": TRANSFORMER,
    "language_model tied": (
        *TRANSFORMER, "--transformer.tie_embeddings", "--transformer.activation=gelu",
        "--transformer.positions=learned", "--transformer.norm=layernorm",
    ),
    "language_model grouped": (
        *TRANSFORMER, "--transformer.num_kv_heads=1", "--transformer.window=5",
        "--language_model.z_loss=1e-3", "--language_model.loss_chunk=5",
        "--train.accumulate=2", f"--data.batch_size={2 * ROWS}",
    ),
    "language_model experts": (*TRANSFORMER, "--moe.num_experts=4"),
    "language_model capacity": (
        *TRANSFORMER, "--transformer.tie_embeddings", "--moe.num_experts=4",
        "--moe.capacity_factor=1.25",
    ),
    "diffusion dit class": (*DIT, "--diffusion.condition=class"),
    "diffusion dit text": (*DIT, *TEXT, "--dit.text_layers=1"),
    "diffusion dit joint": (*DIT, *TEXT, "--dit.text_layers=1", "--dit.text_mode=joint"),
    "diffusion unet class": (*UNET, "--diffusion.condition=class"),
    "diffusion unet video": (
        *UNET, "--data.dataset=moving_shapes", "--data.num_frames=2",
        "--unet.attention_resolutions=8",
    ),
    "few_step": (
        *DIT, "--few_step.method=shortcut", "--diffusion.schedule=flow",
        "--diffusion.parameterization=velocity",
    ),
    "autoencoder": (
        *CODEC, "--autoencoder_loss.discriminator_weight=0.5", "--discriminator.channels=4",
        "--discriminator.num_layers=1",
    ),
    "autoencoder vq": (*CODEC, "--autoencoder.latent=vq", "--quantizer.codes=16"),
    "image_classifier": ("--classifier.channels=8", "--classifier.num_stages=2"),
    "vae": ("--dense_vae.latent_dim=3", "--dense_vae.hidden_dim=16", "--dense_vae.num_layers=1"),
    "vae ladder": (
        "--vae.network=ladder", "--ladder_vae.stages=1x1,8x2", "--ladder_vae.channels=4",
        "--ladder_vae.latent_channels=2", "--vae.condition=class",
    ),
    "gan": GAN,
    "gan style": (
        *GAN, "--generator.network=style", "--generator.style_dim=5", "--gan.condition=class",
        "--generator.mapping_layers=1", "--critic.network=residual", "--critic.spectral_norm",
        "--critic.minibatch_std", "--gan.r1=1", "--gan.r1_every=2", "--gan.path_length=1",
    ),
    "rbm": ("--rbm.num_hidden=5",),
}  # fmt: skip
ELSEWHERE = {
    "normalizing_flow": "it runs in float32 only",
    "code_prior": "the transformer of a language model, on an autoencoder that is not trained",
}


def traced_step(*flags: str):
    """The training step of a run as a program; nothing is compiled."""
    config = parse_run([f"--data.batch_size={ROWS}", "--dtype=bfloat16", *flags])
    task = make_task(config)
    state = jax.eval_shape(initializer(task, config), jax.random.key(0))
    phases = phases_of(task, config)(state.params)
    step = make_step(
        phases, accumulate=config.train.accumulate, averages={}, materialize=task.materialize
    )
    batch = {n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in step_spec(task).items()}
    return jax.make_jaxpr(step)(state.replace(ema={}), batch)


@pytest.mark.parametrize("case", CASES)
def test_no_step_adds_up_in_half_precision(case):
    program = traced_step(f"--task={case.split()[0]}", *CASES[case])
    assert list(half_sums(program.jaxpr, ROWS)) == []


def test_every_family_is_among_the_cases():
    assert {case.split()[0] for case in CASES} | ELSEWHERE.keys() == TASKS.keys()


def test_sums_in_half_precision_are_found():
    def of_bias(b, x):
        return jnp.sum((x * 2 + b.astype(x.dtype)).astype(jnp.float32))

    def of_rows(table, index):
        return jnp.sum(table.astype(jnp.bfloat16)[index].astype(jnp.float32))

    def of_turns(kernel, x):
        kernel = kernel.astype(x.dtype)
        return jnp.sum(jax.lax.scan(lambda x, _: (x @ kernel, None), x, length=3)[0])

    b, x = jnp.zeros(3), jnp.zeros((ROWS, 3), jnp.bfloat16)
    found = {
        "reduce_sum": (of_bias, b, x),
        "scatter-add": (of_rows, jnp.zeros((4, 3)), jnp.zeros(ROWS, jnp.int32)),
        "add_any": (of_turns, jnp.zeros((3, 3)), x),
    }
    for name, (function, *arguments) in found.items():
        program = jax.make_jaxpr(jax.grad(function))(*arguments)
        assert [sum.split()[0] for sum in half_sums(program.jaxpr, ROWS)] == [name]


def test_gradients_of_many_ones_are_their_number():
    """In bfloat16, 256 + 1 is 256."""
    tokens = jnp.full((64, 1024), 3)
    embed = Embed(5, 2, dtype=jnp.bfloat16)
    params = embed.init(jax.random.key(0), tokens[:1])
    grad = jax.grad(lambda p: jnp.sum(embed.apply(p, tokens).astype(jnp.float32)))(params)
    np.testing.assert_array_equal(grad["params"]["embedding"][3], tokens.size)

    pictures = jnp.zeros((8, 32, 32, 1))
    conv = Conv(2, (3, 3), dtype=jnp.bfloat16)
    params = conv.init(jax.random.key(0), pictures[:1])
    grad = jax.grad(lambda p: jnp.sum(conv.apply(p, pictures).astype(jnp.float32)))(params)
    np.testing.assert_array_equal(grad["params"]["bias"], pictures.size)


def test_float16_whose_gradients_would_need_loss_scaling_is_refused():
    with pytest.raises(ConfigError, match=r"one of <float32\|bfloat16>"):
        parse_run(["--dtype=float16"])
