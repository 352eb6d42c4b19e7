"""``text:PATH``: a user's own text, one file or a folder of them, as documents."""

import os
from collections.abc import Iterator

from genai_jax.data.folders import list_files, say
from genai_jax.data.text.contents import NotText, decode, read_content
from genai_jax.data.text.tables import Column, is_table, read_rows
from genai_jax.errors import ConfigError, MissingFile, printable

MIN_CHARACTERS = 2_000  # from this length on, a group of paragraphs ends at the next blank line
_MAX_CHARACTERS = 8_000  # from this length on, at the next line break: there may be no blank lines
_NAMED = 3  # skipped files that a warning names
_FIRST = 60  # characters of the first document that are shown


def read(path: str, *, strict: bool, text_key: str = "text", quiet: bool = False) -> list[str]:
    """Reads the documents under `path`, and says on stderr what it read.

    The rows of tables (`tables.is_table`) are documents. In a folder, each other file is a
    document, sorted by relative path. Hidden files, empty ones, and those that are not text are
    skipped, which a line on stderr says; a linked folder is read once. A single file of plain text
    is split at form feeds or, if it has none, into groups of paragraphs.

    Args:
      path: a file or a folder.
      strict: reject bytes that are not UTF-8. Otherwise they become lone surrogates
        (``errors="surrogateescape"``), from which the bytes can be recovered.
      text_key: the column or key of the text in tables.
      quiet: say only what was skipped.

    Raises:
      ConfigError: nothing at `path`, no text in it, a file that cannot be read, or a single file
        that is not text.
    """
    files, counts = _files(path)
    in_folder, room = os.path.isdir(path), memory()
    documents: list[str] = []
    binary: list[str] = []
    size, counts["empty"], counts["rows without text"] = 0, 0, 0
    for file in files:
        try:
            data = read_content(file, room - size)
        except NotText as error:
            if not in_folder:
                raise
            binary.append(f"{printable(os.path.relpath(file, path))} ({error.kind})")
            continue
        texts = _texts(file, data, text_key, strict, room - size, split=not in_folder)
        kept = [text for text in texts if text and not text.isspace()]
        if is_table(file):
            counts["rows without text"] += len(texts) - len(kept)
        elif not kept:
            counts["empty"] += 1
        documents += kept
        size += sum(map(len, kept))
    _report_skipped(path, counts, binary, documents)
    if not quiet:
        _report(path, len(files) - len(binary) - counts["empty"], documents)
    return documents


def has_columns(path: str) -> bool:
    """Whether any file that `read` would read is a table."""
    return os.path.exists(path) and any(is_table(file) for file in _files(path)[0])


def is_split(path: str) -> bool:
    """Whether `path` is one file of plain text, which is split into documents."""
    return os.path.isfile(path) and not is_table(path)


def _texts(
    file: str, data: bytes, text_key: str, strict: bool, room: int, split: bool
) -> list[str | None]:
    """The documents of a file, among them blank ones."""
    if is_table(file):
        return read_rows(file, data, Column(text_key), strict=strict, limit=room)
    text = decode(file, data, strict=strict)
    return _split(text) if split else [text]


def _report_skipped(path: str, counts: dict[str, int], binary: list[str], documents: list[str]):
    """Says which files and rows were not read.

    Raises:
      ConfigError: there are no documents.
    """
    place = printable(f"text:{path}")
    names = ", ".join(binary[:_NAMED]) + ", ..." * (len(binary) > _NAMED)
    skipped = [f"{count:,} {kind}" for kind, count in counts.items() if count]
    skipped = [f"{len(binary):,} not text: {names}"] * bool(binary) + skipped
    note = f" (skipped: {'; '.join(skipped)})" if skipped else ""
    if not documents:
        raise ConfigError(f"--data.dataset={place} has no text to train on{note}")
    if binary:
        say(f"warning: {place}: skipped {'; '.join(skipped)}")
    elif skipped:
        say(f"note: {place}: skipped {'; '.join(skipped)}")


def _report(path: str, files: int, documents: list[str]):
    """Says how much was read, and the first words."""
    size = sum(len(text.encode("utf-8", "surrogateescape")) for text in documents)
    first = printable(documents[0][: 4 * _FIRST])
    first = first if len(first) <= _FIRST else first[:_FIRST].rpartition(" ")[0] or first[:_FIRST]
    read = f"{_counted(files, 'file')}, {_counted(len(documents), 'document')}, {size:,} bytes"
    say(f"note: {printable(f'text:{path}')}: {read}; the first begins: {first}")


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + "s" * (number != 1)


def memory() -> int:
    """Most bytes of text to hold: reading and splitting it takes up to four times as much."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4


def _files(path: str) -> tuple[list[str], dict[str, int]]:
    """The files to read, sorted, and how many of which kind are skipped."""
    if "\0" in path or not os.path.lexists(path):
        raise MissingFile(
            f"--data.dataset=text:{printable(path)}: no such file or folder", "data.dataset"
        )
    if not os.path.isdir(path):
        return [path], {}
    return list_files(path)


def _split(text: str) -> list[str]:
    if "\f" in text:
        return text.split("\f")
    return list(_paragraph_groups(text))


def _paragraph_groups(text: str) -> Iterator[str]:
    """Cuts after blank lines; the concatenation of the groups is the text."""
    group, size = [], 0
    for line in text.splitlines(keepends=True):
        group.append(line)
        size += len(line)
        if size >= _MAX_CHARACTERS or (size >= MIN_CHARACTERS and not line.strip()):
            yield "".join(group)
            group, size = [], 0
    if group:
        yield "".join(group)
