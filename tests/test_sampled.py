"""What sampling returns, written by suffix and read back."""

import json

import numpy as np
import pytest
from PIL import Image

from genai_jax import media
from genai_jax.config import ConfigError
from genai_jax.requests import SampleRequest, origin_of
from genai_jax.sampled import (
    ARRAY_SUFFIXES,
    TEXT_SUFFIXES,
    Arrays,
    Files,
    Texts,
    check_suffix,
    prepare_output,
    with_origin,
)

ORIGIN = origin_of(SampleRequest(workdir="run", seed=5, ema="0.9", output="x"), 12)
NAMES = (("red", "blue"), ("small", "large"))
LABELS = np.array([[0, 1], [1, 0], [1, 1]], np.int32)


def arrays(*space: int, channels: int = 3, **more) -> Arrays:
    shape = (3, *space, channels)
    values = np.random.default_rng(0).integers(0, 17, shape).astype(np.uint8)
    return Arrays("x", values, 17, LABELS, NAMES, origin=ORIGIN, **more)


def lines_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_arrays_are_read_back_with_what_is_known_about_them(tmp_path):
    prompts = ["a", "b", "ü"]
    strip = np.zeros((1, 2, 4, 4, 3), np.uint8)
    sampled = arrays(4, 4, prompts=prompts, strip=strip)
    for name in ("x.npy", "X.NPY"):  # a suffix counts in any case
        paths = sampled.write(str(tmp_path / name), tmp_path)
        np.testing.assert_array_equal(np.load(paths[0]), sampled.examples)
        assert np.load(paths[1]).shape == strip.shape
    (path,) = sampled.write(str(tmp_path / "new" / "x.npz"), tmp_path)
    with np.load(path, allow_pickle=False) as file:
        read = dict(file)
    np.testing.assert_array_equal(read["images"], sampled.examples)
    np.testing.assert_array_equal(read["labels"], LABELS)
    assert read["label_names"].tolist() == ["red:large", "blue:small", "blue:large"]
    assert read["prompts"].tolist() == prompts and read["strip"].shape == strip.shape
    assert (read["seed"], read["step"], read["levels"]) == (5, 12, 17)
    assert json.loads(str(read["settings"])) == {"seed": 5, "ema": "0.9", "member": 0}


@pytest.mark.parametrize("channels", [2, 4, 5])
@pytest.mark.parametrize("space", [(4, 5), (2, 4, 5)])
def test_images_of_other_channels_go_to_arrays_alone(tmp_path, space, channels):
    sampled = arrays(*space, channels=channels)
    for name in ("", "x.png", "x.jpg", "x.gif", "folder/"):
        output = name and str(tmp_path / name)
        with pytest.raises(ConfigError, match=f"with {channels} channels .* .npy or .npz") as error:
            sampled.write(output + "/" * name.endswith("/"), tmp_path)
        assert "\n" not in str(error.value)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    for name in ("x.npy", "x.npz"):
        (path,) = sampled.write(str(tmp_path / name), tmp_path)
        read = np.load(path)
        np.testing.assert_array_equal(read if name == "x.npy" else read["images"], sampled.values)
    signals = arrays(16, channels=channels)  # each channel is a line
    assert signals.write(str(tmp_path / "signals.png"), tmp_path)


@pytest.mark.parametrize(
    ("space", "suffix"), [((16,), ".png"), ((4, 5), ".png"), ((3, 4, 5), ".gif")]
)
def test_a_folder_has_a_picture_of_each_and_says_what_it_is(tmp_path, space, suffix):
    sampled = arrays(*space)
    assert sampled.write(f"{tmp_path}/new/", tmp_path) == [str(tmp_path / "new")]
    rows = lines_of(tmp_path / "new" / "metadata.jsonl")
    names = [f"0000{i}{suffix}" for i in range(3)]
    assert [row["file_name"] for row in rows] == names
    assert {path.name for path in (tmp_path / "new").iterdir()} == {*names, "metadata.jsonl"}
    assert rows[1] == {"file_name": names[1], "label": "blue:small", "step": 12, "seed": 5}
    if len(space) == 2:
        image = media.read_image(
            str(tmp_path / "new" / names[2]), (4, 5, 3), flag="init_image", levels=17
        )
        np.testing.assert_array_equal(image, sampled.examples[2])


def test_the_picture_is_the_one_that_is_written(tmp_path):
    sampled = arrays(4, 4, channels=1, columns=3)
    for name in ("x.png", "x.jpg", "x.gif"):
        (path,) = sampled.write(str(tmp_path / name), tmp_path)
        with Image.open(path) as file:
            apart = np.abs(np.asarray(file.convert("RGB"), int) - sampled.picture())
        assert apart.max() <= (0 if name != "x.jpg" else 16)
    (path,) = sampled.write("", tmp_path / "samples")
    assert path == str(tmp_path / "samples" / "x_step-12_ema-0.9.png")


def test_texts_are_written_with_their_prompts(tmp_path):
    texts = Texts(["ab\nc", "añ"], ["a", "a"], ORIGIN)
    assert texts.write("", tmp_path)[1] == "--- sample 2 of 2\nañ"
    known = {"seed": 5, "ema": "0.9", "member": 0, "step": 12}
    expected = [{"prompt": "a", "sample": i, **known} for i in range(2)]
    texts.write(str(tmp_path / "x.jsonl"), tmp_path)
    rows = lines_of(tmp_path / "x.jsonl")
    assert rows == [{**row, "text": t} for row, t in zip(expected, texts.texts, strict=True)]
    texts.write(str(tmp_path / "x.txt"), tmp_path)
    assert "--- sample 1 of 2\nab\nc\n" in (tmp_path / "x.txt").read_text()
    (tmp_path / "folder").mkdir()
    assert texts.write(str(tmp_path / "folder"), tmp_path) == [str(tmp_path / "folder")]
    assert (tmp_path / "folder" / "00001.txt").read_text(encoding="utf-8") == "añ"
    rows = lines_of(tmp_path / "folder" / "metadata.jsonl")
    assert rows[0] == {"file_name": "00000.txt", **expected[0]}
    assert lines_of_plain(tmp_path) == [{"text": "x", "sample": 0}]


def lines_of_plain(folder) -> list[dict]:
    """What a family that knows no prompts writes."""
    Texts(["x"]).write(str(folder / "plain.jsonl"), folder)
    return lines_of(folder / "plain.jsonl")


def test_files_of_another_kind_keep_their_suffix(tmp_path):
    write = lambda path: path.write_text("sound")
    files = with_origin(Files("x", {".wav": write, "_score.png": write}), ORIGIN)
    paths = files.write(str(tmp_path / "y.wav"), tmp_path)
    assert paths == [str(tmp_path / "y.wav"), str(tmp_path / "y_score.png")]
    with pytest.raises(ConfigError, match=r"--output=y.mp3 must end in \.wav$"):
        files.write("y.mp3", tmp_path)
    with pytest.raises(ConfigError, match=r"are files \(\.wav, _score\.png\)"):
        print(files.values)


@pytest.mark.parametrize("name", ["x.tif", "x", "x.npy.gz", ".png", "x.jsonl"])
def test_an_unfit_suffix_is_refused(name):
    with pytest.raises(ConfigError, match=r"must end in \.png, .*\.npz, or / for a folder$"):
        check_suffix(name, ARRAY_SUFFIXES)


def test_names_that_fit(tmp_path):
    for name in ("x.PNG", "a/x.npz", "new/", str(tmp_path), ""):
        check_suffix(name, ARRAY_SUFFIXES)
    for name in ("x.txt", "x", "/dev/stdout", "new/", ""):
        check_suffix(name, TEXT_SUFFIXES)
    with pytest.raises(ConfigError, match=r"x\.md must end in \.txt, \.jsonl, or / for a folder"):
        check_suffix("x.md", TEXT_SUFFIXES)
    check_suffix("x.anything", None)


def test_a_folder_is_new_or_empty_and_can_be_written(tmp_path):
    prepare_output(f"{tmp_path}/a/b/")
    prepare_output(f"{tmp_path}/a/b/")  # nothing was left in it
    (tmp_path / "a" / "b" / "mine.txt").write_text("")
    with pytest.raises(ConfigError, match="is a folder that has files"):
        prepare_output(f"{tmp_path}/a/b")
    for name in (f"{tmp_path}/a/b/mine.txt/", "/proc/x/"):
        with pytest.raises(ConfigError, match=f"cannot write to --output={name}"):
            prepare_output(name)


def test_samples_that_are_not_finite_are_neither_returned_nor_written():
    with pytest.raises(ConfigError, match="1 of 2 samples have values that are not finite"):
        Arrays("x", np.array([[[[1]]], [[[-1]]]], np.int16), 256)
