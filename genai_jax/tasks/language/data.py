"""The data of text tasks: packed rows of tokens."""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from genai_jax.config import Config, ConfigError
from genai_jax.data.kept import Keeper, KeptData, keep_tokenizer
from genai_jax.data.own_code import is_users_own
from genai_jax.data.text.fill_in_middle import COUNT, Sentinels
from genai_jax.data.text.loader import TextLoader
from genai_jax.data.text.sources import VALUES
from genai_jax.data.text.tokenization import Tokenizer, load_tokenizer
from genai_jax.tasks.protocol import ArraySpec, Batch

ENTRIES = ("tokens", "targets", "segment_ids", "positions", "loss_mask")


class TextData:
    """Packed text; see `genai_jax.tasks.protocol.Data`.

    Args:
      config: of the run.
      vocab_size: rows of the embeddings, if a flag sets them; as many as needed if None.
      flag: that flag.
      own_tokens: tokens that a model has besides those of the tokenizer, such as a mask.
      fills_gaps: whether the model may learn to fill in the middle.

    Attributes:
      has_questions: whether documents are questions, so that only tokens of answers are targets.
      is_values: whether the targets are exactly the pixels of images, or the samples of sounds.
    """

    def __init__(
        self,
        config: Config,
        vocab_size: int | None = None,
        flag: str = "",
        own_tokens: int = 0,
        fills_gaps: bool = False,
    ):
        if config.data.fim_rate and not fills_gaps:
            raise ConfigError(
                f"--data.fim_rate={config.data.fim_rate} is for --task=language_model, which reads "
                f"text in one direction, not for --task={config.run.task}"
            )
        if config.data.fim_rate:
            own_tokens += COUNT
        # Of a run that is only read, the copies in its workdir.
        place, tokenizer = config.kept.get("data.dataset"), config.place_of("data.tokenizer")
        self._kept = KeptData(place) if place else None
        self.config = dataclasses.replace(config.data, tokenizer=tokenizer)
        self._seed = config.run.seed
        self._vocab_size, self._flag, self._own_tokens = vocab_size, flag, own_tokens
        self.has_questions = self.config.answer_after is not None
        self.is_values = self.config.dataset in VALUES and self.config.answer_after == "="

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.config.tokenizer, self.config.end_token)

    @functools.cached_property
    def _token_bytes(self) -> np.ndarray | None:
        sizes = self.tokenizer.token_bytes()
        return None if sizes is None else np.pad(sizes, (0, self._own_tokens))

    @property
    def sentinels(self) -> Sentinels | None:
        """The tokens that mark a gap, if the model learns to fill it."""
        return Sentinels.after(self.tokenizer.vocab_size) if self.config.fim_rate else None

    @property
    def vocab_size(self) -> int:
        """Rows of the embeddings; opens the tokenizer only if no flag sets them."""
        return self._vocab_size or self.tokenizer.vocab_size + self._own_tokens

    @functools.cached_property
    def loader(self) -> TextLoader:
        self.check_vocabulary()
        return TextLoader(self.config, self._seed, self._kept)

    def check_vocabulary(self):
        """Raises `ConfigError` if the embeddings have fewer rows than there are tokens."""
        if self.tokenizer.vocab_size + self._own_tokens > self.vocab_size:
            more = f" and {self._own_tokens} of the model" if self._own_tokens else ""
            raise ConfigError(
                f"{self._flag}={self.vocab_size} is smaller than the {self.tokenizer.vocab_size} "
                f"tokens of --data.tokenizer={self.tokenizer.spec}{more}"
            )

    @property
    def batch_spec(self) -> dict[str, ArraySpec]:
        return self._spec(self.config.sequence_length)

    @property
    def held_out_spec(self) -> dict[str, ArraySpec]:
        return self._spec(self.config.scored_length)

    def _spec(self, length: int) -> dict[str, ArraySpec]:
        shape = (self.config.batch_size, length)
        dtypes = dict.fromkeys(ENTRIES, jnp.int32) | {"loss_mask": jnp.float32}
        if self._token_bytes is None:
            dtypes["target_bytes"] = jnp.int32
        return {name: ArraySpec(shape, d, ("batch", "length")) for name, d in dtypes.items()}

    @property
    def depths(self) -> tuple[int, ...]:
        """Numbers of earlier tokens from which on held-out tokens are scored apart.

        The tokens of a training row, twice as many, and so on, if held-out rows are longer.
        """
        length, found = self.config.sequence_length, []
        while length < self.config.scored_length:
            found.append(length)
            length *= 2
        return tuple(found)

    @property
    def tokens_per_step(self) -> int:
        return self.config.batch_size * self.config.sequence_length

    def target_bytes(self, batch: Batch) -> jax.Array:
        """Number of UTF-8 bytes of the text that each target stands for, [batch, length]."""
        if "target_bytes" in batch:
            return batch["target_bytes"]
        return jnp.asarray(self._token_bytes, jnp.float32)[batch["targets"]]

    def train(self, rows: Sequence[int] | None = None):
        return self.loader.batches("train", rows)

    def held_out(self, max_batches: int, rows: Sequence[int] | None = None) -> Iterator[Batch]:
        return self.loader.evaluation_batches(max_batches, rows)

    def record(self) -> dict:
        return self.loader.fingerprint()

    def keep(self, folder: pathlib.Path, record: dict) -> None:
        """Keeps the tokenizer's file, and held-out documents of data that are not built in."""
        keep_tokenizer(folder, self.config.tokenizer)
        if is_users_own(self.config.dataset):
            keeper = Keeper(folder, record, {})
            if not keeper.is_there():
                self.loader.keep(keeper)

    def check(self, trained_on: dict) -> None:
        """Raises `ConfigError` if the tokenizer differs from the one in a run's record."""
        now = self.tokenizer.fingerprint()
        before = trained_on.get("tokenizer_sha256", now)
        if before != now:
            raise ConfigError(
                f"--data.tokenizer={self.tokenizer.spec} is not the one the checkpoint was trained "
                f"with: sha256 {now[:12]} now, {before[:12]} then"
            )
