"""`decode-vector --calibrate` says whether the neighbors of a vector are near, in every form of its output."""

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
    command = ("decode-vector", str(bank.path), str(tmp_path / "v.npy"), "--calibrate", "--text", "He rowed", "-n", "3")
    expected = tll.decode_directions(vector, tll.ContextualIndex(bank), top_k=5, calibrate=True).scores
    assert expected is not None
    code, shown, _ = run(*command)
    assert code == 0
    for z, p in zip(expected["z"], expected["p"], strict=True):
        assert f"random directions come as near: p = {p:.2g} (z = {z:.1f})" in shown
    assert shown.count("random directions come as near") == 4, "two of all hook names, two of the layer that is steered"
    _, out, _ = run(*command, "--json")
    read = json.loads(out, parse_constant=pytest.fail)
    assert list(pd.DataFrame(read["directions"])) == list(expected)
    np.testing.assert_allclose(pd.DataFrame(read["directions"])["z"], expected["z"], rtol=1e-5)
    _, out, _ = run(*command, "--csv")
    csv = pd.read_csv(io.StringIO(out))
    np.testing.assert_allclose(csv[csv.table == "directions"]["p"], expected["p"])
    _, plain, _ = run(*(part for part in command if part != "--calibrate"))
    assert "random directions" not in plain
