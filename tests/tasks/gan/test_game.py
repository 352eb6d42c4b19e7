"""The rules of adversarial training, on games of a few numbers whose outcome is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genai_jax.losses.adversarial import LOSSES
from genai_jax.losses.penalties import one_centered, path_lengths, zero_centered
from genai_jax.tasks.gan.game import Game, GameConfig, Players
from genai_jax.training.optimizer import OptimizerConfig
from genai_jax.training.step import init_state, make_step, phase_ran

SGD = OptimizerConfig(
    name="sgd", learning_rate=0.1, schedule="constant", warmup_steps=0, weight_decay=0,
    momentum=0, clip_norm=0,
)  # fmt: skip
RULES = (("^(critic|generator)$", ()),)


def of_numbers(config: GameConfig) -> Game:
    """A critic psi x and a generator that always says theta; the data is batch["x"]."""

    def styles(params, mutables, batch, rng):
        return jnp.full_like(batch["x"], params["generator"]), mutables

    return Game(
        config,
        Players(
            real=lambda batch, step: batch["x"],
            styles=styles,
            synthesize=lambda params, styles, step, rng: styles,
            judge=lambda params, mutables, x, batch, step, rng: params["critic"] * x,
        ),
    )


class Toy:
    """Enough of a task for `init_state`."""

    def __init__(self, game: Game, phases, params):
        self.game, self._phases, self._params = game, phases, params

    def init(self, rng):
        return jax.tree.map(jnp.float32, self._params), self.game.init()

    def phases(self, params):
        return self._phases


def play(optimizer=SGD, **rules):
    """(phases, jitted step, function from psi and theta to a fresh state)."""
    game = of_numbers(GameConfig(**rules))
    phases = game.phases(optimizer, 100, RULES)

    def begin(psi, theta):
        task = Toy(game, phases, {"critic": psi, "generator": theta})
        return init_state(task, jax.random.key(0), {})

    return phases, jax.jit(make_step(phases)), begin


DIRAC = {"x": jnp.zeros(2)}


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        (dict(r1=1.0), [0.9375, 0.96]),
        (dict(), [1.0, 1.0]),
        (dict(updates="simultaneous"), [1.00125, 1.00125]),
        (dict(loss="relativistic"), [1.0, 1.0]),
    ],
    ids=["r1", "none", "simultaneous", "relativistic"],
)
def test_the_dirac_gan_turns_and_shrinks_as_theory_says(rules, expected):
    """Mescheder et al. 2018: eigenvalues of the step near (psi, theta) = (0, 0).

    Alternating [[1 - hg, h/2], [-h/2 (1 - hg), 1 - h^2/4]]; at once [[1, h/2], [-h/2, 1]], whose
    eigenvalues have the absolute value (1 + h^2/4)^1/2 = 1.00125 for h = 0.1.
    """
    _, step, begin = play(**rules)
    tiny = 1e-2

    def moved(psi, theta):
        state, _ = step(begin(psi, theta), DIRAC)
        params = state.params
        return np.array([params["critic"], params["generator"]], np.float64) / tiny

    jacobian = np.stack([moved(tiny, 0.0), moved(0.0, tiny)], 1)
    sizes = np.sort(np.abs(np.linalg.eigvals(jacobian)))
    np.testing.assert_allclose(sizes, expected, atol=2e-5 if len(set(expected)) == 1 else 2e-4)


def test_lazy_penalties_run_on_their_steps_with_the_critics_optimizer_and_corrected_rates():
    adam = OptimizerConfig(
        learning_rate=0.1, schedule="constant", warmup_steps=0, weight_decay=0, clip_norm=0
    )
    phases, step, begin = play(adam, r1=0.5, r1_every=4, r2=0.5, r2_every=2)
    assert [phase.name for phase in phases] == ["critic", "r1", "r2", "generator"]
    state = begin(1.0, 0.5)
    assert set(state.opt_state) == {"critic", "generator"}
    for i in range(5):
        state, report = step(state, DIRAC)
        metrics = report.metrics
        for name, every in (("r1", 4), ("r2", 2)):
            ran = phase_ran(phases, f"{name}/loss", i)
            assert ran == (i % every == 0) == (float(metrics[f"{name}/{name}_penalty"]) != 0)
            if ran:  # as many times heavier as it is rarer
                expected = 0.5 * every * metrics[f"{name}/{name}_penalty"]
                assert float(metrics[f"{name}/loss"]) == pytest.approx(float(expected))
    counts = {int(x) for x in jax.tree.leaves(state.opt_state["critic"]) if x.dtype == jnp.int32}
    assert counts == {5 + 2 + 3}


def test_a_lazy_penalty_weighs_as_much_as_one_of_every_critic_update():
    batch = {"x": jnp.array([1.0, 20.0, 300.0, 5.0, 60.0, 700.0])}
    _, step, begin = play(r1=0.5, r1_every=4, critic_updates=3)
    _, report = step(begin(1.0, 0.5), batch)
    penalty = float(report.metrics["r1/r1_penalty"])
    assert float(report.metrics["r1/loss"]) == pytest.approx(0.5 * 4 * 3 * penalty) and penalty > 0


def test_clipping_leaves_a_lazy_penalty_its_weight():
    """What one penalty moves is not less for being the sum of eight."""
    clipped = OptimizerConfig(
        name="sgd", learning_rate=0.1, schedule="constant", warmup_steps=0, clip_norm=1,
        weight_decay=0, momentum=0,
    )  # fmt: skip
    phases, _, begin = play(clipped, r1=1.0, r1_every=8)
    alone = tuple(phase for phase in phases if phase.name == "r1")
    state, report = jax.jit(make_step(alone))(begin(1.0, 0.0), DIRAC)
    assert float(report.metrics["grad_norm"]) == pytest.approx(8)  # of 8 / 2 * psi^2
    rate = 0.1 / (1 + 1 / 8)
    assert float(state.params["critic"]) == pytest.approx(1 - 8 * rate, rel=1e-5)


def test_the_rates_of_a_lazy_optimizer_are_corrected():
    """With one penalty in four steps, 4/5 of the rate; its five updates are four steps."""
    lazy = dict(r1=1e-9, r1_every=4)
    _, plain_step, begin = play(**{})
    _, lazy_step, lazy_begin = play(**lazy)
    plain, _ = plain_step(begin(0.5, 1.0), DIRAC)
    corrected, _ = lazy_step(lazy_begin(0.5, 1.0), DIRAC)
    move = lambda state: float(state.params["critic"]) - 0.5
    assert move(corrected) == pytest.approx(0.8 * move(plain), rel=1e-5)


def test_critic_updates_see_different_slices_of_the_batch():
    """With Wasserstein's loss each update moves psi by the mean of its slice."""
    batch = {"x": jnp.array([1.0, 20.0, 300.0, 5.0, 60.0, 700.0])}
    _, step, begin = play(loss="wasserstein", critic_updates=3)
    state, report = step(begin(0.0, 0.0), batch)
    assert float(state.params["critic"]) == pytest.approx(0.1 * (3 + 40 + 500))
    assert float(report.metrics["critic/real"]) == pytest.approx(0.1 * (3 + 40) * 500)


@pytest.mark.parametrize("updates", ["alternating", "simultaneous"])
def test_a_critic_that_says_the_same_of_everything_leaves_nothing_to_learn(updates):
    phases, step, begin = play(updates=updates)
    _, report = step(begin(0.0, 1.0), {"x": jnp.ones(2)})
    assert not report.can_learn[phases[0].name]
    _, report = step(begin(0.1, 1.0), {"x": jnp.zeros(2)})
    assert all(report.can_learn.values())


@pytest.mark.parametrize("kind", LOSSES)
def test_losses_pull_verdicts_apart_and_fakes_up(kind):
    real, fake = jnp.array([0.3, -0.2]), jnp.array([0.1, -0.4])
    by_real, by_fake = jax.grad(lambda r, f: LOSSES[kind].critic(r, f), (0, 1))(real, fake)
    assert np.all(by_real < 0) and np.all(by_fake > 0) == (kind != "least_squares")
    assert np.all(jax.grad(lambda f: LOSSES[kind].generator(real, f))(fake) < 0)


def test_losses_have_their_closed_forms():
    real, fake = jnp.array([2.0, 0.5]), jnp.array([-3.0, 0.0])
    value = lambda kind: float(LOSSES[kind].critic(real, fake))
    assert value("hinge") == 0.25 + 0.5
    assert value("least_squares") == ((1 + 0.25) / 2 + 9 / 2) / 2
    assert value("wasserstein") == -1.5 - 1.25
    softplus = lambda *x: float(np.mean(np.log1p(np.exp(np.array(x)))))
    assert value("non_saturating") == pytest.approx(softplus(-2, -0.5) + softplus(-3, 0))
    assert value("relativistic") == pytest.approx(softplus(-5, -0.5))


def test_penalties_of_a_linear_critic_have_closed_forms_and_gradients():
    rng = np.random.default_rng(0)
    w = rng.normal(size=(3, 4)).astype(np.float32)
    x, y = rng.normal(size=(2, 5, 3, 4)).astype(np.float32)
    judge = lambda w: lambda x: jnp.einsum("bij,ij->b", x, w) + 7
    norm = np.linalg.norm(w)
    zero = lambda w: zero_centered(judge(w), x)
    one = lambda w: one_centered(judge(w), x, y, jax.random.key(0))
    assert float(zero(w)) == pytest.approx(norm**2 / 2, rel=1e-5)
    assert float(one(w)) == pytest.approx((norm - 1) ** 2, rel=1e-5)
    np.testing.assert_allclose(jax.grad(zero)(w), w, rtol=1e-5)
    np.testing.assert_allclose(jax.grad(one)(w), 2 * (norm - 1) * w / norm, rtol=1e-5)
    flat = one_centered(lambda x: jnp.zeros(5), x, y, jax.random.key(0))
    assert float(flat) == 1 and np.isfinite(jax.grad(one)(0 * w)).all()


def test_path_lengths_of_a_linear_generator():
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(6, 4 * 4 * 2)).astype(np.float32)
    styles = rng.normal(size=(3, 6)).astype(np.float32)
    paint = lambda matrix: lambda styles: (styles @ matrix).reshape(-1, 4, 4, 2)
    key = jax.random.key(1)
    directions = np.asarray(jax.random.normal(key, (3, 4, 4, 2))).reshape(3, -1) / 4
    expected = np.linalg.norm(directions @ matrix.T, axis=1)
    lengths = lambda matrix: path_lengths(paint(matrix), styles, key)
    np.testing.assert_allclose(lengths(matrix), expected, rtol=1e-5)
    gradient = jax.grad(lambda m: jnp.sum(lengths(m)))(matrix)
    assert np.abs(gradient).min() > 0


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        (dict(r1_every=4), "r1_every=4 is set, but r1=0"),
        (dict(r1=1.0, r1_every=4, updates="simultaneous"), "r1_every=4 does not fit .*=simultan"),
        (dict(critic_updates=2, updates="simultaneous"), "critic_updates=2 does not fit"),
    ],
)
def test_rules_that_contradict_each_other_are_refused(rules, said):
    with pytest.raises(ValueError, match=said):
        GameConfig(**rules)


def test_a_penalty_rarer_than_the_run_is_long_is_refused():
    rules = GameConfig(path_length=1.0, path_length_every=8)
    rules.check_steps(9)
    with pytest.raises(ValueError, match=r"path_length_every=8 is not below --train.steps=8"):
        rules.check_steps(8)
