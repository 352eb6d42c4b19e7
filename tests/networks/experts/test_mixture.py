"""Routing, places and experts against the dense block, each other and their definitions."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from genai_jax.components import parse_run
from genai_jax.config import ConfigError
from genai_jax.losses.router import balancing_term, router_losses
from genai_jax.networks.experts.config import MoeConfig
from genai_jax.networks.experts.mixture import MixtureOfExperts
from genai_jax.networks.experts.router import collect_router_sums, route, router_sums
from genai_jax.networks.experts.slots import Places, assign, to_slots, to_tokens
from genai_jax.networks.layers.dense import Mlp
from genai_jax.networks.sequence import transformer
from genai_jax.networks.sequence.config import TransformerConfig
from genai_jax.networks.sequence.transformer import Transformer
from genai_jax.tasks.language.causal import LanguageModel
from genai_jax.training.optimizer import moved_by_sign
from tests.commands import report_of

EMBED, HIDDEN, LENGTH = 8, 12, 10
X = jax.random.normal(jax.random.key(0), (2, LENGTH, EMBED))
DIRECTION = jax.random.normal(jax.random.key(1), X.shape)


def layer(**config) -> MixtureOfExperts:
    return MixtureOfExperts(MoeConfig(**config), HIDDEN)


@functools.cache
def params_of(module: MixtureOfExperts) -> dict:
    """Router kernels large enough that the experts differ in load."""
    params = jax.jit(module.init)(jax.random.key(2), X)["params"]
    return params | {"router": jax.tree.map(lambda k: 2 * k, params["router"])}


@functools.partial(jax.jit, static_argnums=0)
def run(module, params, x=X, real=None):
    """(output, gradients of its product with a direction by params and x, router's sums)."""

    def loss(params, x):
        out, written = module.apply({"params": params}, x, real, mutable=["router"])
        return jnp.vdot(out, DIRECTION), (out, written["router"]["sums"])

    grads, (out, sums) = jax.grad(loss, (0, 1), has_aux=True)(params, x)
    return out, grads, sums


def close(a, b, **tolerance):
    tolerance = {"rtol": 1e-5, "atol": 1e-6} | tolerance
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), a, b)


@pytest.mark.parametrize(("capacity", "score"), [(0.0, "softmax"), (1.0, "sigmoid")])
def test_one_expert_is_the_dense_mlp(capacity, score):
    one = layer(num_experts=1, experts_per_token=1, capacity_factor=capacity, score=score)
    params = params_of(one)
    kernels = {name: {"kernel": kernel[0]} for name, kernel in params["experts"].items()}
    dense = lambda kernels, x: Mlp(HIDDEN).apply({"params": kernels}, x)
    out, (grads, x_grad), _ = run(one, params)
    want_grads = jax.grad(lambda k, x: jnp.vdot(dense(k, x), DIRECTION), (0, 1))(kernels, X)
    close(out, dense(kernels, X))
    close(({n: {"kernel": k[0]} for n, k in grads["experts"].items()}, x_grad), want_grads)


@pytest.mark.parametrize(("experts_per_token", "score"), [(1, "softmax"), (3, "sigmoid")])
def test_a_capacity_that_is_large_enough_is_dropless(experts_per_token, score):
    k = experts_per_token
    common = dict(num_experts=4, experts_per_token=k, score=score, renormalize=k > 1)
    dropless, ample = layer(**common), layer(capacity_factor=4 / k, **common)
    params = params_of(dropless)
    real = jnp.arange(LENGTH) < jnp.array([[LENGTH], [7]])
    got = run(ample, params, X, real)
    close(got, run(dropless, params, X, real))
    assert got[2].computed == got[2].load.sum() == k * got[2].tokens == k * 17


def test_all_experts_chosen_is_the_mixture_of_all():
    module = layer(num_experts=3, experts_per_token=3, shared_experts=2)
    params = params_of(module)

    def mixture(params, x):
        probability = jax.nn.softmax(x @ params["router"]["kernel"])
        experts = [
            Mlp(HIDDEN).apply(
                {"params": {n: {"kernel": k[i]} for n, k in params["experts"].items()}}, x
            )
            for i in range(3)
        ]
        shared = Mlp(2 * HIDDEN).apply({"params": params["shared"]}, x)
        return jnp.einsum("ble,eblm->blm", probability, jnp.stack(experts)) + shared

    out, grads, _ = run(module, params)
    close(out, mixture(params, X))
    close(grads, jax.grad(lambda p, x: jnp.vdot(mixture(p, x), DIRECTION), (0, 1))(params, X))


def test_first_choices_come_first_and_tokens_beyond_the_capacity_pass_by():
    module = layer(
        num_experts=4, experts_per_token=2, capacity_factor=0.8, group_size=5, renormalize=False
    )
    params = params_of(module)
    out, _, sums = run(module, params)
    probability = jax.nn.softmax(X @ params["router"]["kernel"])
    weight, choice = jax.lax.top_k(probability, 2)
    capacity, want, computed = 2, np.zeros(X.shape), 0  # 0.8 x 2 x 5 / 4
    for row, start in np.ndindex(2, 2):
        taken = np.zeros(4, int)
        tokens = range(5 * start, 5 * start + 5)
        for j, t in [(j, t) for j in range(2) for t in tokens]:
            expert = int(choice[row, t, j])
            taken[expert] += 1
            if taken[expert] <= capacity:
                kernels = {n: {"kernel": k[expert]} for n, k in params["experts"].items()}
                made = Mlp(HIDDEN).apply({"params": kernels}, X[row, t])
                want[row, t] += weight[row, t, j] * made
                computed += 1
    close(out, want)
    passed_by = np.all(want == 0, -1)
    assert passed_by.any() and np.all(np.asarray(out)[passed_by] == 0)
    assert sums.computed == computed < 2 * 2 * LENGTH


@pytest.mark.parametrize("capacity", [0.0, 0.75])
def test_padding_is_neither_computed_nor_counted(capacity):
    module = layer(num_experts=4, capacity_factor=capacity)
    params = params_of(module)
    real = jnp.arange(LENGTH) % 3 != jnp.array([[0], [1]])
    other = jnp.where(real[..., None], X, 100.0)
    out, grads, sums = run(module, params, X, real)
    again = run(module, params, other, real)
    jax.tree.map(
        np.testing.assert_array_equal, (out, grads[0], sums), (again[0], again[1][0], again[2])
    )
    assert np.all(np.asarray(out)[~np.asarray(real)] == 0)
    assert sums.tokens == real.sum() and sums.load.sum() == 2 * sums.tokens


def test_the_load_balance_loss_is_one_for_a_uniform_router():
    config = MoeConfig(num_experts=4, load_balance=0.5, router_z_loss=0.0)
    module = layer(num_experts=4)
    _, _, sums = run(module, params_of(module), X, jnp.ones((2, LENGTH), bool))
    two_layers = jax.tree.map(lambda a: jnp.stack([a, a]), sums)
    loss, metrics = router_losses(two_layers, config)
    assert metrics["moe/load_balance"] > 1.01 and metrics["moe/largest_load"] > 1.01
    even = two_layers._replace(load=jnp.full((2, 4), 10.0), probability=jnp.full((2, 4), 5.0))
    loss, metrics = router_losses(even._replace(entropy=20 * jnp.log(4.0 * jnp.ones(2))), config)
    assert float(loss) == pytest.approx(0.5)
    assert float(metrics["moe/load_balance"]) == pytest.approx(1)
    assert float(metrics["moe/largest_load"]) == pytest.approx(1)
    assert float(metrics["moe/entropy"]) == pytest.approx(np.log(4))
    assert float(metrics["moe/dropped"]) == 0


def test_router_losses_are_those_of_the_papers():
    module = layer(num_experts=4, score="sigmoid")
    params = params_of(module)
    real = jnp.arange(LENGTH) < jnp.array([[LENGTH], [7]])
    sums = run(module, params, X, real)[2]
    logits = np.asarray(X @ params["router"]["kernel"], np.float64)[np.asarray(real)]
    scores = 1 / (1 + np.exp(-logits))
    probability = (scores / scores.sum(-1, keepdims=True)).mean(0)
    share = np.bincount(np.argsort(-scores)[:, :2].ravel(), minlength=4) / (2 * len(logits))
    z = np.mean(np.log(np.exp(logits).sum(-1)) ** 2)
    config = dataclasses.replace(module.config, load_balance=0.3, router_z_loss=0.2)
    loss, metrics = router_losses(jax.tree.map(lambda a: a[None], sums), config)
    want = 4 * np.sum(share * probability)
    assert float(metrics["moe/load_balance"]) == pytest.approx(want, rel=1e-5)
    assert float(metrics["moe/router_z"]) == pytest.approx(z, rel=1e-5)
    assert float(loss) == pytest.approx(0.3 * want + 0.2 * z, rel=1e-5)


def test_biases_balance_the_experts_without_changing_weights():
    config = MoeConfig(num_experts=4, experts_per_token=2, balance_rate=0.01, load_balance=0.0)
    logits = jax.random.normal(jax.random.key(3), (4, 64, 4)) + jnp.array([2.0, 0.0, -1.0, 0.0])
    real, bias = jnp.ones((4, 64), bool), jnp.zeros(4)
    optimizer = moved_by_sign(optax.sgd(1.0), "bias$", config.balance_rate)
    state, largest = optimizer.init({"router": {"bias": bias}}), []

    @jax.jit
    def step(bias, state):
        routes = route(logits, real, config, bias)
        sums = router_sums(logits, routes, real, jnp.ones(routes.choice.shape, bool))
        stacked = jax.tree.map(lambda a: a[None], sums)
        term, gradient = jax.value_and_grad(lambda b: balancing_term(stacked, b[None]))(bias)
        updates, state = optimizer.update({"router": {"bias": gradient}}, state)
        return bias + updates["router"]["bias"], state, sums.load, term, updates

    for _ in range(120):
        bias, state, load, term, updates = step(bias, state)
        largest.append(float(load.max() / load.mean()))
        moved = updates["router"]["bias"]
        np.testing.assert_allclose(moved, -0.01 * jnp.sign(load - load.mean()), atol=1e-7)
        assert term == 0
    assert largest[0] > 1.6 and max(largest[-10:]) < 1.2  # they go up and down by a step
    plain, moved = route(logits, real, config), route(logits, real, config, bias)
    same = jnp.sort(plain.choice, -1) == jnp.sort(moved.choice, -1)
    same = np.asarray(same.all(-1))
    assert 0.2 < same.mean() < 1  # whose weights the biases leave alone
    weights = [np.sort(r.weight, -1)[same] for r in (plain, moved)]
    np.testing.assert_allclose(*weights, rtol=1e-6)


@pytest.mark.parametrize("capacity", [None, 3])
def test_places_are_a_matching_and_its_two_gathers_each_others_transpose(capacity):
    rng = np.random.default_rng(0)
    bucket = rng.integers(0, 6, (7, 3))  # 5 buckets, and 5 for none
    places = jax.jit(assign, static_argnums=(1, 2))(jnp.asarray(bucket, jnp.int32), 5, capacity)
    places = jax.tree.map(np.asarray, places)
    slots = places.source.shape[0]
    assert slots == (21 if capacity is None else 15)
    for j, t in np.ndindex(3, 7):
        slot = int(places.slot[j, t])
        if slot < slots:
            assert int(places.source[slot]) == j * 7 + t
            if capacity:
                assert slot // capacity == bucket[t, j]
        else:
            assert bucket[t, j] == 5 or (bucket[t, j] == bucket.T).ravel()[: j * 7 + t].sum() >= 3
    filled = np.asarray(places.source) < 21
    assert filled.sum() == (np.asarray(places.slot) < slots).sum()
    if capacity is None:  # sorted, without gaps
        order = bucket.T.ravel()[np.asarray(places.source)[filled]]
        assert np.all(np.diff(order) >= 0) and np.all(filled[: filled.sum()])
    tokens, rows = jnp.asarray(rng.normal(size=(7, 4))), jnp.asarray(rng.normal(size=(slots, 4)))
    there = jnp.vdot(to_slots(tokens, places), rows)
    assert float(there) == pytest.approx(float(jnp.vdot(tokens, to_tokens(rows, places))), rel=1e-5)
    given = jax.grad(lambda t: jnp.vdot(to_slots(t, places), rows))(tokens)
    close(given, to_tokens(rows, places))


def test_counting_goes_on_from_block_to_block():
    bucket = jax.random.randint(jax.random.key(0), (700, 1), 0, 4)
    places = jax.jit(assign, static_argnums=(1, 2))(bucket, 3, None)
    kept = np.asarray(bucket[:, 0]) < 3
    want = np.argsort(np.asarray(bucket[:, 0]), kind="stable")
    np.testing.assert_array_equal(places.source[: kept.sum()], want[: kept.sum()])
    np.testing.assert_array_equal(
        np.asarray(places.slot[0])[want[: kept.sum()]], np.arange(kept.sum())
    )
    assert isinstance(places, Places)


@pytest.mark.depends_on("whole runs")
def test_eight_devices_equal_one_in_the_whole_state():
    report = report_of("training/eight_devices_moe.py")
    refused = report.pop("refused")
    assert "parameter model/layers/mlp/experts/" in refused
    assert "experts of size 6 is not divisible by --mesh.expert=4" in refused
    for name, facts in report.items():
        assert facts["difference"] < 2e-5, (name, facts)
    assert {name: facts["experts"] for name, facts in report.items()} == {
        "expert": 1, "data_expert": 2, "mixed": 4,
    }  # fmt: skip
    # Tokens go to their experts by an exchange: nobody gathers all tokens, or all experts.
    for name in ("expert", "data_expert"):
        assert report[name]["sent"] == ["all-reduce", "all-to-all"]
    assert report["expert"]["dropped"] > 0.1 and report["mixed"]["dropped"] == 0


SHAPE = TransformerConfig(num_layers=2, embed_dim=16, num_heads=2)
MOE = MoeConfig(num_experts=4, expert_dim=8, shared_experts=1)


@pytest.mark.smoke
def test_the_layers_are_scanned_and_report_what_their_routers_did():
    model = Transformer(dataclasses.replace(SHAPE, remat="attention"), 11, moe=MOE)
    tokens = jax.random.randint(jax.random.key(0), (2, 6), 0, 11)
    variables = jax.eval_shape(
        lambda rng: model.init(rng, tokens, method="init_all"), jax.random.key(0)
    )
    experts = variables["params"]["layers"]["mlp"]["experts"]
    assert experts["up"].shape == (2, 4, 16, 8) and experts["down"].shape == (2, 4, 8, 16)
    segments = jnp.ones((2, 6), jnp.int32).at[:, 4:].set(0)
    params = jax.tree.map(lambda a: jnp.ones(a.shape) / 7, variables["params"])

    def forward(params):
        (_, _), written = model.apply(
            {"params": params}, tokens, None, segments, mutable=["router"]
        )
        sums = collect_router_sums(written)
        return jnp.sum(sums.probability[:, 0] ** 2) + jnp.sum(sums.squared_z), sums

    grads, sums = jax.jit(jax.grad(forward, has_aux=True))(params)
    assert sums.load.shape == (2, 4) and np.all(np.asarray(sums.tokens) == 8)
    assert np.any(np.asarray(grads["layers"]["mlp"]["router"]["kernel"]) != 0)
    assert "router" not in jax.eval_shape(
        lambda p: model.apply({"params": p}, tokens, mutable=["cache"])[1], params
    )


def test_with_a_cache_no_token_is_dropped():
    """Drawing is dropless: equal to the uncached pass where that is, too."""
    moe = dataclasses.replace(MOE, capacity_factor=0.5)
    model, dropless = Transformer(SHAPE, 11, moe=moe), Transformer(SHAPE, 11, moe=MOE)
    tokens = jax.random.randint(jax.random.key(3), (2, 9), 0, 11)
    params = jax.jit(lambda r: dropless.init(r, tokens, method="init_all")["params"])(
        jax.random.key(0)
    )
    want, _ = jax.jit(dropless.apply)({"params": params}, tokens)
    cache = transformer.empty_state(SHAPE, 2, 9, jnp.float32)
    step = jax.jit(lambda t, p, cache: model.apply({"params": params}, t, p, state=cache))
    seen = []
    for start, stop in [(0, 7), (7, 8), (8, 9)]:
        positions = jnp.broadcast_to(jnp.arange(start, stop), (2, stop - start))
        hidden, cache = step(tokens[:, start:stop], positions, cache)
        seen.append(hidden)
    close(jnp.concatenate(seen, 1), want, atol=2e-5)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (dict(num_experts=2, experts_per_token=3), r"experts_per_token=3 is more than .*experts=2"),
        (dict(experts_per_token=4), "experts_per_token=4 needs experts: set `num_experts`"),
        (dict(num_experts=4, experts_per_token=1), "set renormalize=false"),
        (dict(num_experts=4, capacity_factor=1.0, exchange_factor=1.0), "is for dropless routing"),
    ],
)
def test_choices_that_contradict_each_other_are_named(flags, said):
    with pytest.raises(ValueError, match=said):
        MoeConfig(**flags)


def test_flags_of_experts_need_experts_and_no_biases():
    with pytest.raises(ConfigError, match=r"--moe.expert_dim=8 needs experts: set --moe.num_exp"):
        parse_run(["--moe.expert_dim=8"])
    biased = parse_run(["--moe.num_experts=4", "--transformer.use_bias"])
    with pytest.raises(ConfigError, match=r"--transformer.use_bias: experts have no biases"):
        LanguageModel(biased)


def test_a_group_that_does_not_divide_a_row_is_named():
    module = layer(num_experts=4, capacity_factor=1.0, group_size=4)
    with pytest.raises(ValueError, match=r"row of 10 tokens is not divisible into groups of 4"):
        jax.eval_shape(lambda: module.apply({"params": params_of(module)}, X))
