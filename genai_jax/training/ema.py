"""Exponential moving averages of the parameters."""

import dataclasses

import jax

from genai_jax.config import ConfigError, field


@dataclasses.dataclass(frozen=True)
class EmaConfig:
    decay: str = field("", "decays of the averages to keep, comma-separated; none if empty")

    def decays(self) -> dict[str, float]:
        """Name -> decay; the name is the decay as it was written."""
        try:
            decays = {name: float(name) for name in self.decay.split(",") if name}
        except ValueError:
            raise ConfigError(f"--ema.decay={self.decay} is not a list of numbers") from None
        for name, decay in decays.items():
            if not 0 <= decay < 1:
                raise ConfigError(f"--ema.decay={name} is outside [0, 1)")
        return decays


def init_ema(params, decays: dict[str, float]) -> dict:
    """Averages that start at the parameters, so they need no debiasing."""
    return {name: jax.tree.map(lambda x: x.copy(), params) for name in decays}


def update_ema(ema: dict, params, decays: dict[str, float]) -> dict:
    """average <- decay * average + (1 - decay) * parameters, for each decay."""

    def update(decay: float, average):
        return jax.tree.map(lambda a, p: a + (1 - decay) * (p - a), average, params)

    return {name: update(decays[name], average) for name, average in ema.items()}
