"""Averages of the parameters: exponential ones, and power-function profiles.

A power-function average weights the parameters of step t by t^gamma (Karras et al. 2024, "Analyzing
and improving the training dynamics of diffusion models", section 3.1). Its width is relative to the
length of the run, and from snapshots of two such averages any other one can be reconstructed: see
`genai_jax.training.ema_profiles`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from genai_jax.config import ConfigError, field


@dataclasses.dataclass(frozen=True)
class EmaConfig:
    decay: str = field("", "Comma-separated decay rates of the averages to keep; none if empty.")
    relative_width: str = field(
        "",
        "Comma-separated relative widths of the power-function averages to keep, as fractions of "
        "the run.",
    )
    snapshot_every: int = field(
        0, "Steps between snapshots of the power-function averages, from which an average of any "
        "width can be reconstructed later; 0: no snapshots.", minimum=0, within_run=True,
    )  # fmt: skip
    use: str = field(
        "", "Average that sample and evaluate use by default; the parameters themselves if empty.",
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
        """Name -> average: the decay as it was written, or ``widthW`` for a relative width W."""
        averages = {}
        for text in _numbers("decay", self.decay):
            if not 0 <= float(text) < 1:
                raise ConfigError(f"--ema.decay={text} is outside [0, 1)")
            averages[text] = Average(decay=float(text))
        for text in _numbers("relative_width", self.relative_width):
            averages[f"width{text}"] = Average(gamma=gamma_of(float(text)))
        return averages


def _numbers(flag: str, text: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    try:
        [float(name) for name in names]
    except ValueError:
        raise ConfigError(f"--ema.{flag}={text} is not a list of numbers") from None
    return names


@dataclasses.dataclass(frozen=True)
class Average:
    """An exponential average with this decay, or a power-function average with this exponent."""

    decay: float | None = None
    gamma: float | None = None

    def kept(self, step: jax.Array):
        """Weight of the old average in the update of step 1, 2, ..."""
        if self.decay is not None:
            return self.decay
        t = jnp.asarray(step, jnp.float32)
        return (1 - 1 / t) ** (self.gamma + 1)


def gamma_of(relative_width: float) -> float:
    """The exponent of the profile whose standard deviation is this fraction of the run.

    sigma_rel = (gamma + 1)^1/2 (gamma + 2)^-1 (gamma + 3)^-1/2 (Karras et al. 2024, equation 9),
    solved for gamma as a cubic.

    Raises:
      ConfigError: no profile has this width; the widest is the uniform one.
    """
    widest = (1 / 12) ** 0.5
    if not 0 < relative_width <= widest + 1e-9:
        raise ConfigError(f"--ema.relative_width={relative_width} is outside (0, {widest:.4f}]")
    t = relative_width**-2
    return float(max(np.roots([1, 7, 16 - t, 12 - t]).real.max(), 0.0))


def init_ema(params, averages: dict[str, Average]) -> dict:
    """Averages initialized to the parameters, so that they need no bias correction."""
    return {name: jax.tree.map(lambda x: x.copy(), params) for name in averages}


def update_ema(ema: dict, params, averages: dict[str, Average], step: jax.Array) -> dict:
    """average <- kept * average + (1 - kept) * parameters, after step `step`, counted from 1."""

    def update(average: Average, values):
        rest = 1 - average.kept(step)
        return jax.tree.map(lambda a, p: a + rest * (p - a), values, params)

    return {name: update(averages[name], values) for name, values in ema.items()}
