"""Noise schedules: how much signal and how much noise there is at each time.

x_t = alpha(t) x_0 + sigma(t) epsilon with t in [0, 1]: data at 0, noise at 1. A schedule consists
of pure functions of t, a scalar or an array of any shape and float dtype; derivatives come from
`jax.jvp`.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Function = Callable[[jax.Array], jax.Array]

FAR = 1e-4  # distance of a time from an end at which the log-SNR is infinite
BISECTIONS = 60  # halvings of [0, 1] for a schedule without a closed-form inverse


class Schedule(NamedTuple):
    """Signal and noise as functions of time.

    Attributes:
      alpha: t -> signal, decreasing or constant.
      sigma: t -> standard deviation of the noise.
      log_snr: t -> log(alpha^2 / sigma^2), strictly decreasing; infinite where alpha or sigma is 0.
      time: log-SNR -> t, the inverse of `log_snr`, clipped to [0, 1].
      num_times: number of times of a discrete schedule; 0 in continuous time.
    """

    alpha: Function
    sigma: Function
    log_snr: Function
    time: Function
    num_times: int = 0


def derivative(function: Function, t: jax.Array) -> jax.Array:
    """d function / dt at every element of t."""
    return jax.jvp(function, (t,), (jnp.ones_like(t),))[1]


def drift(schedule: Schedule, t: jax.Array) -> jax.Array:
    """f in the forward process dx = f x dt + g dW: d log alpha / dt (Song et al. 2021)."""
    return derivative(schedule.alpha, t) / schedule.alpha(t)


def diffusion_squared(schedule: Schedule, t: jax.Array) -> jax.Array:
    """g^2 in the forward process: -sigma^2 d log-SNR / dt (Kingma et al. 2021, appendix)."""
    return -jnp.square(schedule.sigma(t)) * derivative(schedule.log_snr, t)


def variance_preserving(log_snr: Function, time: Function | None = None) -> Schedule:
    """The schedule with alpha^2 + sigma^2 = 1 and the given log-SNR."""
    return Schedule(
        lambda t: jnp.sqrt(jax.nn.sigmoid(log_snr(t))),
        lambda t: jnp.sqrt(jax.nn.sigmoid(-log_snr(t))),
        log_snr,
        time or inverse(log_snr),
    )


def inverse(log_snr: Function) -> Function:
    """The inverse of a decreasing function on [0, 1], by bisection."""

    def time(value):
        value = jnp.asarray(value)
        low, high = jnp.zeros_like(value), jnp.ones_like(value)

        def halve(_, bounds):
            low, high = bounds
            middle = (low + high) / 2
            above = log_snr(middle) > value
            return jnp.where(above, middle, low), jnp.where(above, high, middle)

        low, high = jax.lax.fori_loop(0, BISECTIONS, halve, (low, high))
        return (low + high) / 2

    return time


def vp_linear(beta_min: float = 0.1, beta_max: float = 20.0) -> Schedule:
    """A noise rate linear in time: log alpha = -(beta_max - beta_min) t^2 / 4 - beta_min t / 2.

    Song et al. 2021, equation 33, the continuous limit of Ho et al. 2020: with 1000 discrete times,
    alpha^2 differs from theirs by up to 8e-4. At t = 0 there is no noise.
    """
    slope = beta_max - beta_min

    def log_alpha(t):
        return -t * (slope * t / 4 + beta_min / 2)

    def log_snr(t):
        return 2 * log_alpha(t) - jnp.log(-jnp.expm1(2 * log_alpha(t)))

    def time(value):
        # log alpha = -log(1 + exp(-log SNR)) / 2, a quadratic equation for t.
        target = jax.nn.softplus(-value)
        root = jnp.sqrt(beta_min**2 + 2 * slope * target)
        return jnp.clip(2 * target / (root + beta_min), 0, 1)

    return Schedule(
        lambda t: jnp.exp(log_alpha(t)),
        lambda t: jnp.sqrt(-jnp.expm1(2 * log_alpha(t))),
        log_snr,
        time,
    )


def cosine(shift: float = 0.0, log_snr_max: float = 20.0) -> Schedule:
    """log-SNR = -2 log tan(pi t / 2) + shift, truncated to +-log_snr_max before the shift.

    Nichol and Dhariwal 2021 in continuous time, with the shift of Hoogeboom et al. 2023 for high
    resolutions (2 log(64 / resolution)) and the truncation of Kingma and Gao 2023 in place of the
    original's offset s = 0.008, without which alpha^2 differs by up to 7e-3.
    """
    t_min = math.atan(math.exp(-log_snr_max / 2))
    t_max = math.atan(math.exp(log_snr_max / 2))

    def log_snr(t):
        return -2 * jnp.log(jnp.tan(t_min + t * (t_max - t_min))) + shift

    def time(value):
        angle = jnp.arctan(jnp.exp((shift - value) / 2))
        return jnp.clip((angle - t_min) / (t_max - t_min), 0, 1)

    return variance_preserving(log_snr, time)


def sigmoid(start: float = -3.0, end: float = 3.0, clip: float = 1e-9) -> Schedule:
    """alpha^2 falls as a sigmoid of time between `start` and `end` (Jabri et al. 2023)."""
    top, bottom = (1 / (1 + math.exp(-x)) for x in (end, start))

    # Each part by itself: in float32, 1 - (1 - 1e-9) is 0, and the log-SNR at an end infinite.
    def part(distance):
        return clip + (1 - 2 * clip) * jnp.maximum(distance / (top - bottom), 0)

    def signal(t):
        return part(top - jax.nn.sigmoid(start + t * (end - start)))

    def noise(t):
        return part(jax.nn.sigmoid(start + t * (end - start)) - bottom)

    def time(value):
        unclipped = (jax.nn.sigmoid(value) - clip) / (1 - 2 * clip)
        level = jnp.clip(top - unclipped * (top - bottom), bottom, top)
        return jnp.clip((jnp.log(level) - jnp.log1p(-level) - start) / (end - start), 0, 1)

    return Schedule(
        lambda t: jnp.sqrt(signal(t)),
        lambda t: jnp.sqrt(noise(t)),
        lambda t: jnp.log(signal(t)) - jnp.log(noise(t)),
        time,
    )


def ve(sigma_min: float = 0.01, sigma_max: float = 50.0) -> Schedule:
    """Constant signal and geometrically growing noise (Song et al. 2021, equation 31)."""
    low, ratio = math.log(sigma_min), math.log(sigma_max / sigma_min)
    return Schedule(
        jnp.ones_like,
        lambda t: jnp.exp(low + ratio * t),
        lambda t: -2 * (low + ratio * t),
        lambda value: jnp.clip((-value / 2 - low) / ratio, 0, 1),
    )


def edm(sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Schedule:
    """Constant signal; the rho-th root of sigma is linear in time (Karras et al. 2022, eq. 5)."""
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)

    def log_sigma(t):
        return rho * jnp.log(low + t * (high - low))

    return Schedule(
        jnp.ones_like,
        lambda t: jnp.exp(log_sigma(t)),
        lambda t: -2 * log_sigma(t),
        lambda value: jnp.clip((jnp.exp(-value / 2 / rho) - low) / (high - low), 0, 1),
    )


def linear_flow() -> Schedule:
    """The straight path x_t = (1 - t) x_0 + t epsilon (Lipman et al. 2023, Liu et al. 2023)."""
    return Schedule(
        lambda t: 1 - t,
        lambda t: t * jnp.ones_like(t),
        lambda t: 2 * (jnp.log1p(-t) - jnp.log(t)),
        lambda value: jax.nn.sigmoid(-value / 2),
    )


def zero_terminal_snr(schedule: Schedule) -> Schedule:
    """Shifts and scales alpha so that alpha(1) = 0, keeping alpha(0) (Lin et al. 2024, alg. 1).

    Raises:
      ValueError: the schedule is not variance-preserving, so it cannot be rescaled like this.
    """
    with jax.ensure_compile_time_eval():
        first, last, noise, variance = (
            float(f(jnp.float32(t)))
            for f, t in (
                (schedule.alpha, 0),
                (schedule.alpha, 1),
                (schedule.sigma, 0),
                (lambda t: schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2, 1),
            )
        )
    if abs(variance - 1) > 1e-3:
        raise ValueError(
            f"zero terminal SNR is for schedules that preserve the variance 1; this one ends at "
            f"{variance:.4g}"
        )

    def alpha(t):
        at_end = t >= 1  # exactly 0 at the end, whatever the rounding
        return jnp.where(at_end, 0.0, (schedule.alpha(t) - last) * (first / (first - last)))

    def variance_of_noise(t):
        # 1 - alpha^2 without cancellation: 1 - alpha = sigma^2 / (1 + alpha), for the original
        # schedule (complement) and the rescaled one (rescaled).
        complement = jnp.square(schedule.sigma(t)) / (1 + schedule.alpha(t))
        rescaled = (first * complement - last * noise**2 / (1 + first)) / (first - last)
        return rescaled * (1 + alpha(t))

    def log_snr(t):
        return 2 * jnp.log(alpha(t)) - jnp.log(variance_of_noise(t))

    return Schedule(alpha, lambda t: jnp.sqrt(variance_of_noise(t)), log_snr, inverse(log_snr))


def discrete(schedule: Schedule, num_times: int) -> Schedule:
    """The same schedule, restricted to the times i / num_times, i = 1 .. num_times."""
    return schedule._replace(num_times=num_times)


def snap(schedule: Schedule, t: jax.Array) -> jax.Array:
    """t rounded up to a time of a discrete schedule; t itself in continuous time."""
    if not schedule.num_times:
        return t
    index = jnp.clip(jnp.ceil(t * schedule.num_times), 1, schedule.num_times)
    return index / schedule.num_times


# A learned schedule (Kingma et al. 2021): gamma, the negative log-SNR, is a monotone function of
# time.


def learned(gamma: Function) -> Schedule:
    """The variance-preserving schedule with log-SNR = -gamma(t), for an increasing gamma."""
    return variance_preserving(lambda t: -gamma(t))


def init_monotone_gamma(rng: jax.Array, width: int = 1024) -> dict[str, Any]:
    """Initial parameters of `monotone_gamma`, with which it is nearly linear."""
    keys = jax.random.split(rng, 2)
    hidden = jnp.log(jnp.expm1(jnp.full((width,), 1.0 / width)))  # softplus gives 1 / width
    return {
        "linear": jnp.log(jnp.expm1(jnp.float32(1.0))),
        "scale": jax.random.uniform(keys[0], (width,), jnp.float32, -1, 1),
        "shift": jax.random.uniform(keys[1], (width,), jnp.float32, -4, 4),
        "hidden": hidden - 4,
    }


def monotone_gamma(
    params: dict[str, Any], t: jax.Array, gamma_min: float, gamma_max: float
) -> jax.Array:
    """An increasing function of t with gamma(0) = gamma_min and gamma(1) = gamma_max exactly.

    A line plus sigmoids, all with positive weights, mapped to the end points (Kingma et al. 2021,
    appendix H, whose monotone network this simplifies to one hidden layer).
    """

    def raw(t):
        slopes = jax.nn.softplus(params["scale"]) * 4
        bends = jax.nn.sigmoid(slopes * (8 * t[..., None] - 4) + params["shift"])
        return jax.nn.softplus(params["linear"]) * t + bends @ jax.nn.softplus(params["hidden"])

    t = jnp.asarray(t)
    start, end = raw(jnp.zeros((), t.dtype)), raw(jnp.ones((), t.dtype))
    unit = (raw(t) - start) / (end - start)
    return gamma_min + (gamma_max - gamma_min) * unit


SCHEDULES: dict[str, Callable[[], Schedule]] = {
    "vp_linear": vp_linear,
    "cosine": cosine,
    "sigmoid": sigmoid,
    "ve": ve,
    "edm": edm,
    "flow": linear_flow,
}
