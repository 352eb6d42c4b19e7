"""Masked language modeling (Devlin et al. 2019, BERT), and texts by mask-predict."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from genai_jax.config import field
from genai_jax.data.text.loader import DataConfig
from genai_jax.decoding.unmask import mask_predict
from genai_jax.losses.token import token_scores
from genai_jax.networks.experts.config import MoeConfig
from genai_jax.networks.parallel.axes import ParallelConfig
from genai_jax.networks.sequence.config import TransformerConfig
from genai_jax.requests import EvaluateRequest
from genai_jax.tasks.language.bidirectional import BidirectionalConfig, BidirectionalModel
from genai_jax.tasks.language.corruption import Corrupted, corrupt
from genai_jax.tasks.language.output import token_loss
from genai_jax.tasks.language.sampling import TextRequest
from genai_jax.tasks.protocol import LossOutput, Mean


@dataclasses.dataclass(frozen=True)
class MaskedConfig(BidirectionalConfig):
    mask_rate: float = field(0.15, "Share of tokens that are to be predicted, above 0 and below 1.")
    span_length: float | None = field(
        None,
        "Mean length of the spans of tokens that are to be predicted; if unset, tokens are chosen "
        "independently.",
        minimum=1,
    )
    mask_fraction: float = field(
        0.8, "Share of the tokens to be predicted that become masks.", minimum=0, maximum=1
    )
    random_fraction: float = field(
        0.1,
        "Share of the tokens to be predicted that become random tokens; those that become neither "
        "are left as they are.",
        minimum=0,
        maximum=1,
    )

    def __post_init__(self):
        if not 0 < self.mask_rate < 1:
            what = "nothing to predict" if self.mask_rate <= 0 else "nothing to predict it from"
            raise ValueError(
                f"mask_rate={self.mask_rate} leaves {what}: it must be above 0 and below 1"
            )
        shortest = 1 / (1 - self.mask_rate)
        if self.span_length is not None and self.span_length < shortest:
            raise ValueError(
                f"span_length={self.span_length} must be at least {shortest:.4g} with "
                f"mask_rate={self.mask_rate}: tokens chosen independently have runs of that mean "
                "length; leave it unset for those"
            )
        if self.mask_fraction == 0:
            raise ValueError("mask_fraction=0: the model would never see a mask")
        if self.mask_fraction + self.random_fraction > 1 + 1e-6:
            raise ValueError(
                f"mask_fraction={self.mask_fraction} and random_fraction={self.random_fraction} "
                "must add up to at most 1"
            )


@dataclasses.dataclass(frozen=True)
class MaskPredictRequest(TextRequest):
    steps: int = field(
        10,
        "Passes of mask-predict: each predicts all masks, and masks again what is least certain.",
        minimum=1,
    )


class MaskedLanguageModel(BidirectionalModel):
    """The task behind ``--task=masked_language_model``; see `genai_jax.tasks.protocol.Task`."""

    components: ClassVar = {
        "data": DataConfig,
        "transformer": TransformerConfig,
        "moe": MoeConfig,
        "parallel": ParallelConfig,
        "masked": MaskedConfig,
    }
    component = "masked"
    loss_unit = "nats per predicted token"
    sample_request = MaskPredictRequest
    evaluate_request = EvaluateRequest
    fill = staticmethod(mask_predict)

    def corrupted(self, key, batch) -> Corrupted:
        """What the network reads instead of the targets, and which of them it is to predict."""
        own = self.own
        return corrupt(
            key, batch["targets"], batch["loss_mask"] > 0, mask_id=self.mask_id,
            known=self.data.tokenizer.vocab_size, rate=own.mask_rate, span=own.span_length,
            mask_fraction=own.mask_fraction, random_fraction=own.random_fraction,
        )  # fmt: skip

    def _hidden(self, params, batch, tokens, key=None):
        places = batch["positions"], batch["segment_ids"]
        return self.applied(self.reading, params, tokens, *places, key=key)

    def _loss(self, params, mutables, batch, info) -> LossOutput:
        key, dropout_key = jax.random.split(info.rng)
        seen = self.corrupted(key, batch)
        hidden, router = self._hidden(params, batch, seen.tokens, dropout_key)
        return token_loss(
            hidden, self._head_kernel(params), batch, seen.chosen.astype(jnp.float32), self.own,
            self.config.transformer.logits_soft_cap, mutables, router=router,
        )  # fmt: skip

    def example_metrics(self, params, mutables, batch, key) -> dict[str, Mean]:
        seen = self.corrupted(key, batch)
        hidden, _ = self._hidden(params, batch, seen.tokens)
        scores = token_scores(hidden, self._head_kernel(params), batch["targets"], **self._head)
        total = lambda x: jnp.sum(x * seen.chosen, 1)
        count = jnp.sum(seen.chosen, 1, dtype=jnp.float32)
        return {
            "loss": Mean(-total(scores.log_probs), count),
            "accuracy": Mean(total(scores.correct), count),
        }

    def summarize(self, reduced, params, mutables, key) -> dict[str, float]:
        """Mean over the tokens that were chosen at random: not a likelihood of the text."""
        metrics = super().summarize(reduced, params, mutables, key)
        return metrics | {"tokens": int(reduced["loss"].weight)}
