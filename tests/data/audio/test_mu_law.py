"""Levels of sound, and the recordings that come as text."""

import numpy as np
import pytest

from genai_jax.config import ConfigError
from genai_jax.data.audio import mu_law
from genai_jax.data.audio.spoken_characters import CHARACTERS, sound_documents


def test_levels_are_restored_and_denser_where_sound_is_soft():
    levels = np.arange(256)
    np.testing.assert_array_equal(mu_law.encode(mu_law.decode(levels)), levels)
    samples = np.linspace(-1, 1, 10_001)
    error = np.abs(mu_law.decode(mu_law.encode(samples)) - samples)
    assert error.max() < 0.03 and error[np.abs(samples) < 0.01].max() < 0.0004
    np.testing.assert_array_equal(mu_law.encode([-3.0, 3.0]), [0, 255])
    # The formula of the paper, by hand.
    want = np.log(1 + 255 * 0.25) / np.log(256)
    assert mu_law.encode(0.25) == round((want + 1) / 2 * 255)


def test_recordings_are_cut_in_two_parts():
    train, held_out = (sound_documents(10, split) for split in ("train", "validation"))
    assert len(train) == len(held_out) == len(CHARACTERS) == 36
    for one, other in zip(train, held_out, strict=True):
        first, second = ([int(x) for x in text.removeprefix("= ").split()] for text in (one, other))
        assert len(second) == (len(first) + len(second)) * 10 // 100
        assert 0 <= min(first + second) <= max(first + second) <= 255
    seconds = sum(text.count(" ") for text in (*train, *held_out)) / 8000
    assert seconds == pytest.approx(19.5, abs=0.1)


def test_a_file_of_another_form_is_named(tmp_path, monkeypatch):
    (tmp_path / "default.wav").write_bytes(b"RIFF....WAVEjunk")
    where = "genai_jax.data.audio.spoken_characters.package_file"
    monkeypatch.setattr(where, lambda *_: tmp_path / "default.wav")
    with pytest.raises(ConfigError, match=r"default\.wav"):
        sound_documents(10, "train")
