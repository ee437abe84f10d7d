"""Intervals of what `evaluate` prints: samples from the tokens of the embedded model, whose own figures are the truth."""

import math
from functools import lru_cache

import numpy as np
from jaxtyping import Int

import tl_latentlens as tll
from benchmarks.coverage.demo import demo_bank, demo_model
from benchmarks.coverage.lines import Line
from benchmarks.coverage.shares import SIZES
from benchmarks.measure import Settings
from tl_latentlens.statistics.measures import Measure, ReaderKey

TITLE = "What `evaluate` prints of the embedded model, 95 % intervals"
_N_TOKENS = 1500
_HOOK_NAMES = [0, 3]
_READERS = ("raw", "random")


def lines(settings: Settings) -> list[Line]:
    """Coverage of each measure by hook name, and of its gain, by number of tokens."""
    found = []
    for measure in measured():
        keys = [key for key in measure.values if key.reader in _READERS]
        found += [of_mean(measure, key, n, settings.draws) for key in keys for n in SIZES]
        found += [of_gain(measure, n, settings.draws) for n in SIZES]
    return found


@lru_cache(1)
def measured() -> list[Measure]:
    """The measures of many tokens, whose values are drawn from."""
    settings = {"hook_names": _HOOK_NAMES, "transforms": ["raw", "center"], "senses": None, "n_tokens": _N_TOKENS}
    return tll.evaluate(demo_model(), demo_bank(), **settings, progress=False).measures


def of_mean(measure: Measure, key: ReaderKey, n: int, draws: int) -> Line:
    """The figure of one reader at one hook name."""
    whole = _chosen(measure, [key], np.flatnonzero(~np.isnan(measure.values[key])))
    truth = whole.table().iloc[0]["mean"]
    found = [_chosen(whole, [key], ids).table().iloc[0] for ids in _drawn(whole, n, draws)]
    covered = [bool(line["low"] <= truth <= line["high"]) for line in found]
    layer = f" {key.hook_name.split('.')[1]}" if key.hook_name else ""
    return Line(f"{measure.kind}: {measure.name}, {key.reader}{layer}", n, 0.95, float(np.mean(covered)), draws)


def of_gain(measure: Measure, n: int, draws: int) -> Line:
    """The gain of centering, over the samples that have an interval."""
    keys = [key for key in measure.values if key.reader in ("raw", "center")]
    truth = measure.gains(["center"], "raw").iloc[0]["gain"]
    found = [_chosen(measure, keys, ids).gains(["center"], "raw").iloc[0] for ids in _drawn(measure, n, draws)]
    covered = [bool(line["low"] <= truth <= line["high"]) for line in found if not math.isnan(line["low"])]
    return Line(f"gain: {measure.name}, center over raw", n, 0.95, float(np.mean(covered)), len(covered))


def _drawn(measure: Measure, n: int, draws: int) -> Int[np.ndarray, "draws n"]:
    n_units = len(next(iter(measure.values.values())))
    return np.random.default_rng(n).integers(0, n_units, (draws, n))


def _chosen(measure: Measure, keys: list[ReaderKey], ids: Int[np.ndarray, " n"]) -> Measure:
    values = {key: measure.values[key][ids] for key in keys}
    return Measure(measure.name, values, measure.unit, measure.lower_is_better, measure.kind)
