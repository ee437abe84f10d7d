"""Directions and SAE features, against plain searches."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import tl_latentlens as tll

pytestmark = pytest.mark.usefixtures("few_random_directions")


def directions(n: int, d: int = 256) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(5))


def test_both_signs(index: tll.ContextualIndex) -> None:
    vectors = directions(4) * torch.tensor([[1.0], [0.01], [50.0], [3.0]])
    result = tll.decode_directions(vectors, index, top_k=3)
    up, down = (index.for_directions.search(sign * vectors, 3, calibrate=True) for sign in (1, -1))
    assert torch.equal(result.positive.rows, up.rows)
    assert torch.equal(result.negative.rows, down.rows)
    assert not torch.equal(up.rows, down.rows)
    for i in range(4):
        assert result.neighbors(i) == (up.neighbors()[i], down.neighbors()[i])
    flipped = tll.decode_directions(-vectors, index, top_k=3)
    assert torch.equal(flipped.positive.rows, result.negative.rows)
    assert torch.equal(flipped.negative.similarities, result.positive.similarities)


def test_a_bank_vector_and_its_opposite(bank: tll.Bank) -> None:
    index = tll.ContextualIndex(bank, device="cpu", transform="raw")
    name = index.hook_names[2]
    vectors = np.array(index.banks[0].vectors(name)).astype(np.float64)
    result = tll.decode_directions(vectors[5], index, top_k=1, hook_name=name)
    (nearest,), (farthest,) = result.neighbors(0)
    assert nearest.row == 5
    worst = int((vectors @ vectors[5]).argmin())
    assert farthest.row == worst
    assert abs(farthest.similarity + float(vectors[worst] @ vectors[5] / np.linalg.norm(vectors[5]))) < 1e-5


def test_hook_names_and_ids(index: tll.ContextualIndex) -> None:
    wanted = list(index.hook_names[:2])
    result = tll.decode_directions(directions(2), index, hook_name=wanted, ids=[17, 4])
    assert set(result.positive.hook_ids.flatten().tolist()) <= {0, 1}
    assert list(result.ids) == [17, 4]
    frame = result.to_dataframe()
    assert len(frame) == 2 * 2 * 10
    assert frame.direction.unique().tolist() == [17, 4]
    assert set(frame.hook_name) <= set(wanted)


def test_directions_are_never_centred(index: tll.ContextualIndex, bank: tll.Bank) -> None:
    centred = tll.ContextualIndex(bank, index.hook_names[:1], device="cpu", transform="center")
    vectors = directions(2)
    stored = np.array(bank.vectors(index.hook_names[0])).astype(np.float64)
    stored -= stored.mean(0)
    stored /= np.linalg.norm(stored, axis=-1, keepdims=True)
    best = np.sort(vectors.double().numpy() @ stored.T / vectors.double().norm(dim=-1, keepdim=True).numpy())[:, ::-1][:, :4]
    np.testing.assert_allclose(tll.decode_directions(vectors, centred, top_k=4).positive.similarities, best, atol=1e-5)


def test_refusals(index: tll.ContextualIndex) -> None:
    with pytest.raises(tll.InvalidInputError, match=r"got directions of shape \(2, 3, 256\); expected \[n, d\] or \[d\]"):
        tll.decode_directions(torch.randn(2, 3, 256), index)
    with pytest.raises(tll.InvalidInputError, match=r"got vectors of width 255 .*the index has width \[256\]"):
        tll.decode_directions(torch.randn(2, 255), index)
    with pytest.raises(tll.InvalidInputError, match=r"index \(1,\) is zero"):
        tll.decode_directions(torch.stack([torch.ones(256), torch.zeros(256)]), index)
    with pytest.raises(tll.UnknownHookError, match="no hook name 'nowhere'"):
        tll.decode_directions(torch.randn(2, 256), index, hook_name="nowhere")
    with pytest.raises(tll.InvalidInputError, match=r"got feature 12; the SAE has features 0 to 11"):
        tll.label_features(directions(12), index, [3, 12])
    with pytest.raises(tll.InvalidInputError, match=r"got feature -1; the SAE has features 0 to 11"):
        tll.label_features(directions(12), index, [-1])
    with pytest.raises(tll.InvalidInputError, match=r"got a decoder of shape \(256,\); expected W_dec \[d_sae, d_in\]"):
        tll.label_features(torch.randn(256), index)


@pytest.mark.parametrize("decode", [tll.decode_directions, tll.label_features])
def test_what_is_no_index_or_model_is_named(index: tll.ContextualIndex, bank: tll.Bank, decode: Any) -> None:
    for wrong in (bank, str(bank.path), bank.path):
        with pytest.raises(tll.InvalidInputError, match=rf"\({type(wrong).__name__}\); expected a ContextualIndex"):
            decode(directions(2), wrong)
    with pytest.raises(tll.InvalidInputError, match="got a str; expected a TransformerLens model"):
        tll.label_features(directions(2), index, model="gpt2")


def test_no_directions(index: tll.ContextualIndex) -> None:
    some, none = tll.decode_directions(directions(1), index), tll.decode_directions(directions(1)[:0], index)
    assert list(none.to_dataframe().columns) == list(some.to_dataframe().columns)
    assert repr(tll.decode_directions(directions(3), index, ids=[5, 6, 7], top_k=2)) == "DirectionResult(3 directions, top 2)"


def check_labels(result: tll.DirectionResult, decoder: torch.Tensor, features: list[int], index: Any, names: Any) -> None:
    """The features' decoder rows, searched one by one."""
    assert list(result.ids) == features
    for i, feature in enumerate(features):
        v = decoder[feature].detach()
        searched = (index.for_directions.search(sign * v, 10, names) for sign in (1, -1))
        assert result.neighbors(i) == tuple(found.neighbors() for found in searched)


def test_label_features_of_a_matrix(index: tll.ContextualIndex) -> None:
    decoder = directions(12)
    check_labels(tll.label_features(decoder, index), decoder, list(range(12)), index, None)
    check_labels(tll.label_features(decoder, index, [7, 2]), decoder, [7, 2], index, None)
    check_labels(tll.label_features(torch.nn.Parameter(decoder), index, torch.tensor([7])), decoder, [7], index, None)
    check_labels(tll.label_features(decoder.numpy(), index, range(2)), decoder, [0, 1], index, None)
    assert tll.label_features(decoder, index, [7], top_k=2).positive.rows.shape == (1, 2)
    assert len(tll.label_features(decoder, index, []).ids) == 0


@pytest.mark.parametrize("field", ["hook_name", "hook_name_out"])
def test_label_features_searches_the_hook_that_the_sae_names(index: tll.ContextualIndex, field: str) -> None:
    decoder = directions(5)
    name = index.hook_names[3]
    metadata = SimpleNamespace(**{"hook_name": "blocks.0.hook_mlp_in", "hook_name_out": None, field: name})
    sae = SimpleNamespace(W_dec=decoder, cfg=SimpleNamespace(metadata=metadata))
    check_labels(tll.label_features(sae, index), decoder, list(range(5)), index, name)


@pytest.mark.parametrize(
    "cfg", [SimpleNamespace(), SimpleNamespace(metadata=SimpleNamespace(hook_name="blocks.77.hook_resid_post"))]
)
def test_label_features_searches_everything_otherwise(index: tll.ContextualIndex, cfg: Any) -> None:
    decoder = directions(3)
    check_labels(tll.label_features(SimpleNamespace(W_dec=decoder, cfg=cfg), index), decoder, [0, 1, 2], index, None)


@pytest.mark.filterwarnings("ignore:no activations to encode")  # of an SAE that names no hook
def test_label_features_of_a_sae_lens_sae(index: tll.ContextualIndex) -> None:
    sae_lens = pytest.importorskip("sae_lens", exc_type=ImportError)
    from sae_lens.saes.sae import SAEMetadata

    name = index.hook_names[1]
    for metadata, names in ((SAEMetadata(hook_name=name), name), (SAEMetadata(), None)):
        cfg = sae_lens.StandardSAEConfig(d_in=256, d_sae=16, device="cpu", metadata=metadata)
        sae = sae_lens.StandardSAE(cfg)
        with torch.no_grad():
            sae.W_dec.copy_(directions(16))
        check_labels(tll.label_features(sae, index, [3, 11]), sae.W_dec, [3, 11], index, names)
        assert len(tll.label_features(sae, index, top_k=1).ids) == 16


def test_dataframe(index: tll.ContextualIndex) -> None:
    result = tll.decode_directions(directions(3), index, top_k=2, calibrate=False)
    frame = result.to_dataframe()
    assert frame.equals(result.neighbors_dataframe())
    assert list(frame.columns) == [
        "direction", "sign", "rank", "token", "context", "position", "prompt_index", "row", "hook_name", "similarity",
    ]  # fmt: skip
    assert frame.direction.tolist() == [i for i in range(3) for _ in range(4)]
    assert frame.sign.tolist() == [1, 1, -1, -1] * 3
    assert frame["rank"].tolist() == [1, 2] * 6
    positive, negative = result.neighbors(2)
    assert frame.iloc[8:].token.tolist() == [n.token for n in positive + negative]
    assert frame.iloc[8:].similarity.tolist() == [n.similarity for n in positive + negative]
    calibrated = tll.decode_directions(directions(3), index, top_k=2).to_dataframe()
    assert list(calibrated.columns) == [*frame.columns, "chance"]
    pd.testing.assert_frame_equal(calibrated.drop(columns="chance"), frame)
