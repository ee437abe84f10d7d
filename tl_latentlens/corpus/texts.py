"""The texts of a corpus: a list-like of strings from a file, a list, a `datasets` dataset, a hub id, or the embedded corpus.

Nothing is guessed, filtered or reordered. `files` reads each format of file; `plan` decides what becomes of a text.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pandas as pd

from tl_latentlens.corpus.fields import require_column, text_of_record, top_column
from tl_latentlens.corpus.files import is_corpus_name, read_file, read_folder
from tl_latentlens.corpus.unicode import require_unicode
from tl_latentlens.errors import CorpusError

DEMO_CORPUS = Path(__file__).parents[1] / "data" / "corpus.txt"
DEMO_LABELS = Path(__file__).parents[1] / "data" / "corpus_labels.csv"
_SAVED_DATASET = ("dataset_info.json", "dataset_dict.json")
_HUB_ID = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")


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
            text = example if self.text_column is None else text_of_record(example, self.text_column)
            _require_text([text], number)
            yield text


def load_corpus(
    source: str | Path | Iterable[str] | datasets.Dataset | datasets.IterableDataset,
    *,
    text_column: str = "text",
    field: str | None = None,
    split: str = "train",
    limit: int | None = None,
) -> Sequence[str] | TextStream:
    """The texts of a corpus.

    Args:
        source: `"demo"` (the embedded corpus); a path to a .txt or .md (one text a line, blank lines skipped), .csv, .tsv,
            .jsonl, .json or .parquet file, packed (.gz, .bz2, .xz) or not; a folder of such files, read in the order of their
            names, or one that a dataset was saved to; a list or generator of strings; a `datasets.Dataset` or
            `IterableDataset`; or the id of a hub dataset.
        text_column: Column that holds the text, for everything but .txt, .md and lists. Dots lead into nested fields
            ("meta.body"), and through lists in .json and .jsonl ("messages.content").
        field: Where the texts or records are in a .json file, or in each line of a .jsonl file ("data.rows"); None: the file
            is a list of texts or of records, or an object that has a list for each column.
        split: Split of a hub dataset.
        limit: Read at most this many texts, from the start.

    Returns:
        A list-like of str; a `TextStream` for an `IterableDataset` or a generator without `limit`.

    Raises:
        CorpusError: The source is missing, empty, damaged, lacks the column, or holds something that is not text; a text
            given as one str.
    """
    if limit is not None and limit < 0:
        raise CorpusError(f"got limit={limit}; expected a number of texts, or None for all")
    if isinstance(source, str | Path):
        texts = _load_named(str(source), text_column, field, split, limit)
    elif isinstance(source, datasets.Dataset):
        top = top_column(text_column, source.column_names)
        require_column(top, source.column_names, "the dataset")
        texts = source[top]
        if top != text_column:
            texts = [text_of_record({top: value}, text_column) for value in texts]
    elif isinstance(source, datasets.IterableDataset):
        if source.column_names is not None:
            require_column(top_column(text_column, source.column_names), source.column_names, "the dataset")
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
        which = source if isinstance(source, str | Path) else "it"
        raise CorpusError(f"the corpus is empty: {which} holds no text; give at least one non-blank line or string")
    if not isinstance(texts, TextStream):
        _require_text(texts)
    return texts


def _load_named(name: str, column: str, field: str | None, split: str, limit: int | None) -> Sequence[str] | TextStream:
    path = DEMO_CORPUS if name == "demo" else _as_path(name)
    if os.path.isfile(path):
        return read_file(path, column, field)
    if os.path.isdir(path):
        if any((path / marker).is_file() for marker in _SAVED_DATASET):
            return _load_saved_dataset(path, column, split)
        return read_folder(path, column, field)
    if _HUB_ID.fullmatch(name) is None and not (path.is_absolute() or is_corpus_name(path)):
        shown = name if len(name) <= 60 else f"{name[:60]}…"
        raise CorpusError(
            f"got the text {shown!r} as one str; a str is a path or the id of a hub dataset: give texts as a list, [text]. No "
            "file of this name exists"
        )
    if is_corpus_name(path) or path.is_absolute():
        raise CorpusError(f"no corpus file at {path}; check the path (the current directory is {Path.cwd()})")
    try:
        dataset = datasets.load_dataset(name, split=split, streaming=limit is not None)
    except (OSError, ValueError, RuntimeError) as error:
        raise CorpusError(f"{name!r} is no file, and the hub dataset could not be loaded: {error}") from error
    return load_corpus(dataset, text_column=column, limit=limit)


def _as_path(name: str) -> Path:
    try:
        return Path(name).expanduser()
    except RuntimeError:  # "~approx" names no user
        return Path(name)


def _load_saved_dataset(path: Path, column: str, split: str) -> Sequence[str] | TextStream:
    """The texts of a dataset that `save_to_disk` wrote."""
    try:
        dataset = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise CorpusError(
            f"{path} has the files of a dataset that `save_to_disk` wrote, and cannot be read as one: {error}; to read "
            "the text files in it, name one, or move them to a folder of their own"
        ) from error
    if isinstance(dataset, datasets.DatasetDict):
        if split not in dataset:
            raise CorpusError(f"{path} has no split {split!r}; it has {list(dataset)}")
        dataset = dataset[split]
    return load_corpus(dataset, text_column=column)


def _require_text(texts: Iterable[Any], first: int = 0) -> None:
    for number, text in enumerate(texts, start=first):
        if not isinstance(text, str):
            raise CorpusError(f"text {number} is {type(text).__name__} ({text!r}), expected str; drop or convert it first")
        require_unicode([text], number, error=CorpusError)


def demo_labels() -> pd.DataFrame:
    """The embedded corpus with its labels.

    Columns: text_index, kind ("concept", "sense", "scene" or "retold"), concept, sense, held_out, text.
    """
    texts = [line for line in DEMO_CORPUS.read_text(encoding="utf-8").splitlines() if line]
    return pd.read_csv(DEMO_LABELS, keep_default_na=False).assign(text=texts)
