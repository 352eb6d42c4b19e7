"""What language models share that predict each token from a state of the tokens before it."""

import functools
from abc import abstractmethod
from typing import ClassVar

import jax
import jax.numpy as jnp

from genai_jax.data.text.loader import DataConfig
from genai_jax.requests import ExactEvaluateRequest
from genai_jax.sampled import Texts
from genai_jax.tasks.language.data import TextData
from genai_jax.tasks.language.sampling import Decoder, TextRequest, TextSampler, settings_of
from genai_jax.tasks.language.scores import summarize_text, text_metrics
from genai_jax.tasks.protocol import Batch, Mean, Params, Task


class TextModel(Task):
    """A task that predicts the next token of packed text; it has `self.data`, a `TextData`."""

    components: ClassVar = {"data": DataConfig}
    data: TextData
    loss_unit = "nats per token"
    sample_request = TextRequest
    evaluate_request = ExactEvaluateRequest

    @abstractmethod
    def target_scores(self, params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """log P(target), and whether it is the likeliest token; both [batch, length]."""

    @abstractmethod
    def decoder(self) -> Decoder:
        """How the model generates tokens."""

    def example_metrics(self, params, mutables, batch, key) -> dict[str, Mean]:
        log_probs, correct = self.target_scores(params, batch)
        scored = jnp.where(batch["loss_mask"] > 0, log_probs, 0)  # elsewhere it may be anything
        return text_metrics(scored, correct, batch, self.data)

    def summarize(self, reduced, params, mutables, key) -> dict[str, float]:
        return summarize_text(reduced, self.data)

    def sample(self, params, mutables, request: TextRequest) -> Texts:
        """Continues each prompt `num_samples` times; the texts include their prompts."""
        prompts = [p for p in request.prompts() for _ in range(request.num_samples)]
        key, settings = jax.random.key(request.seed), settings_of(request)
        return Texts(self._sampler(params, prompts, key, settings, request.stop), prompts)

    @functools.cached_property
    def _sampler(self) -> TextSampler:
        return TextSampler(self.decoder(), self.data.tokenizer)

    def tokens_per_step(self) -> int:
        return self.data.tokens_per_step
