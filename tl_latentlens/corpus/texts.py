"""The texts of a corpus: a list-like of strings from a file, a list, a `datasets` dataset, a hub id, or the embedded corpus.

Nothing is guessed, filtered or reordered: a csv, jsonl or parquet file is read by column name. `plan` decides what becomes of
a text.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pyarrow.csv
import pyarrow.parquet

from tl_latentlens.errors import CorpusError

DEMO_CORPUS = Path(__file__).parents[1] / "data" / "corpus.txt"
DEMO_LABELS = Path(__file__).parents[1] / "data" / "corpus_labels.csv"


@dataclass(frozen=True)
class TextStream:
    """Texts that are read as they are iterated and never held together; their number is not known.

    Attributes:
        source: A streaming dataset, which is read anew each time; or a generator, which can be read once.
        text_column: Column of the dataset; None for a generator of str.
    """

    source: Iterable[Any]
    text_column: str | None = None

    def __iter__(self) -> Iterator[str]:
        """Yield the texts in order.

        Raises:
            CorpusError: An example lacks the column, or holds something that is not text.
        """
        for number, example in enumerate(self.source):
            text = example if self.text_column is None else _text(example, self.text_column)
            _require_text([text], number)
            yield text


def load_corpus(
    source: str | Path | Iterable[str] | datasets.Dataset | datasets.IterableDataset,
    *,
    text_column: str = "text",
    split: str = "train",
    limit: int | None = None,
) -> Sequence[str] | TextStream:
    """The texts of a corpus.

    Args:
        source: `"demo"` (the embedded corpus); a path to a .txt (one text a line, blank lines skipped), .csv, .jsonl or
            .parquet file; a list or generator of strings; a `datasets.Dataset` or `IterableDataset`; or the id of a hub
            dataset.
        text_column: Column that holds the text, for everything but .txt and lists.
        split: Split of a hub dataset.
        limit: Read at most this many texts, from the start.

    Returns:
        A list-like of str; a `TextStream` for an `IterableDataset` or a generator without `limit`.

    Raises:
        CorpusError: The source is missing, empty, lacks the column, or holds something that is not text.
    """
    if limit is not None and limit < 0:
        raise CorpusError(f"got limit={limit}; expected a number of texts, or None for all")
    if isinstance(source, str | Path):
        texts = _load_named(str(source), text_column, split, limit)
    elif isinstance(source, datasets.Dataset):
        _require_column(text_column, source.column_names, "the dataset")
        texts = source[text_column]
    elif isinstance(source, datasets.IterableDataset):
        if source.column_names is not None:
            _require_column(text_column, source.column_names, "the dataset")
        texts = TextStream(source, text_column)
    elif isinstance(source, TextStream):
        texts = source
    elif isinstance(source, Iterator):
        texts = TextStream(source)
    elif isinstance(source, Iterable) and not isinstance(source, Mapping | pd.DataFrame):  # their keys are no texts
        texts = list(source)
    else:
        raise CorpusError(f"got a corpus of type {type(source).__name__}; expected a path, a list of str or a datasets.Dataset")
    if limit is not None:
        texts = list(islice(iter(texts), limit))
    if not isinstance(texts, TextStream) and len(texts) == 0:
        raise CorpusError("the corpus is empty: it holds no text; give at least one non-blank line or string")
    if not isinstance(texts, TextStream):
        _require_text(texts)
    return texts


def _load_named(name: str, column: str, split: str, limit: int | None) -> Sequence[str] | TextStream:
    path = DEMO_CORPUS if name == "demo" else Path(name).expanduser()
    readers = {".txt": _read_txt, ".csv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if path.is_file():
        if path.suffix.lower() not in readers:
            known = ", ".join(readers)
            raise CorpusError(f"got {path}: cannot tell its format from the ending {path.suffix!r}; expected one of {known}")
        try:
            return readers[path.suffix.lower()](path, column)
        except (UnicodeDecodeError, pyarrow.ArrowInvalid) as error:
            raise CorpusError(f"{path} cannot be read as {path.suffix.lower()} in UTF-8: {error}") from error
    if path.suffix.lower() in readers or path.is_absolute():
        raise CorpusError(f"no corpus file at {path}; check the path (the current directory is {Path.cwd()})")
    try:
        dataset = datasets.load_dataset(name, split=split, streaming=limit is not None)
    except (OSError, ValueError, RuntimeError) as error:
        raise CorpusError(f"{name!r} is no file, and the hub dataset could not be loaded: {error}") from error
    return load_corpus(dataset, text_column=column, limit=limit)


def _read_txt(path: Path, column: str) -> list[str]:
    with path.open(encoding="utf-8-sig") as file:  # Windows editors start a file with a byte-order mark
        lines = (line.rstrip("\n") for line in file)
        return [line for line in lines if line.strip()]


def _read_csv(path: Path, column: str) -> list[str]:
    # pandas would drop fields beyond the header, and read "NA" as a missing value; pyarrow does neither.
    parse = pyarrow.csv.ParseOptions(newlines_in_values=True)
    with pyarrow.csv.open_csv(path, parse_options=parse) as reader:
        _require_column(column, reader.schema.names, str(path))
    convert = pyarrow.csv.ConvertOptions(include_columns=[column], column_types={column: pyarrow.string()})
    return pyarrow.csv.read_csv(path, parse_options=parse, convert_options=convert)[column].to_pylist()


def _read_jsonl(path: Path, column: str) -> list[str]:
    texts = []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                texts.append(_text(json.loads(line), column))
            except json.JSONDecodeError as error:
                raise CorpusError(f"{path}, line {number} is not JSON: {error}") from error
    return texts


def _read_parquet(path: Path, column: str) -> list[str]:
    _require_column(column, pyarrow.parquet.read_schema(path).names, str(path))
    return pyarrow.parquet.read_table(path, columns=[column])[column].to_pylist()


def _text(example: Any, column: str) -> str:
    if not isinstance(example, dict) or column not in example:
        _require_column(column, list(example) if isinstance(example, dict) else [], "an example")
    return example[column]


def _require_column(column: str, columns: list[str], source: str) -> None:
    if column not in columns:
        raise CorpusError(f"{source} has no column {column!r}; it has {columns}; pass text_column=...")


def _require_text(texts: Iterable[Any], first: int = 0) -> None:
    for number, text in enumerate(texts, start=first):
        if not isinstance(text, str):
            raise CorpusError(f"text {number} is {type(text).__name__} ({text!r}), expected str; drop or convert it first")


def demo_labels() -> pd.DataFrame:
    """The embedded corpus with its labels.

    Columns: text_index, kind ("concept", "sense", "scene" or "retold"), concept, sense, held_out, text.
    """
    texts = [line for line in DEMO_CORPUS.read_text(encoding="utf-8").splitlines() if line]
    return pd.read_csv(DEMO_LABELS, keep_default_na=False).assign(text=texts)
