"""Absorbing-state discrete diffusion of text (Austin et al. 2021), whole rows or block by block.

The network predicts each masked token from those that are not masked, which stay as they are (Sahoo
et al. 2024, section 3.2.3). The logits include the mask itself and every unused row of the
embeddings, which samples leave out: the probabilities of tokens sum to at most 1, and the bound
holds.
"""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp

import kernels_pallas
from genai_jax.config import Config, ConfigError, field
from genai_jax.data.text.loader import DataConfig
from genai_jax.decoding.unmask import ancestral
from genai_jax.diffusion.absorbing import Masks, random_masks
from genai_jax.losses.token import token_scores
from genai_jax.networks.experts.config import MoeConfig
from genai_jax.networks.parallel.axes import SEQUENCE, ParallelConfig, axis_size, describe_axis
from genai_jax.networks.sequence.block_masks import BlockCausal, TwoStreams
from genai_jax.networks.sequence.config import TransformerConfig
from genai_jax.networks.sequence.transformer import Transformer
from genai_jax.requests import EvaluateRequest
from genai_jax.tasks.language.bidirectional import BidirectionalConfig, BidirectionalModel
from genai_jax.tasks.language.output import token_loss
from genai_jax.tasks.language.sampling import TextRequest
from genai_jax.tasks.language.scores import likelihood_metrics, summarize_text
from genai_jax.tasks.protocol import LossOutput, Mean


@dataclasses.dataclass(frozen=True)
class DiscreteDiffusionConfig(BidirectionalConfig):
    block_size: int | None = field(
        None,
        "Tokens of a block: blocks follow one another, and diffusion is within them; 1 is "
        "autoregressive, the whole row if unset.",
        minimum=1,
    )
    held_out_times: int = field(
        1,
        "Times per block at which held-out text is scored; more lower the noise of the bound.",
        minimum=1,
        maximum=10_000,
        changeable=True,
    )

    def __post_init__(self):
        if self.block_size == 1 and self.held_out_times > 1:
            raise ValueError(
                f"held_out_times={self.held_out_times} has no effect with block_size=1, where the "
                "likelihood is exact"
            )


@dataclasses.dataclass(frozen=True)
class AncestralRequest(TextRequest):
    steps: int | None = field(
        None,
        "Steps from all masks to none, in each block; as many as it has tokens if unset.",
        minimum=1,
    )
    in_random_order: ClassVar = True


class DiscreteDiffusion(BidirectionalModel):
    """The task behind ``--task=discrete_diffusion``; see `genai_jax.tasks.protocol.Task`."""

    components: ClassVar = {
        "data": DataConfig,
        "transformer": TransformerConfig,
        "moe": MoeConfig,
        "parallel": ParallelConfig,
        "discrete_diffusion": DiscreteDiffusionConfig,
    }
    component = "discrete_diffusion"
    sample_request = AncestralRequest
    evaluate_request = EvaluateRequest
    fill = staticmethod(ancestral)

    def __init__(self, config: Config):
        super().__init__(config)
        positions, scored = config.transformer.positions, config.data.held_out_length
        if self.block is not None and scored not in (None, config.data.sequence_length):
            raise ConfigError(
                f"--data.held_out_length={scored}: blocks are scored in rows of the length of "
                "training (--discrete_diffusion.block_size)"
            )
        if self.block is not None and config.moe.routing == "expert_choice":
            raise ConfigError(
                "--moe.routing=expert_choice: an expert would choose among tokens of later blocks "
                "too (--discrete_diffusion.block_size); use token_choice"
            )
        for name in ("capacity_factor", "exchange_factor"):
            if self.block is not None and getattr(config.moe, name):
                raise ConfigError(
                    f"--moe.{name}={getattr(config.moe, name)}: tokens of later blocks "
                    "would decide which ones an expert drops (--discrete_diffusion.block_size)"
                )
        if self.block is not None and positions in ("alibi", "relative_buckets"):
            raise ConfigError(
                f"--transformer.positions={positions}: blocks need positions that are read with "
                "the tokens (--discrete_diffusion.block_size); use rope, learned, or sinusoidal"
            )

    @property
    def loss_unit(self) -> str:
        return "nats per token" if self.block == 1 else "nats per token (upper bound)"

    @property
    def block(self) -> int | None:
        return self.own.block_size

    def attention_of_a_step(self) -> tuple[kernels_pallas.Mask, int]:
        length = self.config.data.sequence_length
        if self.block is None:
            return super().attention_of_a_step()
        if length % self.block:
            raise ConfigError(
                f"--discrete_diffusion.block_size={self.block} does not divide "
                f"--data.sequence_length={length}"
            )
        return TwoStreams(length, self.block), 2 * length

    @functools.cached_property
    def reading(self) -> Transformer:
        mask = kernels_pallas.Full() if self.block is None else BlockCausal(self.block)
        return self.network(mask)

    @functools.cached_property
    def _in_two_streams(self) -> Transformer:
        return self.network(self.attention_of_a_step()[0])

    def phases(self, params):
        if self.block is not None and axis_size(SEQUENCE) > 1:
            raise ConfigError(
                f"{describe_axis(SEQUENCE)}: blocks are not split "
                "(--discrete_diffusion.block_size); use the other axes"
            )
        return super().phases(params)

    # The bound.

    def masks(self, key: jax.Array, batch) -> Masks:
        """Random masks of a batch, with weights that make a sum over them a bound."""
        block = self.block or batch["targets"].shape[1]
        return random_masks(key, batch["loss_mask"] > 0, block)

    def hidden(self, params, batch, masked: jax.Array, key=None) -> tuple[jax.Array, tuple]:
        """Hidden states [batch, length, embed_dim] of the targets, of which some are masked.

        And what `applied` returns beside them; key: of dropout, in training.
        """
        clean = batch["targets"]
        places = batch["positions"], batch["segment_ids"]
        noisy = jnp.where(masked, self.mask_id, clean)
        if self.block is None:
            return self.applied(self.reading, params, noisy, *places, key=key)
        tokens, *places = (
            jnp.concatenate(pair, 1) for pair in ((noisy, clean), *zip(places, places, strict=True))
        )
        hidden, router = self.applied(self._in_two_streams, params, tokens, *places, key=key)
        return hidden[:, : clean.shape[1]], router

    def _loss(self, params, mutables, batch, info) -> LossOutput:
        key, dropout_key = jax.random.split(info.rng)
        masks = self.masks(key, batch)
        hidden, router = self.hidden(params, batch, masks.masked, dropout_key)
        return token_loss(
            hidden, self._head_kernel(params), batch, masks.weight, self.own,
            self.config.transformer.logits_soft_cap, mutables, jnp.sum(batch["loss_mask"]), router,
        )  # fmt: skip

    def example_metrics(self, params, mutables, batch, key) -> dict[str, Mean]:
        kernel = self._head_kernel(params)

        def scores(key):
            masks = self.masks(key, batch)
            hidden, _ = self.hidden(params, batch, masks.masked)
            each = token_scores(hidden, kernel, batch["targets"], **self._head)
            return masks.weight * each.log_probs, masks.weight * each.correct

        keys = jax.random.split(key, self.own.held_out_times)
        weighted = jax.lax.map(scores, keys) if len(keys) > 1 else jax.vmap(scores)(keys)
        return likelihood_metrics(*(jnp.mean(x, 0) for x in weighted), batch, self.data)

    def summarize(self, reduced, params, mutables, key) -> dict[str, float]:
        """As of every language model, but upper bounds, exact only for blocks of one token.

        `accuracy` is the share of correct predictions in a random order.
        """
        return summarize_text(reduced, self.data)

    def sample(self, params, mutables, request: AncestralRequest):
        if self.block == 1 and request.steps is not None:
            raise ConfigError(
                f"--steps={request.steps} has no effect with --discrete_diffusion.block_size=1: a "
                "block is one token"
            )
        return super().sample(params, mutables, request)

    # Sizes.

    def _forward_flops(self) -> dict[str, float]:
        parts, length = super()._forward_flops(), self.config.data.sequence_length
        if self.block is None:
            return parts
        # Each token is read twice; together they see length + block keys.
        seen = (length + self.block) / length
        return parts | {"dense": 2 * parts["dense"], "attention": seen * parts["attention"]}

    @property
    def _flops_convention(self) -> str:
        if self.block is None:
            return super()._flops_convention
        return (
            "6 x matmul parameters (head counted, input embedding not) x tokens, of which all but "
            "the head read each twice + attention within blocks and to those before; as if one "
            "document filled each row; no rematerialization"
        )
