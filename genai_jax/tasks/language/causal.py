"""Next-token prediction on packed text with a decoder-only transformer."""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from genai_jax.config import Config, ConfigError, field
from genai_jax.data.text.fill_in_middle import arranged
from genai_jax.data.text.loader import DataConfig
from genai_jax.decoding.generate import Step, at_last_token
from genai_jax.losses.router import router_terms
from genai_jax.losses.token import cross_entropy, token_scores
from genai_jax.networks.experts.config import MoeConfig
from genai_jax.networks.layers.dense import GATED
from genai_jax.networks.parallel.axes import (
    SEQUENCE,
    ParallelConfig,
    axis_size,
    check_length,
    describe_axis,
    in_token_order,
    token_order,
)
from genai_jax.networks.parallel.pipeline import check_pipeline
from genai_jax.networks.sequence import ahead, transformer
from genai_jax.networks.sequence.ahead import AheadHead, shifted_targets
from genai_jax.networks.sequence.config import TransformerConfig
from genai_jax.networks.sequence.flops import (
    CONVENTION,
    inactive_parameters,
    transformer_training_flops,
)
from genai_jax.networks.sequence.inspection import attention_weights, logit_lens
from genai_jax.networks.sequence.transformer import Transformer
from genai_jax.sampled import Texts
from genai_jax.tasks.language.ablation import (
    heads_of,
    without_heads,
)
from genai_jax.tasks.language.checks import check_attention, check_positions
from genai_jax.tasks.language.data import TextData
from genai_jax.tasks.language.evaluate_request import LanguageEvaluateRequest
from genai_jax.tasks.language.needle import check_needles, lengths_of, needle_scores
from genai_jax.tasks.language.output import OutputConfig
from genai_jax.tasks.language.sampling import (
    Decoder,
    TextRequest,
    TextSampler,
    settings_of,
    texts_to_embed,
)
from genai_jax.tasks.language.scores import summarize_text, text_metrics
from genai_jax.tasks.protocol import LossOutput, Mean, Params, Phase, Task
from genai_jax.training.optimizer import default_optimizer, moved_by_sign


@dataclasses.dataclass(frozen=True)
class LanguageModelConfig(OutputConfig):
    ahead: int = field(
        0, "Tokens after the next one that are predicted as well, each by a head of its own that "
        "only training uses.", minimum=0, maximum=64,
    )  # fmt: skip
    ahead_weight: float = field(
        0.3, "Weight of the mean loss of the tokens further ahead.", minimum=0
    )

    def __post_init__(self):
        if not self.ahead and self.ahead_weight != 0.3:
            raise ValueError(f"ahead_weight={self.ahead_weight} has no effect without `ahead`")


@dataclasses.dataclass(frozen=True)
class LanguageRequest(TextRequest):
    suffix: str = field(
        "", "Text after a gap that begins where --prompt ends, for a model that was trained with "
        "--data.fim_rate.",
    )  # fmt: skip

    def __post_init__(self):
        super().__post_init__()
        for name in ("prompt_file", "stop"):
            if self.suffix and getattr(self, name):
                raise ValueError(
                    f"{name}={getattr(self, name)} has no effect with suffix={self.suffix}"
                )


class LanguageModel(Task):
    """The task behind ``--task=language_model``; see `genai_jax.tasks.protocol.Task`."""

    components: ClassVar = {
        "data": DataConfig,
        "transformer": TransformerConfig,
        "moe": MoeConfig,
        "parallel": ParallelConfig,
        "language_model": LanguageModelConfig,
    }
    loss_unit = "nats per token"
    sample_request = LanguageRequest
    evaluate_request = LanguageEvaluateRequest

    def __init__(self, config: Config):
        self.config = config
        self.dtype = jnp.dtype(config.run.dtype)
        vocab_size, flag = config.language_model.vocab_size, "--language_model.vocab_size"
        self.data = TextData(config, vocab_size, flag, fills_gaps=True)
        shape = config.transformer
        check_positions(config)
        if config.moe.num_experts and shape.use_bias:
            raise ConfigError("--transformer.use_bias: experts have no biases (--moe.num_experts)")
        if config.moe.routing == "expert_choice":
            raise ConfigError(
                "--moe.routing=expert_choice: an expert would choose among later tokens too; it "
                "is for models that see both sides, such as --task=masked_language_model"
            )
        check_attention(config)
        self.partition_rules = tuple(
            (f"^model/.*{pattern}$", axes) for pattern, axes in transformer.partition_rules(shape)
        )
        self.partition_rules += tuple(
            (f"^ahead/.*{pattern}$", axes) for pattern, axes in ahead.PARTITION_RULES
        )
        self._heads = AheadHead(
            shape.mlp_width or 4 * shape.embed_dim, shape.activation, shape.use_bias, shape.norm,
            dtype=self.dtype,
        )  # fmt: skip
        self.model = Transformer(
            shape, self.data.vocab_size, backend=config.run.attention, dtype=self.dtype,
            parallel=config.parallel, moe=config.moe,
        )  # fmt: skip

    # Parameters and loss.

    def init(self, key: jax.Array) -> tuple[Params, dict]:
        tokens = jnp.zeros((1, min(self.config.data.sequence_length, 8)), jnp.int32)
        params = {"model": self.model.init(key, tokens, method="init_all")["params"]}
        if count := self.config.language_model.ahead:
            hidden = jnp.zeros((*tokens.shape, self.config.transformer.embed_dim), self.dtype)
            keys = jax.random.split(jax.random.fold_in(key, 1), count)
            params["ahead"] = {
                f"head_{i}": self._heads.init(keys[i], hidden)["params"] for i in range(count)
            }
        return params, {}

    def phases(self, params: Params) -> tuple[Phase, ...]:
        self._check_mesh()
        growth = self.config.transformer.growth
        optimizer = default_optimizer(self.config, self.partition_rules, growth=growth)
        if rate := self.config.moe.balance_rate:
            optimizer = moved_by_sign(optimizer, "router/bias$", rate)
        trains = ("model", "ahead") if self.config.language_model.ahead else ("model",)
        return (Phase("next_token", trains, self._loss, optimizer),)

    def _check_mesh(self):
        """Raises `ConfigError` for sizes that the mesh in use does not divide."""
        data, parallel = self.config.data, self.config.parallel
        for length in {data.sequence_length, data.scored_length}:
            check_length(length, token_order(parallel))
        rows = data.batch_size // self.config.train.accumulate
        check_pipeline(self.config.transformer.num_layers, rows, parallel)

    def _loss(self, params, mutables, batch, info) -> LossOutput:
        batch = in_token_order(self._with_later_targets(batch), self.config.parallel)
        hidden, written = self._hidden(params, batch, {"dropout": info.rng}, ["router"])
        kernel = self._head_kernel(params)
        score = functools.partial(
            cross_entropy,
            z_loss=self.config.language_model.z_loss,
            soft_cap=self.config.transformer.logits_soft_cap,
            chunk_size=self.config.language_model.loss_chunk,
        )
        loss, nll, correct = score(hidden, kernel, batch["targets"], batch["loss_mask"])
        weight = jnp.sum(batch["loss_mask"])
        count = jnp.maximum(weight, 1)
        loss = loss / count
        metrics = {"nll": nll / count, "accuracy": correct / count}
        if heads := params.get("ahead"):
            later = 0.0
            for i in range(len(heads)):
                further = self._heads.apply({"params": heads[f"head_{i}"]}, hidden)
                targets, mask = batch[f"targets_{i}"], batch[f"loss_mask_{i}"]
                total, nll, _ = score(further, kernel, targets, mask)
                later += total / jnp.maximum(jnp.sum(mask), 1)
                metrics[f"ahead_{i + 2}/nll"] = nll / jnp.maximum(jnp.sum(mask), 1)
            loss += self.config.language_model.ahead_weight * later / len(heads)
        more, router = router_terms(written, params["model"], self.config.moe)
        loss, metrics = loss + more, metrics | router
        return LossOutput(loss, metrics, mutables, weight)

    def _with_later_targets(self, batch):
        """The batch with the targets of the heads for tokens further ahead."""
        later = {}
        for i in range(self.config.language_model.ahead):
            later[f"targets_{i}"], later[f"loss_mask_{i}"] = shifted_targets(
                batch["targets"], batch["loss_mask"], batch["segment_ids"], i + 1
            )
        return {**batch, **later}

    def _hidden(self, params, batch, rngs=None, mutable=()):
        """Hidden states of a batch in token order, and the collections that the model wrote."""
        rngs = rngs if self.config.transformer.dropout else None
        (hidden, _), written = self.model.apply(
            {"params": params["model"]}, batch["tokens"], batch["positions"],
            batch["segment_ids"], rngs=rngs, mutable=list(mutable),
        )  # fmt: skip
        return hidden, written

    def _head_kernel(self, params) -> jax.Array:
        return self.model.apply({"params": params["model"]}, method="head_kernel")

    # Metrics and samples.

    def scored(self, params: Params, request: LanguageEvaluateRequest) -> Params:
        """See `genai_jax.tasks.protocol.Task`."""
        check_needles(self.data, lengths_of(request.needle_lengths), self.decoder().max_length)
        heads = heads_of(request.ablate)
        model = without_heads(params["model"], self.config.transformer, heads)
        return {**params, "model": model}

    def _scores(self, params, batch):
        """Of the targets of a batch in token order."""
        hidden, _ = self._hidden(params, batch)
        return token_scores(
            hidden, self._head_kernel(params), batch["targets"],
            soft_cap=self.config.transformer.logits_soft_cap,
            chunk_size=self.config.language_model.loss_chunk,
        )  # fmt: skip

    def example_metrics(self, params, mutables, batch, key) -> dict[str, Mean]:
        batch = in_token_order(batch, self.config.parallel)
        scores = self._scores(params, batch)
        return text_metrics(scores.log_probs, scores.correct, batch, self.data)

    @functools.cached_property
    def _correct(self):
        return jax.jit(
            lambda params, batch: (
                self._scores(params, in_token_order(batch, self.config.parallel)).correct
            )
        )

    def report(self, params, mutables, batches, request: LanguageEvaluateRequest) -> dict:
        """The needles that were found; see `needle_scores`."""
        if not request.needle_lengths:
            return {}
        params = self.scored(params, request)
        if axis_size(SEQUENCE) > 1:
            raise ConfigError(
                f"{describe_axis(SEQUENCE)}: needles are sought in whole rows (--needle_lengths)"
            )
        return needle_scores(
            functools.partial(self._correct, params), self.data,
            lengths_of(request.needle_lengths), request.needles or 20, self.decoder().max_length,
        )  # fmt: skip

    def summarize(self, reduced, params, mutables, key) -> dict[str, float]:
        return summarize_text(reduced, self.data)

    def decoder(self) -> Decoder:
        """How the model generates tokens."""
        shape = self.config.transformer
        known = self.data.tokenizer.vocab_size  # further rows of the embeddings are unused

        def step_of(params: Params) -> Step:
            variables = {"params": params["model"]}

            def step(tokens, positions, lengths, state):
                hidden, state = self.model.apply(
                    variables, tokens, positions, state=state, lengths=lengths
                )
                last = at_last_token(hidden, lengths)
                return self.model.apply(variables, last, method="logits")[:, 0, :known], state

            return step

        empty = lambda rows, length: transformer.empty_state(shape, rows, length, self.dtype)
        limit = shape.max_length if shape.positions == "learned" else None
        return Decoder(step_of, empty, limit)

    def request_in_training(self) -> LanguageRequest:
        """A request without flags, cut to the positions that the model has."""
        request, limit = LanguageRequest(), self.decoder().max_length
        if limit is None:
            return request
        return dataclasses.replace(request, max_tokens=min(request.max_tokens, limit - 1))

    def sample(self, params, mutables, request: LanguageRequest) -> Texts:
        """Continues each prompt `num_samples` times; the texts include their prompts.

        With a suffix, fills the gap between prompt and suffix.

        Raises:
          ConfigError: a suffix for a model that has not learned to fill gaps.
        """
        prompts = [p for p in request.prompts() for _ in range(request.num_samples)]
        key, settings = jax.random.key(request.seed), settings_of(request)
        if request.suffix:
            if (sentinels := self.data.sentinels) is None:
                raise ConfigError(
                    f"--suffix={request.suffix}: the model was trained without --data.fim_rate, so "
                    "that it cannot fill a gap"
                )
            first = self.config.data.fim_suffix_first == 1
            arrange = lambda prefix, suffix: arranged(prefix, suffix, sentinels, first)
            texts = self._sampler.fill(
                params, request.prompt, request.suffix, request.num_samples, key, settings, arrange
            )
            return Texts(texts, prompts)
        texts = self._sampler(params, prompts, key, settings, request.stop)
        return Texts(texts, prompts)

    @functools.cached_property
    def _sampler(self) -> TextSampler:
        return TextSampler(self.decoder(), self.data.tokenizer)

    def embed(self, params, mutables, inputs) -> np.ndarray:
        """Hidden states [texts, length, embed_dim] of texts, each after the boundary token."""
        texts = texts_to_embed(inputs)
        ids = [self._ids(text) for text in texts]
        lengths = np.array([len(x) for x in ids], np.int32)
        tokens = np.zeros((len(ids), max(lengths, default=0)), np.int32)
        for row, x in zip(tokens, ids, strict=True):
            row[: len(x)] = x
        if not len(ids):
            return np.zeros((0, 0, self.config.transformer.embed_dim), np.float32)
        hidden, _ = self._read(params, tokens, lengths)
        real = np.arange(tokens.shape[1]) < lengths[:, None]
        return np.asarray(hidden, np.float32) * real[..., None]

    @functools.cached_property
    def _read(self):
        return jax.jit(
            lambda params, tokens, lengths: self.model.apply(
                {"params": params["model"]}, tokens, lengths=lengths
            )
        )

    def attention_weights(self, params, mutables, text: str) -> np.ndarray:
        """See `genai_jax.tasks.protocol.Attends`."""
        return np.asarray(self._weights(params["model"], self._ids(text)))

    @functools.cached_property
    def _weights(self):
        return jax.jit(functools.partial(attention_weights, self.model))

    def logit_lens(self, params, text: str) -> np.ndarray:
        """Logits of one text as if the network ended before its first layer, and after each.

        [layers + 1, length, tokens of the tokenizer], float32; the last are what the model
        predicts. `params` are those of a run on one device, adapters merged in.
        """
        logits = self._lens(params["model"], self._ids(text))
        return np.asarray(logits)[..., : self.data.tokenizer.vocab_size]

    @functools.cached_property
    def _lens(self):
        return jax.jit(functools.partial(logit_lens, self.model))

    def token_texts(self, text: str) -> list[str]:
        """See `genai_jax.tasks.protocol.Attends`."""
        return ["<boundary>", *(self.data.tokenizer.decode([i]) for i in self._ids(text)[1:])]

    def _ids(self, text: str) -> np.ndarray:
        """The tokens of a document that begins with `text`, [length].

        Raises:
          ConfigError: more positions than the model has learned.
        """
        tokenizer, shape = self.data.tokenizer, self.config.transformer
        ids = np.concatenate([[tokenizer.boundary_id], tokenizer.encode(text)]).astype(np.int32)
        if shape.positions == "learned" and len(ids) > shape.max_length:
            raise ConfigError(
                f"a text of {len(ids)} tokens needs more than the {shape.max_length} positions "
                "that the model has learned"
            )
        return ids

    def flops_per_step(self) -> dict:
        shape, data, moe = self.config.transformer, self.config.data, self.config.moe
        flops = transformer_training_flops(
            shape, self.data.vocab_size, data.batch_size, data.sequence_length, moe
        )
        if heads := self.config.language_model.ahead:
            width, mlp = shape.embed_dim, self._heads.hidden_dim
            kernels = (3 if shape.activation in GATED else 2) * width * mlp
            head = kernels + width * self.data.vocab_size
            flops += 6 * heads * head * self.data.tokens_per_step
        counted = {"flops_per_step": flops, "convention": CONVENTION}
        if moe.num_experts:
            counted["inactive_parameters"] = inactive_parameters(shape, moe)
        return counted

    def tokens_per_step(self) -> int:
        return self.data.tokens_per_step
