"""How well a bank knows a token: against a brute force, and with tokens whose truth is known."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import kstest
from support.banks import fill, make_record
from support.vectors import unit

import tl_latentlens as tll
from tl_latentlens.corpus.plan import Plan, PlanSettings, make_plan, prompts_from_lists
from tl_latentlens.index.transforms import TRANSFORMS

NAMES = ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post")
D, N_TOKENS = 24, 30
OFFSET = np.random.default_rng(8).standard_normal(D) * 2  # all activations point mostly this way


def a_plan(n_prompts: int, seed: int = 0, length: int = 8, **settings: Any) -> Plan:
    """Prompts of random tokens, 1 to 29, after a BOS."""
    lists = [[0, *line] for line in np.random.default_rng(seed).integers(1, N_TOKENS, (n_prompts, length)).tolist()]
    return make_plan(prompts_from_lists(lists, [[True] + [False] * length] * n_prompts), PlanSettings(**settings))


def activations_of(token_ids: np.ndarray, seed: int) -> np.ndarray:
    """Each token has a place of its own, and each of its uses is around it."""
    places = np.random.default_rng(9).standard_normal((1000, D))[token_ids]
    return (OFFSET + places + 0.5 * np.random.default_rng(seed).standard_normal(places.shape)).astype(np.float32)


def filled(path: Path, plan: Plan, seed: int = 1, names: tuple[str, ...] = NAMES, **kwargs: Any) -> tll.Bank:
    tokens = plan.tokens[plan.row_tokens]
    acts = {name: activations_of(tokens, seed + i) for i, name in enumerate(names)}
    widths = dict.fromkeys(names, D)
    fill(path, plan, acts=acts, record=make_record(plan, widths), dtype="float32", **kwargs)
    return tll.Bank.open(path)


@pytest.fixture(scope="module")
def banks(tmp_path_factory: pytest.TempPathFactory) -> list[tll.Bank]:
    folder = tmp_path_factory.mktemp("known")
    return [filled(folder / f"{seed}.h5", a_plan(14, seed), seed) for seed in (1, 2)]


def compared(index: tll.ContextualIndex, vectors: np.ndarray, name: str) -> np.ndarray:
    return index._searches[name].transform_activations(torch.from_numpy(vectors))[0].double().numpy()


def by_hand(index: tll.ContextualIndex, queries: np.ndarray, name: str, searched: tuple[str, ...]) -> np.ndarray:
    """The share for each query, from the whole order in which rows are found."""
    rows = {n: np.concatenate([bank.activations(n, slice(None)) for bank in index.banks]) for n in searched}
    means = {n: compared(index, rows[n], n).mean(0) for n in searched}
    units = {n: unit(compared(index, rows[n], n) - means[n]) for n in searched}

    def nearest(vectors: np.ndarray, own_prompts: np.ndarray) -> np.ndarray:
        found = index.search(vectors, len(searched) * index.n_rows, searched, name)
        is_other = index.bank_rows.prompts[found.rows.numpy()] != own_prompts[:, None]
        first = is_other.argmax(-1)
        assert is_other.any(-1).all()
        centered = unit(compared(index, vectors, name) - means[name])
        places = zip(found.rows.numpy()[range(len(first)), first], found.hook_ids[range(len(first)), first], strict=True)
        return np.array([centered[i] @ units[index.hook_names[hook]][row] for i, (row, hook) in enumerate(places)])

    reference = nearest(rows[name], index.bank_rows.prompts)  # every token stands in several prompts
    similarities = nearest(queries, np.full(len(queries), -1))
    return (1 + (reference <= similarities[:, None] + 1e-6).sum(-1)) / (1 + len(reference))


@pytest.mark.parametrize("searched", [NAMES, NAMES[:1]])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_known_is_a_share_of_the_banks_own_tokens(banks: list[tll.Bank], transform: str, searched: tuple[str, ...]) -> None:
    index = tll.ContextualIndex(banks, device="cpu", transform=transform)
    tokens = np.array([3, 4, 5, 6, 500, 501])
    queries = activations_of(tokens, 5)
    found = index.search(queries, 3, searched, NAMES[0], calibrate=True)
    assert found.known is not None
    expected = by_hand(index, queries, NAMES[0], searched)
    np.testing.assert_allclose(found.known, expected, atol=2 / (1 + index.n_rows))  # a cosine at the threshold may round
    assert found.known[4:].max() <= 0.05 < found.known[:4].median(), "the bank has the first four tokens alone"


@pytest.mark.parametrize("n_prompts", [30, 400])
def test_fresh_uses_of_the_banks_tokens_are_known_uniformly(n_prompts: int, tmp_path: Path) -> None:
    plan = a_plan(n_prompts, max_rows_per_token=None)
    index = tll.ContextualIndex(filled(tmp_path / "bank.h5", plan, names=NAMES[:1]), device="cpu")
    tokens = np.random.default_rng(3).integers(1, N_TOKENS, 2000)
    known = index.search(activations_of(tokens, 4), 1, query_hook_name=0, calibrate=True).known
    assert known is not None
    n_reference = min(256, index.n_rows)
    assert kstest(known.numpy(), "uniform").statistic < 2 / np.sqrt(n_reference)
    assert (known <= 0.05).double().mean() == pytest.approx(0.05, abs=3 * np.sqrt(0.05 * 0.95 / n_reference))
    unknown = index.search(activations_of(tokens + 500, 4), 1, query_hook_name=0, calibrate=True).known
    assert (unknown <= 0.05).double().mean() > 0.95


def test_frequent_tokens_count_as_in_the_texts_where_a_bank_keeps_few_rows_of_them(tmp_path: Path) -> None:
    """Half of the tokens of the texts are token 1, whose uses are scattered; the bank keeps as few of them as of others."""
    rng = np.random.default_rng(0)

    def drawn(n: int) -> np.ndarray:
        return np.where(rng.random(n) < 0.5, 1, rng.integers(2, N_TOKENS, n))

    def scattered(tokens: np.ndarray, seed: int) -> np.ndarray:
        noise = np.random.default_rng(seed + 50).standard_normal((len(tokens), D)).astype(np.float32)
        return activations_of(tokens, seed) + 2 * noise * (tokens == 1)[:, None]

    lists = [[0, *drawn(8).tolist()] for _ in range(800)]
    settings = PlanSettings(max_rows_per_token=200)
    plan = make_plan(prompts_from_lists(lists, [[True] + [False] * 8] * 800), settings)
    acts = scattered(plan.tokens[plan.row_tokens], 1)
    fill(tmp_path / "bank.h5", plan, acts={NAMES[0]: acts}, record=make_record(plan, {NAMES[0]: D}), dtype="float32")
    index = tll.ContextualIndex(tmp_path / "bank.h5", device="cpu")
    known = index.search(scattered(drawn(2000), 4), 1, query_hook_name=0, calibrate=True).known
    assert (known <= 0.05).double().mean() == pytest.approx(0.05, abs=0.03)


def test_tokens_of_one_prompt_alone_are_no_measure_of_a_known_token(tmp_path: Path) -> None:
    """Half of the rows are of tokens that stand in one prompt; their nearest rows are far."""
    lists = [[0, *range(1, 9), *range(30 + 8 * i, 38 + 8 * i)] for i in range(20)]
    shuffled = [[0, *np.random.default_rng(i).permutation(line[1:])] for i, line in enumerate(lists)]
    plan = make_plan(prompts_from_lists(shuffled, [[True] + [False] * 16] * 20), PlanSettings())
    index = tll.ContextualIndex(filled(tmp_path / "bank.h5", plan, names=NAMES[:1]), device="cpu")
    known = index.search(activations_of(np.arange(600, 700), 4), 1, query_hook_name=0, calibrate=True).known
    assert (known <= 0.05).double().mean() > 0.95


def test_a_token_is_no_nearer_for_standing_twice_in_its_prompt(tmp_path: Path) -> None:
    """Uses in one prompt are alike; the bank's tokens are measured in other prompts."""
    lists = [[0, *[token for token in np.random.default_rng(i).permutation(9) + 1 for _ in range(20)]] for i in range(6)]
    plan = make_plan(prompts_from_lists(lists, [[True] + [False] * 180] * 6), PlanSettings(max_rows_per_token=None))
    tokens, prompts = plan.tokens[plan.row_tokens], plan.row_prompts
    drift = np.random.default_rng(5).standard_normal((7, 10, D))
    acts = activations_of(tokens, 1) * 0.02 + 0.02 * OFFSET + drift[prompts, tokens].astype(np.float32) * 0.5
    fill(tmp_path / "bank.h5", plan, acts={NAMES[0]: acts}, record=make_record(plan, {NAMES[0]: D}), dtype="float32")
    index = tll.ContextualIndex(tmp_path / "bank.h5", device="cpu")
    queries = activations_of(np.arange(1, 10), 3) * 0.02 + 0.02 * OFFSET + drift[6, 1:10].astype(np.float32) * 0.5
    known = index.search(queries, 1, query_hook_name=0, calibrate=True).known
    assert known is not None
    assert known.mean() > 0.2


def test_any_leading_shape_and_any_layer(banks: list[tll.Bank]) -> None:
    index = tll.ContextualIndex(banks, device="cpu")
    queries = activations_of(np.arange(1, 13), 5)
    flat = index.search(queries, 2, query_hook_name=1, calibrate=True)
    assert flat.known is not None
    shaped = index.search(queries.reshape(2, 3, 2, D), 2, query_hook_name=NAMES[1], calibrate=True)
    assert torch.equal(shaped.known, flat.known.reshape(2, 3, 2))
    assert torch.equal(shaped[1].known, shaped.known[1])
    assert shaped.known_of(7) == flat.known[7].item()
    assert index.search(queries[0], 2, query_hook_name=1, calibrate=True).known.shape == ()
    assert index.search(queries[:0], 2, query_hook_name=1, calibrate=True).known.shape == (0,)
    again = index.known(torch.from_numpy(queries).half().float(), flat, -1)
    np.testing.assert_allclose(again, flat.known, atol=0.02)


def test_queries_that_are_no_activations_of_the_index_have_none(banks: list[tll.Bank], tmp_path: Path) -> None:
    index = tll.ContextualIndex(banks, NAMES[1], device="cpu")
    queries = activations_of(np.arange(3), 5)
    assert index.search(queries, 2, calibrate=True).known is None, "directions"
    assert index.search(queries, 2, query_hook_name=NAMES[0], calibrate=True).known is None, "not loaded"
    assert index.search(queries, 2, query_hook_name=NAMES[1]).known is None, "not asked for"
    lonely = tll.ContextualIndex(filled(tmp_path / "one.h5", a_plan(1)), device="cpu")
    assert lonely.search(queries, 2, query_hook_name=NAMES[0], calibrate=True).known is None, "no other prompt"


def test_banks_of_the_same_texts_are_no_other_prompts(tmp_path: Path) -> None:
    """Each layer in a bank of its own, with rows chosen by another seed: a token's other layers are its own prompt."""
    plans = [a_plan(30, max_rows_per_token=None), a_plan(30, max_rows_per_token=20)]
    apart = [filled(tmp_path / f"{i}.h5", plan, names=NAMES[i : i + 1]) for i, plan in enumerate(plans)]
    index, alone = tll.ContextualIndex(apart, device="cpu"), tll.ContextualIndex(apart[0], device="cpu")
    assert len(np.unique(index.bank_rows.distinct_prompts)) == len(np.unique(alone.bank_rows.prompts))
    tokens = np.random.default_rng(3).integers(1, N_TOKENS, 300)
    known = index.search(activations_of(tokens, 7), 1, query_hook_name=0, calibrate=True).known
    assert (known <= 0.05).double().mean() < 0.12


def test_heads_know_their_own_rows_and_rows_of_nothing_are_no_measure(tmp_path: Path) -> None:
    plan, name = a_plan(30), "blocks.0.attn.hook_z"
    acts = np.concatenate([activations_of(plan.tokens[plan.row_tokens], seed) for seed in (1, 2)], 1)
    acts[::3, :D] = 0
    record = make_record(plan, {name: 2 * D})
    record = replace(record, fingerprint=replace(record.fingerprint, n_heads={name: 2}))
    fill(tmp_path / "bank.h5", plan, acts={name: acts}, record=record, dtype="float32")
    index = tll.ContextualIndex(tmp_path / "bank.h5", [f"{name}[:]"], device="cpu")
    queries = activations_of(np.array([*range(1, 9), *range(500, 508)]), 7)
    for head in range(2):
        known = index.search(queries, 1, query_hook_name=f"{name}[{head}]", calibrate=True).known
        assert known is not None
        assert known[8:].max() <= 0.05 < known[:8].median()
    assert len(index._known_tokens[f"{name}[0]", (f"{name}[0]",)].reference) < 0.7 * index.n_rows


@pytest.mark.parametrize("transform", ["raw", "center"])
def test_an_approximate_index_knows_what_an_exact_one_does(
    banks: list[tll.Bank], transform: str, make_approximate: Callable[..., tll.ContextualIndex]
) -> None:
    exact, approximate = tll.ContextualIndex(banks, device="cpu", transform=transform), make_approximate(banks, transform)
    queries = activations_of(np.arange(1, 13), 5)
    results = [index.search(queries, 2, query_hook_name=0, calibrate=True).known for index in (exact, approximate)]
    np.testing.assert_allclose(*results, atol=0.05)


@pytest.fixture
def make_approximate() -> Callable[..., tll.ContextualIndex]:
    pytest.importorskip("faiss")
    return lambda banks, transform: tll.ContextualIndex(banks, device="cpu", transform=transform, approximate="Flat")


@pytest.mark.parametrize("transform", ["raw", "center"])
def test_the_right_use_of_a_token(tmp_path: Path, transform: str) -> None:
    """Token 1 is used in two ways; among its other uses, few are as near to a use of the query's own kind."""
    plan = a_plan(200, max_rows_per_token=None)
    tokens = plan.tokens[plan.row_tokens]
    acts = activations_of(tokens, 1)
    kinds = np.random.default_rng(2).integers(0, 2, len(tokens))
    ways = 3 * np.random.default_rng(6).standard_normal((2, D)).astype(np.float32)
    acts[tokens == 1] += ways[kinds[tokens == 1]]
    fill(tmp_path / "bank.h5", plan, acts={NAMES[0]: acts}, record=make_record(plan, {NAMES[0]: D}), dtype="float32")
    index = tll.ContextualIndex(tmp_path / "bank.h5", device="cpu", transform=transform)
    queries = activations_of(np.array([1, 1, 2, 3]), 3)
    queries[:2] += ways
    asked = np.array([1, 1, 2, 900])
    found = index.search(queries, 1, query_hook_name=0)
    chances = index.use_chances(queries, found, 0, asked)
    assert chances is not None
    rows = compared(index, acts, NAMES[0])
    mean = rows.mean(0)
    centered, of_queries = unit(rows - mean), unit(compared(index, queries, NAMES[0]) - mean)
    prompts = index.bank_rows.prompts
    for i, row in enumerate(found.rows[:3, 0].tolist()):
        assert tokens[row] == asked[i]
        others = np.flatnonzero((tokens == asked[i]) & (prompts != prompts[row]))
        if len(others) > 190:
            continue
        expected = (1 + (centered[others] @ centered[row] >= of_queries[i] @ centered[row]).sum()) / (1 + len(others))
        assert chances[i].item() == pytest.approx(expected, abs=2 / len(others))
    assert np.isnan(chances[3]), "the nearest row is of another token"
    wrong = found.rows.clone()
    wrong[0] = int(np.flatnonzero((tokens == 1) & (kinds == 1))[0])
    other_kind = index.use_chances(queries, type(found)(found.similarities, wrong, found.hook_ids, index), 0, asked)
    assert other_kind is not None
    assert chances[0] < 0.2
    assert other_kind[0] > 0.4, "about half of the uses, those of its own kind, are nearer to the wrong one"
    assert index.use_chances(queries, found, "blocks.7.hook_resid_post", asked) is None


def test_uses_are_compared_where_there_are_five(tmp_path: Path) -> None:
    lists = [[0, 10 + i, 1, 2, 3 if i < 5 else 4] for i in range(12)]
    plan = make_plan(prompts_from_lists(lists, [[True] + [False] * 4] * 12), PlanSettings())
    index = tll.ContextualIndex(filled(tmp_path / "bank.h5", plan, names=NAMES[:1]), device="cpu")
    queries, asked = activations_of(np.array([1, 3, 4]), 3), np.array([1, 3, 4])
    found = index.search(queries, 1, query_hook_name=0)
    assert np.isnan(index.use_chances(queries, found, 0, asked)).tolist() == [False, True, False]
    shaped = index.use_chances(queries[None], index.search(queries[None], 1, query_hook_name=0), 0, asked[None])
    assert shaped.shape == (1, 3)
