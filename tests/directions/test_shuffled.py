"""A feature is held against shuffled ones that are active about as often."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from support.banks import fill, make_record
from torch.nn.functional import normalize

import tl_latentlens as tll
from tl_latentlens.corpus.plan import PlanSettings, make_plan, prompts_from_lists
from tl_latentlens.directions.features.controls import ShuffledDecoders, draw_other_features
from tl_latentlens.directions.features.density_bins import DensityBins
from tl_latentlens.directions.features.sae import TensorSAE

HOOK = "blocks.0.hook_resid_post"
N_WORDS, D, N_FEATURES = 50, 24, 400


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> tll.ContextualIndex:
    """Rows that are a word's center and much noise; words of letters, of which a search finds some at once."""
    rng = np.random.default_rng(0)
    lists = [[0, *rng.integers(1, N_WORDS + 1, 20).tolist()] for _ in range(200)]
    plan = make_plan(prompts_from_lists(lists, [[i == 0 for i in range(21)] for _ in lists]), PlanSettings(None))
    centers = rng.standard_normal((N_WORDS + 1, D))
    acts = centers[plan.tokens[plan.row_tokens]] + 0.7 * rng.standard_normal((plan.n_rows, D))
    path = tmp_path_factory.mktemp("shuffled") / "bank.h5"
    words = {i: f" w{chr(97 + i // 26)}{chr(97 + i % 26)}".encode() for i in range(N_WORDS + 1)}
    fill(path, plan, acts={HOOK: acts.astype(np.float32)}, record=replace(make_record(plan, {HOOK: D}), token_bytes=words))
    return tll.ContextualIndex(path, device="cpu")


def unrelated(seed: int) -> TensorSAE:
    """Decoder rows that have nothing to do with the encoder, whose features are active on one row in a thousand to most."""
    generator = torch.Generator().manual_seed(seed)
    decoder = torch.randn(N_FEATURES, D, generator=generator)
    encoder = normalize(torch.randn(N_FEATURES, D, generator=generator), dim=-1)
    weights = {"W_enc": encoder.T.contiguous(), "b_enc": torch.linspace(-4, 1, N_FEATURES)}
    return TensorSAE(decoder, weights, hook_name=HOOK)


@pytest.fixture(scope="module")
def labelled(index: tll.ContextualIndex) -> list[tll.FeatureResult]:
    """Four such SAEs."""
    return [tll.label_features(unrelated(seed), index, seed=seed, progress=False) for seed in range(4)]


def test_p_values_are_uniform_at_every_density(labelled: list[tll.FeatureResult]) -> None:
    tables = [result.table for result in labelled]
    density = np.concatenate([table.density for table in tables])
    for name in ("p_auroc", "p_auroc_same_token"):
        p = np.concatenate([table[name] for table in tables])
        for low, high in ((0, 0.01), (0.01, 0.05), (0.05, 0.2), (0.2, 0.5), (0.5, 1)):
            at = (density > low) & (density <= high)
            assert at.sum() > 100
            # Features of one SAE share the rows of the null, so their p-values are not independent.
            assert (p[at] < 0.05).mean() < 0.05 + 4 * np.sqrt(0.05 / at.sum()), (name, low)
            assert low < 0.05 or (p[at] < 0.05).mean() > 0.05 - 4 * np.sqrt(0.05 / at.sum()), (name, low)


def test_each_feature_has_the_null_of_its_own_density(labelled: list[tll.FeatureResult]) -> None:
    table, nulls = labelled[0].table, labelled[0].nulls
    assert len(nulls["density"]) == len(nulls["auroc"]) == len(nulls["auroc_same_token"])
    assert (nulls["density"] > 0).all()
    bins = DensityBins.of_nulls(nulls["density"])
    assert 5 <= len(bins) <= 10
    own, of_nulls = bins.places(table["density"].to_numpy()), bins.places(nulls["density"])
    assert np.bincount(of_nulls).min() >= 200
    for place in range(len(bins)):
        null = nulls["auroc"][of_nulls == place]
        for line in np.flatnonzero(own == place)[:5]:
            assert table["p_auroc"][line] == (1 + (null >= table["auroc"][line]).sum()) / (1 + len(null))
            assert table["auroc_null"][line] == pytest.approx(null.mean())
    spread = [nulls["auroc"][of_nulls == place].std() for place in range(len(bins))]
    assert spread[-1] > 2 * spread[0], "the AUROC of a feature that is active often strays further by chance"


@pytest.mark.parametrize(
    ("densities", "n_bins"),
    [
        (np.zeros(0), 1),
        (np.full(5000, 0.1), 1),
        (np.linspace(0.001, 1, 399), 1),
        (np.linspace(0.001, 1, 450), 2),
        (np.linspace(0.001, 1, 10_000), 10),
        (np.repeat([0.001, 0.002, 0.5], [9000, 100, 900]), 2),
        (np.repeat([0.001, 0.5], [9900, 100]), 1),
        (np.repeat([0.001, 0.5], [100, 9900]), 1),
    ],
)
def test_bins_hold_enough_nulls_and_equal_densities_stay_together(densities: np.ndarray, n_bins: int) -> None:
    bins = DensityBins.of_nulls(np.random.default_rng(0).permutation(densities))
    assert len(bins) == n_bins
    counts = np.bincount(bins.places(densities), minlength=n_bins)
    assert counts.min() >= min(200, len(densities))
    assert counts.sum() == len(densities)
    assert bins.places(np.array([0.0, 1.0])).tolist() == [0, n_bins - 1]


@pytest.mark.parametrize(
    "counts", [np.zeros(500), np.arange(500), np.r_[np.zeros(499), 900], np.r_[np.zeros(250), np.full(250, 7)]]
)
def test_features_of_every_density_are_drawn_and_never_the_neighbors_own(counts: np.ndarray) -> None:
    rng = np.random.default_rng(1)
    others = rng.integers(0, 500, 1000)
    selection = cast(Any, SimpleNamespace(all_ids=np.arange(500)))
    shuffled = ShuffledDecoders(others, others, np.zeros((1000, 3), int))
    drawn = draw_other_features(selection, shuffled, counts.astype(int), rng)
    assert drawn.shape == (1000, 10)
    assert (drawn != others[:, None]).all()
    octaves = np.log2(counts + 1).astype(int)
    shares = np.bincount(octaves[drawn].ravel(), minlength=octaves.max() + 1) / drawn.size
    n_octaves = len(np.unique(octaves))
    np.testing.assert_allclose(shares[np.unique(octaves)], 1 / n_octaves, atol=0.02)


def test_an_sae_of_one_or_two_features(index: tll.ContextualIndex) -> None:
    sae = unrelated(2)
    for n in (1, 2):
        weights = {"W_enc": sae.weights["W_enc"][:, -n:].contiguous(), "b_enc": sae.weights["b_enc"][-n:]}
        table = tll.label_features(TensorSAE(sae.W_dec[-n:], weights, hook_name=HOOK), index, progress=False).table
        assert table[["p_auroc", "p_auroc_same_token"]].to_numpy().max() <= 1


def test_most_features_are_never_active(index: tll.ContextualIndex, tmp_path: Path) -> None:
    """The few that live have nulls enough."""
    sae = unrelated(3)
    bias = sae.weights["b_enc"].clone()
    bias[:380] = -1e6
    dead = TensorSAE(sae.W_dec, {**sae.weights, "b_enc": bias}, hook_name=HOOK)
    found = tll.label_features(dead, index, progress=False)
    assert len(found.nulls["auroc"]) > 3000
    assert found.table["p_auroc"].to_numpy()[:380].min() > 0.1
    found.to_html(tmp_path / "f.html", progress=False)
