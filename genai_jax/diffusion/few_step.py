"""Training losses of models that sample in a few steps.

`denoise(x, t)` gives the expected x0 for x [batch, ...] at times t [batch];
`predict(x, t, step_size)` gives a velocity.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from genai_jax.diffusion.objective import mean_square, noised, per_example
from genai_jax.diffusion.schedule import Schedule

Denoise = Callable[[jax.Array, jax.Array], jax.Array]


def ddim_step(denoise: Denoise, schedule: Schedule, x, t, s) -> jax.Array:
    """One deterministic DDIM step of x from times t [batch] to times s [batch]."""
    x0 = denoise(x, t)
    eps = (x - per_example(schedule.alpha(t), x) * x0) / per_example(schedule.sigma(t), x)
    return per_example(schedule.alpha(s), x) * x0 + per_example(schedule.sigma(s), x) * eps


# Progressive distillation (Salimans and Ho 2022).


def two_step_target(denoise: Denoise, schedule: Schedule, x, t, s) -> jax.Array:
    """The x0 for which one step from t to s ends where two steps of `denoise` do (algorithm 2)."""
    middle = (t + s) / 2
    x_middle = ddim_step(denoise, schedule, x, t, middle)
    x_end = ddim_step(denoise, schedule, x_middle, middle, s)
    ratio = schedule.sigma(s) / schedule.sigma(t)
    scale = schedule.alpha(s) - ratio * schedule.alpha(t)
    return (x_end - per_example(ratio, x) * x) / per_example(scale, x)


def progressive_loss(
    student: Denoise, teacher: Denoise, schedule: Schedule, x0, key, *, steps: int
) -> jax.Array:
    """The loss of a student that is to sample in `steps` equal steps of t, [batch].

    The weight is max(SNR, 1), "truncated SNR" (section 4), capped at 10,000.
    """
    time_key, noise_key = jax.random.split(key)
    t = jax.random.randint(time_key, x0.shape[:1], 1, steps + 1) / steps
    x = noised(schedule, x0, t, jax.random.normal(noise_key, x0.shape, x0.dtype))
    target = jax.lax.stop_gradient(two_step_target(teacher, schedule, x, t, t - 1 / steps))
    weight = jnp.maximum(jnp.exp(schedule.log_snr(t)), 1.0)
    return jnp.minimum(weight, 1e4) * mean_square(student(x, t) - target)


# Consistency models (Song et al. 2023; improved training: Song and Dhariwal 2023).


def consistency_steps(step: jax.Array, total: int, first: int, last: int) -> jax.Array:
    """Number of time intervals at a training step: doubled in equal stages from `first` to `last`.

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
    """Distance of the estimate at a time to that at the next smaller time on its path, [batch].

    At the smallest time, the target is the data itself. The path is that of the teacher's ODE or,
    without a teacher, the mixture of the data with a fixed noise. The distance is pseudo-Huber,
    weighted by the inverse of the step in sigma if the signal is constant (Song and Dhariwal 2023,
    table 1).

    Args:
      student: the model to train; no gradient flows through its estimate at the smaller time.
      teacher: for distillation; None to train on data only.
      schedule: the noise schedule.
      x0: data [batch, ...].
      t: times [batch] in (0, 1); rounded up to the grid.
      key: key for the noise.
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
    at_end = per_example(s <= 0.5 / intervals, x0)
    # At s = 0 the student's value is discarded below; a positive time avoids a division by 0.
    s_positive = jnp.maximum(s, 0.5 / intervals)
    next_estimate = student(x_next, s_positive)
    target = jnp.where(at_end, x_next / per_example(schedule.alpha(s), x0), next_estimate)
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
    """Flow matching, and for the last examples of the batch self-consistency, [batch].

    Self-consistency asks that one step equal two steps of half its size.

    Args:
      predict: (x, t, step_size [batch]) -> velocity dx / dt on the straight path.
      predict_last: the same, for the last `bootstrap` examples only.
      x0: data [batch, ...].
      t: times of the flow-matching examples [batch].
      key: key for the noise and the step sizes.
      finest: number of steps at the finest step size, a power of two.
      bootstrap: number of examples, at the end of the batch, that learn self-consistency.
    """
    noise_key, size_key, time_key = jax.random.split(key, 3)
    noise = jax.random.normal(noise_key, x0.shape, x0.dtype)
    rows = x0.shape[0]
    if not bootstrap:
        mix = per_example(t, x0)
        velocity = predict((1 - mix) * x0 + mix * noise, t, jnp.zeros(rows, x0.dtype))
        return mean_square(velocity - (noise - x0))
    levels = int(math.log2(finest))
    exponent = jax.random.randint(size_key, (bootstrap,), 0, levels)
    large_step = 2.0**-exponent
    grid = jax.random.uniform(time_key, (bootstrap,))
    t_start = jnp.minimum(jnp.floor(grid / large_step) + 1, 1 / large_step) * large_step
    t = t.at[rows - bootstrap :].set(t_start)
    mix = per_example(t, x0)
    x = (1 - mix) * x0 + mix * noise
    target = (
        (noise - x0)
        .at[rows - bootstrap :]
        .set(_two_half_steps(predict_last, x[rows - bootstrap :], t_start, large_step / 2, finest))
    )
    step_size = jnp.zeros(rows, x0.dtype).at[rows - bootstrap :].set(large_step)
    return mean_square(predict(x, t, step_size) - jax.lax.stop_gradient(target))


def _two_half_steps(predict, x, t, half, finest):
    """The mean velocity of two steps of size `half`; at the finest size, `predict` gets size 0."""
    step_size = jnp.where(half <= 1 / finest, 0.0, half)
    first = predict(x, t, step_size)
    middle = x - per_example(half, x) * first
    return (first + predict(middle, t - half, step_size)) / 2
