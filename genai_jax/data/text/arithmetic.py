"""Made-up problems with one right answer each, as documents of text: "question = answer".

What follows the mark "=" can be asked for alone: ``--data.answer_after``.
"""

import numpy as np

from genai_jax.config import ConfigError

SYMBOLS = ("+", "-", "*", "/", "=")
PROBLEMS = 20_000  # of `addition`, or all there are


def modular_addition(modulus: int) -> list[str]:
    """Every "a + b = c" with c = a + b mod the modulus, in words for the tokenizer "numbers"."""
    _check(modulus)
    return [f"{a} + {b} = {(a + b) % modulus}" for a in range(modulus) for b in range(modulus)]


def modular_division(modulus: int) -> list[str]:
    """Every "a / b = c" with b c = a mod the modulus, a prime, and b not 0.

    The data set of Power et al. 2022, "Grokking", figure 1, with 97 for the modulus.
    """
    _check(modulus)
    if any(modulus % n == 0 for n in range(2, int(modulus**0.5) + 1)):
        raise ConfigError(f"modular_division:{modulus}: the modulus has to be a prime number")
    return [
        f"{b * c % modulus} / {b} = {c}" for b in range(1, modulus) for c in range(modulus)
    ]  # fmt: skip


def addition(digits: int) -> list[str]:
    """Sums "417+085=2050" of numbers of so many digits, the digits of the answer lowest first.

    In that order each digit of the answer follows from what is before it (Lee et al. 2023,
    "Teaching arithmetic to small transformers", section 3). The same problems every time.
    """
    if not 1 <= digits <= 9:
        raise ConfigError(f"addition:{digits}: numbers have 1 to 9 digits")
    limit = 10 ** (2 * digits)
    rng = np.random.default_rng((digits, 13))
    if limit <= 2 * PROBLEMS:
        drawn = rng.permutation(limit)[:PROBLEMS]
    else:
        drawn = np.unique(rng.integers(limit, size=PROBLEMS))
    pairs = [divmod(int(pair), 10**digits) for pair in drawn]
    return [f"{a:0{digits}}+{b:0{digits}}={f'{a + b:0{digits + 1}}'[::-1]}" for a, b in pairs]


def _check(modulus: int):
    if modulus < 2:
        raise ConfigError(f"modular arithmetic needs a modulus of at least 2, not {modulus}")
