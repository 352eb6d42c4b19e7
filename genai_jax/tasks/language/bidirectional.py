"""What models of text that see both sides share: reading, embedding, and sampling.

They read and predict the targets of a packed row: the tokens of a document and its end. Documents
of a row do not see each other.
"""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

import kernels_pallas
from genai_jax.config import Config, ConfigError, field
from genai_jax.losses.router import router_terms
from genai_jax.networks.parallel.axes import check_length
from genai_jax.networks.parallel.pipeline import check_pipeline
from genai_jax.networks.sequence import transformer
from genai_jax.networks.sequence.flops import inactive_parameters, transformer_forward_flops
from genai_jax.networks.sequence.mixers import MIXERS
from genai_jax.networks.sequence.transformer import Transformer
from genai_jax.sampled import Texts
from genai_jax.tasks.language.checks import check_attention, check_positions
from genai_jax.tasks.language.data import TextData
from genai_jax.tasks.language.output import OutputConfig
from genai_jax.tasks.language.sampling import TextRequest, settings_of, texts_to_embed
from genai_jax.tasks.language.unmasking import Unmasker, UnmaskingSampler
from genai_jax.tasks.protocol import Params, Phase, Task
from genai_jax.training.optimizer import default_optimizer, moved_by_sign


@dataclasses.dataclass(frozen=True)
class BidirectionalConfig(OutputConfig):
    vocab_size: int | None = field(
        None,
        "Rows of the embeddings: at least one more than the vocabulary of the tokenizer, since the "
        "last is the mask; exactly that if unset.",
        minimum=2,
    )


class BidirectionalModel(Task):
    """A transformer that fills in masks; a subclass says what it reads and what is scored.

    Attributes:
      component: name of its own flags, a `BidirectionalConfig`.
      mask_id: the token that stands for a hidden one.
      reading: the network as it reads text, masks or not, for embeddings and samples.
      fill: how it samples, `decoding.unmask.mask_predict` or `ancestral`.
      block: tokens that are sampled together; None for all.
    """

    component: ClassVar[str]
    fill: ClassVar
    block: int | None = None

    def __init__(self, config: Config):
        self.config, self.own = config, getattr(config, self.component)
        self.dtype = jnp.dtype(config.run.dtype)
        self.data = TextData(
            config, self.own.vocab_size, f"--{self.component}.vocab_size", own_tokens=1
        )
        self.mask_id = self.data.vocab_size - 1
        check_positions(config)
        check_mixers(config)
        if config.moe.num_experts and config.transformer.use_bias:
            raise ConfigError("--transformer.use_bias: experts have no biases (--moe.num_experts)")
        check_attention(config, *self.attention_of_a_step())
        self.partition_rules = tuple(
            (f"^model/.*{pattern}$", axes)
            for pattern, axes in transformer.partition_rules(config.transformer)
        )

    def attention_of_a_step(self) -> tuple[kernels_pallas.Mask, int]:
        """Its mask, and the number of tokens of a row."""
        return kernels_pallas.Full(), self.config.data.sequence_length

    def network(self, mask: kernels_pallas.Mask) -> Transformer:
        """The network with this mask of the attention."""
        return Transformer(
            self.config.transformer, self.data.vocab_size, backend=self.config.run.attention,
            dtype=self.dtype, parallel=self.config.parallel, moe=self.config.moe, mask=mask,
        )  # fmt: skip

    @functools.cached_property
    def reading(self) -> Transformer:
        return self.network(kernels_pallas.Full())

    def init(self, key: jax.Array) -> tuple[Params, dict]:
        tokens = jnp.zeros((1, min(self.config.data.sequence_length, 8)), jnp.int32)
        return {"model": self.reading.init(key, tokens, method="init_all")["params"]}, {}

    def phases(self, params: Params) -> tuple[Phase, ...]:
        config = self.config
        for length in {config.data.sequence_length, config.data.scored_length}:
            check_length(length)
        rows = config.data.batch_size // config.train.accumulate
        check_pipeline(config.transformer.num_layers, rows, config.parallel)
        growth = config.transformer.growth
        optimizer = default_optimizer(config, self.partition_rules, growth=growth)
        if rate := config.moe.balance_rate:
            optimizer = moved_by_sign(optimizer, "router/bias$", rate)
        return (Phase("fill_in", ("model",), self._loss, optimizer),)

    def _loss(self, params, mutables, batch, info):
        raise NotImplementedError

    def applied(
        self, network: Transformer, params: Params, *inputs: jax.Array, key: jax.Array | None = None
    ) -> tuple[jax.Array, tuple]:
        """Hidden states of tokens, positions, and segment ids, and what its experts add.

        key: of dropout, in training.
        """
        rngs = {"dropout": key} if key is not None and self.config.transformer.dropout else None
        (hidden, _), written = network.apply(
            {"params": params["model"]}, *inputs, rngs=rngs, mutable=["router"]
        )
        return hidden, router_terms(written, params["model"], self.config.moe)

    def _head_kernel(self, params: Params) -> jax.Array:
        return self.reading.apply({"params": params["model"]}, method="head_kernel")

    @property
    def _head(self) -> dict:
        """How the loss treats logits."""
        soft_cap = self.config.transformer.logits_soft_cap
        return dict(soft_cap=soft_cap, chunk_size=self.own.loss_chunk)

    # Samples.

    def unmasker(self) -> Unmasker:
        """How the model fills in masks."""
        shape, known = self.config.transformer, self.data.tokenizer.vocab_size

        def logits(params, tokens, positions, segment_ids, start, size):
            variables = {"params": params["model"]}
            hidden, _ = self.reading.apply(variables, tokens, positions, segment_ids)
            hidden = jax.lax.dynamic_slice_in_dim(hidden, start, size, 1)
            return self.reading.apply(variables, hidden, method="logits")[..., :known]

        limit = shape.max_length if shape.positions == "learned" else None
        return Unmasker(logits, type(self).fill, self.mask_id, self.block, limit)

    def request_in_training(self) -> TextRequest:
        """A request without flags, cut to the positions of training."""
        request = self.sample_request()
        length = min(request.max_tokens, max(self.config.data.sequence_length - 1, 1))
        return dataclasses.replace(request, max_tokens=length)

    def sample(self, params, mutables, request: TextRequest) -> Texts:
        """Continues each prompt `num_samples` times; the texts include their prompts."""
        prompts = [p for p in request.prompts() for _ in range(request.num_samples)]
        settings = settings_of(request)._replace(steps=request.steps)
        texts = self._sampler(params, prompts, jax.random.key(request.seed), settings, request.stop)
        return Texts(texts, prompts)

    @functools.cached_property
    def _sampler(self) -> UnmaskingSampler:
        return UnmaskingSampler(self.unmasker(), self.data.tokenizer)

    def embed(self, params, mutables, inputs) -> np.ndarray:
        """Hidden states [texts, length, embed_dim] of texts, each with the boundary token last."""
        texts = texts_to_embed(inputs)
        shape, tokenizer = self.config.transformer, self.data.tokenizer
        ids = [np.append(tokenizer.encode(text), tokenizer.boundary_id) for text in texts]
        lengths = np.array([len(x) for x in ids], np.int32)
        tokens = np.zeros((len(ids), max(lengths, default=0)), np.int32)
        if shape.positions == "learned" and tokens.shape[1] > shape.max_length:
            raise ConfigError(
                f"a text of {tokens.shape[1]} tokens needs more than the {shape.max_length} "
                "positions that the model has learned"
            )
        if not len(ids):
            return np.zeros((0, 0, shape.embed_dim), np.float32)
        for row, x in zip(tokens, ids, strict=True):
            row[: len(x)] = x
        real = np.arange(tokens.shape[1]) < lengths[:, None]
        return np.asarray(self._read(params, tokens, lengths), np.float32) * real[..., None]

    @functools.cached_property
    def _read(self):
        return jax.jit(
            lambda params, tokens, lengths: self.reading.apply(
                {"params": params["model"]}, tokens, lengths=lengths
            )[0]
        )

    # Sizes.

    def flops_per_step(self) -> dict:
        data, moe = self.config.data, self.config.moe
        parts = self._forward_flops()
        counted = {
            "flops_per_step": 3 * data.batch_size * data.sequence_length * sum(parts.values()),
            "convention": self._flops_convention,
        }
        if moe.num_experts:
            counted["inactive_parameters"] = inactive_parameters(self.config.transformer, moe)
        return counted

    _flops_convention = (
        "6 x matmul parameters (head counted, input embedding not; of experts those that a token "
        "chooses) x tokens + attention to the whole row, not halved; as if one document filled "
        "each row; no rematerialization"
    )

    def _forward_flops(self) -> dict[str, float]:
        """FLOPs of a forward pass per token, by part."""
        parts = transformer_forward_flops(
            self.config.transformer, self.data.vocab_size, self.config.data.sequence_length,
            self.config.moe,
        )  # fmt: skip
        # Counted for a causal mask, which leaves half.
        return parts | {"attention": 2 * parts.get("attention", 0)}

    def tokens_per_step(self) -> int:
        return self.data.tokens_per_step


def check_mixers(config: Config):
    """Raises `ConfigError` for parts of a transformer that only look back."""
    shape = config.transformer
    if shape.window is not None:
        raise ConfigError(
            f"--transformer.window={shape.window} is for models that only look back, such as "
            "--task=language_model"
        )
    for name in shape.mixers:
        if name in MIXERS and name != "attention":
            raise ConfigError(
                f"--transformer.pattern={shape.pattern}: a model that fills in masks looks both "
                f"ways, which {name} does not support; use attention, or a mixer of your own"
            )
