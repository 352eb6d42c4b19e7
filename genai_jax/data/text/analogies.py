"""Questions of the form "a is to b as c is to d", read from text."""

import itertools

from genai_jax.config import ConfigError

Question = tuple[str, str, str, str]


def read_analogies(text: str, label: str) -> list[Question]:
    """The questions of a text in lower case.

    A line has four words, a question; or two, a pair, which makes a question with every other pair
    of its section. A line that begins with a colon begins a section, and one that begins with #
    says nothing. Files of four words a line with sections are those of Mikolov et al. (2013).

    Args:
      text: the lines.
      label: what an error calls the file.

    Raises:
      ConfigError: a line of another form, or no questions.
    """
    questions: list[Question] = []
    pairs: list[tuple[str, ...]] = []
    for number, line in enumerate(text.splitlines(), 1):
        words = tuple(line.lower().split())
        if not words or line.startswith("#"):
            continue
        if line.startswith(":"):
            questions += _of_pairs(pairs)
            pairs = []
        elif len(words) == 4:
            questions.append(words)
        elif len(words) == 2:
            pairs.append(words)
        else:
            raise ConfigError(
                f"{label}: line {number} has {len(words)} words; a question has four, a pair two"
            )
    questions += _of_pairs(pairs)
    if not questions:
        raise ConfigError(f"{label} has no questions: write four words a line")
    return questions


def _of_pairs(pairs: list[tuple[str, ...]]) -> list[Question]:
    return [(*one, *other) for one, other in itertools.permutations(pairs, 2)]
