"""What a model that draws in few steps is trained to put out.

`denoise(x, t)` gives the expected x0 of x [batch, ...] at times t [batch];
`predict(x, t, step_size)` a velocity.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from genai_jax.diffusion.objective import beside, mean_square, noised
from genai_jax.diffusion.schedule import Schedule

Denoise = Callable[[jax.Array, jax.Array], jax.Array]


def ddim_step(denoise: Denoise, schedule: Schedule, x, t, s) -> jax.Array:
    """x at times t [batch] moved to times s by one deterministic step."""
    x0 = denoise(x, t)
    eps = (x - beside(schedule.alpha(t), x) * x0) / beside(schedule.sigma(t), x)
    return beside(schedule.alpha(s), x) * x0 + beside(schedule.sigma(s), x) * eps


# Progressive distillation (Salimans and Ho 2022).


def two_step_target(denoise: Denoise, schedule: Schedule, x, t, s) -> jax.Array:
    """The x0 with which one step from t to s lands where two of `denoise` do (algorithm 2)."""
    middle = (t + s) / 2
    landed = ddim_step(denoise, schedule, ddim_step(denoise, schedule, x, t, middle), middle, s)
    ratio = schedule.sigma(s) / schedule.sigma(t)
    scale = schedule.alpha(s) - ratio * schedule.alpha(t)
    return (landed - beside(ratio, x) * x) / beside(scale, x)


def progressive_loss(
    student: Denoise, teacher: Denoise, schedule: Schedule, x0, key, *, steps: int
) -> jax.Array:
    """Of a student that is to draw in `steps` equal steps of t, [batch].

    The weight is max(SNR, 1), "truncated SNR" (section 4).
    """
    time_key, noise_key = jax.random.split(key)
    t = jax.random.randint(time_key, x0.shape[:1], 1, steps + 1) / steps
    x = noised(schedule, x0, t, jax.random.normal(noise_key, x0.shape, x0.dtype))
    target = jax.lax.stop_gradient(two_step_target(teacher, schedule, x, t, t - 1 / steps))
    weight = jnp.maximum(jnp.exp(schedule.log_snr(t)), 1.0)
    return jnp.minimum(weight, 1e4) * mean_square(student(x, t) - target)


# Consistency models (Song et al. 2023; improved training: Song and Dhariwal 2023).


def consistency_steps(step: jax.Array, total: int, first: int, last: int) -> jax.Array:
    """Number of time intervals at a training step: doubled at equal intervals from first to last.

    Song and Dhariwal 2023, section 3.4.
    """
    stages = math.log2(last / first) + 1
    stage = jnp.floor(step / max(1, total // stages))
    return jnp.minimum(first * 2.0**stage, last)


def consistency_loss(
    student: Denoise,
    teacher: Denoise | None,
    schedule: Schedule,
    x0: jax.Array,
    t: jax.Array,
    key: jax.Array,
    *,
    intervals: jax.Array,
) -> jax.Array:
    """The estimate at a time is to equal that at the next smaller time, on the same path, [batch].

    At the smallest time the data itself is the estimate. The path is that of the teacher's ODE, or,
    without one, the straight mixture of the data with one noise. Pseudo-Huber distance, weighted by
    the inverse of the step in sigma where the signal is constant (Song and Dhariwal 2023, table 1).

    Args:
      student: trained; its own value at the smaller time is a constant.
      teacher: for distillation; None for training from data alone.
      schedule: of the noise.
      x0: data [batch, ...].
      t: times [batch] in (0, 1), to be rounded up to the grid.
      key: of the noise.
      intervals: number of intervals of the grid, a scalar.
    """
    t = jnp.clip(jnp.ceil(t * intervals), 1, intervals) / intervals
    s = t - 1 / intervals
    noise = jax.random.normal(key, x0.shape, x0.dtype)
    x = noised(schedule, x0, t, noise)
    if teacher is None:
        x_next = noised(schedule, x0, s, noise)
    else:
        x_next = ddim_step(teacher, schedule, x, t, s)
    at_end = beside(s <= 0.5 / intervals, x0)
    inside = jnp.maximum(
        s, 0.5 / intervals
    )  # where `where` will not look, and nothing divides by 0
    next_estimate = student(x_next, inside)
    target = jnp.where(at_end, x_next / beside(schedule.alpha(s), x0), next_estimate)
    difference = student(x, t) - jax.lax.stop_gradient(target)
    size = x0[0].size
    softness = 0.00054 * math.sqrt(size)
    squares = jnp.sum(jnp.square(difference), tuple(range(1, x0.ndim)))
    distance = jnp.sqrt(squares + softness**2) - softness
    constant = schedule.alpha(t) == schedule.alpha(s)
    gap = jnp.maximum(schedule.sigma(t) - schedule.sigma(s), 1e-6)
    return jnp.where(constant, 1 / gap, 1.0) * distance / math.sqrt(size)


# Shortcut models (Frans et al. 2024).


def shortcut_loss(
    predict: Callable,
    predict_last: Callable,
    x0: jax.Array,
    t: jax.Array,
    key: jax.Array,
    *,
    finest: int,
    bootstrap: int,
) -> jax.Array:
    """Flow matching, and for a share of the batch: one step equals two of half its size, [batch].

    Args:
      predict: (x, t, step_size [batch]) -> velocity dx / dt on the straight path.
      predict_last: the same for the last `bootstrap` examples alone.
      x0: data [batch, ...].
      t: times of the flow-matching examples [batch].
      key: of noise and step sizes.
      finest: the number of steps at the finest, a power of two.
      bootstrap: how many of the examples, at the end of the batch, learn the second.
    """
    noise_key, size_key, time_key = jax.random.split(key, 3)
    noise = jax.random.normal(noise_key, x0.shape, x0.dtype)
    rows = x0.shape[0]
    levels = int(math.log2(finest))
    exponent = jax.random.randint(size_key, (bootstrap,), 0, levels)  # the doubled step is 2^-e
    doubled = 2.0**-exponent
    grid = jax.random.uniform(time_key, (bootstrap,))
    t_start = jnp.minimum(jnp.floor(grid / doubled) + 1, 1 / doubled) * doubled
    t = t.at[rows - bootstrap :].set(t_start)
    mix = beside(t, x0)
    x = (1 - mix) * x0 + mix * noise
    target = (
        (noise - x0)
        .at[rows - bootstrap :]
        .set(_two_half_steps(predict_last, x[rows - bootstrap :], t_start, doubled / 2, finest))
    )
    step_size = jnp.zeros(rows, x0.dtype).at[rows - bootstrap :].set(doubled)
    return mean_square(predict(x, t, step_size) - jax.lax.stop_gradient(target))


def _two_half_steps(predict, x, t, half, finest):
    """The mean velocity of two steps of size `half`; those of the finest size are told 0."""
    told = jnp.where(half <= 1 / finest, 0.0, half)
    first = predict(x, t, told)
    middle = x - beside(half, x) * first
    return (first + predict(middle, t - half, told)) / 2
