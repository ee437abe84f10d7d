"""Labelled uses are read from files and found in their texts."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import tl_latentlens as tll
from tl_latentlens.corpus.plan import PlanSettings
from tl_latentlens.evaluation.labelled_uses import find_uses


def test_demo_senses_are_found_in_every_text(demo_model: Any) -> None:
    table = tll.load_senses("demo")
    uses = find_uses(demo_model, table, PlanSettings())
    assert len(uses.prompts) == len(table) == 1370
    assert uses.held_out.sum() == 137
    assert len(set(uses.senses)) == 137
    for prompt, position, word in list(zip(uses.prompts, uses.positions, table.word, strict=True))[::50]:
        assert demo_model.tokenizer.decode(prompt[: position + 1]).lower().endswith(word)


def test_senses_from_files(tmp_path: Path, senses: pd.DataFrame) -> None:
    senses.to_csv(tmp_path / "s.csv", index=False)
    senses.drop(columns="held_out").to_json(tmp_path / "s.jsonl", lines=True, orient="records")
    assert tll.load_senses(tmp_path / "s.csv").equals(senses)
    assert list(tll.load_senses(str(tmp_path / "s.jsonl")).columns) == ["text", "word", "sense"]
    with pytest.raises(tll.CorpusError, match="no column 'sense'"):
        tll.load_senses(senses[["text", "word"]])
    with pytest.raises(tll.CorpusError, match=r"got .*nowhere.csv; expected a .csv or .jsonl file"):
        tll.load_senses(tmp_path / "nowhere.csv")


@pytest.mark.parametrize("written", [("yes", "no"), ("True", "False"), (1, 0), ("1", "")])
def test_held_out_as_files_have_it(senses: pd.DataFrame, written: tuple[Any, Any]) -> None:
    as_text = senses.assign(held_out=[written[0] if held else written[1] for held in senses.held_out])
    assert tll.load_senses(as_text).held_out.tolist() == senses.held_out.tolist()
    with pytest.raises(tll.CorpusError, match="got held_out='perhaps' in line 0 of the labelled uses; expected true or false"):
        tll.load_senses(senses.assign(held_out="perhaps"))


def test_uses_without_text_or_lines(senses: pd.DataFrame) -> None:
    for wrong in (senses[:0], senses.assign(text=[None, *senses.text[1:]])):
        with pytest.raises(tll.CorpusError, match="no lines, or lines without a text"):
            tll.load_senses(wrong)


def test_uses_that_cannot_be_asked_are_left_out(any_model: Any, senses: pd.DataFrame) -> None:
    table = pd.concat([senses, pd.DataFrame({"text": ["No such word."], "word": "bank", "sense": "money", "held_out": False})])
    assert len(find_uses(any_model, table.reset_index(drop=True), PlanSettings()).prompts) == len(senses)
    with pytest.raises(tll.InvalidInputError, match="some of them not held out"):
        find_uses(any_model, senses.assign(held_out=True), PlanSettings())
    one_sense = senses[senses.sense == senses.sense[0]].reset_index(drop=True)
    with pytest.raises(tll.InvalidInputError, match="no use is left"):
        find_uses(any_model, one_sense, PlanSettings())
