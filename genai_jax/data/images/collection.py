"""Pictures of a user: read, checked, split, and decoded, all at once or as they are needed.

What fits into memory is decoded once, in threads (Pillow releases Python's global lock while it
decodes), and kept on disk for the next run. What does not is decoded batch by batch, in the same
threads, ahead of the step. The order of the examples depends on neither.
"""

import functools
import hashlib
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from genai_jax.data.folders import say
from genai_jax.data.images import pixel_cache
from genai_jax.data.images.decoding import Header, Undecodable, decode, read_header
from genai_jax.data.images.records import Records
from genai_jax.data.images.splits import hold_out_pictures
from genai_jax.errors import ConfigError

IN_MEMORY = 2 << 30  # bytes of decoded pictures; less on a machine with less than four times that
RULES = "1"  # of decoding; raised when the same file gives other pixels
CHUNK = 256  # pictures decoded between two looks at the clock


class Collection:
    """All pictures of a data set, of both splits.

    Args:
      config: an `ImageDataConfig`.
      records: the encoded pictures.

    Raises:
      ConfigError: no picture can be read, they differ in size, or too few are left for a split.
    """

    def __init__(self, config: Any, records: Records):
        self.name, self.records = config.dataset, records
        if not records.places:
            raise ConfigError(": ".join([f"{self.name} has no pictures", *records.notes]))
        self.damaged: dict[int, str] = {}
        headers = self._headers()
        self.shape = self._fitting_shape(config, headers)
        frames = [h.frames if h else 0 for h in headers]
        self.starts = np.concatenate([[0], np.cumsum(frames)])  # first row of each record
        self.record_of = np.repeat(np.arange(len(frames)), frames)
        self.pixels = self._decoded() if self._fits() else None
        held_out = self._held_out(config, headers)
        usable = np.array([i not in self.damaged for i in range(len(headers))])
        self._check_any(usable)
        self.rows = {
            "train": np.flatnonzero((usable & ~held_out)[self.record_of]),
            "validation": np.flatnonzero((usable & held_out)[self.record_of]),
        }
        self._say(headers, usable)

    def _headers(self) -> list[Header | None]:
        """The header of each record, None if it is damaged; fills in `digests`."""

        def look(index: int) -> tuple[bytes, Header | str]:
            try:
                data = self.records.read(index)
                return hashlib.sha256(data).digest(), read_header(data)
            except ConfigError as error:
                return b"", self._problem(index, error)

        found = list(in_threads(look, range(len(self.records.places)), f"reading {self.name}"))
        self.digests = [digest for digest, _ in found]
        self.damaged = {i: header for i, (_, header) in enumerate(found) if isinstance(header, str)}
        return [None if isinstance(header, str) else header for _, header in found]

    def _problem(self, index: int, error: ConfigError) -> str:
        """What is wrong with a record, and its name, which errors other than Pillow's have."""
        named = isinstance(error, Undecodable)
        return f"{self.records.places[index]}: {error}" if named else str(error)

    def _fitting_shape(self, config: Any, headers: Sequence[Header | None]) -> tuple[int, int, int]:
        intact = [header for header in headers if header]
        self._check_any([header is not None for header in headers])
        sizes = {(h.height, h.width) for h in intact}
        channels = 1 if all(h.gray for h in intact) else 3
        if config.image_size:
            return config.image_size, config.image_size, channels
        if len(sizes) == 1:
            return *sizes.pop(), channels
        raise ConfigError(
            f"--data.image_size must be set, since the pictures of {self.name} differ in size "
            f"({_range_of(intact)}): each is cropped to a centered square and resized to it"
        )

    def _check_any(self, usable: Iterable[bool]):
        if not any(usable):
            first = min(self.damaged)
            raise ConfigError(
                f"none of the {len(self.records.places):,} pictures of {self.name} can be read; "
                f"the first, {self.damaged[first]}"
            )

    def _fits(self) -> bool:
        return len(self.record_of) * int(np.prod(self.shape)) <= memory_bound()

    def _decoded(self) -> np.ndarray:
        """All pictures, uint8 [rows, *shape]; zeros where they are damaged, which is noted."""
        shape = (len(self.record_of), *self.shape)
        key = hashlib.sha256(f"{RULES} {shape}".encode() + b"".join(self.digests)).hexdigest()
        if cached := pixel_cache.load(key, shape):
            pixels, notes = cached
            for index, reason in notes.items():
                self.damaged[int(index)] = f"{self.records.places[int(index)]}: {reason}"
            return pixels
        pixels, broken = np.zeros(shape, np.uint8), {}

        def fill(index: int):
            start, stop = self.starts[index : index + 2]
            data = self.records.read(index)
            try:
                pixels[start:stop] = decode(data, slice(None), self.shape)
            except Undecodable as error:
                broken[index] = str(error)

        intact = [i for i in range(len(self.digests)) if i not in self.damaged]
        list(in_threads(fill, intact, f"decoding {self.name}"))
        for index in broken:
            self.damaged[index] = f"{self.records.places[index]}: {broken[index]}"
        pixel_cache.save(key, pixels, {str(i): broken[i] for i in sorted(broken)})
        return pixels

    def _held_out(self, config: Any, headers: Sequence[Header | None]) -> np.ndarray:
        """Whether each record is held out, bool [records]."""
        if self.records.held_out is not None:
            return self.records.held_out
        usable = np.array([header is not None for header in headers])
        return hold_out_pictures(
            self.digests, usable, self.records.labels, config.validation_percent
        )

    def example(self, row: int) -> dict[str, Any]:
        """Image, and labels and caption if there are any, of a row."""
        index = int(self.record_of[row])
        if self.pixels is None:
            frame = int(row - self.starts[index])
            data = self.records.read(index)
            image = decode(data, slice(frame, frame + 1), self.shape)[0]
        else:
            image = self.pixels[row]
        example = {"image": image}
        if self.records.classes:
            example["labels"] = self.records.labels[index : index + 1]
        if self.records.captions is not None:
            example["caption"] = self.records.captions[index]
        return example

    def _say(self, headers: Sequence[Header | None], usable: np.ndarray):
        """One line on what was read, and one for each kind of damage."""
        intact = [header for header in headers if header]
        for index in sorted(self.damaged)[:5]:
            say(f"warning: skipped a picture: {self.damaged[index]}")
        if len(self.damaged) > 5:
            say(f"warning: skipped {len(self.damaged) - 5:,} more pictures that cannot be read")
        height, width, channels = self.shape
        count = sum(map(len, self.rows.values()))
        small = sum(min(h.height, h.width) < min(height, width) for h in intact)
        facts = [f"{count:,} pictures"]
        if count != usable.sum():
            facts[0] += f" in {usable.sum():,} files"
        facts[0] += f" ({', '.join(f'{len(rows):,} {name}' for name, rows in self.rows.items())})"
        facts += [_classes(self.records, usable)]
        if self.records.captions is not None:
            facts += ["captions"]
        facts += [f"{_range_of(intact)} pixels, read as {height}x{width}"]
        facts += ["gray" if channels == 1 else "color"]
        facts += [f"{small:,} of them enlarged"] * bool(small)
        facts += ["decoded in memory" if self.pixels is not None else "decoded batch by batch"]
        say(f"note: {self.name}: {'; '.join([*facts, *self.records.notes])}")


def _classes(records: Records, usable: np.ndarray) -> str:
    if not records.classes:
        return "no labels"
    counts = np.bincount(records.labels[usable], minlength=len(records.classes))
    names = [f"{name} {count:,}" for name, count in zip(records.classes, counts, strict=True)]
    shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    return f"{len(names):,} classes ({shown})"


def _range_of(headers: Sequence[Header]) -> str:
    """The sizes, height first, from the smallest to the largest."""
    sizes = sorted({(h.height, h.width) for h in headers}, key=lambda size: size[0] * size[1])
    text = "{0[0]}x{0[1]}".format
    return text(sizes[0]) + (f" to {text(sizes[-1])}" if len(sizes) > 1 else "")


def memory_bound() -> int:
    """Bytes of pictures that are decoded into memory: 2 GiB, or a quarter of the machine's."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(IN_MEMORY, memory // 4)


@functools.cache
def _pool() -> ThreadPoolExecutor:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return ThreadPoolExecutor(cores or 1, thread_name_prefix="pictures")


def in_threads(function: Callable, items: Sequence, doing: str = "") -> Iterable:
    """The results of a function for each item, in order; says how far it is if it takes long."""
    from PIL import Image
    from tqdm import tqdm

    shown = sys.stderr.isatty() and doing
    progress = tqdm(total=len(items), desc=doing, delay=2, leave=False, disable=not shown)
    with warnings.catch_warnings(), progress:
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # refused by their size
        for start in range(0, len(items), CHUNK):  # few at a time, so that Ctrl-C ends it
            part = items[start : start + CHUNK]
            yield from _pool().map(function, part)
            progress.update(len(part))


class Pictures:
    """One split of a collection; see `genai_jax.data.images.sources.ImageSource`."""

    levels = 256

    def __init__(self, collection: Collection, split: str, *, can_flip: bool = True):
        self._collection, self._rows = collection, collection.rows[split]
        records = collection.records
        self.name = f"{collection.name}[{split}]"
        self.shape, self.can_flip = collection.shape, can_flip
        self.label_names = (records.classes,) if records.classes else ()
        self.has_captions = records.captions is not None
        if not len(self._rows):
            raise ConfigError(
                f"{collection.name} has no pictures for {split}: add different pictures"
            )

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The example; if its picture turns out to be damaged, the next that is not."""
        for number in range(len(self._rows)):
            row = int(self._rows[(index + number) % len(self._rows)])
            try:
                return self._collection.example(row)
            except Undecodable as error:
                place = self._collection.records.places[self._collection.record_of[row]]
                say(f"warning: skipped a picture: {place}: {error}")
        raise ConfigError(f"no picture of {self.name} can be read any more")

    def many(self, indices: Iterable[int]) -> list[dict[str, Any]]:
        """The examples at some indices, decoded in parallel."""
        if self._collection.pixels is not None:
            return [self[int(i)] for i in indices]
        return list(_pool().map(self.__getitem__, map(int, indices)))

    def fingerprint(self) -> str:
        """sha256 of the encoded pictures in order, their labels and captions, and the shape."""
        collection, records = self._collection, self._collection.records
        digest = hashlib.sha256(f"{RULES} {self.shape} {list(records.classes)}".encode())
        for row in self._rows:
            index = int(collection.record_of[row])
            digest.update(collection.digests[index])
            if records.classes:
                digest.update(f" {records.labels[index]}".encode())
            if records.captions is not None:
                digest.update(f" {records.captions[index]!r}".encode())
        return digest.hexdigest()
