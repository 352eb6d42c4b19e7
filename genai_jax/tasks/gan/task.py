"""Generative adversarial networks on images."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from genai_jax.config import Config, ConfigError, field, name_flags
from genai_jax.data.images.loader import ImageDataConfig
from genai_jax.losses.adversarial import LOSSES
from genai_jax.metrics.energy_distance import energy_distance
from genai_jax.networks.adversarial.critic import CriticConfig
from genai_jax.networks.adversarial.generator import GeneratorConfig
from genai_jax.networks.flops import count_flops
from genai_jax.networks.layers.convolution import downsample, upsample
from genai_jax.requests import EvaluateRequest
from genai_jax.tasks.arrays.data import ArrayData
from genai_jax.tasks.arrays.scores import ScoreFlags, score_images
from genai_jax.tasks.gan.augmentation import AugmentationConfig, augment, steered
from genai_jax.tasks.gan.game import Game, GameConfig, Players
from genai_jax.tasks.gan.growing import smaller_run
from genai_jax.tasks.gan.networks import PLAYERS, player, player_rules
from genai_jax.tasks.gan.sampling import GanRequest, sample_images, sample_request
from genai_jax.tasks.protocol import Mean, Params, Phase, Rows, Task, Transfer

STYLE_DECAY = 0.995  # of the running mean of styles, towards which truncation goes
MAX_COMPARED = 1024  # images in the energy distance of an evaluation


@dataclasses.dataclass(frozen=True)
class GanConfig(GameConfig):
    condition: str = field(
        "none", "What both players are conditioned on.", choices=("none", "class")
    )
    grow_from: str = field(
        "",
        "Workdir of a run on images half as large, whose layers initialize this one.",
        path=True,
    )
    fade_steps: int = field(0, "Steps over which the new layers fade in.", minimum=0)

    def __post_init__(self):
        super().__post_init__()
        if bool(self.grow_from) != bool(self.fade_steps):
            raise ValueError(
                f"--gan.grow_from={self.grow_from} and --gan.fade_steps={self.fade_steps}: a run "
                "that grows needs both"
            )


@dataclasses.dataclass(frozen=True)
class GanScoreRequest(ScoreFlags, EvaluateRequest):
    truncation: float = field(
        1.0, "Scale of the distance of styles from their mean; 1: no truncation.", minimum=0
    )
    sample_flags: ClassVar = (*ScoreFlags.sample_flags, "truncation")


class Gan(Task):
    """The task behind ``--task=gan``; see `genai_jax.tasks.protocol.Task`."""

    components: ClassVar = {
        "data": ImageDataConfig,
        "gan": GanConfig,
        "generator": GeneratorConfig,
        "critic": CriticConfig,
        "augmentation": AugmentationConfig,
    }
    loss_unit = "the players' own; held out: energy distance"
    curves: ClassVar = {"verdicts": (("/real", "/fake"), "mean verdict of the critic")}
    sample_request = GanRequest
    evaluate_request = GanScoreRequest

    def __init__(self, config: Config):
        self.config, self.data = config, ArrayData(config)
        players = Players(
            real=self._real, styles=self._styles, synthesize=self._synthesize, judge=self._judge,
            prepare=self._prepare, watch=self._watch,
        )  # fmt: skip
        self.game = Game(config.gan, players)
        self._check()
        self.label_sizes = self.data.conditional_labels(config.gan.condition, "--gan.condition")
        self.generator, self.critic = (
            player(name, config, self.data.shape, self.label_sizes) for name in PLAYERS
        )
        self.partition_rules = tuple(
            (f"^{name}/.*{pattern}", axes)
            for name in PLAYERS
            for pattern, axes in player_rules(name, config, getattr(self, name))
        )

    def _check(self):
        config, chosen = self.config, self.config.gan
        try:
            chosen.check_steps(config.train.steps)
        except ValueError as error:
            raise ConfigError(name_flags(str(error), "gan", type(chosen))) from None
        if chosen.fade_steps > config.train.steps:
            raise ConfigError(
                f"--gan.fade_steps={chosen.fade_steps} is above --train.steps={config.train.steps}"
            )
        if config.augmentation.kinds and len(self.data.shape) != 3:
            raise ConfigError(
                f"--augmentation.kinds={config.augmentation.kinds} is for images, but "
                f"{config.data.dataset} has examples of shape {self.data.shape}"
            )
        if config.augmentation.target is not None and self.game.loss.undecided is None:
            known = [name for name, loss in LOSSES.items() if loss.undecided is not None]
            raise ConfigError(
                f"--augmentation.target={config.augmentation.target} measures how certain the "
                f"critic is, which needs --gan.loss={' or '.join(known)}, not {chosen.loss}"
            )
        slice_size = config.data.batch_size // (chosen.critic_updates * config.train.accumulate)
        if config.critic.minibatch_std and slice_size < 2:
            raise ConfigError(
                "--critic.minibatch_std needs 2 images per update, but --data.batch_size="
                f"{config.data.batch_size} leaves {slice_size}"
            )

    # Parameters.

    def init(self, rng: jax.Array) -> tuple[dict, dict]:
        """Groups, and mutables: spectral vectors, means, augmentation probability, and fade."""
        generator_rng, critic_rng = jax.random.split(rng)
        labels = jnp.zeros((2, len(self.label_sizes)), jnp.int32)
        z = jnp.zeros((2, self.config.generator.latent_dim))
        generator_variables = self.generator.init(generator_rng, z, labels)
        critic_variables = self.critic.init(critic_rng, jnp.zeros((2, *self.data.shape)), labels)
        mutables = self.game.init()
        if self.config.gan.fade_steps:
            mutables["fade"] = jnp.float32(0)
        if self.config.critic.spectral_norm:
            mutables["spectral"] = critic_variables["spectral"]
        if self.config.generator.network == "style":
            mutables["style_mean"] = jnp.zeros(self.config.generator.style_dim)
        if self.config.augmentation.kinds:
            mutables["augmented"] = jnp.float32(self.config.augmentation.probability)
        return {
            "generator": generator_variables["params"],
            "critic": critic_variables["params"],
        }, mutables

    def init_from(self) -> tuple[Transfer, ...]:
        """The layers of the run that this one grows from, if any."""
        return smaller_run(self) if self.config.gan.grow_from else ()

    def phases(self, params: Params) -> tuple[Phase, ...]:
        optimizer, steps = self.config.optimizer, self.config.train.steps
        return self.game.phases(optimizer, steps, self.partition_rules)

    # The players.

    def _fade(self, step: jax.Array) -> jax.Array | float:
        """Weight of the newest layers, which rises over the first steps of a growing run."""
        steps = self.config.gan.fade_steps
        return jnp.minimum(step / steps, 1.0) if steps else 1.0

    def _real(self, batch, step):
        x, fade = self.data.scaled(batch["image"]), self._fade(step)
        if not self.config.gan.fade_steps:
            return x
        halve = (2,) * (x.ndim - 2)
        return fade * x + (1 - fade) * upsample(downsample(x, halve), halve)

    def _styles(self, params, mutables, batch, rng):
        labels = batch.get("labels")
        z = jax.random.normal(rng, (batch["image"].shape[0], self.config.generator.latent_dim))
        styles = self.styles(params, z, labels)
        if "style_mean" in mutables:
            now = jax.lax.stop_gradient(jnp.mean(styles.astype(jnp.float32), 0))
            mean = STYLE_DECAY * mutables["style_mean"] + (1 - STYLE_DECAY) * now
            mutables = {**mutables, "style_mean": mean}
        return styles, mutables

    def styles(self, params, z, labels) -> jax.Array:
        """[batch, latent_dim] and labels [batch, attributes] -> styles for `synthesize`."""
        group = {"params": params["generator"]}
        return self.generator.apply(group, z, labels, method="styles")

    def _synthesize(self, params, styles, step, rng):
        return self._image(params, styles, self._fade(step), rng)

    def _image(self, params, styles, fade, key) -> jax.Array:
        """Styles -> images in [-1, 1]; noise inputs are 0 without a key."""
        return self.generator.apply(
            {"params": params["generator"]}, styles, fade, method="synthesize",
            rngs={} if key is None else {"noise": key},
        )  # fmt: skip

    def _judge(self, params, mutables, x, batch, step, rng):
        if "augmented" in mutables:
            x = augment(self.config.augmentation, x, mutables["augmented"], rng)
        return self._verdicts(params, mutables, x, batch.get("labels"), self._fade(step))

    def _verdicts(self, params, mutables, x, labels, fade) -> jax.Array:
        """Verdicts of the critic on images [batch, *space, channels]: [batch]."""
        variables = {"params": params["critic"]}
        if "spectral" in mutables:
            variables["spectral"] = mutables["spectral"]
        return self.critic.apply(variables, x, labels, fade)

    def _prepare(self, params, mutables):
        """One power iteration of every kernel."""
        if "spectral" not in mutables:
            return mutables
        variables = {"params": params["critic"], "spectral": mutables["spectral"]}
        x = jnp.zeros((2, *self.data.shape))
        labels = jnp.zeros((2, len(self.label_sizes)), jnp.int32)
        _, after = self.critic.apply(variables, x, labels, mutable="spectral")
        return {**mutables, "spectral": jax.lax.stop_gradient(after["spectral"])}

    def _watch(self, mutables, verdicts, step):
        if "fade" in mutables:  # for evaluation and sampling, which have no step
            mutables = {**mutables, "fade": self._fade(step + 1)}
        if "augmented" not in mutables:
            return mutables
        config = self.config.augmentation
        verdicts = jax.lax.stop_gradient(verdicts)
        augmented = steered(config, mutables["augmented"], verdicts, self.game.loss.undecided)
        return {**mutables, "augmented": augmented}

    # Metrics and samples.

    def paint(self, params, mutables, z, labels, key=None, truncation=1.0) -> jax.Array:
        """Latents -> images in [-1, 1], float32.

        Args:
          z: [batch, latent_dim].
          labels: [batch, attributes], or None.
          key: of the noise inputs, which are 0 without one.
          truncation: scale of the distance of styles from their mean or, for a generator without
            a mapping network, of latents from 0.
        """
        if "style_mean" in mutables:
            mean = mutables["style_mean"]
            styles = mean + truncation * (self.styles(params, z, labels) - mean)
        else:
            styles = self.styles(params, truncation * z, labels)
        return self._image(params, styles, mutables.get("fade", 1.0), key)

    def example_metrics(self, params, mutables, batch, key) -> dict[str, Mean | Rows]:
        """Verdicts on held-out images and on as many samples; and the images, to compare them.

        Verdicts on held-out images far below those on training data indicate that the critic
        overfits.
        """
        labels, mask = batch.get("labels"), batch["loss_mask"]
        z = jax.random.normal(key, (batch["image"].shape[0], self.config.generator.latent_dim))
        y = self.paint(params, mutables, z, labels, key)
        judge = lambda x: self._verdicts(params, mutables, x, labels, mutables.get("fade", 1.0))
        return {
            "real": Mean(judge(self.data.scaled(batch["image"])) * mask, mask),
            "fake": Mean(judge(y) * mask, mask),
            "held_out": Rows(batch["image"], mask, MAX_COMPARED),
            "samples": Rows(self.data.to_levels(y), mask, MAX_COMPARED),
        }

    def summarize(self, reduced, params, mutables, key) -> dict[str, float]:
        """`loss` is the energy distance of pixels in [-1, 1], between at most 1,024 of each."""
        unit = 2 / (self.data.levels - 1)
        held_out, samples = (reduced.pop(name) * unit for name in ("held_out", "samples"))
        images = int(reduced["real"].weight)
        distance = {"loss": energy_distance(held_out, samples)}
        return distance | super().summarize(reduced, params, mutables, key) | {"images": images}

    def report(self, params, mutables, batches, request) -> dict:
        """Scores of sampled images, if requested."""
        if not request.scores_samples():
            return {}
        images, labels = sample_images(
            self, params, mutables, jax.random.key(request.seed), request.num_samples,
            truncation=request.truncation,
        )  # fmt: skip
        return score_images(self.data, images, labels, request)

    def sample(self, params, mutables, request):
        return sample_request(self, params, mutables, request)

    def flops_per_step(self) -> dict:
        """FLOPs of both networks; all critic updates together see the batch once."""
        config, shape = self.config, (self.config.data.batch_size, *self.data.shape)
        params, mutables = jax.eval_shape(self.init, jax.random.key(0))
        x = jax.ShapeDtypeStruct(shape, jnp.float32)
        z = jax.ShapeDtypeStruct((shape[0], config.generator.latent_dim), jnp.float32)
        labels = jax.ShapeDtypeStruct((shape[0], len(self.data.label_sizes)), jnp.int32)
        paint = count_flops(self.paint, params, mutables, z, labels)
        judge = count_flops(
            lambda p, m, x, labels: self._verdicts(p, m, x, labels, 1.0),
            params, mutables, x, labels,
        )  # fmt: skip
        return {
            "flops_per_step": paint + 6 * judge + 3 * (paint + judge),
            "convention": "matmuls and convolutions: for the critic 3 x forward on data and fakes, "
            "and a forward pass of the generator; for that 3 x forward through both; no penalties",
        }
