"""What language models that are fitted without gradients share."""

from genai_jax.config import Config, refuse_set
from genai_jax.tasks.language.data import TextData
from genai_jax.tasks.language.text_model import TextModel
from genai_jax.tasks.protocol import Params, Phase


class StatisticalTextModel(TextModel):
    """A task that is `Fitted`, and predicts the next token of packed text."""

    def __init__(self, config: Config):
        refuse_set("run", config.run, ("dtype",), "has no effect: probabilities are float32")
        self.config, self.data = config, TextData(config)

    def phases(self, params: Params) -> tuple[Phase, ...]:
        return ()
