"""Diffusion and flow matching on images, signals and video, in data space or in latents."""

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from genai_jax.config import Config, ConfigError, field
from genai_jax.data.images.loader import ImageDataConfig
from genai_jax.diffusion import bound, objective, times, weighting
from genai_jax.diffusion import schedule as schedules
from genai_jax.diffusion.parameterization import PARAMETERIZATIONS, convert, input_scale
from genai_jax.networks.flops import count_flops
from genai_jax.networks.image import dit, unet
from genai_jax.networks.image.conditioning import Condition
from genai_jax.networks.image.dit import Dit, DitConfig
from genai_jax.networks.image.unet import Unet, UnetConfig
from genai_jax.networks.parallel.axes import SEQUENCE, ParallelConfig
from genai_jax.tasks.arrays.data import ImageTask
from genai_jax.tasks.autoencoder.latents import Latents
from genai_jax.tasks.diffusion.sampling import DiffusionRequest, SamplerConfig, draw
from genai_jax.tasks.diffusion.scores import ScoreRequest, score
from genai_jax.training.optimizer import make_optimizer
from genai_jax.training.phase import Phase
from genai_jax.training.sharding import logical_axes

NETWORKS = {
    "unet": (Unet, UnetConfig, unet.PARTITION_RULES),
    "dit": (Dit, DitConfig, dit.PARTITION_RULES),
}
OBJECTIVES = ("denoising", "bound", "flow_matching")
BOUNDED = ("cosine", "sigmoid", "learned")
CONDITIONS = ("none", "class", "text")


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
    network: str = field("unet", "what predicts", choices=tuple(NETWORKS))
    objective: str = field("denoising", "what is minimised", choices=OBJECTIVES)
    schedule: str = field(
        "cosine", "how noise grows with time", choices=(*schedules.SCHEDULES, "learned")
    )
    zero_terminal_snr: bool = field(False, "rescale the schedule so that nothing is left at t = 1")
    num_times: int = field(0, "times of a discrete schedule; 0: continuous time", minimum=0)
    gamma_min: float = field(-13.3, "minus log-SNR at t = 0, of the learned schedule")
    gamma_max: float = field(5.0, "minus log-SNR at t = 1, of the learned schedule")
    parameterization: str = field("v", "what the network puts out", choices=PARAMETERIZATIONS)
    sigma_data: float = field(0.5, "standard deviation of the data, for edm", minimum=0)
    weighting: str = field(
        "output", "of the denoising error at each noise level", choices=tuple(weighting.WEIGHTINGS)
    )
    time_distribution: str = field(
        "uniform", "of the training times", choices=tuple(times.TIME_DISTRIBUTIONS)
    )
    time_mean: float = field(0.0, "mean of the logit of t, or of the log of sigma")
    time_std: float = field(1.0, "standard deviation of the same", minimum=0)
    low_discrepancy: bool = field(True, "spread the times of a batch evenly")
    noise_input: str = field(
        "time", "what the network is told of the noise", choices=("time", "log_snr")
    )
    condition: str = field("none", "what the network is told of the image", choices=CONDITIONS)
    condition_dropout: float = field(
        0.1, "share of the examples trained without condition, for guidance", minimum=0, maximum=1
    )
    autoencoder: str = field("", "workdir of an autoencoder whose latents are modelled")


class Diffusion(ImageTask):
    """The task behind ``--task=diffusion``; see `genai_jax.training.phase.Task`."""

    components: ClassVar = {
        "data": ImageDataConfig,
        "diffusion": DiffusionConfig,
        "unet": UnetConfig,
        "dit": DitConfig,
        "parallel": ParallelConfig,
        "sampler": SamplerConfig,
    }
    loss_unit = "squared error"
    sample_request = DiffusionRequest
    evaluate_request = ScoreRequest
    uses_step_size = False

    def __init__(self, config: Config):
        super().__init__(config)
        self._check()
        chosen = config.diffusion
        self.latents = Latents(chosen.autoencoder, self.loader) if chosen.autoencoder else None
        self.sample_shape = self.latents.shape if self.latents else self.loader.shape
        network, _, rules = NETWORKS[chosen.network]
        # Groups that are never trained, and the few numbers of a schedule, are on every device.
        self.partition_rules = (
            *((f"^(model|teacher)/.*{pattern}$", axes) for pattern, axes in rules),
            ("^(schedule|autoencoder|latents)/", (...,)),
        )
        self.network_shape = getattr(config, chosen.network)
        self.model = network(
            self.network_shape,
            self.sample_shape[-1],
            label_sizes=self.loader.label_sizes if chosen.condition == "class" else (),
            vocab_size=self.loader.vocab_size if chosen.condition == "text" else 0,
            uses_step_size=self.uses_step_size,
            backend=config.run.attention,
            dtype=self.dtype,
            **({"parallel": config.parallel} if chosen.network == "dit" else {}),
        )
        self.activation_axes = (SEQUENCE,) if chosen.network == "dit" else ()
        try:
            jax.eval_shape(self._init_model, jax.random.key(0))
        except ValueError as error:  # sizes that the network cannot take
            raise ConfigError(f"--data.dataset={config.data.dataset}: {error}") from None

    def _check(self):
        config = self.config.diffusion
        data = self.config.data
        for name, (_, cls, _) in NETWORKS.items():
            if name != config.network and getattr(self.config, name) != cls():
                raise ConfigError(f"--{name}.* is set, but --diffusion.network={config.network}")
        if config.condition == "class" and not self.loader.label_sizes:
            raise ConfigError(f"--diffusion.condition=class: {data.dataset} has no labels")
        if (config.condition == "text") != data.captions:
            raise ConfigError(
                f"--diffusion.condition={config.condition} does not go with "
                f"--data.captions={str(data.captions).lower()}: captions are for text"
            )
        if config.objective == "flow_matching" and (
            (config.schedule, config.parameterization) != ("flow", "velocity")
        ):
            raise ConfigError(
                "--diffusion.objective=flow_matching is for --diffusion.schedule=flow and "
                f"--diffusion.parameterization=velocity, not {config.schedule} and "
                f"{config.parameterization}"
            )
        if config.schedule == "learned" and config.objective != "bound":
            raise ConfigError(
                "--diffusion.schedule=learned needs --diffusion.objective=bound: other losses do "
                "not say which schedule is better"
            )
        if config.zero_terminal_snr and config.schedule not in ("vp_linear", "cosine", "sigmoid"):
            raise ConfigError(
                f"--diffusion.zero_terminal_snr does not apply to --diffusion.schedule="
                f"{config.schedule}, but to vp_linear, cosine, sigmoid"
            )
        if config.objective == "bound" and (
            config.zero_terminal_snr or config.schedule not in BOUNDED
        ):
            raise ConfigError(
                "--diffusion.objective=bound needs a schedule that preserves the variance and has "
                f"a finite log-SNR at both ends: one of {', '.join(BOUNDED)}, not rescaled"
            )
        if config.objective == "bound" and config.autoencoder:
            raise ConfigError("--diffusion.objective=bound is of pixels, not of latents")

    # Parameters.

    def init(self, rng: jax.Array) -> tuple[dict, dict]:
        model_rng, schedule_rng, latent_rng = jax.random.split(rng, 3)
        params = {"model": self._init_model(model_rng)}
        if self.config.diffusion.schedule == "learned":
            params["schedule"] = schedules.init_monotone_gamma(schedule_rng)
        if self.latents:
            params |= self.latents.init(latent_rng)
        return params, {}

    def _init_model(self, rng: jax.Array):
        x = jnp.zeros((1, *self.sample_shape))
        noise = jnp.zeros(1)
        step_size = jnp.zeros(1) if self.uses_step_size else None
        return self.model.init(rng, x, noise, self.null_condition(1), step_size)["params"]

    def pretrained(self) -> dict:
        return self.latents.pretrained() if self.latents else {}

    def phases(self, params: Any) -> tuple[Phase, ...]:
        trains = tuple(g for g in ("model", "schedule") if g in params)
        axes = logical_axes({g: params[g] for g in trains}, self.partition_rules)
        optimizer = make_optimizer(self.config.optimizer, self.config.train.steps, axes)
        return (Phase("denoise", trains, self._loss, optimizer),)

    # What the network is given and what is made of its output.

    def schedule(self, params: dict) -> schedules.Schedule:
        """The noise schedule; a learned one is made of its parameters."""
        config = self.config.diffusion
        if config.schedule == "learned":
            made = schedules.learned(
                lambda t: schedules.monotone_gamma(
                    params["schedule"], t, config.gamma_min, config.gamma_max
                )
            )
        else:
            made = schedules.SCHEDULES[config.schedule]()
        if config.zero_terminal_snr:
            made = schedules.zero_terminal_snr(made)
        return schedules.discrete(made, config.num_times) if config.num_times else made

    def noise_input(self, schedule, t: jax.Array) -> jax.Array:
        """The number that tells the network how noisy its input is, of the order of 1000."""
        if self.config.diffusion.noise_input == "time":
            return 1000 * t
        return 25 * jnp.clip(schedule.log_snr(t), -20, 20)

    def predictor(
        self, params: dict, condition: Condition, rngs: dict | None = None, group="model"
    ):
        """(x_t, t) -> output of the network, in its own parameterization."""
        config = self.config.diffusion
        schedule = self.schedule(params)

        def predict(x, t, step_size=None):
            scale = input_scale(config.parameterization, schedule, t, config.sigma_data)
            scale = scale.reshape(-1, *(1,) * (x.ndim - 1))
            noise = self.noise_input(schedule, t)
            return self.model.apply(
                {"params": params[group]}, scale * x, noise, condition, step_size, rngs=rngs
            )

        return predict

    def denoiser(self, params: dict, condition: Condition, group="model", rngs=None):
        """(x_t, t) -> the expected x0."""
        config = self.config.diffusion
        schedule = self.schedule(params)
        predict = self.predictor(params, condition, rngs, group)

        def denoise(x, t, step_size=None):
            output = predict(x, t, step_size)
            return convert(
                output, config.parameterization, "x0", x, schedule, t, sigma_data=config.sigma_data
            )

        return denoise

    def condition(self, labels=None, tokens=None, token_mask=None) -> Condition:
        """What of these the network is told."""
        chosen = self.config.diffusion.condition
        if chosen == "class":
            return Condition(labels=labels)
        return Condition(tokens=tokens, token_mask=token_mask) if chosen == "text" else Condition()

    def null_condition(self, count: int) -> Condition:
        """That of an image about which nothing is said."""
        sizes = jnp.array(self.loader.label_sizes, jnp.int32)
        length = self.config.data.caption_length
        return self.condition(
            jnp.broadcast_to(sizes, (count, len(sizes))),
            jnp.zeros((count, length), jnp.int32),
            jnp.zeros((count, length), jnp.bool_),
        )

    def dropped(self, condition: Condition, rng: jax.Array) -> Condition:
        """Nothing is said about a random share of the images."""
        rate = self.config.diffusion.condition_dropout
        present = [x for x in condition if x is not None]
        if not present or not rate:
            return condition
        drop = jax.random.bernoulli(rng, rate, present[0].shape[:1])[:, None]
        null = self.null_condition(present[0].shape[0])
        return jax.tree.map(lambda x, n: jnp.where(drop, n, x), condition, null)

    def data(self, params: dict, batch: dict) -> jax.Array:
        """What is modelled: images in [-1, 1], or latents of unit variance."""
        x = self.scaled(batch["image"])
        return self.latents.encode(params, x) if self.latents else x

    # Losses.

    def _loss(self, params, mutables, batch, rng):
        drop, noise, dropout = jax.random.split(rng, 3)
        condition = self.condition_of(batch)
        losses, metrics = self.losses(
            params, batch, noise, self.dropped(condition, drop), {"dropout": dropout}
        )
        return jnp.mean(losses), (metrics, mutables)

    def condition_of(self, batch: dict) -> Condition:
        return self.condition(*(batch.get(n) for n in ("labels", "tokens", "token_mask")))

    def losses(self, params, batch, rng, condition, rngs=None) -> tuple[jax.Array, dict]:
        """Loss of each image [batch], and means to be logged."""
        config = self.config.diffusion
        schedule = self.schedule(params)
        x0 = self.data(params, batch)
        predict = self.predictor(params, condition, rngs)
        if config.objective == "bound":
            terms = bound.variational_bound(
                predict, schedule, x0, rng, parameterization=config.parameterization,
                levels=self.loader.levels,
                sigma_data=config.sigma_data,
            )  # fmt: skip
            bits = {n: bound.bits_per_dim(v, x0[0].size) for n, v in terms._asdict().items()}
            total = sum(bits.values())
            return total, {f"{n}_bits_per_dim": jnp.mean(v) for n, v in bits.items()}
        rng, time_rng = jax.random.split(rng)
        t = self._times(time_rng, x0.shape[0], schedule)
        if config.objective == "flow_matching":
            return objective.flow_matching_loss(predict, schedule, x0, t, rng), {}
        return objective.denoising_loss(
            predict, schedule, x0, t, rng, parameterization=config.parameterization,
            weighting=config.weighting, sigma_data=config.sigma_data,
        ), {}  # fmt: skip

    def _times(self, rng, count, schedule):
        config = self.config.diffusion
        return times.sample_times(
            config.time_distribution, rng, count, schedule, mean=config.time_mean,
            std=config.time_std, low_discrepancy=config.low_discrepancy,
        )  # fmt: skip

    def check_sampler(self, sampler: SamplerConfig):
        """Raises `ConfigError` if this model cannot be drawn from so."""

    def sampling_denoiser(self, params: dict, condition: Condition, steps: int):
        """The denoiser for a solver of so many steps."""
        del steps
        return self.denoiser(params, condition)

    # Scores and draws.

    @functools.cached_property
    def _evaluation_step(self):
        @jax.jit
        def evaluation_step(params, batch, rng):
            losses, _ = self.losses(params, batch, rng, self.condition_of(batch))
            mask = batch["loss_mask"]
            return jnp.sum(losses * mask), jnp.sum(mask)

        return evaluation_step

    def evaluate(self, params, mutables, batches, seed: int | None = None) -> dict:
        """The mean loss of the held-out images, with the same noise at every evaluation."""
        del mutables, seed
        key = jax.random.key(0)
        sums = [
            self._evaluation_step(params, batch, jax.random.fold_in(key, i))
            for i, batch in enumerate(batches)
        ]
        total, count = np.sum(np.array(jax.device_get(sums), np.float64), 0)
        loss = total / count
        scores = {"loss": loss, "images": int(count)}
        if self.config.diffusion.objective == "bound":
            scores["bits_per_dim"] = loss
        return scores

    def score(self, params, mutables, batches, request) -> dict:
        loss = self.evaluate(params, mutables, batches(request.batches))
        return loss | score(self, params, batches, request)

    def sample(self, params, mutables, request):
        del mutables
        return draw(self, params, request)

    def flops_per_step(self) -> dict:
        """Three times the forward pass of the network: its gradients cost twice as much."""
        rows = self.config.data.batch_size
        x = jax.ShapeDtypeStruct((rows, *self.sample_shape), jnp.float32)
        network = self.model.clone(backend="xla", dtype=jnp.float32)
        condition = jax.eval_shape(lambda: self.null_condition(rows))
        noise = jax.ShapeDtypeStruct((rows,), jnp.float32)
        step_size = noise if self.uses_step_size else None
        params = jax.eval_shape(self._init_model, jax.random.key(0))
        forward = lambda *args: network.apply({"params": args[0]}, *args[1:])
        flops = count_flops(forward, params, x, noise, condition, step_size)
        return {
            "flops_per_step": 3 * flops,
            "convention": "3 x forward matmuls and convolutions of the trained network",
        }
