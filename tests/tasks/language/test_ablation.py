"""Heads without their output, and what heads look at."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genai_jax.config import ConfigError
from genai_jax.networks.sequence.config import TransformerConfig
from genai_jax.networks.sequence.inspection import head_scores
from genai_jax.networks.sequence.transformer import Transformer
from genai_jax.tasks.language.ablation import heads_of, without_heads
from genai_jax.tasks.language.evaluate_request import LanguageEvaluateRequest

CONFIG = TransformerConfig(num_layers=2, embed_dim=8, num_heads=2, mlp_dim=0)
TOKENS = jnp.array([[1, 2, 3, 1, 2]])


def build(config):
    model = Transformer(config, 5)
    init = jax.jit(lambda key: model.init(key, TOKENS, method="init_all")["params"])
    return jax.jit(lambda p: model.apply({"params": p}, TOKENS)[0]), init(jax.random.key(0))


def test_without_all_heads_only_the_embedding_is_left():
    apply, params = build(CONFIG)
    none = without_heads(params, CONFIG, heads_of("0.0,0.1,1.0,1.1"))
    alone, one = apply(none), apply(without_heads(params, CONFIG, heads_of("1.0")))
    embedded = params["embed"]["embedding"][TOKENS]
    rms = jnp.sqrt(jnp.mean(jnp.square(embedded), -1, keepdims=True))
    np.testing.assert_allclose(alone, embedded / rms, rtol=1e-2)  # the norm has an epsilon
    whole = apply(params)
    assert np.abs(one - whole).max() > 1e-3 and np.abs(one - alone).max() > 1e-3
    np.testing.assert_array_equal(apply(without_heads(params, CONFIG, ())), whole)


@pytest.mark.parametrize(
    ("heads", "said"),
    [("2.0", "lacks the head 2.0; layers are 0 to 1, heads 0 to 1"), ("0.2", "lacks the head 0.2")],
)
def test_heads_that_are_not_there_are_named(heads, said):
    with pytest.raises(ConfigError, match=said):
        without_heads({}, CONFIG, heads_of(heads))
    mixed = TransformerConfig(num_layers=2, pattern="lstm,attention")
    with pytest.raises(ConfigError, match="layer 0 is the mixer lstm, not attention"):
        without_heads({}, mixed, ((0, 0),))


@pytest.mark.parametrize("text", ["0", "0.1,", "a.b", "-1.0", "0.1;1.0", "1e3.0"])
def test_lists_of_another_form_are_refused(text):
    with pytest.raises(ValueError, match="is not a list such as 0"):
        LanguageEvaluateRequest(workdir="w", ablate=text)


def test_scores_of_heads_that_do_nothing_else():
    """One head that looks at the token before, one that looks at what followed, one at itself."""
    tokens = ["<", "a", "b", "c", "a", "b"]
    weights = np.zeros((1, 3, 6, 6))
    weights[0, 0, np.arange(1, 6), np.arange(5)] = 1
    weights[0, 1, [4, 5], [2, 3]] = 1
    weights[0, 2] = np.eye(6)
    scores = head_scores(weights, tokens, 2)
    np.testing.assert_array_equal(scores["back"][0], [[0, 1, 0], [0, 0, 0.5], [1, 0, 0]])
    np.testing.assert_array_equal(scores["after_earlier"][0], [[0, 0, 1], [0, 1, 0], [0, 0, 0]])
    none = head_scores(weights[..., :3, :3], tokens[:3], 2)["after_earlier"]
    assert np.isnan(none).all()
