"""Patterns of mixers: decoding equals the full pass for states of every kind."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels_pallas
from genai_jax.config import ConfigError, parse
from genai_jax.decoding.generate import at_last_token, generate
from genai_jax.networks.experts.config import MoeConfig
from genai_jax.networks.experts.router import collect_router_sums
from genai_jax.networks.sequence.config import TransformerConfig
from genai_jax.networks.sequence.flops import transformer_forward_flops
from genai_jax.networks.sequence.mixers import load_mixer, outside_mixers, parameter_name
from genai_jax.networks.sequence.state import RecurrentState
from genai_jax.networks.sequence.transformer import Transformer, empty_state, partition_rules
from genai_jax.training.sharding import logical_axes, path_name
from tests.networks.sequence.recurrence import NAME, LinearRecurrence
from tests.networks.sequence.test_transformer import (
    TINY,
    TOKENS,
    VOCABULARY,
    cached_logits_of,
    fresh_params,
    logits_of,
)

PATTERNS = {
    "attention": None,
    "recurrence": NAME,
    "hybrid": f"attention,{NAME}",
    "period_of_three": f"{NAME},{NAME},attention",
}
LAYERS = {"period_of_three": 6}
every_pattern = pytest.mark.parametrize("name", ["attention", "recurrence", "hybrid"])
more_patterns = pytest.mark.parametrize("name", ["recurrence", "period_of_three"])
REWIND = 3


@functools.cache
def build(name: str, **changes):
    config = dataclasses.replace(
        TINY, pattern=PATTERNS[name], num_layers=LAYERS.get(name, 4), **changes
    )
    model = Transformer(config, VOCABULARY)
    return model, {"params": fresh_params(model)}


def fresh_state(model, rows=2, rewind=0):
    return empty_state(model.config, rows, 16, jnp.float32, rewind)


def decode(model, variables, state, tokens, starts, lengths=None):
    """(logits, state) of tokens [rows, n] that continue rows at `starts`."""
    positions = jnp.asarray(starts)[:, None] + jnp.arange(tokens.shape[1])
    lengths = None if lengths is None else jnp.asarray(lengths)
    return cached_logits_of(model, variables, tokens, positions, state, lengths)


@pytest.mark.parametrize("name", PATTERNS)
def test_prefill_of_padded_prompts_and_single_steps_equal_the_full_pass(name):
    model, variables = build(name)
    expected = logits_of(model, variables, TOKENS)
    ends = np.array([3, 7])
    padded = jnp.where(jnp.arange(7) < ends[:, None], TOKENS[:, :7], 5)  # 5: padding that shows
    logits, state = decode(model, variables, fresh_state(model), padded, [0, 0], ends)
    for row, end in enumerate(ends):
        np.testing.assert_allclose(logits[row, :end], expected[row, :end], atol=1e-5)
    for _ in range(4):
        tokens = TOKENS[jnp.arange(2), ends][:, None]
        logits, state = decode(model, variables, state, tokens, ends, [1, 1])
        np.testing.assert_allclose(logits[:, 0], expected[jnp.arange(2), ends], atol=1e-5)
        ends = ends + 1
    # A row without a real token keeps its state.
    _, state = decode(model, variables, state, jnp.full((2, 1), 5), ends, [0, 1])
    logits, _ = decode(model, variables, state, TOKENS[:, ends[0]][:, None], ends, [1, 1])
    np.testing.assert_allclose(logits[0, 0], expected[0, ends[0]], atol=1e-5)


@every_pattern
def test_generation_equals_repeated_full_passes(name):
    model, variables = build(name)
    prompts, lengths = jnp.array([[1, 0, 0, 0], [1, 5, 2, 9], [3, 3, 0, 0]]), jnp.array([1, 4, 2])

    def step(tokens, positions, lengths, state):
        hidden, state = model.apply(variables, tokens, positions, state=state, lengths=lengths)
        return model.apply(variables, at_last_token(hidden, lengths), method="logits")[:, 0], state

    run = jax.jit(functools.partial(generate, step, max_new_tokens=5, temperature=0))
    result = run(fresh_state(model, rows=3), prompts, lengths, jax.random.key(0))
    for row, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        tokens = prompt[:length].tolist()
        for _ in range(5):
            padded = jnp.array([tokens + [0] * (12 - len(tokens))] * 2)  # one shape, one program
            tokens.append(int(logits_of(model, variables, padded)[0, len(tokens) - 1].argmax()))
        assert result.tokens[row, : length + 5].tolist() == tokens


@every_pattern
def test_selected_rows_continue_as_the_rows_they_came_from(name):
    model, variables = build(name)
    expected = logits_of(model, variables, TOKENS)
    _, state = decode(model, variables, fresh_state(model), TOKENS[:, :6], [0, 0], [4, 6])
    rows, ends = jnp.array([1, 0, 1]), jnp.array([6, 4, 6])
    logits, _ = decode(
        model, variables, state.select(rows), TOKENS[rows, ends][:, None], ends, [1, 1, 1]
    )
    np.testing.assert_allclose(logits[:, 0], expected[rows, ends], atol=1e-5)


@every_pattern
def test_a_rewound_state_continues_as_if_the_tokens_had_never_come(name):
    model, variables = build(name)
    expected = logits_of(model, variables, TOKENS)
    _, state = decode(model, variables, fresh_state(model, rewind=REWIND), TOKENS[:, :5], [0, 0])
    guesses = jnp.array([[3, 3, 3], [8, 8, 8]])
    _, state = decode(model, variables, state, guesses, [5, 5], [3, 2])
    # Row 0 takes all three guesses back, row 1 its two guesses and one token before them.
    ends = jnp.array([5, 4])
    state = state.rewind(ends)
    for _ in range(3):
        tokens = TOKENS[jnp.arange(2), ends][:, None]
        logits, state = decode(model, variables, state, tokens, ends, [1, 1])
        np.testing.assert_allclose(logits[:, 0], expected[jnp.arange(2), ends], atol=1e-5)
        ends = ends + 1


def test_what_a_recurrent_state_cannot_take_back():
    values = jnp.arange(1.0, 7.0).reshape(1, 6, 1)
    state = RecurrentState.empty(jnp.zeros((1, 1)), rewind=2).advance(values)
    assert [float(state.rewind(jnp.array([n])).value[0, 0]) for n in (6, 5, 4)] == [6, 5, 4]
    for length in (3, 7):  # longer ago than is kept, and not seen yet
        assert np.isnan(state.rewind(jnp.array([length])).value)
    with pytest.raises(ValueError, match=r"cannot be rewound: make it with `empty_state"):
        RecurrentState.empty(jnp.zeros((1, 1))).rewind(jnp.array([0]))
    model, _ = build("hybrid")
    with pytest.raises(ValueError, match="cannot be rewound"):
        fresh_state(model).rewind(jnp.array([0, 0]))


@more_patterns
def test_documents_of_a_row_do_not_see_each_other(name):
    model, variables = build(name)
    positions = jnp.array([[*range(5), *range(7)]] * 2)
    segment_ids = jnp.array([[1] * 5 + [2] * 7] * 2)
    packed = logits_of(model, variables, TOKENS, positions, segment_ids)
    apart = [logits_of(model, variables, part) for part in (TOKENS[:, :5], TOKENS[:, 5:])]
    np.testing.assert_allclose(packed, jnp.concatenate(apart, 1), atol=1e-5)


def test_parameters_are_stacked_by_their_place_in_the_period():
    shapes = lambda name: {
        path_name(path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(build(name)[1]["params"])
    }
    assert shapes("attention")["layers/attention/query/kernel"] == (4, 16, 4, 4)
    assert shapes("recurrence")["layers/linear_recurrence/decay"] == (4, 16)
    three = shapes("period_of_three")
    assert three["layers/block_0/linear_recurrence/decay"] == (2, 16)
    assert three["layers/block_1/linear_recurrence_norm/scale"] == (2, 16)
    assert three["layers/block_2/attention/query/kernel"] == (2, 16, 4, 4)
    assert three["layers/block_2/mlp/up/kernel"][0] == 2


@more_patterns
def test_every_parameter_has_a_rule(name):
    model, variables = build(name, use_bias=True, qk_norm=True, norm="layernorm", activation="gelu")
    axes = logical_axes(variables["params"], partition_rules(model.config))
    stacked = jax.tree.leaves(axes["layers"], is_leaf=lambda a: isinstance(a, tuple))
    assert {a[0] for a in stacked} == {"layers"}


@more_patterns
def test_unrolling_and_recomputing_change_neither_output_nor_gradient(name):
    model, variables = build(name)

    def gradient(**changes):
        other = model.clone(config=dataclasses.replace(model.config, **changes))
        loss = lambda v: jnp.sum(jnp.square(logits_of(other, v, TOKENS)))
        return jax.jit(jax.grad(loss))(variables)

    for changes in (dict(scan_layers=False), dict(remat="full")):
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=2e-4),
            gradient(**changes), gradient(),
        )  # fmt: skip


def test_routers_are_collected_wherever_they_are():
    model = build("period_of_three")[0].clone(moe=MoeConfig(num_experts=3))
    params = fresh_params(model)
    apply = lambda p, **options: model.apply({"params": p}, TOKENS, mutable=["router"], **options)
    _, written = jax.jit(apply)(params)
    sums = collect_router_sums(written)
    assert sums.load.shape == (6, 3) and np.all(np.asarray(sums.tokens) == TOKENS.size)
    _, written = jax.jit(apply)(params, lengths=jnp.array([12, 5]))
    assert np.all(np.asarray(collect_router_sums(written).tokens) == 17)
    with pytest.raises(ValueError, match="no router wrote its sums"):
        collect_router_sums({})


def test_an_encoder_sees_everything_but_padding_and_takes_vectors():
    config = dataclasses.replace(TINY, positions="learned")
    encoder = Transformer(config, 0, mask=kernels_pallas.Full())
    x = jax.random.normal(jax.random.key(0), (2, 6, 16))
    apply = functools.partial(encoder.apply, method="from_embeddings")
    variables = jax.jit(functools.partial(encoder.init, method="from_embeddings"))(
        jax.random.key(1), x
    )
    assert set(variables["params"]) == {"position_embed", "layers", "final_norm"}
    influence = jax.grad(lambda x: jnp.vdot(apply(variables, x)[0][0, 0], jnp.arange(16.0)))(x)
    assert np.all(np.abs(influence[0]).sum(-1) > 0)
    lengths = jnp.array([6, 3])
    whole, _ = apply(variables, x, lengths=lengths)
    other, _ = apply(variables, x.at[1, 3:].set(7.0), lengths=lengths)
    np.testing.assert_array_equal(whole[1, :3], other[1, :3])
    alone, _ = apply(variables, x[1:, :3])
    np.testing.assert_allclose(whole[1, :3], alone[0], atol=1e-5)


def test_tokens_are_their_embeddings():
    model, variables = build("attention")
    x = model.apply(variables, TOKENS, method="embed_tokens")
    hidden, _ = model.apply(variables, x, method="from_embeddings")
    np.testing.assert_array_equal(
        model.apply(variables, hidden, method="logits"), logits_of(model, variables, TOKENS)
    )


def test_flops_are_those_of_each_mixer():
    hybrid = build("hybrid")[0].config
    plain = transformer_forward_flops(dataclasses.replace(hybrid, pattern=None), 11, 8)
    parts = transformer_forward_flops(hybrid, 11, 8)
    assert parts["attention"] == plain["attention"] / 2
    assert parts["recurrence"] == 2 * 4 * 16 and parts["head"] == plain["head"]
    assert plain["dense"] - parts["dense"] == 2 * 2 * 16 * 4 * 16


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["pattern=attention,mambo"], "--transformer.pattern=attention,mambo has the unknown mixer "
         "'mambo'; known: attention, dilated_attention,"),
        (["pattern=attention,attention", "num_layers=5"], "--transformer.num_layers=5 is not "
         "divisible by the 2 mixers of --transformer.pattern=attention,attention"),
        (["pattern="], "unknown mixer ''"),
        (["head_dim=3"], "rotary positions need an even --transformer.head_dim, not 3"),
        (["embed_dim=30"], "--transformer.embed_dim=30 is not divisible by "
         "--transformer.num_heads=4; change one or set --transformer.head_dim"),
    ],
)  # fmt: skip
def test_flags_that_make_no_stack_are_named(flags, said):
    with pytest.raises(ConfigError) as error:
        parse([f"--transformer.{flag}" for flag in flags], {"transformer": TransformerConfig})
    assert said in str(error.value) and "\n" not in str(error.value)


def test_mixers_from_outside_are_imported_when_they_are_used():
    assert load_mixer(NAME) is LinearRecurrence
    assert (
        parameter_name(NAME) == "linear_recurrence" and parameter_name("attention") == "attention"
    )
    assert outside_mixers(f"attention,{NAME}") == (NAME,) and outside_mixers(None) == ()
    for name, said in (
        ("no_such_module:Mixer", "cannot import no_such_module: ModuleNotFoundError"),
        ("tests.networks.cases:Mixer", "tests.networks.cases has no Mixer"),
        ("tests.networks.cases:NETWORKS", "lacks PARTITION_RULES, empty_state, flops"),
    ):
        TransformerConfig(pattern=name)
        with pytest.raises(ConfigError, match=f"--transformer.pattern={name}.* ?{said}"):
            load_mixer(name)
