"""Labels of SAE features against truth that was planted, and against the model itself."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from torch.nn.functional import normalize

import tl_latentlens as tll
from tl_latentlens.bank.format import ModelRecord
from tl_latentlens.corpus.plan import Prompts
from tl_latentlens.directions.features.activity import HISTOGRAM_EDGES, bank_activity
from tl_latentlens.directions.features.sae import TensorSAE
from tl_latentlens.index.words import word_at_row
from tl_latentlens.model.fingerprint import Fingerprint
from tl_latentlens.model.info import ModelInfo
from tl_latentlens.model.running import run_hooked

HOOK = "blocks.1.hook_resid_post"
N_WORDS, D, LENGTH = 200, 64, 20
INFO = ModelInfo("planted", "none", 2, D, N_WORDS + 1, 64, "float32", False, "0" * 64)


def word(token: int) -> str:
    """A word of letters only: `waa`, `wab`, ..."""
    return f"w{chr(97 + token // 26)}{chr(97 + token % 26)}"


def centers() -> torch.Tensor:
    return normalize(torch.randn(N_WORDS, D, generator=torch.Generator().manual_seed(1)), dim=-1)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tll.ContextualIndex:
    """Every word has a center; a row is its word's center and noise, of any length."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, N_WORDS, (400, LENGTH), dtype=np.int32)
    tokens[:, 0] = N_WORDS
    special = np.zeros(tokens.shape, bool)
    special[:, 0] = True
    plan = tll.make_plan(
        Prompts(tokens.ravel(), np.arange(0, tokens.size + 1, LENGTH), special.ravel()), tll.PlanSettings(None)
    )
    texts = {i: f" {word(i)}".encode() for i in range(N_WORDS)} | {N_WORDS: b"<s>"}
    record = ModelRecord(INFO, {HOOK: D}, Fingerprint(((1, 2),), {HOOK: np.ones((2, D), np.float32)}), texts, (N_WORDS,))
    noise = torch.Generator().manual_seed(2)
    path = tmp_path_factory.mktemp("planted") / "bank.h5"
    with tll.BankWriter.create(path, plan, record) as writer:
        for batch in writer.batches():
            ids = torch.from_numpy(plan.tokens[plan.row_tokens[batch.rows]].astype(np.int64))
            rows = 3 * (centers()[ids] + 0.05 * torch.randn(len(ids), D, generator=noise))
            writer.write(HOOK, batch, normalize(rows, dim=-1).half(), rows.norm(dim=-1))
    return tll.ContextualIndex(path, device="cpu")


def tied(decoder: torch.Tensor, threshold: float = 1.5) -> TensorSAE:
    """An SAE whose features are active where the activation has more than a threshold of their direction."""
    weights = {"W_enc": decoder.T.contiguous(), "b_enc": torch.full((len(decoder),), -threshold)}
    return TensorSAE(decoder, weights, hook_name=HOOK)


def column(result: tll.FeatureResult, name: str) -> np.ndarray:
    return result.table[name].to_numpy()


# ------------------------------------------------------------------------------------------------------------ planted truth


@pytest.mark.parametrize("encoder", [True, False])
def test_planted_features_are_labelled_and_random_directions_are_refused(planted: Any, encoder: bool) -> None:
    random = normalize(torch.randn(200, D, generator=torch.Generator().manual_seed(3)), dim=-1)
    decoder = torch.cat([centers(), random])
    sae = tied(decoder) if encoder else TensorSAE(decoder, {}, hook_name=HOOK)
    result = tll.label_features(sae, planted, progress=False)
    labels = column(result, "label").tolist()
    right = [label.startswith(f"{word(i)} 1") or f"{word(i)}/" in label for i, label in enumerate(labels[:N_WORDS])]
    assert np.mean(right) >= 0.99
    refused = [kind in ("", "mixed") for kind in column(result, "label_kind")[N_WORDS:]]
    assert np.mean(refused) >= 0.95
    assert all(line["why_not"] for line in result.table.to_dict("records") if line["label_kind"] in ("", "mixed"))
    if encoder:
        assert column(result, "auroc")[:N_WORDS].min() > 0.95
        assert abs(column(result, "auroc_null")[0] - 0.5) < 0.05
        assert (column(result, "overlap")[:N_WORDS] > 0.99).all()
        assert column(result, "overlap_null")[0] < 0.05


def test_an_encoder_that_has_nothing_to_do_with_its_decoder_is_refused(planted: Any) -> None:
    decoder = centers()
    shuffled = TensorSAE(decoder, tied(decoder.roll(1, 0)).weights, hook_name=HOOK)
    result = tll.label_features(shuffled, planted, progress=False)
    assert (column(result, "p_similarity") < 0.01).all()
    assert (column(result, "label") == "").mean() >= 0.95
    assert np.mean(["no more than another" in why for why in column(result, "why_not")]) >= 0.95
    assert column(result, "auroc").mean() < 0.55


def test_features_never_active_say_so(planted: Any) -> None:
    result = tll.label_features(tied(centers()[:5], threshold=100.0), planted, progress=False)
    assert (column(result, "why_not") == "never active on this bank").all()
    assert result.max_activating(0) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_named(planted: Any, value: float) -> None:
    sae = tied(centers()[:5])
    sae.weights["W_enc"][3, 2] = value
    with pytest.raises(
        tll.InvalidInputError, match=rf"encoder gives NaN or inf for 1 features, first \[2\], on rows of {HOOK}"
    ):
        tll.label_features(sae, planted, [0, 1], progress=False)
    decoder = centers()[:5]
    decoder[4, 1] = value
    with pytest.raises(tll.InvalidInputError, match=r"W_dec holds NaN or inf in 1 rows, first \[4\]"):
        tll.label_features(decoder, planted, [0, 1], progress=False)


def test_an_activation_that_the_index_lacks(planted: Any) -> None:
    with pytest.raises(tll.UnknownHookError, match=r"no hook name 'blocks.1.resid_post'"):
        tll.label_features(tied(centers()), planted, hook_name="blocks.1.resid_post")
    nameless = tll.load_sae({"W_dec": centers(), **tied(centers()).weights})
    with pytest.warns(UserWarning, match="no AUROC .* the SAE reads None"):
        result = tll.label_features(nameless, planted, progress=False)
    assert "auroc" not in result.table
    assert "auroc" in tll.label_features(nameless, planted, hook_name=HOOK, progress=False).table


@pytest.mark.parametrize("encoder", [True, False])
def test_a_decoder_row_of_zeros_is_a_line_that_says_so(planted: Any, tmp_path: Path, encoder: bool) -> None:
    decoder = centers()[:6]
    decoder[[0, 4]] = 0
    sae = tied(decoder) if encoder else TensorSAE(decoder, {}, hook_name=HOOK)
    result = tll.label_features(sae, planted, [4, 1, 0, 5], progress=False)
    assert column(result, "feature").tolist() == [4, 1, 0, 5]
    zero = np.array([True, False, True, False])
    assert (column(result, "why_not") == "its decoder row is zero").tolist() == zero.tolist()
    assert (column(result, "label")[zero] == "").all()
    assert [parts[0][0] for parts in column(result, "label_parts")[~zero]] == [word(1), word(5)]
    figures = result.table.select_dtypes("number").drop(columns="feature").to_numpy(float)
    assert (column(result, "label_kind")[zero] == "").all()
    assert all(column(result, name)[place] == [] for name in ("label_parts", "label_near", "words") for place in (0, 2))
    assert np.isnan(figures[zero]).all()
    may_lack = ["intruder", "embedding"]  # few contexts
    assert np.isfinite(result.table[~zero].select_dtypes("number").drop(columns=may_lack, errors="ignore")).all(None)
    assert (list(result.ids), result.positive.rows.shape) == ([1, 5], (2, 10))
    alone = tll.label_features(sae, planted, [1, 5, 1], progress=False)
    pd.testing.assert_frame_equal(result.table[~zero].reset_index(drop=True), alone.table)
    summary = result.summary().set_index("figure")
    assert (summary.loc["labelled", "mean"], summary.loc["labelled", "features"]) == (1, 2)
    assert result.max_activating(4) == []
    evidence = result.with_evidence()
    assert evidence["neighbors"].map(len).tolist() == [0, 3, 0, 3]
    evidence.to_parquet(tmp_path / "f.parquet")
    assert "2 without a label" in str(result)
    for nothing in (torch.zeros(3, D), tied(torch.zeros(3, D))):
        whole = tll.label_features(nothing, planted, hook_name=HOOK, progress=False)
        assert column(whole, "why_not").tolist() == 3 * ["its decoder row is zero"]


@pytest.mark.parametrize("with_model", [False, True])
def test_no_features_have_the_columns_of_some(any_model: Any, bank: tll.Bank, with_model: bool) -> None:
    index, sae = tll.ContextualIndex(bank, "blocks.3.hook_resid_post", device="cpu"), tll.load_sae("demo")
    model = any_model if with_model else None
    some, none = (
        tll.label_features(sae, index, numbers, hook_name=index.hook_names[0], model=model, progress=False)
        for numbers in ([3, 4], [])
    )
    assert list(none.table.columns) == list(some.table.columns)
    assert ("steered" in none.table) == with_model
    assert len(none.table) == len(none.with_evidence()) == 0
    assert none.table["label"].dtype == some.table["label"].dtype
    assert none.summary()["figure"].tolist() == some.summary()["figure"].tolist()
    assert "no label" not in str(none)


@pytest.mark.parametrize("features", [3, [1.7], torch.tensor([True, False]), ["a"]])
def test_features_are_numbers(planted: Any, features: Any) -> None:
    with pytest.raises(tll.InvalidInputError, match="expected a list of feature numbers"):
        tll.label_features(tied(centers()), planted, features)


@pytest.mark.parametrize("encoder", [True, False])
def test_the_scores_of_a_feature_do_not_hang_on_the_others(planted: Any, encoder: bool) -> None:
    sae = tied(centers()) if encoder else TensorSAE(centers(), {}, hook_name=HOOK)
    whole = tll.label_features(sae, planted, progress=False)
    for features in ([17], [17, 4], [4, 150, 17, 3], range(100)):
        some = tll.label_features(sae, planted, features, progress=False)
        assert some.table["feature"].tolist() == list(features)
        expected = whole.table.iloc[list(features)].reset_index(drop=True)
        pd.testing.assert_frame_equal(some.table, expected, check_exact=True)
        assert str(some.max_activating(17)) == str(whole.max_activating(17))
    assert not encoder or whole.table["overlap_null"].nunique() == 1


def test_the_steering_of_a_feature_does_not_hang_on_the_others(any_model: Any, bank: tll.Bank) -> None:
    sae = tll.load_sae("demo")
    index = tll.ContextualIndex(bank, sae.hook_name, device="cpu")
    alone, others = (
        tll.label_features(sae, index, features, model=any_model, top_k=3, progress=False).table.set_index("feature")
        for features in ([597], [*range(40, 75), 597])
    )
    pd.testing.assert_frame_equal(alone, others.loc[[597]], check_exact=True)
    assert 0.2 < alone["steered_null"].item() < 0.8
    assert alone["steered_null"].item() != alone["steered"].item()


# --------------------------------------------------------------------------------------------------------- the pass over a bank


def brute(sae: Any, index: tll.ContextualIndex) -> np.ndarray:
    """Feature activations of all rows at once."""
    vectors = np.array(index.banks[0].vectors(HOOK)).astype(np.float32) * np.array(index.banks[0].norms(HOOK))[:, None]
    return sae.encode(torch.from_numpy(vectors)).numpy()


@pytest.mark.parametrize("chunk", [2**26, 4 * N_WORDS * 97])
def test_activity_is_what_all_rows_at_once_give(planted: Any, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr("tl_latentlens.directions.features.sae.ENCODED_BYTES", chunk)
    monkeypatch.setattr("tl_latentlens.directions.features.samples._MAX_PENDING", 500)
    sae = tied(centers(), threshold=0.3)
    acts, features = brute(sae, planted), [3, 150, 0]
    pairs = np.random.default_rng(4).integers(0, [[planted.n_rows], [N_WORDS]], (2, 300))
    found = bank_activity(sae, planted, HOOK, features, top_k=7, probe_rows=pairs[0], probe_features=pairs[1], progress=False)
    assert found.n_rows == len(acts)
    np.testing.assert_array_equal(found.count, (acts > 0).sum(0))
    np.testing.assert_allclose(found.total, acts.sum(0), rtol=1e-4)
    np.testing.assert_allclose(found.probed, acts[pairs[0], pairs[1]], atol=1e-5)
    for i, feature in enumerate(features):
        column = acts[:, feature]
        np.testing.assert_allclose(found.top.activations[i], np.sort(column)[::-1][:7], atol=1e-5)
        np.testing.assert_allclose(column[found.top.rows[i]], found.top.activations[i], atol=1e-5)
        expected = np.histogram(column[column > 0], [0, *HISTOGRAM_EDGES, np.inf])[0]
        assert np.abs(found.histogram[i] - expected).sum() <= 2  # rounding at an edge


def test_the_pass_over_a_bank_equals_encoding_what_the_model_gives(any_model: Any, bank: tll.Bank) -> None:
    """Within 1e-2 of the activations' scale, for the half precision of the bank."""
    index, name = tll.ContextualIndex(bank, device="cpu"), bank.hook_names[2]
    generator = torch.Generator().manual_seed(6)
    weights = {"W_enc": torch.randn(256, 32, generator=generator) / 16, "b_enc": torch.zeros(32)}
    sae = TensorSAE(weights["W_enc"].T.contiguous(), weights, hook_name=name)
    rows = np.linspace(0, bank.n_rows - 1, 25).astype(int)
    asked_rows, asked_features = np.repeat(rows, 32), np.tile(np.arange(32), 25)
    found = bank_activity(
        sae, index, name, [0], probe_rows=asked_rows, probe_features=asked_features, progress=False
    ).probed.reshape(25, 32)
    for i, row in enumerate(rows):
        seen: list[torch.Tensor] = []
        prompt = bank.prompt(bank.row(row).prompt_index)
        run_hooked(
            any_model, torch.tensor([prompt]), None, [(name, lambda activation, hook, seen=seen: seen.append(activation))]
        )
        expected = sae.encode(seen[0][0, bank.row(row).position].detach()).numpy()
        assert np.abs(found[i] - expected).max() <= 1e-2 * np.abs(expected).max()


def test_auroc_is_a_rank_statistic_of_neighbors_against_controls(planted: Any) -> None:
    sae = tied(centers(), threshold=0.3)
    result = tll.label_features(sae, planted, [11], top_k=10, progress=False)
    acts = brute(sae, planted)[:, 11]
    neighbors = acts[result.positive.rows[0].numpy()]
    rest = acts[np.random.default_rng(0).integers(0, len(acts), 4000)]
    everything = stats.mannwhitneyu(neighbors, rest).statistic / (10 * len(rest))
    assert abs(column(result, "auroc")[0] - everything) < 0.03
    line = result.table.iloc[0]
    assert 0 <= line["auroc_low"] <= line["auroc"] <= line["auroc_high"] <= 1


def test_steering_with_what_the_unembedding_reads_raises_its_token(any_model: Any, bank: tll.Bank) -> None:
    name = bank.hook_names[-1]
    index = tll.ContextualIndex(bank, name, device="cpu")
    vectors = torch.from_numpy(np.array(bank.vectors(name)[:12]).astype(np.float32))
    with torch.no_grad():
        before = any_model(torch.tensor([bank.prompt(0)]))
    result = tll.label_features(TensorSAE(vectors, {}, hook_name=name), index, model=any_model, top_k=1, progress=False)
    followed = [row for row in range(12) if bank.row(row).position + 1 < len(bank.prompt(bank.row(row).prompt_index))]
    # The last block's activation of a token, added, makes the model predict what it predicted there.
    ranks = column(result, "steered_next")[followed]
    assert ranks.mean() > max(0.8, column(result, "steered_next_null")[0])
    assert len(column(result, "logit_tokens")[0]) == 5
    with torch.no_grad():
        assert torch.equal(any_model(torch.tensor([bank.prompt(0)])), before)


# --------------------------------------------------------------------------------------------------------------------- results


def test_results_as_tables_and_files(planted: Any, tmp_path: Path) -> None:
    result = tll.label_features(tied(centers()[:30]), planted, top_k=4, progress=False)
    result.to_dataframe().to_parquet(tmp_path / "f.parquet")
    stored, lists = pd.read_parquet(tmp_path / "f.parquet"), ["label_parts", "label_near", "words", "words_negative"]
    pd.testing.assert_frame_equal(stored.drop(columns=lists), result.table.drop(columns=lists))
    assert [list(line) for line in stored["words"]] == list(result.table["words"])
    parts = [[(part["text"], part["share"]) for part in line] for line in stored["label_parts"]]
    assert parts == list(result.table["label_parts"])
    unequal = ["label_parts"]  # which a file cannot hold as tuples
    pd.testing.assert_frame_equal(result.to_dataframe().drop(columns=unequal), result.table.drop(columns=unequal))
    assert result.to_dataframe() is not result.table
    neighbors = result.neighbors_dataframe()
    assert len(neighbors) == 30 * 2 * 4
    assert neighbors["direction"].tolist() == [feature for feature in range(30) for _ in range(8)]
    assert word(3) in str(result)
    assert max(map(len, str(result).splitlines())) <= 100
    assert repr(result) == f"FeatureResult(30 features, {(column(result, 'label_kind') == 'token').sum()} labelled)"
    evidence = result.with_evidence(2)
    assert evidence["neighbors"][3] == [n.context for n in result.neighbors(3)[0][:2]]
    assert evidence["max_activating"][3] == [n.context for _, n in result.max_activating(3, 2)]
    pd.testing.assert_frame_equal(evidence.drop(columns=["neighbors", "max_activating"]), result.to_dataframe())
    value, neighbor = result.max_activating(3)[0]
    assert value == pytest.approx(brute(tied(centers()[:30]), planted)[:, 3].max(), rel=1e-5)
    assert neighbor.token == f" {word(3)}"
    some = tll.label_features(tied(centers()), planted, [17, 4], progress=False)
    assert some.max_activating(4)[0][1].token == f" {word(4)}"
    with pytest.raises(tll.InvalidInputError, match="feature 0 is not among the 2"):
        some.max_activating(0)
    summary = result.summary().set_index("figure")
    assert summary.loc["labelled", "mean"] == (column(result, "label") != "").mean()
    assert summary.loc["auroc", "low"] <= summary.loc["auroc", "mean"] <= summary.loc["auroc", "high"]


def test_words_are_merged_from_their_pieces(index: tll.ContextualIndex) -> None:
    bank = index.banks[0]
    merged = 0
    for row in range(bank.n_rows):
        found = bank.row(row)
        words = word_at_row(found)
        piece = "".join(c for c in found.token.lower() if c.isalpha())
        assert piece in words.word
        assert words.piece.strip("…") == ("" if piece == words.word else piece)
        assert ("…" in words.piece) == bool(words.piece)
        text = "".join(c if c.isalpha() else " " for c in found.prompt_text.lower()).split()
        if piece and found.token.startswith(" "):
            assert words.word in text
            assert not words.piece.startswith("…")
        merged += words.word != piece
        assert words.word not in words.near
        assert words.near <= {"".join(c for c in word if c.isalpha()) for word in found.prompt_text.lower().split()} | set(text)
    assert merged > 5
