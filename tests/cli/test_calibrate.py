"""`decode-vector` says whether the neighbors of a vector are near, in every form of its output, unless it is told not to."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import tl_latentlens as tll

HOOK = "blocks.3.hook_resid_post"


def test_the_ends_of_a_vector_and_of_what_it_steers(run: Any, bank: tll.Bank, tmp_path: Path) -> None:
    vector = np.asarray(bank.vectors(HOOK)[7]).astype(np.float32)
    np.save(tmp_path / "v.npy", vector)
    command = ("decode-vector", str(bank.path), str(tmp_path / "v.npy"), "--text", "He rowed", "-n", "3")
    found = tll.decode_directions(vector, tll.ContextualIndex(bank), top_k=5)
    assert found.scores is not None
    assert found.random is not None
    assert found.random.scores is not None
    code, shown, _ = run(*command)
    assert code == 0
    for z, p in zip(found.scores["z"], found.scores["p"], strict=True):
        assert f"random directions come as near: p = {p:.2g} (z = {z:.1f})" in shown
    assert shown.count("random directions come as near") == 5, "both ends, among all hook names and one; a random direction"
    assert shown.count("random direction (for comparison)") == 1
    assert shown.count("less the mean of their hook name (center)") == 2
    _, out, _ = run(*command, "--json")
    read = json.loads(out, parse_constant=pytest.fail)
    assert read["transform"] == "center"
    assert list(pd.DataFrame(read["directions"])) == list(found.scores)
    np.testing.assert_allclose(pd.DataFrame(read["directions"])["z"], found.scores["z"], rtol=1e-5)
    assert [line["row"] for line in read["random"]] == found.random.to_dataframe()["row"].tolist()
    _, out, _ = run(*command, "--csv")
    csv = pd.read_csv(io.StringIO(out))
    np.testing.assert_allclose(csv[csv.table == "directions"]["p"], found.scores["p"])
    _, plain, _ = run(*command, "--no-calibrate")
    assert "random direction" not in plain


def test_a_transform_holds_for_the_vector_and_for_the_steered_stream(run: Any, bank: tll.Bank, tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", np.asarray(bank.vectors(HOOK)[7]).astype(np.float32))
    command = ("decode-vector", str(bank.path), str(tmp_path / "v.npy"), "--no-calibrate", "--text", "He rowed", "-n", "3")
    read = {name: json.loads(run(*command, "--transform", name, "--json")[1]) for name in ("auto", "raw", "center")}
    assert {name: tables["transform"] for name, tables in read.items()} == {"auto": "center", "raw": "raw", "center": "center"}
    assert read["auto"]["neighbors"] == read["center"]["neighbors"] != read["raw"]["neighbors"]
    assert read["auto"]["steered"] == read["raw"]["steered"] != read["center"]["steered"]
