"""The step for a loss of one's own does what optax alone does, on one device and on eight."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import genai_jax
from genai_jax import ConfigError
from tests.commands import report_of

START = {"layer": {"kernel": np.arange(12.0, dtype=np.float32).reshape(4, 3)}, "scale": np.ones(3)}
RULES = (("kernel$", ("embed", "mlp")), ("scale$", (None,)))


def loss(params, batch, key):
    predicted = jnp.tanh(batch["x"] @ params["layer"]["kernel"]) * params["scale"]
    error = jnp.mean(jnp.square(predicted - batch["y"]))
    return error, {"error": error, "random": jax.random.uniform(key)}


def batches(count: int, rows: int = 16):
    rng = np.random.default_rng(0)
    for _ in range(count):
        x = rng.normal(size=(rows, 4)).astype(np.float32)
        yield {"x": x, "y": np.tanh(x[:, :3])}


def by_hand(steps: int):
    params, optimizer = jax.tree.map(jnp.float32, START), optax.adam(0.1)
    state, losses = optimizer.init(params), []
    for batch in batches(steps):
        value, gradient = jax.value_and_grad(lambda p, b=batch: loss(p, b, jax.random.key(0))[0])(
            params
        )
        updates, state = optimizer.update(gradient, state)
        params = optax.apply_updates(params, updates)
        losses.append(float(value))
    return params, losses


def with_ours(steps: int, params=START, **options):
    state, step = genai_jax.make_step(loss, params, optax.adam(0.1), **options)
    metrics = []
    for batch in batches(steps):
        state, reported = step(state, batch)
        metrics.append({name: float(x) for name, x in reported.items()})
    return state, metrics


@pytest.mark.parametrize("accumulate", [1, 4])
def test_it_is_the_optimizer_on_the_gradient(accumulate):
    expected, losses = by_hand(3)
    state, metrics = with_ours(3, accumulate=accumulate)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), state.params, expected
    )
    np.testing.assert_allclose([m["loss"] for m in metrics], losses, rtol=1e-5)
    assert int(state.step) == 3 and set(metrics[0]) == {"loss", "grad_norm", "error", "random"}
    assert metrics[0]["random"] != metrics[1]["random"]  # a key of its own in every step


def test_parameters_may_come_from_a_function():
    init = lambda key: {"layer": {"kernel": jax.random.normal(key, (4, 3))}, "scale": jnp.ones(3)}
    (a, _), (b, _), (c, _) = (with_ours(0, init, seed=seed) for seed in (0, 0, 1))
    kernels = [np.asarray(x.params["layer"]["kernel"]) for x in (a, b, c)]
    assert np.array_equal(kernels[0], kernels[1]) and not np.array_equal(kernels[0], kernels[2])


def test_mistakes_are_one_line():
    with pytest.raises(ConfigError, match="mesh: 'model' is not one of data, fsdp"):
        with_ours(1, mesh={"model": 2})
    with pytest.raises(ConfigError, match=r"--mesh\.fsdp=2 does not fit"):
        with_ours(1, mesh={"fsdp": 2})
    with pytest.raises(ConfigError, match="no sharding rule matches parameter scale"):
        with_ours(1, rules=RULES[:1])
    with pytest.raises(ConfigError, match=r"a batch has 16 rows.* 1 device\(s\) x 3 microbatch"):
        with_ours(1, accumulate=3)
    state, step = genai_jax.make_step(loss, START, optax.sgd(1.0))
    with pytest.raises(ConfigError, match="a batch has 2 and 3 rows"):
        step(state, {"x": np.ones((2, 4)), "y": np.ones((3, 3))})
    with pytest.raises(ConfigError, match="batch entry x is a single number"):
        step(state, {"x": 1.0})


@pytest.mark.depends_on("whole runs")
def test_eight_devices_give_the_same():
    report = report_of("training/own_step_on_eight.py")
    state, metrics = with_ours(3)
    np.testing.assert_allclose(report["losses"], [m["loss"] for m in metrics], rtol=1e-5)
    kernel = np.asarray(state.params["layer"]["kernel"])
    np.testing.assert_allclose(report["kernel"], kernel, rtol=2e-5, atol=1e-6)
    assert report["partition"] == ["fsdp", None]
    assert report["moment"] == report["partition"]
