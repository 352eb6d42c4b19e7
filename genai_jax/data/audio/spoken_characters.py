"""Spoken digits and letters, 36 recordings of the package captcha, as text."""

import string
import wave

import numpy as np

from genai_jax.data.audio import mu_law
from genai_jax.data.installed import package_file
from genai_jax.files import unreadable

NAME = "spoken_characters"
CHARACTERS = string.digits + string.ascii_uppercase


def sound_documents(validation_percent: int, split: str) -> list[str]:
    """The recordings of a split as texts "= s0 s1 ...", mu-law levels at 8,000 samples per second.

    With ``--data.answer_after==``, the samples and nothing else are targets. Held out is the last
    part of each recording, as there is only one of each character.
    """
    texts = []
    for character in CHARACTERS:
        levels = mu_law.encode(_read(character))
        cut = len(levels) - max(1, len(levels) * validation_percent // 100)
        part = levels[cut:] if split == "validation" else levels[:cut]
        texts.append("= " + " ".join(map(str, part.tolist())))
    return texts


def _read(character: str) -> np.ndarray:
    """The samples of a character, between -1 and 1, [length]."""
    path = package_file("captcha", f"captcha/data/{character}/default.wav", NAME)
    try:
        with wave.open(str(path)) as file:
            form = file.getnchannels(), file.getsampwidth(), file.getframerate()
            data = file.readframes(file.getnframes())
    except (wave.Error, EOFError) as error:
        raise unreadable(path, str(error)) from None
    if form != (1, 1, 8000) or not data:
        raise unreadable(path, "it is not a recording of 8,000 samples per second in 8 bits")
    return (np.frombuffer(data, np.uint8).astype(np.float64) - 128) / 128
