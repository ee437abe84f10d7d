"""Labels against planted truth: signs, parts of words, what stands before or after, positions, mixtures."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

import tl_latentlens as tll
from tl_latentlens.bank.format import ModelRecord
from tl_latentlens.corpus.plan import Prompts
from tl_latentlens.directions.features.activity import bank_activity
from tl_latentlens.directions.features.contexts import CONTEXT_TOKENS, contexts_of
from tl_latentlens.directions.features.detection import ContextRules, detect
from tl_latentlens.directions.features.evidence import POWER
from tl_latentlens.directions.features.held_out import held_out_prompts, held_out_rows
from tl_latentlens.directions.features.label_check import rows_of_label
from tl_latentlens.directions.features.label_rule import find_rules, is_among, rule_precision
from tl_latentlens.directions.features.row_texts import END, NumberedTexts, RowTexts, row_texts
from tl_latentlens.directions.features.sae import TensorSAE
from tl_latentlens.directions.features.samples import ActivePairs, PrioritySample
from tl_latentlens.model.fingerprint import Fingerprint
from tl_latentlens.model.info import ModelInfo

HOOK = "blocks.0.hook_resid_post"
PLAIN = [f" w{a}{b}" for a in "abcdefghij" for b in "aeiou"]
STRINGS = [*PLAIN, "-", "\n", " 7", " gl", "acier", " team", " teams", " hot", " water", "<s>"]
BOS = len(STRINGS) - 1
D, LENGTH, N_PROMPTS = 48, 18, 600
INFO = ModelInfo("planted", "none", 1, D, len(STRINGS), 64, "float32", False, "0" * 64)


def token(text: str) -> int:
    return STRINGS.index(text)


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    """Random texts after BOS; "acier" always follows " gl"."""
    drawn = np.random.default_rng(0).integers(0, BOS, (N_PROMPTS, LENGTH), dtype=np.int32)
    drawn[:, 0] = BOS
    drawn[drawn == token("acier")] = 0
    after = np.roll(drawn == token(" gl"), 1, axis=1)
    after[:, :2] = False
    drawn[after] = token("acier")
    return drawn


def is_before(tokens: np.ndarray, text: str) -> np.ndarray:
    """Where the token before is the text."""
    shifted = np.roll(tokens == token(text), 1, axis=1)
    shifted[:, 0] = False
    return shifted


PLANTED: list[tuple[str, str, Any]] = [
    ("«-» 100 %", "token", lambda t: t == token("-")),
    ("«↵» 100 %", "token", lambda t: t == token("\n")),
    ("«7» 100 %", "token", lambda t: t == token(" 7")),
    ("glacier 100 %", "token", lambda t: (t == token("acier")) | (t == token(" gl"))),
    ("team/teams 100 %", "token", lambda t: (t == token(" team")) | (t == token(" teams"))),
    ("after «-» 100 %", "before", lambda t: is_before(t, "-")),
    ("after hot 100 %", "before", lambda t: is_before(t, " hot")),
    ("before water 100 %", "after", lambda t: np.roll(t == token(" water"), -1, axis=1) & (np.arange(LENGTH) < LENGTH - 1)),
    ("1st token 100 % of the text", "position", lambda t: np.broadcast_to(np.arange(LENGTH) == 1, t.shape)),
    ("waa", "token", lambda t: np.isin(t, [token(" waa"), token(" wee")])),
    *((f"{text.strip()} 100 %", "token", lambda t, text=text: t == token(text)) for text in PLAIN[10:40]),
]
MIXTURE = 9


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory, tokens: np.ndarray) -> tuple[tll.ContextualIndex, TensorSAE]:
    """Rows that hold each planted direction where its feature is to be active, and noise; an SAE that reads them."""
    special = np.zeros(tokens.shape, bool)
    special[:, 0] = True
    plan = tll.make_plan(
        Prompts(tokens.ravel(), np.arange(0, tokens.size + 1, LENGTH), special.ravel()), tll.PlanSettings(None)
    )
    texts = {i: text.encode() for i, text in enumerate(STRINGS)}
    record = ModelRecord(INFO, {HOOK: D}, Fingerprint(((1, 2),), {HOOK: np.ones((2, D), np.float32)}), texts, (BOS,))
    directions = torch.eye(D)[: len(PLANTED) + 1]
    active = np.stack([np.broadcast_to(rule(tokens), tokens.shape) for _, _, rule in PLANTED]).reshape(len(PLANTED), -1)
    noise = torch.Generator().manual_seed(2)
    path = tmp_path_factory.mktemp("rules") / "bank.h5"
    with tll.BankWriter.create(path, plan, record) as writer:
        for batch in writer.batches():
            here = torch.from_numpy(active[:, plan.row_tokens[batch.rows]]).float()
            strength = 2 + torch.rand(here.shape, generator=noise)
            rows = 0.1 * torch.randn(here.shape[1], D, generator=noise) + (here * strength).T @ directions[:-1]
            rows[:, len(PLANTED)] += 2 + torch.rand(len(rows), generator=noise)  # a feature that is active everywhere
            writer.write(HOOK, batch, normalize(rows, dim=-1).half(), rows.norm(dim=-1))
    weights = {"W_enc": directions.T.contiguous(), "b_enc": torch.full((len(directions),), -1.0)}
    return tll.ContextualIndex(path, device="cpu"), TensorSAE(directions, weights, hook_name=HOOK)


@pytest.fixture(scope="module")
def labelled(planted: Any) -> tll.FeatureResult:
    index, sae = planted
    return tll.label_features(sae, index, progress=False)


# ---------------------------------------------------------------------------------------------------------------- planted truth


@pytest.mark.parametrize("feature", [feature for feature in range(15) if feature != MIXTURE])
def test_what_was_planted_is_what_the_label_says(labelled: tll.FeatureResult, feature: int) -> None:
    text, kind, _ = PLANTED[feature]
    line = labelled.table.iloc[feature]
    said = re.sub(r"(9[0-9]|100) %", "100 %", line["label"].split(" · near")[0]).replace("teams/team", "team/teams")
    assert (said, line["label_kind"]) == (text, kind)
    assert line["why_not"] == ""
    assert line["detection"] > 0.75 or kind == "position"  # Every context has a first token.
    assert line["precision"] > 0.85 or kind == "position"  # Prompts share a first token, so not all have a row there.


def test_a_mixture_of_two_names_both_with_their_shares(labelled: tll.FeatureResult) -> None:
    line = labelled.table.iloc[MIXTURE]
    assert line["label_kind"] == "token"
    parts = dict(line["label_parts"])
    assert set(parts) == {"waa", "wee"}
    assert all(0.3 < share < 0.7 for share in parts.values())


def test_a_feature_of_everything_is_mixed_and_says_of_what(labelled: tll.FeatureResult) -> None:
    line = labelled.table.iloc[-1]
    assert line["label_kind"] in ("mixed", "")
    assert line["why_not"]
    assert "mixed" in line["label"] or line["label"] == ""
    assert np.isnan(line["precision"])
    assert labelled.summary().set_index("figure").loc["labelled", "mean"] == len(PLANTED) / (len(PLANTED) + 1)


def test_labels_of_other_features_tell_nothing(labelled: tll.FeatureResult) -> None:
    null = labelled.table["detection_null"]
    assert null.nunique() <= 1
    assert np.isnan(null.iloc[0]) or abs(null.iloc[0] - 0.5) < 0.1


def test_labels_hold_on_another_bank_of_the_same_model(planted: Any, labelled: tll.FeatureResult) -> None:
    index, _ = planted
    shares = labelled.shares_on(index, progress=False)
    assert shares["feature"].tolist() == list(range(len(PLANTED)))
    assert (shares["share"] > 0.4).all()
    assert (shares["share_of_activation"] > 0.4).all()
    assert (shares["n_contexts"] > 50).all()
    alone = tll.label_features(labelled.sae.W_dec, index, hook_name=HOOK, progress=False)
    with pytest.raises(tll.InvalidInputError, match="without activations"):
        alone.shares_on(index)


# ---------------------------------------------------------------------------------------------------------------- texts of rows


def test_the_texts_of_rows(planted: Any, tokens: np.ndarray) -> None:
    index, _ = planted
    texts = row_texts(index.bank_rows)
    said = {kind: [of_kind.texts[i] if i >= 0 else None for i in of_kind.ids] for kind, of_kind in texts.by_kind.items()}
    for row in range(0, index.n_rows, 37):
        found = index.row(row)
        own, before = STRINGS[tokens[found.prompt_index, found.position]], tokens[found.prompt_index, found.position - 1]
        assert said["token"][row].strip("…") == (own.strip().lower() or own)
        assert said["position"][row] == str(found.position)
        after = tokens[found.prompt_index, found.position + 1] if found.position < LENGTH - 1 else BOS
        for beside, other in (("before", before), ("after", after)):
            outside = END if beside == "after" else None
            text = STRINGS[other].strip().lower() or STRINGS[other]
            assert said[beside][row] == outside if other == BOS else said[beside][row].strip("…") == text
        if own == "acier":
            forms = texts.forms["token"]
            assert (forms.texts[forms.ids[row]].startswith("…acier"), STRINGS[before]) == (True, " gl")
        if own == " teams":
            assert said["word"][row] == "team"


def test_a_third_of_the_prompts_is_held_out_and_a_text_always_on_the_same_side(planted: Any, bank: tll.Bank) -> None:
    index, _ = planted
    held_out = held_out_prompts(index.banks[0])
    assert abs(held_out.mean() - 1 / 3) < 0.07
    rows = held_out_rows(index.bank_rows)
    np.testing.assert_array_equal(rows, held_out[index.bank_rows.prompts])
    both = held_out_rows(tll.ContextualIndex([bank, bank], device="cpu").bank_rows)
    np.testing.assert_array_equal(both[: bank.n_rows], held_out_prompts(bank)[bank.plan.row_prompts])


# ----------------------------------------------------------------------------------------------------------- samples and scores


def pairs_of(activations: np.ndarray) -> ActivePairs:
    rows, places = np.nonzero(activations)
    values = torch.from_numpy(activations[rows, places]).float()
    return ActivePairs(values, torch.from_numpy(rows), torch.from_numpy(places))


def test_a_sample_has_all_rows_of_a_feature_that_has_few() -> None:
    activations = np.zeros((50, 2))
    activations[[3, 7, 40], 0] = [1.0, 2.0, 0.5]
    activations[:, 1] = 1
    sample = PrioritySample(np.array([5, 9]), 4, 2, 0, torch.device("cpu"))
    sample.add(pairs_of(activations))
    drawn = sample.drawn()
    assert sorted(drawn.rows[0].tolist()) == [-1, 3, 7, 40]
    assert drawn.weights[0].sum() == pytest.approx((1 + 4 + 0.25) / 4)
    assert (drawn.counts[0][drawn.rows[0] >= 0] == 1).all()
    assert (drawn.rows[1] >= 0).all()


def test_shares_of_a_sample_are_unbiased_and_do_not_hang_on_the_order_of_rows() -> None:
    rng = np.random.default_rng(1)
    activations = rng.exponential(1.0, (400, 200)) * (rng.random((400, 200)) < 0.5)
    expected = (activations[:130] ** 2).sum(0) / (activations**2).sum(0)
    sums = activations[:130].sum(0)
    pairs = pairs_of(activations)
    samples = [PrioritySample(np.arange(200), 40, 2, 3, torch.device("cpu")) for _ in range(2)]
    samples[0].add(pairs)
    for part in torch.randperm(len(pairs.rows), generator=torch.Generator().manual_seed(0)).split(777):
        samples[1].add(pairs.select(part))
    drawn, in_parts = (sample.drawn() for sample in samples)
    np.testing.assert_array_equal(drawn.rows, in_parts.rows)
    is_first = drawn.rows < 130
    shares = (drawn.weights * is_first).sum(1) / drawn.weights.sum(1)
    assert abs((shares - expected).mean()) < 0.01
    assert np.abs(shares - expected).max() < 0.3
    estimated = (drawn.counts * drawn.activations * is_first).sum(1)
    assert estimated.mean() == pytest.approx(sums.mean(), rel=0.05)


@pytest.mark.parametrize("chunk", [2**26, 4 * (len(PLANTED) + 1) * 41])
def test_contexts_rules_detection_and_precision_are_what_all_rows_at_once_give(
    planted: Any, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr("tl_latentlens.directions.features.sae.ENCODED_BYTES", chunk)
    index, sae = planted
    bank, n_features = index.banks[0], len(PLANTED) + 1
    activations = np.maximum(0, sae.encode(torch.from_numpy(bank.activations(HOOK, slice(None)))).numpy()).astype(float)
    found = bank_activity(sae, index, HOOK, range(n_features), progress=False)
    evidence, held_out = found.evidence, held_out_prompts(bank)
    prompts, texts = bank.plan.row_prompts, row_texts(index.bank_rows).by_kind["token"]
    assert LENGTH <= CONTEXT_TOKENS  # A context is a prompt here.
    largest = np.stack(
        [np.maximum.reduceat(activations[:, f], np.searchsorted(prompts, range(N_PROMPTS))) for f in range(n_features)]
    )
    for feature in range(n_features):
        rows = evidence.held_out.rows[feature]
        rows = rows[rows >= 0]
        assert held_out[prompts[rows]].all()
        assert len(np.unique(prompts[rows])) == len(rows) == min(128, (largest[feature][held_out] > 0).sum())
        np.testing.assert_allclose(activations[rows, feature], largest[feature][prompts[rows]], rtol=1e-5)
        silent = evidence.silent
        np.testing.assert_array_equal(silent.is_active[:, feature], largest[feature][silent.contexts] > 0)
    rules = find_rules(evidence.rows, texts)
    fitted = ~held_out[prompts]
    of_minus = is_among(texts.ids, rules.parts[0])
    context_rules = ContextRules(evidence.contexts, texts, evidence.silent.contexts)
    holds = np.array([of_minus[prompts == prompt].any() for prompt in range(N_PROMPTS)])
    n_holding = context_rules.n_holding(~held_out)
    assert n_holding[rules.keys[0, 0]] == (holds & ~held_out).sum()
    by_minus = np.array([activations[of_minus & (prompts == prompt), 0].max(initial=0) for prompt in range(N_PROMPTS)])
    is_of_minus = (by_minus > 0) & (by_minus == largest[0])
    assert rule_precision(rules, evidence.fitted, n_holding)[0] == pytest.approx(
        is_of_minus[holds & ~held_out].mean(), abs=0.05
    )
    shares = (activations[fitted & of_minus, 0] ** POWER).sum() / (activations[fitted, 0] ** POWER).sum()
    assert rules.shares[0, 0] == pytest.approx(shares, abs=0.05)
    score = detect(rules, context_rules, evidence, found.top.activations[:, 0], held_out=True)
    is_active, chosen = largest[0] > 0, np.isin(np.arange(N_PROMPTS), evidence.silent.contexts)
    silent_share = holds[~is_active & held_out & chosen].mean()
    tenths = np.minimum(10 * largest[0] / largest[0].max(), 9).astype(int)
    recall = np.mean([holds[is_active & held_out & (tenths == t)].mean() for t in np.unique(tenths[is_active & held_out])])
    assert score.score[0] == pytest.approx((recall + 1 - silent_share) / 2, abs=0.06)
    assert score.low[0] <= score.score[0] <= score.high[0]


def test_contexts_of_long_texts_are_pieces_of_them(any_model: Any, tmp_path: Path) -> None:
    text = " ".join(f"the {word} team met at the bank of the river ." for word in ("old", "new", "red", "big", "tall", "wet"))
    bank = tll.build_bank(any_model, [text, "a short text"], tmp_path / "b.h5", hook_names=[1], progress=False)
    index = tll.ContextualIndex(bank, device="cpu")
    contexts = contexts_of(index.bank_rows, bank.hook_names[0])
    positions = bank.plan.row_tokens - bank.plan.prompt_starts[bank.plan.row_prompts]
    pieces = np.unique(np.stack([bank.plan.row_prompts, positions // CONTEXT_TOKENS]), axis=1).shape[1]
    assert len(contexts.first_rows) == pieces > 2
    assert contexts.of_rows[0] == 0
    for context, (first, end) in enumerate(zip(contexts.first_rows, contexts.end_rows, strict=True)):
        assert (contexts.of_rows[first:end] == context).all()
    assert contexts.end_of_chunk(0, 1) == contexts.end_rows[0]


def test_another_index_must_hold_what_the_sae_reads(labelled: tll.FeatureResult, bank: tll.Bank) -> None:
    with pytest.raises(tll.UnknownHookError, match=r"no rows of 'blocks\.0\.hook_resid_post', which the SAE reads"):
        labelled.shares_on(tll.ContextualIndex(bank, 3, device="cpu"))
    with pytest.raises(tll.InvalidInputError):
        labelled.shares_on("bank.h5")  # pyright: ignore[reportArgumentType]


def test_a_stroke_in_a_token_is_no_two_forms() -> None:
    tokens = NumberedTexts(np.array([0, 1, 2, 3]), ["://", ":", "a", "b"])
    none = NumberedTexts(np.full(4, -1), [])
    texts = RowTexts({"token": tokens, "word": none}, {})
    assert rows_of_label("token", ["://"], texts).tolist() == [True, False, False, False]
    assert rows_of_label("token", ["a/…b"], texts).tolist() == [False, False, True, True]


def test_the_layer_of_an_sae_is_a_hook_name() -> None:
    tensors = {"W_dec": torch.eye(4), "W_enc": torch.eye(4), "b_enc": torch.zeros(4)}
    assert tll.load_sae(tensors, hook_name=3).hook_name == "blocks.3.hook_resid_post"
    with pytest.raises(tll.InvalidInputError, match="got layer -1"):
        tll.load_sae(tensors, hook_name=-1)
