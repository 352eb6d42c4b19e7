"""Word vectors through the commands that all families have."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import genai_jax
from genai_jax import evaluate, sample, train
from genai_jax.components import make_task, parse_run
from genai_jax.config import ConfigError
from genai_jax.losses.word_vectors import log_count_residual
from genai_jax.tasks.protocol import StepInfo
from genai_jax.tasks.words.task import sampled_words
from genai_jax.training.evaluation import Evaluator

SMALL = (
    "--task=word_vectors", "--word_vectors.dim=8", "--data.batch_size=32",
    "--optimizer.learning_rate=0.02", "--optimizer.warmup_steps=0", "--train.progress=false",
)  # fmt: skip
OBJECTIVES = ("skip_gram", "glove")


@pytest.fixture(scope="module")
def runs(text_folder, tmp_path_factory):
    """Objective -> a run of it."""
    opened = {}
    for objective in OBJECTIVES:
        workdir = tmp_path_factory.mktemp(objective)
        flags = (f"--data.dataset=text:{text_folder}", f"--word_vectors.objective={objective}")
        assert train.main([*SMALL, *flags, "--train.steps=200", f"--workdir={workdir}"]) == 0
        opened[objective] = genai_jax.load(workdir)
    return opened


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_training_lowers_the_loss(objective, runs):
    run = runs[objective]
    losses = [row["train/loss"] for row in run.metrics() if "train/loss" in row]
    assert losses[-1] < 0.9 * losses[0]
    scores = run.evaluate()
    assert scores["loss"] == pytest.approx(run.metrics()[-1]["eval/loss"], rel=1e-5)
    assert scores["pairs"] > 50
    assert scores["analogy_unknown"] > 100 and scores["analogy_questions"] == 0


@pytest.mark.parametrize("objective", ["skip_gram", "cbow"])
def test_the_held_out_loss_is_the_expected_training_loss(objective, text_folder):
    """Averaged over many negatives, and equal to a loop over the words of a batch."""
    flags = (f"--data.dataset=text:{text_folder}", f"--word_vectors.objective={objective}")
    task = make_task(parse_run([*SMALL, *flags]))
    shapes, _ = jax.eval_shape(task.init, jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)
    tables, batch = params["vectors"], next(task.data.held_out(1))
    noise, sigma = task._noise, lambda x: -np.log1p(np.exp(-x))
    read, predicted = (tables[name]["vectors"].astype(np.float64) for name in ("input", "output"))
    total = count = 0
    for word, context, mask in zip(
        batch["word"], batch["context"], batch["context_mask"], strict=True
    ):
        near = context[mask > 0]
        pairs = [(read[word], c) for c in near]
        if objective == "cbow":
            pairs = [(read[near].mean(0), word)] if len(near) else []
        for vector, target in pairs:
            total -= sigma(predicted[target] @ vector) + 5 * noise @ sigma(-predicted @ vector)
            count += 1
    loss = Evaluator(task)(params, {}, [batch])["loss"]
    assert loss == pytest.approx(total / count, rel=1e-4)
    of_key = lambda key: task._loss(params, {}, batch, StepInfo(key, 0)).loss
    sampled = np.asarray(jax.jit(jax.vmap(of_key))(jax.random.split(jax.random.key(1), 300)))
    assert sampled.mean() == pytest.approx(loss, abs=4 * float(sampled.std()) / 300**0.5)


def test_the_loss_of_glove_does_not_depend_on_a_factor_of_the_counts(runs):
    run = runs["glove"]
    batch = next(run.held_out(1))
    task, mask = run.task, batch["mask"] > 0
    tables, index = jax.device_get(run.params["vectors"]), (batch["word"], batch["context"])
    sides = [tables["input"], tables["output"]]
    vectors = [side["vectors"][i] for side, i in zip(sides, index, strict=True)]
    biases = sum(side["bias"][i] for side, i in zip(sides, index, strict=True))
    residual = log_count_residual(*vectors, biases, batch["count"])
    weight = (batch["count"] / 100.0) ** 0.75
    residual, weight = np.asarray(residual)[mask], weight[mask]
    shifts = np.linspace(-8, 8, 20001)
    least = min(np.mean(weight * (residual - shift) ** 2) for shift in shifts)
    assert run.loss(batch)[0] == pytest.approx(least, rel=1e-3)
    assert task.vectors(run.params).shape == (len(task.data.vocabulary.words), 8)


def test_negatives_have_the_distribution_of_the_noise():
    probability = np.array([0.5, 0.25, 0.05, 0.2])
    cumulative = jnp.asarray(np.cumsum(probability), jnp.float32).at[-1].set(1)
    words = sampled_words(jax.random.key(0), cumulative, (200, 500))
    share = np.bincount(words.reshape(-1), minlength=4) / words.size
    np.testing.assert_allclose(share, probability, atol=5 * (0.25 / words.size) ** 0.5)


def test_the_commands(runs, tmp_path, capsys):
    run = runs["skip_gram"]
    workdir = f"--workdir={run.workdir}"
    (tmp_path / "questions.txt").write_text("cat fox barn home\ncat fox barn nowhere\n")
    assert evaluate.main([workdir, f"--analogies={tmp_path}/questions.txt"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert (scores["analogy_questions"], scores["analogy_unknown"]) == (1, 1)
    answer = run.sample(analogy="cat:fox::barn", neighbors=1)["cat:fox::barn"][0][0]
    assert scores["analogy_accuracy"] == (answer == "home")
    assert scores["flags"] == {"analogies": f"{tmp_path}/questions.txt"}
    assert scores["loss_unit"] == "nats per pair of words"
    assert sample.main([workdir, "--words=cat,Fox", "--neighbors=3"]) == 0
    *lines, picture = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["cat", "fox"]
    assert Image.open(picture).size == (1080, 840)
    near = run.sample(words=["cat", "fox"], neighbors=3)
    assert len(near["cat"]) == 3 and "cat" not in dict(near["cat"])
    vectors = run.embed(["cat", near["cat"][0][0]])
    cosine = vectors[0] @ vectors[1] / np.prod(np.linalg.norm(vectors, axis=1))
    assert cosine == pytest.approx(near["cat"][0][1], abs=1e-5)
    assert len(run.embed()) == len(run.task.data.vocabulary.words)
    ask = [workdir, "--analogy=cat:fox::barn", "--neighbors=2"]
    assert sample.main([*ask, f"--output={tmp_path}/near.jsonl"]) == 0
    (row,) = map(json.loads, (tmp_path / "near.jsonl").read_text().splitlines())
    assert row["asked"] == "cat:fox::barn" and len(row["near"]) == 2
    assert not {"cat", "fox", "barn"} & {entry["word"] for entry in row["near"]}


def test_a_run_moves_without_its_text(runs, tmp_path):
    """The words are those of the run, also where other text is scored."""
    run, rng = runs["skip_gram"], np.random.default_rng(0)
    words = [*run.task.data.vocabulary.words]
    for i in range(15):
        (tmp_path / f"{i}.txt").write_text(" unheard ".join(rng.permutation(words)))
    flags = {"data.dataset": f"text:{tmp_path}", "data.validation_percent": 100}
    other = genai_jax.load(run.workdir, flags=flags)
    assert other.task.data.vocabulary.words == run.task.data.vocabulary.words
    assert other.sample() == run.sample()
    scores, near = other.evaluate(), sum(2 * (len(words) - d) for d in range(1, 6))
    assert scores["pairs"] == 15 * near
    assert scores["neighbor_words"] == len(words) > 12
    assert scores["neighbor_overlap_by_chance"] == 10 / (len(words) - 1)
    assert 0.3 < scores["neighbor_overlap"] < 1


@pytest.mark.parametrize(
    ("text", "flags", "said"),
    [
        ("1 2 3.5\n", (), r"--data.dataset=text:\S+ has no words"),
        ("a few words\n", (), r"--data.min_count=5: no word of text:\S+ occurs so often; lower it"),
        (
            "word\n",
            ("--data.min_count=1",),
            r"no document of its train split has two of the 1 words",
        ),
    ],
)
def test_text_without_words(text, flags, said, tmp_path):
    for i in range(4):
        (tmp_path / f"{i}.txt").write_text(text + str(i))
    task = make_task(parse_run([*SMALL, f"--data.dataset=text:{tmp_path}", *flags]))
    with pytest.raises(ConfigError, match=said):
        task.data.train()


def test_what_cannot_be(runs):
    glove = ("--task=word_vectors", "--word_vectors.objective=glove")
    for flags, said in (
        ((*glove, "--word_vectors.negatives=3"), "negatives=3 has no effect with"),
        (("--task=word_vectors", "--word_vectors.x_max=3"), "x_max=3.0 has no effect with"),
        (("--task=word_vectors", "--word_vectors.window=0"), "window=0"),
        (("--task=word_vectors", "--word_vectors.objective=x"), "objective"),
    ):
        with pytest.raises(ConfigError, match=said):
            parse_run(flags)
    with pytest.raises(ConfigError, match="--dtype=bfloat16 has no effect"):
        make_task(parse_run(["--task=word_vectors", "--dtype=bfloat16"]))
    run = runs["glove"]
    for flags, said in (
        ({"words": "cat,catt"}, r"'catt' is not among the \d+ words of the run \(did you mean cat"),
        ({"words": "a b"}, "'a b' is not one word"),
        ({"words": "cat", "analogy": "a:b::c"}, "exclude each other"),
        ({"analogy": "cat:fox:barn"}, "write a:b::c, three words"),
        ({"seed": 3}, "seed=3 has no effect"),
    ):
        with pytest.raises(ConfigError, match=said):
            run.sample(**flags)
    with pytest.raises(ConfigError, match="is not among the"):
        run.embed(["unheard"])
    with pytest.raises(ConfigError, match="--analogies=/no/such"):
        run.evaluate(analogies="/no/such")
