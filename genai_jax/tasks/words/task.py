"""Word vectors: skip-gram and CBOW with negative sampling, and GloVe."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from genai_jax.config import Config, ConfigError, field, refuse_set
from genai_jax.data.text.words import noise_distribution
from genai_jax.losses.word_vectors import (
    cooccurrence_weight,
    expected_noise,
    log_count_residual,
    negative_sampling,
)
from genai_jax.networks.layers import word_tables
from genai_jax.networks.layers.word_tables import biases_of, vectors_of
from genai_jax.tasks.protocol import LossOutput, Mean, Params, Phase, Task
from genai_jax.tasks.words.data import WordData, WordDataConfig
from genai_jax.tasks.words.neighbors import Neighborhoods, WordRequest, ids_of, neighborhoods
from genai_jax.tasks.words.scores import AnalogyRequest, score_vectors
from genai_jax.training.distributed import to_host
from genai_jax.training.optimizer import default_optimizer

SAMPLED, COUNTED = ("negatives", "noise_power", "subsample"), ("x_max", "alpha")
AT_ONCE = 1 << 22  # logits of held-out words that exist at once


@dataclasses.dataclass(frozen=True)
class WordVectorsConfig:
    objective: str = field(
        "skip_gram",
        "What is learned: to predict the words around a word, a word from those around it, or the "
        "logarithms of co-occurrence counts.",
        choices=("skip_gram", "cbow", "glove"),
    )
    dim: int = field(100, "Width of a vector.", minimum=1)
    window: int = field(5, "Words on each side that are the context of a word.", minimum=1)
    negatives: int = field(
        5, "Words sampled from the noise for each predicted word, by skip-gram and CBOW.", minimum=1
    )
    noise_power: float = field(
        0.75, "Power of the words' counts to which the probability of the noise is proportional.",
        minimum=0, maximum=1,
    )  # fmt: skip
    subsample: float = field(
        1e-3, "Share of all words above which occurrences of a word are left out at random, by "
        "skip-gram and CBOW; 0 for none.", minimum=0, maximum=1,
    )  # fmt: skip
    x_max: float = field(
        100.0, "Co-occurrence count from which GloVe gives all pairs the same weight.",
        minimum=1e-6,
    )  # fmt: skip
    alpha: float = field(
        0.75, "Power of the count to which the weight is proportional below that.", minimum=0
    )

    def __post_init__(self):
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        for name in SAMPLED if self.objective == "glove" else COUNTED:
            if getattr(self, name) != defaults[name]:
                raise ValueError(
                    f"{name}={getattr(self, name)} has no effect with objective={self.objective}"
                )


class WordVectors(Task):
    """The task behind ``--task=word_vectors``; see `genai_jax.tasks.protocol.Task`.

    Skip-gram reads a word by the table `input` and predicts words around it by `output`; CBOW reads
    those around it, as the mean of their vectors, and predicts the word. The vectors of the words
    are those of `input`; for GloVe, the sums of both (Pennington et al. 2014, section 4.2).
    """

    components: ClassVar = {"data": WordDataConfig, "word_vectors": WordVectorsConfig}
    partition_rules: ClassVar = tuple(
        (f"^vectors/{pattern}$", axes) for pattern, axes in word_tables.PARTITION_RULES
    )
    sample_request = WordRequest
    evaluate_request = AnalogyRequest

    def __init__(self, config: Config):
        refuse_set("run", config.run, ("dtype",), "has no effect: word vectors are float32")
        self.config, c = config, config.word_vectors
        self.data = WordData(
            config, c.window, 0 if self._is_glove else c.subsample, counted=self._is_glove
        )
        pair = {"skip_gram": "pair of words", "cbow": "word", "glove": "pair of words"}
        unit = "squared error" if self._is_glove else "nats"
        self.loss_unit = f"{unit} per {pair[c.objective]}"

    @property
    def _is_glove(self) -> bool:
        return self.config.word_vectors.objective == "glove"

    # Parameters and loss.

    def init(self, key: jax.Array) -> tuple[Params, dict]:
        glove, words = self._is_glove, len(self.data.vocabulary.words)
        tables = word_tables.init(
            key, words, self.config.word_vectors.dim, zero_output=not glove, bias=glove
        )
        return {"vectors": tables}, {}

    def phases(self, params: Params) -> tuple[Phase, ...]:
        optimizer = default_optimizer(self.config, self.partition_rules)
        return (Phase("words", ("vectors",), self._loss, optimizer),)

    def _loss(self, params, mutables, batch, info) -> LossOutput:
        tables = params["vectors"]
        if self._is_glove:
            weight, residual = self._residuals(tables, batch)
            losses, counted = weight * jnp.square(residual), batch["mask"]
        else:
            vectors, targets, counted = self._pairs(tables, batch)
            negatives = self._negatives(tables, info.rng, counted.shape)
            losses = negative_sampling(vectors, targets, negatives)
        total = jnp.sum(counted)
        return LossOutput(jnp.sum(losses * counted) / jnp.maximum(total, 1), {}, mutables, total)

    def _pairs(self, tables, batch) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Vectors of what predicts and of what is predicted, and which pairs count.

        [batch, n, dim] or what broadcasts to it, twice, and [batch, n].
        """
        mask, word = batch["context_mask"], batch["word"][:, None]
        if self.config.word_vectors.objective == "skip_gram":
            return (
                vectors_of(tables["input"], word), vectors_of(tables["output"], batch["context"]),
                mask,
            )  # fmt: skip
        around = vectors_of(tables["input"], batch["context"])
        count = jnp.sum(mask, 1, keepdims=True)
        mean = jnp.sum(around * mask[..., None], 1) / jnp.maximum(count, 1)
        counted = batch["mask"][:, None] * (count > 0)
        return mean[:, None], vectors_of(tables["output"], word), counted

    def _negatives(self, tables, key: jax.Array, shape: tuple[int, int]) -> jax.Array:
        """Vectors of words from the noise distribution, [*shape, negatives, dim]."""
        c, (rows, n) = self.config.word_vectors, shape
        index = sampled_words(key, jnp.asarray(self._cumulative), (rows, n * c.negatives))
        return vectors_of(tables["output"], index).reshape(rows, n, c.negatives, c.dim)

    def _residuals(self, tables, batch) -> tuple[jax.Array, jax.Array]:
        """Weights of co-occurrence counts, and errors of their logarithms; both [batch]."""
        c = self.config.word_vectors
        sides = [(tables["input"], batch["word"]), (tables["output"], batch["context"])]
        vectors = [vectors_of(table, index[:, None])[:, 0] for table, index in sides]
        biases = sum(biases_of(table, index) for table, index in sides)
        residual = log_count_residual(*vectors, biases, batch["count"])
        return cooccurrence_weight(batch["count"], c.x_max, c.alpha), residual

    @functools.cached_property
    def _noise(self) -> np.ndarray:
        """Probability of each row of the tables as a negative, float64."""
        counts = self.data.vocabulary.counts
        noise = noise_distribution(counts, self.config.word_vectors.noise_power)
        return np.pad(noise, (0, word_tables.table_rows(len(counts)) - len(counts)))

    @functools.cached_property
    def _cumulative(self) -> np.ndarray:
        known = np.cumsum(self._noise[: len(self.data.vocabulary.words)])
        return np.append(known[:-1], 1.0).astype(np.float32)

    # Metrics and samples.

    def example_metrics(self, params, mutables, batch, key) -> dict[str, Mean]:
        """Losses of held-out text, with the exact expectation over negatives."""
        tables = params["vectors"]
        if self._is_glove:
            weight, r = self._residuals(tables, batch)
            mask = batch["mask"]
            weight = weight * mask
            of = {"weight": weight, "residual": weight * r, "squared": weight * r * r}
            return {name: Mean(x, mask) for name, x in of.items()}
        vectors, targets, counted = self._pairs(tables, batch)
        noise = jnp.asarray(self._noise, jnp.float32)
        of_noise = lambda v: expected_noise(v[None], tables["output"]["vectors"], noise)[0]
        at_once = max(1, AT_ONCE // len(noise))
        against = jax.lax.map(of_noise, vectors[:, 0], batch_size=at_once)[:, None]
        losses = jax.nn.softplus(-jnp.sum(vectors * targets, -1))
        losses += self.config.word_vectors.negatives * against
        return {"loss": Mean(jnp.sum(losses * counted, 1), jnp.sum(counted, 1))}

    def summarize(self, reduced, params, mutables, key) -> dict[str, float]:
        """The loss per held-out pair (or word); for GloVe, up to a constant factor of the counts.

        Held-out documents have smaller counts than those of the training. What a constant factor
        adds to their logarithms is subtracted where it makes the loss least: the loss is the
        weighted variance of the errors, times the mean weight.

        Raises:
          ConfigError: the held-out documents have no pairs of known words.
        """
        means = {name: float(x.total / max(x.weight, 1)) for name, x in reduced.items()}
        pairs = int(next(iter(reduced.values())).weight)
        if not pairs:
            raise ConfigError(
                f"--data.dataset={self.config.data.dataset}: its held-out text has no two known "
                "words beside each other to score"
            )
        if self._is_glove:
            shift = means["residual"] / means["weight"]
            loss = means["squared"] - shift * means["residual"]
        else:
            loss = means["loss"]
        counted = "words" if self.config.word_vectors.objective == "cbow" else "pairs"
        return {"loss": loss, counted: pairs}

    def report(self, params, mutables, batches, request: AnalogyRequest) -> dict:
        """Analogies, and how well neighbors agree with those by held-out contexts."""
        return score_vectors(self.data, self.vectors(params), request)

    def vectors(self, params: Params) -> np.ndarray:
        """The vectors of all words, the most frequent first, a host array [words, dim]."""
        tables, count = to_host(params["vectors"]), len(self.data.vocabulary.words)
        total = np.asarray(tables["input"]["vectors"][:count])
        return total + tables["output"]["vectors"][:count] if self._is_glove else total

    def sample(self, params, mutables, request: WordRequest) -> Neighborhoods:
        """The nearest neighbors of words, or the answers to an analogy."""
        return neighborhoods(self.data, self.vectors(params), request)

    def embed(self, params, mutables, inputs) -> np.ndarray:
        """The vectors [words, dim] of a list of words; of all, the most frequent first, for None.

        Raises:
          ConfigError: something else, or a word that is not known.
        """
        vectors = self.vectors(params)
        if inputs is None:
            return vectors
        words = [inputs] if isinstance(inputs, str) else inputs
        if not isinstance(words, Sequence) or not all(isinstance(w, str) for w in words):
            raise ConfigError("word vectors embed a word or a list of words")
        return vectors[np.array(ids_of(self.data, words, "embed"), np.int64)]


def sampled_words(key: jax.Array, cumulative: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Words of a distribution, int32 of this shape.

    Args:
      key: of the samples.
      cumulative: sums of the probabilities up to each word, [words], the last one 1.
      shape: of the result.
    """
    uniform = jax.random.uniform(key, shape)
    return jnp.searchsorted(cumulative, uniform, side="right").astype(jnp.int32)
