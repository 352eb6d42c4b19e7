"""``text:PATH`` in every format: what was written is what is read, and nothing else."""

import io
import itertools
import json
import lzma
import os
import sys
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

from genai_jax.config import ConfigError
from genai_jax.data.text import contents, files, tables
from genai_jax.data.text.loader import DataConfig
from genai_jax.data.text.sources import open_source
from tests.data.text.formats import COMPRESSIONS, FORMATS, compressed, content, write_documents

DOCUMENTS = [
    'He said "no", twice.\nA second line\r\nand a\ttab; ünïcödé \U0001f600\u2028end',
    "plain", "x" * 200_000, "[1, 2]", "'", "a,b;c\td", "trailing space ", "same", "same",
]  # fmt: skip


def read(path, **options) -> list[str]:
    return files.read(str(path), **{"strict": True, **options})


def refused(path, **options) -> str:
    with pytest.raises(ConfigError) as error:
        read(path, **options)
    assert "\n" not in str(error.value) and str(error.value).isprintable()
    return str(error.value)


@pytest.mark.parametrize(("kind", "packed"), [*itertools.product(FORMATS, COMPRESSIONS)])
def test_what_was_written_is_read(tmp_path, kind, packed):
    path = tmp_path / f"a.{kind}{packed}"
    write_documents(path, DOCUMENTS, "body" if kind not in ("txt", "md") else "")
    for strict in (True, False):
        assert read(path, text_key="body", strict=strict) == DOCUMENTS
    if packed:  # as several members, as parallel compressors write
        data = content(f".{kind}", DOCUMENTS, "body")
        path.write_bytes(compressed(data[:50], packed) + compressed(data[50:], packed))
        assert read(path, text_key="body") == DOCUMENTS
    write_documents(path.with_name(f"A.{kind.upper()}{packed.upper()}"), ["x"], "body")
    (tmp_path / f"b.{kind}").write_bytes(b"")
    assert "has no text to train on" in refused(tmp_path / f"b.{kind}")


def test_a_folder_of_all_formats_is_read_in_order(tmp_path, capsys):
    names = [f"{kind}{packed}" for kind in FORMATS for packed in COMPRESSIONS]
    outside = tmp_path / "outside"
    outside.mkdir()
    expected = []
    folder = tmp_path / "folder"
    folder.mkdir()
    for i, name in enumerate(sorted(names)):
        place = outside if i % 2 else folder
        documents = [f"{name} {j}" for j in range(1 if name.startswith(("txt", "md")) else 3)]
        write_documents(place / f"{i:02}.{name}", documents)
        expected += documents
    (folder / "link").symlink_to(outside)
    (outside / "back").symlink_to(folder)
    assert sorted(read(folder)) == sorted(expected)
    size = sum(map(len, expected))
    said = f"{len(names)} files, {len(expected)} documents, {size} bytes; the first begins: "
    assert capsys.readouterr().err == f"note: text:{folder}: {said}{expected[0]}\n"


def test_rows_without_text_are_counted(tmp_path, capsys):
    for kind in ("jsonl", "csv", "parquet"):
        path = tmp_path / f"a.{kind}"
        write_documents(path, ["one", None, "", " ", "two", None])
        assert read(path) == ["one", "two"]
        assert "skipped 4 rows without text\n" in capsys.readouterr().err
        write_documents(path, [None, ""])
        assert "has no text to train on" in refused(path)


def test_a_missing_column_names_those_that_there_are(tmp_path):
    for kind in ("jsonl", "csv", "tsv", "parquet"):
        path = tmp_path / f"a.{kind}"
        write_documents(path, DOCUMENTS, "body")
        said = refused(path)
        assert said.startswith(f"--data.text_key=text is missing in {path}: ")
        assert said.endswith(" 'id', 'body'")
    (tmp_path / "b.csv").write_text("text,text\na,b\n")
    assert "is the name of more than one column" in refused(tmp_path / "b.csv")
    columns = ",".join(f"\x1b[2J{i}" for i in range(1000))
    (tmp_path / "c.csv").write_text(f"{columns}\n")
    assert refused(tmp_path / "c.csv").endswith("and 980 more")


def test_text_key_is_refused_where_nothing_has_columns(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    for path in (tmp_path, tmp_path / "a.txt"):
        config = DataConfig(dataset=f"text:{path}", text_key="body")
        with pytest.raises(ConfigError, match=r"--data\.text_key=body applies only to TFDS data"):
            open_source(config, "train")
    write_documents(tmp_path / "b.jsonl", ["two", "three"], "body")
    for path in (tmp_path, tmp_path / "b.jsonl"):
        open_source(DataConfig(dataset=f"text:{path}", text_key="body"), "train")
    config = DataConfig(dataset=f"text:{tmp_path / 'nowhere'}", text_key="body")
    with pytest.raises(ConfigError, match="no such file or folder"):
        open_source(config, "train")


def test_advice_for_one_document_fits_the_format(tmp_path):
    for name, advice in (
        ("a.jsonl", "add rows"), ("a.csv.gz", "add rows"), ("a.md", "add documents, or separate"),
        ("a.txt.gz", "add documents, or separate"),
    ):  # fmt: skip
        write_documents(tmp_path / name, ["only this"])
        config = DataConfig(dataset=f"text:{tmp_path / name}")
        with pytest.raises(ConfigError, match=f"none is left for validation: {advice}"):
            open_source(config, "validation")


def not_text() -> dict[str, bytes]:
    """Name -> content of files that are not text."""
    picture, zipped, packed, array = (io.BytesIO() for _ in range(4))
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(picture, format="PNG")
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("a.txt", "text")
    with tarfile.open(fileobj=packed, mode="w") as archive:
        archive.add(__file__, "a.py")
    np.save(array, np.arange(3))
    with open(sys.executable, "rb") as program:
        start = program.read(10_000)
    text = content(".txt", DOCUMENTS, "")
    return {
        "x.xz": lzma.compress(b"text"), "x.png": picture.getvalue(), "x.docx": zipped.getvalue(),
        "x.npy": array.getvalue(), "x": start, "x.tar": packed.getvalue(),
        "x.tar.gz": compressed(packed.getvalue(), ".gz"), "x.md": bytes(1) + text,
        "x.log": text + bytes(range(1, 32)) * 99, "x.bin": np.random.default_rng(0).bytes(50),
        # of another kind than the name says
        "a.txt": compressed(text, ".gz"), "b.txt": compressed(text, ".zst"),
        "c.txt": content(".parquet", ["a"], "text"), "d.jsonl": picture.getvalue(),
        "e.csv": compressed(text, ".gz"), "f.gz": picture.getvalue(), "g.parquet": start,
    }  # fmt: skip


def test_files_that_are_not_text_are_refused_alone_and_skipped_in_a_folder(tmp_path, capsys):
    odd = not_text()
    for name, data in odd.items():
        (tmp_path / name).write_bytes(data)
        for strict in (True, False):
            said = refused(tmp_path / name, strict=strict)
            assert f"{name} is " in said and "reads plain text" in said
    assert "has no text to train on (skipped: 17 not text: a.txt" in refused(tmp_path)
    (tmp_path / "good.txt").write_text("good")
    assert read(tmp_path) == ["good"]
    said = capsys.readouterr().err
    assert "skipped 17 not text: a.txt (compressed (gzip)), b.txt (compressed (zstd)), " in said
    assert ", ...\n" in said and said.startswith("warning: ") and said.count("\n") == 2


def test_text_of_any_language_is_text(tmp_path):
    for text in ("\x1b[1mbold\x1b[0m\b\x1a", "日本語", "a" * 5000 + "\x01", "\ufeffmark"):
        (tmp_path / "a.txt").write_text(text)
        assert read(tmp_path / "a.txt") == [text.removeprefix("\ufeff")]
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbftext,n\r\none,1\r\n")
    assert read(tmp_path / "a.csv") == ["one"]
    latin = "café;au lait\f\xff".encode("latin-1")
    (tmp_path / "a.txt").write_bytes(latin)
    assert len(read(tmp_path / "a.txt", strict=False)) == 2


DAMAGED = {
    "cut.jsonl": (b'{"text": "one"}\n{"text": "tw', "line 2: it is not valid JSON"),
    "list.jsonl": (b"[1, 2]\n", "line 1 is not a JSON object"),
    "number.jsonl": (b'{"text": 3}\n', "--data.text_key=text of line 1 is not a string but int"),
    "key.jsonl": (b'{"text": "a"}\n{"b": "a"}\n', "line 2 has the keys 'b'"),
    "deep.jsonl": (b'{"text":' + b"[" * 100_000 + b"\n", "JSON"),
    "digits.jsonl": (b'{"text": ' + b"1" * 10**6 + b"}\n", "number of 1000000 digits"),
    "surrogate.jsonl": (b'{"text": "\\ud800"}\n', "row 1 has a lone surrogate (U+D800)"),
    "latin.jsonl": (b'{"text": "a"}\n{"text": "\xe9"}\n', "line 2 of "),
    "quote.csv": (b'text,n\n"one,1\n', "line 2: unexpected end of data"),
    "fields.csv": (b"text,n\none,1\ntwo\n", "ends in line 3 has 1 fields, its header 2"),
    "text.gz": (b"text", "it is not compressed by gzip, although named .gz"),
    "text.zst": (b"text", "it is not compressed by zstd, although named .zst"),
    "text.parquet": (b"text", "it is not a Parquet table, although named .parquet"),
    "start.parquet": (b"PAR1" + b"x" * 50, "its Parquet data are damaged"),
    "utf16.txt": ("text".encode("utf-16"), "is UTF-16 text: convert it to UTF-8"),
    "more.gz": (compressed(b"a", ".gz") + b"garbage", "its gzip data are damaged or cut"),
    "more.zst": (compressed(b"a", ".zst") + b"garbage", "its zstd data are damaged or cut"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files_are_one_line_also_in_a_folder(tmp_path, name):
    data, expected = DAMAGED[name]
    (tmp_path / "z.txt").write_text("good")
    path = tmp_path / name
    path.write_bytes(data)
    for place in (path, tmp_path):
        said = refused(place)
        assert name in said and expected in said


def test_no_cut_or_flipped_file_is_a_traceback(tmp_path):
    refusals = 0
    for name in ("a.txt.gz", "a.txt.zst", "a.parquet", "a.jsonl", "a.csv"):
        path = tmp_path / name
        write_documents(path, ["document one", "document two"])
        data = path.read_bytes()
        cut = [data[:i] for i in range(0, len(data), 3)]
        for i in range(0, len(data), 3):
            cut.append(data[:i] + bytes([data[i] ^ 0xFF]) + data[i + 1 :])
        for damaged in cut:
            path.write_bytes(damaged)
            try:
                read(path)
            except ConfigError as error:
                refusals += 1
                assert name in str(error) and "\n" not in str(error)
    assert refusals > 500


@pytest.mark.parametrize("name", ["a.txt.gz", "a.txt.zst", "a.jsonl.gz", "a.parquet"])
def test_a_small_file_cannot_fill_the_memory(tmp_path, monkeypatch, name):
    path = tmp_path / name
    write_documents(path, ["x" * 100_000] * 30)
    assert path.stat().st_size < 20_000 and len(read(path)) == 30
    monkeypatch.setattr(contents, "ALWAYS_ALLOWED", 10_000)
    assert "more than" in refused(path)
    monkeypatch.setattr(files, "memory", lambda: 2_000_000)
    monkeypatch.setattr(contents, "ALWAYS_ALLOWED", 10**9)
    said = refused(path)
    assert "2,000,000 bytes of text" in said or "more than the memory here allows" in said


def test_a_folder_cannot_fill_the_memory(tmp_path, monkeypatch):
    for i in range(5):
        (tmp_path / f"{i}.txt").write_text("x" * 1000)
    monkeypatch.setattr(files, "memory", lambda: 4500)
    assert "4.txt: its 1,000 bytes are more than the memory here allows" in refused(tmp_path)


def test_names_and_text_cannot_command_the_terminal(tmp_path, capsys):
    (tmp_path / "a\n\x1b[2J.txt").write_bytes(bytes(100))
    (tmp_path / "b.txt").write_text("\x1b[2J first\nwords \u202e" + "and so on " * 20)
    read(tmp_path)
    said = capsys.readouterr().err
    assert said.count("\n") == 2 and said.replace("\n", "").isprintable()
    assert "begins: \\x1b[2J first words \\u202eand so on and" in said
    (tmp_path / "a\n\x1b[2J.txt").write_bytes(b"\xe9")
    refused(tmp_path)


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    write_documents(tmp_path / "a.parquet", ["x", "y"])
    write_documents(tmp_path / "a.txt.zst", ["x", "y"])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for name in ("a.parquet", "a.txt.zst"):
        said = refused(tmp_path / name)
        assert said.endswith('needs the package pyarrow: in the clone, pip install -e ".[tables]"')
    os.mkfifo(tmp_path / "pipe")
    assert "it is a named pipe" in refused(tmp_path / "pipe")
    assert "no such file or folder" in refused("a\0b")


def test_csv_leaves_its_global_limit_as_it_was(tmp_path):
    import csv

    before = csv.field_size_limit()
    write_documents(tmp_path / "a.csv", DOCUMENTS)
    read(tmp_path / "a.csv")
    assert csv.field_size_limit() == before
    assert tables.is_table("A.CSV.GZ") and not tables.is_table("a.json")


def test_null_is_not_the_word_null(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "null"}) + '\n\n{"text": null}\n')
    assert read(tmp_path / "a.jsonl") == ["null"]
