"""An autoregressive prior over the codes of an autoencoder, by the transformer of language models.

The second stage of VQ-VAE (van den Oord et al. 2017) and VQGAN (Esser et al. 2021): codes in raster
order, those of a place one after the other, each codebook with tokens of its own.
"""

import dataclasses
import functools
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from genai_jax import media
from genai_jax.config import Config, ConfigError, field
from genai_jax.data.images.loader import ImageDataConfig
from genai_jax.decoding.generate import at_last_token, generate
from genai_jax.losses.cross_entropy import cross_entropy
from genai_jax.networks.parallel.axes import ParallelConfig
from genai_jax.networks.sequence import transformer
from genai_jax.networks.sequence.config import TransformerConfig
from genai_jax.networks.sequence.flops import CONVENTION, transformer_training_flops
from genai_jax.networks.sequence.transformer import Transformer
from genai_jax.requests import EvaluateRequest, Files, SampleRequest
from genai_jax.tasks.arrays.data import ImageTask
from genai_jax.tasks.arrays.drawing import check_label, in_batches, requested_labels
from genai_jax.tasks.arrays.scores import ScoreFlags, score_images
from genai_jax.tasks.autoencoder.latents import Latents
from genai_jax.training.optimizer import make_optimizer
from genai_jax.training.phase import Phase
from genai_jax.training.sharding import logical_axes


@dataclasses.dataclass(frozen=True)
class CodePriorConfig:
    autoencoder: str = field("", "workdir of an autoencoder with vq, rvq or fsq latents")
    condition: str = field("none", "what the model is told", choices=("none", "class"))


@dataclasses.dataclass(frozen=True)
class _Drawing:
    """Flags of drawing that both requests have."""

    temperature: float = field(1.0, "divides the logits; 0 takes the likeliest code", minimum=0)
    top_k: int = field(0, "draw among the k likeliest codes; 0: all", minimum=0)
    top_p: float = field(1.0, "draw among the likeliest whose mass reaches p", minimum=0, maximum=1)


@dataclasses.dataclass(frozen=True)
class CodeRequest(_Drawing, SampleRequest):
    num_samples: int = field(64, "images to draw", minimum=1)
    label: str = field("", "classes to draw, comma-separated, in turn; empty: all in turn")


@dataclasses.dataclass(frozen=True)
class CodeScoreRequest(_Drawing, ScoreFlags, EvaluateRequest):
    drawing: ClassVar = (*ScoreFlags.drawing, "temperature", "top_k", "top_p")


class CodePrior(ImageTask):
    """The task behind ``--task=code_prior``; see `genai_jax.training.phase.Task`.

    Groups are `prior`, and `autoencoder`, which is never trained.
    """

    components: ClassVar = {
        "data": ImageDataConfig,
        "transformer": TransformerConfig,
        "parallel": ParallelConfig,
        "code_prior": CodePriorConfig,
    }
    partition_rules: ClassVar = (
        *((f"^prior/.*{pattern}$", axes) for pattern, axes in transformer.PARTITION_RULES),
        ("^autoencoder/", (...,)),
    )
    loss_unit = "nats per code"
    sample_request = CodeRequest
    evaluate_request = CodeScoreRequest

    def __init__(self, config: Config):
        super().__init__(config)
        chosen = config.code_prior
        if not chosen.autoencoder:
            raise ConfigError("--code_prior.autoencoder is not set: say whose codes are learned")
        self.latents = Latents(chosen.autoencoder, self.loader, "--code_prior.autoencoder")
        self.codec = self.latents.codec
        if not self.codec.codebooks:
            raise ConfigError(
                f"--code_prior.autoencoder={chosen.autoencoder} has --autoencoder.latent="
                f"{self.codec.config.latent}, which has no codes; vq, rvq and fsq have"
            )
        if chosen.condition == "class" and not self.loader.label_sizes:
            raise ConfigError(f"--code_prior.condition=class: {config.data.dataset} has no labels")
        self.label_sizes = self.loader.label_sizes if chosen.condition == "class" else ()
        self.code_shape = (*self.codec.latent_shape[:-1], self.codec.codebooks)
        self.num_codes = math.prod(self.code_shape)
        self.code_tokens = self.codec.codebooks * self.codec.code_count
        self.prefix = max(1, len(self.label_sizes))  # tokens before the first code
        length, shape = self.prefix + self.num_codes, config.transformer
        if shape.positions == "learned" and length > shape.max_length:
            raise ConfigError(
                f"--transformer.max_length={shape.max_length} is less than the {length} tokens of "
                f"an image: {self.prefix} in front and {self.num_codes} codes"
            )
        vocab_size = self.code_tokens + (sum(self.label_sizes) or 1)
        self.partition_rules = (
            *(
                (f"^prior/.*{pattern}$", axes)
                for pattern, axes in transformer.partition_rules(shape)
            ),
            ("^autoencoder/", (...,)),
        )
        self.model = Transformer(
            shape, vocab_size, backend=config.run.attention, dtype=self.dtype,
            parallel=config.parallel,
        )  # fmt: skip

    # Codes and tokens.

    def front(self, labels: jax.Array | None, rows: int) -> jax.Array:
        """What comes before the codes: a token of each attribute, or one that says nothing."""
        if not self.label_sizes:
            return jnp.full((rows, 1), self.code_tokens, jnp.int32)
        starts = self.code_tokens + np.cumsum((0, *self.label_sizes[:-1]))
        return (labels + starts).astype(jnp.int32)

    def tokens_of(self, codes: jax.Array) -> jax.Array:
        """[batch, *small, codebooks] -> [batch, num_codes]."""
        own = codes + self.codec.code_count * jnp.arange(self.codec.codebooks)
        return own.reshape(codes.shape[0], -1).astype(jnp.int32)

    def codes_of(self, tokens: jax.Array) -> jax.Array:
        """The inverse of `tokens_of`."""
        own = tokens.reshape(-1, *self.code_shape)
        return own - self.codec.code_count * jnp.arange(self.codec.codebooks)

    # Parameters and loss.

    def init(self, rng: jax.Array) -> tuple[dict, dict]:
        prior_rng, other_rng = jax.random.split(rng)
        tokens = jnp.zeros((1, min(self.num_codes, 8)), jnp.int32)
        prior = self.model.init(prior_rng, tokens, method="init_all")["params"]
        return {"prior": prior, "autoencoder": self.latents.init(other_rng)["autoencoder"]}, {}

    def pretrained(self) -> dict:
        return {"autoencoder": self.latents.trained_group()}

    def phases(self, params: Any) -> tuple[Phase, ...]:
        axes = logical_axes(params, self.partition_rules)
        optimizer = make_optimizer(
            self.config.optimizer,
            self.config.train.steps,
            {"prior": axes["prior"]},
            growth=self.config.transformer.growth,
        )
        return (Phase("next_code", ("prior",), self._loss, optimizer),)

    def _loss(self, params, mutables, batch, rng):
        rngs = {"dropout": rng} if self.config.transformer.dropout else None
        nll, right = self._sums(params, batch, jnp.ones(batch["image"].shape[0]), rngs)
        count = batch["image"].shape[0] * self.num_codes
        return nll / count, ({"accuracy": right / count}, mutables)

    def _sums(self, params, batch, mask, rngs=None):
        """Negative log-likelihood in nats, and codes predicted right, summed where mask is 1."""
        x = self.scaled(batch["image"])
        codes = jax.lax.stop_gradient(self.codec.codes(**params["autoencoder"], x=x))
        front = self.front(batch.get("labels"), x.shape[0])
        sequence = jnp.concatenate([front, self.tokens_of(codes)], 1)
        variables = {"params": params["prior"]}
        hidden, _ = self.model.apply(variables, sequence[:, :-1], rngs=rngs)
        counted = jnp.arange(sequence.shape[1] - 1) >= self.prefix - 1
        nll, _, right = cross_entropy(
            hidden,
            self.model.apply(variables, method="head_kernel"),
            sequence[:, 1:],
            mask[:, None] * counted,
            soft_cap=self.config.transformer.logits_soft_cap,
        )
        return nll, right

    # Scores and draws.

    @functools.cached_property
    def _evaluation_step(self):
        @jax.jit
        def evaluation_step(params, batch):
            mask = batch["loss_mask"]
            return jnp.stack([*self._sums(params, batch, mask), jnp.sum(mask)])

        return evaluation_step

    def evaluate(self, params, mutables, batches, seed: int | None = None) -> dict:
        """Loss in nats a code of the held-out images; bits are of codes, not of pixels."""
        del mutables, seed  # nothing is random
        sums = jax.device_get([self._evaluation_step(params, batch) for batch in batches])
        nll, right, images = np.sum(np.asarray(sums, np.float64), 0)
        codes = images * self.num_codes
        return {
            "loss": nll / codes,
            "bits_per_code": nll / codes / math.log(2),
            "perplexity": math.exp(nll / codes),
            "accuracy": right / codes,
            "images": int(images),
        }

    def score(self, params, mutables, batches, request) -> dict:
        """As `evaluate`, and scores of drawn images if asked for."""
        scores = self.evaluate(params, mutables, batches(request.batches))
        if request.draws():
            images, labels = self._drawn(params, request, "")
            scores |= score_images(self.loader, images, labels, request)
        return scores

    def sample(self, params, mutables, request) -> Files:
        check_label(request.label, bool(self.label_sizes))
        images, _ = self._drawn(params, request, request.label)
        return Files(f"draws_seed{request.seed}", media.writers(images, self.loader.levels))

    def _drawn(self, params, request, label: str) -> tuple[np.ndarray, np.ndarray | None]:
        """Images, uint8 levels [n, *space, channels], and the labels asked for."""
        count = request.num_samples
        labels = requested_labels(self.loader, label, count) if self.label_sizes else None

        @functools.partial(jax.jit, static_argnums=3)
        def some(params, labels, key, rows):
            tokens = self._generated(params["prior"], labels, key, rows, request)
            x = self.codec.decode_codes(**params["autoencoder"], codes=self.codes_of(tokens))
            return self.to_levels(x)

        key = jax.random.key(request.seed)
        return in_batches(functools.partial(some, params), key, count, labels), labels

    def _generated(self, prior, labels, key, rows: int, request) -> jax.Array:
        """Tokens of codes, [rows, num_codes]."""
        variables, total = {"params": prior}, self.prefix + self.num_codes

        def step(tokens, positions, lengths, state):
            hidden, state = self.model.apply(
                variables, tokens, positions, state=state, lengths=lengths
            )
            last = at_last_token(hidden, lengths)
            logits = self.model.apply(variables, last, method="logits")[:, 0]
            at = at_last_token(positions, lengths)[:, 0]
            return jnp.where(self._allowed(at + 1 - self.prefix), logits, -jnp.inf), state

        found = generate(
            step,
            transformer.empty_state(self.config.transformer, rows, total, self.dtype),
            self.front(labels, rows),
            jnp.full(rows, self.prefix, jnp.int32),
            key,
            max_new_tokens=self.num_codes,
            temperature=request.temperature,
            top_k=request.top_k,
            top_p=request.top_p,
        )
        return found.tokens[:, self.prefix :]

    def _allowed(self, place: jax.Array) -> jax.Array:
        """The tokens of the codebook whose turn it is: [rows] -> [rows, vocabulary]."""
        book = place % self.codec.codebooks
        tokens = jnp.arange(self.model.vocab_size)
        mine = tokens // self.codec.code_count == book[:, None]
        return mine & (tokens < self.code_tokens)

    def tokens_per_step(self) -> int:
        return self.config.data.batch_size * self.num_codes

    def flops_per_step(self) -> dict:
        flops = transformer_training_flops(
            self.config.transformer, self.model.vocab_size, self.config.data.batch_size,
            self.prefix + self.num_codes - 1,
        )  # fmt: skip
        return {"flops_per_step": flops, "convention": CONVENTION + "; nothing for the encoder"}
