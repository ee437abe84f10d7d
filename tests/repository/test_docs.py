"""The documentation is right: its code runs, its tables match a real bank, its messages stand in the source, and it builds."""

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from support.banks import blocks_of
from support.controls import few_controls, few_texts
from support.docs import DOCS, build_pages, snippets, table
from support.fresh import run_fresh
from support.golden import head_of

import tl_latentlens as tll

PACKAGE = Path(tll.__file__).parent


@pytest.fixture(scope="module", params=["float16", "bfloat16"])
def documented(request: pytest.FixtureRequest, any_model: Any, texts: list[str], tmp_path_factory: Any) -> tll.Bank:
    """A bank named as in the documentation, of several blocks, with both kinds of names that a bank can hold."""
    path = tmp_path_factory.mktemp("docs") / "demo.h5"
    names = ["blocks.1.hook_resid_post", "blocks.0.attn.hook_z"]
    with blocks_of(8):
        return tll.build_bank(any_model, texts, path, hook_names=names, dtype=request.param, batch_tokens=2, progress=False)


def test_format_snippets_read_a_bank_without_the_package(
    documented: tll.Bank, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(documented.path.parent)
    code = snippets("bank_format.md")
    assert not any("latentlens" in part for part in code)
    names: dict[str, Any] = {}
    for part in code:
        exec(part, names)
    row = documented.row(7)
    assert names["prompt"] == row.prompt_index
    assert names["text"][row.token_id].decode() == row.token
    printed = [names["text"][row.token_id], b"".join(token.encode() for token in row.prompt_tokens)]
    assert capsys.readouterr().out == f"{printed[0]} {printed[1]}\n"
    assert len(names["blocks"]) > 2  # several blocks were checked
    assert np.array_equal(names["vectors"], np.asarray(documented.vectors(names["name"]), np.float32))
    assert np.array_equal(names["norms"], documented.norms(names["name"]))


def test_checksum_snippet_finds_a_changed_byte_anywhere(
    documented: tll.Bank, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    data = documented.path.read_bytes()
    names: dict[str, Any] = {"json": json, "h5py": h5py, "np": np}
    head = head_of(documented.path)
    hook = f"hooks/{documented.hook_names[0]}"
    first_vector, first_norm = (head.datasets[f"{hook}/{part}"].offset for part in ("vectors", "norms"))
    for at in (40, head.size // 2 + 9, head.size - 1, head.size + 9, first_vector + 3, first_norm + 1, len(data) - 1):
        (tmp_path / "demo.h5").write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(AssertionError):
            exec(snippets("bank_format.md")[2], dict(names))


def test_format_page_lists_every_dataset_with_its_dtype(documented: tll.Bank) -> None:
    rows = {name.strip("`"): (dtype, shape) for name, dtype, shape, _ in table("bank_format.md", "dataset")}
    found: dict[str, Any] = {}

    def note(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            for hook_name in documented.hook_names:
                name = name.replace(hook_name, "NAME")
            found[name] = item
            assert item.chunks is None
            assert item.id.get_offset() is not None

    with h5py.File(documented.path, "r") as file:
        file.visititems(note)
        assert set(rows) == set(found)
        for name, (dtype, shape) in rows.items():
            assert found[name].dtype.name in re.split(r", | or ", dtype), name
            assert found[name].ndim == len(shape.split(", ")), name
        assert set(file.attrs) == {row[0].strip("`") for row in table("bank_format.md", "attribute")}
        for value in file.attrs.values():
            assert isinstance(value, str)
            json.loads(value)
        for hook in file["hooks"].values():
            assert dict(hook["vectors"].attrs) == ({"bfloat16": True} if documented.dtype == "bfloat16" else {})


def test_format_page_lists_the_head(documented: tll.Bank) -> None:
    head = head_of(documented.path)
    record = json.loads(documented.path.read_bytes().split(b"\n")[0])
    assert list(record) == [row[0].strip("`") for row in table("bank_format.md", "key")]
    assert {"format_version", *record["attributes"]} == {row[0].strip("`") for row in table("bank_format.md", "attribute")}
    with h5py.File(documented.path, "r") as file:
        assert file.userblock_size == record["size"] == head.size
        for name, value in record["attributes"].items():
            assert json.loads(file.attrs[name]) == value
        for name, (offset, dtype, shape) in record["datasets"].items():
            dataset = file[name]
            assert [dataset.id.get_offset(), dataset.dtype.name, list(dataset.shape)] == [offset, dtype, shape]
            assert offset % 64 == 0


def test_quickstart_and_index_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, any_model: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tll, "load_demo_model", lambda: any_model)
    names: dict[str, Any] = {}
    with few_controls(), few_texts(4):
        for part in snippets("quickstart.md"):
            exec(part, names)
    assert {"rank", "neighbor", "logit_token"} <= set(names["frame"].columns)
    assert len(names["nearest_to_v"]) == len(names["nearest_to_minus_v"]) == 3
    (tmp_path / "demo.h5").unlink()
    load_corpus = tll.load_corpus
    monkeypatch.setattr(tll, "load_corpus", lambda source: load_corpus(source, limit=50))
    for part in [*snippets("index.md"), *snippets("migration.md")]:
        exec(part, {})


def test_plots_page_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, any_model: Any) -> None:
    pytest.importorskip("plotly")
    monkeypatch.chdir(tmp_path)
    load_corpus = tll.load_corpus
    monkeypatch.setattr(tll, "load_demo_model", lambda: any_model)
    monkeypatch.setattr(tll, "load_corpus", lambda source, limit: load_corpus(source, limit=limit // 10))
    names: dict[str, Any] = {}
    for part in snippets("plots.md"):
        exec(part, names)
    assert len(names["figure"].data) == 5
    assert len(names["curves"].data) == 2 * 3
    assert {"heatmap.html", "reading.html"} <= {path.name for path in tmp_path.iterdir()}


def test_pictures_are_there_and_small() -> None:
    pages = [DOCS.parent / "README.md", *DOCS.glob("*.md")]
    named = {name for page in pages for name in re.findall(r"_static/([\w.-]+)", page.read_text(encoding="utf-8"))}
    pictures = list((DOCS / "_static").iterdir())
    assert named == {picture.name for picture in pictures}
    assert all(picture.stat().st_size < 200_000 for picture in pictures)


def test_api_page_documents_every_public_name_once() -> None:
    page = (DOCS / "api.md").read_text(encoding="utf-8")
    documented = re.findall(r"^\.\. auto(?:function|class|exception):: (\w+)$", page, re.MULTILINE)
    assert sorted(documented) == sorted(tll.__all__)


def test_troubleshooting_quotes_messages_of_the_source() -> None:
    rows = re.findall(r"^\| `(.+?)` \|", (DOCS / "troubleshooting.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) > 30
    source = "\n".join(text for path in PACKAGE.rglob("*.py") for text in literals(path))
    assert [message for message in rows if message not in source] == []


def literals(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_documentation_builds_without_warnings(tmp_path: Path) -> None:
    for needed in ("sphinx", "furo", "myst_nb"):
        pytest.importorskip(needed)
    done = run_fresh(build_pages, "-W", "-q", "-b", "html", "-d", str(tmp_path / "doctrees"), str(DOCS), str(tmp_path / "html"))
    assert done.code == 0, done.err
    assert (tmp_path / "html" / "examples" / "01_what_does_a_vector_mean.html").is_file()


@pytest.mark.parametrize(
    "file", [*DOCS.glob("*.md"), Path("README.md"), Path("CONTRIBUTING.md"), Path(".ci/run")], ids=lambda f: f.name
)
def test_tests_that_a_page_names_are_there(file: Path) -> None:
    root = DOCS.parent
    named = re.findall(r"(?<![\w/])tests/[\w./*]*\w", (root / file).read_text())
    assert [name for name in named if not list(root.glob(name))] == []
