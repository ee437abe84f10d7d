"""The table of evidence: figures of several models by relative depth."""

from pathlib import Path

import pandas as pd
import pytest

from benchmarks import evidence
from benchmarks.measure import Settings


def test_figures_of_models_stand_by_relative_depth_and_are_kept(
    demo_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = evidence.Candidate("another model", "module_that_is_nowhere", "a-package", "model")
    monkeypatch.setattr(evidence, "CANDIDATES", (evidence.CANDIDATES[0], missing))
    monkeypatch.setattr(evidence, "DEPTHS", 2)
    monkeypatch.setattr(evidence, "N_TOKENS", 40)
    texts = list(evidence.tll.load_corpus("demo"))[::40]
    monkeypatch.setattr(evidence.tll, "load_corpus", lambda _: texts)
    calls: list[list[str]] = []
    senses = ["text,word,sense,held_out", "The river bank,bank,river,True", "A muddy bank,bank,river,False"]
    (tmp_path / "senses.csv").write_text("\n".join([*senses, "Money in the bank,bank,money,False"]))
    evaluate = evidence.tll.evaluate

    def evaluate_little(model, bank):
        calls.append(list(bank.hook_names))
        return evaluate(model, bank, senses=tmp_path / "senses.csv", n_tokens=8, progress=False)

    monkeypatch.setattr(evidence.tll, "evaluate", evaluate_little)
    printed = evidence.run(Settings(folder=tmp_path))
    assert calls == [["blocks.2.hook_resid_post", "blocks.5.hook_resid_post"]]
    assert "another model is not installed: a-package on PyPI." in printed
    [kept] = tmp_path.glob("*.parquet")
    found = pd.read_parquet(kept)
    line = found[(found.measure == "next token") & (found.reader == "raw") & (found.depth == 2)].iloc[0]
    assert line.hook_name == "blocks.5.hook_resid_post"
    assert line["n"] > 8  # of more tokens than are replaced
    table = printed.split("### next token")[1].split("###")[0]
    [row] = [row for row in table.splitlines() if "nearest uses" in row]
    assert row.split(" | ")[-1].startswith(f"{line['mean']:.3f} ± ")
    assert evidence.run(Settings(folder=tmp_path)) == printed
    assert len(calls) == 1
