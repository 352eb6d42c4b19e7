"""The adversarial game of a critic, which tells data from fakes, and a generator that fools it.

It defines the phases of a step but not the networks, so that a game of two numbers follows the same
rules as one of images.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from genai_jax.config import field
from genai_jax.losses.adversarial import LOSSES, adversarial_loss
from genai_jax.losses.penalties import one_centered, path_lengths, zero_centered
from genai_jax.outside import outside_name
from genai_jax.tasks.protocol import LossOutput, Phase, StepInfo
from genai_jax.training.optimizer import OptimizerConfig, make_optimizer

UPDATES = ("alternating", "simultaneous")
CRITIC_PENALTIES = ("r1", "r2", "gradient_penalty")
PENALTIES = (*CRITIC_PENALTIES, "path_length")
SAME = "every verdict of the critic is the same"
PATH_DECAY = 0.99  # of the running mean of the path lengths


def _every(what: str):
    return field(1, f"Steps between {what}; above 1, they are a separate phase.", minimum=1)


@dataclasses.dataclass(frozen=True)
class GameConfig:
    """Rules of the game."""

    loss: str = field(
        "non_saturating", "Loss of both players.", choices=tuple(LOSSES), outside=outside_name
    )
    updates: str = field(
        "alternating", "Order of updates: critic first, or both at once.", choices=UPDATES
    )
    critic_updates: int = field(
        1, "Critic updates per step, each on its own slice of the batch.", minimum=1
    )
    critic_learning_rate: float | None = field(
        None, "Peak learning rate of the critic; --optimizer.learning_rate if unset.", minimum=0
    )
    r1: float = field(0.0, "Weight of the critic's squared gradient norm at data.", minimum=0)
    r1_every: int = _every("R1 penalties")
    r2: float = field(0.0, "Weight of the critic's squared gradient norm at fakes.", minimum=0)
    r2_every: int = _every("R2 penalties")
    gradient_penalty: float = field(
        0.0, "Weight of the critic's (gradient norm - 1)^2 between data and fakes.", minimum=0
    )
    gradient_penalty_every: int = _every("gradient penalties")
    path_length: float = field(
        0.0, "Weight of the generator's (path length - running mean)^2.", minimum=0
    )
    path_length_every: int = _every("path-length penalties")

    def __post_init__(self):
        for name in PENALTIES:
            every = getattr(self, f"{name}_every")
            if every > 1 and not getattr(self, name):
                raise ValueError(f"{name}_every={every} is set, but {name}=0")
            if every > 1 and self.updates == "simultaneous":
                raise ValueError(
                    f"{name}_every={every} does not fit updates=simultaneous, which "
                    "applies penalties in every update"
                )
        if self.critic_updates > 1 and self.updates == "simultaneous":
            raise ValueError(
                f"critic_updates={self.critic_updates} does not fit "
                "updates=simultaneous, which updates both players once"
            )

    def check_steps(self, steps: int):
        """Raises `ValueError` if a penalty would apply only in the first step."""
        for name in PENALTIES:
            every = getattr(self, f"{name}_every")
            if every > 1 and every >= steps:
                raise ValueError(f"{name}_every={every} is not below --train.steps={steps}")


class Players(NamedTuple):
    """The functions that the rules of the game apply to.

    Attributes:
      real: (batch, step) -> data as inputs of the critic, [batch, ...].
      styles: (params, mutables, batch, rng) -> inputs of `synthesize`, and mutables.
      synthesize: (params, styles, step, rng) -> fakes, [batch, ...].
      judge: (params, mutables, x, batch, step, rng) -> verdicts [batch], higher for more real.
      prepare: (params, mutables) -> mutables, before an update of the critic.
      watch: (mutables, verdicts on data, step) -> mutables, after an update of the critic.
    """

    real: Callable
    styles: Callable
    synthesize: Callable
    judge: Callable
    prepare: Callable = lambda params, mutables: mutables
    watch: Callable = lambda mutables, verdicts, step: mutables


class Game:
    """Creates the phases that train the groups "critic" and "generator".

    Mutables hold "path_length", the running mean of the path lengths, if their penalty is used.
    """

    def __init__(self, config: GameConfig, players: Players):
        self.config, self.players = config, players
        self.loss = adversarial_loss(config.loss)

    def init(self) -> dict:
        """Mutables of the game itself."""
        return {"path_length": jnp.float32(0)} if self.config.path_length else {}

    def phases(self, optimizer: OptimizerConfig, steps: int, rules: Sequence) -> tuple[Phase, ...]:
        """In the order of a step: critic, its lazy penalties, generator, its lazy penalty."""
        config = self.config
        critic = self._optimizer("critic", optimizer, steps, rules)
        generator = self._optimizer("generator", optimizer, steps, rules)
        if config.updates == "simultaneous":
            both = _side_by_side({"critic": critic, "generator": generator})
            return (Phase("both", ("critic", "generator"), self._both_loss, both, stuck=SAME),)

        def lazily(group: str, names) -> list[Phase]:
            """Phases of lazy penalties; the clipping norm scales with their weight."""
            phases = []
            for name in names:
                if (every := getattr(config, f"{name}_every")) > 1:
                    clip_norm = optimizer.clip_norm * self._rarity(name)
                    clipped = dataclasses.replace(optimizer, clip_norm=clip_norm)
                    tx, loss = self._optimizer(group, clipped, steps, rules), self._lazy_loss(name)
                    phases.append(Phase(name, (group,), loss, tx, every=every, optimizer_of=group))
            return phases

        return (
            Phase(
                "critic",
                ("critic",),
                self._critic_loss,
                critic,
                repeats=config.critic_updates,
                stuck=SAME,
            ),
            *lazily("critic", CRITIC_PENALTIES),
            Phase("generator", ("generator",), self._generator_loss, generator),
            *lazily("generator", ("path_length",)),
        )

    def _optimizer(self, group, config: OptimizerConfig, steps, rules):
        """The optimizer of a player, corrected for the updates that lazy penalties add."""
        critic = group == "critic"
        if critic and self.config.critic_learning_rate is not None:
            config = dataclasses.replace(config, learning_rate=self.config.critic_learning_rate)
        names = CRITIC_PENALTIES if critic else ("path_length",)
        intervals = [getattr(self.config, f"{name}_every") for name in names]
        main = self.config.critic_updates if critic else 1
        updates = main + sum(1 / every for every in intervals if every > 1)
        return make_optimizer(
            config, steps, rules, updates_per_step=updates, correction=main / updates
        )

    # Losses.

    def _critic_loss(self, params, mutables, batch, info: StepInfo) -> LossOutput:
        mutables = self.players.prepare(params, mutables)
        terms = self._critic_terms(params, mutables, batch, info)
        return LossOutput(
            terms.loss, terms.metrics, self.players.watch(mutables, terms.real, info.step),
            can_learn=terms.can_learn,
        )  # fmt: skip

    def _critic_terms(self, params, mutables, batch, info: StepInfo) -> "_CriticTerms":
        """Loss with the penalties of every step, metrics, and verdicts on data."""
        fake_rng, judge_rng, penalty_rng = jax.random.split(info.rng, 3)
        x, y = self._examples(params, mutables, batch, info.step, fake_rng)
        real, fake = (
            self.players.judge(
                params, mutables, z, batch, info.step, jax.random.fold_in(judge_rng, i)
            )
            for i, z in enumerate((x, y))
        )
        loss, verdicts = self.loss.critic(real, fake), jnp.concatenate([real, fake])
        metrics = {"real": jnp.mean(real), "fake": jnp.mean(fake)}
        for name in CRITIC_PENALTIES:
            if getattr(self.config, name) and getattr(self.config, f"{name}_every") == 1:
                penalty = self._critic_penalty(
                    name, params, mutables, batch, x, y, info._replace(rng=penalty_rng)
                )
                metrics[_penalty_name(name)] = penalty
                loss += getattr(self.config, name) * penalty
        # A critic whose verdicts are all equal has no gradient and gives the generator none.
        return _CriticTerms(loss, metrics, real, jnp.max(verdicts) != jnp.min(verdicts))

    def _examples(self, params, mutables, batch, step, rng):
        """Data, and fakes without gradients to the generator."""
        style_rng, noise_rng = jax.random.split(rng)
        styles, _ = self.players.styles(params, mutables, batch, style_rng)
        fakes = self.players.synthesize(params, styles, step, noise_rng)
        return self.players.real(batch, step), jax.lax.stop_gradient(fakes)

    def _critic_penalty(self, name, params, mutables, batch, x, y, info: StepInfo):
        judge_rng, where_rng = jax.random.split(info.rng)
        judge = lambda x: self.players.judge(params, mutables, x, batch, info.step, judge_rng)
        if name == "gradient_penalty":
            return one_centered(judge, x, y, where_rng)
        return zero_centered(judge, x if name == "r1" else y)

    def _generator_loss(self, params, mutables, batch, info: StepInfo) -> LossOutput:
        style_rng, noise_rng, judge_rng, path_rng = jax.random.split(info.rng, 4)
        styles, mutables = self.players.styles(params, mutables, batch, style_rng)
        fakes = self.players.synthesize(params, styles, info.step, noise_rng)
        judge = lambda x: self.players.judge(params, mutables, x, batch, info.step, judge_rng)
        real = judge(self.players.real(batch, info.step)) if self.loss.paired else None
        fake = judge(fakes)
        loss, metrics = self.loss.generator(real, fake), {"fake": jnp.mean(fake)}
        if self.config.path_length and self.config.path_length_every == 1:
            path = info._replace(rng=path_rng)
            metrics["path_penalty"], mutables = self._path(params, mutables, batch, path)
            loss += self.config.path_length * metrics["path_penalty"]
        return LossOutput(loss, metrics, mutables)

    def _path(self, params, mutables, batch, info: StepInfo):
        """The path-length penalty, and mutables with the updated mean length."""
        style_rng, noise_rng, direction_rng = jax.random.split(info.rng, 3)
        styles, _ = self.players.styles(params, mutables, batch, style_rng)
        paint = lambda styles: self.players.synthesize(params, styles, info.step, noise_rng)
        lengths = path_lengths(paint, styles, direction_rng)
        now = jax.lax.stop_gradient(jnp.mean(lengths))
        mean = PATH_DECAY * mutables["path_length"] + (1 - PATH_DECAY) * now
        return jnp.mean(jnp.square(lengths - mean)), {**mutables, "path_length": mean}

    def _rarity(self, name: str) -> int:
        """Number of updates of the player per update of its penalty."""
        updates = 1 if name == "path_length" else self.config.critic_updates
        return updates * getattr(self.config, f"{name}_every")

    def _lazy_loss(self, name: str):
        """The loss of a lazy penalty, whose weight is multiplied by its rarity."""
        weight = getattr(self.config, name) * self._rarity(name)

        def loss(params, mutables, batch, info: StepInfo) -> LossOutput:
            if name == "path_length":
                penalty, mutables = self._path(params, mutables, batch, info)
            else:
                fake_rng, rng = jax.random.split(info.rng)
                x, y = self._examples(params, mutables, batch, info.step, fake_rng)
                penalty = self._critic_penalty(
                    name, params, mutables, batch, x, y, info._replace(rng=rng)
                )
            return LossOutput(weight * penalty, {_penalty_name(name): penalty}, mutables)

        return loss

    def _both_loss(self, params, mutables, batch, info: StepInfo) -> LossOutput:
        """The sum of both losses, each of which treats the other player as a constant."""
        frozen = jax.lax.stop_gradient(params)
        mutables = self.players.prepare(params, mutables)
        critic = self._critic_terms({**frozen, "critic": params["critic"]}, mutables, batch, info)
        generator = self._generator_loss(
            {**frozen, "generator": params["generator"]}, mutables, batch, info
        )
        metrics = critic.metrics | {
            "critic_loss": critic.loss, "generator_loss": generator.loss,
        }  # fmt: skip
        metrics |= {name: value for name, value in generator.metrics.items() if name != "fake"}
        return LossOutput(
            critic.loss + generator.loss,
            metrics,
            self.players.watch(generator.mutables, critic.real, info.step),
            can_learn=critic.can_learn,
        )


class _CriticTerms(NamedTuple):
    loss: jax.Array
    metrics: dict[str, jax.Array]
    real: jax.Array  # verdicts on data, [batch]
    can_learn: jax.Array


def _side_by_side(optimizers: dict) -> optax.GradientTransformation:
    """Updates each group of parameters with its own optimizer."""

    def init(params):
        return {g: tx.init({g: params[g]}) for g, tx in optimizers.items()}

    def update(updates, state, params):
        results = {
            g: tx.update({g: updates[g]}, state[g], {g: params[g]}) for g, tx in optimizers.items()
        }
        new_updates = {g: group[g] for g, (group, _) in results.items()}
        return new_updates, {g: state for g, (_, state) in results.items()}

    return optax.GradientTransformation(init, update)


def _penalty_name(name: str) -> str:
    return {"gradient_penalty": name, "path_length": "path_penalty"}.get(name, f"{name}_penalty")
