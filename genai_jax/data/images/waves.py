"""One-dimensional signals: periodic waveforms of random frequency, phase and amplitude."""

import hashlib

import numpy as np

from genai_jax.config import ConfigError

LENGTH = 128
FORMS = ("sine", "square", "sawtooth", "triangle")
PITCHES = {"low": (2.0, 3.5), "high": (6.0, 9.0)}  # range of the periods in a signal
COUNTS = {"train": 20_000, "validation": 2_000}


class Waves:
    """One split; each signal is a function of its index."""

    levels = 256
    label_names = (FORMS, tuple(PITCHES))
    has_captions = True
    can_flip = False  # a sawtooth would fall instead of rise

    def __init__(self, split: str, length: int):
        self.split = split
        self.shape = (length, 1)
        self.name = f"waves{length}[{split}]"

    def __len__(self) -> int:
        return COUNTS[self.split]

    def __getitem__(self, index: int) -> dict:
        rng = np.random.default_rng((index, list(COUNTS).index(self.split), 11))
        form, pitch = int(rng.integers(len(FORMS))), int(rng.integers(len(PITCHES)))
        periods = rng.uniform(*list(PITCHES.values())[pitch])
        phase = np.arange(self.shape[0]) / self.shape[0] * periods + rng.uniform()
        signal = rng.uniform(0.6, 0.95) * _wave(FORMS[form], phase % 1.0)
        signal = signal + rng.normal(0, 0.01, signal.shape)
        image = np.round((np.clip(signal, -1, 1) + 1) * 127.5).astype(np.uint8)[:, None]
        caption = f"a {list(PITCHES)[pitch]} {FORMS[form]} wave"
        return {"image": image, "labels": np.array([form, pitch], np.int32), "caption": caption}

    def fingerprint(self) -> str:
        first = b"".join(self[i]["image"].tobytes() for i in range(8))
        return hashlib.sha256(f"{self.name} {len(self)}".encode() + first).hexdigest()


def _wave(form: str, phase: np.ndarray) -> np.ndarray:
    """The waveform at each phase, with the period [0, 1)."""
    if form == "sine":
        return np.sin(2 * np.pi * phase)
    if form == "square":
        return np.where(phase < 0.5, 1.0, -1.0)
    if form == "sawtooth":
        return 2 * phase - 1
    return 1 - 4 * abs(phase - 0.5)


def open_waves(config, split: str) -> Waves:
    length = config.image_size or LENGTH
    if length % 16:
        raise ConfigError(
            f"--data.image_size={length}: the length of waves must be a multiple of 16"
        )
    return Waves(split, length)
