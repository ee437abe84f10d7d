"""What a run found, as data: cells and data frames."""

from dataclasses import FrozenInstanceError
from typing import Any

import numpy as np
import pytest

import tl_latentlens as tll

PAIR = ["The red ball lay on the river bank.", "A small boat."]
COLUMNS = [
    "hook_name", "batch", "pos", "token", "rank", "neighbor", "similarity", "context",
    "neighbor_hook_name",
    "neighbor_hook_names", "neighbor_row", "neighbor_prompt_index", "neighbor_position",
]  # fmt: skip


@pytest.fixture(scope="module")
def result(any_model: Any, index: tll.ContextualIndex) -> tll.LensResult:
    """Two prompts at two hook names, all lenses."""
    hooks = tll.latentlens_hooks(index, [index.hook_names[3], index.hook_names[0]], top_k=3, embedding_lens=True)
    any_model.run_with_hooks(any_model.to_tokens(PAIR, padding_side="right"), fwd_hooks=hooks)
    return hooks.result


def lengths(model: Any) -> list[int]:
    return [model.to_tokens(text).shape[1] for text in PAIR]


def test_cells_in_order(result: tll.LensResult, any_model: Any, index: tll.ContextualIndex) -> None:
    first, second = lengths(any_model)
    places = [(0, p) for p in range(1, first)] + [(1, p) for p in range(1, second)]
    assert [tuple(place) for place in result.positions.tolist()] == places
    # Hook names stand in forward order, however they were asked for.
    assert list(result.hook_names) == [index.hook_names[0], index.hook_names[3]]
    everywhere = [(name, *place) for name in result.hook_names for place in places]
    assert [(c.hook_name, c.batch, c.pos) for c in result.cells()] == everywhere
    assert "".join(c.token for c in result.cells() if c.batch == 1 and c.hook_name == result.hook_names[0]) == PAIR[1]


def test_cell(result: tll.LensResult, any_model: Any, index: tll.ContextualIndex) -> None:
    first, _ = lengths(any_model)
    name = result.hook_names[1]
    cell = result.cell(name, 2, batch=1)
    assert (cell.hook_name, cell.batch, cell.pos, cell.token) == (name, 1, 2, result.tokens[1][2])
    assert len(cell.neighbors) == len(cell.logit_lens) == len(cell.embedding_lens) == 3
    assert all(0 <= probability <= 1 and isinstance(token, str) for token, probability in cell.logit_lens)
    at = [c for c in result.cells() if (c.hook_name, c.batch, c.pos) == (name, 1, 2)]
    assert at == [cell]
    assert result.cell(name, -1) == result.cell(name, first - 1)
    flat = result.positions.tolist().index([1, 2])
    assert [n.row for n in cell.neighbors] == result.found[name].rows[flat].tolist()
    reading = result.logit_lens[name]
    assert cell.logit_lens == list(zip(reading.tokens(flat), reading.scores[flat].tolist(), strict=True))


def test_cell_refusals(result: tll.LensResult, index: tll.ContextualIndex) -> None:
    name = result.hook_names[0]
    with pytest.raises(tll.UnknownHookError, match=rf"'{index.hook_names[1]}' was not decoded; decoded hook names: \['{name}'"):
        result.cell(index.hook_names[1], 2)
    n_texts, n_positions = result.decoded.shape
    for pos, batch in ((0, 0), (-1, 1)):
        with pytest.raises(
            tll.InvalidInputError, match=rf"batch {batch}, position \d+ was not decoded; decoded of this text: 1 to"
        ):
            result.cell(name, pos, batch)
    outside = rf"was not decoded: the run had {n_texts} texts of {n_positions} positions$"
    for pos, batch in ((99, 0), (-99, 0), (2, 5)):
        with pytest.raises(tll.InvalidInputError, match=outside):
            result.cell(name, pos, batch)


def test_dataframe(result: tll.LensResult, any_model: Any) -> None:
    frame = result.to_dataframe()
    lens_columns = ["logit_token", "logit_probability", "embedding_token", "embedding_similarity"]
    figures = ["known", "use_chance", "words", "around"]
    assert list(frame.columns) == COLUMNS + figures + lens_columns
    assert len(frame) == 2 * (sum(lengths(any_model)) - 2) * 3
    assert frame["rank"].tolist() == [1, 2, 3] * (len(frame) // 3)
    for line in (0, 4, len(frame) - 1):
        row = frame.iloc[line]
        cell = result.cell(row.hook_name, int(row.pos), int(row.batch))
        neighbor = cell.neighbors[int(row["rank"]) - 1]
        assert (row.token, row.neighbor, row.context) == (cell.token, neighbor.token, neighbor.context)
        assert row.similarity == neighbor.similarity
        assert (row.neighbor_hook_name, row.neighbor_row) == (neighbor.hook_name, neighbor.row)
        assert (row.neighbor_prompt_index, row.neighbor_position) == (neighbor.prompt_index, neighbor.position)
        assert (row.logit_token, row.logit_probability) == cell.logit_lens[int(row["rank"]) - 1]
        assert (row.embedding_token, row.embedding_similarity) == cell.embedding_lens[int(row["rank"]) - 1]


def test_dataframe_without_lenses(any_model: Any, index: tll.ContextualIndex) -> None:
    hooks = tll.latentlens_hooks(
        index, index.hook_names[0], logit_lens=False, top_k=10**5, positions=-1, words=0, calibrate=False, distinct=False
    )
    any_model.run_with_hooks(PAIR[1], fwd_hooks=hooks)
    frame = hooks.result.to_dataframe()
    assert list(frame.columns) == COLUMNS
    assert len(frame) == index.n_rows * len(index.hook_names)  # every row of the index, and no more


def test_similarities_are_cosines_best_first(result: tll.LensResult) -> None:
    for cell in result.cells():
        found = [n.similarity for n in cell.neighbors]
        assert found == sorted(found, reverse=True)
        assert all(-1 <= s <= 1 for s in found)
        probabilities = [p for _, p in cell.logit_lens]
        assert probabilities == sorted(probabilities, reverse=True)


def test_context_marks_the_token(result: tll.LensResult) -> None:
    for cell in result.cells():
        for neighbor in cell.neighbors:
            assert neighbor.context.count("«") == neighbor.context.count("»") == 1
            assert neighbor.context.split("«")[1].split("»")[0] == neighbor.token.strip()


def test_results_are_frozen(result: tll.LensResult) -> None:
    with pytest.raises(FrozenInstanceError):
        result.tokens = None
    with pytest.raises(FrozenInstanceError):
        result.cells()[0].neighbors[0].similarity = 1.0
    assert "found" not in repr(result)
    assert isinstance(result.decoded, np.ndarray)
