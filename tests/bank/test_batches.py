"""Batches: every row once, prompts of similar length together, little padding."""

import tempfile
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.banks import (
    WIDTHS,
    activations,
    at_most,
    blocks_of,
    fill,
    give,
    make_record,
    make_rows,
)

from tl_latentlens.bank.bank import Bank
from tl_latentlens.bank.batches import Batch
from tl_latentlens.bank.writer import BankWriter
from tl_latentlens.corpus.plan import Plan, PlanSettings, make_plan, prompts_from_lists
from tl_latentlens.errors import InvalidInputError


@pytest.fixture
def plan() -> Plan:
    return make_rows()


@st.composite
def corpora(draw: st.DrawFn) -> tuple[list[list[int]], list[list[bool]], PlanSettings]:
    lists = draw(st.lists(st.lists(st.integers(0, 4), max_size=12), min_size=1, max_size=12))
    bos = draw(st.booleans())
    special = [[bos and i == 0 for i in range(len(tokens))] for tokens in lists]
    if not any(not s for row in special for s in row):
        lists, special = [*lists, [1, 2]], [*special, [False, False]]
    cap = draw(st.sampled_from([None, 1, 2]))
    kind = draw(st.sampled_from([{}, {"bidirectional": True}, {"repeat": True}]))
    return lists, special, PlanSettings(cap, draw(st.integers(0, 3)), **kind)


@settings(deadline=None, max_examples=60)
@given(
    corpus=corpora(),
    batch_tokens=st.integers(1, 30),
    block_batches=st.integers(1, 3),
    block_bytes=st.sampled_from([1, 100, 2**29]),
)
def test_batches_hold_every_row_once_in_padded_prompts(
    corpus: Any, batch_tokens: int, block_batches: int, block_bytes: int
) -> None:
    lists, special, of_plan = corpus
    plan = make_plan(prompts_from_lists(lists, special), of_plan)
    with tempfile.TemporaryDirectory() as folder, blocks_of(block_batches, block_bytes):
        path = Path(folder) / "a.h5"
        acts = activations(plan)
        seen: Counter[int] = Counter()
        blocks: dict[int, set[int]] = {}
        run = 0
        with BankWriter.create(path, plan, make_record(plan), batch_tokens=batch_tokens) as writer:
            left = writer.tokens_left
            for batch in writer.batches():
                _check_batch(plan, batch, batch_tokens)
                seen.update(batch.rows.tolist())
                blocks.setdefault(batch.block, set()).update(batch.rows.tolist())
                run += batch.n_tokens
                give(writer, batch, acts)
        assert seen == Counter(range(plan.n_rows))
        assert run == left
        bank = Bank.open(path)
        assert blocks == {block: set(range(first, last)) for block, (first, last) in enumerate(bank.blocks())}
        for name in WIDTHS:
            unit = acts[name] / np.linalg.norm(acts[name], axis=1, keepdims=True)
            np.testing.assert_allclose(bank.vectors(name), unit, atol=1e-3)


def test_batches_end_where_prompts_are_much_shorter(tmp_path: Path) -> None:
    lengths = [200] * 3 + [100] * 7 + [95] * 5 + [20] * 10
    plan = make_plan(prompts_from_lists([[i] + [1] * (n - 1) for i, n in enumerate(lengths, 2)]), PlanSettings(None))
    with BankWriter.create(tmp_path / "a.h5", plan, make_record(plan), batch_tokens=2000) as writer:
        shapes = [tuple(batch.tokens.shape) for batch in writer.batches()]
    assert shapes == [(3, 200), (12, 100), (10, 20)]  # 600 tokens are enough to end with, 95 is near enough to 100
    with BankWriter.create(tmp_path / "b.h5", plan, make_record(plan), batch_tokens=8000) as writer:
        shapes = [tuple(batch.tokens.shape) for batch in writer.batches()]
    assert shapes == [(5, 200), (10, 100), (10, 20)]  # an eighth of the most are 1,000


def _check_batch(plan: Plan, batch: Batch, batch_tokens: int) -> None:
    starts = plan.prompt_starts
    prompts = [plan.tokens[a:b].tolist() for a, b in pairwise(starts)]
    place = {}
    for prompt, (start, end) in enumerate(pairwise(starts)):
        place.update({row: (prompt, at - start) for row, at in enumerate(plan.row_tokens.tolist()) if start <= at < end})
    n_prompts, width = batch.tokens.shape
    assert batch.tokens.shape == batch.attention_mask.shape
    assert batch.tokens.dtype == torch.int64
    assert batch.attention_mask.dtype == torch.bool
    assert n_prompts == 1 or n_prompts * width <= batch_tokens
    assert len(batch.rows) == len(batch.row_batch) == len(batch.row_pos)
    of_line: dict[int, set[int]] = {}
    for row, line, position in zip(batch.rows.tolist(), batch.row_batch.tolist(), batch.row_pos.tolist(), strict=True):
        prompt, expected = place[row]
        length = len(prompts[prompt]) - plan.settings.text_start
        assert position == expected + plan.settings.repeat * length
        of_line.setdefault(line, set()).add(prompt)
    assert sorted(of_line) == list(range(n_prompts)), "a prompt without rows was run"
    assert all(len(found) == 1 for found in of_line.values())
    assert len(set.union(*of_line.values())) == n_prompts, "a prompt was run twice"
    for line, (prompt,) in of_line.items():
        text = prompts[prompt][plan.settings.text_start :] if plan.settings.repeat else []
        whole = prompts[prompt] + text
        rows_of_prompt = [position + len(text) for p, position in place.values() if p == prompt]
        assert sorted(batch.row_pos[batch.row_batch == line].tolist()) == sorted(rows_of_prompt)
        length = len(whole) if plan.settings.bidirectional else max(rows_of_prompt) + 1
        assert batch.attention_mask[line].tolist() == [True] * length + [False] * (width - length)
        assert batch.tokens[line, :length].tolist() == whole[:length]
    assert batch.attention_mask.any(0).all(), "a column of nothing but padding"


def test_a_repeated_text_by_hand(tmp_path: Path) -> None:
    lists, special = [[0, 5, 6, 7], [0, 8]], [[True, False, False, False], [True, False]]
    plan = make_plan(prompts_from_lists(lists, special), PlanSettings(repeat=True))
    assert plan.row_tokens.tolist() == [1, 2, 3, 5], "each prompt is stored once"
    (batch,) = fill(tmp_path / "a.h5", plan)
    assert batch.tokens.tolist() == [[0, 5, 6, 7, 5, 6, 7], [0, 8, 8, 0, 0, 0, 0]]
    assert batch.attention_mask.sum(-1).tolist() == [7, 3]
    assert (batch.row_batch.tolist(), batch.row_pos.tolist()) == ([0, 0, 0, 1], [4, 5, 6, 2])
    assert batch.n_tokens == 10
    bank = Bank.open(tmp_path / "a.h5")
    assert (bank.plan.settings, bank.plan.digest) == (plan.settings, plan.digest)
    assert [bank.row(i).position for i in range(4)] == [1, 2, 3, 1]


def test_a_prompt_longer_than_a_batch_is_run_alone(tmp_path: Path) -> None:
    lists = [[1, 2], [3] * 40, [4, 5]]
    plan = make_plan(prompts_from_lists(lists), PlanSettings(None))
    shapes = [tuple(batch.tokens.shape) for batch in fill(tmp_path / "a.h5", plan, batch_tokens=8)]
    assert shapes == [(1, 40), (2, 2)]


def test_batches_go_to_the_device(tmp_path: Path, plan: Plan) -> None:
    with BankWriter.create(tmp_path / "a.h5", plan, make_record(plan)) as writer:
        batch = next(iter(writer.batches("meta")))
    assert {t.device.type for t in (batch.tokens, batch.attention_mask, batch.row_batch, batch.row_pos)} == {"meta"}


@pytest.mark.parametrize("batch_tokens", [0, -1])
def test_batch_tokens_below_one_is_refused(tmp_path: Path, plan: Plan, batch_tokens: int) -> None:
    with at_most(2), pytest.raises(InvalidInputError, match=f"batch_tokens={batch_tokens}"):
        BankWriter.create(tmp_path / "a.h5", plan, make_record(plan), batch_tokens=batch_tokens)
    assert list(tmp_path.iterdir()) == []
