"""Synthetic problems with one correct answer each, as text documents "question = answer".

With ``--data.answer_after==``, only what follows "=" is trained on and scored.
"""

import numpy as np

from genai_jax.config import ConfigError

SYMBOLS = ("+", "-", "*", "/", "=")
PROBLEMS = 20_000  # size of an `addition` or `repeats` data set, unless there are fewer


def modular_addition(modulus: int) -> list[str]:
    """Every "a + b = c" with c = a + b modulo `modulus`, as words for the tokenizer "numbers"."""
    _check("modular_addition", modulus)
    return [f"{a} + {b} = {(a + b) % modulus}" for a in range(modulus) for b in range(modulus)]


def modular_division(modulus: int) -> list[str]:
    """Every "a / b = c" with b c = a modulo `modulus`, which is prime, and b not 0.

    With the modulus 97, the data set of Power et al. 2022, "Grokking", figure 1.
    """
    _check("modular_division", modulus)
    if any(modulus % n == 0 for n in range(2, int(modulus**0.5) + 1)):
        raise ConfigError(
            f"--data.dataset=modular_division:{modulus}: the modulus must be a prime number"
        )
    return [
        f"{b * c % modulus} / {b} = {c}" for b in range(1, modulus) for c in range(modulus)
    ]  # fmt: skip


def addition(digits: int) -> list[str]:
    """Sums such as "417+085=2050" of numbers with `digits` digits; the answer is reversed.

    With its least significant digit first, each digit of the answer follows from what precedes it
    (Lee et al. 2023, "Teaching arithmetic to small transformers", section 3). The problems are the
    same every time.
    """
    if not 1 <= digits <= 9:
        raise ConfigError(
            f"--data.dataset=addition:{digits}: the number of digits must be from 1 to 9"
        )
    limit = 10 ** (2 * digits)
    rng = np.random.default_rng((digits, 13))
    if limit <= 2 * PROBLEMS:
        indices = rng.permutation(limit)[:PROBLEMS]
    else:
        indices = np.unique(rng.integers(limit, size=PROBLEMS))
    pairs = [divmod(int(index), 10**digits) for index in indices]
    return [f"{a:0{digits}}+{b:0{digits}}={f'{a + b:0{digits + 1}}'[::-1]}" for a, b in pairs]


def repeats(symbols: int) -> list[str]:
    """Numbers in a random order, then "=" and the same three times: "7 2 = 7 2 7 2 7 2".

    Each of the 20,000 documents has between a quarter and three quarters of the numbers below
    `symbols`, each once, so that the period is random: what follows a number is where that
    number was before, not at a fixed distance (Olsson et al. 2022, "In-context learning and
    induction heads"). The documents are the same every time.
    """
    if not 8 <= symbols <= 10_000:
        raise ConfigError(
            f"--data.dataset=repeats:{symbols}: the number of symbols must be from 8 to 10,000"
        )
    rng = np.random.default_rng((symbols, 17))
    documents = []
    for period in rng.integers(symbols // 4, 3 * symbols // 4 + 1, PROBLEMS):
        once = " ".join(map(str, rng.permutation(symbols)[:period]))
        documents.append(f"{once} = {once} {once} {once}")
    return documents


def _check(kind: str, modulus: int):
    if modulus < 2:
        raise ConfigError(f"--data.dataset={kind}:{modulus}: the modulus must be at least 2")
