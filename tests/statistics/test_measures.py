"""Figures of several readers: each kind with its own interval, and paired gains."""

import numpy as np
import pytest

from tl_latentlens.statistics.intervals import geometric_mean_of, mean_of, share_of
from tl_latentlens.statistics.measures import Measure, ReaderKey


def four_columns(base: np.ndarray, changes: tuple[float, float]) -> dict[ReaderKey, np.ndarray]:
    columns = {("raw", "a"): base, ("raw", "b"): base, ("center", "a"): base + changes[0], ("center", "b"): base + changes[1]}
    return {ReaderKey(*key): column for key, column in columns.items()}


def test_gains_are_paired() -> None:
    values = four_columns(np.random.default_rng(0).normal(0, 10, 400), (0.1, -0.3))
    for lower, sign in ((False, 1), (True, -1)):
        (line,) = Measure("m", values, "units", lower).gains(["center"], "raw").to_dict("records")
        assert line["gain"] == pytest.approx(sign * -0.1)
        assert line["low"] <= line["gain"] <= line["high"]
        assert line["high"] - line["low"] < 1e-6  # however far the values themselves are spread


def test_gains_of_geometric_means_are_relative() -> None:
    rng = np.random.default_rng(1)
    logs = rng.normal(-2, 3, 400)
    ratio = np.log(0.9) + rng.normal(0, 0.1, 400)
    columns = {("raw", "a"): logs, ("raw", "b"): logs + 1, ("center", "a"): logs + ratio, ("center", "b"): logs + 1 + ratio}
    values = {ReaderKey(*key): np.exp(column) for key, column in columns.items()}
    for lower, sign in ((False, 1), (True, -1)):
        (line,) = Measure("m", values, "units", lower, "geometric mean").gains(["center"], "raw").to_dict("records")
        assert line["gain"] == pytest.approx(sign * -0.1, abs=0.01)
        assert line["low"] < line["gain"] < line["high"]
        assert 0.01 < line["high"] - line["low"] < 0.03
        assert line["mean"] == pytest.approx(np.exp(logs.mean() + 0.5) * 0.9, rel=0.02)


@pytest.mark.parametrize(("kind", "interval"), [("mean", mean_of), ("share", share_of), ("geometric mean", geometric_mean_of)])
def test_a_measure_knows_its_kind(kind: str, interval: object) -> None:
    values = np.random.default_rng(2).random(50)
    measure = Measure("m", {ReaderKey("raw", "a"): values, ReaderKey("null"): values / 2}, "units", kind=kind)  # pyright: ignore
    table = measure.table()
    assert list(table.columns) == ["measure", "hook_name", "reader", "mean", "low", "high", "n", "unit", "kind"]
    assert table["hook_name"].tolist() == ["a", ""]
    assert table["kind"].tolist() == [kind, kind]
    expected = interval(values)  # pyright: ignore
    assert tuple(table.iloc[0][["mean", "low", "high"]]) == (expected.mean, expected.low, expected.high)
