"""The smallest text family: every token has a probability of its own, whatever came before."""

from typing import ClassVar

import jax
import jax.numpy as jnp

from genai_jax.config import Config
from genai_jax.data.text.loader import DataConfig
from genai_jax.requests import Texts
from genai_jax.tasks.language.data import TextData
from genai_jax.tasks.language.sampling import Decoder, TextRequest, TextSampler, settings_of
from genai_jax.tasks.language.scores import summarize_text, text_metrics
from genai_jax.tasks.protocol import LossOutput, Phase, Task
from genai_jax.training.optimizer import default_optimizer


class Unigram(Task):
    """Logits [vocabulary]; trains, samples, and evaluates like any language model."""

    components: ClassVar = {"data": DataConfig}
    partition_rules: ClassVar = (("^model/logits$", ("vocabulary",)),)
    loss_unit = "nats per token"
    sample_request = TextRequest

    def __init__(self, config: Config):
        self.config, self.data = config, TextData(config)

    def init(self, key):
        return {"model": {"logits": jnp.zeros(self.data.vocab_size)}}, {}

    def phases(self, params):
        optimizer = default_optimizer(self.config, self.partition_rules)
        return (Phase("next_token", ("model",), self.loss, optimizer),)

    def log_probs(self, params, targets):
        return jax.nn.log_softmax(params["model"]["logits"])[targets]

    def loss(self, params, mutables, batch, info):
        weight = jnp.sum(batch["loss_mask"])
        nats = -jnp.sum(self.log_probs(params, batch["targets"]) * batch["loss_mask"])
        return LossOutput(nats / jnp.maximum(weight, 1), {}, mutables, weight)

    def example_metrics(self, params, mutables, batch, key):
        likeliest = jnp.argmax(params["model"]["logits"])
        correct = batch["targets"] == likeliest
        return text_metrics(self.log_probs(params, batch["targets"]), correct, batch, self.data)

    def summarize(self, reduced, params, mutables, key):
        return summarize_text(reduced, self.data)

    def sample(self, params, mutables, request):
        def step_of(params):
            def step(tokens, positions, lengths, state):
                logits = params["model"]["logits"]
                return jnp.broadcast_to(logits, (len(tokens), logits.size)), state

            return step

        sampler = TextSampler(Decoder(step_of, lambda rows, length: ()), self.data.tokenizer)
        key, settings = jax.random.key(request.seed), settings_of(request)
        prompts = [p for p in request.prompts() for _ in range(request.num_samples)]
        return Texts(sampler(params, prompts, key, settings, request.stop))

    def tokens_per_step(self):
        return self.data.tokens_per_step
