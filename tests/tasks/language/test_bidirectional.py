"""Masked language models and discrete diffusion: likelihoods, packing, blocks, and samples."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genai_jax.components import make_task, parse_run
from genai_jax.config import ConfigError
from genai_jax.requests import EvaluateRequest
from genai_jax.tasks.language.discrete_diffusion import AncestralRequest
from genai_jax.tasks.language.masked import MaskPredictRequest
from genai_jax.training.evaluation import Evaluator
from tests.commands import TINY

LENGTH = 16
SMALL = (*TINY, f"--data.sequence_length={LENGTH}", "--data.batch_size=4")
DIFFUSION, BLOCK = "--task=discrete_diffusion", "--discrete_diffusion.block_size"


@pytest.fixture(scope="module")
def text(text_folder):
    return f"--data.dataset=text:{text_folder}"


@functools.cache
def task_of(*flags):
    task = make_task(parse_run([*SMALL, *flags]))
    params = jax.jit(lambda key: task.init(key)[0])(jax.random.key(0))
    # Some layers begin as zeros.
    keys = iter(jax.random.split(jax.random.key(1), 100))
    noise = lambda x: x + 0.2 * jax.random.normal(next(keys), x.shape)
    return task, jax.tree.map(noise, params)


def a_batch(task):
    """Two documents in a row, and padding."""
    rng = np.random.default_rng(0)
    sizes = (7, 6, LENGTH - 13)
    batch = {
        "tokens": np.zeros((1, LENGTH), np.int32),
        "targets": rng.integers(1, 200, (1, LENGTH)).astype(np.int32),
        "positions": np.concatenate([np.arange(n) for n in sizes])[None].astype(np.int32),
        "segment_ids": np.repeat([1, 2, 0], sizes)[None].astype(np.int32),
    }
    return batch | {"loss_mask": (batch["segment_ids"] > 0).astype(np.float32)}


def hidden_of(task, params, batch, masked):
    if task.component == "masked":
        return task._hidden(params, batch, jnp.where(masked, task.mask_id, batch["targets"]))[0]
    return task.hidden(params, batch, jnp.asarray(masked))[0]


FAMILIES = (
    ("--task=masked_language_model",), (DIFFUSION,), (DIFFUSION, f"{BLOCK}=4"),
)  # fmt: skip


@pytest.mark.parametrize("flags", FAMILIES, ids=["masked", "diffusion", "blocks"])
def test_documents_of_a_row_and_padding_do_not_see_each_other(flags, text):
    task, params = task_of(*flags, text)
    batch = a_batch(task)
    masked = np.arange(LENGTH)[None] % 3 == 0
    hidden = jax.jit(functools.partial(hidden_of, task))
    before = hidden(params, batch, masked)
    for first, last in ((0, 7), (7, 13), (13, LENGTH)):
        changed = dict(batch, targets=batch["targets"].copy())
        changed["targets"][:, first:last] = 1
        after = hidden(params, changed, masked)
        same = np.ones(LENGTH, bool)
        same[first:last] = False
        np.testing.assert_array_equal(np.asarray(before)[:, same], np.asarray(after)[:, same])
        assert last > 13 or (before != after)[:, first:last].any()


def constant_logits(params, logits):
    """Parameters of a model whose logits are these, whatever it reads."""
    model, width = params["model"], params["model"]["head"]["kernel"].shape[0]
    unit = jnp.zeros(width).at[0].set(1)
    norm = {"scale": jnp.zeros(width), "bias": unit}
    return {"model": model | {"final_norm": norm, "head": {"kernel": jnp.outer(unit, logits)}}}


def test_of_independent_symbols_the_bound_is_the_entropy(text):
    """Exactly for equally likely symbols and for blocks of one; else in the mean over times."""
    layernorm = "--transformer.norm=layernorm"
    task, params = task_of(DIFFUSION, layernorm, "--discrete_diffusion.held_out_times=64", text)
    batches = list(task.data.held_out(2))
    score = lambda task, logits: Evaluator(task)(constant_logits(params, logits), {}, batches)
    uniform = score(task, jnp.zeros(257))
    assert uniform["perplexity"] == pytest.approx(257, rel=1e-5)
    targets = np.concatenate([b["targets"][b["loss_mask"] > 0] for b in batches])
    share = np.bincount(targets, minlength=257) / targets.size
    entropy = -np.sum(share[share > 0] * np.log(share[share > 0]))
    logits = jnp.log(jnp.asarray(share, jnp.float32) + 1e-12)
    found = score(task, logits)
    assert found["loss"] == pytest.approx(entropy, rel=0.02)
    assert found["bits_per_byte"] == pytest.approx(
        found["loss"] / math.log(2) * found["tokens"] / found["bytes"], rel=1e-5
    )
    by_one, _ = task_of(DIFFUSION, layernorm, f"{BLOCK}=1", text)
    assert score(by_one, logits)["loss"] == pytest.approx(entropy, rel=1e-5)


def test_blocks_of_one_token_are_autoregressive(text):
    """The bound is the chain rule: each token given those before it, one at a time."""
    task, params = task_of(DIFFUSION, f"{BLOCK}=1", text)
    batch = a_batch(task)
    variables = {"params": params["model"]}
    chain = np.zeros(LENGTH)
    read = lambda tokens: task.reading.apply(
        variables, tokens, batch["positions"], batch["segment_ids"]
    )[0]
    head = lambda hidden: task.reading.apply(variables, hidden, method="logits")
    logits = jax.jit(lambda tokens: head(read(tokens)))
    for i in range(LENGTH):
        tokens = batch["targets"].copy()
        tokens[:, i:] = task.mask_id
        log_probs = jax.nn.log_softmax(logits(tokens)[0, i])
        chain[i] = -log_probs[batch["targets"][0, i]]
    reduced = jax.jit(task.example_metrics)(params, {}, batch, jax.random.key(5))
    expected = np.sum(chain * batch["loss_mask"][0])
    assert float(reduced["loss"].total[0]) == pytest.approx(expected, rel=1e-5)


def test_one_block_of_the_whole_row_is_diffusion_of_the_row(text):
    whole, params = task_of(DIFFUSION, text)
    block, _ = task_of(DIFFUSION, f"{BLOCK}={LENGTH}", text)
    batch = a_batch(whole)
    losses = [
        jax.jit(task.example_metrics)(params, {}, batch, jax.random.key(3))["loss"].total[0]
        for task in (whole, block)
    ]
    assert float(losses[0]) == pytest.approx(float(losses[1]), rel=1e-5)


def test_training_and_sampling_read_blocks_alike(text):
    """A noisy block after clean ones has the same hidden states in two streams and in one."""
    task, params = task_of(DIFFUSION, f"{BLOCK}=4", text)
    batch = a_batch(task)
    masked = np.zeros((1, LENGTH), bool)
    masked[:, [4, 6, 9, 10]] = True
    two, _ = jax.jit(task.hidden)(params, batch, masked)
    read = jax.jit(
        lambda tokens: task.reading.apply(
            {"params": params["model"]}, tokens, batch["positions"], batch["segment_ids"]
        )[0]
    )
    for begin in (4, 8):
        here = (np.arange(LENGTH) >= begin) & (np.arange(LENGTH) < begin + 4)
        one = read(np.where(masked & here, task.mask_id, batch["targets"]))
        np.testing.assert_allclose(one[0, here], two[0, here], atol=1e-5)


@pytest.mark.parametrize("flags", FAMILIES, ids=["masked", "diffusion", "blocks"])
def test_samples_keep_their_prompts_and_do_not_depend_on_the_others(flags, text, tmp_path):
    task, params = task_of(*flags, text)
    request = task.sample_request
    prompts = ["", "né", "a longer prompt"]
    (tmp_path / "prompts").write_text("\n".join(prompts))
    together = request(prompt_file=f"{tmp_path}/prompts", max_tokens=10, seed=4)
    texts = task.sample(params, {}, together).texts
    assert all(text.startswith(p) for text, p in zip(texts, prompts, strict=True))
    assert task.sample(params, {}, together).texts == texts and len({*texts}) == 3
    # The first row has the same key alone; its padding is another one.
    alone = task.sample(params, {}, request(prompt="", max_tokens=10, seed=4)).texts
    assert alone == texts[:1]
    stop = next(c for c in texts[2][len(prompts[2]) :])
    cut = task.sample(params, {}, request(prompt_file=f"{tmp_path}/prompts", max_tokens=10, seed=4,
                                          stop=stop)).texts  # fmt: skip
    assert cut[2] == prompts[2]


def test_a_text_ends_with_its_first_boundary(text):
    task, params = task_of(DIFFUSION, "--transformer.norm=layernorm", f"{BLOCK}=4", text)
    logits = jnp.full(257, -30.0).at[ord("a")].set(0.0).at[0].set(-1.0)
    request = AncestralRequest(num_samples=20, max_tokens=18, prompt="ba")
    sampled = task.sample(constant_logits(params, logits), {}, request).texts
    assert {t.rstrip("a") for t in sampled} == {"b"}
    lengths = np.array([len(t) - 2 for t in sampled])
    assert lengths.min() < 3 and lengths.max() <= 18 and len({*lengths}) > 3


def test_embeddings_are_of_both_sides_and_not_of_padding(text):
    task, params = task_of("--task=masked_language_model", text)
    together = task.embed(params, {}, ["abc", "a longer text"])
    assert together.shape == (2, 14, 16) and not together[0, 4:].any()
    np.testing.assert_allclose(task.embed(params, {}, "abc")[0], together[0, :4], atol=1e-5)
    other = task.embed(params, {}, ["abd"])
    assert np.abs(other[0, 0] - together[0, 0]).max() > 1e-3  # sees what follows


def test_losses_of_masked_tokens_are_finite_and_reproducible(text):
    task, params = task_of("--task=masked_language_model", "--masked.span_length=3", text)
    score = Evaluator(task)
    first, again = (score(params, {}, task.data.held_out(2), seed=2) for _ in range(2))
    assert first == again and 0 < first["tokens"] < 2 * 4 * LENGTH
    assert score(params, {}, task.data.held_out(2), seed=3)["loss"] != first["loss"]
    assert "bits_per_byte" not in first and math.isfinite(first["loss"])
    assert task.evaluate_request is EvaluateRequest


def test_the_mask_is_one_more_row(text):
    task, params = task_of("--task=masked_language_model", text)
    assert params["model"]["embed"]["embedding"].shape[0] == 257 and task.mask_id == 256
    with pytest.raises(ConfigError, match=r"masked.vocab_size=256 is smaller .* and 1 of the mod"):
        make_task(parse_run([*SMALL, "--task=masked_language_model", "--masked.vocab_size=256",
                             text])).data.record()  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--masked.mask_rate=0", "mask_rate=0.0 leaves nothing to predict: it must be above 0"),
        ("--masked.mask_rate=1", "mask_rate=1.0 leaves nothing to predict it from"),
        ("--masked.mask_rate=2", "mask_rate=2.0 leaves .* it must be above 0 and below 1"),
        ("--masked.span_length=1.1", "span_length=1.1 must be at least 1.176"),
        ("--masked.mask_fraction=0", "mask_fraction=0: the model would never see a mask"),
        ("--masked.mask_fraction=0.95", "must add up to at most 1"),
        ("--transformer.window=4", "window=4 is for models that only look back"),
        ("--transformer.pattern=attention,mamba", "looks both ways, which mamba does not support"),
        (f"{DIFFUSION} {BLOCK}=5", "block_size=5 does not divide --data.sequence_length=16"),
        (f"{DIFFUSION} {BLOCK}=4 --transformer.positions=alibi", "blocks need positions that"),
        (f"{DIFFUSION} {BLOCK}=1 --discrete_diffusion.held_out_times=2", "=2 has no effect"),
    ],
)
def test_what_cannot_be_is_refused(flags, said):
    with pytest.raises(ConfigError, match=said):
        make_task(parse_run([*SMALL, "--task=masked_language_model", *flags.split()]))


def test_requests_refuse_what_has_no_effect(text):
    with pytest.raises(ValueError, match="seed=1 has no effect with temperature=0"):
        MaskPredictRequest(temperature=0, seed=1)
    AncestralRequest(temperature=0, seed=1)  # the order is random
    task, params = task_of(DIFFUSION, f"{BLOCK}=1", text)
    with pytest.raises(ConfigError, match=r"steps=3 has no effect with .*block_size=1"):
        task.sample(params, {}, AncestralRequest(steps=3))
