"""A few builds killed, at least one in each phase; `torture.py` by itself kills hundreds."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

COMPUTING = ["anywhere", "planning", "fingerprint", "model", "verification", "moments"]
WRITING = ["lock", "creation", "block", "journal", "head, copy 2", "head, copy 1", "rename", "folder", "unlock"]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What 17 kills came to. Its own process: pytest's has threads, which forked children would lack."""
    if not hasattr(os, "fork"):
        pytest.skip("builds are killed in forked children")
    folder = tmp_path_factory.mktemp("torture")
    settings = "--kills 17 --seed 1 --texts 50".split()
    places = ["--folder", folder / "work", "--record", folder / "record.json"]
    script = [sys.executable, Path(__file__).with_name("torture.py"), *settings, *places]
    done = subprocess.run(script, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
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
