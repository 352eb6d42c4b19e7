"""The encoder-decoder task: likelihoods, exact match, gaps, flags, and what is refused."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import genai_jax
from genai_jax import train
from genai_jax.components import make_task, parse_run
from genai_jax.config import ConfigError
from genai_jax.tasks.language.sequence_to_sequence_flags import SourceRequest
from genai_jax.training.evaluation import Evaluator
from tests.commands import TINY

TASK = "--task=sequence_to_sequence"
OBJECTIVE = "--sequence_to_sequence.objective"
SMALL = (
    *TINY, TASK, "--data.batch_size=4", "--transformer.num_layers=1",
    "--sequence_to_sequence.encoder_layers=1",
)  # fmt: skip
PAIRS = (f"{OBJECTIVE}=pairs", "--data.dataset=number_names:2")


@functools.cache
def task_of(*flags):
    task = make_task(parse_run([*SMALL, *flags]))
    rng = np.random.default_rng(0)
    shapes, _ = jax.eval_shape(task.init, jax.random.key(0))
    some = lambda x: jnp.float32(rng.normal(size=x.shape) / math.sqrt(x.shape[-1]))
    return task, jax.tree.map(some, shapes)


@pytest.fixture(scope="module")
def text(text_folder):
    return f"--data.dataset=text:{text_folder}"


@pytest.mark.parametrize("objective", ["prefix", "pairs"])
def test_the_score_is_the_chain_rule_over_the_text(objective, text):
    """Bits of each target given its source and what precedes it, one pair at a time."""
    flags = PAIRS if objective == "pairs" else (f"{OBJECTIVE}=prefix", text)
    task, params = task_of(*flags)
    batch = next(iter(task.data.held_out(1)))
    score = Evaluator(task)(params, {}, [batch])
    variables = {"params": params["model"]}
    apply = jax.jit(
        lambda *x: task.model.apply(variables, task.model.apply(variables, *x), method="logits")
    )
    total = 0.0
    for row in range(4):
        of = {name: array[row] for name, array in batch.items()}
        for segment in range(1, of["segment_ids"].max() + 1):
            mine, read = of["segment_ids"] == segment, of["source_segment_ids"] == segment
            pad = lambda x, n: np.pad(x, (0, n - len(x)))[None]
            source, length = of["source_tokens"][read], len(of["segment_ids"])
            ids = pad(np.ones(mine.sum(), int), length)
            logits = apply(
                pad(source, len(read)), pad(np.ones(len(source), int), len(read)),
                pad(of["tokens"][mine], length), np.arange(length)[None] * ids, ids,
            )  # fmt: skip
            log_probs = jax.nn.log_softmax(logits[0])
            total -= float(log_probs[np.arange(mine.sum()), of["targets"][mine]].sum())
    tokens = batch["loss_mask"].sum()
    size = np.sum(batch["targets"][batch["loss_mask"] > 0] != 0)
    assert score["loss"] == pytest.approx(total / tokens, rel=1e-5)
    assert score["bits_per_byte"] == pytest.approx(total / math.log(2) / size, rel=1e-5)
    assert score["bytes"] == size


def test_the_halves_of_a_prefix_are_all_bytes_of_the_held_out_text(text):
    """So that its bits per byte are those of a language model: the same bytes, each once."""
    prefix, _ = task_of(f"{OBJECTIVE}=prefix", text)
    language = make_task(parse_run([*TINY, "--data.batch_size=4", text]))
    counts = [
        sum(int(np.sum(b["targets"][b["loss_mask"] > 0] > 0)) for b in task.data.held_out(-1))
        for task in (prefix, language)
    ]
    assert counts[0] == counts[1] > 0


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A recurrent model that has learned to translate."""
    folder = tmp_path_factory.mktemp("pairs")
    flags = (
        TASK, *PAIRS, "--sequence_to_sequence.network=recurrent", "--data.batch_size=16",
        "--data.sequence_length=16", "--sequence_to_sequence.target_length=20",
        "--recurrent.embed_dim=24", "--recurrent.hidden_dim=32", "--recurrent.attention_dim=16",
        "--optimizer.learning_rate=1e-2", "--optimizer.warmup_steps=5", "--train.steps=50",
        "--train.progress=false", "--train.log_every=50", "--data.validation_percent=20",
    )  # fmt: skip
    assert train.main([*flags, f"--workdir={folder}"]) == 0
    return folder


def test_exact_match_is_the_share_that_greedy_decoding_gets_right(workdir, tmp_path):
    run = genai_jax.load(workdir)
    score, loader = run.evaluate(), run.task.data.loader
    documents = loader._open("validation").source
    pairs = [documents[i].split("\x1e") for i in range(len(documents))]
    lines = tmp_path / "sources.txt"
    lines.write_text("\n".join(source for source, _ in pairs))
    texts = run.sample(prompt_file=str(lines), temperature=0.0, max_tokens=20)
    right = sum(text == target for text, (_, target) in zip(texts, pairs, strict=True))
    assert score["pairs"] == len(pairs) == 20
    assert score["exact_match"] == pytest.approx(right / len(pairs))
    assert run.sample() != "" and len(run.sample(num_samples=3)) == 3


def test_the_picture_of_an_alignment(workdir, tmp_path):
    from PIL import Image

    path = tmp_path / "a.png"
    run = genai_jax.load(workdir)
    sampled = run.sampled(show="alignment", prompt="forty-two", temperature=0.0, max_tokens=9)
    assert sampled.write(str(path), tmp_path) == [str(path)]
    with Image.open(path) as image:
        assert image.format == "PNG" and min(image.size) > 100
    with pytest.raises(ConfigError, match=r"must end in \.png"):
        run.sampled(show="alignment", output="a.txt")
    with pytest.raises(ConfigError, match=r"must end in \.txt"):
        run.sampled(output="a.png")


def test_gaps_of_a_prompt_are_filled(text):
    task, params = task_of(text)
    prompt = "the <gap> ran<gap> home"
    source = task.data.source_of(prompt)
    assert [int(i) for i in source if i >= 256] == [256, 257, task.data.end]
    hidden = np.array([256, *b"cat", 257, *b" far"])
    assert task.data.answer(prompt, source, hidden) == "the cat ran far home"
    assert "<gap>" in task.data.a_prompt()
    for prompt, message in (("abc", "has nothing to fill: write <gap>"),
                            ("<gap>" * 101, "has 101 gaps, more than the 100")):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            task.data.source_of(prompt)
    (filled,) = task.sample(params, {}, SourceRequest(prompt="a<gap>b", max_tokens=5)).texts
    assert filled.startswith("a") and filled.endswith("b")


def test_denoising_reads_a_damaged_text_and_writes_it_in_full(text):
    task, _ = task_of(f"{OBJECTIVE}=denoising", text)
    batch = next(iter(task.data.held_out(1)))
    mask = task.data.first_own
    for row in range(4):
        source = batch["source_tokens"][row][batch["source_segment_ids"][row] > 0]
        target = batch["targets"][row][batch["segment_ids"][row] > 0]
        if not len(target):  # no text is left for the row
            continue
        assert source[-1] == target[-1] == task.data.end and mask in source
        assert len(source[source < mask]) == len(target) - 1 - round(0.3 * (len(target) - 1))
        # What is left is part of the text, sentence by sentence.
        assert not np.bincount(source[source < mask], minlength=256)[
            np.bincount(target[:-1], minlength=256) == 0
        ].any()


def test_held_out_noise_does_not_depend_on_the_seed_and_that_of_training_does(text):
    batches = {}
    for seed in (0, 1):
        data = make_task(parse_run([*SMALL, text, f"--seed={seed}"])).data
        batches[seed] = next(iter(data.held_out(1)))["source_tokens"], next(data.train())
    np.testing.assert_array_equal(batches[0][0], batches[1][0])
    assert (batches[0][1]["source_tokens"] != batches[1][1]["source_tokens"]).any()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data.sequence_length=2000", "--sequence_to_sequence.sentinels=50"],
         "has 100 spans to hide, more than the 50 sentinels"),
        (["--sequence_to_sequence.mask_rate=0"], "mask_rate=0 leaves nothing to restore"),
        (["--sequence_to_sequence.mask_rate=1"], "mask_rate=1 leaves nothing to restore it from"),
        (["--sequence_to_sequence.mask_rate=-1"], "mask_rate=-1 leaves nothing to restore: "),
        ([f"{OBJECTIVE}=prefix", "--sequence_to_sequence.sentinels=5"], "is for --sequence_to"),
        (["--sequence_to_sequence.target_length=5"], "is for --sequence_to_sequence.objective=pa"),
        (["--recurrent.cell=lstm"], "has no effect with --sequence_to_sequence.network=transf"),
        (["--transformer.window=4"], "is for models that only look back"),
        (["--transformer.pattern=mamba"], "looks both ways, which mamba does not support"),
        (["--transformer.relative_buckets=8"], "is for --transformer.positions=relative_buckets"),
        (["--data.answer_after=="], "has no effect with --sequence_to_sequence.objective"),
        (["--data.fim_rate=0.5"], "is for --task=language_model"),
        (["--transformer.positions=learned", "--transformer.max_length=8"], "learned positions"),
        (["--sequence_to_sequence.network=recurrent"], "encoder_layers=1 is for"),
        (["--sequence_to_sequence.vocab_size=300"], "smaller than the 256 tokens"),
    ],
)  # fmt: skip
def test_contradictions_are_refused(flags, message, text):
    with pytest.raises(ConfigError, match=message):
        make_task(parse_run([*SMALL, text, *flags])).data.loader  # noqa: B018


def test_pairs_are_for_this_task_alone():
    for flags, message in (
        (("--data.dataset=number_names:2",), "has pairs of texts: set --task=sequence_to_sequ"),
        (("--data.source_key=a",), "source_key=a is for pairs of texts"),
    ):
        with pytest.raises(ConfigError, match=message):
            next(make_task(parse_run([*TINY, *flags])).data.train())
