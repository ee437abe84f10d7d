"""Means with intervals, and paired gains."""

import numpy as np
import pytest

from tl_latentlens.statistics.intervals import Measure, ReaderKey, mean_of


def test_gains_are_paired() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(0, 10, 400)
    columns = {("raw", "a"): base, ("raw", "b"): base, ("center", "a"): base + 0.1, ("center", "b"): base - 0.3}
    values = {ReaderKey(*key): column for key, column in columns.items()}
    for lower, sign in ((False, 1), (True, -1)):
        (line,) = Measure("m", values, "units", lower).gains(["center"], "raw").to_dict("records")
        assert line["gain"] == pytest.approx(sign * -0.1)
        assert line["high"] - line["low"] < 1e-6  # however far the values themselves are spread
    table = Measure("m", values, "units").table()
    assert list(table.columns) == ["measure", "hook_name", "reader", "mean", "low", "high", "n", "unit"]
    assert table.n.tolist() == [400] * 4


def test_mean_of() -> None:
    found = mean_of(np.array([1.0, np.nan, 3.0]))
    assert (found.mean, found.n) == (2.0, 2)
    assert found.low < 2 < found.high
    assert mean_of(np.full(3, np.nan)).n == 0
    assert mean_of(np.ones(3)).high == 1
