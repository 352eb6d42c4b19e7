"""What only Python asks of a run: its curves, and what its model computes on the way."""

import functools
from typing import Any

import jax
import numpy as np

from genai_jax.components import tells_how_to_move
from genai_jax.config import ConfigError
from genai_jax.tasks.protocol import Attends, Embeds, Params, PyTree
from genai_jax.training.distributed import to_host
from genai_jax.training.metrics_log import read_metrics


class Inspection:
    """The methods of a `genai_jax.runs.Run` that no command has."""

    def metrics(self) -> list[dict[str, float]]:
        """The rows of the run's ``metrics.jsonl``: {"step": 10, "train/loss": 2.3, ...}.

        A row holds what was measured at its step, so that few have held-out metrics.
        """
        return read_metrics(self.workdir / "metrics.jsonl")

    def embed(self, inputs: Any = None) -> np.ndarray:
        """What the model computes about its inputs, float32; on one device.

        For texts, a string or a list of them, the hidden states before the output embedding,
        [texts, length, embed_dim]: position 0 is the token that begins every document, position i
        the i-th token of the text, and zeros follow a text's last token. A model that fills in
        masks reads no first one, but the token that ends every document after the last. For images,
        uint8 levels [images, *space, channels], features or latents [images, ...]; held-out ones if
        None.

        Raises:
          ConfigError: a family without either, or inputs that it cannot take.
        """
        if not isinstance(self.task, Embeds):
            raise ConfigError(
                f"--task={self.config.run.task} computes neither features nor latents of its inputs"
            )
        with tells_how_to_move(self.config):
            return self.task.embed(*self._on_one_device, inputs)

    def attention(self, text: str) -> np.ndarray:
        """The attention weights of a transformer language model, [layers, heads, query, key].

        float32; each row sums to 1. Tokens are those of `tokens`. On one device.

        Raises:
          ConfigError: a family without attention over text, or mixers other than attention.
        """
        return self._attends().attention_weights(*self._on_one_device, text)

    def head_scores(self, text: str, reach: int = 4) -> dict[str, np.ndarray]:
        """How much each attention head looks back by so many tokens, and past earlier occurrences.

        {"back": [layers, heads, reach + 1], "after_earlier": the same}, means over a text that
        repeats itself; see `genai_jax.networks.sequence.inspection.head_scores`. What the model
        can do without a head, `evaluate(ablate="LAYER.HEAD")` says.
        """
        from genai_jax.networks.sequence.inspection import head_scores

        return head_scores(self.attention(text), self.tokens(text), reach)

    def logit_lens(self, text: str) -> np.ndarray:
        """Logits of the next token, as if the network ended before its first layer, and after each.

        [layers + 1, length, vocabulary], float32; the last are what the model predicts. The hidden
        states pass through the final norm and the output embedding (nostalgebraist 2020,
        "interpreting GPT: the logit lens"). Tokens are those of `tokens`. On one device.

        Raises:
          ConfigError: a family other than a transformer language model.
        """
        return self._attends().logit_lens(self._on_one_device[0], text)

    def tokens(self, text: str) -> list[str]:
        """The tokens of a text as the model reads it; the first begins every document."""
        return self._attends().token_texts(text)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of a language model: `encode`, `decode`, and `vocab_size`."""
        tokenizer = getattr(self.task.data, "tokenizer", None)
        if tokenizer is None:
            raise ConfigError(f"--task={self.config.run.task} has no tokenizer")
        return tokenizer

    def picture(self, images: np.ndarray, columns: int | None = None) -> np.ndarray:
        """Images, signals, or videos in one picture [height, width, 3], uint8.

        Args:
          images: levels [n, *space, channels], as `sample` returns them.
          columns: of the grid; about square if None.
        """
        from genai_jax import media

        levels = getattr(self.task.data, "levels", None)
        if levels is None:
            raise ConfigError(f"--task={self.config.run.task} has no images to show")
        return media.picture(np.asarray(images), levels, columns)

    def _attends(self) -> Attends:
        if not isinstance(self.task, Attends):
            raise ConfigError(
                f"--task={self.config.run.task} is not a language model with attention"
            )
        return self.task

    @functools.cached_property
    def _on_one_device(self) -> tuple[Params, PyTree]:
        model = self._materialized, self.mutables
        if self.model.mesh.size == 1:
            return model
        return jax.device_put(to_host(model), jax.local_devices()[0])
