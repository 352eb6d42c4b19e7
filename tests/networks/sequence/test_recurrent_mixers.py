"""Every mixer: decoding equals the full pass, and documents do not mix."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genai_jax.config import ConfigError, parse
from genai_jax.networks.sequence.config import TransformerConfig
from genai_jax.networks.sequence.flops import transformer_forward_flops
from genai_jax.networks.sequence.mixers import MIXERS, load_mixer
from genai_jax.networks.sequence.mixers.protocol import TokenContext
from genai_jax.networks.sequence.transformer import Transformer, partition_rules
from genai_jax.training.sharding import logical_axes, path_name
from tests.commands import report_of

CONFIG = TransformerConfig(num_layers=1, embed_dim=8, num_heads=2, mlp_dim=0)
BATCH, LENGTH, CUT = 2, 12, 5
# One of the dilations stands for all.
OTHERS = {f"dilated{2**i}" for i in range(10) if i != 2}
NAMES = [name for name in MIXERS if name not in OTHERS]
OPTIONS = {
    "dilated_attention": dict(dilation=2, window=2),
    "block_sparse_attention": dict(block_size=2, near_blocks=0, block_stride=2),
}
every_mixer = pytest.mark.parametrize("name", NAMES)
X = jax.random.normal(jax.random.key(0), (BATCH, LENGTH, CONFIG.embed_dim))
POSITIONS = jnp.broadcast_to(jnp.arange(LENGTH), (BATCH, LENGTH))


@functools.cache
def build(name: str):
    """A mixer, its parameters, and a compiled call."""
    config = dataclasses.replace(CONFIG, pattern=name, **OPTIONS.get(name, {}))
    mixer = load_mixer(name)(config=config)
    params = jax.jit(mixer.init)(jax.random.key(1), X, TokenContext(POSITIONS))
    noise = lambda a: a + 0.1 * jax.random.normal(jax.random.key(a.size), a.shape)
    params = jax.tree.map(noise, params)  # nothing stays zero
    return mixer, params, jax.jit(mixer.apply)


def call(name: str, x, starts=None, state=None, lengths=None, segment_ids=None):
    _, params, apply = build(name)
    starts = np.zeros(x.shape[0], int) if starts is None else starts
    positions = jnp.asarray(starts)[:, None] + jnp.arange(x.shape[1])
    lengths = None if lengths is None else jnp.asarray(lengths)
    return apply(params, x, TokenContext(positions, segment_ids, lengths), state)


def empty(name: str, rewind: int = 0):
    mixer = build(name)[0]
    return mixer.empty_state(mixer.config, BATCH, 16, jnp.float32, rewind)


@every_mixer
def test_decoding_is_the_full_pass(name):
    want, none = call(name, X)
    assert none is None and want.shape == X.shape
    ends = np.array([3, CUT])
    padded = jnp.where(jnp.arange(CUT)[:, None] < ends[:, None, None], X[:, :CUT], 7.0)
    y, state = call(name, padded, state=empty(name), lengths=ends)
    for row, end in enumerate(ends):
        np.testing.assert_allclose(y[row, :end], want[row, :end], atol=1e-5)
    state = state.select(jnp.array([1, 0]))
    x, want, ends = X[::-1], want[::-1], ends[::-1].copy()
    for _ in range(4):
        token = x[jnp.arange(BATCH), ends][:, None]
        y, state = call(name, token, ends, state, np.ones(BATCH, int))
        np.testing.assert_allclose(y[:, 0], want[np.arange(BATCH), ends], atol=1e-5)
        ends = ends + 1


@pytest.mark.parametrize("name", ["mamba", "lstm", "mlstm", "latent_attention", "dilated4"])
def test_a_rewound_state_continues_as_if_the_tokens_had_never_come(name):
    want, _ = call(name, X)
    _, state = call(name, X[:, :CUT], state=empty(name, rewind=3), lengths=np.array([CUT, CUT]))
    wrong = jnp.full((BATCH, CUT, X.shape[2]), 3.0)
    _, state = call(name, wrong, [CUT, CUT], state, np.array([3, 2]))
    ends = np.array([CUT, CUT - 1])
    state = state.rewind(jnp.asarray(ends))
    for _ in range(2):
        token = X[jnp.arange(BATCH), ends][:, None]
        y, state = call(name, token, ends, state, np.ones(BATCH, int))
        np.testing.assert_allclose(y[:, 0], want[np.arange(BATCH), ends], atol=1e-5)
        ends = ends + 1


@every_mixer
def test_other_documents_and_padding_change_nothing(name):
    ids = jnp.array([[0, 0, 1, 1, 1, 2, 2, 2, 2, 2, 0, 0]] * BATCH)
    inside = slice(5, 10)
    packed, _ = call(name, X, segment_ids=ids)
    other = X.at[:, :5].set(9.0).at[:, 10:].set(-9.0)
    changed, _ = call(name, other, segment_ids=ids)
    np.testing.assert_array_equal(packed[:, inside], changed[:, inside])
    if name == "block_sparse_attention":  # whose blocks are those of the row
        return
    moved, _ = call(name, jnp.roll(X, 2, 1), segment_ids=jnp.roll(ids, 2, 1))
    np.testing.assert_allclose(moved[:, 7:12], packed[:, inside], atol=1e-5)
    alone, _ = call(name, jnp.pad(X[:, inside], ((0, 0), (0, 7), (0, 0))))
    np.testing.assert_allclose(alone[:, :5], packed[:, inside], atol=1e-5)


@every_mixer
def test_every_parameter_has_a_rule_and_a_gradient(name):
    mixer, params, _ = build(name)
    model = Transformer(mixer.config, 11)
    tokens = jnp.zeros((1, 4), jnp.int32)
    shapes = jax.eval_shape(
        functools.partial(model.init, method="init_all"), jax.random.key(0), tokens
    )
    logical_axes(shapes["params"], partition_rules(mixer.config))
    assert "mlp" not in shapes["params"]["layers"]

    @jax.jit
    @jax.grad
    def gradient(params):
        ids = jnp.array([[1] * 6 + [2] * 6] * BATCH)
        y, _ = mixer.apply(params, X, TokenContext(POSITIONS, ids))
        return jnp.sum(jnp.square(y - 1))

    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient(params)):
        assert np.isfinite(leaf).all() and np.any(leaf != 0), path_name(path)


@every_mixer
def test_matmuls_of_the_full_pass_are_counted(name):
    """`dense` is two FLOPs for each kernel entry; the whole is at least that."""
    mixer, params, _ = build(name)
    named = {path_name(path): a.size for path, a in jax.tree_util.tree_leaves_with_path(params)}
    kernels = [
        size
        for path, size in named.items()
        if path.endswith(("kernel", "_gate")) and "convolution" not in path
    ]
    flops = mixer.flops(mixer.config, LENGTH, 1)
    assert flops["dense"] == 2 * sum(kernels)
    parts = transformer_forward_flops(mixer.config, 11, LENGTH)
    assert parts["dense"] == flops["dense"] and parts["head"] == 2 * 8 * 11


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["pattern=lstm", "state_dim=4"], "--transformer.state_dim=4 is for the mixers s4, s4d, "
         "mamba, mamba2, of which --transformer.pattern=lstm has none"),
        (["state_dim=4"], "of which --transformer.pattern=attention has none"),
        (["pattern=mamba", "qk_norm=true"], "--transformer.qk_norm=True is for the mixers "
         "attention, dilated_attention, block_sparse_attention, of which"),
        (["pattern=mamba", "positions=alibi"], "--transformer.positions=alibi is for attention"),
        (["pattern=mamba", "expand=0"], "--transformer.expand=0 leaves no channels"),
        (["pattern=latent_attention", "rotary_dim=3"], "--transformer.rotary_dim=3 is odd"),
        (["pattern=mambo"], "has the unknown mixer 'mambo'; known: attention, "
         "dilated_attention, block_sparse_attention, latent_attention, s4, s4d, mamba, mamba2,"),
    ],
)  # fmt: skip
def test_options_that_no_mixer_has_are_named(flags, said):
    with pytest.raises(ConfigError) as error:
        parse([f"--transformer.{flag}" for flag in flags], {"transformer": TransformerConfig})
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.depends_on("whole runs")
def test_eight_devices_equal_one():
    report = report_of("networks/sequence/eight_devices_mixers.py")
    assert set(report["hidden"]) == set(NAMES) and report["sharded"] > 40
    assert all(gap < 1e-5 for gap in report["hidden"].values()), report["hidden"]
    assert all(gap < 1e-4 for gap in report["gradients"].values()), report["gradients"]
