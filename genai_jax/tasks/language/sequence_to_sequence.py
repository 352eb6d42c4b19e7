"""Targets from sources by an encoder-decoder: span corruption, denoising, prefixes, and pairs."""

import dataclasses
import functools
import pathlib
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

import kernels_pallas
from genai_jax.config import Config, ConfigError, refuse_set
from genai_jax.data.text.loader import DataConfig
from genai_jax.decoding.generate import Step, at_last_token
from genai_jax.heat_map import write_heat_map
from genai_jax.losses.token import token_scores
from genai_jax.networks.flops import count_flops
from genai_jax.networks.parallel.axes import SEQUENCE, STAGE, axis_size, describe_axis
from genai_jax.networks.sequence import encoder_decoder
from genai_jax.networks.sequence.additive_attention import RecurrentConfig, RecurrentEncoderDecoder
from genai_jax.networks.sequence.config import TransformerConfig
from genai_jax.networks.sequence.encoder_decoder import EncoderDecoder
from genai_jax.requests import ExactEvaluateRequest, Files
from genai_jax.sampled import TEXT_SUFFIXES, Texts, check_suffix
from genai_jax.tasks.language.bidirectional import check_mixers
from genai_jax.tasks.language.checks import check_attention
from genai_jax.tasks.language.output import token_loss
from genai_jax.tasks.language.sampling import Decoder, TokenSampler, settings_of
from genai_jax.tasks.language.scores import exact_matches, likelihood_metrics, summarize_text
from genai_jax.tasks.language.sequence_to_sequence_flags import (
    NETWORKS,
    SequenceToSequenceConfig,
    SourceRequest,
)
from genai_jax.tasks.language.source_target_data import SOURCE_ENTRIES, SourceTargetData
from genai_jax.tasks.protocol import LossOutput, Mean, Params, Phase, Task
from genai_jax.training.optimizer import default_optimizer

TARGET_ENTRIES = ("tokens", "positions", "segment_ids")


class SequenceToSequence(Task):
    """The task behind ``--task=sequence_to_sequence``; see `genai_jax.tasks.protocol.Task`."""

    components: ClassVar = {
        "data": DataConfig,
        "transformer": TransformerConfig,
        "recurrent": RecurrentConfig,
        "sequence_to_sequence": SequenceToSequenceConfig,
    }
    sample_request = SourceRequest
    evaluate_request = ExactEvaluateRequest

    def __init__(self, config: Config):
        self.config, self.own = config, config.sequence_to_sequence
        self.dtype = jnp.dtype(config.run.dtype)
        self.data = SourceTargetData(config)
        self.loss_unit = "nats per target token"
        self._check()
        if self.own.network == "recurrent":
            self.model = RecurrentEncoderDecoder(config.recurrent, self.data.vocab_size, self.dtype)
            rules = RecurrentEncoderDecoder.PARTITION_RULES
        else:
            shape = config.transformer
            self.model = EncoderDecoder(
                shape, self.own.encoder_layers or shape.num_layers, self.data.vocab_size,
                latents=self.own.latents or 0, backend=config.run.attention, dtype=self.dtype,
            )  # fmt: skip
            rules = encoder_decoder.PARTITION_RULES
        self.partition_rules = tuple((f"^model/.*{path}$", axes) for path, axes in rules)

    def _check(self):
        """Raises `ConfigError` for flags that the network does not use or support."""
        config, shape, lengths = self.config, self.config.transformer, self.data.lengths
        for component in NETWORKS:
            if component != self.own.network:
                names = [f.name for f in dataclasses.fields(getattr(config, component))]
                why = f"has no effect with --sequence_to_sequence.network={self.own.network}"
                refuse_set(component, getattr(config, component), names, why)
        if self.own.network == "recurrent":
            refuse_set("run", config.run, ["attention"], why)
            return
        check_mixers(config)
        longest = max(*lengths, self.own.latents or 0)
        if shape.positions == "learned" and longest > shape.max_length:
            raise ConfigError(
                f"rows of {longest} tokens or latents are longer than the learned positions: "
                f"--transformer.max_length={shape.max_length}"
            )
        check_attention(config, kernels_pallas.Full(), lengths.source)
        check_attention(config, kernels_pallas.Causal(), lengths.target)

    # Parameters and loss.

    def init(self, key: jax.Array) -> tuple[Params, dict]:
        tokens = jnp.zeros((1, 8), jnp.int32)
        return {"model": self.model.init(key, tokens, method="init_all")["params"]}, {}

    def phases(self, params: Params) -> tuple[Phase, ...]:
        for axis in (SEQUENCE, STAGE):
            if axis_size(axis) > 1:
                raise ConfigError(
                    f"{describe_axis(axis)}: an encoder-decoder needs whole sequences and all "
                    "layers on a device; use the mesh axes `data`, `fsdp`, and `tensor`"
                )
        growth = self.config.transformer.growth
        optimizer = default_optimizer(self.config, self.partition_rules, growth=growth)
        return (Phase("targets", ("model",), self._loss, optimizer),)

    def hidden(self, params: Params, batch, rngs: dict | None = None) -> jax.Array:
        """Hidden states of the targets of a batch, [batch, length, embed_dim]."""
        inputs = (batch[name] for name in (*SOURCE_ENTRIES, *TARGET_ENTRIES))
        rngs = rngs if getattr(self.config, self.own.network).dropout else None
        return self.model.apply({"params": params["model"]}, *inputs, rngs=rngs)

    def _head_kernel(self, params) -> jax.Array:
        return self.model.apply({"params": params["model"]}, method="head_kernel")

    @property
    def _head(self) -> dict:
        """How scores treat logits."""
        recurrent = self.own.network == "recurrent"
        soft_cap = None if recurrent else self.config.transformer.logits_soft_cap
        return dict(soft_cap=soft_cap, chunk_size=self.own.loss_chunk)

    def _loss(self, params, mutables, batch, info) -> LossOutput:
        hidden = self.hidden(params, batch, {"dropout": info.rng})
        return token_loss(
            hidden, self._head_kernel(params), batch, batch["loss_mask"], self.own,
            self._head["soft_cap"], mutables,
        )  # fmt: skip

    # Metrics and samples.

    def example_metrics(self, params, mutables, batch, key) -> dict[str, Mean]:
        hidden, kernel = self.hidden(params, batch), self._head_kernel(params)
        scores = token_scores(hidden, kernel, batch["targets"], **self._head)
        metrics = likelihood_metrics(scores.log_probs, scores.correct, batch, self.data)
        if self.own.objective == "pairs":
            metrics["exact_match"] = exact_matches(scores.correct, batch)
        if not self.own.is_likelihood:
            del metrics["bits_per_byte"]
        return metrics

    def summarize(self, reduced, params, mutables, key) -> dict[str, float]:
        """Means over targets: of pairs and prefixes likelihoods, in bits per byte of the targets.

        `exact_match` is the share of pairs whose every target is the likeliest token given those
        before it: those that decoding with temperature 0 gets right.
        """
        if not self.own.is_likelihood:
            metrics = super().summarize(reduced, params, mutables, key)
            return metrics | {"tokens": int(reduced["loss"].weight)}
        summary = summarize_text(reduced, self.data)
        if "answers" in summary:
            summary["pairs"] = summary.pop("answers")
        return summary

    def decoder(self) -> Decoder:
        """How the model generates the tokens of a target."""
        call = lambda params, *x, **more: self.model.apply({"params": params["model"]}, *x, **more)
        known = self.data.known

        def begin(params, sources, lengths, tokens):
            return call(params, sources, lengths, tokens, method="begin"), lengths

        def step_of(params: Params) -> Step:
            def step(tokens, positions, lengths, state):
                state, of_source = state
                hidden, state = call(
                    params, tokens, positions, state, lengths, of_source, method="step"
                )
                last = at_last_token(hidden, lengths)
                logits = call(params, last, method="logits")[:, 0, :known]
                return logits, (state, of_source)

            return step

        return Decoder(step_of, None, self._limit, begin)

    @property
    def _limit(self) -> int | None:
        shape = self.config.transformer
        return shape.max_length if shape.positions == "learned" else None

    def request_in_training(self) -> SourceRequest:
        """A request without flags, for targets of the length that is trained."""
        return SourceRequest(max_tokens=max(self.data.lengths.target - 1, 1))

    def sample(self, params, mutables, request: SourceRequest) -> Texts | Files:
        """The targets of each prompt, `num_samples` times; of a prefix, prompts included.

        Raises:
          ConfigError: more source tokens than positions, or a picture that the network lacks.
        """
        alignment = request.show == "alignment"
        check_suffix(request.output, (".png",) if alignment else TEXT_SUFFIXES)
        if alignment and self.own.network != "recurrent":
            raise ConfigError(
                "--show=alignment is for --sequence_to_sequence.network=recurrent, whose decoder "
                "attends to the source once for each token"
            )
        prompts = [p for p in request.prompts() for _ in range(request.num_samples)]
        prompts = [p or self.data.a_prompt() for p in prompts]
        sources = [self._source(prompt) for prompt in prompts]
        targets = self._targets(params, prompts, sources, request)
        if alignment:
            return self._picture(params, sources[0], targets[0])
        texts = [self.data.answer(*parts) for parts in zip(prompts, sources, targets, strict=True)]
        if request.stop:
            texts = [text.split(request.stop)[0] for text in texts]
        return Texts(texts, prompts)

    def _source(self, prompt: str) -> np.ndarray:
        source, limit = self.data.source_of(prompt), self._limit
        if limit is not None and len(source) > limit:
            raise ConfigError(
                f"a source of {len(source)} tokens needs more than the {limit} positions that the "
                "model has learned"
            )
        return source

    def _targets(self, params, prompts, sources, request: SourceRequest) -> list[np.ndarray]:
        """The sampled targets of these sources, without their end."""
        boundary = self.data.tokenizer.boundary_id
        prefix = self.own.objective == "prefix"
        firsts = [[s[-1] if prefix and len(s) else boundary] for s in sources]
        settings = settings_of(request)._replace(stop_tokens=(self.data.end,))
        generated = self._sampler(params, firsts, jax.random.key(request.seed), settings, sources)
        rows = zip(generated.tokens, generated.lengths, strict=True)
        targets = [row[1:end] for row, end in rows]
        return [t[:-1] if len(t) and t[-1] == self.data.end else t for t in targets]

    @functools.cached_property
    def _sampler(self) -> TokenSampler:
        return TokenSampler(self.decoder())

    def _picture(self, params, source: np.ndarray, target: np.ndarray) -> Files:
        """What the decoder attends to before each token of a target, and before its end."""
        tokens = np.concatenate([[self.data.tokenizer.boundary_id], target]).astype(np.int32)
        weights = np.asarray(self._alignment(params, source[None], tokens[None])[0])
        names = lambda ids: [self._name(i) for i in ids]
        rows, columns = names([*target, self.data.end]), names(source)
        write = lambda path: write_heat_map(pathlib.Path(path), weights, rows, columns)
        return Files("alignment", {".png": write})

    @functools.cached_property
    def _alignment(self):
        return jax.jit(
            lambda params, source, tokens: self.model.apply(
                {"params": params["model"]}, source, tokens, method="alignment"
            )
        )

    def _name(self, token: int) -> str:
        """How a token is written beside a picture."""
        if token == self.data.end:
            return "end"
        if token >= self.data.first_own:
            return f"gap {token - self.data.first_own}"
        return self.data.tokenizer.decode([token])

    def flops_per_step(self) -> dict:
        rows, lengths = self.config.data.batch_size, self.data.lengths
        if self.own.network == "transformer":
            shape = self.config.transformer
            forward = rows * encoder_decoder.forward_flops(
                shape, self.model.encoder_layers, self.data.vocab_size, *lengths,
                latents=self.own.latents or 0,
            )  # fmt: skip
            return {"flops_per_step": 3 * forward, "convention": encoder_decoder.CONVENTION}
        of = lambda length: jax.ShapeDtypeStruct((rows, length), jnp.int32)
        inputs = [of(lengths.source)] * 2 + [of(lengths.target)] * 3

        def forward(params, *inputs):
            return self.model.apply(params, self.model.apply(params, *inputs), method="logits")

        variables = jax.eval_shape(
            functools.partial(self.model.init, method="init_all"), jax.random.key(0), of(8)
        )
        return {
            "flops_per_step": 3 * count_flops(forward, variables, *inputs),
            "convention": "3 x forward matmuls, as if rows were full",
        }

    def tokens_per_step(self) -> int:
        return self.data.tokens_per_step
