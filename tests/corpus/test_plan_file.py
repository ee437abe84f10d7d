"""Saved plans: read as they were written, or refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

import tl_latentlens as tll
from tl_latentlens.corpus.plan import Plan, PlanSettings, make_plan, prompts_from_lists
from tl_latentlens.corpus.plan_file import PlanOrigin, load_plan, save_plan

ORIGIN = PlanOrigin("tiny", "0" * 64, 64)


def some_plan(**settings: Any) -> Plan:
    lists = [[0, 3, 4], [], [0, 3, 5, 6], [0, 7]]
    return make_plan(prompts_from_lists(lists, [[i == 0 for i in range(len(ids))] for ids in lists]), PlanSettings(**settings))


@pytest.mark.parametrize("settings", [{}, {"max_rows_per_token": None, "seed": 3}, {"bidirectional": True}, {"repeat": True}])
def test_a_plan_reads_as_it_was_written(tmp_path: Path, settings: dict[str, Any]) -> None:
    plan = some_plan(**settings)
    path = save_plan(plan, tmp_path / "a.plan", ORIGIN)
    read, origin = load_plan(path)
    assert origin == ORIGIN
    assert (read.settings, read.digest, read.n_truncated) == (plan.settings, plan.digest, plan.n_truncated)
    for name in ("tokens", "prompt_starts", "row_tokens"):
        assert np.array_equal(getattr(read, name), getattr(plan, name))
    assert [path.name for path in tmp_path.iterdir()] == ["a.plan"]


def changed(path: Path, arrays: dict[str, Any] | None = None, **metadata: str | None) -> None:
    """Write a plan file again with other arrays or metadata."""
    with safe_open(path, framework="np") as file:
        values = {name: file.get_tensor(name) for name in file.keys()} | (arrays or {})  # noqa: SIM118
        texts = {key: value for key, value in ((file.metadata() or {}) | metadata).items() if value is not None}
    save_file(values, path, metadata=texts)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"format": '"another"'}, "is a safetensors file, and no plan"),
        ({"format": None}, "is a safetensors file, and no plan"),
        ({"version": "2"}, "a.plan is a plan of version 2; expected 1: upgrade tl-latentlens$"),
        ({"digest": '"00"'}, "is not what was written: its digest differs"),
        ({"settings": "{}"}, "cannot be read as a plan: it has the settings"),
        ({"settings": '{"max_rows_per_token": 50, "unheard_of": 1}'}, "unheard_of"),
        ({"origin": None}, "cannot be read as a plan"),
        ({"n_truncated": "not json"}, "cannot be read as a plan"),
        ({"arrays": {"tokens": np.zeros(9, np.int32)}}, "is not what was written"),
        ({"arrays": {"row_tokens": np.arange(3, dtype=np.int32)}}, "is not what was written"),
    ],
)
def test_a_file_that_is_no_such_plan(tmp_path: Path, change: dict[str, Any], problem: str) -> None:
    path = save_plan(some_plan(), tmp_path / "a.plan", ORIGIN)
    changed(path, **change)
    with pytest.raises(tll.CorpusError, match=problem):
        load_plan(path)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_cut_file(tmp_path: Path, share: float) -> None:
    path = save_plan(some_plan(), tmp_path / "a.plan", ORIGIN)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(tll.CorpusError, match="cannot be read as a plan"):
        load_plan(path)


def test_paths(tmp_path: Path) -> None:
    with pytest.raises(tll.CorpusError, match=r"no plan at .*nowhere.plan; `tl-latentlens plan .*--save nowhere.plan`"):
        load_plan(tmp_path / "nowhere.plan")
    with pytest.raises(tll.CorpusError, match=r"expected a name that ends in .plan: .*a.plan"):
        save_plan(some_plan(), tmp_path / "a.h5", ORIGIN)
    with pytest.raises(tll.CorpusError, match="cannot be written"):
        save_plan(some_plan(), tmp_path / "nowhere" / "a.plan", ORIGIN)
