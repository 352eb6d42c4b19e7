"""Encoder-decoders: what depends on what, cached decoding, and additive attention by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genai_jax.networks.sequence.additive_attention import RecurrentConfig, RecurrentEncoderDecoder
from genai_jax.networks.sequence.config import TransformerConfig
from genai_jax.networks.sequence.encoder_decoder import EncoderDecoder, positions_within

VOCABULARY, SOURCE, TARGET = 13, 9, 8
SHAPE = dict(num_layers=2, embed_dim=8, num_heads=2)
BUCKETS = dict(
    positions="relative_buckets", relative_buckets=6, relative_distance=8, norm_placement="post",
    num_kv_heads=1, use_bias=True,
)  # fmt: skip
MODELS = {
    "rope": EncoderDecoder(TransformerConfig(**SHAPE, qk_norm=True), 1, VOCABULARY),
    "buckets": EncoderDecoder(TransformerConfig(**SHAPE, **BUCKETS), 1, VOCABULARY),
    "latents": EncoderDecoder(TransformerConfig(**SHAPE, qk_norm=True), 1, VOCABULARY, latents=3),
    "gru": RecurrentEncoderDecoder(RecurrentConfig("gru", 6, 8, 5), VOCABULARY),
}
every = pytest.mark.parametrize("name", MODELS)


@functools.cache
def params_of(name):
    """Every parameter random, so that none is zero."""
    init = functools.partial(MODELS[name].init, method="init_all")
    shapes = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    rng = np.random.default_rng(0)
    some = lambda x: jnp.float32(rng.normal(size=x.shape) / np.sqrt(x.shape[-1]))
    return jax.tree.map(some, shapes)


@functools.cache
def hidden_of(name):
    params = params_of(name)
    return jax.jit(lambda *inputs: MODELS[name].apply(params, *inputs))


def a_batch(rows=1, seed=0):
    rng = np.random.default_rng(seed)
    source, tokens = (rng.integers(0, VOCABULARY, (rows, n)) for n in (SOURCE, TARGET))
    return dict(
        source=source, source_ids=np.ones_like(source), tokens=tokens,
        positions=np.broadcast_to(np.arange(TARGET), tokens.shape), ids=np.ones_like(tokens),
    )  # fmt: skip


def run(name, batch):
    return np.asarray(hidden_of(name)(*batch.values()))


@every
def test_a_target_depends_on_its_source_and_on_no_later_target(name):
    batch = a_batch()
    before = run(name, batch)
    later = run(name, batch | {"tokens": np.where(np.arange(TARGET) == 5, 0, batch["tokens"])})
    np.testing.assert_array_equal(before[:, :5], later[:, :5])
    assert np.abs(before - later)[:, 5:].max(-1).min() > 0
    other = np.array(batch["source"])
    other[:, 3] = (other[:, 3] + 1) % VOCABULARY
    assert np.abs(before - run(name, batch | {"source": other})).max(-1).min() > 0


@pytest.mark.parametrize("name", [name for name in MODELS if name != "latents"])
def test_pairs_of_a_row_and_padding_do_not_change_a_pair(name):
    """Two pairs in one row, with padding on either side, are what each is alone."""
    rng, sizes = np.random.default_rng(1), ((3, 2), (4, 5))
    row = dict(
        source=rng.integers(0, VOCABULARY, (1, SOURCE)),
        source_ids=np.array([[0, 1, 1, 1, 2, 2, 2, 2, 0]]),
        tokens=rng.integers(0, VOCABULARY, (1, TARGET)),
        positions=np.array([[0, 0, 1, 0, 1, 2, 3, 4]]),
        ids=np.array([[0, 1, 1, 2, 2, 2, 2, 2]]),
    )
    packed, at = run(name, row), (1, 1)
    for segment, (n, m) in enumerate(sizes, 1):
        alone = {k: np.zeros_like(v) for k, v in row.items()}
        alone["source"][:, :n] = row["source"][:, at[0] : at[0] + n]
        alone["tokens"][:, :m] = row["tokens"][:, at[1] : at[1] + m]
        alone["source_ids"][:, :n], alone["ids"][:, :m] = 1, 1
        alone["positions"][:, :m] = np.arange(m)
        same = dict(rtol=0, atol=2e-6)
        np.testing.assert_allclose(
            packed[:, at[1] : at[1] + m], run(name, alone)[:, :m], **same, err_msg=str(segment)
        )
        at = (at[0] + n, at[1] + m)
    changed = {k: np.array(v) for k, v in row.items()}
    for key, ids in (("source", "source_ids"), ("tokens", "ids")):
        changed[key][row[ids] != 2] = 0
    np.testing.assert_array_equal(packed[:, 3:], run(name, changed)[:, 3:])


def test_latents_read_a_source_wherever_its_padding_is():
    batch, n = a_batch(), 5
    source = batch["source"][:, :n]

    def padded(before, filler):
        around = ((0, 0), (before, SOURCE - n - before))
        ids = np.pad(np.ones_like(source), around)
        padded = np.pad(source, around, constant_values=filler)
        return run("latents", batch | {"source": padded, "source_ids": ids})

    right = padded(0, 0)
    np.testing.assert_array_equal(right, padded(0, 7))
    np.testing.assert_array_equal(padded(4, 0), padded(4, 7))
    for before in (2, 4):
        np.testing.assert_allclose(padded(before, 0), right, atol=2e-6)


@every
def test_cached_decoding_equals_the_full_pass(name):
    """With sources of two lengths, several tokens in a call, and rows that come twice."""
    model, params, batch = MODELS[name], params_of(name), a_batch(2)
    lengths, order = np.array([SOURCE, 4]), np.array([1, 0, 1])
    batch["source_ids"] = (np.arange(SOURCE) < lengths[:, None]).astype(int)
    expected = run(name, batch)[order]
    state = jax.jit(lambda s, n: model.apply(params, s, n, TARGET, method="begin"))(
        batch["source"], lengths
    ).select(order)
    step = jax.jit(lambda *x: model.apply(params, *x, lengths[order], method="step"))
    seen, width = [], 3
    for start, stop in [(0, 3), (3, 4), (4, 5), (5, TARGET)]:
        new, padding = stop - start, ((0, 0), (0, width - (stop - start)))
        tokens = np.pad(batch["tokens"][order, start:stop], padding)
        positions = start + np.tile(np.arange(width), (3, 1))
        hidden, state = step(tokens, positions, state, np.full(3, new))
        seen.append(hidden[:, :new])
    np.testing.assert_allclose(np.concatenate(seen, 1), expected, atol=1e-5)


@every
def test_a_target_without_a_source_sees_only_targets(name):
    batch = a_batch()
    batch["source_ids"] = np.zeros_like(batch["source_ids"])
    before = run(name, batch)
    np.testing.assert_array_equal(before, run(name, batch | {"source": batch["source"] * 0}))
    assert np.isfinite(before).all()


def test_the_alignment_is_that_of_the_paper():
    """score(s, h) = v . tanh(W s + U h) and a GRU, token by token in float64."""
    model, params, batch = MODELS["gru"], params_of("gru"), a_batch()
    apply = jax.jit(lambda method, *x: model.apply(params, *x, method=method), static_argnums=0)
    found = apply("alignment", batch["source"], batch["tokens"])[0]
    read = apply("encode", batch["source"], batch["source_ids"]).hidden[0]
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params["params"])
    h = np.asarray(read, np.float64)
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    s, expected = np.zeros(8), []
    for token in batch["tokens"][0]:
        scores = np.tanh(s @ p["query"] + h @ p["key"]["kernel"]) @ p["score"]
        weights = np.exp(scores) / np.exp(scores).sum()
        expected.append(weights)
        x = p["embed"]["embedding"][token]
        x = x / np.sqrt(np.mean(x**2) + 1e-6) * p["embed_norm"]["scale"]
        u = np.einsum("e,egh->gh", x, p["in"]["kernel"])
        u = u + p["in"]["bias"] + np.einsum("a,agh->gh", weights @ h, p["context"])
        r = np.einsum("h,hgk->gk", s, p["recurrent"])
        update, reset = sigmoid(u[0] + r[0]), sigmoid(u[1] + r[1])
        s = (1 - update) * np.tanh(u[2] + reset * r[2]) + update * s
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_positions_within_segments():
    ids = jnp.array([[0, 0, 1, 1, 1, 2, 0], [3, 3, 3, 4, 4, 4, 4]])
    expected = [[0, 1, 0, 1, 2, 0, 0], [0, 1, 2, 0, 1, 2, 3]]
    np.testing.assert_array_equal(positions_within(ids), expected)
