"""A few builds killed, at least one in each phase; `torture.py` by itself kills hundreds."""

import json
import os
from collections import Counter
from typing import Any

import pytest
from attacks import torture
from support.fresh import run_fresh

COMPUTING = ["anywhere", "planning", "fingerprint", "model", "verification", "moments"]
WRITING = ["lock", "creation", "block", "journal", "head, copy 2", "head, copy 1", "rename", "folder", "unlock"]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What 17 kills came to. Its own process: pytest's has threads, which forked children would lack."""
    if not hasattr(os, "fork"):
        pytest.skip("builds are killed in forked children")
    folder = tmp_path_factory.mktemp("torture")
    ended = run_fresh(torture.main, 17, 1, 50, folder / "work", folder / "record.json")
    assert ended.code == 0, ended.out + ended.err
    return json.loads((folder / "record.json").read_text())


def test_killed_builds_end_as_one_that_nobody_stopped(outcome: dict[str, Any]) -> None:
    assert outcome["problems"] == []
    assert all(kill["identical"] and kill["resumed"] for kill in outcome["kills"] if not kill["late"])


def test_kills_hit_every_phase(outcome: dict[str, Any]) -> None:
    landed = [kill for kill in outcome["kills"] if not kill["late"]]
    phases = Counter(kill["aim"]["phase"] for kill in landed)
    assert phases == Counter([*COMPUTING, *WRITING, "anywhere", "anywhere"])
    assert all(kill["inside"] for kill in landed if kill["aim"]["phase"] in WRITING)  # a timed kill may come after the end


def test_builds_are_killed_more_than_once_and_with_work_done(outcome: dict[str, Any]) -> None:
    assert max(kill["nth"] for kill in outcome["kills"]) >= 1
    assert any(kill["n_done"] for kill in outcome["kills"])
