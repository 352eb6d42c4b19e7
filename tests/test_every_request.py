"""Every flag of sampling changes the samples of every family, or is refused."""

import dataclasses

import numpy as np
import pytest

import genai_jax
from genai_jax.components import request_class
from genai_jax.config import ConfigError, plain_type
from genai_jax.requests import ArrayRequest
from genai_jax.tasks.registry import task_class
from tests.every_flag import trained

BASES = (
    "language_model", "masked_language_model", "discrete_diffusion", "sequence_to_sequence pairs",
    "diffusion", "diffusion text",
    "few_step shortcut", "autoencoder codes", "code_prior", "vae", "vae ladder", "gan style",
    "normalizing_flow", "rbm", "ngram", "hmm", "responder", "word_vectors",
)  # fmt: skip
# Beside those that choose a model: where samples go, how they are shown, and how many are computed
# at a time.
ELSEWHERE = {f.name for f in dataclasses.fields(ArrayRequest)} - {"seed"} | {"batch_size"}
NUMBERS = {"top_p": 0.1, "temperature": 0.1, "top_k": 2, "steps": 3, "eta": 0.5, "guidance": 3.0}
SMALL = {"num_samples": 2, "max_tokens": 8}
# So much that a network's inputs matter: some layers begin as zeros.
LEARNS = ("--train.steps=30", "--optimizer.learning_rate=0.03", "--train.log_every=30")
# What a flag means something with.
WITH = {
    "churn": {"solver": "heun"},
    "snr": {"solver": "predictor_corrector"},
    "eta": {"solver": "ddim"},
}


def values_of(field: dataclasses.Field, usual: object) -> list:
    """Values of a flag other than its default, and than the `usual` one of the run."""
    kind, default, meta = plain_type(field.type), field.default, field.metadata
    if meta["choices"]:
        return [choice for choice in meta["choices"] if choice not in (default, usual)]
    if kind is bool:
        return [not default]
    if field.name in NUMBERS:
        return [NUMBERS[field.name]]
    if kind in (int, float):
        return [kind((default or 0) + 1) if field.name not in SMALL else 3]
    return {
        "prompt": ["ab"],
        "label": ["3"],
        "words": ["list"],
        "analogy": ["list:lists::string"],
    }.get(field.name, [])


def drawn(run, **flags) -> list:
    """All that a request gives, as arrays and texts."""
    sampled = run.sampled(**flags)
    strip = getattr(sampled, "strip", None)
    return [sampled.values, *([] if strip is None else [strip])]


def equal(one: list, other: list) -> bool:
    return len(one) == len(other) and all(
        np.array_equal(a, b) for a, b in zip(one, other, strict=True)
    )


@pytest.mark.depends_on("every flag")
@pytest.mark.parametrize("base", BASES)
def test_no_flag_of_sampling_is_ignored(base):
    run = genai_jax.load(trained(base, *LEARNS))
    request = request_class(task_class(run.config.run.task), "sample_request")
    fields = {f.name: f for f in dataclasses.fields(request) if f.name not in ELSEWHERE}
    small = {name: value for name, value in SMALL.items() if name in fields}
    ignored = []
    for name, field in fields.items():
        usual = getattr(getattr(run.config, "sampler", None), name, None)
        for value in values_of(field, usual):
            base_flags = {**small, **WITH.get(name, {})}
            try:
                changed = drawn(run, **{**base_flags, name: value})
            except ConfigError:
                continue
            if equal(changed, drawn(run, **base_flags)):
                ignored.append(f"{name}={value}")
    assert ignored == []
