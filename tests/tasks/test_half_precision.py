"""In bfloat16, gradients and other long sums are added up in float32, in every family."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genai_jax.components import parse_run
from genai_jax.config import ConfigError
from genai_jax.networks.layers.convolution import Conv
from genai_jax.networks.layers.embedding import Embed
from tests.every_flag import BASES, flags_of_base, needs_a_run
from tests.tasks.factorizations import batched_factorizations
from tests.tasks.half_precision import half_sums
from tests.tasks.traced import traced_step

ROWS = 7  # prime, so that it divides no size but those of a batch
# Beside the bases, what changes how parameters are used: base -> flags of each case.
MORE = {
    "language_model": (
        (
            "--transformer.tie_embeddings", "--transformer.activation=gelu",
            "--transformer.positions=learned", "--transformer.norm=layernorm",
            "--transformer.use_bias",
        ),
        (
            "--transformer.num_kv_heads=1", "--transformer.window=5",
            "--language_model.z_loss=1e-3", "--language_model.loss_chunk=5",
            "--train.accumulate=2", f"--data.batch_size={2 * ROWS}",
        ),
    ),
    "language_model states": tuple(
        (f"--transformer.pattern={pattern}", "--transformer.mlp_dim=0")
        for pattern in (
            "mamba2,rg_lru", "s4,s4d", "gated_linear_attention,gated_delta_rule", "lstm,mlstm",
            "gru,minimal_gru", "liquid,lstm",
        )
    ),
    "language_model experts": (
        ("--moe.balance_rate=0.1", "--moe.load_balance=0", "--language_model.ahead=1"),
        ("--transformer.tie_embeddings", "--moe.capacity_factor=1.25"),
    ),
    "neural_lm": (("--neural_lm.direct",),),
    "diffusion": (
        ("--diffusion.condition=class",),
        ("--data.dataset=moving_shapes", "--data.num_frames=2", "--unet.attention_resolutions=8"),
    ),
    "diffusion text": (("--dit.text_mode=joint",),),
    "vae ladder": (("--vae.condition=class",),),
    "gan style": (
        (
            "--gan.condition=class", "--critic.spectral_norm", "--critic.minibatch_std",
            "--gan.r1=1", "--gan.r1_every=2", "--gan.path_length=1",
        ),
    ),
}  # fmt: skip
WHOLE = {"few_step shortcut": ("--few_step.bootstrap=1.0",)}  # else for a part of the rows
FLOAT32 = {"normalizing_flow", "word_vectors"}  # run in nothing else
WITHOUT_A_STEP = {"ngram", "hmm", "responder"}
RECORDED = pytest.mark.depends_on("every flag")  # those that need other runs
CASES = [
    pytest.param(base, flags, marks=[RECORDED] if needs_a_run(base) else [])
    for base in sorted(BASES.keys() - FLOAT32 - WITHOUT_A_STEP)
    for flags in ((), *MORE.get(base, ()))
]


@pytest.mark.parametrize(("base", "flags"), CASES)
def test_no_step_adds_up_in_half_precision(base, flags):
    """And none needs LAPACK for many matrices at once, for which jax 0.10 can wait forever."""
    own = ("--dtype=bfloat16", f"--data.batch_size={ROWS}", *WHOLE.get(base, ()), *flags)
    program = traced_step(*flags_of_base(base), *own)
    assert list(half_sums(program.jaxpr, ROWS)) == []
    assert list(batched_factorizations(program.jaxpr)) == []


@pytest.mark.parametrize("base", sorted(FLOAT32))
def test_no_step_in_float32_needs_lapack_for_many_matrices(base):
    assert not [*batched_factorizations(traced_step(*flags_of_base(base)).jaxpr)]


def test_sums_in_half_precision_are_found():
    def of_bias(b, x):
        return jnp.sum((x * 2 + b.astype(x.dtype)).astype(jnp.float32))

    def of_rows(table, index):
        return jnp.sum(table.astype(jnp.bfloat16)[index].astype(jnp.float32))

    def of_turns(kernel, x):
        kernel = kernel.astype(x.dtype)
        return jnp.sum(jax.lax.scan(lambda x, _: (x @ kernel, None), x, length=3)[0])

    b, x = jnp.zeros(3), jnp.zeros((ROWS, 3), jnp.bfloat16)

    def in_a_loop(add):
        """The rows of x, added one after another."""
        turn = lambda i, total: add(total, jax.lax.dynamic_index_in_dim(x, i, keepdims=False))
        return jax.lax.fori_loop(0, ROWS, turn, x[0])

    found = {
        "reduce_sum": (of_bias, b, x),
        "scatter-add": (of_rows, jnp.zeros((4, 3)), jnp.zeros(ROWS, jnp.int32)),
        "add_any": (of_turns, jnp.zeros((3, 3)), x),
    }
    for name, (function, *arguments) in found.items():
        program = jax.make_jaxpr(jax.grad(function))(*arguments)
        assert [sum.split()[0] for sum in half_sums(program.jaxpr, ROWS)] == [name]
    zero = jnp.bfloat16(0)
    for name, function in {
        "cumsum": lambda x: jnp.cumsum(x, 0),
        "reduce": lambda x: jax.lax.reduce(x, zero, lambda a, b: a + b * 1, [0]),
        "add": lambda x: in_a_loop(jnp.add),
    }.items():
        program = jax.make_jaxpr(function)(x)
        assert {sum.split()[0] for sum in half_sums(program.jaxpr, ROWS)} == {name}
    for harmless in (lambda x: in_a_loop(jnp.maximum), lambda x: jnp.max(x, 0)):
        assert not [*half_sums(jax.make_jaxpr(harmless)(x).jaxpr, ROWS)]


def test_factorizations_of_many_matrices_are_found():
    many = jnp.stack([jnp.eye(3)] * 2)
    for function in (jnp.linalg.solve, lambda a, b: jnp.linalg.qr(a @ b)[0]):
        jitted = jax.jit(function)
        assert [*batched_factorizations(jax.make_jaxpr(jitted)(many, many).jaxpr)]
        assert not [*batched_factorizations(jax.make_jaxpr(jitted)(many[0], many[0]).jaxpr)]


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
