"""The plan of a bank says what the bank then is, and which words have rows."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import tl_latentlens as tll
from tl_latentlens.index.word_table import make_word_table

NAMES = ["blocks.1.hook_resid_post", "blocks.3.attn.hook_z"]
TEXTS = [
    "The banker banked on the bank, and banks fail.",
    "Rivers run; the river ran.",
    "",
    "Don't bank on it! Überall Flüsse.",
    "The banker banked on the bank, and banks fail.",
]


@pytest.fixture(scope="module")
def model() -> Any:
    return tll.load_demo_model()


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [*TEXTS, *list(tll.load_corpus("demo", limit=80))]


def test_it_says_what_the_bank_is(model: Any, texts: list[str], tmp_path: Path) -> None:
    planned = tll.plan_bank(model, texts, hook_names=NAMES, batch_tokens=64, progress=False)
    bank = tll.build_bank(model, texts, tmp_path / "a.h5", hook_names=NAMES, batch_tokens=64, progress=False)
    assert (planned.n_rows, planned.n_tokens, planned.plan.digest) == (bank.n_rows, len(bank.plan.tokens), bank.plan_digest)
    assert planned.widths == {name: bank.d(name) for name in NAMES}
    assert 0 <= planned.bytes_on_disk - bank.n_bytes < 50_000
    assert planned.bytes_on_gpu == bank.n_rows * sum(2 * bank.d(name) + 4 for name in NAMES)
    with tll.BankWriter.create(tmp_path / "b.h5", planned.plan, tll.record_model(model, planned.plan, NAMES)) as writer:
        assert planned.tokens_to_run == writer.tokens_to_run
    assert 1 <= len(planned.tokens_per_second) <= 8
    slowest, fastest = (
        planned.tokens_to_run / rate for rate in (min(planned.tokens_per_second), max(planned.tokens_per_second))
    )
    assert fastest <= planned.seconds <= slowest
    assert tll.plan_bank(model, texts, hook_names=NAMES, measure=False, progress=False).tokens_per_second == ()


def test_coverage_counts_rows(model: Any, texts: list[str], tmp_path: Path) -> None:
    words = ["bank", "RIVER", "flüsse", "zeppelin", "bank", "run"]
    planned = tll.plan_bank(model, texts, hook_names=1, words=words, measure=False, progress=False)
    coverage = planned.coverage
    assert coverage is not None
    assert coverage["word"].tolist() == ["bank", "river", "flüsse", "zeppelin", "run"]
    bank = tll.build_bank(model, texts, tmp_path / "a.h5", hook_names=1, progress=False)
    table = make_word_table([bank], "english")
    row_words = np.array([table.words[i] if i >= 0 else "" for i in table.word_ids])
    for line in coverage.itertuples():
        (stem, *_) = [*table.stem_ids_of(line.word), -2]
        assert line.rows == (row_words == line.word).sum()
        assert line.inflection_rows == (table.stem_ids == stem).sum()
        assert line.prompts == len(np.unique(bank.plan.row_prompts[table.stem_ids == stem]))
        others = set(row_words[table.stem_ids == stem]) - {line.word}
        assert set(filter(None, line.inflections.split(", "))) == others
    assert coverage.set_index("word").loc["bank", "inflections"].split(", ")[0] in {"banks", "banked"}
    assert coverage.set_index("word").loc["zeppelin"].tolist() == [0, 0, 0, ""]
    exact = tll.plan_bank(model, texts, hook_names=1, words=["bank"], language=None, measure=False, progress=False).coverage
    assert exact is not None
    assert exact["rows"].tolist() == exact["inflection_rows"].tolist()


@pytest.mark.parametrize("words", [[], ["it"], ["bank account"], ["42nd"], [""], [7]])
def test_what_is_no_wanted_word(model: Any, words: list[Any]) -> None:
    with pytest.raises(tll.InvalidInputError, match="wanted word"):
        tll.plan_bank(model, TEXTS, hook_names=1, words=words, measure=False, progress=False)


def test_cards() -> None:
    def plan_of(n_rows: int, widths: dict[str, int], weights: float) -> pd.DataFrame:
        plan = tll.Plan(np.zeros(1, np.int32), np.array([0, 1]), np.broadcast_to(np.int64(0), n_rows), tll.PlanSettings())
        origin: Any = None
        return tll.BankPlan(plan, origin, widths, "float16", 1, 1, int(weights), 1.0, ()).cards((24, 80)).set_index("memory_gb")

    small = plan_of(10**6, {"a": 4096, "b": 4096}, 16e9)  # 16.4 GB
    assert small.loc[24].tolist() == ["all hook names", 1, "fits"]
    large = plan_of(4 * 10**6, {"a": 4096, "b": 4096}, 140e9)  # 65.6 GB, and 32.8 GB of codes
    assert large.loc[24].tolist() == ["no hook name", 4, "7 cards"]
    assert large.loc[80].tolist() == ["all hook names", 1, "2 cards"]
    assert plan_of(6 * 10**6, {"a": 4096, "b": 4096}, 1).loc[80, "index"] == "their codes"
    assert plan_of(2 * 10**6, {"a": 4096, "b": 8192}, 1).loc[24, "index"] == "1 hook names"


# Building from a plan


def test_a_saved_plan_builds_the_same_bank(model: Any, texts: list[str], tmp_path: Path) -> None:
    planned = tll.plan_bank(model, texts, hook_names=NAMES, max_rows_per_token=3, seed=2, measure=False, progress=False)
    path = planned.save(tmp_path / "a.plan")
    settings: dict[str, Any] = {"hook_names": NAMES, "progress": False}
    one = tll.build_bank(model, texts, tmp_path / "one.h5", max_rows_per_token=3, seed=2, **settings)
    for number, source in enumerate((path, str(path), planned.plan)):
        bank = tll.build_bank(model, source, tmp_path / f"{number}.h5", **settings)
        assert bank.path.read_bytes() == one.path.read_bytes()
    shard = tll.build_bank(model, path, tmp_path / "bank", shard="1/2", **settings)
    assert shard.file.metadata.shard is not None
    assert shard.file.metadata.shard.plan_digest == one.plan_digest


def test_settings_beside_a_plan(model: Any, tmp_path: Path) -> None:
    plan = tll.plan_corpus(model, TEXTS, max_rows_per_token=3)
    assert tll.plan_corpus(model, plan) is plan
    assert tll.plan_corpus(model, plan, max_rows_per_token=3) is plan
    with pytest.raises(tll.InvalidInputError, match=r"got {'seed': 1} with a plan that has {'seed': 0}; leave them out"):
        tll.build_bank(model, plan, tmp_path / "a.h5", seed=1, progress=False)
    with pytest.raises(tll.InvalidInputError, match="repeat"):
        tll.plan_corpus(model, plan, repeat=True)
    encoder = tll.make_plan(tll.prompts_from_lists([[1, 2, 3]]), tll.PlanSettings(bidirectional=True))
    with pytest.raises(tll.InvalidInputError, match="got a plan for a bidirectional model, and one that is causal"):
        tll.plan_corpus(model, encoder)


def test_a_plan_of_another_tokenizer(model: Any, tmp_path: Path) -> None:
    from tl_latentlens.corpus.plan_file import PlanOrigin, save_plan

    plan, own = tll.plan_corpus(model, TEXTS), tll.plan_bank(model, TEXTS, hook_names=1, measure=False, progress=False).origin
    for origin, what in (
        (PlanOrigin("other", "0" * 64, own.n_ctx), "different tokenizers"),
        (PlanOrigin("other", own.tokenizer, 9), f"different context lengths, 9 and {own.n_ctx}"),
    ):
        save_plan(plan, tmp_path / "a.plan", origin)
        with pytest.raises(tll.ModelMismatchError, match=f"made for other, the model is {own.model}: they have {what}"):
            tll.build_bank(model, tmp_path / "a.plan", tmp_path / "a.h5", progress=False)
