import subprocess
import sys
import time

import pytest

from genai_jax.config import ConfigError
from genai_jax.data.shuffle import permuted
from genai_jax.data.text.loader import DataConfig
from genai_jax.data.text.sources import encode_document, open_source


def documents(config, split):
    source = open_source(config, split)
    return [source[i] for i in range(len(source))]


def both_splits(config):
    return documents(config, "train"), documents(config, "validation")


def text_config(path, **changes):
    return DataConfig(dataset=f"text:{path}", **changes)


def test_importing_the_data_package_is_cheap():
    code = (
        "import sys, genai_jax.data, genai_jax.train_tokenizer\n"
        "heavy = 'jax grain tensorflow torch tensorflow_datasets tokenizers sentencepiece'\n"
        "sys.exit(', '.join(name for name in heavy.split() if name in sys.modules) or 0)"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


def test_python_docs():
    start = time.process_time()
    train, validation = both_splits(DataConfig())
    assert time.process_time() - start < 10
    assert sum(map(len, train)) > 1_000_000 and sum(map(len, validation)) > 20_000
    assert not set(train) & set(validation)
    text = "".join(train + validation)
    assert "json.encoder.JSONEncoder.default\n" in text  # a docstring under its qualified name
    assert 'The "with" statement' in text  # a topic of the language reference
    assert documents(DataConfig(), "train") == train


def test_flags_of_other_data_sets_are_refused():
    for name in ("python_docs", "package_docs", "digit_pixels", "addition:2"):
        with pytest.raises(ConfigError, match=f"--data.text_key=a applies only .*, not {name}"):
            open_source(DataConfig(dataset=name, text_key="a"), "train")
        with pytest.raises(ConfigError, match=f"--data.data_dir=d applies only .*, not {name}"):
            open_source(DataConfig(dataset=name, data_dir="d"), "train")


def test_python_source():
    train, validation = both_splits(DataConfig(dataset="python_source"))
    assert sum(map(len, train)) > 3_000_000 and validation
    assert any("class JSONEncoder" in text for text in train + validation)
    assert not any("class TestJSONEncoder" in text for text in train + validation)


def test_folder_has_one_document_per_file(tmp_path):
    (tmp_path / "sub" / ".hidden").mkdir(parents=True)
    for name in ("b.txt", "a.txt", "sub/c.txt", ".secret", "sub/.hidden/d.txt"):
        (tmp_path / name).write_text(f"file {name}")
    (tmp_path / "empty.txt").touch()
    train, validation = both_splits(text_config(tmp_path))
    assert len(validation) == 1
    assert sorted(train + validation) == ["file a.txt", "file b.txt", "file sub/c.txt"]
    assert train == sorted(train)


def test_file_is_cut_at_form_feeds(tmp_path):
    path = tmp_path / "pages.txt"
    path.write_text("\f".join(["one\n\nstill one", "two", "three", "  "]))
    train, validation = both_splits(text_config(path))
    assert sorted(train + validation) == ["one\n\nstill one", "three", "two"]


@pytest.mark.parametrize("separator", ["\n\n", "\r\n \r\n", "\n"])
def test_file_is_cut_between_paragraphs(tmp_path, separator):
    path = tmp_path / "text.txt"
    text = separator.join(f"paragraph {i} " + "word " * 30 for i in range(600))
    path.write_bytes(text.encode())
    train, validation = both_splits(text_config(path))
    assert len(train) > 5 and validation
    sizes = sorted(map(len, train + validation))
    assert sizes[1] >= 2_000 and sizes[-1] < 9_000  # all but the last one, which is the rest
    position = {document: text.index(document) for document in train + validation}
    assert "".join(sorted(position, key=position.get)) == text


def test_a_single_document_can_be_trained_on_but_not_validated_on(tmp_path):
    path = tmp_path / "tiny.txt"
    path.write_text("only this")
    assert documents(text_config(path), "train") == ["only this"]
    with pytest.raises(ConfigError, match="none is left for validation: add documents, or sep"):
        open_source(text_config(path), "validation")
    with pytest.raises(ConfigError, match=r"none is left for validation: add documents$"):
        open_source(text_config(tmp_path), "validation")


def test_copies_fall_into_the_same_split(tmp_path):
    for i in range(60):
        (tmp_path / f"{i:02}.txt").write_text(f"content {i % 20}")
    train, validation = both_splits(text_config(tmp_path, validation_percent=50))
    assert len(train) == len(validation) == 30
    assert not set(train) & set(validation)


def test_the_split_does_not_depend_on_names(tmp_path):
    for i in range(40):
        for folder, name in (("a", f"{i}"), ("b", f"{99 - i}")):
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / name).write_text(f"content {i}")
    a, b = (documents(text_config(tmp_path / name), "validation") for name in "ab")
    assert len(a) == 2 and set(a) == set(b)


def test_fingerprint_changes_with_content(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("one\ftwo\fthree")
    first = open_source(text_config(path), "train").fingerprint()
    assert first == open_source(text_config(path), "train").fingerprint()
    assert first != open_source(text_config(path), "validation").fingerprint()
    path.write_text("one!\ftwo!\fthree!")
    assert first != open_source(text_config(path), "train").fingerprint()


@pytest.mark.parametrize("content", ["", " \n\n\f\n"])
def test_empty_file(tmp_path, content):
    path = tmp_path / "empty.txt"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"empty\.txt has no text to train on"):
        open_source(text_config(path), "train")


def test_empty_folder_and_missing_path(tmp_path):
    with pytest.raises(ConfigError, match="has no text to train on"):
        open_source(text_config(tmp_path), "train")
    with pytest.raises(ConfigError, match="nowhere: no such file or folder"):
        open_source(text_config(tmp_path / "nowhere"), "train")


def test_not_utf8(tmp_path):
    raw = b"caf\xe9 au lait\fsecond\fthird"
    path = tmp_path / "latin.txt"
    path.write_bytes(raw)
    read = [encode_document(d) for split in both_splits(text_config(path)) for d in split]
    assert sorted(read) == sorted(raw.split(b"\f"))
    with pytest.raises(ConfigError, match=r"latin\.txt is not UTF-8 .*offset 3") as error:
        open_source(text_config(path, tokenizer="tok.json"), "train")
    assert "--data.tokenizer=bytes" in str(error.value) and "\n" not in str(error.value)


def test_unknown_split():
    with pytest.raises(ConfigError, match="'test' is not one of train, validation"):
        open_source(DataConfig(), "test")


@pytest.mark.parametrize("size", [1, 2, 7, 4096, 5000])
def test_permuted_is_a_permutation(size):
    order = [permuted(i, size, (3, 1)) for i in range(size)]
    assert sorted(order) == list(range(size))
    if size > 2:
        assert order != list(range(size)) and order != [
            permuted(i, size, (3, 2)) for i in range(size)
        ]


def test_linked_folders_are_read_once_and_what_is_skipped_is_said(tmp_path, capsys):
    folder, outside = tmp_path / "folder", tmp_path / "outside"
    for path in (folder / "sub", folder / ".git", outside):
        path.mkdir(parents=True)
    for i, path in enumerate((folder / "a", folder / "sub" / "b", outside / "c", outside / "d")):
        path.write_text(f"text {i}")
    for hidden in (folder / ".git" / "x", folder / ".DS_Store"):
        hidden.write_text("hidden")
    (folder / "blank.txt").write_text(" \n")
    (folder / "dangling").symlink_to(tmp_path / "nowhere")
    (folder / "0link").symlink_to(outside)
    (folder / "1link").symlink_to(folder / "sub")
    (outside / "back").symlink_to(folder)
    train, validation = both_splits(text_config(folder))
    assert sorted(train + validation) == [f"text {i}" for i in range(4)]
    said = capsys.readouterr().err
    assert "skipped 2 hidden; 1 not regular (sockets, dangling links); 1 empty\n" in said
    assert "4 files, 4 documents, 24 bytes; the first begins: text 2\n" in said
    assert said.count("\n") == 2


def test_training_gets_most_of_the_text_of_few_documents(tmp_path):
    for i in range(8):
        (tmp_path / "large.txt").write_text(f"{i}" * 100_000)
        (tmp_path / "small.txt").write_text(f"few {i}")
        train, validation = both_splits(text_config(tmp_path))
        assert train == [f"{i}" * 100_000] and validation == [f"few {i}"]
