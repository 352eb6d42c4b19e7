"""Generative adversarial networks on images."""

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from genai_jax.config import Config, ConfigError, field
from genai_jax.data.images.loader import ImageDataConfig
from genai_jax.losses.adversarial import UNDECIDED
from genai_jax.metrics.energy_distance import energy_distance
from genai_jax.networks.adversarial import critic, generator
from genai_jax.networks.adversarial.critic import Critic, CriticConfig
from genai_jax.networks.adversarial.generator import Generator, GeneratorConfig
from genai_jax.networks.flops import count_flops
from genai_jax.networks.layers.convolution import downsample, upsample
from genai_jax.requests import EvaluateRequest
from genai_jax.tasks.arrays.data import ImageTask
from genai_jax.tasks.arrays.scores import ScoreFlags, score_images
from genai_jax.tasks.gan.augmentation import AugmentationConfig, augment, steered
from genai_jax.tasks.gan.game import Game, GameConfig, Players
from genai_jax.tasks.gan.growing import smaller_groups
from genai_jax.tasks.gan.sampling import GanRequest, draw, draw_images
from genai_jax.training.distributed import to_host
from genai_jax.training.phase import Phase
from genai_jax.training.sharding import logical_axes

STYLE_DECAY = 0.995  # of the mean style, which truncation goes to
MOST_COMPARED = 1024  # images in the energy distance of an evaluation


@dataclasses.dataclass(frozen=True)
class GanConfig(GameConfig):
    condition: str = field("none", "what both are told", choices=("none", "class"))
    grow_from: str = field(
        "", "workdir of a run on images half as large, whose layers this one begins with"
    )
    fade_steps: int = field(0, "steps in which the new layers fade in", minimum=0)

    def __post_init__(self):
        super().__post_init__()
        if bool(self.grow_from) != bool(self.fade_steps):
            raise ValueError(
                f"--gan.grow_from={self.grow_from} and --gan.fade_steps={self.fade_steps}: a run "
                "that grows needs both"
            )


@dataclasses.dataclass(frozen=True)
class GanScoreRequest(ScoreFlags, EvaluateRequest):
    truncation: float = field(1.0, "how far styles are from their mean; 1: as drawn", minimum=0)
    drawing: ClassVar = (*ScoreFlags.drawing, "truncation")


class Gan(ImageTask):
    """The task behind ``--task=gan``; see `genai_jax.training.phase.Task`."""

    components: ClassVar = {
        "data": ImageDataConfig,
        "gan": GanConfig,
        "generator": GeneratorConfig,
        "critic": CriticConfig,
        "augmentation": AugmentationConfig,
    }
    partition_rules: ClassVar = (
        *((f"^generator/.*{p}", axes) for p, axes in generator.PARTITION_RULES),
        *((f"^critic/.*{p}", axes) for p, axes in critic.PARTITION_RULES),
    )
    loss_unit = "the players' own; eval: energy distance"
    curves: ClassVar = {"verdicts": (("/real", "/fake"), "mean verdict of the critic")}
    sample_request = GanRequest
    evaluate_request = GanScoreRequest

    def __init__(self, config: Config):
        super().__init__(config)
        self._check()
        shape, grows = self.loader.shape, bool(config.gan.grow_from)
        self.label_sizes = self.loader.label_sizes if config.gan.condition == "class" else ()
        told = (shape, self.label_sizes, grows, self.dtype)
        self.generator = Generator(config.generator, *told)
        self.critic = Critic(config.critic, *told)
        players = Players(
            self._real, self._styles, self._synthesize, self._judge, self._prepare, self._watch
        )
        self.game = Game(config.gan, players)
        try:
            jax.eval_shape(self.init, jax.random.key(0))
        except ValueError as error:  # sizes that do not halve
            raise ConfigError(str(error)) from None

    def _check(self):
        config, chosen = self.config, self.config.gan
        chosen.check_steps(config.train.steps)
        if chosen.fade_steps > config.train.steps:
            raise ConfigError(
                f"--gan.fade_steps={chosen.fade_steps} is above --train.steps={config.train.steps}"
            )
        if chosen.condition == "class" and not self.loader.label_sizes:
            raise ConfigError(f"--gan.condition=class: {config.data.dataset} has no labels")
        if config.augmentation.kinds and len(self.loader.shape) != 3:
            raise ConfigError(
                f"--augmentation.kinds={config.augmentation.kinds} is for images, and "
                f"{config.data.dataset} has examples of shape {self.loader.shape}"
            )
        if config.augmentation.target is not None and chosen.loss not in UNDECIDED:
            raise ConfigError(
                f"--augmentation.target={config.augmentation.target} reads how sure the critic is, "
                f"which --gan.loss={chosen.loss} leaves open; allowed: {', '.join(UNDECIDED)}"
            )
        slice_size = config.data.batch_size // (chosen.critic_updates * config.train.accumulate)
        if config.critic.minibatch_std and slice_size < 2:
            raise ConfigError(
                f"--critic.minibatch_std needs 2 images, --data.batch_size={config.data.batch_size}"
                f" leaves {slice_size} an update"
            )

    # Parameters.

    def init(self, rng: jax.Array) -> tuple[dict, dict]:
        """Groups, and mutables: spectral vectors, means, probabilities, and steps for fading."""
        generator_rng, critic_rng = jax.random.split(rng)
        labels = jnp.zeros((2, len(self.label_sizes)), jnp.int32)
        z = jnp.zeros((2, self.config.generator.latent_dim))
        made = self.generator.init(generator_rng, z, labels)
        judged = self.critic.init(critic_rng, jnp.zeros((2, *self.loader.shape)), labels)
        mutables = {"steps": jnp.int32(0), **self.game.init()}
        if self.config.critic.spectral_norm:
            mutables["spectral"] = judged["spectral"]
        if self.config.generator.network == "style":
            mutables["style_mean"] = jnp.zeros(self.config.generator.style_dim)
        if self.config.augmentation.kinds:
            mutables["augmented"] = jnp.float32(self.config.augmentation.probability)
        return {"generator": made["params"], "critic": judged["params"]}, mutables

    def pretrained(self) -> dict:
        """The layers of a run on images half as large, if this one grows from one."""
        return smaller_groups(self) if self.config.gan.grow_from else {}

    def phases(self, params: Any) -> tuple[Phase, ...]:
        axes = logical_axes(params, self.partition_rules)
        return self.game.phases(self.config.optimizer, self.config.train.steps, axes)

    # The players.

    def fade(self, mutables) -> jax.Array | float:
        """Share of the newest layers, rising over the first steps of a run that grows."""
        steps = self.config.gan.fade_steps
        done = mutables["steps"] // self.config.train.accumulate  # it also counts microbatches
        return jnp.minimum(done / steps, 1.0) if steps else 1.0

    def _real(self, mutables, batch):
        x, fade = self.scaled(batch["image"]), self.fade(mutables)
        if not self.config.gan.fade_steps:
            return x
        halve = (2,) * (x.ndim - 2)
        return fade * x + (1 - fade) * upsample(downsample(x, halve), halve)

    def _styles(self, params, mutables, batch, rng):
        labels = batch.get("labels")
        z = jax.random.normal(rng, (batch["image"].shape[0], self.config.generator.latent_dim))
        styles = self.styles(params, z, labels)
        mutables = {**mutables, "steps": mutables["steps"] + 1}
        if "style_mean" in mutables:
            now = jax.lax.stop_gradient(jnp.mean(styles.astype(jnp.float32), 0))
            mean = mutables["style_mean"]
            mutables["style_mean"] = STYLE_DECAY * mean + (1 - STYLE_DECAY) * now
        return styles, mutables

    def styles(self, params, z, labels) -> jax.Array:
        """[batch, latent_dim] and labels [batch, attributes] -> styles for `synthesize`."""
        group = {"params": params["generator"]}
        return self.generator.apply(group, z, labels, method="styles")

    def _synthesize(self, params, mutables, styles, rng):
        return self.generator.apply(
            {"params": params["generator"]}, styles, self.fade(mutables),
            method="synthesize", rngs={"noise": rng},
        )  # fmt: skip

    def _judge(self, params, mutables, x, batch, rng):
        if "augmented" in mutables:
            x = augment(self.config.augmentation, x, mutables["augmented"], rng)
        variables = {"params": params["critic"]}
        if "spectral" in mutables:
            variables["spectral"] = mutables["spectral"]
        return self.critic.apply(variables, x, batch.get("labels"), self.fade(mutables))

    def _prepare(self, params, mutables):
        """One power iteration of every kernel."""
        if "spectral" not in mutables:
            return mutables
        variables = {"params": params["critic"], "spectral": mutables["spectral"]}
        x = jnp.zeros((2, *self.loader.shape))
        labels = jnp.zeros((2, len(self.label_sizes)), jnp.int32)
        _, after = self.critic.apply(variables, x, labels, mutable="spectral")
        return {**mutables, "spectral": jax.lax.stop_gradient(after["spectral"])}

    def _watch(self, mutables, verdicts):
        if "augmented" not in mutables:
            return mutables
        config = self.config.augmentation
        verdicts = jax.lax.stop_gradient(verdicts)
        undecided = UNDECIDED[self.config.gan.loss]
        augmented = steered(config, mutables["augmented"], verdicts, undecided)
        return {**mutables, "augmented": augmented}

    # Scores and draws.

    def paint(self, params, mutables, z, labels, key=None, truncation=1.0) -> jax.Array:
        """Latents -> images in [-1, 1], float32.

        Args:
          z: [batch, latent_dim].
          labels: [batch, attributes], or None.
          key: of noise inputs, which are 0 without one.
          truncation: styles are taken so far from their mean; of a generator without a mapping,
            latents are.
        """
        if "style_mean" in mutables:
            mean = mutables["style_mean"]
            styles = mean + truncation * (self.styles(params, z, labels) - mean)
        else:
            styles = self.styles(params, truncation * z, labels)
        return self.generator.apply(
            {"params": params["generator"]}, styles, self.fade(mutables), method="synthesize",
            rngs={} if key is None else {"noise": key},
        )  # fmt: skip

    @functools.cached_property
    def _verdicts(self):
        @jax.jit
        def verdicts(params, mutables, batch, key):
            z = jax.random.normal(key, (batch["image"].shape[0], self.config.generator.latent_dim))
            y = self.paint(params, mutables, z, batch.get("labels"), key)
            plain = {k: v for k, v in mutables.items() if k != "augmented"}
            judge = lambda x: self._judge(params, plain, x, batch, key)
            real, fake = judge(self.scaled(batch["image"])), judge(y)
            return jnp.stack([real, fake]), self.to_levels(y)

        return verdicts

    def evaluate(self, params, mutables, batches, seed: int | None = None) -> dict:
        """How far as many draws are from the held-out images, and what the critic says of both.

        `loss` is the energy distance of pixels in [-1, 1], between at most 1,024 of each. Verdicts
        on held-out images that are far below those of training say that the critic overfits.
        """
        key, found, images = jax.random.key(self.config.run.seed if seed is None else seed), [], []
        for i, batch in enumerate(batches):
            verdicts, made = self._verdicts(params, mutables, batch, jax.random.fold_in(key, i))
            found.append((verdicts, batch["loss_mask"]))
            if i * len(made) < MOST_COMPARED:
                images.append((made, batch["image"], batch["loss_mask"]))
        verdicts, mask = (np.concatenate(x, -1) for x in zip(*to_host(found), strict=True))
        real, fake = verdicts.astype(np.float64) @ mask / mask.sum()
        made, held_out, kept = map(np.concatenate, zip(*to_host(images), strict=True))
        unit = 2 / (self.loader.levels - 1)
        made, held_out = (x[kept > 0][:MOST_COMPARED] * unit for x in (made, held_out))
        return {
            "loss": energy_distance(held_out, made),
            "real": real,
            "fake": fake,
            "images": int(mask.sum()),
        }

    def score(self, params, mutables, batches, request) -> dict:
        """As `evaluate`, and scores of drawn images if asked for."""
        scores = self.evaluate(params, mutables, batches(request.batches), request.seed)
        if request.draws():
            images, labels = draw_images(
                self, params, mutables, jax.random.key(request.seed), request.num_samples,
                truncation=request.truncation,
            )  # fmt: skip
            scores |= score_images(self.loader, images, labels, request)
        return scores

    def sample(self, params, mutables, request):
        return draw(self, params, mutables, request)

    def flops_per_step(self) -> dict:
        """Of both networks; all updates of the critic together see the batch once."""
        config, shape = self.config, (self.config.data.batch_size, *self.loader.shape)
        params, mutables = jax.eval_shape(self.init, jax.random.key(0))
        x = jax.ShapeDtypeStruct(shape, jnp.float32)
        z = jax.ShapeDtypeStruct((shape[0], config.generator.latent_dim), jnp.float32)
        labels = jax.ShapeDtypeStruct((shape[0], len(self.loader.label_sizes)), jnp.int32)
        paint = count_flops(self.paint, params, mutables, z, labels)
        plain = {k: v for k, v in mutables.items() if k != "augmented"}
        judge = count_flops(
            lambda p, m, x, labels: self._judge(p, m, x, {"labels": labels}, None),
            params, plain, x, labels,
        )  # fmt: skip
        return {
            "flops_per_step": paint + 6 * judge + 3 * (paint + judge),
            "convention": "matmuls and convolutions: for the critic 3 x forward on data and fakes, "
            "and a forward pass of the generator; for that 3 x forward through both; no penalties",
        }
