"""The text sampler of all models: a decoder and a tokenizer, on one device or on a mesh."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from genai_jax.config import ConfigError, field
from genai_jax.data.text.tokenization import Tokenizer
from genai_jax.decoding.generate import Generated, Step, generate
from genai_jax.files import read_text
from genai_jax.networks.parallel.axes import axis_size
from genai_jax.requests import SampleRequest
from genai_jax.sampled import TEXT_SUFFIXES
from genai_jax.tasks.protocol import Params
from genai_jax.training.distributed import to_host
from genai_jax.training.sharding import LOGICAL_AXES


@dataclasses.dataclass(frozen=True)
class TextRequest(SampleRequest):
    num_samples: int = field(1, "Samples for each prompt.", minimum=1)
    prompt: str = field("", "Text to continue.")
    prompt_file: str = field("", "File with one prompt per line.", path=True)
    max_tokens: int = field(256, "Maximum number of new tokens in a sample.", minimum=1)
    temperature: float = field(
        1.0, "Divides the logits; 0 always takes the likeliest token.", minimum=0
    )
    top_k: int = field(0, "Sample among the k likeliest tokens; 0: all.", minimum=0)
    top_p: float = field(
        1.0, "Sample among the likeliest tokens whose probability reaches p.", minimum=0, maximum=1
    )
    stop: str = field("", "Text that ends a sample and is left out of it.")
    suffixes: ClassVar = TEXT_SUFFIXES
    in_training: ClassVar = 2
    in_random_order: ClassVar = False  # whether the order of the tokens depends on the seed

    def __post_init__(self):
        if 0 < self.temperature < 1e-6:
            raise ValueError(
                f"temperature={self.temperature} is too small to divide by; 0 takes the likeliest "
                "token"
            )
        unused = {"top_k": 0, "top_p": 1.0} | ({} if self.in_random_order else {"seed": 0})
        for name, default in unused.items():
            if self.temperature == 0 and getattr(self, name) != default:
                raise ValueError(
                    f"{name}={getattr(self, name)} has no effect with temperature=0, which always "
                    "takes the likeliest token"
                )
        if self.top_k == 1 and self.seed and not self.in_random_order:
            raise ValueError(
                f"seed={self.seed} has no effect with top_k=1, which always takes the likeliest "
                "token"
            )
        if self.prompt and self.prompt_file:
            raise ValueError("`prompt` and `prompt_file` exclude each other")

    def prompts(self) -> list[str]:
        """The prompts: at least one, which may be empty."""
        return read_prompts(self.prompt, self.prompt_file)


def read_prompts(prompt: str, prompt_file: str) -> list[str]:
    """The prompt, or the lines of the file if there is one; at least one.

    Raises:
      ConfigError: a file that cannot be read, or is empty.
    """
    if not prompt_file:
        return [prompt]
    lines = read_text(prompt_file, f"--prompt_file={prompt_file}").splitlines()
    if not lines:
        raise ConfigError(f"--prompt_file={prompt_file} is empty")
    return lines


def texts_to_embed(inputs: Any) -> Sequence[str]:
    """The texts of a call of `Task.embed`.

    Raises:
      ConfigError: neither a text nor a list of texts.
    """
    texts = [inputs] if isinstance(inputs, str) else inputs
    if not isinstance(texts, list | tuple) or not all(isinstance(t, str) for t in texts):
        raise ConfigError(f"the model embeds a text or a list of texts, not {inputs!r:.80}")
    return texts


class Decoder(NamedTuple):
    """How a model generates tokens.

    Attributes:
      step: parameters -> one pass over new tokens, a `decoding.generate.Step`; logits are over the
        tokenizer's vocabulary.
      empty_state: (rows, tokens) -> the state before the first token, with room for that many.
      max_length: number of positions that the model supports; None for any.
      begin: for models that read a source: (parameters, sources [rows, source_length], their
        lengths [rows], tokens) -> the state before the first token, in place of `empty_state`.
    """

    step: Callable[[Params], Step]
    empty_state: Callable[[int, int], Any]
    max_length: int | None = None
    begin: Callable[[Params, jax.Array, jax.Array, int], Any] | None = None


class Settings(NamedTuple):
    """How tokens are sampled; see `TextRequest`."""

    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    stop_tokens: tuple[int, ...] = ()
    steps: int | None = None  # passes of a model that fills in masks, for tokens of one block


class TokenSampler:
    """Continues rows of tokens; compiled once for each shape of prompts and settings.

    On a mesh, rows are divided over the devices that share a batch. With several processes, all
    have to make the same calls, and all get the same results.
    """

    def __init__(self, decoder: Decoder):
        self.decoder = decoder
        self._program = jax.jit(self._generate, static_argnames="settings")

    def __call__(
        self, params: Params, prompts: Sequence[np.ndarray], key: jax.Array, settings: Settings,
        sources: Sequence[np.ndarray] | None = None,
    ) -> Generated:  # fmt: skip
        """Continues prompts of token ids [length], at least one token each.

        The randomness of a row depends only on its index and the key.

        Args:
          params: of the model.
          prompts: what comes before the first sampled token.
          key: for sampling.
          settings: how tokens are sampled.
          sources: token ids [source_length] for each row, for a model that reads sources.

        Returns:
          Host arrays: tokens [prompts, longest prompt + max_tokens], prompts included, and the
          number of valid tokens in each row, [prompts].

        Raises:
          ConfigError: more positions than the model supports.
        """
        longest, count = max(map(len, prompts)), len(prompts)
        total, limit = longest + settings.max_tokens, self.decoder.max_length
        if limit is not None and total > limit:
            raise ConfigError(
                f"prompt and --max_tokens={settings.max_tokens} need {total} positions, more than "
                f"the {limit} that the model has learned"
            )
        rows = count + -count % _batch_devices()  # padded so that it divides evenly over devices
        source = None if sources is None else _padded(sources, rows)
        generated = self._program(params, *_padded(prompts, rows), key, source, settings=settings)
        return Generated(*(x[:count] for x in to_host(tuple(generated))))

    def _generate(self, params, prompts, lengths, key, source, settings: Settings) -> Generated:
        prompts = nn.with_logical_constraint(prompts, ("batch", None))
        total = prompts.shape[1] + settings.max_tokens
        if source is None:
            state = self.decoder.empty_state(prompts.shape[0], total)
        else:
            state = self.decoder.begin(params, *source, total)
        return generate(
            self.decoder.step(params),
            state,
            prompts,
            lengths,
            key,
            max_new_tokens=settings.max_tokens,
            stop_tokens=settings.stop_tokens,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
        )


def _padded(rows: Sequence[np.ndarray], count: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of ids, padded on the right, and their lengths; `count` rows, the last ones of zeros."""
    lengths = np.array([len(row) for row in rows], np.int32)
    padded = np.zeros((count, max(int(lengths.max()), 1)), np.int32)
    for target, row in zip(padded, rows, strict=False):
        target[: len(row)] = row
    return padded, np.pad(lengths, (0, count - len(lengths)), constant_values=1)


class TextSampler:
    """Continues texts: a `TokenSampler` and a tokenizer."""

    def __init__(self, decoder: Decoder, tokenizer: Tokenizer):
        self.tokens, self.tokenizer = TokenSampler(decoder), tokenizer

    def __call__(
        self, params: Params, prompts: Sequence[str], key: jax.Array, settings: Settings,
        stop: str = "",
    ) -> list[str]:  # fmt: skip
        """Each prompt with its continuation, up to the text `stop`."""
        boundary = self.tokenizer.boundary_id
        ids = [np.concatenate([[boundary], self.tokenizer.encode(p)]) for p in prompts]
        stops = [boundary, *settings.stop_tokens]
        if stop and len(self.tokenizer.encode(stop)) == 1:
            stops.append(int(self.tokenizer.encode(stop)[0]))
        generated = self.tokens(params, ids, key, settings._replace(stop_tokens=tuple(stops)))
        rows = zip(generated.tokens, generated.lengths, prompts, strict=True)
        continued = [(p, self._continuation(p, row[1:end])) for row, end, p in rows]
        return [p + (text.split(stop)[0] if stop else text) for p, text in continued]

    def fill(
        self, params: Params, prefix: str, suffix: str, count: int, key: jax.Array,
        settings: Settings, arrange: Callable[[np.ndarray, np.ndarray], Sequence[np.ndarray]],
    ) -> list[str]:  # fmt: skip
        """Texts that begin with `prefix` and end with `suffix`.

        Args:
          params: of the model.
          prefix, suffix: what surrounds the gap.
          count: how many texts.
          key: for sampling.
          settings: how tokens are sampled.
          arrange: ids of prefix and suffix -> what comes before the middle.
        """
        boundary = self.tokenizer.boundary_id
        parts = arrange(*(np.asarray(self.tokenizer.encode(t), np.int32) for t in (prefix, suffix)))
        ids = np.concatenate([[boundary], *parts])
        settings = settings._replace(stop_tokens=(boundary, *settings.stop_tokens))
        generated = self.tokens(params, [ids] * count, key, settings)
        middles = (
            row[len(ids) : end]
            for row, end in zip(generated.tokens, generated.lengths, strict=True)
        )
        return [prefix + self.tokenizer.decode(m[m != boundary]) + suffix for m in middles]

    def _continuation(self, prompt: str, row: np.ndarray) -> str:
        """The text after the prompt, decoded together with it: a token may have a leading space."""
        row = row[row != self.tokenizer.boundary_id]
        text = self.tokenizer.decode(row)
        if text.startswith(prompt):
            return text[len(prompt) :]
        return self.tokenizer.decode(row[len(self.tokenizer.encode(prompt)) :])


def settings_of(request: TextRequest) -> Settings:
    """The settings from the flags of the sample command."""
    return Settings(request.max_tokens, request.temperature, request.top_k, request.top_p)


def _batch_devices() -> int:
    """Number of devices over which the mesh in use divides a batch."""
    return int(np.prod([axis_size(axis) for axis in LOGICAL_AXES["batch"]]))
