"""One of several processes that build shards is killed twenty times; the merged bank is the one of a single process."""

import json
import os
from pathlib import Path

import pytest
from attacks import kill_shards
from support.fresh import run_fresh


def test_killed_shards_end_as_one_bank_that_nobody_stopped(tmp_path: Path) -> None:
    if not hasattr(os, "fork"):
        pytest.skip("builds are killed in forked children")
    (tmp_path / "work").mkdir()
    ended = run_fresh(kill_shards.main, 20, 1, tmp_path / "work", tmp_path / "record.json")
    assert ended.code == 0, ended.out + ended.err
    outcome = json.loads((tmp_path / "record.json").read_text())
    assert outcome["killed"] == 20
    assert outcome["identical"]
    assert set(outcome["codes"]) == {0}  # nobody but the killed ended with an error
    assert outcome["others"] == []  # and nothing is left behind
