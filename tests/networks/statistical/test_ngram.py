"""n-gram models against dictionaries, and what their smoothing promises."""

import itertools
from collections import Counter as Counts
from collections import defaultdict

import jax
import numpy as np
import pytest

from genai_jax.networks.statistical import ngram, ngram_counts
from genai_jax.networks.statistical.ngram_counts import Counter
from genai_jax.networks.statistical.ngram_smoothing import (
    INTERPOLATED,
    good_turing_factors,
    kneser_ney_discounts,
    smooth,
)

TOKENS, ORDER, BOUNDARY = 6, 3, 0


def documents(count: int = 30, seed: int = 0) -> list[list[int]]:
    """Tokens that depend on the two before, between boundaries; token 5 never occurs."""
    rng, made = np.random.default_rng(seed), []
    for _ in range(count):
        x = [BOUNDARY]
        for _ in range(rng.integers(3, 25)):
            odds = np.array([9, 3, 1, 0.3])
            x.append(1 + rng.choice(4, p=np.roll(odds, sum(x[-2:])) / odds.sum()))
        made.append([*x, BOUNDARY])
    return made


def counted(texts, order: int = ORDER) -> Counter:
    counter = Counter(order, TOKENS)
    for x in texts:
        tokens = np.array([x[:-1]])
        counter.add(tokens, np.array([x[1:]]), np.arange(tokens.size)[None], tokens >= 0)
    return counter


def contexts(order: int = ORDER):
    """Every context: of any tokens, or cut after any number of them."""
    for length in range(order):
        for tokens in itertools.product(range(TOKENS), repeat=length):
            yield (*tokens, *[TOKENS] * (order - 1 - length))


@pytest.fixture(scope="module")
def probabilities():
    """(method, order) -> [contexts, tokens], from the tables."""
    compiled = jax.jit(
        lambda tables, c, interpolated: jax.lax.map(
            lambda one: ngram.distribution(tables, one, TOKENS, interpolated), c
        ),
        static_argnums=2,
    )

    def of(method: str, order: int = ORDER, texts=None):
        levels = counted(texts or documents(), order).levels(BOUNDARY)
        tables = ngram.filled_tables(smooth(levels, TOKENS, method), TOKENS, 500)
        empty = jax.eval_shape(lambda: ngram.empty_tables(order, TOKENS, 500))
        assert jax.tree.map(np.shape, tables) == jax.tree.map(np.shape, empty)
        given = np.array(list(contexts(order)), np.int32)
        return np.asarray(compiled(tables, given, INTERPOLATED[method]))

    return of


@pytest.mark.parametrize("method", INTERPOLATED)
@pytest.mark.parametrize("texts", [documents(), documents(1), documents() * 2])
def test_every_distribution_sums_to_one_seen_or_not(method, texts, probabilities):
    for order in (1, ORDER):
        p = probabilities(method, order, texts)
        np.testing.assert_allclose(p.sum(1), 1, atol=1e-6)
        assert p.min() > 0


def by_dictionaries(texts, discounts, order: int = ORDER):
    """Interpolated Kneser-Ney, by its definition: a function of (context, word)."""
    raw, before = [Counts() for _ in range(order + 1)], [defaultdict(set) for _ in range(order + 1)]
    for x in texts:
        for end in range(1, len(x)):
            for k in range(1, min(order, end + 1) + 1):
                gram = tuple(x[end - k + 1 : end + 1])
                raw[k][gram] += 1
                if end - k >= 0:
                    before[k][gram].add(x[end - k])

    def count(gram):
        k = len(gram)
        whole = k == order or (k > 1 and gram[0] == BOUNDARY)
        return raw[k][gram] if whole else len(before[k][gram])

    def probability(context, word):
        k = len(context) + 1
        lower = probability(context[1:], word) if context else 1 / TOKENS
        counts = [count((*context, w)) for w in range(TOKENS)]
        if not sum(counts):
            return lower
        d = discounts[k - 1]
        taken = sum(d[min(c, 3)] for c in counts)
        own = counts[word] - d[min(counts[word], 3)]
        return (own + taken * lower) / sum(counts)

    return probability


@pytest.mark.parametrize("method", ["kneser_ney", "modified_kneser_ney"])
def test_kneser_ney_is_its_definition(method, probabilities):
    texts = documents()
    levels = counted(texts).levels(BOUNDARY)
    modified = method == "modified_kneser_ney"
    discounts = [kneser_ney_discounts(x.continuations, modified) for x in levels]
    expected = by_dictionaries(texts, discounts)
    p = probabilities(method)
    for i, context in enumerate(contexts()):
        told = [t for t in context[::-1] if t != TOKENS]
        row = [expected(tuple(told), w) for w in range(TOKENS)]
        np.testing.assert_allclose(p[i], row, rtol=1e-5)


def test_discounts_are_those_of_the_counts_of_counts():
    counts = np.repeat([1, 2, 3, 4, 9], [40, 20, 10, 5, 7])
    y = 40 / (40 + 2 * 20)
    np.testing.assert_allclose(kneser_ney_discounts(counts, False), [0, y, y, y])
    expected = [0, 1 - 2 * y * 20 / 40, 2 - 3 * y * 10 / 20, 3 - 4 * y * 5 / 10]
    np.testing.assert_allclose(kneser_ney_discounts(counts, True), expected)
    often = np.array([7, 8])  # nothing occurs once
    np.testing.assert_allclose(kneser_ney_discounts(often, True), [0, 0.5, 1, 1.5])


def test_the_unseen_have_the_mass_of_the_singletons():
    sizes = [(10_000 / r / (r + 1)) for r in range(1, 40)]  # Zipf's law
    counts = np.repeat(np.arange(1, 40), np.array(sizes, int))
    factors = good_turing_factors(counts)[np.minimum(counts, 6)]
    assert factors.min() > 0 and factors[counts == 1][0] < factors[counts == 3][0] < 1
    lost = np.sum(counts * (1 - factors)) / counts.sum()
    assert lost == pytest.approx(np.sum(counts == 1) / counts.sum(), rel=1e-12)
    few = np.array([1, 1, 1, 2])  # from which no factors follow: those that occur once are unseen
    assert list(good_turing_factors(few)[:3]) == [0, 0, 1]


def test_a_fitted_model_gives_the_mass_of_the_singletons_to_the_unseen():
    times, vocabulary = [300, 100, 50, 30, 20, 14, 10, 8], 600  # tokens that occur 1, 2, ... times
    words = 1 + np.arange(sum(times))
    text = np.repeat(words, np.repeat(1 + np.arange(len(times)), times))
    counter = Counter(1, vocabulary)
    tokens = np.concatenate([[BOUNDARY], text])[None]
    place = np.arange(text.size)[None]
    counter.add(tokens[:, :-1], tokens[:, 1:], place, place >= 0)
    model = smooth(counter.levels(BOUNDARY), vocabulary, "good_turing")
    tables = jax.tree.map(jax.numpy.asarray, ngram.filled_tables(model, vocabulary, 600))
    p = np.asarray(ngram.distribution(tables, np.zeros(0, np.int32), vocabulary, False))
    unseen = np.ones(vocabulary, bool)
    unseen[words] = False
    assert float(p[unseen].sum()) == pytest.approx(300 / text.size, rel=1e-5)
    assert float(p.sum()) == pytest.approx(1, rel=1e-5)


def test_katz_backs_off_to_the_order_below(probabilities):
    p, texts = probabilities("good_turing"), documents()
    levels = counted(texts).levels(BOUNDARY)
    rows = {context: p[i] for i, context in enumerate(contexts())}
    factors, level = good_turing_factors(levels[2].raw), levels[2]
    grams = dict(zip(zip(*level.contexts.T, level.words, strict=True), level.raw, strict=True))
    checked = 0
    for context in [c for c in rows if TOKENS not in c]:
        counts = np.array([grams.get((*context, w), 0) for w in range(TOKENS)])
        below = rows[context[0], TOKENS]
        kept = factors[np.minimum(counts, 6)] > 0
        if counts.sum() and (counts * factors[np.minimum(counts, 6)]).sum() < counts.sum():
            own = counts * factors[np.minimum(counts, 6)] / counts.sum()
            alpha = (1 - own.sum()) / below[~kept].sum()
            np.testing.assert_allclose(
                rows[context], np.where(kept, own, alpha * below), rtol=1e-4, atol=1e-7
            )
            checked += 1
        elif not counts.sum():
            np.testing.assert_allclose(rows[context], below, rtol=1e-6)
    assert checked > 5


def test_counting_in_parts_changes_nothing(monkeypatch):
    whole = counted(documents()).levels(BOUNDARY)
    monkeypatch.setattr(ngram_counts, "MERGE_ROWS", 10)
    parts = counted(documents()[::-1]).levels(BOUNDARY)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_context_follows_its_tokens():
    state = np.full((3, 2), TOKENS, np.int32)
    pushed = ngram.push(state, np.array([[1, 2, 3]] * 3), np.array([3, 1, 0]))
    assert pushed.tolist() == [[3, 2], [1, TOKENS], [TOKENS, TOKENS]]
