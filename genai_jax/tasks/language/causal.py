"""Next-token prediction on packed text with a decoder-only transformer."""

import dataclasses
import functools
import math
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

import kernels_pallas
from genai_jax.config import Config, ConfigError, field
from genai_jax.data.text.loader import DataConfig
from genai_jax.data.text.sources import PIXELS
from genai_jax.decoding.generate import at_last_token, generate
from genai_jax.losses.cross_entropy import cross_entropy
from genai_jax.losses.router import router_losses
from genai_jax.networks.experts.config import MoeConfig
from genai_jax.networks.experts.router import collect_router_sums
from genai_jax.networks.parallel.axes import ParallelConfig, check_length, in_token_order
from genai_jax.networks.parallel.pipeline import check_pipeline
from genai_jax.networks.sequence import transformer
from genai_jax.networks.sequence.config import TransformerConfig
from genai_jax.networks.sequence.flops import (
    CONVENTION,
    inactive_parameters,
    transformer_training_flops,
)
from genai_jax.networks.sequence.transformer import Transformer
from genai_jax.requests import EvaluateRequest, SampleRequest, Texts
from genai_jax.training.optimizer import make_optimizer
from genai_jax.training.phase import Phase
from genai_jax.training.sharding import logical_axes


@dataclasses.dataclass(frozen=True)
class LanguageModelConfig:
    z_loss: float = field(0.0, "weight of the squared log-normalizer", minimum=0)
    loss_chunk: int | None = field(
        None,
        "positions of a device whose logits exist at once, 0 for all; chosen by the loss if unset",
        minimum=0,
    )
    vocab_size: int | None = field(
        None, "rows of the embeddings; the tokenizer's, which it may exceed, if unset", minimum=1
    )


@dataclasses.dataclass(frozen=True)
class TextRequest(SampleRequest):
    num_samples: int = field(1, "draws, for each prompt", minimum=1)
    prompt: str = field("", "text to continue")
    prompt_file: str = field("", "file with a prompt on every line")
    max_tokens: int = field(256, "tokens drawn at most, for each sample", minimum=1)
    temperature: float = field(1.0, "divides the logits; 0 takes the likeliest token", minimum=0)
    top_k: int = field(0, "draw among the k likeliest tokens; 0: all", minimum=0)
    top_p: float = field(1.0, "draw among the likeliest whose mass reaches p", minimum=0, maximum=1)
    stop: str = field("", "text that ends a sample, itself left out")

    def prompts(self) -> list[str]:
        """The prompts, at least one, perhaps empty."""
        if not self.prompt_file:
            return [self.prompt]
        try:
            lines = pathlib.Path(self.prompt_file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read --prompt_file={self.prompt_file}: {error}") from None
        if not lines:
            raise ConfigError(f"--prompt_file={self.prompt_file} is empty")
        return lines


class LanguageModel:
    """The task behind ``--task=language_model``; see `genai_jax.training.phase.Task`."""

    components: ClassVar = {
        "data": DataConfig,
        "transformer": TransformerConfig,
        "moe": MoeConfig,
        "parallel": ParallelConfig,
        "language_model": LanguageModelConfig,
    }
    sample_request = TextRequest
    evaluate_request = EvaluateRequest
    partition_rules: ClassVar = tuple(
        (f"^model/.*{pattern}$", axes) for pattern, axes in transformer.PARTITION_RULES
    )
    batch_axes: ClassVar = {
        name: ("batch", "length")
        for name in ("tokens", "targets", "segment_ids", "positions", "loss_mask")
    }
    activation_axes: ClassVar = ()
    loss_unit = "nats per token"
    curves: ClassVar = {}

    def __init__(self, config: Config):
        self.config = config
        self.dtype = jnp.dtype(config.run.dtype)
        shape = config.transformer
        length = config.data.sequence_length
        if shape.positions == "learned" and length > shape.max_length:
            raise ConfigError(
                f"--data.sequence_length={length} is longer than the learned positions: "
                f"--transformer.max_length={shape.max_length}"
            )
        if config.moe.num_experts and shape.use_bias:
            raise ConfigError("--transformer.use_bias: experts have no biases (--moe.num_experts)")
        self._check_attention()
        self.partition_rules = tuple(
            (f"^model/.*{pattern}$", axes) for pattern, axes in transformer.partition_rules(shape)
        )
        self.model = Transformer(
            shape, self.vocab_size, backend=config.run.attention, dtype=self.dtype,
            parallel=config.parallel, moe=config.moe,
        )  # fmt: skip

    def _check_attention(self):
        """Raises `ConfigError` if the backend asked for cannot run the attention of a step."""
        shape, data, backend = self.config.transformer, self.config.data, self.config.run.attention
        q, k = (
            jax.ShapeDtypeStruct(
                (data.batch_size, data.sequence_length, heads, shape.head_width), self.dtype
            )
            for heads in (shape.num_heads, shape.kv_heads)
        )
        try:
            kernels_pallas.explain(q, k, k, backend=backend)
        except ValueError as error:
            raise ConfigError(f"--attention={backend}: {error}") from None

    @functools.cached_property
    def tokenizer(self):
        from genai_jax.data.text.tokenization import load_tokenizer

        return load_tokenizer(self.config.data.tokenizer)

    @functools.cached_property
    def vocab_size(self) -> int:
        """Rows of the embeddings. A tokenizer is opened only if the flags do not say."""
        return self.config.language_model.vocab_size or self.tokenizer.vocab_size

    @functools.cached_property
    def _loader(self):
        if self.tokenizer.vocab_size > self.vocab_size:
            raise ConfigError(
                f"--language_model.vocab_size={self.vocab_size} is smaller than the "
                f"{self.tokenizer.vocab_size} tokens of --data.tokenizer={self.tokenizer.spec}"
            )
        from genai_jax.data.text.loader import TextLoader

        return TextLoader(self.config.data, self.config.run.seed)

    def train_batches(self, rows: Sequence[int] | None = None):
        return self._loader.batches("train", rows)

    def evaluation_batches(
        self, max_batches: int, rows: Sequence[int] | None = None
    ) -> Iterator[dict]:
        return self._loader.evaluation_batches(max_batches, rows)

    def data_record(self) -> dict:
        return self._loader.fingerprint()

    def check_data(self, trained_on: dict):
        """Raises `ConfigError` if the tokenizer is not that of the record of a run's data."""
        now = self.tokenizer.fingerprint()
        before = trained_on.get("tokenizer_sha256", now)
        if before != now:
            raise ConfigError(
                f"--data.tokenizer={self.tokenizer.spec} is not the one the checkpoint was trained "
                f"with: sha256 {now[:12]} now, {before[:12]} then"
            )

    def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        shape = (self.config.data.batch_size, self.config.data.sequence_length)
        dtypes = {name: jnp.int32 for name in self.batch_axes} | {"loss_mask": jnp.float32}
        return {name: jax.ShapeDtypeStruct(shape, dtype) for name, dtype in dtypes.items()}

    def init(self, rng: jax.Array) -> tuple[dict, dict]:
        tokens = jnp.zeros((1, min(self.config.data.sequence_length, 8)), jnp.int32)
        return {"model": self.model.init(rng, tokens, method="init_all")["params"]}, {}

    def pretrained(self) -> dict:
        return {}

    def phases(self, params: Any) -> tuple[Phase, ...]:
        self._check_mesh()
        axes = logical_axes(params, self.partition_rules)
        growth = self.config.transformer.growth
        optimizer = make_optimizer(
            self.config.optimizer, self.config.train.steps, axes, growth=growth
        )
        return (Phase("next_token", ("model",), self._loss, optimizer),)

    def _check_mesh(self):
        """Raises `ConfigError` for what the mesh in use does not divide."""
        data, parallel = self.config.data, self.config.parallel
        check_length(data.sequence_length, parallel)
        rows = data.batch_size // self.config.train.accumulate
        check_pipeline(self.config.transformer.num_layers, rows, parallel)

    def _loss(self, params, mutables, batch, rng):
        (loss, nll, right), written = self._sums(params, batch, {"dropout": rng}, ["router"])
        weight = jnp.sum(batch["loss_mask"])
        count = jnp.maximum(weight, 1)
        loss = loss / count
        metrics = {"nll": nll / count, "accuracy": right / count, "weight": weight}
        if self.config.moe.num_experts:
            router_loss, more = router_losses(collect_router_sums(written), self.config.moe)
            loss, metrics = loss + router_loss, metrics | more
        return loss, (metrics, mutables)

    def _sums(self, params, batch, rngs=None, mutable=()):
        """((loss, nll, right) summed over the targets of a batch, what the model wrote)."""
        batch = in_token_order(batch, self.config.parallel)
        variables = {"params": params["model"]}
        rngs = rngs if self.config.transformer.dropout else None
        (hidden, _), written = self.model.apply(
            variables, batch["tokens"], batch["positions"], batch["segment_ids"], rngs=rngs,
            mutable=list(mutable),
        )  # fmt: skip
        sums = cross_entropy(
            hidden,
            self.model.apply(variables, method="head_kernel"),
            batch["targets"],
            batch["loss_mask"],
            z_loss=self.config.language_model.z_loss,
            soft_cap=self.config.transformer.logits_soft_cap,
            chunk_size=self.config.language_model.loss_chunk,
        )
        return sums, written

    @property
    def asks(self) -> bool:
        """Whether documents are questions, and targets those of their answers."""
        return self.config.data.answer_after is not None

    def _exact_matches(self, params, batch) -> tuple[jax.Array, jax.Array]:
        """(answers all of whose tokens are predicted right, answers), float32."""
        batch = in_token_order(batch, self.config.parallel)
        variables = {"params": params["model"]}
        hidden, _ = self.model.apply(
            variables, batch["tokens"], batch["positions"], batch["segment_ids"]
        )
        each = kernels_pallas.linear_cross_entropy(
            hidden, self.model.apply(variables, method="head_kernel"), batch["targets"],
            logits_soft_cap=self.config.transformer.logits_soft_cap or None,
        )  # fmt: skip
        mask, (rows, length) = batch["loss_mask"], batch["targets"].shape
        answer = batch["segment_ids"] + (length + 1) * jnp.arange(rows)[:, None]

        def count(tokens):
            return jax.ops.segment_sum(tokens.ravel(), answer.ravel(), rows * (length + 1))

        asked = count(mask) > 0
        right = asked & (count(mask * (1 - each.correct)) == 0)
        return jnp.sum(right, dtype=jnp.float32), jnp.sum(asked, dtype=jnp.float32)

    @functools.cached_property
    def _evaluation_step(self):
        token_bytes = np.asarray(self.tokenizer.token_bytes(), np.float32)

        @jax.jit
        def evaluation_step(params, batch):
            (_, nll, right), _ = self._sums(params, batch)
            mask = batch["loss_mask"]
            size = jnp.sum(jnp.asarray(token_bytes)[batch["targets"]] * mask)
            exact = self._exact_matches(params, batch) if self.asks else ()
            return jnp.stack([nll, right, mask.sum(), size, *exact])

        return evaluation_step

    def evaluate(self, params, mutables, batches, seed: int | None = None) -> dict:
        """Loss in nats a token, perplexity, bits per byte, over all targets of `batches`.

        Bits per byte divides the bits of every target, ends of documents included, by the UTF-8
        bytes of the text. Of data with questions (--data.answer_after) the targets are those of
        answers, and the share of answers that are right as a whole is given as well, each token
        the likeliest one behind the right ones. Of data that is pixels, bits per dimension too,
        where exactly the pixels are targets: --data.answer_after==.
        """
        del mutables, seed  # nothing is random
        sums = jax.device_get([self._evaluation_step(params, batch) for batch in batches])
        columns = 6 if self.asks else 4
        sums = np.sum(np.asarray(sums, np.float64).reshape(-1, columns), 0)
        nll, right, tokens, size = sums[:4]
        if not size:
            raise ConfigError("the held-out data has no text to score")
        loss = nll / tokens
        scores = {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "bits_per_byte": nll / size / math.log(2),
            "accuracy": right / tokens,
            "tokens": int(tokens),
            "bytes": int(size),
        }
        if self.config.data.dataset in PIXELS and self.config.data.answer_after == "=":
            scores["bits_per_dim"] = loss / math.log(2)
        if self.asks:
            exact, answers = sums[4:]
            scores |= {"exact_match": exact / answers, "answers": int(answers)}
        return scores

    def score(self, params, mutables, batches, request) -> dict:
        """As `evaluate`, and the speed of it."""
        self.evaluate(params, mutables, batches(1))  # compiles, so that the speed is of scoring
        start = time.perf_counter()
        scores = self.evaluate(params, mutables, batches(request.batches))
        return scores | {"tokens_per_second": scores["tokens"] / (time.perf_counter() - start)}

    def sample(self, params, mutables, request) -> Texts:
        """Continues each prompt `num_samples` times; the texts include their prompts."""
        del mutables
        prompts = [p for p in request.prompts() for _ in range(request.num_samples)]
        ids = [
            np.concatenate([[self.tokenizer.boundary_id], self.tokenizer.encode(p)])
            for p in prompts
        ]
        lengths = np.array([len(i) for i in ids], np.int32)
        padded = np.zeros((len(ids), lengths.max()), np.int32)
        for row, prompt in zip(padded, ids, strict=True):
            row[: len(prompt)] = prompt
        total = padded.shape[1] + request.max_tokens
        shape = self.config.transformer
        if shape.positions == "learned" and total > shape.max_length:
            raise ConfigError(
                f"prompt and --max_tokens={request.max_tokens} need {total} positions; "
                f"the model learned --transformer.max_length={shape.max_length}"
            )
        result = self._generate(request, len(ids), total)(
            params["model"], padded, lengths, jax.random.key(request.seed)
        )
        tokens, ends = jax.device_get((result.tokens, result.lengths))
        texts = []
        for row, end, prompt in zip(tokens, ends, prompts, strict=True):
            text = self._continuation(prompt, row[1:end])
            texts.append(prompt + (text.split(request.stop)[0] if request.stop else text))
        return Texts(texts)

    def _continuation(self, prompt: str, row: np.ndarray) -> str:
        """What was drawn behind the prompt, decoded with it: a token may carry a leading space."""
        row = row[row != self.tokenizer.boundary_id]
        whole = self.tokenizer.decode(row)
        if whole.startswith(prompt):
            return whole[len(prompt) :]
        return self.tokenizer.decode(row[len(self.tokenizer.encode(prompt)) :])

    def _generate(self, request, batch: int, total: int):
        """The compiled loop for one shape of prompts."""
        stops = [self.tokenizer.boundary_id]
        if request.stop and len(self.tokenizer.encode(request.stop)) == 1:
            stops.append(int(self.tokenizer.encode(request.stop)[0]))

        known = self.tokenizer.vocab_size  # further rows of the embeddings mean nothing

        def run(params, prompts, lengths, rng):
            variables = {"params": params}

            def step(tokens, positions, lengths, state):
                hidden, state = self.model.apply(
                    variables, tokens, positions, state=state, lengths=lengths
                )
                last = at_last_token(hidden, lengths)
                return self.model.apply(variables, last, method="logits")[:, 0, :known], state

            state = transformer.empty_state(self.config.transformer, batch, total, self.dtype)
            return generate(
                step,
                state,
                prompts,
                lengths,
                rng,
                max_new_tokens=request.max_tokens,
                stop_tokens=tuple(stops),
                temperature=request.temperature,
                top_k=request.top_k,
                top_p=request.top_p,
            )

        return jax.jit(run)

    def flops_per_step(self) -> dict:
        shape, data, moe = self.config.transformer, self.config.data, self.config.moe
        flops = transformer_training_flops(
            shape, self.vocab_size, data.batch_size, data.sequence_length, moe
        )
        found = {"flops_per_step": flops, "convention": CONVENTION}
        if moe.num_experts:
            found["inactive_parameters"] = inactive_parameters(shape, moe)
        return found

    def tokens_per_step(self) -> int:
        return self.config.data.batch_size * self.config.data.sequence_length
