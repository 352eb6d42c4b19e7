"""Documents that a function outside this project returns; see `genai_jax.data.own_code`."""

from collections.abc import Mapping, Sequence
from typing import Any

from genai_jax.config import ConfigError, refuse_set
from genai_jax.data.own_code import read_own


def own_documents(config: Any) -> Sequence[str] | dict[str, Any]:
    """All documents, or the documents of each split.

    A split is a list of strings or, for data that do not fit into memory, an object with `__len__`,
    `__getitem__`, and a `fingerprint` that tells one content from another (see
    `genai_jax.data.text.sources.Source`).

    Raises:
      ConfigError: something else was returned.
    """
    returned = read_own(config)
    if not isinstance(returned, Mapping):
        _check(config, returned, random_access=False)
        return returned
    why = f"has no effect: {config.dataset} returned the documents of each split"
    refuse_set("data", config, ["validation_percent"], why)
    for documents in returned.values():
        _check(config, documents, random_access=True)
    return dict(returned)


def _check(config: Any, documents: Any, *, random_access: bool):
    if isinstance(documents, list | tuple):
        for i, document in enumerate(documents):
            if problem := _problem(document):
                raise ConfigError(f"--data.dataset={config.dataset}: document {i} {problem}")
        if not documents:
            raise ConfigError(f"--data.dataset={config.dataset} returned no documents")
        return
    if random_access and all(
        hasattr(documents, name) for name in ("__len__", "__getitem__", "fingerprint")
    ):
        return
    expected = "a list of strings, or a mapping with the lists of train and validation"
    if random_access:
        expected = "a list of strings, or an object with __len__, __getitem__, and fingerprint"
    raise ConfigError(
        f"--data.dataset={config.dataset} returned a {type(documents).__name__}, not {expected}"
    )


def _problem(document: Any) -> str:
    """Why something is not a document; empty if it is one."""
    if not isinstance(document, str):
        return f"is a {type(document).__name__}, not a string"
    try:
        document.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        return f"has the surrogate {document[error.start]!a}, which is no character"
    return ""
