"""Writes documents in every format that ``text:PATH`` reads."""

import csv
import gzip
import io
import json
import pathlib
from collections.abc import Sequence

FORMATS = ("txt", "md", "jsonl", "ndjson", "csv", "tsv", "parquet")
COMPRESSIONS = ("", ".gz", ".zst")


def write_documents(path: pathlib.Path, documents: Sequence[str | None], key: str = "text"):
    """Writes the documents as the name of the file says; None is a null."""
    kinds = [suffix for suffix in path.suffixes if suffix in (".gz", ".zst")]
    name = path.with_suffix("") if kinds else path
    path.write_bytes(compressed(content(name.suffix, documents, key), *kinds))


def content(suffix: str, documents: Sequence[str | None], key: str) -> bytes:
    rows = [{"id": i, key: document} for i, document in enumerate(documents)]
    if suffix in (".jsonl", ".ndjson"):
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    if suffix in (".csv", ".tsv"):
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, ["id", key], delimiter="," if suffix == ".csv" else "\t")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue().encode()
    if suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        sink = io.BytesIO()
        table = pyarrow.table({name: [row[name] for row in rows] for name in ("id", key)})
        pyarrow.parquet.write_table(table, sink)
        return sink.getvalue()
    return "\f".join(document or "" for document in documents).encode()


def compressed(data: bytes, kind: str = "") -> bytes:
    if kind == ".gz":
        return gzip.compress(data)
    if kind == ".zst":
        import pyarrow

        return pyarrow.compress(data, codec="zstd", asbytes=True)
    return data
