"""Flags of an encoder-decoder: what it learns from, and its network."""

import dataclasses
from typing import ClassVar

from genai_jax.config import field
from genai_jax.sampled import TEXT_SUFFIXES
from genai_jax.tasks.language.output import OutputConfig
from genai_jax.tasks.language.sampling import TextRequest

NETWORKS = ("transformer", "recurrent")
# Objective -> share of the tokens that are hidden, if any are (T5, BART).
OBJECTIVES = {"span_corruption": 0.15, "denoising": 0.3, "prefix": None, "pairs": None}


@dataclasses.dataclass(frozen=True)
class SequenceToSequenceConfig(OutputConfig):
    objective: str = field(
        "span_corruption",
        "What is learned: to restore hidden spans (span_corruption, T5) or a text with gaps and "
        "shuffled sentences (denoising, BART), to write a text of which the first half is read "
        "(prefix), or to write the targets of pairs.",
        choices=tuple(OBJECTIVES),
    )
    network: str = field(
        "transformer",
        "Encoder and decoder: transformers, or recurrent cells with additive attention.",
        choices=NETWORKS,
    )
    encoder_layers: int | None = field(
        None, "Blocks of the encoder; as many as the decoder has if unset.", minimum=1
    )
    latents: int | None = field(
        None,
        "Latent vectors that read the source and take its place in the encoder, whose cost then "
        "hardly grows with the source (Perceiver); none if unset.",
        minimum=1,
    )
    mask_rate: float | None = field(
        None,
        "Share of the tokens that are hidden, above 0 and below 1; 0.15 for span corruption and "
        "0.3 for denoising if unset.",
    )
    span_length: float | None = field(
        None, "Mean number of tokens that are hidden in one place; 3 if unset.", minimum=1
    )
    sentinels: int | None = field(
        None,
        "Tokens that stand for hidden spans; 100 if unset.",
        minimum=1,
        maximum=2**16,
    )
    sentence_permutation: bool | None = field(
        None, "Whether denoising shuffles sentences; true if unset."
    )
    target_length: int | None = field(
        None,
        "Of pairs, tokens per row of targets; as many as --data.sequence_length if unset, which is "
        "that of sources.",
        minimum=1,
    )
    vocab_size: int | None = field(
        None,
        "Rows of the embeddings, at least the vocabulary of the tokenizer with sentinels, mask, "
        "and end; that many if unset.",
        minimum=1,
    )

    def __post_init__(self):
        uses = {
            "mask_rate": ("span_corruption", "denoising"),
            "span_length": ("span_corruption", "denoising"),
            "sentinels": ("span_corruption",),
            "sentence_permutation": ("denoising",),
            # Rows of the other objectives have several sources.
            "latents": ("span_corruption", "denoising"),
            "target_length": ("pairs",),
        }
        for name, objectives in uses.items():
            if getattr(self, name) is not None and self.objective not in objectives:
                raise ValueError(
                    f"{name}={getattr(self, name)} is for objective={' or '.join(objectives)}, not "
                    f"{self.objective}"
                )
        if self.mask_rate is not None and not 0 < self.mask_rate < 1:
            what = "nothing to restore" if self.mask_rate <= 0 else "nothing to restore it from"
            raise ValueError(
                f"mask_rate={self.mask_rate:g} leaves {what}: it must be above 0 and below 1"
            )
        for name in ("encoder_layers", "latents"):
            if self.network != "transformer" and getattr(self, name) is not None:
                raise ValueError(
                    f"{name}={getattr(self, name)} is for network=transformer, not {self.network}"
                )

    @property
    def rate(self) -> float:
        return self.mask_rate or OBJECTIVES[self.objective] or 0.0

    @property
    def span(self) -> float:
        return self.span_length or 3.0

    @property
    def sentinel_count(self) -> int:
        return self.sentinels or 100

    @property
    def permutes(self) -> bool:
        return self.sentence_permutation is not False

    @property
    def own_tokens(self) -> int:
        """Tokens besides those of the tokenizer."""
        return {"span_corruption": self.sentinel_count + 1, "denoising": 2}.get(self.objective, 0)

    @property
    def is_likelihood(self) -> bool:
        """Whether the loss is the likelihood of text, so that it has bits per byte."""
        return self.objective in ("prefix", "pairs")


@dataclasses.dataclass(frozen=True)
class SourceRequest(TextRequest):
    prompt: str = field(
        "",
        "Source text, in which <gap> is what is to be filled; if empty, the first held-out source, "
        "or none for a model that was trained with the objective prefix.",
    )
    show: str = field(
        "text",
        "What to write: the texts, or a picture of what a recurrent decoder attends to.",
        choices=("text", "alignment"),
    )
    suffixes: ClassVar = (*TEXT_SUFFIXES, ".png")

    def __post_init__(self):
        super().__post_init__()
        if self.show == "alignment":
            for name, default in (("num_samples", 1), ("prompt_file", ""), ("stop", "")):
                if getattr(self, name) != default:
                    raise ValueError(
                        f"{name}={getattr(self, name)} has no effect with show=alignment, the "
                        "picture of one pair"
                    )
