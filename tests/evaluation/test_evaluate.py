"""Figures that say whether the lens is right: each against the same thing done by hand, and against planted truth."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from support.models import available_kinds

import tl_latentlens as tll
from tl_latentlens.corpus.plan import PlanSettings
from tl_latentlens.evaluation.agreement import reader_agreement
from tl_latentlens.evaluation.readings import Cells, draw_cells, left_out, neighbors_elsewhere, random_rows
from tl_latentlens.evaluation.senses import Uses, _most_frequent, _votes, find_uses, layer_0, other_votes, sense_accuracy, votes
from tl_latentlens.evaluation.substitution import _moved, substitution
from tl_latentlens.model.activations import activations_at
from tl_latentlens.statistics.intervals import Measure, mean_of

NAMES = ["blocks.1.hook_resid_post", "blocks.4.hook_resid_post"]


@pytest.fixture(scope="module")
def senses() -> pd.DataFrame:
    table = tll.load_senses("demo")
    return table[table.word.isin(["bank", "ring", "court", "bat"])].reset_index(drop=True)


@pytest.fixture(scope="module")
def bank(any_model: Any, senses: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> tll.Bank:
    texts = [*senses.text, *tll.load_corpus("demo", limit=120)]
    path = tmp_path_factory.mktemp("evaluate") / "bank.h5"
    return tll.build_bank(any_model, texts, path, hook_names=NAMES, max_rows_per_token=None, progress=False)


def test_demo_senses_are_found_in_every_text(demo_model: Any) -> None:
    table = tll.load_senses("demo")
    uses = find_uses(demo_model, table, PlanSettings())
    assert len(uses.prompts) == len(table) == 1370
    assert uses.held_out.sum() == 137
    assert len(set(uses.senses)) == 137
    for prompt, position, word in list(zip(uses.prompts, uses.positions, table.word, strict=True))[::50]:
        assert demo_model.tokenizer.decode(prompt[: position + 1]).lower().endswith(word)


def senses_by_all(model: Any, uses: Uses, index: tll.ContextualIndex) -> Measure:
    names = [*index.hook_names, layer_0(model)]
    found = activations_at(model, uses.prompts, uses.positions, names)
    return sense_accuracy(uses, votes(index, uses, found, 5) | other_votes(model, uses, found, 5))


def neighbors_at_all(indexes: list[tll.ContextualIndex], cells: Cells, k: int) -> dict[tuple[str, str], np.ndarray]:
    return {(one.transform, name): neighbors_elsewhere(one, cells, name, k) for one in indexes for name in one.hook_names}


def test_sense_accuracy_is_a_vote_of_the_nearest_uses(any_model: Any, bank: tll.Bank, senses: pd.DataFrame) -> None:
    """By hand: run each text alone, rank by cosine, let five vote by what they are nearer than the sixth."""
    uses = find_uses(any_model, senses, PlanSettings())
    index = tll.ContextualIndex(bank, device="cpu")
    measure = senses_by_all(any_model, uses, index)
    for name in NAMES:
        vectors = []
        for prompt, position in zip(uses.prompts, uses.positions, strict=True):
            with torch.no_grad():
                _, cache = any_model.run_with_cache(torch.tensor([prompt]), names_filter=name)
            vectors.append(cache[name][0, position].double().numpy())
        units = np.stack(vectors) / np.linalg.norm(vectors, axis=-1, keepdims=True)
        right: dict[int, list[bool]] = {}
        for i in np.flatnonzero(uses.held_out):
            known = np.flatnonzero((uses.words == uses.words[i]) & ~uses.held_out)
            near = known[np.argsort(-units[known] @ units[i])][:6]
            cosines = units[near] @ units[i]
            votes = {s: sum((cosines - cosines[5])[:5][uses.senses[near[:5]] == s]) for s in set(uses.senses[near[:5]])}
            right.setdefault(uses.senses[i], []).append(max(votes, key=lambda s: votes[s]) == uses.senses[i])
        by_hand = [np.mean(right[sense]) for sense in sorted(right)]
        np.testing.assert_allclose(measure.values["raw", name], by_hand)
    readers = {reader for reader, _ in measure.values}
    assert readers == {"most frequent sense", "layer 0", "raw", "logit lens", "embedding lens"}


def test_context_tells_senses_and_layer_0_does_not(demo_model: Any, tmp_path: Path) -> None:
    """The embedded model on its held-out senses: contextual layers clearly above layer 0 and the most frequent sense."""
    bank = tll.build_bank(demo_model, tll.load_corpus("demo", limit=60), tmp_path / "b.h5", hook_names=NAMES, progress=False)
    uses = find_uses(demo_model, tll.load_senses("demo"), PlanSettings())
    measure = senses_by_all(demo_model, uses, tll.ContextualIndex(bank, device="cpu"))
    figures = {key: mean_of(values) for key, values in measure.values.items()}
    best = figures["raw", NAMES[1]]
    assert best.mean > 0.75
    assert best.low > max(figures["layer 0", ""].high, figures["most frequent sense", ""].high)
    assert best.mean > figures["logit lens", NAMES[1]].mean


def planted(held_out: list[int]) -> Uses:
    """One word; senses 0 0 0 1 1 1, of another word 2 2."""
    mask = np.zeros(8, bool)
    mask[held_out] = True
    words, senses = np.array([0] * 6 + [1] * 2), np.array([0, 0, 0, 1, 1, 1, 2, 2])
    return Uses([[1]] * 8, np.zeros(8, int), words, senses, mask)


def test_votes() -> None:
    uses = planted([0, 3])
    line = np.array([0.0, 0.1, 0.2, 1.0, 0.9, 0.8, 0.0, 1.0])
    nearness = 1 - np.abs(line[:, None] - line)
    assert _votes(uses, nearness, 2).tolist() == [0, 1]
    assert _votes(uses, -nearness, 2).tolist() == [1, 0]
    assert _votes(uses, np.zeros((8, 8)), 2).tolist() == [0, 0]  # all equally near: all vote
    assert _votes(uses, np.zeros((8, 8)), 2, above=0).tolist() == [-1, -1]
    alone = planted([])
    assert _votes(alone, nearness, 1).tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
    assert _most_frequent(uses).tolist() == [0, 0]
    assert _most_frequent(alone).tolist() == [0] * 6 + [2] * 2
    assert _most_frequent(planted([0, 1])).tolist() == [1, 1]


def test_senses_from_files(tmp_path: Path, senses: pd.DataFrame) -> None:
    senses.to_csv(tmp_path / "s.csv", index=False)
    senses.drop(columns="held_out").to_json(tmp_path / "s.jsonl", lines=True, orient="records")
    assert tll.load_senses(tmp_path / "s.csv").equals(senses)
    assert list(tll.load_senses(str(tmp_path / "s.jsonl")).columns) == ["text", "word", "sense"]
    with pytest.raises(tll.CorpusError, match="no column 'sense'"):
        tll.load_senses(senses[["text", "word"]])
    with pytest.raises(tll.CorpusError, match=r"got .*nowhere.csv; expected a .csv or .jsonl file"):
        tll.load_senses(tmp_path / "nowhere.csv")


@pytest.mark.parametrize("written", [("yes", "no"), ("True", "False"), (1, 0), ("1", "")])
def test_held_out_as_files_have_it(senses: pd.DataFrame, written: tuple[Any, Any]) -> None:
    as_text = senses.assign(held_out=[written[0] if held else written[1] for held in senses.held_out])
    assert tll.load_senses(as_text).held_out.tolist() == senses.held_out.tolist()
    with pytest.raises(tll.CorpusError, match="got held_out='perhaps' in line 0 of the labelled uses; expected true or false"):
        tll.load_senses(senses.assign(held_out="perhaps"))


def test_uses_without_text_or_lines(senses: pd.DataFrame) -> None:
    for wrong in (senses[:0], senses.assign(text=[None, *senses.text[1:]])):
        with pytest.raises(tll.CorpusError, match="no lines, or lines without a text"):
            tll.load_senses(wrong)


def test_uses_that_cannot_be_asked_are_left_out(any_model: Any, senses: pd.DataFrame) -> None:
    table = pd.concat([senses, pd.DataFrame({"text": ["No such word."], "word": "bank", "sense": "money", "held_out": False})])
    assert len(find_uses(any_model, table.reset_index(drop=True), PlanSettings()).prompts) == len(senses)
    with pytest.raises(tll.InvalidInputError, match="some of them not held out"):
        find_uses(any_model, senses.assign(held_out=True), PlanSettings())
    one_sense = senses[senses.sense == senses.sense[0]].reset_index(drop=True)
    with pytest.raises(tll.InvalidInputError, match="no use is left"):
        find_uses(any_model, one_sense, PlanSettings())


def prefix(bank: tll.Bank, row: int) -> list[int]:
    found = bank.row(row)
    return bank.prompt(found.prompt_index)[: found.position + 1]


def by_hand_left_out(bank: tll.Bank, cell: int, row: int) -> bool:
    mine, own = bank.row(row).prompt_index, bank.row(cell).prompt_index
    start = prefix(bank, cell)
    return mine == own or bank.prompt(mine)[: len(start)] == start


def test_own_prompt_and_same_beginnings_are_left_out(any_model: Any, tmp_path: Path) -> None:
    texts = ["The river ran over its bank.", "The river ran over the bridge.", "The river froze.", "Money in the bank."]
    bank = tll.build_bank(any_model, texts, tmp_path / "b.h5", hook_names=NAMES[0], progress=False)
    cells = Cells(np.arange(bank.n_rows), bank)
    every = np.tile(np.arange(bank.n_rows), (bank.n_rows, 1))
    expected = [[by_hand_left_out(bank, cell, row) for row in range(bank.n_rows)] for cell in range(bank.n_rows)]
    np.testing.assert_array_equal(left_out(cells, every), expected)
    assert 0 < np.mean(expected) < 1


def test_neighbors_elsewhere_and_agreement_by_hand(bank: tll.Bank) -> None:
    index = tll.ContextualIndex(bank, device="cpu")
    cells = draw_cells(bank, 25, 3)
    found = neighbors_elsewhere(index, cells, NAMES[1], 4)
    rows = np.asarray(bank.vectors(NAMES[1])).astype(np.float64)
    shares = []
    for cell, neighbors in zip(cells.rows.tolist(), found.tolist(), strict=True):
        order = [row for row in np.argsort(-(rows @ rows[cell])).tolist() if not by_hand_left_out(bank, cell, row)]
        assert neighbors == order[:4]
        following = [bank.prompt(bank.row(row).prompt_index)[bank.row(row).position + 1 :][:1] for row in [cell, *neighbors]]
        shares.append(np.mean([after == following[0] for after in following[1:]]))
    agree = {measure.name: measure for measure in reader_agreement(cells, neighbors_at_all([index], cells, 4), progress=False)}
    np.testing.assert_allclose(agree["next token"].values["raw", NAMES[1]], shares)
    assert agree["next token"].values["raw", NAMES[1]].mean() > agree["next token"].values["random", ""].mean()
    assert set(agree["topic"].values) == set(agree["next token"].values)
    assert 0 < np.nanmean(agree["topic"].values["raw", NAMES[1]]) < 1


def test_topic_is_a_telling_word_in_common(any_model: Any, tmp_path: Path) -> None:
    """ " bank" among 120 sentences of other things: what two of its uses share is told by the words around both."""
    wet = [
        "He rowed the zeppelin to the bank.",
        "She tied the zeppelin near the bank.",
        "They steered their zeppelin along that bank.",
    ]
    dry = ["He cashed a cheque at the bank.", "She took that cheque into a bank.", "They paid the cheque at some bank."]
    texts = [*wet, *dry, *tll.load_corpus("demo", limit=120)]
    bank = tll.build_bank(any_model, texts, tmp_path / "b.h5", hook_names=NAMES, max_rows_per_token=None, progress=False)
    uses = [row for row in range(bank.n_rows) if bank.row(row).token == " bank" and bank.row(row).prompt_index < 6]
    assert len(uses) == 6
    index = tll.ContextualIndex(bank, device="cpu")
    cells = Cells(np.array(uses), bank)
    (_, topic) = reader_agreement(cells, neighbors_at_all([index], cells, 5), progress=False)
    for name in NAMES:
        found = neighbors_elsewhere(index, cells, name, 5)
        prompts = bank.plan.row_prompts[found]
        tells = np.isin(bank.plan.tokens[bank.plan.row_tokens[found]], bank.plan.tokens[bank.plan.row_tokens[uses]])
        expected = [
            np.mean((row < 6) & (row // 3 == i // 3) & of_bank)
            for i, (row, of_bank) in enumerate(zip(prompts, tells, strict=True))
        ]
        assert max(expected) > 0
        np.testing.assert_allclose(topic.values["raw", name], expected)


def test_random_rows_of_a_token(bank: tll.Bank) -> None:
    cells = draw_cells(bank, 40, 0)
    rng = np.random.default_rng(0)
    rows = random_rows(cells, 3, rng, cells.tokens_at(cells.rows))
    ids = bank.plan.tokens[bank.plan.row_tokens]
    for cell, drawn in zip(cells.rows.tolist(), rows.tolist(), strict=True):
        for row in drawn:
            assert row == -1 or (ids[row] == ids[cell] and not by_hand_left_out(bank, cell, row))
    having = np.bincount(ids)[ids[cells.rows]] > 20
    assert (rows[having] >= 0).all()
    assert len(np.unique(random_rows(cells, 3, rng))) > 100


def test_substitution_by_hand(demo_model: Any, bank: tll.Bank) -> None:
    """A token's own row moves nothing (but by float16); another moves what a hook written here moves."""
    cells = draw_cells(bank, 12, 1)
    other = np.random.default_rng(0).integers(0, bank.n_rows, 12)
    moved = _moved(demo_model, cells, NAMES[0], np.stack([cells.rows, other, np.full(12, -1)], 1))
    assert np.nanmax(moved[:, 0]) < 1e-3
    assert np.isnan(moved[:, 2]).all()
    for i, (cell, row) in enumerate(zip(cells.rows.tolist(), other.tolist(), strict=True)):
        found = bank.row(cell)
        tokens, at = torch.tensor([bank.prompt(found.prompt_index)]), found.position
        vector = torch.from_numpy(bank.activations(NAMES[0], np.array([row]))[0])

        def put(activation: torch.Tensor, hook: Any, at: int = at, vector: torch.Tensor = vector) -> torch.Tensor:
            changed = activation.clone()
            changed[0, at] = vector
            return changed

        with torch.no_grad():
            before = demo_model(tokens).log_softmax(-1)[0]
            after = demo_model.run_with_hooks(tokens, fwd_hooks=[(NAMES[0], put)]).log_softmax(-1)[0]
        kl = (before.exp() * (before - after)).sum(-1)
        expected = [float(kl[at]), float(kl[at + 1 : at + 5].mean())]
        np.testing.assert_allclose(moved[i, 1], expected, rtol=1e-3, atol=1e-4)


def test_substitution_ranks_neighbors_before_nulls(any_model: Any, bank: tll.Bank) -> None:
    indexes = [tll.ContextualIndex(bank, device="cpu", transform=one) for one in ("raw", "center")]
    cells = draw_cells(bank, 30, 2)
    measures = substitution(any_model, cells, neighbors_at_all(indexes, cells, 5), progress=False)
    assert [measure.name for measure in measures] == [
        "KL of neighbor 1 (nats)", "KL of neighbor 5 (nats)", "KL of neighbor 1 on later tokens (nats)",
    ]  # fmt: skip
    means = {key: np.nanmean(values) for key, values in measures[0].values.items()}
    for name in NAMES:
        assert means["raw", name] < means["same token", name] < means["random", name]
        assert means["raw", name] < np.nanmean(measures[1].values["raw", name])
    assert {reader for reader, _ in means} == {"raw", "center", "same token", "random", "embedding"}


def test_no_embedding_is_near_to_what_is_outside_the_residual_stream(any_model: Any, tmp_path: Path) -> None:
    texts, name = list(tll.load_corpus("demo", limit=40)), "blocks.3.attn.hook_z"  # as wide as the stream
    bank = tll.build_bank(any_model, texts, tmp_path / "z.h5", hook_names=name, progress=False)
    cells = draw_cells(bank, 8, 0)
    index = tll.ContextualIndex(bank, device="cpu")
    measure = substitution(any_model, cells, neighbors_at_all([index], cells, 5), progress=False)[0]
    assert set(measure.values) == {("raw", name), ("same token", name), ("random", name)}


def test_gains_are_paired() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(0, 10, 400)
    values = {("raw", "a"): base, ("raw", "b"): base, ("center", "a"): base + 0.1, ("center", "b"): base - 0.3}
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


def test_evaluate_from_end_to_end(any_model: Any, bank: tll.Bank, senses: pd.DataFrame) -> None:
    sae = tll.load_sae(
        {"W_dec": torch.randn(6, 256), "W_enc": torch.randn(256, 6), "b_enc": torch.zeros(6)}, hook_name=NAMES[0]
    )
    settings: dict[str, Any] = {"transforms": ["raw", "csls"], "senses": senses, "n_tokens": 15, "device": "cpu"}
    found = tll.evaluate(any_model, bank, sae=sae, progress=False, **settings)
    frame = found.to_dataframe()
    assert len(frame.measure.unique()) == 6
    assert set(frame.hook_name) == {"", *NAMES}
    gains = found.gains()
    assert gains.reader.tolist() == ["csls"] * 6
    assert found.labels is not None
    assert set(found.labels["transform"]) == {"raw", "csls"}
    text = str(found)
    assert "sense accuracy" in text
    assert "gain over raw" in text
    again = tll.evaluate(any_model, bank, progress=False, **settings).to_dataframe()
    pd.testing.assert_frame_equal(frame, again)
    with pytest.raises(tll.InvalidInputError, match="got over='center'; expected one of the transforms compared"):
        found.gains("center")


def test_evaluate_refusals(any_model: Any, bank: tll.Bank) -> None:
    with pytest.raises(tll.InvalidInputError, match="n_tokens=0"):
        tll.evaluate(any_model, bank, n_tokens=0)
    for wrong, message in (
        ({"hook_names": []}, "got no hook names"),
        ({"sae": "demo"}, "got str 'demo' for an SAE; load it"),
        ({"transforms": "whiten"}, "got transform='whiten'"),
    ):
        with pytest.raises(tll.InvalidInputError, match=message):
            tll.evaluate(any_model, bank, **wrong)
    with pytest.raises(tll.InvalidInputError, match="got a ContextualIndex; expected a bank or its path"):
        tll.evaluate(any_model, tll.ContextualIndex(bank, device="cpu"))
    with pytest.raises(tll.InvalidInputError, match="got transform='whiten'"):
        tll.evaluate(any_model, bank, transforms=["whiten"])
    other = SimpleNamespace(hook_name="blocks.0.hook_resid_post", W_dec=torch.randn(3, 256))
    with pytest.warns(UserWarning, match=r"no label scores: the SAE reads blocks.0.hook_resid_post, the bank holds"):
        found = tll.evaluate(
            any_model, bank, transforms=["raw"], senses=None, n_tokens=5, sae=other, device="cpu", progress=False
        )
    assert found.labels is None
    assert "sense accuracy" not in set(found.to_dataframe().measure)


def test_few_tokens_are_said_and_heads_refused(any_model: Any, tmp_path: Path) -> None:
    name = "blocks.1.attn.hook_z"
    bank = tll.build_bank(any_model, ["The river ran."], tmp_path / "z.h5", hook_names=name, progress=False)
    with pytest.warns(UserWarning, match="only 3 tokens of .* can be read"):
        draw_cells(bank, 10, 0)
    with pytest.warns(UserWarning, match="only 3"), pytest.raises(tll.InvalidInputError, match="expected whole hook names"):
        tll.evaluate(any_model, bank, hook_names=f"{name}[:]", progress=False)


def test_a_repeat_bank_is_evaluated_on_second_copies(any_model: Any, senses: pd.DataFrame, tmp_path: Path) -> None:
    path = tmp_path / "twice.h5"
    bank = tll.build_bank(any_model, list(senses.text), path, hook_names=NAMES[0], repeat=True, progress=False)
    uses = find_uses(any_model, senses, bank.plan.settings)
    found = activations_at(any_model, uses.prompts, uses.positions, [NAMES[0]])[NAMES[0]]
    index = tll.ContextualIndex(bank, device="cpu")
    nearest = index.search(found[:20], 1)
    assert float(nearest.similarities.min()) > 0.999
    cells = draw_cells(bank, 10, 0)
    assert np.nanmax(_moved(any_model, cells, NAMES[0], cells.rows[:, None])) < 1e-3


@pytest.mark.skipif("bridge" not in available_kinds(), reason="BERT is read on a bridge")
def test_encoders_have_no_substitution(tmp_path: Path) -> None:
    import transformers

    words = "[PAD] [UNK] [CLS] [SEP] [MASK] the river ran over its bank she put money in a . boat".split()
    tokenizer = transformers.BertTokenizerFast(vocab={word: i for i, word in enumerate(words)})
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.BertConfig(vocab_size=len(tokenizer), architectures=["BertForMaskedLM"], **sizes)
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    bert = tll.load_model(str(tmp_path / "m"), kind="bridge")
    texts = ["the river ran over its bank.", "she put money in a bank.", "the boat ran in the river."]
    bank = tll.build_bank(bert, texts, tmp_path / "b.h5", progress=False)
    table = pd.DataFrame({"text": texts[:2], "word": "bank", "sense": ["river", "money"]})
    found = tll.evaluate(bert, bank, senses=table, n_tokens=8, transforms=["raw"], device="cpu", progress=False)
    assert set(found.to_dataframe().measure) == {"sense accuracy", "next token", "topic"}
    with pytest.raises(tll.InvalidInputError, match="substitution asks for next-token distributions"):
        substitution(bert, draw_cells(bank, 3, 0), {})
