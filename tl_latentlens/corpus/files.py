"""Texts of corpus files and folders, each format read by one function. Nothing is guessed: a column is read by its name.

`texts` decides what a source is; here a path is known to exist.
"""

import bz2
import csv
import gzip
import json
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import pyarrow
import pyarrow.parquet

from tl_latentlens.corpus.fields import require_column, texts_of_records, top_column, values_at
from tl_latentlens.errors import CorpusError

_OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_JSON = (".json", ".jsonl")
_MIN_SWALLOWED = 5  # lines in one quoted field that all look like rows
_UNREADABLE = (UnicodeDecodeError, pyarrow.ArrowInvalid, EOFError, OSError, zlib.error, lzma.LZMAError, csv.Error)


def is_corpus_name(path: Path) -> bool:
    """True for a name that ends as those of corpus files do."""
    return format_of(path) in READERS


def format_of(path: Path) -> str:
    """The ending that tells a file's format, in lower case: ".jsonl" of "a.jsonl.gz"."""
    name = Path(path.name)
    return (Path(name.stem) if name.suffix.lower() in _OPENERS else name).suffix.lower()


def read_file(path: Path, column: str, field: str | None) -> list[Any]:
    """The texts of a file, in order.

    Args:
        path: A file that exists.
        column: Column that holds the text; dots lead into nested fields.
        field: Where the texts or records are in a .json file, or in each line of a .jsonl file; None: at the top.

    Raises:
        CorpusError: Another format, a file that cannot be read, or no such column.
    """
    ending = format_of(path)
    if ending not in READERS:
        known = ", ".join([*READERS, *_OPENERS])
        raise CorpusError(f"got {path}: cannot tell its format from the ending {path.suffix!r}; expected one of {known}")
    if field is not None and ending not in _JSON:
        raise CorpusError(f"got field={field!r} for {path}; it is for .json and .jsonl files: use text_column=...")
    try:
        return READERS[ending](path, column, field)
    except _UNREADABLE as error:
        raise CorpusError(f"{path} cannot be read as {ending} in UTF-8: {error}") from error


def read_folder(folder: Path, column: str, field: str | None) -> list[Any]:
    """The texts of all corpus files in a folder and its folders, in the order of their names; other files are left out.

    A README describes a corpus and is no part of it.

    Raises:
        CorpusError: It has no such file, or one that cannot be read.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and is_corpus_name(path))
    paths = [path for path in paths if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    paths = [path for path in paths if path.stem.upper() != "README"]
    if not paths:
        raise CorpusError(f"no corpus file at {folder}: the folder has no file that ends in {', '.join(READERS)}")
    return [text for path in paths for text in read_file(path, column, field if format_of(path) in _JSON else None)]


@contextmanager
def _opened(path: Path, **settings: Any) -> Iterator[TextIO]:
    """A file opened as text, unpacked where its ending says so."""
    opener = _OPENERS.get(path.suffix.lower(), open)
    # Windows editors start a file with a byte-order mark.
    with opener(path, "rt", encoding="utf-8-sig", **settings) as file:
        yield file


def _read_txt(path: Path, column: str, field: str | None) -> list[Any]:
    with _opened(path) as file:
        lines = (line.rstrip("\n") for line in file)
        return [line for line in lines if line.strip()]


def _read_csv(path: Path, column: str, field: str | None) -> list[Any]:
    return _read_delimited(path, column, ",")


def _read_tsv(path: Path, column: str, field: str | None) -> list[Any]:
    return _read_delimited(path, column, "\t")


def _read_delimited(path: Path, column: str, delimiter: str) -> list[str]:
    """The texts of a table. It is read strictly, so that no text is lost to a quote or a comma out of place."""
    limit = csv.field_size_limit(sys.maxsize)
    try:
        with _opened(path, newline="") as file:
            rows = csv.reader(file, delimiter=delimiter, strict=True)
            header = next(rows, None)
            if header is None:
                raise CorpusError(f"{path} is empty; expected a header with the column {column!r}, then rows")
            require_column(column, header, str(path))
            place, texts = header.index(column), []
            for line, row in _numbered_rows(path, rows):
                if row:
                    _require_width(path, line, row, header)
                    _require_own_line(path, line, row, delimiter)
                    texts.append(row[place])
            return texts
    finally:
        csv.field_size_limit(limit)


def _numbered_rows(path: Path, rows: Any) -> Iterator[tuple[int, list[str]]]:
    """The rows of a table, each with the line that it begins in."""
    line = rows.line_num + 1
    try:
        for row in rows:
            yield line, row
            line = rows.line_num + 1
    except csv.Error as error:
        raise CorpusError(
            f"{path}, line {line}: {error}. A quote that opens there is not closed before the next delimiter: close it, and "
            'double the quotes inside a text ("")'
        ) from error


def _require_width(path: Path, line: int, row: list[str], header: list[str]) -> None:
    if len(row) != len(header):
        raise CorpusError(
            f"{path}, line {line} has {len(row)} fields, expected the {len(header)} of the header {header}; put texts with a "
            "delimiter in quotes"
        )


def _require_own_line(path: Path, line: int, row: list[str], delimiter: str) -> None:
    """Refuse a field in which every line looks like a row: the quote that opens it was to be closed long before."""
    for text in row:
        inner = text.split("\n")[1:-1]
        if len(inner) >= _MIN_SWALLOWED and len(row) > 1 and all(part.count(delimiter) == len(row) - 1 for part in inner):
            raise CorpusError(
                f"{path}, line {line}: a quote that opens there holds {len(inner)} lines that look like rows; close it in its "
                'own line, or double it ("")'
            )


def _read_jsonl(path: Path, column: str, field: str | None) -> list[Any]:
    texts: list[Any] = []
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                place = f"{path}, line {number}"
                record = _parsed(line, place)
                texts += texts_of_records([record], column) if field is None else _texts_at(record, column, field, place)
    return texts


def _read_json(path: Path, column: str, field: str | None) -> list[Any]:
    """The texts of one JSON value; where a file has several, one record a line."""
    with _opened(path) as file:
        content = file.read()
    try:
        value = json.loads(content)
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise CorpusError(f"{path} is not JSON: {error}") from error
        return _read_jsonl(path, column, field)
    return _texts_at(value, column, field, str(path))


def _texts_at(value: Any, column: str, field: str | None, source: str) -> list[Any]:
    """The texts of a JSON value, or at a field of it: texts, records, or an object with a list for each column."""
    values = [value] if field is None else values_at(value, field, source)
    return [text for found in values for text in _texts_of_json(found, column, source)]


def _texts_of_json(value: Any, column: str, source: str) -> list[Any]:
    if isinstance(value, dict):
        top = top_column(column, list(value))
        require_column(top, list(value), f"{source}, which is no list of records,", hint=", or field=... where the records are")
        found = texts_of_records([value], column)
        return found[0] if len(found) == 1 and isinstance(found[0], list) else found
    if isinstance(value, list):
        return value if all(isinstance(text, str) for text in value) else texts_of_records(value, column)
    if isinstance(value, str):
        return [value]
    raise CorpusError(f"{source} holds a {type(value).__name__}; expected texts or records; pass field=... where they are")


def _parsed(line: str, place: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise CorpusError(f"{place} is not JSON: {error}") from error


def _read_parquet(path: Path, column: str, field: str | None) -> list[Any]:
    names = pyarrow.parquet.read_schema(path).names
    top = top_column(column, names)
    require_column(top, names, str(path))
    values = pyarrow.parquet.read_table(path, columns=[top])[top].to_pylist()
    return values if top == column else texts_of_records([{top: value} for value in values], column)


READERS: dict[str, Callable[[Path, str, str | None], list[Any]]] = {
    ".txt": _read_txt,
    ".csv": _read_csv,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
    ".tsv": _read_tsv,
    ".json": _read_json,
    ".md": _read_txt,
}
"""The reader of each format."""
