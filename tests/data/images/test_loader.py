"""Images, signals and video: the data sets and their batches."""

import numpy as np
import pytest

from genai_jax.config import ConfigError
from genai_jax.data.images.loader import ImageDataConfig, ImageLoader
from genai_jax.data.images.sources import open_images


def loader(seed=0, **settings):
    return ImageLoader(ImageDataConfig(**{"batch_size": 8, "prefetch": 0} | settings), seed)


def first(count, loader, rows=None):
    batches = loader.batches("train", rows)
    first_batches = [next(batches) for _ in range(count)]
    batches.close()
    return first_batches


def test_digits_are_split_by_content_and_both_splits_have_every_class():
    parts = [open_images(ImageDataConfig(), split) for split in ("train", "validation")]
    assert sum(map(len, parts)) == 1797 and len(parts[1]) == pytest.approx(0.2 * 1797, abs=10)
    hashes = [{x.tobytes() for x in part.images} for part in parts]
    assert not hashes[0] & hashes[1]
    for part in parts:
        assert part[0]["image"].shape == (8, 8, 1) and part.images.max() == 16
        assert set(part.labels[:, 0]) == set(range(10))


@pytest.mark.parametrize("name", ["shapes", "moving_shapes", "waves"])
def test_rendered_data_is_deterministic_and_captions_match_labels(name):
    config = ImageDataConfig(dataset=name, num_frames=3 if name == "moving_shapes" else None)
    train, held_out = (open_images(config, split) for split in ("train", "validation"))
    seen = set()
    for i in range(40):
        example = train[i]
        np.testing.assert_array_equal(example["image"], train[i]["image"])
        assert example["image"].shape == train.shape and example["image"].dtype == np.uint8
        for names, value in zip(train.label_names, example["labels"], strict=True):
            assert names[value] in example["caption"]
        seen.add(tuple(example["labels"]))
    assert len(seen) > 5
    assert np.any(train[0]["image"] != held_out[0]["image"])


def test_shapes_have_the_labeled_color_size_position_and_motion():
    config = ImageDataConfig(dataset="shapes")
    source = open_images(config, "train")
    for i in range(30):
        example = source[i]
        bright = example["image"].astype(float) - 18
        color, _, size, where = (
            n[v] for n, v in zip(source.label_names, example["labels"], strict=True)
        )
        weight = bright.sum(-1)
        y, x = (np.sum(weight * c) / weight.sum() for c in np.mgrid[-1:1:32j, -1:1:32j])
        position = {"left": x < -0.2, "right": x > 0.2, "top": y < -0.2, "bottom": y > 0.2}
        assert position.get(where, abs(x) < 0.2 and abs(y) < 0.2)
        red, green, blue = bright.sum((0, 1))
        assert {"red": red > 2 * green, "green": green > 2 * red, "blue": blue > 2 * red}.get(
            color, True
        )
        assert (np.mean(weight > 100) > 0.04) == (size == "large")
    video = open_images(ImageDataConfig(dataset="moving_shapes"), "train")[0]
    motion = video["caption"].split("moving ")[1].split(",")[0]
    center = [np.argwhere(f.sum(-1) > 150).mean(0) for f in video["image"][[0, -1]].astype(int)]
    moved = center[1] - center[0]
    axis, sign = {"left": (1, -1), "right": (1, 1), "up": (0, -1), "down": (0, 1)}[motion]
    assert moved[axis] * sign > 5 and abs(moved[1 - axis]) < 2


def test_batches_do_not_depend_on_which_process_makes_which_rows():
    whole = first(3, loader())
    shares = (0, 3, 4), (1, 2, 5, 6, 7)
    parts = [first(3, loader(), rows) for rows in shares]
    for step, batch in enumerate(whole):
        for name, value in batch.items():
            for rows, part in zip(shares, parts, strict=True):
                np.testing.assert_array_equal(part[step][name], value[list(rows)])


def test_the_order_resumes_exactly_and_every_epoch_has_every_example_once():
    digits = loader(batch_size=131)
    batches = digits.batches()
    next(batches)
    state = batches.get_state()
    expected = next(batches)
    batches.set_state(state)
    resumed = next(batches)
    batches.close()
    np.testing.assert_array_equal(resumed["image"], expected["image"])
    source = digits.open("train")
    assert len(source) == 11 * 131 + 1  # eleven batches and one image
    images = np.concatenate([b["image"] for b in first(22, loader(batch_size=131))])
    for epoch in range(2):
        part = images[epoch * len(source) :][: len(source)]
        if len(part) == len(source):
            assert sorted(x.tobytes() for x in part) == sorted(x.tobytes() for x in source.images)


def test_the_last_held_out_batch_is_padded():
    digits = loader(batch_size=100)
    batches = list(digits.evaluation_batches())
    count = len(digits.open("validation"))
    assert sum(b["loss_mask"].sum() for b in batches) == count
    assert all(len(b["image"]) == 100 for b in batches) and batches[-1]["loss_mask"][-1] == 0
    assert len(list(digits.evaluation_batches(2))) == 2


def test_captions_become_tokens():
    digits = loader(captions=True, caption_length=12)
    batch = first(1, digits)[0]
    assert batch["tokens"].shape == batch["token_mask"].shape == (8, 12)
    tokens, mask = digits.encode_captions(["abc"])
    assert mask.sum() == 3 and bytes(tokens[0, :3].tolist()) == b"abc"


def test_labels_are_parsed_by_name_and_number():
    assert loader().parse_label("3") == (3,)
    shapes = loader(dataset="shapes")
    assert shapes.parse_label("blue:circle:1:centre") == (2, 0, 1, 4)
    for text, message in (
        ("", "an empty part"),
        ("10", "from 0 to 9"),
        ("x", "not one of 0, 1"),
        ("1:2", "names 2"),
    ):
        with pytest.raises(ConfigError, match=message):
            loader().parse_label(text)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset": "digts"}, "did you mean digits"),
        ({"image_size": 16}, "digits are 8x8"),
        ({"dataset": "shapes", "image_size": 20}, "a multiple of 8, at least 16"),
        ({"num_frames": 4}, "num_frames=4 applies only to moving_shapes, not digits"),
        ({"data_dir": "/x"}, "data_dir=/x does not apply to digits"),
        ({"label_key": ""}, "label_key= does not apply to digits"),
        ({"caption_length": 8}, "caption_length=8 has no effect without --data.captions"),
        ({"flip": True}, "a mirror image of an example of digits is not a valid example"),
        ({"dataset": "waves", "image_size": 100}, "a multiple of 16"),
        ({"dataset": "moving_shapes", "num_frames": 1}, "motion needs at least 2 frames"),
    ],
)
def test_unsupported_settings_are_errors(settings, message):
    with pytest.raises(ConfigError, match=message):
        loader(**settings)
