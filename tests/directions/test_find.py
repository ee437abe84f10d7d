"""Components that write a meaning: found where they were planted, and equal to what the model itself adds."""

import shutil
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.models import TEXTS, available_kinds
from torch.nn.functional import normalize

import tl_latentlens as tll
from tl_latentlens.directions.features.sae import TensorSAE
from tl_latentlens.directions.find.component_outputs import output_weights, record_component_outputs
from tl_latentlens.model.loading import DEMO_MODEL, load_model

HOOK = "blocks.3.hook_resid_post"
RIVER = ("river", "water", "boat", "mud", "fish", "grass", "stream")
MONEY = ("money", "loan", "savings", "card", "account", "clerk", "price")
AT_RIVER = "They saw the boat and the river near the bank"
AT_MONEY = "They saw the loan and the money near the bank"


def of(words: tuple[str, ...]) -> list[str]:
    """21 uses of one sense."""
    return [f"They saw the {first} and the {second} near the bank" for first, second in combinations(words, 2)]


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    return [*of(RIVER), *of(MONEY), *list(tll.load_corpus("demo"))[:250]]


def at_bank(model: Any, texts: list[str], name: str) -> torch.Tensor:
    """An activation at the last " bank" of each text, [n, ...]."""
    found = []
    for text in texts:
        with torch.no_grad():
            cache = model.run_with_cache(text, names_filter=name)[1]
        strings = model.to_str_tokens(text)
        found.append(cache[name][0, len(strings) - 1 - strings[::-1].index(" bank")])
    return torch.stack(found)


@pytest.fixture(scope="module")
def sense_index(any_model: Any, corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> tll.ContextualIndex:
    path = tmp_path_factory.mktemp("find") / "bank.h5"
    return tll.ContextualIndex(tll.build_bank(any_model, corpus, path, hook_names=HOOK, progress=False), device="cpu")


@pytest.fixture(scope="module")
def senses(any_model: Any) -> TensorSAE:
    """Feature 0 is the difference of two senses' means, 1 its opposite, 2 is always active, the rest are random."""
    river, money = (at_bank(any_model, of(words), HOOK) for words in (RIVER, MONEY))
    sense = normalize(river.mean(0) - money.mean(0), dim=0)
    random = normalize(torch.randn(40, len(sense), generator=torch.Generator().manual_seed(0)), dim=-1)
    decoder = torch.cat([sense[None], -sense[None], random])
    encoder, bias = decoder.T.clone(), -(decoder @ (river.mean(0) + money.mean(0)) / 2)
    encoder[:, 2], bias[2] = 0, 5
    return TensorSAE(decoder, {"W_enc": encoder, "b_enc": bias}, hook_name=HOOK)


# ------------------------------------------------------------------------------------------------------------ planted truth


@pytest.mark.parametrize(("text", "right", "wrong"), [(AT_RIVER, 0, 1), (AT_MONEY, 1, 0)])
def test_a_feature_of_one_sense_is_first_for_that_sense_alone(
    demo_model: Any, sense_index: Any, senses: TensorSAE, text: str, right: int, wrong: int
) -> None:
    result = tll.find_features(text, "bank", senses, sense_index, model=demo_model, top_k=42, label=False)
    first = result.table.iloc[0]
    assert first["feature"] == right
    assert first["beats_null"]
    assert first["share"] > 0.3
    assert wrong not in result.table["feature"].tolist()
    words = (RIVER, MONEY)[right]
    assert all(any(word in near.context for word in words) for near in result.meaning.alike())
    always = result.table[result.table["feature"] == 2].iloc[0]
    assert abs(always["share"]) < 1e-6
    assert not always["beats_null"]
    assert always["why_not"] == "adds as much at other uses of the token (p = 1)"


COMPONENTS = {
    "head": (3, "blocks.3.attn.hook_z", "h.3.attn.c_proj.weight", 64),
    "neuron": (2, "blocks.2.mlp.hook_post", "h.2.mlp.c_proj.weight", 1),
}


@pytest.fixture(scope="module")
def at_senses(any_model: Any) -> dict[str, list[torch.Tensor]]:
    """What the components of a kind give at the word, [use, component, width] for each sense."""
    return {
        component: [at_bank(any_model, of(words), name).reshape(21, -1, width) for words in (RIVER, MONEY)]
        for component, (_, name, _, width) in COMPONENTS.items()
    }


@pytest.mark.parametrize("kind", available_kinds())
@pytest.mark.parametrize("component", COMPONENTS)
def test_a_head_or_neuron_that_writes_one_sense_is_first(
    any_model: Any, corpus: list[str], at_senses: dict[str, list[torch.Tensor]], tmp_path: Path, kind: str, component: str
) -> None:
    """In a copy of the model, the one that tells the senses best apart writes that strongly, and nothing else."""
    layer, _, end, _ = COMPONENTS[component]
    river, money = at_senses[component]
    gap = river.mean(0) - money.mean(0)
    along = [(sense * gap).sum(-1) for sense in (river, money)]
    best = int(((along[0].mean(0) - along[1].mean(0)) / (along[0].std(0) + along[1].std(0) + 1e-3)).argmax())
    folder = tmp_path / "planted"
    shutil.copytree(DEMO_MODEL, folder)
    file = next(folder.glob("*.safetensors"))
    tensors = load_file(file)
    written = 60 * normalize(torch.randn(any_model.cfg.d_model, generator=torch.Generator().manual_seed(1)), dim=0)
    width = gap.shape[1]
    weight = next(key for key in tensors if key.endswith(end))
    tensors[weight][best * width : (best + 1) * width] = torch.outer(gap[best] / gap[best].square().sum(), written)
    save_file(tensors, file, {"format": "pt"})
    model = load_model(str(folder), kind=kind)
    bank = tll.build_bank(model, corpus, tmp_path / "planted.h5", hook_names=HOOK, progress=False)
    finder = {"head": tll.find_heads, "neuron": tll.find_neurons}[component]
    first = finder(AT_RIVER, "bank", tll.ContextualIndex(bank, device="cpu"), model=model).table.iloc[0]
    assert (first["layer"], first[component]) == (layer, best)
    assert first["share"] > 0.3
    assert first["beats_null"], first.to_string()


# ---------------------------------------------------------------------------------------------------- equal to the model itself


@pytest.mark.parametrize("name", ["blocks.3.hook_resid_post", "blocks.2.hook_resid_mid", "blocks.2.hook_resid_pre"])
def test_embedding_heads_neurons_and_biases_sum_to_the_activation(demo_model: Any, name: str) -> None:
    prompts = [demo_model.to_tokens(text)[0].tolist() for text in (AT_RIVER, TEXTS[3], AT_MONEY[:20])]
    outputs, weights = record_component_outputs(demo_model, prompts, name), output_weights(demo_model, name)
    for i, prompt in enumerate(prompts):
        with torch.no_grad():
            cache = demo_model.run_with_cache(torch.tensor([prompt]))[1]
        torch.testing.assert_close(outputs.activation[i], cache[name][0, -1], atol=1e-4, rtol=1e-4)
    m = normalize(torch.randn(len(outputs.activation[0]), generator=torch.Generator().manual_seed(2)), dim=0)
    parts = [each(outputs, m).flatten(1).sum(1) for each in (weights.heads, weights.neurons)]
    total = outputs.resid_pre @ m + parts[0] + parts[1] + weights.biases @ m
    torch.testing.assert_close(total, outputs.activation @ m, atol=1e-3, rtol=1e-3)
    weights.require_sum(outputs, name)


def test_head_contribution_is_hook_result_along_the_direction(demo_model: Any, sense_index: Any) -> None:
    result = tll.find_heads(AT_RIVER, "bank", sense_index, model=demo_model, top_k=100)
    assert len(result.table) == 4 * demo_model.cfg.n_heads
    m = torch.tensor(result.meaning.direction)
    with torch.no_grad():
        cache = demo_model.run_with_cache(AT_RIVER)[1]
    for line in result.table.head(5).to_dict("records"):
        layer, head = line["layer"], line["head"]
        out = cache[f"blocks.{layer}.attn.hook_z"][0, -1, head] @ demo_model.blocks[layer].attn.W_O[head].detach()
        assert float(out @ m) == pytest.approx(line["contribution"], abs=1e-3)
        pattern = cache[f"blocks.{layer}.attn.hook_pattern"][0, head, -1]
        assert line["attention"] == pytest.approx(float(pattern.max()), abs=1e-4)
        assert line["attends_to"] == demo_model.to_str_tokens(AT_RIVER)[int(pattern.argmax())]
    assert float(result.table["share"].to_numpy().sum()) == pytest.approx(result.parts["heads"], abs=1e-4)
    neurons = tll.find_neurons(AT_RIVER, "bank", sense_index, model=demo_model, top_k=10**6)
    assert float(neurons.table["share"].to_numpy().sum()) == pytest.approx(neurons.parts["neurons"], abs=1e-3)
    assert abs(neurons.parts["embedding"]) < 0.05  # of the same token: all that differs is the position


def test_feature_figures_are_those_of_all_rows_at_once(any_model: Any, sense_index: Any, senses: TensorSAE) -> None:
    result = tll.find_features(AT_RIVER, "bank", senses, sense_index, model=any_model, top_k=5, label=False)
    bank, m = sense_index.banks[0], result.meaning.direction
    stored = np.array(bank.vectors(HOOK)).astype(np.float32) * np.array(bank.norms(HOOK))[:, None]
    token = any_model.to_tokens(" bank")[0, -1].item()
    uses = np.flatnonzero(sense_index.bank_rows.token_ids() == token)
    a = at_bank(any_model, [AT_RIVER], HOOK)[0].numpy()
    offsets, offset = stored[uses] - stored[uses].mean(0), a - stored[uses].mean(0)
    cosines = offsets @ offset / np.linalg.norm(offsets, axis=1) / np.linalg.norm(offset)
    order = np.argsort(-cosines)
    k = min(10, len(uses) // 3)
    near, rest = uses[order[:k]], uses[order[k:]]
    difference = stored[near].mean(0) - stored[rest].mean(0)
    middle = ((stored[near] @ difference).mean() + (stored[rest] @ difference).mean()) / 2
    rest = rest[stored[rest] @ difference < middle]
    assert result.meaning.alike_rows.tolist() == near.tolist()
    direction = stored[near].mean(0) - stored[rest].mean(0)
    np.testing.assert_allclose(m, direction / np.linalg.norm(direction), atol=1e-5)
    for line in result.table.to_dict("records"):
        f = line["feature"]
        nulls = senses.encode(torch.from_numpy(stored[rest])).numpy()[:, f] * float(senses.W_dec[f].numpy() @ m)
        here = senses.encode(torch.from_numpy(a)).numpy()[f] * float(senses.W_dec[f].numpy() @ m)
        assert line["contribution"] == pytest.approx(here, abs=1e-2)
        assert line["usual"] == pytest.approx(nulls.mean(), abs=1e-2)
        assert line["share"] == pytest.approx((here - nulls.mean()) / ((a - stored[rest].mean(0)) @ m), abs=1e-3)
        assert line["p_same_token"] == (1 + (nulls >= here - 1e-4).sum()) / (1 + len(rest))
        assert line["n_same_token"] == len(rest)


@pytest.mark.parametrize("kind", available_kinds())
def test_every_architecture_adds_up_or_is_refused(model_folder: Path, tmp_path: Path, kind: str) -> None:
    post_norms = transformers.AutoConfig.from_pretrained(model_folder).model_type == "gemma2"
    if post_norms and kind == "hooked":
        pytest.skip("HookedTransformer does not load a Gemma 2 of this size")
    model = load_model(str(model_folder), kind=kind)
    bank = tll.build_bank(model, TEXTS, tmp_path / "bank.h5", hook_names="blocks.1.hook_resid_post", progress=False)
    index = tll.ContextualIndex(bank, device="cpu")
    if post_norms:
        with pytest.raises(tll.InvalidInputError, match=r"do not add up to blocks.1.hook_resid_post: \d+% .* find_features"):
            tll.find_heads(TEXTS[0], -1, index, model=model)
        return
    for found in (tll.find_heads, tll.find_neurons):
        result = found(TEXTS[0], -2, index, model=model)
        assert sum(result.parts.values()) == pytest.approx(1)
        assert len(result.to_dataframe()) == min(10, len(result.table))


# -------------------------------------------------------------------------------------------------------------------- the edges


def test_few_uses_of_a_token_say_so(any_model: Any, index: tll.ContextualIndex) -> None:
    result = tll.find_heads("They crossed the old stone bridge", "bridge", index, model=any_model, hook_name=HOOK)
    assert not result.meaning.by_token
    assert result.meaning.alike() == []
    assert result.meaning.n_uses == result.table["n_same_token"][0] < 6
    assert f"only {result.meaning.n_uses} other uses of the token" in str(result)
    other = replace(result.meaning, tokens=["[CLS]", " <b>", " bank"], is_special=np.array([True, False, False]))
    assert str(other.to_rich(width=80)).startswith("<b> «bank»"), "special tokens are known by their ids, not by how they look"
    assert sum(result.parts.values()) == pytest.approx(1)


def test_the_very_text_is_no_other_use(any_model: Any, index: tll.ContextualIndex) -> None:
    counts = [
        tll.find_heads(text, "bank", index, model=any_model, hook_name=HOOK).meaning.n_uses
        for text in (TEXTS[0], "Snow lay upon the bank")
    ]
    assert counts[1] == counts[0] + 1


def test_results_read_as_tables(any_model: Any, sense_index: Any) -> None:
    result = tll.find_features(AT_RIVER, "bank", tll.load_sae("demo"), sense_index, model=any_model, top_k=3)
    assert {"label", "label_kind", "label_why_not", "density"} <= set(result.table)
    assert np.diff(result.table["share"].to_numpy()).max() <= 0
    frame = result.to_dataframe()
    assert frame["rank"].tolist() == [1, 2, 3]
    assert frame["nearest"].tolist()[1] == result.neighbors(1)[0].context
    shown = str(result)
    assert "They saw the boat and the river near the «bank»" in shown
    assert all(str(feature) in shown for feature in frame["feature"])
    labels = {
        "label": ["mixed: a 9 %", "team 59 %", ""],
        "label_kind": ["mixed", "token", ""],
        "label_why_not": ["", "", "why"],
    }
    cells = list(replace(result, table=result.table.assign(**labels)).to_rich(width=80).columns[-1].cells)
    assert [str(cell).split("\n")[0] for cell in cells] == ["mixed: a 9 %", "team 59 %", "why"]
    assert ["bold yellow" in repr(cell.spans) for cell in cells] == [False, True, False]
    again = tll.find_features(AT_RIVER, -1, tll.load_sae("demo"), sense_index, model=any_model, top_k=3)
    assert bool(again.table.equals(result.table))


def test_what_cannot_be_found_is_refused(any_model: Any, sense_index: Any, senses: TensorSAE, tmp_path: Path) -> None:
    with pytest.raises(tll.InvalidInputError, match="an SAE without an encoder"):
        tll.find_features(AT_RIVER, "bank", TensorSAE(senses.W_dec, {}, hook_name=HOOK), sense_index, model=any_model)
    with pytest.raises(tll.InvalidInputError, match="reads None and writes None"):
        tll.find_features(AT_RIVER, "bank", TensorSAE(senses.W_dec, senses.weights), sense_index, model=any_model)
    silent = TensorSAE(senses.W_dec, {**senses.weights, "b_enc": torch.full((42,), -1e6)}, hook_name=HOOK)
    with pytest.raises(tll.InvalidInputError, match="no feature of the SAE is active at ' bank'"):
        tll.find_features(AT_RIVER, "bank", silent, sense_index, model=any_model)
    with pytest.raises(tll.UnknownHookError, match=r"no hook name 'blocks\.4\.hook_resid_post'"):
        tll.find_heads(AT_RIVER, "bank", sense_index, model=any_model, hook_name="blocks.4.hook_resid_post")
    with pytest.raises(tll.InvalidInputError, match=r"expected blocks\.L\.hook_resid_pre"):
        tll.find_heads(AT_RIVER, "bank", sense_index, model=any_model, hook_name="blocks.4.attn.hook_z")
    twice = tll.build_bank(any_model, TEXTS, tmp_path / "twice.h5", hook_names=HOOK, repeat=True, progress=False)
    with pytest.raises(tll.InvalidInputError, match="got a bank of texts read twice"):
        tll.find_heads(AT_RIVER, "bank", tll.ContextualIndex(twice, device="cpu"), model=any_model)
    with pytest.raises(tll.InvalidInputError, match="top_k=0"):
        tll.find_heads(AT_RIVER, "bank", sense_index, model=any_model, top_k=0)
