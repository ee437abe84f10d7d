"""load_corpus against files written here, and the embedded corpus against its labels."""

import csv
import json
import re
from pathlib import Path

import datasets
import pandas as pd
import pytest

from tl_latentlens.corpus.texts import DEMO_CORPUS, TextStream, load_corpus
from tl_latentlens.errors import CorpusError

# Texts that readers like to turn into missing values, numbers, dates or several rows.
AWKWARD = [
    "NA",
    "null",
    "nan",
    "None",
    "007",
    "1.50",
    "TRUE",
    "2024-01-02",
    "two\nlines",
    'say "bank", twice',
    "a, b",
    "#1",
    " spaces ",
    "Ärger 日本 🙂",
]


def write_csv(path: Path, texts: list[str], column: str = "text") -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL)
        writer.writerow(["id", column])
        writer.writerows(enumerate(texts))
    return path


def write_jsonl(path: Path, texts: list[str], column: str = "text") -> Path:
    path.write_text("".join(json.dumps({"id": i, column: text}) + "\n" for i, text in enumerate(texts)), encoding="utf-8")
    return path


def write_parquet(path: Path, texts: list[str], column: str = "text") -> Path:
    pd.DataFrame({"id": range(len(texts)), column: texts}).to_parquet(path)
    return path


WRITERS = {".csv": write_csv, ".jsonl": write_jsonl, ".parquet": write_parquet}


def stream(texts: list[str], column: str = "text") -> datasets.IterableDataset:
    return datasets.Dataset.from_dict({column: texts}).to_iterable_dataset()


# ------------------------------------------------------------------------------------------------------------ text files


def test_txt_is_one_text_a_line_without_the_blank_ones(tmp_path: Path) -> None:
    path = tmp_path / "corpus.txt"
    path.write_bytes("first\n\n  \t\nNA\r\n  indented \nnull\nÄrger 日本 \u2028 🙂\nlast".encode())
    assert load_corpus(path) == ["first", "NA", "  indented ", "null", "Ärger 日本 \u2028 🙂", "last"]


def test_a_path_may_be_str_or_path_with_a_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "corpus.TXT").write_text("one\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    for source in ("~/corpus.TXT", str(tmp_path / "corpus.TXT"), tmp_path / "corpus.TXT"):
        assert load_corpus(source) == ["one"]


@pytest.mark.parametrize("ending", WRITERS)
def test_tables_keep_every_text_as_it_is(tmp_path: Path, ending: str) -> None:
    texts = [*AWKWARD, "", "after the empty one"]
    assert load_corpus(WRITERS[ending](tmp_path / f"corpus{ending}", texts)) == texts


@pytest.mark.parametrize("ending", WRITERS)
def test_tables_are_read_by_column_name(tmp_path: Path, ending: str) -> None:
    path = WRITERS[ending](tmp_path / f"corpus{ending}", ["a", "b"], "body")
    assert load_corpus(path, text_column="body") == ["a", "b"]
    with pytest.raises(CorpusError, match=r"has no column 'text'; it has \['id', 'body'\]; pass text_column="):
        load_corpus(path)


def test_csv_of_one_column_keeps_its_empty_texts(tmp_path: Path) -> None:
    path = tmp_path / "corpus.csv"
    path.write_text('text\nfirst\n""\nNA\nlast\n')
    assert load_corpus(path) == ["first", "", "NA", "last"]


def test_csv_with_an_unquoted_empty_field_keeps_it(tmp_path: Path) -> None:
    path = tmp_path / "corpus.csv"
    path.write_text("id,text\n1,first\n2,\n3,null\n")
    assert load_corpus(path) == ["first", "", "null"]


@pytest.mark.parametrize(
    "content",
    ["id,text\n1,The river,\n2,The bank,\n", "text\nThe river, the bank\nlast\n", "text\nfirst\nThe river, the bank\n"],
    ids=["trailing commas", "comma in the first text", "comma in a later text"],
)
def test_csv_row_of_more_fields_than_the_header_is_refused(tmp_path: Path, content: str) -> None:
    """Read anyway, it would lose the text after the comma, or take another column for the text."""
    path = tmp_path / "corpus.csv"
    path.write_text(content)
    with pytest.raises(CorpusError, match=r"corpus\.csv"):
        load_corpus(path)


def test_jsonl_skips_blank_lines_and_names_the_bad_one(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"text": "one"}\n\n{"text": "two"}\n')
    assert load_corpus(path) == ["one", "two"]
    path.write_text('{"text": "one"}\n\n{"text": "tw\n')
    with pytest.raises(CorpusError, match=r"corpus\.jsonl, line 3 is not JSON"):
        load_corpus(path)


@pytest.mark.parametrize("line", ['["a list"]', '"a string"', '{"body": "another column"}'])
def test_jsonl_line_without_the_column_is_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text(f'{{"text": "one"}}\n{line}\n')
    with pytest.raises(CorpusError, match="has no column 'text'"):
        load_corpus(path)


def test_null_in_jsonl_and_parquet_is_refused(tmp_path: Path) -> None:
    jsonl, parquet = tmp_path / "corpus.jsonl", tmp_path / "corpus.parquet"
    jsonl.write_text('{"text": "one"}\n{"text": null}\n')
    pd.DataFrame({"text": ["one", None]}).to_parquet(parquet)
    for path in (jsonl, parquet):
        with pytest.raises(CorpusError, match=r"text 1 is NoneType \(None\), expected str"):
            load_corpus(path)


@pytest.mark.parametrize("ending", [".txt", ".csv", ".jsonl"])
def test_text_that_is_not_utf8_is_refused(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"corpus{ending}"
    path.write_bytes({".txt": b"", ".csv": b"text\n", ".jsonl": b'{"text": "'}[ending] + b"caf\xe9 au lait\n")
    with pytest.raises(CorpusError, match=r"UTF-?8"):
        load_corpus(path)


# ------------------------------------------------------------------------------------------------- missing, empty, limit


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"no corpus file at .*nowhere\.txt; check the path"):
        load_corpus(tmp_path / "nowhere.txt")
    with pytest.raises(CorpusError, match=r"no corpus file at nowhere\.csv; .*current directory is"):
        load_corpus("nowhere.csv")
    with pytest.raises(CorpusError, match="no corpus file at"):
        load_corpus(tmp_path)  # a folder


def test_unknown_ending_lists_the_known_ones(tmp_path: Path) -> None:
    path = tmp_path / "corpus.docx"
    path.write_text("text")
    with pytest.raises(CorpusError, match=r"ending '\.docx'; expected one of \.txt, \.csv, \.jsonl, \.parquet"):
        load_corpus(path)


@pytest.mark.parametrize("ending", [".txt", ".csv", ".jsonl", ".parquet"])
def test_file_of_no_bytes_is_refused(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"corpus{ending}"
    path.touch()
    with pytest.raises(CorpusError, match=r"empty|corpus\."):
        load_corpus(path)


@pytest.mark.parametrize("ending", WRITERS)
def test_table_without_rows_is_refused(tmp_path: Path, ending: str) -> None:
    with pytest.raises(CorpusError, match="the corpus is empty"):
        load_corpus(WRITERS[ending](tmp_path / f"corpus{ending}", []))


@pytest.mark.parametrize("ending", [".txt", ".jsonl"])
def test_file_of_blank_lines_is_refused(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"corpus{ending}"
    path.write_text("\n   \n\t\n")
    with pytest.raises(CorpusError, match=rf"the corpus is empty: {path} holds no text"):
        load_corpus(path)


@pytest.mark.parametrize("ending", [".txt", *WRITERS])
def test_limit_reads_from_the_start(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"corpus{ending}"
    texts = [f"text {i}" for i in range(5)]
    path.write_text("\n".join(texts)) if ending == ".txt" else WRITERS[ending](path, texts)
    assert load_corpus(path, limit=3) == texts[:3]
    assert load_corpus(path, limit=99) == texts


# ------------------------------------------------------------------------------------------------------ Python objects


def test_lists_and_tuples_become_lists() -> None:
    texts = ["b", "", "a", "b"]
    for source in (texts, tuple(texts), pd.Series(texts)):
        assert load_corpus(source) == texts


def test_generator_is_a_stream_that_is_never_held() -> None:
    def generate():
        for number in range(3):
            asked.append(number)
            yield f"text {number}"

    asked: list[int] = []
    texts = load_corpus(generate())
    assert isinstance(texts, TextStream)
    assert asked == []
    assert list(texts) == ["text 0", "text 1", "text 2"]
    asked.clear()
    assert load_corpus(generate(), limit=2) == ["text 0", "text 1"]
    assert asked == [0, 1]


def test_list_is_copied() -> None:
    texts = ["a"]
    loaded = load_corpus(texts)
    texts.append("b")
    assert loaded == ["a"]


@pytest.mark.parametrize(("bad", "kind"), [(None, "NoneType"), (7, "int"), (b"bytes", "bytes"), (float("nan"), "float")])
def test_entry_that_is_no_text_is_named(bad: object, kind: str) -> None:
    for source in (["fine", bad], iter(["fine", bad])):
        with pytest.raises(CorpusError, match=rf"text 1 is {kind} \(.*\), expected str"):
            list(load_corpus(source))


def test_empty_list_is_refused() -> None:
    with pytest.raises(CorpusError, match="the corpus is empty"):
        load_corpus([])
    with pytest.raises(CorpusError, match="the corpus is empty"):
        load_corpus(["a", "b"], limit=0)


def test_other_types_are_refused() -> None:
    with pytest.raises(CorpusError, match=r"got a corpus of type int; expected a path, a list of str or a datasets\.Dataset"):
        load_corpus(7)


@pytest.mark.parametrize(
    "source",
    [
        {"train": ["one", "two"]},
        datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": ["one"]})}),
        pd.DataFrame({"text": ["one"]}),
    ],
    ids=["dict", "DatasetDict", "DataFrame"],
)
def test_keys_and_column_names_are_never_taken_for_texts(source: object) -> None:
    with pytest.raises(CorpusError, match=f"type {type(source).__name__}"):
        load_corpus(source)


def test_map_style_dataset() -> None:
    texts = ["one", "", "NA", "one"]
    dataset = datasets.Dataset.from_dict({"id": [0, 1, 2, 3], "body": texts})
    loaded = load_corpus(dataset, text_column="body")
    assert len(loaded) == 4
    assert list(loaded) == texts
    assert loaded[2] == "NA"
    assert load_corpus(dataset, text_column="body", limit=2) == texts[:2]
    with pytest.raises(CorpusError, match=r"the dataset has no column 'text'; it has \['id', 'body'\]"):
        load_corpus(dataset)


@pytest.mark.parametrize("values", [[1, 2], ["one", None]], ids=["numbers", "null"])
def test_map_style_dataset_of_other_than_text_is_refused(values: list) -> None:
    with pytest.raises(CorpusError, match="expected str"):
        load_corpus(datasets.Dataset.from_dict({"text": values}))


def test_streaming_dataset_of_other_than_text_is_refused() -> None:
    for limit in (None, 2):
        with pytest.raises(CorpusError, match="expected str"):
            list(load_corpus(stream(["one", None]), limit=limit))


def test_empty_dataset_is_refused() -> None:
    with pytest.raises(CorpusError, match="the corpus is empty"):
        load_corpus(datasets.Dataset.from_dict({"text": []}))


def test_streaming_dataset_is_read_anew_each_time() -> None:
    texts = load_corpus(stream(["one", "two", "three"]))
    assert isinstance(texts, TextStream)
    assert list(texts) == list(texts) == ["one", "two", "three"]


def test_streaming_dataset_with_a_limit_is_a_list_and_reads_no_further() -> None:
    def examples():
        yield {"text": "one"}
        yield {"text": "two"}
        raise AssertionError("read past the limit")

    assert load_corpus(datasets.IterableDataset.from_generator(examples), limit=2) == ["one", "two"]
    assert load_corpus(stream(["one", "two"]), limit=5) == ["one", "two"]


def test_streaming_dataset_without_the_column() -> None:
    with pytest.raises(CorpusError, match=r"the dataset has no column 'text'; it has \['body'\]"):
        load_corpus(stream(["one"], "body"))

    def examples():
        yield {"body": "one"}

    unnamed = datasets.IterableDataset.from_generator(examples)
    assert unnamed.column_names is None
    with pytest.raises(CorpusError, match=r"has no column 'text'; it has \['body'\]"):
        list(load_corpus(unnamed))
    with pytest.raises(CorpusError, match=r"has no column 'text'; it has \['body'\]"):
        load_corpus(unnamed, limit=1)


def test_hub_dataset_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for limit in (None, 3):
        with pytest.raises(
            CorpusError, match="'no-such-owner/no-such-corpus' is no file, and the hub dataset could not be loaded"
        ):
            load_corpus("no-such-owner/no-such-corpus", limit=limit)


def test_hub_dataset_is_asked_for_by_split_and_column(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, *, split: str, streaming: bool) -> datasets.Dataset | datasets.IterableDataset:
        asked.append((name, split, streaming))
        return stream(["one", "two"], "body") if streaming else datasets.Dataset.from_dict({"body": ["one", "two"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(load_corpus("owner/corpus", text_column="body", split="test")) == ["one", "two"]
    assert load_corpus("owner/corpus", text_column="body", limit=1) == ["one"]
    assert asked == [("owner/corpus", "test", False), ("owner/corpus", "train", True)]


# --------------------------------------------------------------------------------------------------- the embedded corpus


@pytest.fixture(scope="module")
def demo() -> list[str]:
    return load_corpus("demo")


@pytest.fixture(scope="module")
def labels() -> pd.DataFrame:
    return pd.read_csv(DEMO_CORPUS.with_name("corpus_labels.csv"), keep_default_na=False)


def test_demo_corpus_is_clean_text(demo: list[str]) -> None:
    assert len(demo) >= 2000
    assert len(set(demo)) == len(demo)
    assert all(text == text.strip() and text.isprintable() for text in demo)
    assert load_corpus("demo", limit=5) == demo[:5]


def test_demo_labels_line_up_with_the_texts(demo: list[str], labels: pd.DataFrame) -> None:
    assert list(labels.columns) == ["text_index", "kind", "concept", "sense", "held_out"]
    assert labels.text_index.tolist() == list(range(len(demo)))
    assert labels.held_out.dtype == bool
    assert set(labels.kind) <= {"concept", "sense", "scene", "retold"}
    assert (labels.kind == "scene").sum() >= 200
    assert ((labels.sense != "") == (labels.kind == "sense")).all()
    assert ((labels.concept != "") == labels.kind.isin(["concept", "sense"])).all()


def test_demo_concepts_stand_in_their_sentences(demo: list[str], labels: pd.DataFrame) -> None:
    concepts = labels[labels.kind == "concept"]
    assert concepts.concept.nunique() >= 400
    without = [row.concept for row in concepts.itertuples() if row.concept.lower() not in demo[row.text_index].lower()]
    # Irregular forms ("geese") exist; labels that slid by a line would miss nearly all.
    assert len(without) <= len(concepts) // 20


def test_demo_ambiguous_words_have_senses_to_tell_apart(demo: list[str], labels: pd.DataFrame) -> None:
    senses = labels[labels.kind == "sense"]
    by_sense = senses.groupby(["concept", "sense"])
    assert senses.concept.nunique() >= 40
    assert (by_sense.size().groupby("concept").size() >= 2).all()
    assert (by_sense.size() >= 6).all()
    assert (by_sense.held_out.mean() >= 0.1).all()
    assert (by_sense.held_out.mean() < 0.5).all()
    for row in senses.itertuples():
        assert re.search(rf"\b{re.escape(row.concept)}\b", demo[row.text_index], re.IGNORECASE), demo[row.text_index]
