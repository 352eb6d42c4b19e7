"""A neural language model of a fixed window of tokens (Bengio et al. 2003)."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from genai_jax.config import Config, field
from genai_jax.losses.token import cross_entropy, token_scores
from genai_jax.networks.sequence import fixed_window
from genai_jax.networks.sequence.fixed_window import FixedWindow
from genai_jax.networks.statistical.ngram import push
from genai_jax.networks.statistical.ngram_counts import contexts_of
from genai_jax.tasks.language.data import TextData
from genai_jax.tasks.language.sampling import Decoder
from genai_jax.tasks.language.text_model import TextModel
from genai_jax.tasks.protocol import LossOutput, Params, Phase
from genai_jax.training.optimizer import default_optimizer


@dataclasses.dataclass(frozen=True)
class NeuralLmConfig:
    context: int = field(
        8, "Tokens that the model sees before the one that it predicts.", minimum=1, maximum=1024
    )
    embed_dim: int = field(64, "Width of a token's embedding.", minimum=1)
    hidden_dim: int = field(512, "Units of the hidden layer.", minimum=1)
    direct: bool = field(
        False, "Whether the embeddings are connected to the output without the hidden layer, too."
    )


class NeuralLm(TextModel):
    """The task behind ``--task=neural_lm``; see `genai_jax.tasks.protocol.Task`."""

    components: ClassVar = {**TextModel.components, "neural_lm": NeuralLmConfig}
    partition_rules: ClassVar = tuple(
        (f"^model/{pattern}$", axes) for pattern, axes in fixed_window.PARTITION_RULES
    )

    def __init__(self, config: Config):
        self.config, self.data, shape = config, TextData(config), config.neural_lm
        self.model = FixedWindow(
            self.data.vocab_size, shape.context, shape.embed_dim, shape.hidden_dim, shape.direct,
            dtype=jnp.dtype(config.run.dtype),
        )  # fmt: skip

    def init(self, key: jax.Array) -> tuple[Params, dict]:
        contexts = jnp.zeros((1, 1, self.config.neural_lm.context), jnp.int32)
        return {"model": self.model.init(key, contexts)["params"]}, {}

    def phases(self, params: Params) -> tuple[Phase, ...]:
        optimizer = default_optimizer(self.config, self.partition_rules)
        return (Phase("next_token", ("model",), self._loss, optimizer),)

    def _loss(self, params, mutables, batch, info) -> LossOutput:
        features, kernel = self._features(params, batch)
        mask = batch["loss_mask"]
        loss, nll, correct = cross_entropy(
            features, kernel, batch["targets"], mask, chunk_size=None
        )
        weight = jnp.sum(mask)
        count = jnp.maximum(weight, 1)
        metrics = {"nll": nll / count, "accuracy": correct / count}
        return LossOutput(loss / count, metrics, mutables, weight)

    def _features(self, params, batch) -> tuple[jax.Array, jax.Array]:
        """Features of all positions, and what they are multiplied by."""
        contexts = contexts_of(
            batch["tokens"], batch["positions"], self.config.neural_lm.context,
            self.data.vocab_size,
        )  # fmt: skip
        variables = {"params": params["model"]}
        features = self.model.apply(variables, contexts, method="features")
        return features, self.model.apply(variables, method="head_kernel")

    def target_scores(self, params, batch) -> tuple[jax.Array, jax.Array]:
        scores = token_scores(*self._features(params, batch), batch["targets"])
        return scores.log_probs, scores.correct

    def decoder(self) -> Decoder:
        """How the model generates tokens; the state is the context."""

        def step_of(params: Params):
            def step(tokens, positions, lengths, state):
                state = push(state, tokens, lengths)
                logits = self.model.apply({"params": params["model"]}, state[:, None])
                return logits[:, 0], state

            return step

        context, nothing = self.config.neural_lm.context, self.data.vocab_size
        return Decoder(step_of, lambda rows, _: jnp.full((rows, context), nothing, jnp.int32))
