"""The cached loop draws what the full pass would, row by row."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from genai_jax.decoding.generate import at_last_token, generate
from genai_jax.networks.sequence.transformer import empty_state
from tests.networks.sequence.test_transformer import VOCABULARY, logits_of, make

PROMPTS = [[1], [1, 5, 2, 9], [3, 3]]


@functools.cache
def model_and_variables():
    return make()


def run(prompts, seed=0, max_new_tokens=6, **options):
    model, variables = model_and_variables()
    lengths = np.array([len(p) for p in prompts])
    padded = np.array([p + [0] * (lengths.max() - len(p)) for p in prompts])

    def step(tokens, positions, lengths, state):
        hidden, state = model.apply(variables, tokens, positions, state=state, lengths=lengths)
        logits = model.apply(variables, hidden, method="logits")
        return at_last_token(logits, lengths)[:, 0], state

    total = padded.shape[1] + max_new_tokens
    state = empty_state(model.config, len(prompts), total, jnp.float32)
    options["max_new_tokens"] = max_new_tokens
    result = jax.jit(functools.partial(generate, step, **options))(
        state, padded, lengths, jax.random.key(seed)
    )
    rows = zip(np.asarray(result.tokens), np.asarray(result.lengths), strict=True)
    return [row[:end].tolist() for row, end in rows]


def greedy_by_full_passes(prompt, count):
    model, variables = model_and_variables()
    row = list(prompt)
    for _ in range(count):
        padded = jnp.array([row + [0] * (12 - len(row))])  # one shape, one compilation
        row.append(int(jnp.argmax(logits_of(model, variables, padded)[0, len(row) - 1])))
    return row


def test_greedy_equals_repeated_full_passes_for_prompts_of_any_length():
    expected = [greedy_by_full_passes(prompt, 6) for prompt in PROMPTS]
    assert run(PROMPTS, temperature=0) == expected


def test_a_row_draws_the_same_in_any_company():
    together = run(PROMPTS, temperature=1.3)
    assert run([*PROMPTS[:1], [7] * 9], temperature=1.3)[0] == together[0]
    assert run(PROMPTS, temperature=1.3) == together
    assert run(PROMPTS, seed=1, temperature=1.3) != together


def test_a_stop_token_ends_its_row_alone():
    free = run(PROMPTS, temperature=0)
    stop = free[1][len(PROMPTS[1]) + 1]  # the second token that row 1 draws
    for row, unstopped, prompt in zip(
        run(PROMPTS, temperature=0, stop_tokens=(stop,)), free, PROMPTS, strict=True
    ):
        drawn = unstopped[len(prompt) :]
        end = drawn.index(stop) + 1 if stop in drawn else len(drawn)
        assert row == unstopped[: len(prompt) + end]


def test_drawn_tokens_are_in_the_vocabulary():
    assert all(0 <= token < VOCABULARY for row in run(PROMPTS, top_k=3) for token in row)
