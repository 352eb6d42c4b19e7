"""What a model is trained on: sources of documents, tokenizers, packing, the loader."""

from genai_jax.data.loader import DataConfig, TextLoader
from genai_jax.data.sources import Source, open_source
from genai_jax.data.tokenization import Tokenizer, load_tokenizer

__all__ = ["DataConfig", "Source", "TextLoader", "Tokenizer", "load_tokenizer", "open_source"]
