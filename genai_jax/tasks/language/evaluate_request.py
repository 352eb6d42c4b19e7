"""What the evaluate command can ask of a language model besides its likelihood."""

import dataclasses

from genai_jax.config import field
from genai_jax.requests import ExactEvaluateRequest
from genai_jax.tasks.language.ablation import heads_of
from genai_jax.tasks.language.needle import lengths_of


@dataclasses.dataclass(frozen=True)
class LanguageEvaluateRequest(ExactEvaluateRequest):
    ablate: str = field(
        "", "Attention heads whose output is set to zero: LAYER.HEAD, counted from 0, or several "
        "with commas between, as in 0.1,1.0.",
    )  # fmt: skip
    needle_lengths: str = field(
        "", "Lengths, in tokens, of haystacks of held-out text in which the model is to find a "
        "needle, with commas between; none if empty.",
    )  # fmt: skip
    needles: int | None = field(
        None, "Needles for each length and each of five depths; 20 if unset.", minimum=1
    )

    def __post_init__(self):
        heads_of(self.ablate)
        if not lengths_of(self.needle_lengths) and self.needles is not None:
            raise ValueError(f"needles={self.needles} has no effect without `needle_lengths`")
