"""Windows of tokens around rows, and activations on them, against the bank and the model row by row."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tl_latentlens as tll
from tl_latentlens.directions.features.activations_around import activations_around
from tl_latentlens.directions.features.sae import TensorSAE
from tl_latentlens.directions.features.token_places import concatenated_ranges, token_places

HOOK = "blocks.3.hook_resid_post"


@pytest.fixture(scope="module")
def two_banks(any_model: Any, texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> tll.ContextualIndex:
    """An index of two banks, with a cap that leaves tokens out, and a blank prompt."""
    folder = tmp_path_factory.mktemp("two")
    parts = ([*texts[:3], ""], texts[3:])
    banks = [
        tll.build_bank(any_model, part, folder / f"{i}.h5", hook_names=HOOK, max_rows_per_token=1, progress=False)
        for i, part in enumerate(parts)
    ]
    return tll.ContextualIndex(banks, device="cpu")


def random_sae(d_sae: int = 12) -> TensorSAE:
    generator = torch.Generator().manual_seed(0)
    weights = {"W_enc": torch.randn(256, d_sae, generator=generator) / 16, "b_enc": torch.zeros(d_sae)}
    return TensorSAE(weights["W_enc"].T.contiguous(), weights, hook_name=HOOK)


def test_ranges() -> None:
    assert concatenated_ranges(np.array([5, 1, 4]), np.array([7, 2, 4])).tolist() == [5, 6, 1]


def test_spans_hold_what_stands_around_a_row(two_banks: tll.ContextualIndex) -> None:
    places = token_places(two_banks)
    tokens = np.concatenate([bank.plan.tokens for bank in two_banks.banks])
    first, end = places.windows(np.arange(two_banks.n_rows), 3, 2)
    for number in range(two_banks.n_rows):
        row = two_banks.row(number)
        prompt = row.bank.prompt(row.prompt_index)
        assert tokens[first[number] : end[number]].tolist() == prompt[max(0, row.position - 3) : row.position + 3]
        assert tokens[places.row_places[number]] == row.token_id


@pytest.mark.parametrize("chunk", [2**26, 4 * 12 * 5])
@pytest.mark.parametrize("with_model", [False, True])
def test_activations_are_those_of_each_token(
    two_banks: tll.ContextualIndex, any_model: Any, with_model: bool, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tl_latentlens.directions.features.sae.ENCODED_BYTES", chunk)
    sae, rng = random_sae(), np.random.default_rng(1)
    features = [7, 2, 11]
    rows = rng.integers(0, two_banks.n_rows, (3, 8))
    rows[1, 5:] = -1
    model = any_model if with_model else None
    found = activations_around(
        sae, token_places(two_banks), HOOK, features, rows, before=4, after=2, model=model, progress=False
    )
    banked = {}
    for number in range(two_banks.n_rows):
        row = two_banks.row(number)
        banked[id(row.bank), row.prompt_index, row.position] = number
    n_known = 0
    for i, j in np.ndindex(rows.shape):
        if rows[i, j] < 0:
            assert np.isnan(found[i, j]).all()
            continue
        row = two_banks.row(rows[i, j])
        prompt = row.bank.prompt(row.prompt_index)
        _, cache = any_model.run_with_cache(torch.tensor([prompt]), names_filter=[HOOK])
        acts = sae.encode(cache[HOOK][0].detach())[:, features[i]].numpy()
        for at, pos in enumerate(range(row.position - 4, row.position + 3)):
            known = 0 <= pos < len(prompt) and (with_model or (id(row.bank), row.prompt_index, pos) in banked)
            assert known != np.isnan(found[i, j, at])
            if known:
                assert abs(found[i, j, at] - acts[pos]) <= 1e-2 * max(1, np.abs(acts).max())
                n_known += 1
    assert n_known > 20


def test_texts_that_were_run_twice_are_read_in_the_second_copy(any_model: Any, texts: list[str], tmp_path: Path) -> None:
    bank = tll.build_bank(any_model, texts, tmp_path / "twice.h5", hook_names=HOOK, repeat=True, progress=False)
    sae, index = random_sae(), tll.ContextualIndex(bank, device="cpu")
    rows = np.arange(20).reshape(2, 10)
    known, run = (
        activations_around(sae, token_places(index), HOOK, [0, 3], rows, before=3, after=3, model=model, progress=False)
        for model in (None, any_model)
    )
    assert np.isfinite(known).sum() > 60
    np.testing.assert_allclose(run[np.isfinite(known)], known[np.isfinite(known)], atol=2e-2)
