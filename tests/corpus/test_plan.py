"""The plan against loops over sets of prefixes."""

import hashlib
import json
import tracemalloc
from collections import Counter, defaultdict
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tl_latentlens.corpus.plan import Plan, PlanSettings, Prompts, block_starts, make_plan, prompts_from_lists
from tl_latentlens.errors import CorpusError, InvalidInputError

BOS, PAD = 0, 1
quick = settings(max_examples=150, deadline=None, derandomize=True)

# Few ids and short prompts, so that most prompts share prefixes and some are empty, equal or a prefix of another.
token_lists = st.lists(st.lists(st.integers(0, 3), max_size=6), min_size=1, max_size=12)
caps = st.none() | st.integers(1, 4)


def flags(lists: list[list[int]]) -> list[list[bool]]:
    """BOS at the start of a prompt, and padding anywhere, as in the prompts of a model."""
    return [[t == PAD or (i == 0 and t == BOS) for i, t in enumerate(tokens)] for tokens in lists]


def brute_force(lists: list[list[int]], special: list[list[bool]], bidirectional: bool = False) -> list[int]:
    """Places in the joined tokens of everything that is a row before the cap."""
    seen, rows, place = set(), [], 0
    for tokens, skip in zip(lists, special, strict=True):
        new_prompt = tuple(tokens) not in seen
        for i in range(len(tokens)):
            prefix = tuple(tokens[: i + 1])
            new = new_prompt if bidirectional else prefix not in seen
            if not bidirectional:
                seen.add(prefix)
            if new and not skip[i]:
                rows.append(place)
            place += 1
        if bidirectional:
            seen.add(tuple(tokens))
    return rows


def plan_or_none(prompts: Prompts, plan_settings: PlanSettings) -> Plan | None:
    try:
        return make_plan(prompts, plan_settings)
    except CorpusError:
        return None


# ------------------------------------------------------------------------------------------------------- prefixes, prompts


@quick
@given(token_lists, st.booleans())
@example([[0, 2, 3], [0, 2, 3], [0, 2], [], [0, 2, 3, 2]], False)
@example([[], [], [2]], True)
def test_rows_are_the_distinct_prefixes(lists: list[list[int]], with_special: bool) -> None:
    special = flags(lists) if with_special else [[False] * len(tokens) for tokens in lists]
    plan = plan_or_none(prompts_from_lists(lists, special if with_special else None), PlanSettings(max_rows_per_token=None))
    assert (plan.row_tokens.tolist() if plan else []) == brute_force(lists, special)


@quick
@given(token_lists, st.booleans())
@example([[2, 3], [2, 3, 3], [2, 3], [], [3, 2]], True)
def test_bidirectional_rows_are_those_of_the_distinct_prompts(lists: list[list[int]], with_special: bool) -> None:
    special = flags(lists) if with_special else [[False] * len(tokens) for tokens in lists]
    prompts = prompts_from_lists(lists, special)
    plan = plan_or_none(prompts, PlanSettings(max_rows_per_token=None, bidirectional=True))
    assert (plan.row_tokens.tolist() if plan else []) == brute_force(lists, special, bidirectional=True)


@quick
@given(token_lists, caps)
@example([[BOS, 2, 3], [BOS, 2, 3], [BOS, PAD, 2], [], [BOS]], None)
def test_repeated_texts_give_the_rows_of_an_encoder(lists: list[list[int]], cap: int | None) -> None:
    prompts = prompts_from_lists(lists, flags(lists))
    both = [plan_or_none(prompts, PlanSettings(cap, **kind)) for kind in ({"repeat": True}, {"bidirectional": True})]
    rows = [None if plan is None else plan.row_tokens.tolist() for plan in both]
    assert rows[0] == rows[1]
    if both[0] is not None:
        start = min([*row, False].index(False) for row, tokens in zip(flags(lists), lists, strict=True) if tokens)
        assert both[0].settings == PlanSettings(cap, repeat=True, text_start=start)
        having = [i for i, tokens in enumerate(lists) if tokens]
        assert both[0].shifts(np.array(having)).tolist() == [len(lists[i]) - start for i in having]


def test_repeating_for_a_bidirectional_model_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="got repeat=True for a bidirectional model"):
        make_plan(prompts_from_lists([[2]]), PlanSettings(bidirectional=True, repeat=True))


def test_shared_prefixes_by_hand() -> None:
    lists = [[0, 5, 6, 7], [], [0, 5, 6, 8], [0, 5], [0, 9], [5, 6]]
    prompts = prompts_from_lists(lists, flags(lists))
    assert prompts.starts.tolist() == [0, 4, 4, 8, 10, 12, 14]
    plan = make_plan(prompts)
    #  place  0 1 2 3 | 4 5 6 7 | 8 9 | 10 11 | 12 13
    #  token  0 5 6 7 | 0 5 6 8 | 0 5 |  0  9 |  5  6
    assert plan.row_tokens.tolist() == [1, 2, 3, 7, 11, 12, 13]
    assert plan.row_prompts.tolist() == [0, 0, 0, 2, 4, 5, 5]
    assert (plan.n_rows, plan.n_prompts) == (7, 6)


def test_long_shared_prefixes_and_large_ids() -> None:
    rng = np.random.default_rng(0)
    trunk = rng.integers(0, 2**31 - 1, 400).tolist()
    lists = [trunk[: rng.integers(0, 401)] + rng.integers(2**31 - 9, 2**31 - 1, rng.integers(0, 9)).tolist() for _ in range(60)]
    plan = make_plan(prompts_from_lists(lists), PlanSettings(max_rows_per_token=None))
    assert plan.row_tokens.tolist() == brute_force(lists, [[False] * len(tokens) for tokens in lists])


def test_empty_prompts_keep_their_number() -> None:
    plan = make_plan(prompts_from_lists([[], [4], [], [], [5, 4], []]))
    assert plan.n_prompts == 6
    assert plan.row_prompts.tolist() == [1, 4, 4]


@quick
@given(token_lists, caps, st.booleans())
def test_row_prompts_and_the_order_of_rows(lists: list[list[int]], cap: int | None, bidirectional: bool) -> None:
    prompts = prompts_from_lists(lists, flags(lists))
    plan = plan_or_none(prompts, PlanSettings(cap, 0, bidirectional))
    if plan is None:
        return
    assert plan.row_tokens.dtype == np.int64
    assert (np.diff(plan.row_tokens) > 0).all()
    prompt_of_place = [number for number, tokens in enumerate(lists) for _ in tokens]
    assert plan.row_prompts.tolist() == [prompt_of_place[place] for place in plan.row_tokens]
    assert not prompts.special[plan.row_tokens].any()


def test_plan_keeps_what_it_was_made_of() -> None:
    prompts = Prompts(np.array([3, 4], np.int32), np.array([0, 2]), np.array([False, False]), n_truncated=3)
    plan = make_plan(prompts, PlanSettings(seed=7))
    assert plan.tokens is prompts.tokens
    assert plan.n_truncated == 3
    assert plan.settings == PlanSettings(50, 7, False)
    assert make_plan(prompts).settings == PlanSettings()


# ------------------------------------------------------------------------------------------------------------------ cap


@quick
@given(token_lists, st.integers(1, 4), st.integers(0, 3), st.booleans())
def test_cap_keeps_as_many_as_it_may_of_each_token(lists: list[list[int]], cap: int, seed: int, bidirectional: bool) -> None:
    prompts = prompts_from_lists(lists, flags(lists))
    free = plan_or_none(prompts, PlanSettings(None, seed, bidirectional))
    capped = plan_or_none(prompts, PlanSettings(cap, seed, bidirectional))
    if free is None or capped is None:
        assert free is capped
        return
    assert set(capped.row_tokens.tolist()) <= set(free.row_tokens.tolist())
    available = Counter(prompts.tokens[free.row_tokens].tolist())
    assert Counter(prompts.tokens[capped.row_tokens].tolist()) == {t: min(cap, count) for t, count in available.items()}


@quick
@given(token_lists, st.integers(1, 4), st.integers(0, 3))
def test_cap_keeps_the_first_of_each_token_in_a_seeded_order(lists: list[list[int]], cap: int, seed: int) -> None:
    """The order is part of what a bank promises: the same call gives the same rows in every version."""
    prompts = prompts_from_lists(lists, flags(lists))
    if (plan := plan_or_none(prompts, PlanSettings(cap, seed))) is None:
        return
    kept, count = [], Counter()
    for place in np.random.default_rng(seed).permutation(brute_force(lists, flags(lists))):
        count[token := prompts.tokens[place]] += 1
        if count[token] <= cap:
            kept.append(place)
    assert plan.row_tokens.tolist() == sorted(kept)


def repeated_token(n: int) -> Prompts:
    """n prompts that each hold token 5 after a token of their own, so that it has n distinct prefixes."""
    return prompts_from_lists([[10 + i, 5] for i in range(n)])


def sampled(prompts: Prompts, cap: int, seed: int) -> np.ndarray:
    plan = make_plan(prompts, PlanSettings(cap, seed))
    return plan.row_prompts[prompts.tokens[plan.row_tokens] == 5]


def test_cap_is_decided_by_the_seed() -> None:
    prompts = repeated_token(200)
    samples = [tuple(sampled(prompts, 20, seed).tolist()) for seed in range(10)]
    assert samples == [tuple(sampled(prompts, 20, seed).tolist()) for seed in range(10)]
    assert len(set(samples)) == 10


def test_cap_at_or_above_the_count_changes_nothing() -> None:
    prompts = repeated_token(30)
    free = make_plan(prompts, PlanSettings(None)).row_tokens
    for cap in (30, 31, 10**6):
        np.testing.assert_array_equal(make_plan(prompts, PlanSettings(cap)).row_tokens, free)


def test_cap_draws_from_the_whole_corpus_alike() -> None:
    n, cap, n_seeds = 100, 10, 400
    prompts = repeated_token(n)
    chosen = Counter(prompt for seed in range(n_seeds) for prompt in sampled(prompts, cap, seed).tolist())
    counts = np.array([chosen[prompt] for prompt in range(n)])
    expected = cap * n_seeds / n  # 40 a prompt; a draw without replacement spreads by sqrt(40 * 0.9) = 6
    spread = np.sqrt(expected * (1 - cap / n))
    assert np.abs(counts - expected).max() < 5 * spread
    assert np.abs(counts.reshape(10, 10).sum(1) - 10 * expected).max() < 5 * spread * np.sqrt(10)
    # Neighboring prompts are not drawn together either: the spread is that of single draws.
    assert 0.6 < counts.std() / spread < 1.4


def test_cap_samples_each_token_by_itself() -> None:
    """Many rows of one token leave the rows of a rare one alone."""
    prompts = prompts_from_lists([[10 + i, 5] for i in range(500)] + [[7]])
    plan = make_plan(prompts, PlanSettings(max_rows_per_token=1))
    kept = defaultdict(int)
    for token in prompts.tokens[plan.row_tokens].tolist():
        kept[token] += 1
    assert kept == {**{10 + i: 1 for i in range(500)}, 5: 1, 7: 1}


# --------------------------------------------------------------------------------------------------------------- digest


def test_digest_tells_plans_apart() -> None:
    lists = [[2, 3, 4], [2, 5], [6, 3]]
    plans = [
        make_plan(prompts_from_lists(lists)),
        make_plan(prompts_from_lists(lists), PlanSettings(seed=1)),
        make_plan(prompts_from_lists(lists), PlanSettings(max_rows_per_token=None)),
        make_plan(prompts_from_lists(lists), PlanSettings(bidirectional=True)),
        make_plan(prompts_from_lists(lists), PlanSettings(repeat=True)),
        make_plan(prompts_from_lists([[2, 3, 4, 2, 5], [6, 3]])),
        make_plan(prompts_from_lists([[2, 3, 4], [2, 5], [6, 7]])),
        make_plan(prompts_from_lists(lists, [[True, False, False], [True, False], [False, False]])),
    ]
    assert len({plan.digest for plan in plans}) == len(plans)
    assert make_plan(prompts_from_lists(lists)).digest == plans[0].digest


def test_digest_of_plain_plans_is_that_of_the_first_banks() -> None:
    plan = make_plan(prompts_from_lists([[2, 3, 4], [2, 5]]), PlanSettings(7, 3))
    settings = json.dumps({"bidirectional": False, "max_rows_per_token": 7, "seed": 3})
    arrays = plan.tokens.tobytes() + plan.prompt_starts.tobytes() + plan.row_tokens.tobytes()
    assert plan.digest == hashlib.sha256(settings.encode() + arrays).hexdigest()


# --------------------------------------------------------------------------------------------------------------- blocks


@quick
@given(token_lists, caps, st.integers(1, 20), st.integers(1, 20))
@example([[2, 3, 2, 3, 2, 3]] + [[3]] * 3, None, 1, 1)
def test_blocks_cover_the_rows_at_prompt_boundaries(
    lists: list[list[int]], cap: int | None, target: int, max_rows: int
) -> None:
    plan = plan_or_none(prompts_from_lists(lists, flags(lists)), PlanSettings(cap))
    if plan is None:
        return
    starts = block_starts(plan, target, max_rows)
    assert starts[0] == 0
    assert starts[-1] == plan.n_rows
    assert (np.diff(starts) > 0).all()

    run, rows = Counter(), Counter()  # a prompt is run up to its last row
    for row, prompt in enumerate(plan.row_prompts.tolist()):
        run[prompt] = int(plan.row_tokens[row] - plan.prompt_starts[prompt]) + 1
        rows[prompt] += 1
    blocks = [sorted(set(plan.row_prompts[first:last].tolist())) for first, last in pairwise(starts.tolist())]
    assert sorted(p for block in blocks for p in block) == sorted(rows), "a prompt lies in two blocks"
    for number, block in enumerate(blocks):
        before_last = block[:-1]
        assert sum(run[p] for p in before_last) < target
        assert sum(rows[p] for p in before_last) < max_rows
        if number < len(blocks) - 1:
            assert sum(run[p] for p in block) >= target or sum(rows[p] for p in block) >= max_rows


def test_one_block_where_everything_fits() -> None:
    plan = make_plan(prompts_from_lists([[2, 3], [4], [5, 6]]))
    assert block_starts(plan, 100, 100).tolist() == [0, 5]
    assert block_starts(plan, 3, 100).tolist() == [0, 3, 5]
    assert block_starts(plan, 100, 2).tolist() == [0, 2, 5]


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("cap", [0, -1])
def test_cap_below_one_is_refused(cap: int) -> None:
    with pytest.raises(InvalidInputError, match=f"got max_rows_per_token={cap}; expected at least 1, or None for no cap"):
        make_plan(prompts_from_lists([[2]]), PlanSettings(max_rows_per_token=cap))


@pytest.mark.parametrize("lists", [[[BOS], [BOS], []], [[]], [], [[BOS, PAD, PAD]]])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_corpus_without_a_token_to_keep_is_refused(lists: list[list[int]], bidirectional: bool) -> None:
    with pytest.raises(
        CorpusError, match=f"nothing to bank: the corpus's {len(lists)} texts hold no token besides BOS and padding"
    ):
        make_plan(prompts_from_lists(lists, flags(lists)), PlanSettings(bidirectional=bidirectional))


@pytest.mark.parametrize("of_plan", [PlanSettings(), PlanSettings(None), PlanSettings(bidirectional=True)])
def test_memory_of_planning(of_plan: PlanSettings) -> None:
    """At most 32 bytes a token are held at once, the tokens themselves (five bytes) left out; docs/scaling.md says so."""
    rng = np.random.default_rng(0)
    starts = np.r_[0, np.cumsum(rng.integers(10, 50, 30_000))]
    tokens = np.minimum(rng.zipf(1.2, starts[-1]), 50_000).astype(np.int32)
    special = np.zeros(len(tokens), bool)
    special[starts[:-1]] = True
    prompts = Prompts(tokens, starts, special)
    tracemalloc.start()
    try:
        make_plan(prompts, of_plan)
        assert tracemalloc.get_traced_memory()[1] < 32 * len(tokens)
    finally:
        tracemalloc.stop()
