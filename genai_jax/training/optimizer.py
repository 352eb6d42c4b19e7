"""Optimizers and learning-rate schedules from optax, configured by flags."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from genai_jax.config import Config, ConfigError, field
from genai_jax.outside import check_call, load_outside, outside_name
from genai_jax.training.parametrization import STREAMS, learning_rate_factor
from genai_jax.training.sharding import logical_axes
from genai_jax.training.trees import path_name

OPTIMIZERS = ("adamw", "sgd", "lion", "adafactor", "muon")
SCHEDULES = ("constant", "cosine", "linear", "rsqrt", "wsd")
ENDLESS = ("constant", "rsqrt")  # schedules that do not depend on the length of the run


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    name: str = field(
        "adamw",
        "Optimizer. muon: for hidden matrices, with Nesterov Adam for the rest; adafactor: factors "
        "the second moment of arrays with two sides of at least 128.",
        choices=OPTIMIZERS,
        outside=outside_name,
    )
    learning_rate: float = field(1e-3, "Peak learning rate.", minimum=0)
    schedule: str = field(
        "cosine",
        "Learning-rate schedule after warmup; wsd: warmup, stable, decay.",
        choices=SCHEDULES,
    )
    warmup_steps: int = field(100, "Steps of linear warmup.", minimum=0, within_run=True)
    decay_fraction: float = field(
        0.2, "Fraction of the steps in which wsd decays.", minimum=0, maximum=1
    )
    final_fraction: float = field(
        0.1, "Final learning rate relative to the peak.", minimum=0, maximum=1
    )
    weight_decay: float = field(0.1, "Decoupled weight decay of matrices.", minimum=0)
    momentum: float = field(0.95, "Momentum of sgd and muon.", minimum=0, maximum=1)
    beta1: float = field(
        0.9, "Decay rate of the first moment of adamw, lion, and muon.", minimum=0, maximum=1
    )
    beta2: float = field(
        0.95, "Decay rate of the second moment of adamw, lion, and muon.", minimum=0, maximum=1
    )
    epsilon: float = field(
        1e-8, "Term added to the root of the second moment of adamw and muon.", minimum=0
    )
    clip_norm: float = field(1.0, "Maximum norm of the gradient; 0: no clipping.", minimum=0)
    trainable: str | None = field(
        None,
        "Comma-separated parameter paths or regular expressions: the parameters to train, out of "
        "those that the task trains; the others stay as initialized. All of them if unset.",
    )


def learning_rate_schedule(config: OptimizerConfig, steps: int, numpy: Any = jnp) -> optax.Schedule:
    """Completed steps -> learning rate of the next one, for a run of `steps` steps.

    With ``numpy=np`` it is computed on the host, in float64.

    The rate rises linearly to the peak, which the last step of warmup has. From there `constant`
    stays, and `rsqrt` falls as the inverse square root of the step (Vaswani et al. 2017); the
    others fall to final_fraction of the peak, which the last step of the run has. `wsd` stays at
    the peak until the last decay_fraction of the run (Hu et al. 2024, "MiniCPM", section 4).
    """
    final, warmup = config.final_fraction, min(config.warmup_steps, steps)
    top = max(warmup - 1, 0)  # completed steps at the peak
    falling = steps - 1 - top
    if config.schedule == "wsd":
        falling = min(max(round(config.decay_fraction * steps), 1), falling)

    def fraction(step):
        """Of the peak, after warmup."""
        if config.schedule == "constant":
            return 1.0
        if config.schedule == "rsqrt":
            shift = max(warmup, 1)
            return (shift / (shift + numpy.maximum(step - warmup, 0))) ** 0.5
        progress = numpy.clip((step - (steps - 1 - falling)) / max(falling, 1), 0, 1)
        left = 1 - progress
        if config.schedule == "cosine":
            left = (1 + numpy.cos(math.pi * progress)) / 2
        return final + (1 - final) * left

    def rate(step):
        # The first step already learns: its rate is 1 / warmup of the peak, not 0.
        ramp = numpy.minimum((step + 1) / max(warmup, 1), 1)
        return config.learning_rate * ramp * fraction(step)

    return rate


def default_optimizer(
    config: Config,
    rules: Sequence,
    *,
    growth: Mapping[str, float] | None = None,
    updates_per_step: float = 1,
) -> optax.GradientTransformation:
    """The optimizer of one phase, with the flags of the run; see `make_optimizer`.

    `updates_per_step` is `repeats * epochs / every` of the phase, so that its schedule ends with
    the run.
    """
    return make_optimizer(
        config.optimizer, config.train.steps, rules, growth=growth,
        updates_per_step=updates_per_step,
    )  # fmt: skip


def make_optimizer(
    config: OptimizerConfig,
    steps: int,
    rules: Sequence[tuple[str, tuple]],
    *,
    growth: Mapping[str, float] | None = None,
    updates_per_step: float = 1,
    correction: float = 1,
) -> optax.GradientTransformation:
    """The optimizer of one phase, or of several that share it, for any part of the parameters.

    Args:
      config: the flags.
      steps: steps of the run, for the schedule.
      rules: partition rules of the task, (parameter path pattern, logical axes). The axes determine
        which parameters are matrices: weight decay and Muon apply only to those.
      growth: logical axis -> its size relative to the base shape of maximal-update
        parametrization, which scales the learning rate of each parameter; None for one rate.
      updates_per_step: on average; the schedule advances by its inverse at each update.
      correction: for lazy regularization, the fraction of the updates that are not regularization:
        learning rate x correction, momenta ^ correction (Karras et al. 2020, "Analyzing and
        improving the image quality of StyleGAN", appendix B), so that a step changes the parameters
        as much as it would without regularization.
    """
    axes_of = lambda params: logical_axes(params, rules)
    rate = learning_rate_schedule(config, steps)
    schedule = lambda count: correction * rate(count / updates_per_step)
    config = dataclasses.replace(
        config,
        momentum=config.momentum**correction,
        beta1=config.beta1**correction,
        beta2=config.beta2**correction,
    )
    decayed = lambda params: _map_axes(_is_matrix, axes_of(params))
    name, decay = config.name, config.weight_decay
    by_width = _by_width(name, axes_of, growth)
    if name in ("adamw", "lion"):
        if name == "adamw":
            rule = optax.scale_by_adam(config.beta1, config.beta2, config.epsilon)
        else:
            rule = optax.scale_by_lion(config.beta1, config.beta2)
        decay_all = optax.add_decayed_weights(decay, decayed)
        core = optax.chain(rule, *by_width, decay_all, optax.scale_by_learning_rate(schedule))
    else:
        if name == "sgd":
            rule = optax.sgd(schedule, momentum=config.momentum or None)
        elif name not in OPTIMIZERS:
            return _clipped(config, _own_optimizer(config, schedule, growth))
        elif name == "adafactor":
            # optax does not scale this decay by the learning rate; ours is scaled, as elsewhere.
            rule = optax.adafactor(schedule, multiply_by_parameter_scale=False)
        else:
            # optax's own decay would skip what Muon leaves to Adam, and include scales there.
            rule = _muon(config, schedule, axes_of)
        core = optax.chain(rule, *by_width, _decay_at_rate(schedule, decay, decayed))
    return _clipped(config, core)


def moved_by_sign(
    optimizer: optax.GradientTransformation, pattern: str, rate: float
) -> optax.GradientTransformation:
    """`optimizer`, except for parameters that move by `rate` against the sign of their gradient.

    Args:
      optimizer: for all others.
      pattern: regular expression for the paths of these parameters.
      rate: how far they move in each update.
    """

    def labels(params):
        label = lambda path, _: "sign" if re.search(pattern, path_name(path)) else "other"
        return jax.tree_util.tree_map_with_path(label, params)

    move = optax.stateless(lambda updates, _: jax.tree.map(lambda u: -rate * jnp.sign(u), updates))
    return optax.multi_transform({"sign": move, "other": optimizer}, labels)


def _clipped(config: OptimizerConfig, core: optax.GradientTransformation):
    if not config.clip_norm:
        return core
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), core)


def _own_optimizer(config, schedule, growth) -> optax.GradientTransformation:
    """One from outside this project, (schedule, config) -> transformation.

    It applies the schedule and the weight decay itself.
    """
    named = f"--optimizer.name={config.name}"
    if growth:
        raise ConfigError(
            f"{named}: only {', '.join(OPTIMIZERS)} scale learning rates by width, as "
            "maximal-update parametrization does"
        )
    function = load_outside("--optimizer.name", config.name, ["__call__"])
    check_call("--optimizer.name", config.name, function, 2, "schedule, config")
    core = function(schedule, config)
    if not isinstance(core, optax.GradientTransformation):
        raise ConfigError(f"{named} returns a {type(core).__name__}, not an optax transformation")
    return core


def _by_width(name: str, axes_of, growth) -> list[optax.GradientTransformation]:
    """Scales updates by width, for maximal-update parametrization; [] without a base shape."""
    if not growth:
        return []
    rule = name if name in ("sgd", "muon") else "adam"  # size independent of the gradient

    def multiply(updates, _):
        factors = _map_axes(lambda a: learning_rate_factor(a, growth, rule), axes_of(updates))
        return jax.tree.map(jnp.multiply, updates, factors)

    return [optax.stateless(multiply)]


def _muon(config, schedule, axes_of):
    """Muon (Jordan et al. 2024) for hidden matrices, Nesterov Adam for all other parameters.

    As in optax, momentum is corrected for its bias, which the published form is not.
    """

    def dimensions(params):
        chosen = _map_axes(_muon_dimensions, axes_of(params))
        if not any(d is not None for d in jax.tree.leaves(chosen, is_leaf=_is_dimension)):
            raise ConfigError("--optimizer.name=muon: no hidden matrix is among what is trained")
        return chosen

    return optax.contrib.muon(
        schedule,
        beta=config.momentum,
        eps=config.epsilon,
        consistent_rms=0.2,  # one learning rate suits both (Liu et al. 2025, section 2.2)
        adam_b1=config.beta1,
        adam_b2=config.beta2,
        muon_weight_dimension_numbers=dimensions,
    )


def _decay_at_rate(schedule, decay, mask):
    """Decoupled weight decay scaled by the learning rate, for an optimizer that has none."""
    negative = lambda count: -schedule(count)
    decay_only = optax.chain(
        optax.add_decayed_weights(decay, mask), optax.scale_by_schedule(negative)
    )

    def update(updates, state, params):
        zeros = jax.tree.map(jnp.zeros_like, updates)
        shrink, state = decay_only.update(zeros, state, params)
        return jax.tree.map(lambda u, s: u + s, updates, shrink), state

    return optax.GradientTransformation(decay_only.init, update)


_BATCH_AXES = ("layers", "blocks", "experts")


def _map_axes(function, axes):
    """Maps axes of parameters; those that another optimizer has are `MaskedNode`s, and stay."""
    is_axes = lambda x: isinstance(x, tuple) and not isinstance(x, optax.MaskedNode)
    return jax.tree.map(function, axes, is_leaf=is_axes)


_BIASES = (["heads", "head_dim"], ["kv_heads", "head_dim"], [None, "mlp"])


def _is_matrix(axes: tuple) -> bool:
    """Whether a parameter is neither a scale nor a bias, some of which have two axes: `_BIASES`.

    Nor does it describe the states of a recurrence, whose decays weight decay would change.
    """
    inner = [a for a in axes if a not in _BATCH_AXES]
    return len(inner) >= 2 and inner not in _BIASES and "state" not in inner


def _is_dimension(x) -> bool:
    return x is None or isinstance(x, optax.contrib.MuonDimensionNumbers)


def _muon_dimensions(axes: tuple):
    """The input and output axes of a hidden matrix; None for parameters that Muon leaves to Adam.

    A hidden matrix has the residual stream ("embed") on one side, or else the inside of a mixer,
    and all other axes on the other.
    """
    inner = [i for i, a in enumerate(axes) if a not in _BATCH_AXES]
    names = [axes[i] for i in inner]
    stream = next((axis for axis in STREAMS if axis in names), None)
    if len(inner) < 2 or {"vocabulary", None} & set(names) or names.count(stream) != 1:
        return None
    one = tuple(i for i in inner if axes[i] == stream)
    other = tuple(i for i in inner if axes[i] != stream)
    if names[0] == stream:
        return optax.contrib.MuonDimensionNumbers(one, other)
    if names[-1] == stream:
        return optax.contrib.MuonDimensionNumbers(other, one)
    return None
