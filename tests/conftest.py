"""Every test runs on the CPU, with compiled programs kept between runs."""

import os
import pathlib

ROOT = pathlib.Path(__file__).parent.parent

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")

import pytest  # noqa: E402


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory) -> pathlib.Path:
    """Forty short documents of made-up sentences, the same every time."""
    folder = tmp_path_factory.mktemp("text")
    line = "the cat saw a red fox near my old barn and it ran home over wet grass"
    words = line.split()
    for i in range(40):
        sentences = [
            " ".join(words[(i * 7 + j * k) % len(words)] for k in range(1, 9)) for j in range(3, 9)
        ]
        (folder / f"{i:02}.txt").write_text(".\n".join(sentences) + ".\n")
    return folder
