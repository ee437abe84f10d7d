"""Paths hold from the moment they are given: a change of the current folder, or its end, does not matter."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.banks import activations, fill, give, make_record, make_rows
from support.models import TEXTS

import tl_latentlens as tll
from tl_latentlens.bank.bank import Bank
from tl_latentlens.bank.writer import BankWriter


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to go to; the test begins in another one."""
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "there"


def test_a_bank_and_its_hooks_after_a_change_of_folder(any_model: Any, elsewhere: Path) -> None:
    bank = tll.build_bank(any_model, TEXTS, "a.h5", hook_names="blocks.1.hook_resid_post", progress=False)
    again = Bank.open("a.h5")
    index = tll.ContextualIndex("a.h5", device="cpu")
    hooks = tll.latentlens_hooks(index, top_k=1)
    any_model.run_with_hooks(TEXTS[0], fwd_hooks=hooks)
    os.chdir(elsewhere)
    assert "river" in str(hooks.result)
    for opened in (bank, again):
        assert opened.path == elsewhere.parent / "here" / "a.h5"
        opened.verify()
        assert opened.row(0).prompt_text


def test_a_build_goes_on_after_a_change_of_folder(any_model: Any, elsewhere: Path) -> None:
    """Texts that come one by one may be read by code that changes the folder."""

    def texts() -> Any:
        yield TEXTS[0]
        os.chdir(elsewhere)
        yield TEXTS[1]

    datasets = pytest.importorskip("datasets")
    stream = datasets.IterableDataset.from_generator(lambda: ({"text": text} for text in texts()))
    tll.build_bank(any_model, stream, "b.h5", hook_names="blocks.1.hook_resid_post", progress=False)
    assert [path.name for path in (elsewhere.parent / "here").iterdir()] == ["b.h5"]
    assert not list(elsewhere.iterdir())


def test_a_writer_finishes_after_a_change_of_folder(elsewhere: Path) -> None:
    plan, here = make_rows(), Path.cwd()
    fill(Path("c.h5"), plan)
    with BankWriter.create("d.h5", plan, make_record(plan), batch_tokens=4096) as writer:
        os.chdir(elsewhere)
        for batch in writer.batches():
            give(writer, batch, activations(plan))
    assert (here / "d.h5").read_bytes() == (here / "c.h5").read_bytes()


def test_links_stay_what_they_are(elsewhere: Path) -> None:
    fill(Path("c.h5"), make_rows())
    Path("link.h5").symlink_to("c.h5")
    assert Bank.open("link.h5").path.name == "link.h5"


def test_messages_show_what_was_typed(any_model: Any, elsewhere: Path) -> None:
    with pytest.raises(tll.BankError, match=r"^no bank file at nothing\.h5$"):
        Bank.open("nothing.h5")
    with pytest.raises(tll.BankError, match=r"^no folder nowhere to write e\.h5 in"):
        tll.build_bank(any_model, TEXTS, "nowhere/e.h5", progress=False)


def test_a_folder_that_is_gone(any_model: Any, elsewhere: Path) -> None:
    shutil.rmtree(elsewhere.parent / "here")
    for use in (Bank.open, tll.ContextualIndex, lambda path: tll.build_bank(any_model, TEXTS, path, progress=False)):
        with pytest.raises(tll.InvalidInputError, match=r"got path 'a\.h5', which cannot be made absolute"):
            use("a.h5")
    with pytest.raises(tll.BankError, match="no bank file"):
        Bank.open(elsewhere / "a.h5")
    with pytest.raises(tll.InvalidInputError, match="~nobody-of-this-name"):
        Bank.open("~nobody-of-this-name/a.h5")


def test_a_judges_answers_after_a_change_of_folder(elsewhere: Path) -> None:
    judge = tll.Judge("none", "answers.jsonl", concurrency=1)
    os.chdir(elsewhere)
    assert judge.answers == "answers.jsonl"
    assert judge._path == elsewhere.parent / "here" / "answers.jsonl"
