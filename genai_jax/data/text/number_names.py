"""Pairs of texts with one right answer: the names of a number in English and in German.

German names units before tens, "einundzwanzig" for twenty-one, and writes the name as one word, so
that a translation has to reorder what it reads.
"""

import numpy as np

from genai_jax.config import ConfigError

PAIRS = 20_000  # size of a data set, or all numbers if there are fewer

_ENGLISH = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven",
    "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
_ENGLISH_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_GERMAN = (
    "null", "ein", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun", "zehn", "elf",
    "zwölf", "dreizehn", "vierzehn", "fünfzehn", "sechzehn", "siebzehn", "achtzehn", "neunzehn",
)  # fmt: skip
_GERMAN_TENS = (
    "zwanzig", "dreißig", "vierzig", "fünfzig", "sechzig", "siebzig", "achtzig", "neunzig",
)  # fmt: skip


def number_names(digits: int) -> list[tuple[str, str]]:
    """(English, German) names of numbers with up to `digits` digits; the same every time.

    Raises:
      ConfigError: other than 1 to 6 digits.
    """
    if not 1 <= digits <= 6:
        raise ConfigError(
            f"--data.dataset=number_names:{digits}: the number of digits must be from 1 to 6"
        )
    numbers = np.random.default_rng((digits, 17)).permutation(10**digits)[:PAIRS]
    return [(english(n), german(n)) for n in map(int, numbers)]


def english(n: int) -> str:
    """The name of a number below a million, as in "four hundred twenty-one"."""
    thousands, n = divmod(n, 1000)
    words = [f"{english(thousands)} thousand"] if thousands else []
    hundreds, n = divmod(n, 100)
    words += [f"{_ENGLISH[hundreds]} hundred"] if hundreds else []
    tens, unit = divmod(n, 10)
    if tens >= 2:
        words.append(_ENGLISH_TENS[tens - 2] + (f"-{_ENGLISH[unit]}" if unit else ""))
    elif n or not words:
        words.append(_ENGLISH[n])
    return " ".join(words)


def german(n: int) -> str:
    """The name of a number below a million, as in "vierhunderteinundzwanzig"."""
    return _german(n) + ("s" if n % 100 == 1 else "")


def _german(n: int) -> str:
    """The name as it stands before "tausend": of 1 and what ends in it, "ein"."""
    thousands, n = divmod(n, 1000)
    word = f"{_german(thousands)}tausend" if thousands else ""
    hundreds, n = divmod(n, 100)
    word += f"{_GERMAN[hundreds]}hundert" if hundreds else ""
    tens, unit = divmod(n, 10)
    if tens >= 2:
        return word + (f"{_GERMAN[unit]}und" if unit else "") + _GERMAN_TENS[tens - 2]
    return word + (_GERMAN[n] if n or not word else "")
