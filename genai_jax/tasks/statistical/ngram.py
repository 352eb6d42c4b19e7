"""An n-gram language model: a Markov chain of order n - 1 with smoothed probabilities."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from genai_jax.config import ConfigError, field
from genai_jax.networks.statistical import ngram
from genai_jax.networks.statistical.ngram_counts import Counter, Level, contexts_of
from genai_jax.networks.statistical.ngram_smoothing import INTERPOLATED, smooth
from genai_jax.tasks.language.sampling import Decoder
from genai_jax.tasks.protocol import Params
from genai_jax.tasks.statistical.text_model import StatisticalTextModel


@dataclasses.dataclass(frozen=True)
class NgramConfig:
    order: int = field(
        5, "Length of the longest n-grams: a token and the order - 1 before it; 2 is a Markov "
        "chain.", minimum=1, maximum=12,
    )  # fmt: skip
    smoothing: str = field(
        "modified_kneser_ney",
        "How n-grams that were not seen get a probability: interpolated Kneser-Ney with three "
        "discounts or with one, or Good-Turing discounts with Katz's back-off.",
        choices=tuple(INTERPOLATED),
    )
    max_entries: int = field(
        1 << 20, "Distinct n-grams of one order for which there is room.", minimum=1,
        maximum=1 << 28,
    )  # fmt: skip


class Ngram(StatisticalTextModel):
    """The task behind ``--task=ngram``; see `genai_jax.tasks.protocol.Task`."""

    components: ClassVar = {**StatisticalTextModel.components, "ngram": NgramConfig}
    partition_rules: ClassVar = (("^ngram/", (...,)),)

    def init(self, key: jax.Array) -> tuple[Params, dict]:
        shape = self.config.ngram
        tables = ngram.empty_tables(shape.order, self.data.vocab_size, shape.max_entries)
        return {"ngram": tables}, {}

    def fit(self, batches) -> Params:
        """Counts the n-grams of all batches, and smooths.

        Raises:
          ConfigError: nothing to count, or more distinct n-grams than there is room for.
        """
        shape, vocab_size = self.config.ngram, self.data.vocab_size
        counter = Counter(shape.order, vocab_size)
        for batch in batches:
            counter.add(batch["tokens"], batch["targets"], batch["positions"], batch["loss_mask"])
        levels = counter.levels(self.data.tokenizer.boundary_id)
        self._check(levels)
        model = smooth(levels, vocab_size, shape.smoothing)
        return {"ngram": ngram.filled_tables(model, vocab_size, shape.max_entries)}

    def _check(self, levels: list[Level]):
        if not len(levels[0].raw):
            raise ConfigError(
                f"--train.steps={self.config.train.steps}: the batches have no targets to count"
            )
        limit = self.config.ngram.max_entries
        for order, level in enumerate(levels, 1):
            if len(level.raw) > limit:
                raise ConfigError(
                    f"--ngram.max_entries={limit}: there are {len(level.raw)} distinct n-grams of "
                    f"order {order}; allow as many, or lower --ngram.order or --train.steps"
                )

    def _distribution(self, params: Params, context: jax.Array) -> jax.Array:
        interpolated = INTERPOLATED[self.config.ngram.smoothing]
        return ngram.distribution(params["ngram"], context, self.data.vocab_size, interpolated)

    def target_scores(self, params, batch) -> tuple[jax.Array, jax.Array]:
        length, targets = self.config.ngram.order - 1, batch["targets"]
        contexts = contexts_of(batch["tokens"], batch["positions"], length, self.data.vocab_size)

        def score(at):
            context, target = at
            p = self._distribution(params, context)
            return jnp.log(p[target]), jnp.argmax(p) == target

        flat = (contexts.reshape(targets.size, length), targets.reshape(-1))
        scores = self._mapped(score, flat, targets.size)
        return tuple(x.reshape(targets.shape) for x in scores)

    def decoder(self) -> Decoder:
        """How the model generates tokens; the state is the context."""
        length, vocab_size = self.config.ngram.order - 1, self.data.vocab_size

        def step_of(params: Params):
            def step(tokens, positions, lengths, state):
                state = ngram.push(state, tokens, lengths)
                logits = lambda context: jnp.log(self._distribution(params, context))
                return self._mapped(logits, state, len(state)), state

            return step

        empty = lambda rows, _: jnp.full((rows, length), vocab_size, jnp.int32)
        return Decoder(step_of, empty)

    def _mapped(self, function, rows, count: int):
        at_once = ngram.rows_at_once(self.data.vocab_size, count)
        return jax.lax.map(function, rows, batch_size=at_once)
