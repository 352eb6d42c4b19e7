"""Attention to few earlier tokens: masks, tokens put apart, and a window with sinks."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels_pallas
from genai_jax.networks.sequence import transformer
from genai_jax.networks.sequence.config import TransformerConfig
from genai_jax.networks.sequence.mixers import load_mixer
from genai_jax.networks.sequence.mixers.protocol import TokenContext
from genai_jax.networks.sequence.mixers.streaming import StreamingState, attend_to_first
from genai_jax.networks.sequence.sparse_masks import BlockSparse, Dilated
from genai_jax.networks.sequence.transformer import Transformer

MASKS = [
    Dilated(3),
    Dilated(2, 2),
    BlockSparse(4, 0, 2),
    BlockSparse(3, 1, 3),
    BlockSparse(2, 0, 1),
]


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_what_a_mask_says_of_blocks_is_true(mask):
    size = 17
    q, k = np.arange(size)[:, None], np.arange(size)
    allowed = mask.allowed(q, k)
    assert np.all(allowed <= (k <= q)) and np.all(np.diag(allowed))
    for q_start in range(0, size, 3):
        for q_stop in range(q_start + 1, size + 1, 2):
            start, stop = mask.key_range(q_start, q_stop, size)
            seen = allowed[q_start:q_stop]
            assert not seen[:, :start].any() and not seen[:, stop:].any()
            for k_start in range(0, size, 2):
                for k_stop in range(k_start + 1, size + 1, 3):
                    part, kind = (
                        seen[:, k_start:k_stop],
                        mask.block_kind(q_start, q_stop, k_start, k_stop),
                    )
                    assert kind != "full" or part.all()
                    assert kind != "skipped" or not part.any()
    some = BlockSparse(4, 0, 2)
    assert some.block_kind(12, 16, 4, 8) == "skipped" and some.block_kind(12, 16, 0, 4) == "full"


def test_what_a_query_sees():
    seen = lambda mask, q: np.flatnonzero(mask.allowed(np.array(q), np.arange(20))).tolist()
    assert seen(Dilated(3), 10) == [1, 4, 7, 10]
    assert seen(Dilated(3, 2), 10) == [4, 7, 10]
    assert seen(BlockSparse(4, 0, 2), 14) == [0, 1, 2, 3, 8, 9, 10, 11, 12, 13, 14]
    assert seen(BlockSparse(4, 1, 4), 14) == [0, 1, 2, 3, 8, 9, 10, 11, 12, 13, 14]


def initialized(model: Transformer) -> dict:
    init = functools.partial(model.init, method="init_all")
    return jax.jit(init)(jax.random.key(1), jnp.zeros((1, 4), jnp.int32))


@pytest.mark.parametrize(
    ("positions", "window"), [("rope", None), ("alibi", 2), ("relative_buckets", 2)]
)
def test_tokens_put_apart_see_what_the_mask_says(positions, window):
    """The mixer against attention under its mask, in packed rows whose length 3 does not divide."""
    config = TransformerConfig(
        num_layers=1, embed_dim=8, num_heads=2, pattern="dilated_attention", dilation=3,
        window=window, positions=positions,
    )  # fmt: skip
    tokens = jax.random.randint(jax.random.key(0), (2, 14), 0, 11)
    segments = jnp.array([[1] * 6 + [2] * 7 + [0]] * 2)
    model = Transformer(config, 11)
    params = initialized(model)
    run = jax.jit(lambda p, model: model.apply(p, tokens, None, segments)[0], static_argnums=1)
    got, want = run(params, model), run(params, model.clone(mask=Dilated(3, window)))
    np.testing.assert_allclose(got, want, atol=1e-5)


STREAMING = TransformerConfig(
    num_layers=2, embed_dim=8, num_heads=2, num_kv_heads=1, window=3, sinks=2, mlp_dim=8
)
LENGTH = 14


@functools.cache
def streaming():
    """The parameters of a network with sinks, and a compiled call."""
    model = Transformer(STREAMING, 11)
    return initialized(model), jax.jit(model.apply)


TOKENS = jax.random.randint(jax.random.key(0), (2, LENGTH), 0, 11)


def test_a_state_of_constant_size_goes_on_as_the_full_pass():
    params, apply = streaming()
    want, _ = apply(params, TOKENS)
    state = transformer.empty_state(STREAMING, 2, 10_000, jnp.float32)
    assert max(a.size for a in jax.tree.leaves(state)) == 2 * 2 * 3 * 4  # layers, rows, window
    ends = np.array([5, 1])
    padded = jnp.where(jnp.arange(6) < ends[:, None], TOKENS[:, :6], 9)
    y, state = apply(params, padded, None, None, state, jnp.asarray(ends))
    for row, end in enumerate(ends):
        np.testing.assert_allclose(y[row, :end], want[row, :end], atol=1e-5)
    state, ends = state.select(jnp.array([1, 0])), ends[::-1].copy()
    tokens, want = TOKENS[::-1], want[::-1]
    while ends.max() < LENGTH:
        token = jnp.take_along_axis(tokens, ends[:, None], 1)
        y, state = apply(params, token, ends[:, None], None, state, jnp.ones(2, jnp.int32))
        np.testing.assert_allclose(y[:, 0], want[np.arange(2), ends], atol=1e-5)
        ends = ends + 1


@pytest.mark.parametrize(
    ("fields", "reach"),
    [
        (dict(positions="rope"), 3),
        (dict(positions="alibi"), 3),
        (dict(positions="relative_buckets", relative_buckets=6, relative_distance=8), 3),
        (dict(pattern="dilated_attention", dilation=2), 6),
        (dict(pattern="attention,rg_lru", num_layers=2), 3),
        (dict(pattern="attention,block_sparse_attention", num_layers=2, block_size=4), 3),
        (dict(pattern="attention,dilated_attention", num_layers=2, dilation=2, sinks=2), 3),
    ],
    ids=["rope", "alibi", "relative_buckets", "dilated", "hybrid", "blocks", "sinks"],
)
def test_a_window_needs_no_more_than_its_tokens(fields, reach):
    """For decoding, after prompts of two lengths, and after tokens were taken back."""
    shape = dict(num_layers=1, embed_dim=8, num_heads=2, num_kv_heads=1, window=3, mlp_dim=8)
    config = TransformerConfig(**(shape | fields))
    model, rows = Transformer(config, 11), jnp.arange(2)
    params, apply = initialized(model), jax.jit(model.apply)
    want, _ = apply(params, TOKENS)
    state = transformer.empty_state(config, 2, LENGTH, jnp.float32, rewind=2)
    longer = transformer.empty_state(config, 2, 10 * LENGTH, jnp.float32, rewind=2)
    sizes = lambda state: [a.shape for a in jax.tree.leaves(state)]
    assert ("block" in str(config.pattern)) == (sizes(state) != sizes(longer))
    assert (1, 2, reach + 2, 1, 4) in sizes(state)  # layers, rows, tokens, heads, head_dim
    ends = np.array([8, 3])
    _, state = apply(params, TOKENS[:, :8], None, None, state, jnp.asarray(ends))
    wrong, places = jnp.full((2, 2), 9), ends[:, None] + jnp.arange(2)
    _, state = apply(params, wrong, places, None, state, jnp.array([2, 1]))
    state = state.rewind(jnp.asarray(ends))
    for _ in range(4):
        token = TOKENS[rows, ends][:, None]
        y, state = apply(params, token, ends[:, None], None, state, jnp.ones(2, jnp.int32))
        np.testing.assert_allclose(y[:, 0], want[rows, ends], atol=1e-5)
        ends = ends + 1


def test_a_stream_that_was_rewound_continues_as_if_the_tokens_had_never_come():
    params, apply = streaming()
    want, _ = apply(params, TOKENS)
    state = transformer.empty_state(STREAMING, 2, LENGTH, jnp.float32, rewind=3)
    _, state = apply(params, TOKENS[:, :5], None, None, state, jnp.array([5, 5]))
    wrong, places = jnp.full((2, 5), 9), jnp.arange(5) + 5
    places = jnp.broadcast_to(places, (2, 5))
    _, state = apply(params, wrong, places, None, state, jnp.array([3, 2]))
    ends = np.array([5, 4])
    state = state.rewind(jnp.asarray(ends))
    for _ in range(3):
        token = jnp.take_along_axis(TOKENS, ends[:, None], 1)
        y, state = apply(params, token, ends[:, None], None, state, jnp.ones(2, jnp.int32))
        np.testing.assert_allclose(y[:, 0], want[np.arange(2), ends], atol=1e-5)
        ends = ends + 1


def test_what_a_stream_cannot_take_back():
    state = StreamingState.empty(2, 0, 3, 2, 1, 1, jnp.float32)
    tokens = jnp.arange(16.0).reshape(2, 8, 1, 1)
    state, *_ = state.add(tokens, tokens, None)
    kept = state.rewind(jnp.array([6, 8])).keys[..., 0, 0]
    np.testing.assert_array_equal(kept[:, 2:], [[3, 4, 5], [13, 14, 15]])
    for length in (5, 9):  # longer ago than is kept, and not seen yet
        assert np.isnan(state.rewind(jnp.full(2, length)).values).all()
    twice = state.rewind(jnp.array([7, 7])).rewind(jnp.array([6, 5]))
    np.testing.assert_array_equal(twice.keys[0, 2:, 0, 0], [3, 4, 5])
    assert np.isnan(twice.keys[1]).all()
    with pytest.raises(ValueError, match=r"cannot be rewound: make it with `empty_state"):
        StreamingState.empty(2, 0, 3, 0, 1, 1, jnp.float32).rewind(jnp.zeros(2, int))


def test_sinks_are_those_of_plain_attention():
    """Other attention in the same network is as it would be without them."""
    config = TransformerConfig(
        num_layers=2, embed_dim=8, num_heads=2, window=2, sinks=2,
        pattern="attention,dilated_attention", dilation=2,
    )  # fmt: skip
    mixer = load_mixer("dilated_attention")
    x, context = (
        jax.random.normal(jax.random.key(2), (2, LENGTH, 8)),
        TokenContext(jnp.broadcast_to(jnp.arange(LENGTH), (2, LENGTH))),
    )
    params = jax.jit(mixer(config=config).init)(jax.random.key(1), x, context)
    plain = dataclasses.replace(config, sinks=None)
    got, want = (jax.jit(mixer(config=c).apply)(params, x, context)[0] for c in (config, plain))
    np.testing.assert_array_equal(got, want)


def test_packed_documents_have_their_own_first_tokens():
    params, apply = streaming()
    row = jnp.concatenate([TOKENS[:1, :5], TOKENS[1:, :9]], 1)
    segments = jnp.array([[1] * 5 + [2] * 9])
    places = jnp.array([[*range(5), *range(9)]])
    packed, _ = apply(params, row, places, segments)
    alone, _ = apply(params, TOKENS)
    np.testing.assert_allclose(packed[0, :5], alone[0, :5], atol=1e-5)
    np.testing.assert_allclose(packed[0, 5:], alone[1, :9], atol=1e-5)
    changed, _ = apply(params, row.at[:, :5].set(3), places, segments)
    np.testing.assert_array_equal(changed[:, 5:], packed[:, 5:])


def test_sinks_and_window_are_one_softmax():
    """One layer without rotations, and its gradient, against attention under the whole mask."""
    config = dataclasses.replace(STREAMING, num_layers=1, positions="none")
    mixer = load_mixer("attention")(config=config)
    x = jax.random.normal(jax.random.key(2), (2, LENGTH, 8))
    places = jnp.broadcast_to(jnp.arange(LENGTH), (2, LENGTH))
    params = jax.jit(mixer.init)(jax.random.key(1), x, TokenContext(places))
    back = np.arange(LENGTH)[:, None] - np.arange(LENGTH)
    seen = (back >= 0) & ((back <= 3) | (np.arange(LENGTH) < 2))
    plain = mixer.clone(config=dataclasses.replace(config, sinks=None))

    @dataclasses.dataclass(frozen=True)
    class Whole(kernels_pallas.Mask):
        def allowed(self, q_ids, k_ids):
            return jnp.asarray(seen)[q_ids, k_ids]

        def key_range(self, q_start, q_stop, kv_length):
            return 0, kv_length

        def block_kind(self, q_start, q_stop, k_start, k_stop):
            return "partial"

    def loss(params, x, mixer, mask):
        y, _ = mixer.apply(params, x, TokenContext(places, mask=mask))
        return jnp.sum(jnp.sin(3 * y)), y

    graded = functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    run = jax.jit(graded(loss), static_argnums=(2, 3))
    got, want = run(params, x, mixer, None), run(params, x, plain, Whole())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, want)


@pytest.mark.parametrize(
    "fields",
    [
        dict(pattern="dilated_attention", dilation=3),
        dict(pattern="dilated_attention", dilation=2, window=4),
        dict(pattern="block_sparse_attention", block_size=4, near_blocks=0, block_stride=2),
        dict(pattern="block_sparse_attention", block_size=3, near_blocks=1, block_stride=3),
    ],
)
def test_pairs_that_a_mask_leaves_are_counted(fields):
    """With the diagonal as a half, as for every attention."""
    config = TransformerConfig(num_layers=1, embed_dim=8, num_heads=2, **fields)
    mixer, length = load_mixer(config.mixers[0]), 25
    places = np.arange(length)
    pairs = mixer.own_mask(config).allowed(places[:, None], places).sum()
    found = mixer.flops(config, length, 1)["attention"]
    assert found == pytest.approx(4 * 8 * (pairs / length - 0.5))


def test_pairs_of_sinks_are_counted():
    config = TransformerConfig(num_layers=1, embed_dim=8, num_heads=2, window=3, sinks=2)
    mixer, length = load_mixer("attention"), 25
    back = np.arange(length)[:, None] - np.arange(length)
    more = np.sum((back > 3) & (np.arange(length) < 2))
    of_window = mixer.flops(dataclasses.replace(config, sinks=None), length, 1)["attention"]
    found = mixer.flops(config, length, 1)["attention"] - of_window
    assert found == pytest.approx(4 * 8 * more / length)


def test_a_query_that_sees_no_first_token_gets_nothing_of_them():
    q, keys = jnp.ones((1, 2, 2, 4)), jnp.ones((1, 2, 3, 1, 4))
    seen = jnp.array([[[False] * 3, [True, False, False]]])
    out, lse = attend_to_first(q, keys, keys, seen, None, None)
    np.testing.assert_array_equal(out[:, 0], 0)
    np.testing.assert_array_equal(lse[..., 0], -np.inf)
    np.testing.assert_allclose(lse[..., 1], 4 / 4**0.5)
    grad = jax.grad(lambda q: jnp.sum(attend_to_first(q, keys, keys, seen, None, None)[0]))(q)
    assert np.all(np.isfinite(grad))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(sinks=4), "needs a `window`"),
        (dict(sinks=4, window=0), "at least 1"),
        (dict(sinks=4, window=8, positions="alibi"), "cannot be combined"),
        (dict(sinks=4, pattern="mamba"), "for the mixers attention"),
        (dict(dilation=2), "for the mixers dilated_attention"),
        (dict(block_size=8, pattern="dilated_attention"), "block_sparse_attention"),
        (dict(window=8, pattern="block_sparse_attention"), "for the mixers attention"),
    ],
)
def test_what_does_not_fit_is_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        TransformerConfig(**fields)
