"""The denoising model of a run: network, noise schedule, condition, and optional latents."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from genai_jax.config import Config, ConfigError, field, refuse_set
from genai_jax.diffusion import schedule as schedules
from genai_jax.diffusion import times, weighting
from genai_jax.diffusion.parameterization import (
    PARAMETERIZATIONS,
    conversion,
    convert,
    input_scale,
)
from genai_jax.networks.flops import count_flops
from genai_jax.networks.image.conditioning import Condition
from genai_jax.networks.parallel.axes import SEQUENCE
from genai_jax.outside import check_call, load_outside, outside_name
from genai_jax.tasks.arrays.data import ArrayData
from genai_jax.tasks.autoencoder.latents import Latents
from genai_jax.tasks.diffusion.network import NETWORKS, check_network, denoising_network
from genai_jax.tasks.outside_network import with_fields
from genai_jax.tasks.protocol import Batch, Params, Transfer

OBJECTIVES = ("denoising", "bound", "flow_matching")
BOUNDED = ("cosine", "sigmoid", "learned")
CONDITIONS = ("none", "class", "text")


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
    network: str = field(
        "unet", "Denoising network.", choices=tuple(NETWORKS), outside=outside_name
    )
    objective: str = field(
        "denoising", "Training objective.", choices=OBJECTIVES, outside=outside_name
    )
    schedule: str = field("cosine", "Noise schedule.", choices=(*schedules.SCHEDULES, "learned"))
    zero_terminal_snr: bool = field(
        False, "Rescale the schedule to zero terminal SNR (no signal at t = 1)."
    )
    num_times: int = field(
        0, "Number of times of a discrete schedule; 0: continuous time.", minimum=0
    )
    gamma_min: float = field(-13.3, "Minus log-SNR at t = 0 of the learned schedule.")
    gamma_max: float = field(5.0, "Minus log-SNR at t = 1 of the learned schedule.")
    parameterization: str = field("v", "What the network outputs.", choices=PARAMETERIZATIONS)
    sigma_data: float = field(0.5, "Standard deviation of the data, used by edm.", minimum=0)
    weighting: str = field(
        "output", "Weight of the denoising error at each noise level.",
        choices=tuple(weighting.WEIGHTINGS),
    )  # fmt: skip
    time_distribution: str = field(
        "uniform", "Distribution of the training times.", choices=tuple(times.TIME_DISTRIBUTIONS)
    )
    time_mean: float = field(0.0, "Mean of the logit of t, or of the log of sigma.")
    time_std: float = field(
        1.0, "Standard deviation of the logit of t, or of the log of sigma.", minimum=0
    )
    low_discrepancy: bool = field(True, "Spread the training times of a batch evenly.")
    noise_input: str = field(
        "time",
        "Representation of the noise level in the input of the network.",
        choices=("time", "log_snr"),
    )
    condition: str = field("none", "What the model is conditioned on.", choices=CONDITIONS)
    condition_dropout: float = field(
        0.1,
        "Fraction of the examples trained without the condition, for guidance.",
        minimum=0,
        maximum=1,
    )
    autoencoder: str = field(
        "",
        "Workdir of an autoencoder whose latents to model; the images themselves if empty.",
        run=True,
    )

    def __post_init__(self):
        if self.gamma_min >= self.gamma_max:
            raise ValueError(f"gamma_min={self.gamma_min} is not below gamma_max={self.gamma_max}")


class DenoisingModel:
    """Everything about a diffusion model except its loss and its solver.

    Args:
      config: of the run.
      data: of the run.
      uses_step_size: whether the network takes the step size of a solver as input.

    Attributes:
      config: the component `diffusion`.
      data: of the run.
      network: Flax module.
      latents: None if images themselves are modeled.
      sample_shape: shape of what is modeled, (*space, channels).
      partition_rules, activation_axes: see `Task`.

    Raises:
      ConfigError: flags that contradict each other or do not fit the data.
    """

    def __init__(self, config: Config, data: ArrayData, *, uses_step_size: bool = False):
        chosen = self.config = config.diffusion
        self.data, self.uses_step_size = data, uses_step_size
        self._caption_length = config.data.caption_length
        check_flags(config)
        # Outside of the step, which may not move constants to the devices.
        self._schedule = None if chosen.schedule == "learned" else fixed_schedule(chosen)
        if (chosen.condition == "text") != config.data.captions:
            raise ConfigError(
                f"--diffusion.condition={chosen.condition} does not fit --data.captions="
                f"{str(config.data.captions).lower()}: text, and only text, needs captions"
            )
        self.latents = (
            Latents(config.place_of("diffusion.autoencoder"), data) if chosen.autoencoder else None
        )
        self.sample_shape = self.latents.shape if self.latents else data.shape
        self.network, rules = denoising_network(
            config, data, self.sample_shape, uses_step_size=uses_step_size
        )
        # Groups that are never trained, and the small schedule, are replicated.
        self.partition_rules = (
            *((f"^(model|teacher)/.*{pattern}$", axes) for pattern, axes in rules),
            ("^(schedule|autoencoder|latents)/", (...,)),
        )
        self.activation_axes = (SEQUENCE,) if chosen.network == "dit" else ()
        check_network(self.network, config, self._inputs(2))

    # Parameters.

    def init(self, key: jax.Array) -> Params:
        """The groups "model", "schedule" (if it is learned), and those of the latents."""
        model_key, schedule_key, latent_key = jax.random.split(key, 3)
        params = {"model": self._init_network(model_key)}
        if self.config.schedule == "learned":
            params["schedule"] = schedules.init_monotone_gamma(schedule_key)
        if self.latents:
            params |= self.latents.init(latent_key)
        return params

    def _init_network(self, key: jax.Array):
        return self.network.init(key, *self._one_input())["params"]

    def _one_input(self) -> tuple:
        return self._inputs(1)

    def _inputs(self, rows: int) -> tuple:
        x, noise = jnp.zeros((rows, *self.sample_shape)), jnp.zeros(rows)
        step_size = jnp.zeros(rows) if self.uses_step_size else None
        return x, noise, self.null_condition(rows), step_size

    def init_from(self) -> tuple[Transfer, ...]:
        return self.latents.init_from() if self.latents else ()

    def prepare(self, params: Params) -> Params:
        return self.latents.prepare(params) if self.latents else {}

    # Inputs and outputs of the network.

    def schedule(self, params: Params) -> schedules.Schedule:
        """The noise schedule, with its parameters if it is learned."""
        config = self.config
        schedule = self._schedule or schedules.learned(
            lambda t: schedules.monotone_gamma(
                params["schedule"], t, config.gamma_min, config.gamma_max
            )
        )
        return schedules.discrete(schedule, config.num_times) if config.num_times else schedule

    def noise_input(self, schedule, t: jax.Array) -> jax.Array:
        """The noise level as an input of the network, on the order of 1000."""
        if self.config.noise_input == "time":
            return 1000 * t
        return 25 * jnp.clip(schedule.log_snr(t), -20, 20)

    def predictor(
        self, params: Params, condition: Condition, rngs: dict | None = None, group: str = "model"
    ):
        """(x_t, t) -> output of the network, in its own parameterization."""
        config, schedule = self.config, self.schedule(params)

        def predict(x, t, step_size=None):
            scale = input_scale(config.parameterization, schedule, t, config.sigma_data)
            scale = scale.reshape(-1, *(1,) * (x.ndim - 1))
            noise = self.noise_input(schedule, t)
            return self.network.apply(
                {"params": params[group]}, scale * x, noise, condition, step_size, rngs=rngs
            )

        return predict

    def denoiser(
        self, params: Params, condition: Condition, group: str = "model", rngs: dict | None = None
    ):
        """(x_t, t) -> the expected x0."""
        config, schedule = self.config, self.schedule(params)
        predict = self.predictor(params, condition, rngs, group)

        def denoise(x, t, step_size=None):
            output = predict(x, t, step_size)
            return convert(
                output, config.parameterization, "x0", x, schedule, t, sigma_data=config.sigma_data
            )

        return denoise

    # Conditions.

    def condition(self, labels=None, tokens=None, token_mask=None) -> Condition:
        """The condition, from the parts that this model is conditioned on."""
        kind = self.config.condition
        if kind == "class":
            return Condition(labels=labels)
        return Condition(tokens=tokens, token_mask=token_mask) if kind == "text" else Condition()

    def condition_of(self, batch: Batch) -> Condition:
        return self.condition(*(batch.get(n) for n in ("labels", "tokens", "token_mask")))

    def null_condition(self, count: int) -> Condition:
        """The null condition of `count` images, for unconditional prediction."""
        sizes = jnp.array(self.data.label_sizes, jnp.int32)
        return self.condition(
            jnp.broadcast_to(sizes, (count, len(sizes))),
            jnp.zeros((count, self._caption_length), jnp.int32),
            jnp.zeros((count, self._caption_length), jnp.bool_),
        )

    def dropped(self, condition: Condition, key: jax.Array) -> Condition:
        """The condition, replaced by the null condition for a random fraction of the images."""
        rate = self.config.condition_dropout
        present = [x for x in condition if x is not None]
        if not present or not rate:
            return condition
        drop = jax.random.bernoulli(key, rate, present[0].shape[:1])[:, None]
        null = self.null_condition(present[0].shape[0])
        return jax.tree.map(lambda x, n: jnp.where(drop, n, x), condition, null)

    # Data.

    def examples(self, params: Params, batch: Batch) -> jax.Array:
        """Images in [-1, 1], or latents of unit variance, [batch, *sample_shape]."""
        return self.encode(params, self.data.scaled(batch["image"]))

    def encode(self, params: Params, x: jax.Array) -> jax.Array:
        """Images in [-1, 1] -> images or latents, as modeled."""
        return self.latents.encode(params, x) if self.latents else x

    def pixels(self, params: Params, x: jax.Array) -> jax.Array:
        """Images or latents, as modeled -> images, uint8 levels."""
        return self.data.to_levels(self.latents.decode(params, x) if self.latents else x)

    def times(self, key: jax.Array, count: int, schedule: Any) -> jax.Array:
        """Training times, [count]."""
        config = self.config
        return times.sample_times(
            config.time_distribution, key, count, schedule, mean=config.time_mean,
            std=config.time_std, low_discrepancy=config.low_discrepancy,
        )  # fmt: skip

    def flops_per_step(self, rows: int) -> dict:
        """Three times the forward pass of the network: the backward pass costs twice as much."""
        x = jax.ShapeDtypeStruct((rows, *self.sample_shape), jnp.float32)
        network = with_fields(self.network, backend="xla", dtype=jnp.float32)
        condition = jax.eval_shape(lambda: self.null_condition(rows))
        noise = jax.ShapeDtypeStruct((rows,), jnp.float32)
        step_size = noise if self.uses_step_size else None
        params = jax.eval_shape(self._init_network, jax.random.key(0))
        forward = lambda *args: network.apply({"params": args[0]}, *args[1:])
        flops = count_flops(forward, params, x, noise, condition, step_size)
        return {
            "flops_per_step": 3 * flops,
            "convention": "3 x forward matmuls and convolutions of the trained network",
        }


def fixed_schedule(chosen: DiffusionConfig) -> schedules.Schedule:
    """A schedule without parameters.

    Raises:
      ConfigError: it ends in noise alone, from which the parameterization cannot tell the data.
    """
    schedule = schedules.SCHEDULES[chosen.schedule]()
    if chosen.zero_terminal_snr:
        schedule = schedules.zero_terminal_snr(schedule)

    def starts(parameterization: str) -> bool:
        weights = conversion(
            parameterization, "x0", schedule, jnp.float32(1), sigma_data=chosen.sigma_data
        )
        return all(np.isfinite(weights))

    if not starts(chosen.parameterization):
        raise ConfigError(
            f"--diffusion.parameterization={chosen.parameterization} does not determine the data "
            f"where a schedule ends in noise alone, as --diffusion.schedule={chosen.schedule} does"
            f"{' with --diffusion.zero_terminal_snr' if chosen.zero_terminal_snr else ''}: use "
            f"{', '.join(filter(starts, PARAMETERIZATIONS))}"
        )
    return schedule


def check_flags(config: Config):
    """Raises `ConfigError` for flags of a diffusion model that contradict each other."""
    chosen = config.diffusion
    for name, (_, cls, _) in NETWORKS.items():
        if name != chosen.network and getattr(config, name) != cls():
            raise ConfigError(f"--{name}.* is set, but --diffusion.network={chosen.network}")
    if chosen.objective == "flow_matching" and (
        (chosen.schedule, chosen.parameterization) != ("flow", "velocity")
    ):
        raise ConfigError(
            "--diffusion.objective=flow_matching is for --diffusion.schedule=flow and "
            f"--diffusion.parameterization=velocity, not {chosen.schedule} and "
            f"{chosen.parameterization}"
        )
    if chosen.objective not in OBJECTIVES:
        why = f"has no effect with --diffusion.objective={chosen.objective}"
        refuse_set("diffusion", chosen, ["weighting"], why)
        flag = "--diffusion.objective"
        objective = load_outside(flag, chosen.objective, ["__call__"])
        check_call(flag, chosen.objective, objective, 5, "predict, schedule, x0, t, key")
    if chosen.schedule == "learned" and chosen.objective != "bound":
        raise ConfigError(
            "--diffusion.schedule=learned needs --diffusion.objective=bound: no other loss "
            "measures how good a schedule is"
        )
    if chosen.zero_terminal_snr and chosen.schedule not in ("vp_linear", "cosine", "sigmoid"):
        raise ConfigError(
            f"--diffusion.zero_terminal_snr does not apply to --diffusion.schedule="
            f"{chosen.schedule}, only to vp_linear, cosine, and sigmoid"
        )
    if chosen.objective == "bound" and (chosen.zero_terminal_snr or chosen.schedule not in BOUNDED):
        raise ConfigError(
            "--diffusion.objective=bound needs a variance-preserving schedule with finite log-SNR "
            f"at both ends: one of {', '.join(BOUNDED)}, without --diffusion.zero_terminal_snr"
        )
    if chosen.objective == "bound" and chosen.autoencoder:
        raise ConfigError(
            "--diffusion.objective=bound is for pixels and does not support --diffusion.autoencoder"
        )
