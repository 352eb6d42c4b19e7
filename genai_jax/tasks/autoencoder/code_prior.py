"""An autoregressive prior over the codes of an autoencoder, with the language-model transformer.

The second stage of VQ-VAE (van den Oord et al. 2017) and VQGAN (Esser et al. 2021): codes in raster
order, all codes of a position in sequence, with separate tokens for each codebook.
"""

import dataclasses
import functools
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from genai_jax.config import Config, ConfigError, field
from genai_jax.data.images.loader import ImageDataConfig
from genai_jax.decoding.generate import Step, at_last_token
from genai_jax.losses.token import cross_entropy, token_scores
from genai_jax.networks.parallel.axes import ParallelConfig
from genai_jax.networks.sequence import transformer
from genai_jax.networks.sequence.config import TransformerConfig
from genai_jax.networks.sequence.flops import CONVENTION, transformer_training_flops
from genai_jax.networks.sequence.transformer import Transformer
from genai_jax.requests import ArrayRequest, EvaluateRequest
from genai_jax.sampled import Arrays
from genai_jax.tasks.arrays.data import ArrayData
from genai_jax.tasks.arrays.sampling import check_label, in_batches, requested_labels
from genai_jax.tasks.arrays.scores import ScoreFlags, score_images
from genai_jax.tasks.autoencoder.latents import Latents
from genai_jax.tasks.language.sampling import Decoder, Settings, TokenSampler
from genai_jax.tasks.language.scores import perplexity
from genai_jax.tasks.protocol import LossOutput, Mean, Params, Phase, Task, Transfer
from genai_jax.training.optimizer import default_optimizer


@dataclasses.dataclass(frozen=True)
class CodePriorConfig:
    autoencoder: str = field(
        "", "Workdir of an autoencoder with vq, rvq, or fsq latents.", run=True
    )
    condition: str = field("none", "What the model is conditioned on.", choices=("none", "class"))


@dataclasses.dataclass(frozen=True)
class _CodeSampling:
    """Flags for sampling codes, shared by both requests."""

    temperature: float = field(
        1.0, "Divides the logits; 0 always takes the likeliest code.", minimum=0
    )
    top_k: int = field(0, "Sample among the k likeliest codes; 0: all.", minimum=0)
    top_p: float = field(
        1.0, "Sample among the likeliest codes whose probability reaches p.", minimum=0, maximum=1
    )


@dataclasses.dataclass(frozen=True)
class CodeRequest(_CodeSampling, ArrayRequest):
    num_samples: int = field(64, "Images to sample.", minimum=1)
    label: str = field(
        "", "Classes to sample, comma-separated and repeated in order; all in order if empty."
    )


@dataclasses.dataclass(frozen=True)
class CodeScoreRequest(_CodeSampling, ScoreFlags, EvaluateRequest):
    sample_flags: ClassVar = (*ScoreFlags.sample_flags, "temperature", "top_k", "top_p")


class CodePrior(Task):
    """The task behind ``--task=code_prior``; see `genai_jax.tasks.protocol.Task`.

    The groups are `prior` and `autoencoder`; the latter is never trained.
    """

    components: ClassVar = {
        "data": ImageDataConfig,
        "transformer": TransformerConfig,
        "parallel": ParallelConfig,
        "code_prior": CodePriorConfig,
    }
    loss_unit = "nats per code"
    sample_request = CodeRequest
    evaluate_request = CodeScoreRequest

    def __init__(self, config: Config):
        self.config, self.data = config, ArrayData(config)
        self.dtype = jnp.dtype(config.run.dtype)
        chosen = config.code_prior
        if not chosen.autoencoder:
            raise ConfigError(
                "--code_prior.autoencoder is not set: name the workdir of an autoencoder"
            )
        self.latents = Latents(
            config.place_of("code_prior.autoencoder"), self.data, "--code_prior.autoencoder"
        )
        self.codec = self.latents.codec
        if not self.codec.codebooks:
            raise ConfigError(
                f"--code_prior.autoencoder={chosen.autoencoder} has --autoencoder.latent="
                f"{self.codec.config.latent}, which has no codes; only vq, rvq, and fsq do"
            )
        self.label_sizes = self.data.conditional_labels(chosen.condition, "--code_prior.condition")
        self.code_shape = (*self.codec.latent_shape[:-1], self.codec.codebooks)
        self.num_codes = math.prod(self.code_shape)
        self.code_tokens = self.codec.codebooks * self.codec.code_count
        self.prefix = max(1, len(self.label_sizes))  # tokens before the first code
        length, shape = self.prefix + self.num_codes, config.transformer
        if shape.positions == "learned" and length > shape.max_length:
            raise ConfigError(
                f"--transformer.max_length={shape.max_length} is less than the {length} tokens of "
                f"an image: {self.prefix} before the codes and {self.num_codes} codes"
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
        """Tokens before the codes: one per attribute of the labels, or a single start token."""
        if not self.label_sizes:
            return jnp.full((rows, 1), self.code_tokens, jnp.int32)
        starts = self.code_tokens + np.cumsum((0, *self.label_sizes[:-1]))
        return (labels + starts).astype(jnp.int32)

    def tokens_of(self, codes: jax.Array) -> jax.Array:
        """[batch, *small, codebooks] -> [batch, num_codes]."""
        tokens = codes + self.codec.code_count * jnp.arange(self.codec.codebooks)
        return tokens.reshape(codes.shape[0], -1).astype(jnp.int32)

    def codes_of(self, tokens: jax.Array) -> jax.Array:
        """The inverse of `tokens_of`."""
        tokens = tokens.reshape(-1, *self.code_shape)
        return tokens - self.codec.code_count * jnp.arange(self.codec.codebooks)

    # Parameters and loss.

    def init(self, rng: jax.Array) -> tuple[dict, dict]:
        prior_rng, other_rng = jax.random.split(rng)
        tokens = jnp.zeros((1, min(self.num_codes, 8)), jnp.int32)
        prior = self.model.init(prior_rng, tokens, method="init_all")["params"]
        return {"prior": prior, "autoencoder": self.latents.init(other_rng)["autoencoder"]}, {}

    def init_from(self) -> tuple[Transfer, ...]:
        return self.latents.init_from()

    def phases(self, params: Params) -> tuple[Phase, ...]:
        growth = self.config.transformer.growth
        optimizer = default_optimizer(self.config, self.partition_rules, growth=growth)
        return (Phase("next_code", ("prior",), self._loss, optimizer),)

    def _loss(self, params, mutables, batch, info):
        rngs = {"dropout": info.rng} if self.config.transformer.dropout else None
        nll, correct = self._sums(params, batch, rngs)
        count = batch["image"].shape[0] * self.num_codes
        return LossOutput(nll / count, {"accuracy": correct / count}, mutables)

    def _sums(self, params, batch, rngs=None):
        """Negative log-likelihood in nats, and correct predictions, summed over a batch."""
        hidden, targets, counted, variables = self._predict(params, batch, rngs)
        nll, _, correct = cross_entropy(
            hidden,
            self.model.apply(variables, method="head_kernel"),
            targets,
            counted,
            soft_cap=self.config.transformer.logits_soft_cap,
        )
        return nll, correct

    def _predict(self, params, batch, rngs=None):
        """Hidden states, the target tokens, a mask of targets that are codes, and the variables."""
        x = self.data.scaled(batch["image"])
        codes = jax.lax.stop_gradient(self.codec.codes(**params["autoencoder"], x=x))
        front = self.front(batch.get("labels"), x.shape[0])
        sequence = jnp.concatenate([front, self.tokens_of(codes)], 1)
        variables = {"params": params["prior"]}
        hidden, _ = self.model.apply(variables, sequence[:, :-1], rngs=rngs)
        counted = jnp.arange(sequence.shape[1] - 1) >= self.prefix - 1
        counted = jnp.broadcast_to(counted.astype(jnp.float32), hidden.shape[:2])
        return hidden, sequence[:, 1:], counted, variables

    # Metrics and samples.

    def example_metrics(self, params, mutables, batch, key) -> dict[str, Mean]:
        hidden, targets, counted, variables = self._predict(params, batch)
        scores = token_scores(
            hidden,
            self.model.apply(variables, method="head_kernel"),
            targets,
            soft_cap=self.config.transformer.logits_soft_cap,
        )
        mask = batch["loss_mask"]
        codes = jnp.sum(counted, 1) * mask
        return {
            "loss": Mean(-jnp.sum(scores.log_probs * counted, 1) * mask, codes),
            "accuracy": Mean(jnp.sum(scores.correct * counted, 1) * mask, codes),
        }

    def summarize(self, reduced, params, mutables, key) -> dict[str, float]:
        """Loss in nats per code of the held-out images; bits are per code, not per pixel."""
        metrics = super().summarize(reduced, params, mutables, key)
        return {
            "loss": metrics["loss"],
            "bits_per_code": metrics["loss"] / math.log(2),
            "perplexity": perplexity(metrics["loss"]),
            "accuracy": metrics["accuracy"],
            "images": round(reduced["loss"].weight / self.num_codes),
        }

    def report(self, params, mutables, batches, request) -> dict:
        """Scores of sampled images, if requested."""
        if not request.scores_samples():
            return {}
        images, labels = self._sample_images(params, request, "")
        return score_images(self.data, images, labels, request)

    def sample(self, params, mutables, request) -> Arrays:
        check_label(request.label, bool(self.label_sizes))
        images, labels = self._sample_images(params, request, request.label)
        return self.data.sampled(f"draws_seed{request.seed}", images, labels)

    def _sample_images(self, params, request, label: str) -> tuple[np.ndarray, np.ndarray | None]:
        """Images, uint8 levels [n, *space, channels], and their requested labels."""
        count = request.num_samples
        labels = requested_labels(self.data.loader, label, count) if self.label_sizes else None
        settings = Settings(self.num_codes, request.temperature, request.top_k, request.top_p)

        def some(labels, key, rows):
            prompts = list(np.asarray(self.front(labels, rows)))
            tokens = self._sampler(params, prompts, key, settings).tokens[:, self.prefix :]
            return self._images(params["autoencoder"], tokens)

        key = jax.random.key(request.seed)
        return in_batches(some, key, count, labels), labels

    @functools.cached_property
    def _sampler(self) -> TokenSampler:
        return TokenSampler(self.decoder())

    @functools.cached_property
    def _images(self):
        def images(group, tokens):
            x = self.codec.decode_codes(**group, codes=self.codes_of(tokens))
            return self.data.to_levels(x)

        return jax.jit(images)

    def decoder(self) -> Decoder:
        """How the model generates the tokens of codes."""

        def step_of(params: Params) -> Step:
            variables = {"params": params["prior"]}

            def step(tokens, positions, lengths, state):
                hidden, state = self.model.apply(
                    variables, tokens, positions, state=state, lengths=lengths
                )
                last = at_last_token(hidden, lengths)
                logits = self.model.apply(variables, last, method="logits")[:, 0]
                at = at_last_token(positions, lengths)[:, 0]
                return jnp.where(self._allowed(at + 1 - self.prefix), logits, -jnp.inf), state

            return step

        shape = self.config.transformer
        empty = lambda rows, length: transformer.empty_state(shape, rows, length, self.dtype)
        return Decoder(step_of, empty)

    def _allowed(self, index: jax.Array) -> jax.Array:
        """Mask of the tokens allowed at a code's index: [rows] -> [rows, vocabulary]."""
        book = index % self.codec.codebooks
        tokens = jnp.arange(self.model.vocab_size)
        of_book = tokens // self.codec.code_count == book[:, None]
        return of_book & (tokens < self.code_tokens)

    def tokens_per_step(self) -> int:
        return self.config.data.batch_size * self.num_codes

    def flops_per_step(self) -> dict:
        flops = transformer_training_flops(
            self.config.transformer, self.model.vocab_size, self.config.data.batch_size,
            self.prefix + self.num_codes - 1,
        )  # fmt: skip
        return {"flops_per_step": flops, "convention": CONVENTION + "; without the encoder"}
