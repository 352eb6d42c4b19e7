"""Averages of the parameters: exponential ones, and power-function profiles.

A power-function average weighs the parameters of step t by t^gamma (Karras et al. 2024, "Analyzing
and improving the training dynamics of diffusion models", section 3.1). Its width is a share of the
run, whatever the run's length, and from snapshots of two of them any other can be reconstructed:
`genai_jax.training.ema_profiles`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from genai_jax.config import ConfigError, field


@dataclasses.dataclass(frozen=True)
class EmaConfig:
    decay: str = field("", "decays of the averages to keep, comma-separated; none if empty")
    relative_width: str = field(
        "", "widths of power-function averages to keep, shares of the run, comma-separated"
    )
    snapshot_every: int = field(
        0, "steps between snapshots of the power-function averages, from which any width can be "
        "had later; 0: none", minimum=0,
    )  # fmt: skip
    use: str = field(
        "", "average that sample and evaluate take where none is named; empty: the parameters",
        changeable=True,
    )  # fmt: skip

    def __post_init__(self):
        if self.snapshot_every and not self.relative_width:
            raise ValueError(
                f"--ema.snapshot_every={self.snapshot_every} needs --ema.relative_width"
            )
        if self.use and self.use not in self.averages():
            kept = ", ".join(self.averages()) or "none"
            raise ValueError(f"--ema.use={self.use} is not an average of this run; it keeps {kept}")

    def averages(self) -> dict[str, "Average"]:
        """Name -> average; a decay is named as it was written, a width ``widthW``."""
        found = {}
        for text in _listed("decay", self.decay):
            if not 0 <= float(text) < 1:
                raise ConfigError(f"--ema.decay={text} is outside [0, 1)")
            found[text] = Average(decay=float(text))
        for text in _listed("relative_width", self.relative_width):
            found[f"width{text}"] = Average(gamma=gamma_of(float(text)))
        return found


def _listed(flag: str, text: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    try:
        [float(name) for name in names]
    except ValueError:
        raise ConfigError(f"--ema.{flag}={text} is not a list of numbers") from None
    return names


@dataclasses.dataclass(frozen=True)
class Average:
    """An exponential average of this decay, or a power-function average of this exponent."""

    decay: float | None = None
    gamma: float | None = None

    def kept(self, step: jax.Array):
        """The share of the average that is kept at step 1, 2, ..."""
        if self.decay is not None:
            return self.decay
        t = jnp.asarray(step, jnp.float32)
        return (1 - 1 / t) ** (self.gamma + 1)


def gamma_of(relative_width: float) -> float:
    """The exponent of the profile whose standard deviation is this share of the run.

    sigma_rel = (gamma + 1)^1/2 (gamma + 2)^-1 (gamma + 3)^-1/2 (Karras et al. 2024, equation 9),
    solved for gamma as a cubic.

    Raises:
      ConfigError: no profile is so wide, the uniform one being the widest.
    """
    widest = (1 / 12) ** 0.5
    if not 0 < relative_width <= widest + 1e-9:
        raise ConfigError(f"--ema.relative_width={relative_width} is outside (0, {widest:.4f}]")
    t = relative_width**-2
    return float(max(np.roots([1, 7, 16 - t, 12 - t]).real.max(), 0.0))


def init_ema(params, averages: dict[str, Average]) -> dict:
    """Averages that start at the parameters, so they need no debiasing."""
    return {name: jax.tree.map(lambda x: x.copy(), params) for name in averages}


def update_ema(ema: dict, params, averages: dict[str, Average], step: jax.Array) -> dict:
    """average <- kept * average + (1 - kept) * parameters, after step number `step` from 1 on."""

    def update(average: Average, values):
        rest = 1 - average.kept(step)
        return jax.tree.map(lambda a, p: a + rest * (p - a), values, params)

    return {name: update(averages[name], values) for name, values in ema.items()}
