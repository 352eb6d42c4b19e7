"""Files that somebody else wrote: whatever lies there, one line names it, and nothing waits."""

import ast
import functools
import itertools
import json
import os
import pathlib
import re
import struct
import zlib
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from genai_jax import files, fit, media
from genai_jax.components import parse_run
from genai_jax.config import (
    Config,
    ConfigError,
    field,
    parse,
)
from genai_jax.data.text.files import read as read_documents
from genai_jax.data.text.tokenization import load_tokenizer
from genai_jax.flagfiles import expand_flagfiles, flag_values
from genai_jax.scaling.report import show_dollars
from genai_jax.tasks.arrays.walks import read_latents
from genai_jax.tasks.words.data import read_vocabulary
from genai_jax.training.ema_profiles import reconstruct
from tests.conftest import ROOT
from tests.damage import DAMAGES, damage
from tests.data.text.formats import write_documents

SUFFIXES = (".txt", ".jsonl", ".csv", ".parquet", ".txt.gz", ".jsonl.zst")
# Readers of files in a workdir or of a flag: path -> what the reader returns.
READERS = {
    "flagfile": lambda path: expand_flagfiles([f"--flagfile={path}"]),
    "JSON": files.read_object,
    "tokenizer.json": lambda path: load_tokenizer(str(path)),
    "tokenizer.model": lambda path: load_tokenizer(str(path)),
    "picture": lambda path: media.read_image(str(path), (8, 8, 3), flag="init_image", levels=256),
    "latents": lambda path: read_latents(str(path), 3),
    "vocabulary": read_vocabulary,
    "CSV": lambda path: fit.main([f"--csv={path}", f"--output={path}.report"]),
    **{f"text{suffix}": lambda path: read_documents(str(path), strict=True) for suffix in SUFFIXES},
}
# Each opens files of its own, of this project, or of Python, and nothing that a user names.
OPEN_THEIR_OWN = {
    "genai_jax/files.py",
    "genai_jax/data/text/stdlib.py",
    "genai_jax/scaling/chips.py",
    "genai_jax/scaling/study/runs.py",
    "genai_jax/training/distributed.py",
    "genai_jax/training/metrics_log.py",
    "genai_jax/training/readable.py",
}


class Call(NamedTuple):
    """A function call in the project that may open a file."""

    where: str  # file:line
    function: str  # "open", "path.read_text", "np.load"
    method: bool
    mode: str  # of open
    keywords: set[str]

    @property
    def file(self) -> str:
        return self.where.split(":")[0]


@functools.cache
def calls() -> list[Call]:
    found = []
    packages = [(ROOT / name).rglob("*.py") for name in ("genai_jax", "kernels_pallas")]
    for path in itertools.chain(*packages):
        text = path.read_text(encoding="utf-8")
        if not re.search(r"\b(open|read_text|write_text|read_bytes|load\w*|from_?file)\(", text):
            continue
        nodes = ast.walk(ast.parse(text))
        for node in (node for node in nodes if isinstance(node, ast.Call)):
            method = isinstance(node.func, ast.Attribute)
            given = {k.arg: k.value for k in node.keywords}
            mode = given.get("mode", node.args[1 - method] if len(node.args) > 1 - method else None)
            mode = mode.value if isinstance(mode, ast.Constant) else "r"
            where = f"{path.relative_to(ROOT)}:{node.lineno}"
            found.append(Call(where, ast.unparse(node.func), method, str(mode), set(given)))
    return found


def test_text_is_read_and_written_in_utf8_everywhere():
    def is_text(call: Call) -> bool:
        name = call.function.rpartition(".")[2]
        opens = call.function == "open" or (name == "open" and "newline" in call.keywords)
        opens = opens and "b" not in call.mode
        return opens or (call.method and name in ("read_text", "write_text"))

    texts = [call for call in calls() if is_text(call)]
    assert [call.where for call in texts if "encoding" not in call.keywords] == []
    assert len(texts) > 5


def test_users_files_are_opened_in_one_place():
    """Another way to open a file could wait for a pipe, or read without end."""

    def reads(call: Call) -> bool:
        if call.function == "open":
            return not set(call.mode) & set("wax")
        name = call.function.rpartition(".")[2]
        loads = call.function in ("np.load", "json.load", "np.loadtxt", "np.genfromtxt")
        return loads or (
            call.method and name in ("read_text", "read_bytes", "from_file", "fromfile")
        )

    reading = [call for call in calls() if call.file.startswith("genai_jax/") and reads(call)]
    assert {call.file for call in reading} - OPEN_THEIR_OWN == set()


def write_good(reader: str, path: pathlib.Path):
    """A file that the reader accepts, or at least begins to understand."""
    if reader == "picture":
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(path, "PNG")
    elif reader == "latents":
        with open(path, "wb") as file:
            np.save(file, np.ones((2, 3), np.float32))
    elif reader == "CSV":
        path.write_text("parameters,tokens,loss\n1,2,3\n")
    elif reader == "flagfile":
        path.write_text("--seed=1\n")
    elif reader == "tokenizer.json":
        words(path, {"</s>": 0, "a": 1})
    elif reader.startswith("text"):
        write_documents(path, ["one", "two"])
    else:
        path.write_text('{"a": 1}')


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_survives_every_damage(tmp_path, reader):
    for kind in DAMAGES:
        path = tmp_path / f"{kind.replace(' ', '_')}.{reader.replace('.', '_')}"
        if reader.startswith(("tokenizer", "text")):
            path = tmp_path / f"{kind.replace(' ', '_')}{reader[reader.index('.') :]}"
        write_good(reader, path)
        damage(path, kind)
        if kind == "no permission" and os.geteuid() == 0:
            continue
        try:
            READERS[reader](path)
        except ConfigError as error:
            assert path.name in str(error) and "\n" not in str(error), error
        else:
            assert kind in ("cut", "flipped", "not UTF-8", "other type", "digits", "deep"), kind


def test_a_place_that_cannot_be_written_is_named():
    for path, reason in (("/dev/full", "No space left on device"), ("a\0b", "NUL character")):
        with (
            pytest.raises(ConfigError, match=f"cannot write to --output=x: .*{reason}"),
            files.writing_to("--output=x"),
        ):
            pathlib.Path(path).write_text("text", encoding="utf-8")


def test_the_depth_and_the_digits_of_json_are_bounded():
    for text in ("[" * 90 + "]" * 90, "[" * 10**5, '{"a":' * 10**5, "1" * 10**6, "{", "[1,", ""):
        with pytest.raises(ValueError, match="JSON"):
            files.parse_json(text)
    assert files.parse_json("[" * 60 + "]" * 60) and files.parse_json(str(-(2**63))) == -(2**63)


def chain(folder: pathlib.Path, count: int, times: int) -> pathlib.Path:
    """Flagfiles that each include the next one so many times."""
    for i in range(count):
        (folder / f"{i}.flags").write_text(f"--flagfile={i + 1}.flags\n" * times)
    (folder / f"{count}.flags").write_text("--seed=3\n")
    return folder / "0.flags"


@pytest.mark.parametrize(
    ("count", "times", "said"),
    [(3, 1, ""), (1500, 1, "more than 256 flagfiles"), (22, 2, "more than 256 flagfiles")],
)
def test_flagfiles_that_include_many(tmp_path, count, times, said):
    path = chain(tmp_path, count, times)
    if not said:
        assert expand_flagfiles([f"--flagfile={path}"]) == ["--seed=3"]
        return
    with pytest.raises(ConfigError, match=said):
        expand_flagfiles([f"--flagfile={path}"])


@pytest.mark.parametrize("spelled", ["x.flags", "./x.flags", "../{}/x.flags", "link.flags"])
def test_a_flagfile_that_includes_itself_under_any_name(tmp_path, spelled):
    (tmp_path / "link.flags").symlink_to(tmp_path / "x.flags")
    (tmp_path / "x.flags").write_text(f"--flagfile={spelled.format(tmp_path.name)}\n")
    with pytest.raises(ConfigError, match="includes itself"):
        expand_flagfiles([f"--flagfile={tmp_path / 'x.flags'}"])


@pytest.mark.parametrize("line", ["--workdir=a\0b", "--flagfile=a\0b", '--workdir:="a\\u0000b"'])
def test_a_path_with_nul_is_refused_where_flags_are_read(tmp_path, line):
    path = tmp_path / "x.flags"
    path.write_text(f"--seed=1\n{line}\n")
    with pytest.raises(ConfigError, match="NUL"):
        parse_run([f"--flagfile={path}"])


VALUES = (
    "", "\n", " ", " a", "a ", "a\tb", "a\r\n", "\u2028", "#", "//", '"a"', "\\n", "a=b", "ü", "-",
    ':="x"', "--flagfile=x", "\udce9", "\ufeff", "\x85", "{}", "a\\", "'", "\x1b[2J",
)  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=ascii)
def test_flags_txt_carries_any_value(tmp_path, value):
    import dataclasses

    @dataclasses.dataclass(frozen=True)
    class Run:
        text: str = field("default", "Text.")

    config = Config({"run": Run(value)})
    path = tmp_path / "flags.txt"
    files.write_text(path, config.to_flags())
    assert parse([f"--flagfile={path}"], {"run": Run})[0] == config
    assert flag_values(files.read_text(path)) == {"text": value}


def test_what_older_versions_wrote_means_what_it_did(tmp_path):
    path = tmp_path / "flags.txt"
    path.write_bytes(b'\xef\xbb\xbf--a.b="x\\n" \r\n--c=\\\n# note\n--d:e\n')
    assert expand_flagfiles([f"--flagfile={path}"]) == ['--a.b="x\\n"', "--c=\\", "--d:e"]


def words(path, vocab, unknown="</s>", **more) -> str:
    """A word-level tokenizer's file."""
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": unknown}
    special = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [{"id": 0, "content": "</s>", "special": True, **special}]
    parts = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor", "decoder"))
    parts |= {"version": "1.0", "added_tokens": added, "model": model}
    parts |= {"pre_tokenizer": {"type": "Whitespace"}} | more
    pathlib.Path(path).write_text(json.dumps(parts))
    return str(path)


def test_tokenizers_that_their_library_fails_on(tmp_path):
    path = tmp_path / "t.json"
    assert load_tokenizer(words(path, {"</s>": 0, "a": 1})).encode("a b").tolist() == [1, 0]
    with pytest.raises(ConfigError, match=r"t.json' has ids up to 2,000,000,000; at most"):
        load_tokenizer(words(path, {"</s>": 0, "a": 2_000_000_000}))
    tokenizer = load_tokenizer(words(path, {"</s>": 0, "a": 1}, unknown="[UNK]"))
    with pytest.raises(ConfigError, match=r"t.json' cannot encode 'b'.*\[UNK\]"):
        tokenizer.encode("b")
    split = {"type": "Split", "pattern": {"Regex": "(a|aa)+$"}, "behavior": "Isolated"}
    path = words(path, {"</s>": 0, "a": 1}, pre_tokenizer=split | {"invert": False})
    with pytest.raises(ConfigError, match=r"t.json' cannot encode 'aaa.*retry-limit"):
        load_tokenizer(path).encode("a" * 40 + "b")  # a panic, which is no Exception


def png(width: int, height: int, *chunks: bytes) -> bytes:
    """A PNG whose header announces a size, whatever follows."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in
             (header, *chunks)]  # fmt: skip
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_the_size_of_a_picture_is_read_before_its_pixels(tmp_path):
    path = tmp_path / "bomb.png"
    for width, said in ((20_000, "too many pixels"), (9_000, "is 9000x9000 with 3 channel")):
        path.write_bytes(png(width, width, b"IDAT" + zlib.compress(bytes(10**6))))
        with pytest.raises(ConfigError, match=said):
            media.read_image(str(path), (8, 8, 3), flag="init_image", levels=256)
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n")  # a program, run by some
    with pytest.raises(ConfigError, match="it is not an image"):
        media.read_image(str(path), (8, 8, 3), flag="init_image", levels=256)


def test_no_cut_or_flipped_picture_is_a_traceback(tmp_path):
    whole, path = tmp_path / "whole.png", tmp_path / "damaged.png"
    Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(whole)
    data = whole.read_bytes()
    cut = [data[:i] for i in range(len(data))]
    flipped = [data[:i] + bytes([data[i] ^ 0xFF]) + data[i + 1 :] for i in range(len(data))]
    refused = 0
    for damaged in cut + flipped:
        path.write_bytes(damaged)
        try:
            media.read_image(str(path), (8, 8, 3), flag="init_image", levels=256)
        except ConfigError as error:
            refused += "damaged.png" in str(error)
    assert refused > len(data)


def snapshot(folder: pathlib.Path, step: int, **arrays):
    folder.mkdir(exist_ok=True)
    with open(folder / f"{step}.npz", "wb") as file:
        np.savez(file, **{name.replace("__", "/"): array for name, array in arrays.items()})


def test_a_snapshot_of_another_model_is_not_used(tmp_path, capsys):
    shapes = {"w": np.zeros((2, 3))}
    good = np.ones((2, 3), np.float32)
    for step in (2, 4):
        snapshot(tmp_path / "ema", step, **{"width0.1__w": good})
    (tmp_path / "ema" / "notes.npz").write_text("mine")
    np.testing.assert_allclose(reconstruct(tmp_path, 0.1, 4, shapes)["w"], 1.0, atol=1e-6)
    assert "notes.npz is not a snapshot" in capsys.readouterr().err
    bad = {
        "shape": {"width0.1__w": np.ones((3, 2), np.float32)},
        "dtype": {"width0.1__w": np.ones((2, 3), np.float64)},
        "objects": {"width0.1__w": np.array([[None] * 3] * 2)},
        "names": {"width0.1__v": good},
        "average": {"0.9__w": good},
        "text": {"width__w": good},
        "nothing": {},
    }
    for arrays in bad.values():
        snapshot(tmp_path / "ema", 2, **arrays)
        with pytest.raises(ConfigError, match=r"2.npz: it is not an intact snapshot"):
            reconstruct(tmp_path, 0.1, 4, shapes)


def test_figures_show_dollars_as_they_are(tmp_path):
    from matplotlib.figure import Figure

    bad = (r"$\nonsense$", "$a $", "$_$", r"\$$\x$")
    figure = Figure()
    axes = figure.subplots()
    axes.plot([1, 10, 1000], [1, 2, 3], label=bad[0])
    axes.set(title=bad[1], xlabel=bad[2], ylabel=bad[3], xscale="log")
    axes.set_yticks(range(1, 4), bad[:3])
    axes.legend()
    figure.suptitle(bad[0])
    show_dollars(figure)
    figure.savefig(tmp_path / "figure.png")
    assert axes.title.get_text() == bad[1] and not axes.title.get_parse_math()
    assert all(label.get_parse_math() for label in axes.get_xticklabels())


def test_a_csv_file_is_bounded_in_rows(tmp_path, monkeypatch):
    from genai_jax.scaling.fits import points

    monkeypatch.setattr(points, "MAX_ROWS", 10)
    path = tmp_path / "many.csv"
    path.write_text("parameters,tokens,loss\n" + "1,2,3\n" * 11)
    with pytest.raises(ConfigError, match="more than 10 rows"):
        points.read_csv(str(path), points.Columns())


def test_writing_does_not_follow_what_lies_there(tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("mine")
    for lay in (os.mkfifo, lambda path: path.symlink_to(outside), lambda path: path.write_text("")):
        temporary = tmp_path / "flags.txt.tmp"
        lay(temporary)
        files.write_text(tmp_path / "flags.txt", "ü")
        assert (tmp_path / "flags.txt").read_bytes() == "ü".encode() and not temporary.exists()
    assert outside.read_text() == "mine"


def test_what_is_not_a_regular_file_is_named(tmp_path):
    for path, said in ((tmp_path, "a folder"), ("/dev/zero", "a device"), ("a\0b", "NUL")):
        for read in (files.read_bytes, files.read_text, files.read_json):
            with pytest.raises(ConfigError, match=said):
                read(path)
    assert list(itertools.islice(files.read_bytes("/proc/self/cmdline"), 1))  # of size 0, they say
