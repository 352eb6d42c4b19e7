"""The data of an encoder-decoder: pairs of texts, or text that is its own source and target."""

import functools

import jax.numpy as jnp
import numpy as np

from genai_jax.config import Config, ConfigError, refuse_set
from genai_jax.data.text.loader import TextLoader
from genai_jax.data.text.noise import Noise, hide_spans, infill, permute_sentences, restore_spans
from genai_jax.data.text.pair_documents import texts_of
from genai_jax.data.text.pair_loader import PairLoader
from genai_jax.data.text.source_target import Corruption, Halves, Lengths
from genai_jax.tasks.language.data import ENTRIES, TextData
from genai_jax.tasks.language.sequence_to_sequence_flags import SequenceToSequenceConfig
from genai_jax.tasks.protocol import ArraySpec

GAP = "<gap>"  # in a prompt, what is to be filled
SOURCE_ENTRIES = ("source_tokens", "source_segment_ids")


class SourceTargetData(TextData):
    """Rows of sources and targets; see `genai_jax.tasks.protocol.Data`.

    Besides the tokens of the tokenizer there are, for span corruption, the sentinels, for
    denoising, the mask, and for both a token at the end of sources and targets: within these, the
    boundary is the end of a document.

    Args:
      config: of the run.

    Attributes:
      lengths: tokens of the two rows.
    """

    def __init__(self, config: Config):
        self.own: SequenceToSequenceConfig = config.sequence_to_sequence
        objective, data = self.own.objective, config.data
        flag = f"--sequence_to_sequence.objective={objective}"
        refuse_set("data", data, ["answer_after", "held_out_length"], f"has no effect with {flag}")
        super().__init__(
            config, self.own.vocab_size, "--sequence_to_sequence.vocab_size", self.own.own_tokens
        )
        self.has_sizes = self.own.is_likelihood and self._token_bytes is None
        length = data.sequence_length
        if objective == "span_corruption":
            self.lengths = Lengths(*self.noise.lengths(length))
            spans = self.noise.counts(length)[1]
            if spans > self.own.sentinel_count:
                raise ConfigError(
                    f"--data.sequence_length={length} has {spans} spans to hide, more than the "
                    f"{self.own.sentinel_count} sentinels of --sequence_to_sequence.sentinels"
                )
        elif objective == "denoising":
            self.lengths = Lengths(length + 1, length + 1)
        elif objective == "prefix":
            self.lengths = Lengths(max(length // 2, 1), length)
        else:
            self.lengths = Lengths(length, self.own.target_length or length)

    @property
    def noise(self) -> Noise:
        return Noise(self.own.rate, self.own.span)

    @property
    def first_own(self) -> int:
        """The first sentinel, or the mask."""
        return self.tokenizer.vocab_size

    @property
    def end(self) -> int:
        """The token that ends a target, and a source unless the objective is a prefix."""
        own = self.own.own_tokens
        return self.tokenizer.vocab_size + own - 1 if own else self.tokenizer.boundary_id

    @property
    def known(self) -> int:
        """Tokens that a target may have; further rows of the embeddings are unused."""
        return self.tokenizer.vocab_size + self.own.own_tokens

    @functools.cached_property
    def loader(self) -> TextLoader:
        self.check_vocabulary()
        if self.own.objective == "pairs":
            return PairLoader(self.config, self._seed, self._kept, self.lengths.target)
        return TextLoader(self.config, self._seed, self._kept, self._rewrite)

    def _rewrite(self, split: str):
        """What makes sources and targets; those that are held out do not depend on the seed."""
        if self.own.objective == "prefix":
            return Halves(self.lengths)
        seed = (self._seed % 2**32, 1) if split == "train" else (0, 0)
        return Corruption(self._corrupt, self.lengths, self.tokenizer.boundary_id, seed)

    def _corrupt(self, ids: np.ndarray, rng) -> tuple[np.ndarray, np.ndarray]:
        if self.own.objective == "span_corruption":
            return hide_spans(ids, self.noise, self.first_own, self.end, rng)
        shuffled = permute_sentences(ids, self._stops[ids], rng) if self.own.permutes else ids
        source = infill(shuffled, self.noise, self.first_own, len(ids), rng)
        return np.append(source, self.end), np.append(ids, self.end)

    @functools.cached_property
    def _stops(self) -> np.ndarray:
        """Whether a sentence ends with a token: with a full stop, or the end of a document."""
        texts = [self.tokenizer.decode([i]) for i in range(self.tokenizer.vocab_size)]
        stops = np.array([text.endswith(".") for text in texts])
        stops[self.tokenizer.boundary_id] = True
        return stops

    def _spec(self, length: int) -> dict[str, ArraySpec]:
        """The entries of a batch, the same for training and held-out data."""
        del length
        rows = self.config.batch_size
        dtypes = dict.fromkeys(ENTRIES, jnp.int32) | {"loss_mask": jnp.float32}
        if self.has_sizes:
            dtypes["target_bytes"] = jnp.int32
        shapes = {n: (d, self.lengths.target) for n, d in dtypes.items()}
        shapes |= {n: (jnp.int32, self.lengths.source) for n in SOURCE_ENTRIES}
        return {n: ArraySpec((rows, k), d, ("batch", "length")) for n, (d, k) in shapes.items()}

    @property
    def tokens_per_step(self) -> int:
        """Tokens that the networks read: of sources and of targets."""
        return self.config.batch_size * sum(self.lengths)

    # Texts for sampling.

    def source_of(self, prompt: str) -> np.ndarray:
        """The source that a prompt stands for, ids [length].

        Raises:
          ConfigError: nothing to fill, or more gaps than sentinels.
        """
        encode, objective = self.tokenizer.encode, self.own.objective
        if objective == "prefix":
            return encode(prompt)
        pieces = [prompt] if objective == "pairs" else prompt.split(GAP)
        gaps = len(pieces) - 1
        if objective == "span_corruption" and not 0 < gaps <= self.own.sentinel_count:
            problem = f"has {gaps} gaps, more than" if gaps else f"has nothing to fill: write {GAP}"
            more = f" the {self.own.sentinel_count} sentinels" if gaps else " where text is missing"
            raise ConfigError(f"the prompt {prompt[:40]!r} {problem}{more}")
        ids = [encode(pieces[0])]
        for i, piece in enumerate(pieces[1:]):
            ids += [[self.first_own + (i if objective == "span_corruption" else 0)], encode(piece)]
        return np.concatenate([*ids, [self.end]]).astype(np.int32)

    def answer(self, prompt: str, source: np.ndarray, target: np.ndarray) -> str:
        """The text of a sampled target: of span corruption, the prompt with its gaps filled."""
        objective, decode = self.own.objective, self.tokenizer.decode
        if objective == "span_corruption":
            count = self.own.sentinel_count
            target = restore_spans(source, target, self.first_own, count, self.end)
        text = decode([i for i in target if i < self.tokenizer.vocab_size])
        return prompt + text if objective == "prefix" else text

    def a_prompt(self) -> str:
        """The source of the first held-out example, as a prompt."""
        if self.own.objective == "pairs":
            return texts_of(self.loader.held_out_document(0))[0]
        if self.own.objective == "prefix":
            return ""
        batch = next(iter(self.held_out(1, [0])))
        source = batch["source_tokens"][0][batch["source_segment_ids"][0] > 0][:-1]
        parts = np.split(source, np.flatnonzero(source >= self.first_own))
        known = [part[part < self.first_own] for part in parts]
        return GAP.join(self.tokenizer.decode(part) for part in known)
