"""The decoder: what it may see, what it must equal, and that its options do what they say."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genai_jax.networks.layers.positions import alibi_slopes, rotary, rotation
from genai_jax.networks.sequence.config import TransformerConfig
from genai_jax.networks.sequence.stack import REMAT
from genai_jax.networks.sequence.transformer import Transformer, empty_state

TINY = TransformerConfig(num_layers=2, embed_dim=16, num_heads=4, max_length=64)
VOCABULARY = 11
VARIANTS = {
    "default": {},
    "learned": dict(positions="learned", norm="layernorm", activation="gelu", use_bias=True),
    "sinusoidal": dict(positions="sinusoidal", norm_placement="post", activation="relu"),
    "alibi": dict(positions="alibi", num_kv_heads=2, activation="geglu"),
    "buckets": dict(positions="relative_buckets", relative_buckets=6, relative_distance=8),
    "none": dict(positions="none", num_kv_heads=1, qk_norm=True),
    "caps": dict(logits_soft_cap=5.0, attention_soft_cap=3.0, tie_embeddings=True),
    "window": dict(window=3, head_dim=8),
}


def randomized(params, seed=0):
    """Every parameter random: fresh norms and biases would hide a wrong use of them."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    noise = [0.3 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, [x + n for x, n in zip(leaves, noise, strict=True)])


def make(**changes):
    model = Transformer(dataclasses.replace(TINY, **changes), VOCABULARY)
    return model, {"params": fresh_params(model)}


@functools.cache
def fresh_params(model):
    tokens = jnp.zeros((1, 4), jnp.int32)
    init = jax.jit(lambda rng: randomized(model.init(rng, tokens, method="init_all")["params"]))
    return init(jax.random.key(0))


@functools.partial(jax.jit, static_argnums=0)
def logits_of(model, variables, tokens, positions=None, segment_ids=None):
    hidden, _ = model.apply(variables, tokens, positions, segment_ids)
    return model.apply(variables, hidden, method="logits")


@functools.partial(jax.jit, static_argnums=0)
def cached_logits_of(model, variables, tokens, positions, state, lengths=None):
    hidden, state = model.apply(variables, tokens, positions, state=state, lengths=lengths)
    return model.apply(variables, hidden, method="logits"), state


TOKENS = jax.random.randint(jax.random.key(3), (2, 12), 0, VOCABULARY)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_no_output_depends_on_a_later_input(changes):
    model, variables = make(**changes)

    length = TOKENS.shape[1]
    wide = model.clone(vocab_size=length)

    @jax.jit
    def influence(output):
        """How much a random direction of one output feels each input, [length]."""

        def projected(offset):
            # A vocabulary in which every position has a word of its own.
            table = variables["params"]["embed"]["embedding"][TOKENS[0]] + offset
            params = variables["params"] | {"embed": {"embedding": table}}
            hidden = wide.apply({"params": params}, jnp.arange(length)[None])[0][0]
            return jnp.vdot(hidden[output], jax.random.normal(jax.random.key(1), hidden[0].shape))

        return jnp.abs(jax.grad(projected)(jnp.zeros((length, TINY.embed_dim)))).sum(-1)

    jacobian = np.stack([influence(output) for output in range(length)])  # [output, input]
    assert np.all(jacobian[np.triu_indices(12, 1)] == 0)
    visible = np.tril(np.ones((12, 12), bool))
    if changes.get("window"):
        # Two layers of a window of 3 see 6 back.
        assert np.all(jacobian[np.tril_indices(12, -7)] == 0)
        visible &= ~np.tril(np.ones((12, 12), bool), -7)
    assert np.all(jacobian[visible] > 0)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_cached_decoding_equals_the_full_pass(changes):
    model, variables = make(**changes)
    expected = logits_of(model, variables, TOKENS)
    state = empty_state(model.config, 2, 12, jnp.float32)
    seen = []
    for start, stop in [(0, 5), (5, 6), (6, 11), (11, 12)]:
        positions = jnp.broadcast_to(jnp.arange(start, stop), (2, stop - start))
        logits, state = cached_logits_of(model, variables, TOKENS[:, start:stop], positions, state)
        seen.append(logits)
    np.testing.assert_allclose(jnp.concatenate(seen, 1), expected, atol=1e-5)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("backend", ["xla", "xla_chunked"])
def test_packed_documents_do_not_see_each_other(changes, backend):
    model, variables = make(**changes)
    model = model.clone(backend=backend)
    positions = jnp.array([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]] * 2)
    segment_ids = jnp.array([[1] * 5 + [2] * 7] * 2)
    packed = logits_of(model, variables, TOKENS, positions, segment_ids)
    apart = [logits_of(model, variables, part) for part in (TOKENS[:, :5], TOKENS[:, 5:])]
    np.testing.assert_allclose(packed, jnp.concatenate(apart, 1), atol=1e-5)
    # Exactly, where the shapes agree too: each document alone in its row, the rest padding.
    for document, part in ((1, np.s_[:, :5]), (2, np.s_[:, 5:])):
        own = segment_ids == document
        alone = logits_of(
            model, variables, jnp.where(own, TOKENS, 0), positions, jnp.where(own, segment_ids, 0)
        )
        np.testing.assert_array_equal(packed[part], alone[part])


@pytest.mark.parametrize("remat", [name for name in REMAT if name != "none"])
def test_remat_changes_memory_and_not_the_gradient(remat):
    def gradient(**changes):
        model, variables = make(**changes)
        loss = lambda v: jnp.sum(jnp.square(logits_of(model, v, TOKENS)))
        function = jax.jit(jax.grad(loss))
        return function(variables), str(jax.make_jaxpr(jax.grad(loss))(variables))

    plain, plain_program = gradient()
    again, program = gradient(remat=remat)
    assert "remat" in program or "checkpoint" in program
    assert "remat" not in plain_program and "checkpoint" not in plain_program
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-4)


def test_unrolled_layers_are_the_scanned_ones():
    model, variables = make()
    unrolled, same = make(scan_layers=False)
    assert jax.tree.structure(variables) == jax.tree.structure(same)
    np.testing.assert_allclose(
        logits_of(model, variables, TOKENS), logits_of(unrolled, variables, TOKENS), atol=1e-5
    )


def test_dropout_acts_only_with_its_rng():
    model, variables = make(dropout=0.5)
    run = jax.jit(lambda **rngs: model.apply(variables, TOKENS, rngs=rngs)[0])
    quiet, again, noisy = run(), run(), run(dropout=jax.random.key(1))
    np.testing.assert_array_equal(quiet, again)
    assert not np.allclose(quiet, noisy)


def test_tied_embeddings_share_one_table():
    _, tied = make(tie_embeddings=True)
    _, untied = make()
    assert "head" in untied["params"] and "head" not in tied["params"]


def test_grouped_heads_equal_repeated_ones():
    grouped, variables = make(num_kv_heads=2)
    full, _ = make(num_kv_heads=4)
    repeat = lambda path, x: (
        jnp.repeat(x, 2, axis=2) if {"key", "value"} & {p.key for p in path} else x
    )
    wide = jax.tree_util.tree_map_with_path(repeat, variables)
    np.testing.assert_allclose(
        logits_of(grouped, variables, TOKENS), logits_of(full, wide, TOKENS), atol=1e-5
    )


def test_logits_are_capped():
    model, variables = make(logits_soft_cap=2.0)
    variables = jax.tree.map(lambda x: 20 * x, variables)
    logits = logits_of(model, variables, TOKENS)
    assert 1.5 < np.abs(logits).max() <= 2.0


def test_rotary_scores_depend_on_distance_alone():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))
    at = lambda i: rotation(jnp.array([[i]]), 8)
    score = lambda i, j: float(jnp.sum(rotary(q, at(i)) * rotary(k, at(j))))
    assert score(7, 3) == pytest.approx(score(104, 100), rel=1e-4)
    assert score(7, 3) != pytest.approx(score(7, 4), rel=1e-3)


def test_alibi_slopes_of_the_paper():
    np.testing.assert_allclose(alibi_slopes(8), [2.0 ** -(i + 1) for i in range(8)])
    np.testing.assert_allclose(alibi_slopes(3), [2.0**-4, 2.0**-8, 2.0**-2])


def test_shapes_that_contradict_each_other_are_named():
    with pytest.raises(ValueError, match=r"embed_dim=30 is not divisible by .*num_heads=4"):
        TransformerConfig(embed_dim=30, num_heads=4)
    with pytest.raises(ValueError, match=r"num_heads=4 is not a multiple of .*num_kv_heads=3"):
        TransformerConfig(num_heads=4, num_kv_heads=3)
    with pytest.raises(ValueError, match="even `head_dim`, not 3"):
        TransformerConfig(head_dim=3)


def test_bfloat16_keeps_parameters_in_float32():
    model = Transformer(TINY, VOCABULARY, dtype=jnp.bfloat16)
    variables = jax.eval_shape(
        lambda rng: model.init(rng, TOKENS, method="init_all"), jax.random.key(0)
    )
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    assert jax.eval_shape(model.apply, variables, TOKENS)[0].dtype == jnp.bfloat16
    logits = jax.eval_shape(functools.partial(logits_of, model), variables, TOKENS)
    assert logits.dtype == jnp.float32
