"""A pair of texts as one document: so that pairs are split, hashed, and kept like others."""

SEPARATOR = "\x1e"  # the control character for this, U+001E


def document_of(source: str, target: str) -> str:
    """The document that holds a pair; a separator within the texts becomes a space."""
    return f"{source.replace(SEPARATOR, ' ')}{SEPARATOR}{target.replace(SEPARATOR, ' ')}"


def texts_of(document: str) -> tuple[str, str]:
    """Source and target of a document."""
    source, _, target = document.partition(SEPARATOR)
    return source, target
