"""Sentences by a language model, against an endpoint that reads what it is shown, and an encoder asked anew."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tl_latentlens as tll
from tl_latentlens.directions.features.sentences.drawn_contexts import spread_over_tenths
from tl_latentlens.directions.features.sentences.questions import read_active, read_sentence
from tl_latentlens.endpoint import retry

pytest.importorskip("openai")

from support.chat_endpoint import TIMEOUT, ChatStub, fails_often

HOOK = "blocks.3.hook_resid_post"
FEATURES = list(range(24))


class SentenceStub(ChatStub):
    """Says that a feature is about the word most often marked, and names the texts that hold the word of a sentence."""

    def read(self, body: dict[str, Any]) -> tuple[str, str]:
        prompt = body["messages"][0]["content"]
        if '{"sentence": "..."}' in prompt:
            words = Counter(word.lower() for word in re.findall("«(.*?)»", prompt.split("Texts in which")[1]))
            word = min(words, key=lambda one: (-words[one], one))
            return f"describe {hash(prompt)}", f'Let me see.\n```json\n{{"sentence": "The\\n word {word}"}}\n```'
        word = re.search("The word ?(.*)\n", prompt)[1].lower()
        numbers = [number for number, text in enumerate(texts_of(prompt), 1) if word in text.lower()]
        return f"score {hash(prompt)}", json.dumps({"active": numbers})


def texts_of(prompt: str) -> list[str]:
    return [json.loads(text) for text in re.findall(r'^\d+\. (".*")$', prompt, re.MULTILINE)]


def prompts_of(stub: SentenceStub, kind: str) -> list[str]:
    prompts = [body["messages"][0]["content"] for body in stub.bodies]
    return [prompt for prompt in prompts if ('{"sentence": "..."}' in prompt) == (kind == "describe")]


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[SentenceStub]:
    """A running endpoint; attempts follow one another at once."""
    monkeypatch.setattr(retry, "_FIRST_BACKOFF", 0.01)
    endpoint = SentenceStub()
    yield endpoint
    endpoint.server.shutdown()
    endpoint.server.server_close()


@pytest.fixture(scope="module")
def labelled(any_model: Any, tmp_path_factory: pytest.TempPathFactory) -> tll.FeatureResult:
    """Features of a bank of 200 texts, some of them of two sentences, and so of two contexts."""
    sentences = list(islice(tll.load_corpus("demo"), 0, 3600, 12))
    texts = [" ".join(sentences[i : i + 1 + i % 2]) for i in range(0, 300, 2)] + sentences[200:250]
    bank = tll.build_bank(any_model, texts, tmp_path_factory.mktemp("s") / "bank.h5", hook_names=HOOK, progress=False)
    index = tll.ContextualIndex(bank, device="cpu")
    return tll.label_features(tll.load_sae("demo"), index, FEATURES, progress=False)


def endpoint_at(stub: SentenceStub, **settings: Any) -> tll.ChatEndpoint:
    return tll.ChatEndpoint("m", stub.url, "none", **{"timeout": TIMEOUT, "attempts": 10, "concurrency": 4, **settings})


def with_detection(found: tll.FeatureResult, detection: float) -> tll.FeatureResult:
    return replace(found, table=found.table.assign(detection=detection, label="the team 59 %", label_kind="token"))


def activations(found: tll.FeatureResult) -> dict[str, np.ndarray]:
    """Text of a piece of 32 tokens of a prompt → the activations of all features on its rows, encoded at once."""
    bank = found.positive.index.bank_rows.banks[0]
    encoded = tll.load_sae("demo").encode(torch.from_numpy(bank.activations(HOOK, slice(0, bank.n_rows)))).detach().numpy()
    of_text: dict[str, list[np.ndarray]] = {}
    for number, values in enumerate(encoded):
        row = bank.row(number)
        first = row.position // 32 * 32
        of_text.setdefault(bank.text(bank.prompt(row.prompt_index)[first : first + 32]).strip(), []).append(values)
    return {text: np.stack(values) for text, values in of_text.items()}


def test_sentences_are_scored_on_texts_that_they_were_not_written_from(
    stub: SentenceStub, labelled: tll.FeatureResult, tmp_path: Path
) -> None:
    found = tll.describe_features(labelled, endpoint_at(stub), tmp_path / "a.jsonl", progress=False)
    describing, scoring = prompts_of(stub, "describe"), prompts_of(stub, "score")
    assert len(describing) == len(scoring) > 10
    shown = {text.replace("«", "").replace("»", "") for prompt in describing for text in texts_of(prompt)}
    asked = {text for prompt in scoring for text in texts_of(prompt)}
    assert shown.isdisjoint(asked)
    assert shown | asked <= set(activations(labelled))

    of_text, table = activations(labelled), found.table.set_index("feature")
    assert found.table.drop(columns=[name for name in found.table if name.startswith("sentence")]).equals(labelled.table)
    n_scored = 0
    for prompt in scoring:
        sentence = re.search("on this:\n\n(.*)\n", prompt)[1]
        texts = texts_of(prompt)
        named = np.array([sentence.removeprefix("The word").strip().lower() in text.lower() for text in texts])
        for feature in table.index[table["sentence_written"] == sentence]:
            maxima = np.array([of_text[text][:, feature].max() for text in texts])
            is_active, largest = maxima > 0, max(values[:, feature].max() for values in of_text.values())
            if not is_active.any() or is_active.sum() > 10 or (~is_active).sum() > 10:
                continue  # the texts of another feature of this word
            tenths = np.minimum(10 * maxima[is_active] / largest, 9).astype(int)
            recall = np.mean([named[is_active][tenths == tenth].mean() for tenth in set(tenths)])
            expected = (recall + (~named[~is_active]).mean()) / 2
            n_scored += table["sentence_detection"][feature] == pytest.approx(expected)
    assert n_scored >= len(scoring)
    is_shown = table["sentence"] != ""
    assert (table["sentence"][is_shown] == table["sentence_written"][is_shown]).all()
    assert (is_shown == (table["sentence_why_not"] == "")).all()
    beats_label = table["sentence_detection"] > table["detection"].fillna(0.5)
    assert beats_label[is_shown].all()
    assert is_shown.any()


@pytest.mark.parametrize("of_label", [0.0, 0.7, 0.999, 1.0])
def test_a_sentence_is_shown_where_it_beats_the_label(
    stub: SentenceStub, labelled: tll.FeatureResult, tmp_path: Path, of_label: float
) -> None:
    found = tll.describe_features(
        with_detection(labelled, of_label), endpoint_at(stub), tmp_path / "a.jsonl", features=FEATURES[:12], progress=False
    ).table
    scored = found[found["sentence_detection"].notna()]
    np.testing.assert_array_equal(scored["sentence"] != "", scored["sentence_detection"] > of_label)
    assert found["sentence_why_not"][12:].eq("not asked").all()
    if of_label == 1:  # nothing beats it, so nothing is paid for
        assert (len(scored), len(stub.asked)) == (0, 0)
        assert "the label tells all held-out contexts" in set(found["sentence_why_not"])
        return
    assert len(scored) > 5
    refused = scored["sentence_why_not"][scored["sentence"] == ""]
    assert refused.str.startswith("no better than the label: ").all()
    assert all("A label, counted from texts: the team 59 %" in prompt for prompt in prompts_of(stub, "describe"))


def test_nothing_is_lost_or_paid_twice(stub: SentenceStub, labelled: tll.FeatureResult, tmp_path: Path) -> None:
    stub.plan = fails_often
    path = tmp_path / "a.jsonl"
    found = tll.describe_features(labelled, endpoint_at(stub), path, progress=False)
    assert set(stub.answered().values()) == {1}
    n_asked, lines = len(stub.asked), path.read_bytes()
    again = tll.describe_features(found, endpoint_at(stub, concurrency=1), path, progress=False)
    assert again.table.equals(found.table)
    assert len(stub.asked) == n_asked
    path.write_bytes(lines[: len(lines) // 2])  # as a kill leaves it
    stub.plan = lambda question, attempt: "answer"
    resumed = tll.describe_features(labelled, endpoint_at(stub), path, progress=False)
    assert resumed.table.equals(found.table)
    assert len(stub.asked) < n_asked * 2
    alone = tll.describe_features(labelled, endpoint_at(stub), path, features=[3, 7], progress=False).table
    pairs = [table.set_index("feature").loc[[3, 7]] for table in (alone, found.table)]
    assert pairs[0].equals(pairs[1]), "what is asked for together does not matter"


@pytest.mark.parametrize("what", ["talk", "refusal", "400"])
def test_answers_that_say_nothing(stub: SentenceStub, labelled: tll.FeatureResult, tmp_path: Path, what: str) -> None:
    stub.plan = lambda question, attempt: what
    found = tll.describe_features(labelled, endpoint_at(stub), tmp_path / "a.jsonl", features=[0, 3, 7], progress=False).table
    assert found["sentence"].eq("").all()
    reasons = set(found["sentence_why_not"][[0, 3, 7]])
    assert any(("BadRequestError" if what == "400" else "an answer without a sentence") in reason for reason in reasons)
    stub.plan = lambda question, attempt: what if question.startswith("score") else "answer"
    found = tll.describe_features(labelled, endpoint_at(stub), tmp_path / "b.jsonl", features=[0, 3, 7], progress=False).table
    assert found["sentence"].eq("").all()
    assert (found["sentence_written"] != "").any()
    assert found["sentence_detection"].isna().all()


def test_sentences_go_to_neuronpedia(stub: SentenceStub, labelled: tll.FeatureResult, tmp_path: Path) -> None:
    from support.neuronpedia import read_bulk

    found = tll.describe_features(with_detection(labelled, 0.5), endpoint_at(stub), tmp_path / "a.jsonl", progress=False)
    written = read_bulk(found.to_neuronpedia(tmp_path, model_id="m", source="3-s", progress=False))["explanations"]
    texts = {
        feature: {line["typeName"]: line["description"] for line in written if line["index"] == str(feature)}
        for feature in FEATURES
    }
    for line in found.table.to_dict("records"):
        sentence = {"latentlens-sentence": line["sentence"]} if line["sentence"] else {}
        assert texts[line["feature"]] == {"latentlens": "the team 59 %", **sentence}
    assert any("latentlens-sentence" in of_feature for of_feature in texts.values())


def test_what_cannot_be_described(stub: SentenceStub, labelled: tll.FeatureResult, tmp_path: Path) -> None:
    where = (endpoint_at(stub), tmp_path / "a.jsonl")
    with pytest.raises(tll.InvalidInputError, match="feature 700 is not among the 24"):
        tll.describe_features(labelled, *where, features=[700])
    with pytest.raises(tll.InvalidInputError, match="without an encoder"):
        tll.describe_features(replace(labelled, activity=None), *where)
    for given in ({"contexts": 0}, {"held_out": 1}):
        with pytest.raises(tll.InvalidInputError, match="expected at least 1 and 2"):
            tll.describe_features(labelled, *where, **given)
    with pytest.raises(tll.InvalidInputError, match="no folder"):
        tll.describe_features(labelled, where[0], tmp_path / "none" / "a.jsonl")
    assert not stub.asked


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ('{"sentence": "One."}', "One."),
        ('First {"sentence": "a"}, no: {"sentence": "b {c}"}.', "b {c}"),
        ('{"sentence": "two\\n lines"}', "two lines"),
        ('{"sentence": "a \\ud83d b \\u0000 c \\u001b[31m"}', "a b c [31m"),
        ('{"sentence": ["a"]}', ""),
        ('{"sentence": ""}', ""),
        ("The sentence.", ""),
        ('{"sentence": "' + 500 * "a" + '"}', ""),
        ("{{{", ""),
    ],
)
def test_sentences_are_read(answer: str, expected: str) -> None:
    assert read_sentence(answer) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ('{"active": [1, 3]}', {0, 2}),
        ('{"active": []}', set()),
        ('Maybe {"active": [1]}. Rather {"active": [2, 2]}', {1}),
        ('{"active": [0]}', None),
        ('{"active": [4]}', None),
        ('{"active": ["1"]}', None),
        ('{"active": [true]}', None),
        ('{"active": 1}', None),
        ("1, 3", None),
    ],
)
def test_named_texts_are_read(answer: str, expected: set[int] | None) -> None:
    assert read_active(answer, 3) == expected


def test_every_tenth_is_drawn_from_first() -> None:
    tenths = np.array([0, 0, 0, 9, 4, 4])
    order = spread_over_tenths(tenths)
    assert tenths[order].tolist() == [9, 4, 0, 4, 0, 0]
    assert sorted(order.tolist()) == list(range(6))
    assert spread_over_tenths(np.zeros(0, np.int64)).tolist() == []
