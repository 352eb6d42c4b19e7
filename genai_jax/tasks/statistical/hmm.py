"""A hidden Markov model of text, fitted by expectation maximization."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from genai_jax.config import field
from genai_jax.networks.statistical import hidden_markov
from genai_jax.standard_streams import message_stream
from genai_jax.tasks.language.sampling import Decoder
from genai_jax.tasks.protocol import Batch, Params
from genai_jax.tasks.statistical.text_model import StatisticalTextModel


@dataclasses.dataclass(frozen=True)
class HmmConfig:
    states: int = field(32, "Hidden states.", minimum=1)
    iterations: int = field(20, "Iterations of expectation maximization.", minimum=1)
    smoothing: float = field(
        1.0,
        "Counts that each state adds after the last iteration, in equal parts to all tokens, so "
        "that no token is impossible.",
        minimum=1e-6,
    )


class Hmm(StatisticalTextModel):
    """The task behind ``--task=hmm``; see `genai_jax.tasks.protocol.Task`."""

    components: ClassVar = {**StatisticalTextModel.components, "hmm": HmmConfig}
    partition_rules: ClassVar = (("^hmm/", (...,)),)

    def init(self, key: jax.Array) -> tuple[Params, dict]:
        return {"hmm": hidden_markov.init(key, self.config.hmm.states, self.data.vocab_size)}, {}

    def fit(self, batches) -> Params:
        """Maximizes the likelihood of all batches, which are kept in memory."""
        names = ("tokens", "targets", "positions", "segment_ids")
        kept = [tuple(np.asarray(batch[name]) for name in names) for batch in batches]
        params = self.init(jax.random.key(self.config.run.seed))[0]["hmm"]
        iterations = self.config.hmm.iterations
        for i in range(1, iterations + 1):
            expected = self.expected(params, kept)
            if self.config.train.progress:
                nats = -expected.log_likelihood / expected.tokens
                print(f"iteration {i}: {nats:.5f} nats per token", file=message_stream())
            smoothing = self.config.hmm.smoothing if i == iterations else 0
            params = hidden_markov.maximized(expected, smoothing)
        return {"hmm": params}

    def expected(self, params, batches: Sequence[tuple]) -> hidden_markov.Expected:
        """Expected counts of all batches, in float64."""
        parts = (jax.device_get(self._expected(params, *batch)) for batch in batches)
        whole = lambda x: np.asarray(x, np.float64)
        first, *others = ([*map(whole, p[:3]), whole(p[3]).sum(), whole(p[4]).sum()] for p in parts)
        for other in others:
            first = [a + b for a, b in zip(first, other, strict=True)]
        return hidden_markov.Expected(*first)

    @functools.cached_property
    def _expected(self):
        return jax.jit(hidden_markov.expected_counts)

    def target_scores(self, params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        names = ("tokens", "targets", "positions", "segment_ids")
        return hidden_markov.scores(params["hmm"], *(batch[name] for name in names))

    def decoder(self) -> Decoder:
        """How the model generates tokens; the state is what is known of the hidden one."""

        def step_of(params: Params):
            model = params["hmm"]

            def step(tokens, positions, lengths, message):
                real = jnp.arange(tokens.shape[1]) < lengths[:, None]

                def read(message, at):
                    tokens, positions, real = at
                    begins = positions == 0
                    return hidden_markov.advance(model, message, tokens, begins, real), None

                message, _ = jax.lax.scan(read, message, (tokens.T, positions.T, real.T))
                return hidden_markov.token_logits(
                    model, hidden_markov.predict(model, message)
                ), message

            return step

        empty = lambda rows, _: jnp.zeros((rows, self.config.hmm.states))
        return Decoder(step_of, empty)
