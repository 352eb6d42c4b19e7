"""Rotary frequencies for rows that are longer than those of earlier training."""

import math
from typing import NamedTuple

import numpy as np

# Turns within the earlier length: a channel pair with fewer than the first is slowed down by the
# whole factor, one with more than the second not at all.
_TURNS = {"yarn": (1, 32), "llama3": (1, 4)}
KINDS = ("none", "linear", "ntk", *_TURNS)


class RopeScaling(NamedTuple):
    """How rotations are slowed down.

    Attributes:
      kind: one of `KINDS`.
      factor: what slow rotations are divided by, such as the new length of a row relative to that
        of earlier training.
      length: positions of earlier training; for yarn and llama3.
    """

    kind: str = "none"
    factor: float = 1.0
    length: int = 1

    def frequencies(self, half: int, theta: float) -> np.ndarray:
        """Radians per position of each channel pair, [half], float32.

        - linear divides all by the factor: position interpolation (Chen et al. 2023, equation 4).
        - ntk raises theta so that the slowest pair is divided by the factor and the fastest by 1
          (Peng et al. 2023, section 3.1).
        - yarn and llama3 divide the pairs that turn slowly, leave those that turn fast, and mix in
          between (Peng et al. 2023, section 3.2); llama3 has the narrower band of the released code
          of Llama 3.1.
        """
        if self.kind == "ntk":
            theta = theta * self.factor ** (half / max(half - 1, 1))
        plain = theta ** (-np.arange(half, dtype=np.float64) / half)
        if self.kind in ("none", "ntk"):
            return plain.astype(np.float32)
        share = np.zeros(half)  # of the plain frequency
        if self.kind in _TURNS:
            slow, fast = _TURNS[self.kind]
            turns = self.length * plain / (2 * math.pi)
            share = np.clip((turns - slow) / (fast - slow), 0, 1)
        return ((1 - share) * plain / self.factor + share * plain).astype(np.float32)

    @property
    def sharpness(self) -> float:
        """What yarn multiplies attention scores by, as more keys flatten the attention.

        Peng et al. 2023, section 3.4.
        """
        return (0.1 * math.log(self.factor) + 1) ** 2 if self.kind == "yarn" else 1.0
