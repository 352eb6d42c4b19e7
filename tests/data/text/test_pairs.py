"""Pairs of texts: files, names of numbers, TFDS, packing, and what is refused."""

import numpy as np
import pytest
import tensorflow_datasets as tfds

from genai_jax.config import ConfigError
from genai_jax.data.text.loader import DataConfig
from genai_jax.data.text.number_names import english, german, number_names
from genai_jax.data.text.pair_documents import texts_of
from genai_jax.data.text.pair_loader import PairLoader
from genai_jax.data.text.pairs import open_pairs

ROWS = [("one", "eins"), ("two", "zwei"), ("", "nichts"), ("three", "drei"), ("four", " ")]


def pairs_of(dataset, split="train", **more):
    source = open_pairs(DataConfig(dataset=dataset, **more), split, {})
    return [texts_of(source[i]) for i in range(len(source))]


@pytest.mark.parametrize("suffix", [".tsv", ".csv", ".jsonl"])
def test_two_columns_of_a_table(tmp_path, suffix, capsys):
    import json

    path = tmp_path / f"pairs{suffix}"
    mark = {".tsv": "\t", ".csv": ","}.get(suffix)
    if mark:
        lines = [mark.join(("de", "id", "en"))] + [mark.join((b, "7", a)) for a, b in ROWS]
    else:
        lines = [json.dumps({"en": a or None, "de": b}) for a, b in ROWS]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    flags = dict(source_key="en", target_key="de", validation_percent=1)
    name = f"pairs:{path}"
    both = pairs_of(name, **flags) + pairs_of(name, "validation", **flags)
    assert sorted(both) == sorted(ROWS[i] for i in (0, 1, 3))
    assert "3 pairs (skipped: 2 rows without one of the texts)" in capsys.readouterr().err
    assert sorted(pairs_of(f"pairs:{tmp_path}", **flags)) == sorted(pairs_of(name, **flags))
    with pytest.raises(ConfigError, match="target_key=target is missing in"):
        pairs_of(name, source_key="en")


def test_pairs_of_the_same_source_are_in_the_same_split(tmp_path):
    lines = ["source\ttarget"] + [f"{i % 7}\t{i}" for i in range(70)]
    (tmp_path / "x.tsv").write_text("\n".join(lines), encoding="utf-8")
    sources = [
        {a for a, _ in pairs_of(f"pairs:{tmp_path}", split, validation_percent=30)}
        for split in ("train", "validation")
    ]
    assert not sources[0] & sources[1] and len(sources[0] | sources[1]) == 7


@pytest.mark.parametrize(
    ("number", "en", "de"),
    [
        (0, "zero", "null"),
        (1, "one", "eins"),
        (16, "sixteen", "sechzehn"),
        (21, "twenty-one", "einundzwanzig"),
        (101, "one hundred one", "einhunderteins"),
        (730, "seven hundred thirty", "siebenhundertdreißig"),
        (1000, "one thousand", "eintausend"),
        (21001, "twenty-one thousand one", "einundzwanzigtausendeins"),
        (101_000, "one hundred one thousand", "einhunderteintausend"),
    ],
)
def test_names_of_numbers(number, en, de):
    assert (english(number), german(number)) == (en, de)


def test_every_number_has_names_of_its_own():
    pairs = number_names(4)
    assert len(pairs) == len(set(pairs)) == len({b for _, b in pairs}) == 10_000
    assert number_names(6) == number_names(6) and len(number_names(6)) == 20_000


def loader_of(length=16, target=20, **more):
    config = DataConfig(
        dataset="number_names:2", sequence_length=length, batch_size=3, prefetch=0, **more
    )
    return PairLoader(config, 0, None, target)


def pairs_in(batch, loader):
    """The pairs of a batch, from its segments."""
    found, decode = [], loader.tokenizer.decode
    for row in range(len(batch["targets"])):
        of = {name: array[row] for name, array in batch.items()}
        for segment in range(1, of["segment_ids"].max() + 1):
            mine, read = of["segment_ids"] == segment, of["source_segment_ids"] == segment
            targets, tokens = of["targets"][mine], of["tokens"][mine]
            assert targets[-1] == of["source_tokens"][read][-1] == tokens[0] == 0
            np.testing.assert_array_equal(tokens[1:], targets[:-1])
            np.testing.assert_array_equal(of["positions"][mine], np.arange(len(targets)))
            assert np.all(of["loss_mask"][mine] == 1)
            found.append((decode(of["source_tokens"][read]), decode(targets)))
    return found


def test_every_held_out_pair_is_in_one_row_once():
    loader = loader_of(length=32, target=40)
    batches = list(loader.evaluation_batches())
    found = [pair for batch in batches for pair in pairs_in(batch, loader)]
    assert sorted(found) == sorted(pairs_of("number_names:2", "validation"))
    parts = [list(loader.evaluation_batches(rows=[row])) for row in range(3)]
    for i, batch in enumerate(batches):
        for name, array in batch.items():
            np.testing.assert_array_equal(array, np.concatenate([p[i][name] for p in parts]))


def test_training_batches_resume_exactly():
    loader = loader_of()
    batches = loader.batches()
    seen = [next(batches) for _ in range(3)]
    state = batches.get_state()
    later = [next(batches) for _ in range(2)]
    resumed = loader_of().batches()
    resumed.set_state(state)
    for batch in later:
        again = next(resumed)
        for name, array in batch.items():
            np.testing.assert_array_equal(array, again[name])
    assert set(pairs_in(seen[0], loader)) <= set(pairs_of("number_names:2"))


def test_what_has_no_pairs_or_does_not_fit_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("no table", encoding="utf-8")
    for flags, message in [
        (dict(dataset="python_docs"), "python_docs has no pairs of texts: use pairs:PATH"),
        (dict(dataset="number_names:7"), "number of digits must be from 1 to 6"),
        (dict(dataset="number_names:x"), "write number_names:N with a whole number"),
        (dict(dataset=f"pairs:{tmp_path}/a.txt"), "is not a table: pairs are two columns"),
        (dict(dataset=f"pairs:{tmp_path}/b.tsv"), "no such file or folder"),
        (dict(dataset=f"pairs:{tmp_path}"), "is empty: it has no pairs"),
        (dict(dataset="number_names:2", source_key="x"), "applies only to tables and TFDS"),
        (dict(dataset="number_names:2", unique_tokens=5), "has no effect on pairs"),
    ]:
        with pytest.raises(ConfigError, match=message):
            open_pairs(DataConfig(**flags), "train", {})
    with pytest.raises(ConfigError, match="up to 14 tokens in the source and 18 in the target"):
        next(loader_of(length=10).batches())


class TinyTranslate(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features.Translation(languages=["en", "de"])
        return tfds.core.DatasetInfo(builder=self, features=features, supervised_keys=("en", "de"))

    def _split_generators(self, download_manager):
        return {"train": ((i, {"en": english(i), "de": german(i)}) for i in range(30))}

    def _generate_examples(self):
        raise NotImplementedError


def test_a_translation_data_set_of_tfds(tmp_path):
    builder = TinyTranslate(data_dir=str(tmp_path), file_format="array_record")
    builder.download_and_prepare()
    read = lambda **more: pairs_of("tiny_translate", data_dir=str(tmp_path), **more)
    expected = {(english(i), german(i)) for i in range(30)}
    assert set(read()) < expected
    assert {(b, a) for a, b in read(source_key="de", target_key="en")} < expected
    with pytest.raises(ConfigError, match="source_key=fr: tiny_translate has de, en"):
        read(source_key="fr")
