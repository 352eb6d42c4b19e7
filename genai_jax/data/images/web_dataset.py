"""``webdataset:PATH``: shards in the WebDataset format, tar files of pictures and texts.

Files with the same name up to the first dot are one example, as in `0001.jpg`, `0001.cls`, and
`0001.txt` (or `0001.json`). Nothing is extracted: pictures are read from where they lie.
"""

import os
import tarfile
from typing import Any, NamedTuple

from genai_jax.data.images.picture_folder import SUFFIXES, files_of
from genai_jax.data.images.records import (
    MAX_BYTES,
    Records,
    chosen_caption_key,
    chosen_key,
    classes_of,
    some,
)
from genai_jax.errors import ConfigError, printable
from genai_jax.files import open_regular, parse_json, reason_of, unreadable

TEXTS = (".cls", ".txt", ".json")
MAX_TEXT = 1 << 20  # bytes of a label, caption, or JSON object
MAX_MEMBERS = 1 << 24  # of a shard


class _Place(NamedTuple):
    """Where bytes lie."""

    shard: str
    start: int
    size: int

    def read(self) -> bytes:
        with open_regular(self.shard) as file:
            try:
                file.seek(self.start)
                data = file.read(self.size)
            except OSError as error:
                raise unreadable(self.shard, reason_of(error)) from None
        if len(data) < self.size:
            raise unreadable(self.shard, "it is shorter than when the run began")
        return data


def read_shards(config: Any) -> Records:
    """The examples of a shard, or of all shards in a folder, in order.

    Raises:
      ConfigError: no shards, no pictures in them, or labels or captions that cannot be read.
    """
    path = config.dataset.removeprefix("webdataset:")
    shards, notes = files_of(path, (".tar",), "webdataset")
    examples: list[tuple[str, dict[str, Any]]] = []
    damaged, refused, without = [], 0, 0
    for shard in shards:
        found, problem, others = _examples(shard)
        refused += others
        if problem:
            damaged.append(f"{shard}: {problem}")
            found = dict(list(found.items())[:-1])  # the last one may lack a part
        without += sum("picture" not in parts for parts in found.values())
        examples += [
            (f"{shard}/{name}", parts) for name, parts in found.items() if "picture" in parts
        ]
    if damaged and not examples:
        raise ConfigError(f"no shard of {config.dataset} can be read; the first, {damaged[0]}")
    for count, kind in ((refused, "other files in shards"), (without, "examples without picture")):
        if count:
            notes.append(f"skipped: {count:,} {kind}")
    if damaged:
        notes.append(f"read as far as possible: {some(damaged)}")
    names = [printable(name) for name, _ in examples]
    fields = [_fields(name, parts) for name, (_, parts) in zip(names, examples, strict=True)]
    keys = sorted({key for row in fields for key in row})
    classes, labels, captions = (), None, None
    usual = config.label_key == "label" and "cls" in keys
    wanted = "cls" if usual else config.label_key
    if key := chosen_key("label_key", wanted, "label", keys, config.dataset):
        values = [row.get(key, "") for row in fields]
        classes, labels = classes_of(values, f"{key} of {config.dataset}")
    if key := _caption_key(config, keys):
        captions = [str(row.get(key) or "") for row in fields]
        missing = [name for name, text in zip(names, captions, strict=True) if not text]
        notes += [f"without a caption: {some(missing)}"] * bool(missing)
    places = [parts["picture"] for _, parts in examples]
    return Records(
        names, lambda i: places[i].read(), classes, labels, captions, None, notes, shards
    )


def _caption_key(config: Any, keys: list[str]) -> str | None:
    if not config.caption_key and "txt" in keys:
        return "txt"
    return chosen_caption_key(config, keys, config.dataset)


def _examples(shard: str) -> tuple[dict[str, dict[str, Any]], str, int]:
    """The examples of a shard: name -> kind of part -> where it lies.

    Returns:
      The examples, what ended the reading early, and how many other files there are.
    """
    examples: dict[str, dict[str, Any]] = {}
    others = 0
    with open_regular(shard) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            with tarfile.open(fileobj=file, mode="r:") as archive:
                for number, member in enumerate(archive):
                    archive.members = []  # which would grow with the shard
                    if number >= MAX_MEMBERS:
                        return examples, f"it has more than {MAX_MEMBERS:,} files", others
                    name, kind = _kind(member)
                    if not kind or member.offset_data + member.size > size:
                        others += not member.isdir()
                        continue
                    place = _Place(shard, member.offset_data, member.size)
                    examples.setdefault(name, {}).setdefault(kind, place)
                file.seek(archive.offset)
                if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                    # Such a block, or none, ends an archive without an error.
                    return examples, f"it is cut or damaged at byte {archive.offset:,}", others
        except Exception as error:  # of many types, for damaged archives
            return examples, f"it is a damaged tar file ({reason_of(error)})", others
    return examples, "", others


def _kind(member: tarfile.TarInfo) -> tuple[str, str]:
    """The name of the example that a file belongs to, and the kind of part it is, or ""."""
    folder, base = os.path.split(member.name)
    stem, _, suffix = base.partition(".")
    suffix = f".{suffix.lower()}"
    # Links, devices, and the like could lead out of the archive; sparse files are not contiguous.
    if not member.isreg() or member.issparse() or base.startswith("."):
        return "", ""
    kind = "picture" if suffix in SUFFIXES else suffix if suffix in TEXTS else ""
    if member.size > (MAX_BYTES if kind == "picture" else MAX_TEXT):
        return "", ""
    return os.path.join(folder, stem), kind


def _fields(name: str, parts: dict[str, Any]) -> dict[str, Any]:
    """What is known of an example besides its picture: cls, txt, and the keys of its JSON."""
    fields: dict[str, Any] = {}
    for kind in TEXTS:
        if kind not in parts:
            continue
        try:
            text = parts[kind].read().decode("utf-8-sig")
            value = parse_json(text) if kind == ".json" else text.strip()
        except ConfigError:
            raise
        except ValueError as error:
            raise unreadable(name + kind, printable(str(error))) from None
        if kind != ".json":
            fields[kind[1:]] = value
        elif isinstance(value, dict):
            fields = {**value, **fields}
    return fields
