"""Corpora as people have them: packed, in folders, nested, with a quote left open, or a text where a path was meant."""

import bz2
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest

from tl_latentlens.corpus.texts import load_corpus
from tl_latentlens.errors import CorpusError

TEXTS = ["one boat", "NA", "two\nlines", 'say "bank"', "a, b", "Ärger 日本 🙂"]


def csv_of(lines: list[str], path: Path) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


# ----------------------------------------------------------------------------------------------- a text in place of a path


@pytest.mark.parametrize(
    "text",
    [
        "The boat crossed the river. " * 12,
        "The boat crossed the river.",
        "~approx five boats",
        "~no-such-user/and so on",
        "one\ntwo",
        "a\0b c",
        "x" * 5000,
    ],
)
def test_text_given_as_str(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(CorpusError, match=r"got the text '.*' as one str; .*: give texts as a list, \[text\]"):
        load_corpus(text)


def test_path_with_spaces_that_is_missing(tmp_path: Path) -> None:
    for path in (tmp_path / "no such folder", "my corpus.txt", "my corpus.jsonl.gz"):
        with pytest.raises(CorpusError, match="no corpus file at"):
            load_corpus(path)


# ------------------------------------------------------------------------------------------------------------------ folders


def test_folder_is_read_file_by_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "corpus" / "deep").mkdir(parents=True)
    folder = tmp_path / "corpus"
    (folder / "b.txt").write_text("three\n\nfour\n")
    (folder / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (folder / "deep" / "c.csv").write_text("id,text\n1,five\n")
    (folder / "d.txt.gz").write_bytes(gzip.compress(b"six\n"))
    (folder / "notes.pdf").write_bytes(b"\xff\xfe")
    (folder / ".hidden.txt").write_text("never\n")
    (folder / "README.md").write_text("A corpus of numbers.\n")
    pd.DataFrame({"text": ["seven"]}).to_parquet(folder / "e.parquet")
    expected = ["one", "two", "three", "four", "six", "five", "seven"]
    assert load_corpus(folder) == expected
    monkeypatch.chdir(tmp_path)
    assert load_corpus("corpus") == expected
    assert load_corpus("corpus", limit=2) == ["one", "two"]


def test_folder_without_a_corpus_file(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_text("x")
    with pytest.raises(CorpusError, match=r"no corpus file at .*: the folder has no file that ends in \.txt, \.csv"):
        load_corpus(tmp_path)


def test_folder_that_a_dataset_was_saved_to(tmp_path: Path) -> None:
    dataset = datasets.Dataset.from_dict({"body": ["one", "two"]})
    dataset.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": dataset, "test": dataset.select([1])}).save_to_disk(tmp_path / "several")
    assert list(load_corpus(tmp_path / "one", text_column="body")) == ["one", "two"]
    assert list(load_corpus(tmp_path / "several", text_column="body", split="test")) == ["two"]
    with pytest.raises(CorpusError, match=r"has no split 'dev'; it has \['train', 'test'\]"):
        load_corpus(tmp_path / "several", text_column="body", split="dev")

    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "dataset_info.json").write_text("{}")
    (tmp_path / "other" / "a.txt").write_text("one\n")
    with pytest.raises(
        CorpusError, match="other has the files of a dataset that `save_to_disk` wrote, and cannot be read as one"
    ):
        load_corpus(tmp_path / "other")


# ------------------------------------------------------------------------------------------------------------- packed files


@pytest.mark.parametrize(("ending", "pack"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.json", "A.TXT"])
def test_packed_files(name: str, ending: str, pack: Any, tmp_path: Path) -> None:
    content = {
        "a.txt": "one\n\ntwo\n",
        "A.TXT": "one\ntwo\n",
        "a.jsonl": '{"text": "one"}\n{"text": "two"}\n',
        "a.csv": "id,text\r\n1,one\r\n2,two\r\n",
        "a.json": '["one", "two"]',
    }[name]
    path = tmp_path / f"{name}{ending}"
    path.write_bytes(pack(b"\xef\xbb\xbf" + content.encode()))
    assert load_corpus(path) == ["one", "two"]
    path.write_bytes(pack(content.encode() * 500)[:-12])
    with pytest.raises(CorpusError, match=r"cannot be read as|is not JSON"):
        load_corpus(path)
    path.write_bytes(b"this was never packed")
    with pytest.raises(CorpusError, match="cannot be read as"):
        load_corpus(path)


# ------------------------------------------------------------------------------------------------------ quotes and delimiters


def test_quote_that_is_never_closed(tmp_path: Path) -> None:
    rows = [f"{i},row {i}" for i in range(3, 500)]
    for broken in ('2,"an opening quote that is never closed', '2,"'):
        path = csv_of(["id,text", "1,fine", broken, *rows], tmp_path / "a.csv")
        with pytest.raises(CorpusError, match=r"a\.csv, line 3: .*quote"):
            load_corpus(path)


@pytest.mark.parametrize("closing", ['400,a later "quote"', '400,"a text in quotes"', '400,ends with a quote"'])
def test_quote_that_a_later_one_closes(closing: str, tmp_path: Path) -> None:
    """No row is lost in silence: the field that holds the others is named by the line that it begins in."""
    rows = [f"{i},row {i}" for i in range(3, 400)]
    path = csv_of(["id,text", "1,fine", '2,"an opening quote', *rows, closing, "401,end"], tmp_path / "a.csv")
    with pytest.raises(CorpusError, match=r"a\.csv, line 3"):
        load_corpus(path)


def test_texts_of_many_lines_are_kept(tmp_path: Path) -> None:
    poem = "\n".join(["Over the river,", "and through, and on,", "home", "", "we go", "again, and", "again,"])
    path = tmp_path / "a.csv"
    pd.DataFrame({"id": [1, 2], "text": [poem, "x" * 200_000]}).to_csv(path, index=False)
    assert load_corpus(path) == [poem, "x" * 200_000]


def test_row_of_fewer_fields_is_named(tmp_path: Path) -> None:
    path = csv_of(["id,text", "1,fine", "2"], tmp_path / "a.csv")
    with pytest.raises(CorpusError, match=r"a\.csv, line 3 has 1 fields, expected the 2 of the header"):
        load_corpus(path)


def test_tab_separated(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    pd.DataFrame({"id": range(len(TEXTS)), "text": TEXTS}).to_csv(path, sep="\t", index=False)
    assert load_corpus(path) == TEXTS


# -------------------------------------------------------------------------------------------------------------------- JSON


@pytest.mark.parametrize(
    ("value", "settings"),
    [
        (TEXTS, {}),
        ([{"text": text, "id": 1} for text in TEXTS], {}),
        ({"text": TEXTS, "id": [1] * len(TEXTS)}, {}),
        ({"data": {"rows": [{"text": text} for text in TEXTS]}, "n": 3}, {"field": "data.rows"}),
        ({"data": {"rows": TEXTS}}, {"field": "data.rows"}),
        ({"data": [{"rows": TEXTS[:2]}, {"rows": TEXTS[2:]}]}, {"field": "data.rows"}),
        ({"data": {"body": TEXTS}}, {"field": "data", "text_column": "body"}),
        ([{"meta": {"body": text}} for text in TEXTS], {"text_column": "meta.body"}),
        ([{"meta": {"body": text}} for text in TEXTS], {"field": "meta.body"}),
        ([{"meta.body": text, "meta": 1} for text in TEXTS], {"text_column": "meta.body"}),
        ([{"turns": [{"said": text} for text in part]} for part in (TEXTS[:2], TEXTS[2:])], {"text_column": "turns.said"}),
    ],
)
def test_json(value: Any, settings: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(value, indent=1))
    assert load_corpus(path, **settings) == TEXTS


def test_lines_of_records_in_a_json_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    assert load_corpus(path) == TEXTS


@pytest.mark.parametrize(
    "settings", [{"text_column": "meta.body"}, {"field": "meta", "text_column": "body"}, {"field": "meta.body"}]
)
def test_nested_fields_of_jsonl(settings: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"meta": {"body": text}}) + "\n" for text in TEXTS))
    assert load_corpus(path, **settings) == TEXTS


def test_nested_fields_of_datasets_and_parquet(tmp_path: Path) -> None:
    dataset = datasets.Dataset.from_dict({"meta": [{"body": text} for text in TEXTS]})
    dataset.to_parquet(tmp_path / "a.parquet")
    for source in (dataset, dataset.to_iterable_dataset(), tmp_path / "a.parquet"):
        assert list(load_corpus(source, text_column="meta.body")) == TEXTS
        with pytest.raises(CorpusError, match=r"has no column 'other'; it has \['body'\]"):
            list(load_corpus(source, text_column="meta.other"))


@pytest.mark.parametrize(
    ("content", "settings", "message"),
    [
        ('{"a": 1}', {}, r"which is no list of records, has no column 'text'; it has \['a'\]; pass text_column=.*field="),
        ('{"a": {"b": []}}', {"field": "a.c"}, r"has no field 'a.c': for 'c' it has \['b'\]"),
        ('{"a": [1]}', {"field": "a.b"}, r"has no field 'a.b': for 'b' it has a int"),
        ("7", {}, "holds a int; expected texts or records"),
        ('["a", ', {}, "is not JSON"),
        ('[{"text": "a"}, {"body": "b"}]', {}, "has no column 'text'"),
        ('{"text": ["a", 1]}', {}, "text 1 is int"),
    ],
)
def test_json_of_another_shape(content: str, settings: dict[str, str], message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(CorpusError, match=message):
        load_corpus(path, **settings)


def test_field_of_a_table_is_refused(tmp_path: Path) -> None:
    path = csv_of(["text", "a"], tmp_path / "a.csv")
    with pytest.raises(CorpusError, match=r"got field='data' for .*use text_column="):
        load_corpus(path, field="data")


# -------------------------------------------------------------------------------------------------------- lone surrogates


def test_text_that_cannot_be_encoded_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n{"text": "cut emoji \\ud83d here"}\n')
    bad = ["fine 🙂", "cut emoji \ud83d here"]
    stream = datasets.Dataset.from_dict({"text": ["fine"]}).to_iterable_dataset()
    assert list(load_corpus(stream)) == ["fine"]
    for source in (path, bad, iter(bad)):
        with pytest.raises(CorpusError, match=r"text 1 has a lone surrogate, '\\ud83d', at character 10, after 'cut emoji '"):
            list(load_corpus(source))
