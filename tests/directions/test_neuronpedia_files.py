"""The bulk files for Neuronpedia: its fields, and in them what the bank, the SAE and the model have."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.models import TEXTS
from support.neuronpedia import read_bulk

import tl_latentlens as tll
from tl_latentlens.directions.features.sae import TensorSAE
from tl_latentlens.model.running import run_hooked

FEATURES = [*range(130), 597]
TO = {"model_id": "demo-6m", "source": "3-ours-res-2k", "progress": False}
FOREIGN = "The owl 🦉 saw 日本語 and ëë before noon."


@pytest.fixture(scope="module")
def index(any_model: Any, tmp_path_factory: pytest.TempPathFactory) -> tll.ContextualIndex:
    """Two banks, the second of one text in several scripts."""
    folder = tmp_path_factory.mktemp("neuronpedia")
    banks = [
        tll.build_bank(any_model, texts, folder / f"{i}.h5", hook_names=3, progress=False)
        for i, texts in enumerate((TEXTS, [FOREIGN]))
    ]
    return tll.ContextualIndex(banks, device="cpu")


@pytest.fixture(scope="module", params=[False, True], ids=["bank alone", "with the model"])
def labelled(request: pytest.FixtureRequest, any_model: Any, index: tll.ContextualIndex) -> tll.FeatureResult:
    """Features with labels of every kind."""
    model = any_model if request.param else None
    found = tll.label_features(tll.load_sae("demo"), index, FEATURES, model=model, top_k=3, progress=False)
    return with_labels(found, ["team 59 %", "", "mixed: the 8 % · of 5 %", "«-» 87 %", "🦉" * 400], ["token", "", "mixed"])


def with_labels(found: tll.FeatureResult, labels: list[str], kinds: list[str]) -> tll.FeatureResult:
    """The result with labels of our own in turn, and their kinds ("token" where no kind is named)."""
    kinds = [*kinds, *["token"] * (len(labels) - len(kinds))]
    places = np.arange(len(found.table)) % len(labels)
    columns = {"label": [labels[i] for i in places], "label_kind": [kinds[i] for i in places]}
    return replace(found, table=found.table.assign(**columns))


def test_files_have_the_fields_of_neuronpedia_and_what_was_found(labelled: tll.FeatureResult, tmp_path: Path) -> None:
    release = {"release": "ours", "creator": "A. Name", "description": "Labels", "url": "https://example.org"}
    folder = labelled.to_neuronpedia(tmp_path / "new", **TO, **release, contexts=4)
    assert folder == tmp_path / "new" / "demo-6m" / "3-ours-res-2k"
    found = read_bulk(folder)
    heads = {name: found[name][0] for name in ("release", "model", "sourceset", "source")}
    assert heads["release"]["name"] == heads["sourceset"]["releaseName"] == "ours"
    assert (heads["release"]["creatorName"], heads["release"]["urls"]) == ("A. Name", ["https://example.org"])
    assert (heads["model"]["id"], heads["model"]["layers"], heads["model"]["dimension"]) == ("demo-6m", 6, 256)
    assert heads["sourceset"]["name"] == heads["source"]["setName"] == "ours-res-2k"
    assert (heads["source"]["id"], heads["source"]["num_prompts"]) == ("3-ours-res-2k", 7)

    table = labelled.table.set_index("feature")
    assert [line["index"] for line in found["features"]] == [str(feature) for feature in FEATURES]
    np.testing.assert_array_equal([line["frac_nonzero"] for line in found["features"]], table["density"])
    names = table.loc[(table["label"] != "") & (table["label_kind"] != "mixed"), "label"]
    assert [line["index"] for line in found["explanations"]] == [str(feature) for feature in names.index]
    for line, name in zip(found["explanations"], names, strict=True):
        text = line["description"]
        assert text == name or (name.startswith(text[:-1]) and text[-1] == "…" and len(text.encode("utf-16-le")) <= 1024)
        assert line["typeName"] == "latentlens"
    places = {(line["modelId"], line["layer"]) for kind in ("features", "activations") for line in found[kind]}
    assert places == {("demo-6m", "3-ours-res-2k")}
    assert len({line["id"] for line in found["activations"]}) == len(found["activations"])


def test_activations_are_those_of_the_tokens(labelled: tll.FeatureResult, any_model: Any, tmp_path: Path) -> None:
    found = read_bulk(labelled.to_neuronpedia(tmp_path, **TO, contexts=4))
    n_checked = 0
    for feature in (3, 97, 597):
        lines = [line for line in found["activations"] if line["index"] == str(feature) and line["binMin"] == -1]
        expected = [pair for pair in labelled.max_activating(feature, 4) if "owl" not in pair[1].context]
        lines = [line for line in lines if "".join(line["tokens"]).isascii()]  # tokens of one character are one line
        assert len(lines) == len(expected)
        for line, (activation, neighbor) in zip(lines, expected, strict=True):
            at = line["qualifyingTokenIndex"]
            assert line["values"][at] == pytest.approx(activation, rel=1e-2)
            row = labelled.positive.index.row(neighbor.row)
            prompt = row.bank.prompt(row.prompt_index)
            assert line["tokens"][0] == "<|endoftext|>"
            assert "".join(line["tokens"][1:]) == row.bank.text(prompt)
            if labelled.model is not None:
                np.testing.assert_allclose(line["values"][1:], of_model(any_model, prompt, feature)[1:], rtol=1e-2, atol=1e-3)
            n_checked += 1
    assert n_checked > 3
    assert {line["values"][0] for line in found["activations"]} == {0.0}, "BOS is no token that a label is about"


def test_contexts_of_intervals_are_spread_over_the_activations(labelled: tll.FeatureResult, tmp_path: Path) -> None:
    """Up to two contexts of each tenth of the largest activation, none that is shown already, and the share of each tenth."""
    found = read_bulk(labelled.to_neuronpedia(tmp_path, **TO, contexts=1))
    n_intervals = []
    for feature in FEATURES:
        lines = [line for line in found["activations"] if line["index"] == str(feature)]
        if not lines:
            continue
        top, *others = lines
        largest = labelled.max_activating(feature, 1)[0][0]
        assert (top["binMin"], top["binContains"]) == (-1, -1)
        shares = {}
        for line in others:
            value = line["values"][line["qualifyingTokenIndex"]]
            assert line["binMin"] - 1e-2 <= value <= line["binMax"] + 1e-2
            assert line["binMax"] - line["binMin"] == pytest.approx(largest / 10, rel=1e-3)
            shares[line["binMin"]] = line["binContains"]
        assert 0 <= sum(shares.values()) <= 1 + 1e-9
        assert max(Counter(line["binMin"] for line in others).values(), default=0) <= 2
        assert len({json.dumps([line["tokens"], line["qualifyingTokenIndex"]]) for line in lines}) == len(lines)
        n_intervals.append(len(shares))
    assert max(n_intervals) > 2


def of_model(model: Any, prompt: list[int], feature: int) -> np.ndarray:
    """A feature's activation on each token of a prompt, from a run of the model."""
    captured: list[torch.Tensor] = []
    tokens = torch.tensor([prompt])
    keep = ("blocks.3.hook_resid_post", lambda activation, hook: captured.append(activation))
    run_hooked(model, tokens, torch.ones_like(tokens, dtype=torch.bool), [keep])
    return tll.load_sae("demo").encode(captured[0][0])[:, feature].detach().numpy()


def test_characters_of_several_tokens_are_whole(labelled: tll.FeatureResult, tmp_path: Path) -> None:
    """No token is empty, or a piece of a character, and each has one value."""
    found = read_bulk(labelled.to_neuronpedia(tmp_path, **TO, contexts=12))
    foreign = [line for line in found["activations"] if "🦉" in "".join(line["tokens"])]
    assert foreign
    for line in foreign:
        assert FOREIGN.startswith("".join(line["tokens"][1:]))
        assert not any("\N{REPLACEMENT CHARACTER}" in token for token in line["tokens"])
        assert line["values"][line["qualifyingTokenIndex"]] > 0


def test_logits_are_those_of_the_logit_lens(labelled: tll.FeatureResult, any_model: Any, tmp_path: Path) -> None:
    found = read_bulk(labelled.to_neuronpedia(tmp_path, **TO, contexts=1))
    if labelled.model is None:
        assert all(line["pos_str"] == line["neg_str"] == [] for line in found["features"])
        return
    table = labelled.table.set_index("feature")
    for feature, line in zip(FEATURES, found["features"], strict=True):
        for sign, column, kind in ((1, "logit_tokens", "pos"), (-1, "logit_tokens_negative", "neg")):
            direction = sign * tll.load_sae("demo").W_dec[feature]
            logits = (any_model.ln_final(direction[None, None]) @ any_model.W_U + any_model.b_U)[0, 0]
            expected = (logits - logits.mean()).topk(20).values.detach()
            np.testing.assert_allclose(line[f"{kind}_values"], sign * expected.numpy(), rtol=1e-3)
            assert line[f"{kind}_str"][:5] == table[column][feature]


def test_a_second_export_takes_the_place_of_the_first(labelled: tll.FeatureResult, tmp_path: Path) -> None:
    folder = labelled.to_neuronpedia(tmp_path, **TO)
    assert len(list((folder / "features").iterdir())) == 2
    first = read_bulk(folder)
    fewer = replace(labelled, table=labelled.table.iloc[:100])
    again = read_bulk(fewer.to_neuronpedia(tmp_path, **TO))
    assert len(again["features"]) == 100
    assert {line["id"] for line in again["activations"]} < {line["id"] for line in first["activations"]}
    other = tmp_path / "demo-6m" / "4-ours-res-2k"
    labelled.to_neuronpedia(tmp_path, **{**TO, "source": "4-ours-res-2k"})
    assert other.is_dir()
    assert folder.is_dir()


def test_what_has_no_activations_is_a_feature_all_the_same(index: tll.ContextualIndex, tmp_path: Path) -> None:
    """A decoder alone, a decoder row of zeros, features that are never active."""
    decoder = tll.load_sae("demo").W_dec[:5].clone()
    decoder[1] = 0
    alone = tll.label_features(TensorSAE(decoder, {}, hook_name="blocks.3.hook_resid_post"), index, progress=False)
    found = read_bulk(with_labels(alone, ["one", ""], []).to_neuronpedia(tmp_path / "a", **TO))
    assert [line["frac_nonzero"] for line in found["features"]] == [-1] * 5
    assert found["activations"] == []
    assert [line["index"] for line in found["explanations"]] == ["0", "2", "4"]
    weights = {"W_enc": decoder.T.contiguous(), "b_enc": torch.full((5,), -1e6)}
    silent = tll.label_features(TensorSAE(decoder, weights, hook_name="blocks.3.hook_resid_post"), index, progress=False)
    found = read_bulk(silent.to_neuronpedia(tmp_path / "b", **TO))
    assert [line["frac_nonzero"] for line in found["features"]] == [0, -1, 0, 0, 0]
    assert found["activations"] == found["explanations"] == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model_id": "Demo"}, "got model_id='Demo'"),
        ({"model_id": ""}, "got model_id=''"),
        ({"model_id": "../up"}, "got model_id"),
        ({"source": "ours-res"}, "the layer, a hyphen and the name"),
        ({"source": "3-Ours"}, "got source='3-Ours'"),
        ({"source": "3"}, "got source='3'"),
        ({"source": "3-a/b"}, "got source"),
        ({"contexts": 0}, "got contexts=0"),
    ],
)
def test_ids_that_neuronpedia_does_not_take(
    labelled: tll.FeatureResult, tmp_path: Path, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(tll.InvalidInputError, match=message):
        labelled.to_neuronpedia(tmp_path, **{**TO, **given})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("source", ["e-ours", "5-name-res-16k", "12-res_post_32k-oai", "20-gemmascope-res-16k__l0-70"])
def test_ids_of_sources_that_there_are(labelled: tll.FeatureResult, tmp_path: Path, source: str) -> None:
    few = replace(labelled, table=labelled.table.iloc[:1])
    found = read_bulk(few.to_neuronpedia(tmp_path, model_id="llama3.1-8b", source=source, contexts=1, progress=False))
    assert found["sourceset"][0]["name"] == source.split("-", 1)[1].split("__")[0]


def test_what_cannot_be_written(labelled: tll.FeatureResult, tmp_path: Path) -> None:
    (tmp_path / "demo-6m").write_text("mine")
    with pytest.raises(tll.InvalidInputError, match="a file stands in the way"):
        labelled.to_neuronpedia(tmp_path, **TO)
    assert (tmp_path / "demo-6m").read_text() == "mine"
    with pytest.raises(tll.InvalidInputError, match="came without its SAE"):
        replace(labelled, sae=None).to_neuronpedia(tmp_path, **TO)
