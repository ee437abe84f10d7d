"""Chosen tokens by layer against a direct ln_final and unembedding, every embedding, and a count over the rows found."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

import tl_latentlens as tll
from tl_latentlens.lens import lenses
from tl_latentlens.model.token_strings import single_tokens

TEXT = "She put the money in the bank before"
CHOSEN = [" bank", " water", " the"]


@pytest.fixture(scope="module")
def hooks(demo_model: Any, index: tll.ContextualIndex) -> Any:
    hooks = tll.latentlens_hooks(index, top_k=3, embedding_lens=True)
    demo_model.run_with_hooks([TEXT, "A boat."], fwd_hooks=hooks)
    return hooks


@pytest.fixture(scope="module")
def followed(hooks: Any) -> tll.FollowedTokens:
    return hooks.follow_tokens(CHOSEN, top_k=20)


def activations(model: Any, hook_name: str) -> torch.Tensor:
    with torch.no_grad():
        _, cache = model.run_with_cache(TEXT)
    return cache[hook_name][0]


def ids_of(model: Any) -> list[int]:
    return [model.to_single_token(token) for token in CHOSEN]


def test_probability_and_rank_are_those_of_the_unembedding(followed: tll.FollowedTokens, demo_model: Any) -> None:
    frame = followed.to_dataframe()
    for name in followed.result.hook_names:
        with torch.no_grad():
            vectors = activations(demo_model, name)
            logits = demo_model.ln_final(vectors[None])[0] @ demo_model.W_U + demo_model.b_U
        order = logits.argsort(dim=-1, descending=True)
        for pos in (1, 5, len(vectors) - 1):
            lines = frame[(frame["hook_name"] == name) & (frame["batch"] == 0) & (frame["pos"] == pos)]
            assert lines["followed"].tolist() == CHOSEN
            expected = logits[pos].softmax(-1)[ids_of(demo_model)]
            np.testing.assert_allclose(lines["logit_probability"], expected, rtol=1e-3, atol=1e-7)
            places = [1 + order[pos].tolist().index(i) for i in ids_of(demo_model)]
            assert lines["logit_rank"].tolist() == places
    last = followed.at(batch=0)
    assert last["token"].unique().tolist() == [" before"]
    assert last["logit_rank"].min() < 20 < last["logit_rank"].max(), "ranks differ, so that the comparison means something"


def test_embeddings_are_ranked_by_cosine(
    hooks: Any, demo_model: Any, monkeypatch: pytest.MonkeyPatch, followed: tll.FollowedTokens
) -> None:
    monkeypatch.setattr(lenses, "_MAX_SCORE_BYTES", 40_000)  # the vocabulary in parts
    in_parts = hooks.follow_tokens(CHOSEN, top_k=20)
    name = followed.result.hook_names[2]
    vectors = activations(demo_model, name)[1:].double()
    weight = demo_model.W_E.detach().double()
    cosines = torch.nn.functional.normalize(vectors, dim=-1) @ torch.nn.functional.normalize(weight, dim=-1).T
    chosen = cosines[:, ids_of(demo_model)]
    above = (cosines[:, None] > chosen[..., None] + 1e-9).sum(-1)
    for one in (followed, in_parts):
        read = one.embedding_lens[name]
        n = len(vectors)
        np.testing.assert_allclose(read.scores[:n], chosen, atol=1e-5)
        np.testing.assert_array_equal(read.ranks[:n], above + 1)
        np.testing.assert_allclose(one.logit_lens[name].scores, followed.logit_lens[name].scores, atol=1e-6)
        np.testing.assert_array_equal(one.logit_lens[name].ranks, followed.logit_lens[name].ranks)


def test_neighbors_of_the_token_are_counted(followed: tll.FollowedTokens, demo_model: Any, index: tll.ContextualIndex) -> None:
    name = followed.result.hook_names[1]
    at = followed.at(6)
    here = at[at["hook_name"] == name].set_index("followed")
    nearest = [
        n.token for n in index.search(activations(demo_model, name)[6], 20, query_hook_name=name, distinct=True).neighbors()
    ]
    for token in CHOSEN:
        assert here.loc[token, "neighbor_share"] == pytest.approx(nearest.count(token) / 20)
        if token in nearest:
            assert here.loc[token, "neighbor_rank"] == nearest.index(token) + 1
        else:
            assert here.loc[token, "neighbor_rank"] is pd.NA
    assert here.loc[" the", "neighbor_rank"] == 1
    assert here.loc[" water", "neighbor_share"] == 0


def test_ranks_agree_with_what_the_result_shows(hooks: Any) -> None:
    cell = hooks.result.cell(hooks.result.hook_names[-1], 4)
    for rank, (token, probability) in enumerate(cell.logit_lens, 1):
        line = hooks.follow_tokens(token).at(4).iloc[-1]
        assert (line["logit_rank"], line["logit_probability"]) == (rank, pytest.approx(probability, rel=1e-4))
    assert hooks.follow_tokens(cell.neighbors[0].token).at(4).iloc[-1]["neighbor_rank"] == 1


def test_shape_order_and_what_was_not_read(any_model: Any, index: tll.ContextualIndex) -> None:
    names = [*index.hook_names[:2], "blocks.1.mlp.hook_post"]
    hooks = tll.latentlens_hooks(index, names[:2], positions=[2, 3], embedding_lens=False)
    any_model.run_with_hooks(TEXT, fwd_hooks=hooks)
    frame = hooks.follow_tokens([" bank", any_model.to_single_token(" water")]).to_dataframe()
    assert list(frame.columns) == [
        "hook_name", "batch", "pos", "token", "followed", "neighbor_share", "neighbor_rank", "logit_probability", "logit_rank",
    ]  # fmt: skip
    assert frame["hook_name"].tolist() == [name for name in names[:2] for _ in range(4)]
    assert frame["pos"].tolist() == [2, 2, 3, 3] * 2
    assert frame["followed"].tolist() == [" bank", " water"] * 4
    assert frame["logit_rank"].dtype == "Int64"


def test_other_spaces_have_no_logit_lens(any_model: Any, texts: list[str], tmp_path: Any) -> None:
    names = ["blocks.1.attn.hook_z", "blocks.1.hook_resid_post"]
    bank = tll.build_bank(any_model, texts, tmp_path / "z.h5", hook_names=names, progress=False)
    hooks = tll.latentlens_hooks(tll.ContextualIndex(bank, device="cpu"))
    any_model.run_with_hooks(TEXT, fwd_hooks=hooks)
    followed = hooks.follow_tokens(" bank")
    by_name = followed.at(7).set_index("hook_name")
    assert by_name["logit_probability"].isna().to_dict() == {names[0]: True, names[1]: False}
    assert by_name["logit_rank"].isna().to_dict() == {names[0]: True, names[1]: False}
    assert by_name["neighbor_rank"].tolist() == [1, 1]
    assert "attn.z" in followed._repr_html_()


def test_refusals(hooks: Any, demo_model: Any, index: tll.ContextualIndex, followed: tll.FollowedTokens) -> None:
    with pytest.raises(tll.InvalidInputError, match=r"got ' noon', which the model reads as \[' no', 'on'\]; expected one"):
        hooks.follow_tokens(" noon")
    with pytest.raises(tll.InvalidInputError, match=r"got token id 3.5;"):
        hooks.follow_tokens([3.5])
    with pytest.raises(tll.InvalidInputError, match=r"got token id 1000000; the vocabulary has ids 0 to "):
        hooks.follow_tokens([5, 10**6])
    for nothing in ("", []):
        with pytest.raises(tll.InvalidInputError, match=r"expected (at least )?one"):
            hooks.follow_tokens(nothing)
    with pytest.raises(tll.InvalidInputError, match="got top_k=0"):
        hooks.follow_tokens(" bank", top_k=0)
    with pytest.raises(tll.InvalidInputError, match="nothing was captured"):
        tll.latentlens_hooks(index, model=demo_model).follow_tokens(" bank")
    with pytest.raises(tll.InvalidInputError, match="batch 0, position 0 was not decoded"):
        followed.at(0)
    with pytest.raises(tll.InvalidInputError, match="nothing was decoded of batch 2"):
        followed.at(batch=2)


def test_a_leading_space_of_sentencepiece() -> None:
    vocabulary = {"▁": 0, "▁Paris": 1, "Paris": 2, "<unk>": 3}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, "<unk>")), unk_token="<unk>")

    class Model:
        cfg = type("cfg", (), {"d_vocab": 4})

    Model.tokenizer = tokenizer
    assert single_tokens(Model, [" Paris", "Paris"]) == [1, 2]


def test_curves_show_the_table(followed: tll.FollowedTokens) -> None:
    pytest.importorskip("plotly")
    for by, columns in (
        ("score", ["neighbor_share", "logit_probability", "embedding_similarity"]),
        ("rank", ["neighbor_rank", "logit_rank", "embedding_rank"]),
    ):
        figure, frame = followed.plot(6, by=by), followed.at(6)
        traces = iter(figure.data)
        for token in CHOSEN:
            for column in columns:
                trace = next(traces)
                assert trace.name == f"'{token}'"
                assert list(trace.x) == [name.split(".")[1] for name in followed.result.hook_names]
                shown = frame.loc[frame["followed"] == token, column].astype("float64")
                np.testing.assert_array_equal(trace.y, shown)
        assert "position 6" in figure.layout.title.text
        assert (figure.layout.yaxis2.type == "log") == (by == "rank")
    with pytest.raises(tll.InvalidInputError, match="got by='odds'"):
        followed.plot(by="odds")


def test_a_token_that_no_lens_finds_leaves_its_panel_empty(hooks: Any) -> None:
    absent = hooks.follow_tokens([0], top_k=1)
    assert absent.at()["neighbor_rank"].isna().all()
    assert all(value is None or value != value for value in absent.plot(by="rank").data[0].y)


def test_notebooks_show_a_table(followed: tll.FollowedTokens) -> None:
    html = followed._repr_html_()
    assert html.count("<table") == 2
    last = followed.at().iloc[-1]
    assert f"{last['logit_probability']:.0%} <small>{last['logit_rank']:,}</small>" in html
    assert "logit_probability" in str(followed)
    assert repr(followed).startswith("FollowedTokens([' bank', ' water', ' the'], ")
