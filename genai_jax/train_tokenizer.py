"""Trains a byte-level BPE tokenizer on the train split of a data set.

python -m genai_jax.train_tokenizer --vocab_size=4096 --output=tokenizer.json

In Python, `genai_jax.train_tokenizer({"vocab_size": 4096})` does the same.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from genai_jax import config as config_lib
from genai_jax.callable_commands import callable_as
from genai_jax.command import run
from genai_jax.data.text.loader import DataConfig
from genai_jax.data.text.sources import Source, open_source
from genai_jax.data.text.tokenization import BOUNDARIES, MAX_IDS, Tokenizer, load_tokenizer
from genai_jax.files import write_text, writing_to
from genai_jax.outside import allow
from genai_jax.sampled import prepare_output


@dataclasses.dataclass(frozen=True)
class TrainTokenizerConfig:
    vocab_size: int = config_lib.field(
        4096, "vocabulary size, including the 256 bytes and the boundary token", minimum=257,
        maximum=MAX_IDS,
    )  # fmt: skip
    output: str = config_lib.field("tokenizer.json", "file to write; must end in .json", path=True)


# The rest of `DataConfig` is about batches of tokens.
TextConfig = dataclasses.make_dataclass(
    "TextConfig",
    [
        (f.name, f.type, dataclasses.field(default=f.default, metadata=f.metadata))
        for f in dataclasses.fields(DataConfig)
        if f.name in ("dataset", "data_dir", "text_key", "validation_percent")
    ],
    frozen=True,
)
COMPONENTS = {"run": TrainTokenizerConfig, "data": TextConfig}


def train_tokenizer(flags: Mapping[str, Any]) -> Tokenizer:
    """Trains a tokenizer, writes its file, and prints how well it compresses held-out text.

    Args:
      flags: those of the command: {"data.dataset": "text:books", "vocab_size": 4096, "output":
        "books.json"}; a run takes that file as ``--data.tokenizer``.

    Raises:
      ConfigError: flags that the command does not have, or text or a file that cannot be used.
    """
    from genai_jax.keyword_flags import as_flags

    return _trained(as_flags(flags))


def main(argv: list[str]) -> int:
    """Trains the tokenizer, writes it, and prints how well it compresses the validation split."""
    if config_lib.asks_for_help(argv):
        print(config_lib.help_text(__doc__, COMPONENTS))
        return 0
    _trained(argv)
    return 0


def _trained(argv: list[str]) -> Tokenizer:
    config, _ = config_lib.parse(argv, COMPONENTS)
    allow(config.outside())
    output = config.run.output
    if not output.endswith(".json"):
        raise config_lib.ConfigError(f"--output={output} does not end in .json")
    try:
        output.encode()  # a path that the tokenizers package cannot take
    except UnicodeEncodeError:
        raise config_lib.ConfigError(f"--output={output!a} is not UTF-8") from None
    prepare_output(output)
    # Reads the text as for the new tokenizer, which cannot represent bytes that are not UTF-8.
    data = DataConfig(**vars(config.data), tokenizer=output)
    train, validation = open_source(data, "train"), open_source(data, "validation")
    train_bpe(train, config.run.vocab_size, output)
    tokenizer = load_tokenizer(output)
    size, tokens = compression(tokenizer, validation)
    print(
        f"{output}: {tokenizer.vocab_size} tokens from {train.name}, {size / tokens:.3f} bytes per "
        f"token on {validation.name} ({size} bytes)"
    )
    return tokenizer


def train_bpe(source: Source, vocab_size: int, output: str) -> None:
    """Writes a `tokenizers` JSON file whose token `BOUNDARIES[0]` separates documents."""
    try:  # an optional package
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    except ImportError:
        raise config_lib.ConfigError(
            'training needs the package tokenizers: in the clone, pip install -e ".[text]"'
        ) from None
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOUNDARIES[0]],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    documents = (source[i] for i in range(len(source)))
    tokenizer.train_from_iterator(documents, trainer, length=len(source))
    with writing_to(f"--output={output}"):  # completely or not at all
        write_text(pathlib.Path(output), tokenizer.to_str(pretty=True))


def compression(tokenizer, source: Source) -> tuple[int, int]:
    """(bytes of all documents in UTF-8, number of tokens they are encoded as)."""
    documents = [source[i] for i in range(len(source))]
    size = sum(len(document.encode()) for document in documents)
    return size, sum(len(tokenizer.encode(document)) for document in documents)


callable_as(train_tokenizer)

if __name__ == "__main__":
    run(main)
