"""The index against a brute force over every hook name, and what may stand in one index."""

import itertools
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.models import TEXTS

import tl_latentlens as tll
from tl_latentlens.index import contextual as index_module

NAMES = ["blocks.0.hook_resid_post", "blocks.2.hook_resid_post", "blocks.5.hook_resid_post"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where this file's banks stand."""
    return tmp_path_factory.mktemp("index")


@pytest.fixture(scope="module")
def tied_bank(any_model: Any, folder: Path) -> tll.Bank:
    """Hook names that hold the very same vectors: every similarity is a tie between two of them."""
    names = ["blocks.1.hook_resid_post", "blocks.2.hook_resid_pre", "blocks.3.hook_resid_post"]
    return tll.build_bank(any_model, TEXTS, folder / "tied.h5", hook_names=names, progress=False)


@pytest.fixture(scope="module")
def mixed_bank(any_model: Any, folder: Path) -> tll.Bank:
    """Hook names of two widths."""
    names = ["blocks.0.mlp.hook_post", "blocks.0.hook_resid_post", "blocks.1.mlp.hook_post"]
    return tll.build_bank(any_model, TEXTS, folder / "mixed.h5", hook_names=names, progress=False)


def queries(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def stored(index: tll.ContextualIndex, name: str) -> dict[int, np.ndarray]:
    """Row of the index → stored vector, float64, over all banks."""
    vectors = {}
    firsts: dict[str, int] = {}
    end = 0
    for bank in index.banks:
        if bank.plan_digest not in firsts:
            firsts[bank.plan_digest], end = end, end + bank.n_rows
        first = firsts[bank.plan_digest]
        if name in bank.hook_names:
            for row, vector in enumerate(np.array(bank.vectors(name)).astype(np.float64)):
                vectors[first + row] = vector
    return vectors


def brute(
    index: tll.ContextualIndex, query: np.ndarray, top_k: int, names: list[str], center_of: str | None = None
) -> list[tuple[float, int, int]]:
    """(similarity, hook id, row), best first, by float64 over all rows at length 1; ties by hook order, then row."""
    query = query.astype(np.float64) / np.linalg.norm(query.astype(np.float64))
    if center_of is not None:
        query = query - np.mean(list(stored(index, center_of).values()), 0)
    found = []
    for name in names:
        vectors = stored(index, name)
        mean = np.mean(list(vectors.values()), 0) if index.transform == "center" else 0.0
        without_means = index.transform == "center_writing" and "hook_resid" in name
        asked = query - query.mean() if without_means else query
        asked = asked / np.linalg.norm(asked)
        for row, vector in vectors.items():
            unit = vector / np.linalg.norm(vector)
            compared = unit - (unit.mean() if without_means else mean)
            length = np.linalg.norm(compared)
            # Rounded once to float32, as the index does: a tie is a tie there.
            found.append((float(np.float32((compared * asked).sum() / length)), index.hook_names.index(name), row))
    return sorted(found, key=lambda f: (-f[0], f[1], f[2]))[:top_k]


def check(index: tll.ContextualIndex, vectors: torch.Tensor, top_k: int, names: list[str], **settings: Any) -> None:
    """Compare a search with the brute force: similarities, and ids except within float32 rounding of a tie."""
    center_of = settings.get("query_hook_name") if index.transform == "center" else None
    found = index.search(vectors, top_k, names, **settings)
    for q, query in enumerate(vectors.numpy()):
        expected = brute(index, query, top_k + 1, names, center_of)
        np.testing.assert_allclose(found.similarities[q], [e[0] for e in expected[:top_k]], atol=2e-6)
        ours = list(zip(found.hook_ids[q].tolist(), found.rows[q].tolist(), strict=True))
        values = np.array([e[0] for e in expected])
        for rank, pair in enumerate(ours):
            near = {e[1:] for e, value in zip(expected, values, strict=True) if abs(value - values[rank]) < 2e-6}
            if rank + 1 == top_k and len(near) > 1:
                continue
            assert pair in near, (q, rank)
        assert len(set(ours)) == len(ours)


def test_search_is_a_brute_force_over_all_hook_names(index: tll.ContextualIndex) -> None:
    check(index, queries(8, 256), 7, list(index.hook_names))


def test_defaults_search_everything(index: tll.ContextualIndex) -> None:
    vectors = queries(4, 256)
    everything = index.search(vectors, 6)
    named = index.search(vectors, 6, list(index.hook_names))
    assert torch.equal(everything.rows, named.rows)
    assert torch.equal(everything.hook_ids, named.hook_ids)
    assert index.search(vectors).rows.shape == (4, 5)


def test_search_of_stored_rows_finds_them(index: tll.ContextualIndex) -> None:
    (bank,) = index.banks
    for hook_id, name in enumerate(index.hook_names):
        vectors = np.array(bank.vectors(name))
        found = index.search(vectors, 1, name)
        assert found.rows[:, 0].tolist() == list(range(bank.n_rows))
        assert (found.hook_ids == hook_id).all()
        assert float(found.similarities.min()) > 1 - 2e-7  # also where rounding made a row longer or shorter


def test_ties_go_by_hook_order_then_row(tied_bank: tll.Bank) -> None:
    post, pre, other = tied_bank.hook_names
    assert (np.array(tied_bank.vectors(post)) == np.array(tied_bank.vectors(pre))).all()
    vectors = queries(20, 256)
    for names, asked_of in itertools.product((None, [pre, post, other], [other, pre, post]), (None, pre, post)):
        index = tll.ContextualIndex(tied_bank, names, device="cpu")
        found = index.search(vectors, 9, query_hook_name=asked_of)
        first, second = sorted((index.hook_names.index(post), index.hook_names.index(pre)))
        ties = 0
        for q in range(len(vectors)):
            parts = (-found.similarities, found.hook_ids, found.rows)
            order = list(zip(*(part[q].tolist() for part in parts), strict=True))
            assert order == sorted(order)
            for a, b in pairwise(order):
                if a[2] == b[2] and a[0] == b[0]:
                    ties += 1
                    assert (a[1], b[1]) == (first, second)
            expected = brute(index, vectors[q].numpy(), 9, list(index.hook_names))
            np.testing.assert_allclose([-o[0] for o in order], [e[0] for e in expected], atol=2e-6)
        assert ties > 20


def test_search_does_not_depend_on_settings(index: tll.ContextualIndex, bank: tll.Bank) -> None:
    vectors = queries(30, 256)
    expected = index.search(vectors, 5)
    for settings in ({"memory_budget": 200_000}, {"dtype": "float16"}, {"dtype": "bfloat16"}):
        found = tll.ContextualIndex(bank, device="cpu", **settings).search(vectors, 5)
        assert torch.equal(found.rows, expected.rows)
        assert torch.equal(found.hook_ids, expected.hook_ids)
        assert torch.equal(found.similarities, expected.similarities)


def test_hook_names_narrow(index: tll.ContextualIndex, bank: tll.Bank) -> None:
    vectors = queries(5, 256)
    last, first = index.hook_names[-1], index.hook_names[0]
    check(index, vectors, 4, [last, first])
    assert (index.search(vectors, 4, last).hook_ids == len(index.hook_names) - 1).all()
    narrow = tll.ContextualIndex(bank, [last], device="cpu")
    assert narrow.hook_names == (last,)
    assert torch.equal(narrow.search(vectors, 4).rows, index.search(vectors, 4, [last]).rows)
    assert {n.hook_name for found in narrow.search(vectors, 4).neighbors() for n in found} == {last}
    with pytest.raises(tll.UnknownHookError, match=rf"the index has no hook name '{first}'; it has \['{last}'\]"):
        narrow.search(vectors, 4, first)
    with pytest.raises(tll.UnknownHookError, match=r"the index has no hook name 'nowhere'"):
        tll.ContextualIndex(bank, ["nowhere"])


def test_one_name_as_a_string(bank: tll.Bank) -> None:
    """search and latentlens_hooks take a name as a string; so does the index."""
    name = bank.hook_names[1]
    assert tll.ContextualIndex(bank, name, device="cpu").hook_names == (name,)


def test_mixed_widths(mixed_bank: tll.Bank) -> None:
    index = tll.ContextualIndex(mixed_bank, device="cpu")
    wide = [name for name in index.hook_names if "mlp" in name]
    assert [index.d(name) for name in index.hook_names] == [1024, 256, 1024]
    check(index, queries(4, 256), 5, ["blocks.0.hook_resid_post"])
    check(index, queries(4, 1024), 5, wide)
    assert (index.search(queries(4, 256), 5).hook_ids == 1).all()
    assert set(index.search(queries(4, 1024), 30).hook_ids.flatten().tolist()) <= {0, 2}
    with pytest.raises(tll.InvalidInputError, match=r"width 7 \(shape \(2, 7\)\); the index has width \[256, 1024\]"):
        index.search(torch.ones(2, 7))
    with pytest.raises(tll.InvalidInputError, match=r"got vectors of width 256 .*the index has width \[1024\]"):
        index.search(queries(4, 256), hook_names=wide)


def test_center_is_a_brute_force(bank: tll.Bank) -> None:
    index = tll.ContextualIndex(bank, NAMES, device="cpu", transform="center")
    raw = tll.ContextualIndex(bank, NAMES, device="cpu")
    assert raw.transform == "raw"
    vectors = torch.from_numpy(np.array(bank.vectors(NAMES[1]))[:6].astype(np.float32)) + 0.02 * queries(6, 256)
    check(index, vectors, 5, NAMES)
    check(index, vectors, 5, NAMES, query_hook_name=NAMES[1])
    centred = index.search(vectors, 5, query_hook_name=NAMES[1])
    assert not torch.allclose(centred.similarities, index.search(vectors, 5).similarities, atol=1e-3)
    assert not torch.allclose(centred.similarities, raw.search(vectors, 5).similarities, atol=1e-3)
    assert torch.equal(raw.search(vectors, 5, query_hook_name=NAMES[1]).similarities, raw.search(vectors, 5).similarities)


def test_center_refusals(mixed_bank: tll.Bank) -> None:
    index = tll.ContextualIndex(mixed_bank, device="cpu", transform="center")
    with pytest.raises(tll.UnknownHookError, match="the index has no hook name 'nowhere'"):
        index.search(queries(2, 256), query_hook_name="nowhere")
    with pytest.raises(tll.InvalidInputError, match="1024"):
        index.search(queries(2, 256), query_hook_name="blocks.0.mlp.hook_post")
    with pytest.raises(
        tll.InvalidInputError, match=r"got transform='whiten'; expected 'auto' or one of \['raw', 'center', 'standardize'"
    ):
        tll.ContextualIndex(mixed_bank, transform="whiten")


@pytest.fixture(scope="module")
def two_corpora(any_model: Any, folder: Path) -> list[tll.Bank]:
    """Two banks of different texts."""
    return [
        tll.build_bank(any_model, texts, folder / f"corpus{i}.h5", hook_names=NAMES, progress=False)
        for i, texts in enumerate((TEXTS[:2], TEXTS[2:]))
    ]


@pytest.mark.parametrize("transform", ["raw", "center"])
def test_a_list_of_banks(two_corpora: list[tll.Bank], transform: str) -> None:
    index = tll.ContextualIndex([two_corpora[0].path, two_corpora[1]], device="cpu", transform=transform)
    n_first = two_corpora[0].n_rows
    assert index.n_rows == n_first + two_corpora[1].n_rows
    check(index, queries(10, 256), 6, NAMES)
    for row in (0, n_first - 1, n_first, index.n_rows - 1):
        bank, own = (two_corpora[0], row) if row < n_first else (two_corpora[1], row - n_first)
        assert index.row(row).context() == bank.row(own).context()
        assert index.neighbor(row, 0, 0.5).row == row
    with pytest.raises(tll.InvalidInputError, match=rf"got row {index.n_rows}; the index has rows 0 to {index.n_rows - 1}"):
        index.row(index.n_rows)
    with pytest.raises(tll.InvalidInputError, match="empty list of banks"):
        tll.ContextualIndex([])


def test_banks_of_one_plan_share_rows(any_model: Any, folder: Path, bank: tll.Bank) -> None:
    parts = [
        tll.build_bank(any_model, TEXTS, folder / f"part{i}.h5", hook_names=[name], progress=False)
        for i, name in enumerate(NAMES)
    ]
    index = tll.ContextualIndex(parts, device="cpu")
    whole = tll.ContextualIndex(bank, NAMES, device="cpu")
    assert index.n_rows == whole.n_rows == bank.n_rows
    assert index.hook_names == whole.hook_names
    vectors = queries(6, 256)
    ours, theirs = index.search(vectors, 8), whole.search(vectors, 8)
    np.testing.assert_allclose(ours.similarities, theirs.similarities, atol=1e-4)
    assert [n.context for n in ours.neighbors()[0]][:1] == [n.context for n in theirs.neighbors()[0]][:1]
    check(index, vectors, 8, NAMES)


def test_a_bank_given_twice_counts_once(bank: tll.Bank) -> None:
    index = tll.ContextualIndex([bank, bank], device="cpu")
    once = tll.ContextualIndex(bank, device="cpu")
    assert index.n_rows == once.n_rows
    vectors = queries(3, 256)
    assert torch.equal(index.search(vectors, 4).rows, once.search(vectors, 4).rows)
    assert torch.equal(index.search(vectors, 4).hook_ids, once.search(vectors, 4).hook_ids)


def test_ties_across_banks_go_by_row(any_model: Any, folder: Path) -> None:
    """The second bank's rows stand behind the first plan's, also for a hook name that only a third bank has of it."""
    x, y = NAMES[:2]
    banks = [
        tll.build_bank(any_model, TEXTS, folder / f"t{i}.h5", hook_names=names, max_rows_per_token=cap, progress=False)
        for i, (names, cap) in enumerate((([x], 50), ([x, y], 49), ([y], 50)))
    ]
    n = banks[0].n_rows
    assert banks[1].n_rows == n
    index = tll.ContextualIndex(banks, device="cpu")
    assert index.n_rows == 2 * n
    found = index.search(queries(10, 256), 6, y)
    for similarities, rows in zip(found.similarities.tolist(), found.rows.tolist(), strict=True):
        order = list(zip([-s for s in similarities], rows, strict=True))
        assert order == sorted(order)
        assert any(a[0] == b[0] for a, b in pairwise(order))


def test_banks_of_different_models_are_refused(bank: tll.Bank, folder: Path) -> None:
    model = tll.load_demo_model().to(torch.bfloat16)
    other = tll.build_bank(model, TEXTS[:3], folder / "other.h5", hook_names=NAMES, progress=False)
    with pytest.raises(tll.ModelMismatchError, match=r"banks of different models: .*'float32'.* and .*'bfloat16'") as refused:
        tll.ContextualIndex([bank, other], device="cpu")
    with pytest.warns(UserWarning, match="banks of different models") as warned:
        index = tll.ContextualIndex([bank, other], device="cpu", allow_mismatch=True)
    assert [str(w.message) for w in warned] == [str(refused.value)]
    check(index, queries(3, 256), 4, NAMES)


@pytest.mark.parametrize(("value", "kind"), [(float("nan"), "NaN or inf"), (float("inf"), "NaN or inf"), (0.0, "zero")])
def test_queries_that_cannot_be_compared(index: tll.ContextualIndex, value: float, kind: str) -> None:
    vectors = queries(2, 3, 256)
    vectors[1, 2] = value
    with pytest.raises(tll.InvalidInputError, match=rf"1 of \d+ queries cannot be .*: the query at index \(1, 2\) is {kind}"):
        index.search(vectors)


def test_another_width(index: tll.ContextualIndex) -> None:
    with pytest.raises(tll.InvalidInputError, match=r"width 100 \(shape \(4, 100\)\); the index has width \[256\]"):
        index.search(torch.randn(4, 100))
    with pytest.raises(tll.InvalidInputError, match="width"):
        index.search(torch.tensor(1.0))


def test_top_k_beyond_the_rows(bank: tll.Bank) -> None:
    index = tll.ContextualIndex(bank, NAMES[:2], device="cpu")
    found = index.search(queries(2, 256), 10**6)
    assert found.rows.shape == (2, 2 * bank.n_rows)
    pairs = set(zip(found.hook_ids[0].tolist(), found.rows[0].tolist(), strict=True))
    assert len(pairs) == 2 * bank.n_rows
    assert (found.similarities.diff(dim=-1) <= 0).all()
    assert index.search(queries(2, 256), bank.n_rows + 3).rows.shape == (2, bank.n_rows + 3)
    with pytest.raises(tll.InvalidInputError, match="got top_k=0; expected at least 1"):
        index.search(queries(2, 256), 0)


def test_shapes_and_neighbors(index: tll.ContextualIndex) -> None:
    vectors = queries(2, 3, 256)
    found = index.search(vectors, 4)
    assert found.rows.shape == found.similarities.shape == found.hook_ids.shape == (2, 3, 4)
    nested = found.neighbors()
    assert (len(nested), len(nested[0]), len(nested[0][0])) == (2, 3, 4)
    for i in range(2):
        for j in range(3):
            single = index.search(vectors[i, j], 4)
            assert single.rows.shape == (4,)
            assert torch.equal(single.rows, found.rows[i, j])
            assert single.neighbors() == nested[i][j] == found.neighbors_of(3 * i + j)
            for neighbor, row, hook in zip(nested[i][j], found.rows[i, j].tolist(), found.hook_ids[i, j].tolist(), strict=True):
                stored_row = index.banks[0].row(row)
                assert (neighbor.row, neighbor.hook_name) == (row, index.hook_names[hook])
                assert (neighbor.token, neighbor.context) == (stored_row.token, stored_row.context())
    deep = index.search(queries(2, 1, 3, 256), 2).neighbors()
    assert (len(deep), len(deep[0]), len(deep[0][0]), len(deep[0][0][0])) == (2, 1, 3, 2)
    assert index.search(torch.zeros(0, 256), 2).neighbors() == []
    assert index.search(torch.zeros(2, 0, 256), 2).neighbors() == [[], []]


def test_queries_of_any_length_and_kind(index: tll.ContextualIndex) -> None:
    vectors = queries(3, 256)
    expected = index.search(vectors, 4)
    for same in (vectors * 1e4, vectors * 1e-4, vectors.double(), vectors.numpy(), vectors.clone().requires_grad_()):
        assert torch.equal(index.search(same, 4).rows, expected.rows)


def test_token_ids_and_prompts_of_all_rows(two_corpora: list[tll.Bank]) -> None:
    index = tll.ContextualIndex(two_corpora, device="cpu")
    rows = [index.row(row) for row in range(index.n_rows)]
    assert index.bank_rows.token_ids().tolist() == [row.token_id for row in rows]
    prompts = [row.bank.prompt(row.prompt_index) for row in rows]
    for ahead in (1, 3):
        after = [(prompt[row.position + ahead :] or [-1])[0] for row, prompt in zip(rows, prompts, strict=True)]
        assert index.bank_rows.token_ids(ahead).tolist() == after
    shifted = [row.prompt_index + two_corpora[0].plan.n_prompts * (row.bank is two_corpora[1]) for row in rows]
    assert index.bank_rows.prompts.tolist() == shifted


def test_repr_names_what_is_in_it(index: tll.ContextualIndex) -> None:
    text = repr(index)
    assert f"{index.n_rows} rows" in text
    assert "blocks.0.hook_resid_post" in text


# Activations without their means


OUTSIDE = ["blocks.1.attn.hook_z", "blocks.0.mlp.hook_post"]


@pytest.fixture(scope="module")
def written() -> dict[str, Any]:
    """The embedded model with a mean in its residual stream, raw and with center_writing_weights."""
    models = {"raw": tll.load_demo_model(), "centred": tll.load_demo_model()}
    for model in models.values():
        with torch.no_grad():
            model.W_pos.add_(8.0)
    off = dict.fromkeys(("fold_ln", "center_unembed", "fold_value_biases"), False)
    if hasattr(models["centred"], "load_and_process_state_dict"):
        models["centred"].load_and_process_state_dict(models["centred"].state_dict(), center_writing_weights=True, **off)
    else:
        models["centred"].process_weights(center_writing_weights=True, **off)
    return models


@pytest.fixture(scope="module")
def written_banks(written: dict[str, Any], folder: Path) -> dict[tuple[str, str], tll.Bank]:
    """Banks of both, by how they are stored."""
    return {
        (which, dtype): tll.build_bank(
            model, TEXTS, folder / f"{which}-{dtype}.h5", hook_names=[*NAMES, *OUTSIDE], dtype=dtype, progress=False
        )
        for which, model in written.items()
        for dtype in ("float16", "float32")
    }


def activations(model: Any, name: str) -> torch.Tensor:
    """What the model gives for a text that no bank of this file holds."""
    return model.run_with_cache("The old man sat by the red bridge and looked at the storm.")[1][name][0, 1:].detach()


def stretch(bank: tll.Bank, name: str) -> float:
    """How much longer a stored vector is than what is left of it without its mean; rounding grows by it."""
    rows = np.array(bank.vectors(name)).astype(np.float64)
    return float((1 / np.linalg.norm(rows - rows.mean(-1, keepdims=True), axis=-1)).max())


@pytest.mark.parametrize(("dtype", "unit"), [("float16", 2.0**-11 + 16 * 2.0**-25), ("float32", 2.0**-21)])
@pytest.mark.parametrize("asked", ["raw", "centred"])
@pytest.mark.parametrize("held", ["raw", "centred"])
def test_center_writing_is_a_search_among_centred_activations(
    written: dict[str, Any], written_banks: dict[tuple[str, str], tll.Bank], held: str, asked: str, dtype: str, unit: float
) -> None:
    plain = tll.ContextualIndex(written_banks["centred", dtype], device="cpu")
    index = tll.ContextualIndex(written_banks[held, dtype], device="cpu", transform="center_writing")
    assert plain.transform == "raw"
    for model in written.values():
        index.check_model(model)
    name = NAMES[1]
    within = 2 * unit * max(stretch(written_banks[held, dtype], name) for name in NAMES) + 1e-6
    assert stretch(written_banks["raw", dtype], name) > 1.5
    expected = plain.search(activations(written["centred"], name), 6, NAMES)
    found = index.search(activations(written[asked], name), 6, NAMES)
    np.testing.assert_allclose(found.similarities, expected.similarities, atol=within)
    gaps = torch.nn.functional.pad(-expected.similarities.diff(dim=-1), (1, 0), value=1.0)
    clear = torch.minimum(gaps[:, :-1], gaps[:, 1:]) > 2 * within
    assert clear.float().mean() > 0.4
    assert torch.equal(found.rows[:, :-1][clear], expected.rows[:, :-1][clear])
    assert torch.equal(found.hook_ids[:, :-1][clear], expected.hook_ids[:, :-1][clear])
    check(index, activations(written[asked], name), 6, NAMES)
    if (held, asked) != ("centred", "centred"):
        unasked = tll.ContextualIndex(written_banks[held, dtype], device="cpu").search(
            activations(written[asked], name), 6, NAMES
        )
        assert not torch.allclose(unasked.similarities, expected.similarities, atol=1e-2)


def test_center_writing_leaves_what_is_outside_the_residual_stream(
    written: dict[str, Any], written_banks: dict[tuple[str, str], tll.Bank]
) -> None:
    bank = written_banks["raw", "float16"]
    index, raw = (tll.ContextualIndex(bank, device="cpu", transform=transform) for transform in ("center_writing", "raw"))
    for name in [*OUTSIDE, NAMES[0]]:
        vectors = activations(written["raw"], name).flatten(1) + 1.0
        found, expected = index.search(vectors, 5, name), raw.search(vectors, 5, name)
        assert torch.equal(found.similarities, expected.similarities) == (name in OUTSIDE)
        assert torch.equal(found.rows, expected.rows) or name not in OUTSIDE
    check(index, queries(4, 256) + 1, 6, [NAMES[0], OUTSIDE[0]])  # as wide as the residual stream, and ranked with it


def test_raw_and_centred_banks_in_one_index(written: dict[str, Any], folder: Path) -> None:
    parts = {
        (which, half): tll.build_bank(
            model, texts, folder / f"half-{which}-{half}.h5", hook_names=NAMES, dtype="float32", progress=False
        )
        for which, model in written.items()
        for half, texts in enumerate((TEXTS[:3], TEXTS[3:]))
    }
    mixed, alike = ([parts["raw", 0], parts["centred", 1]], [parts["raw", 0], parts["raw", 1]])
    for transform in ("auto", "raw", "center"):
        with pytest.raises(tll.ModelMismatchError, match="banks of different models"):
            tll.ContextualIndex(mixed, device="cpu", transform=transform)
    index, expected = (tll.ContextualIndex(banks, device="cpu", transform="center_writing") for banks in (mixed, alike))
    vectors = activations(written["raw"], NAMES[1])
    found, expected = index.search(vectors, 6), expected.search(vectors, 6)
    np.testing.assert_allclose(found.similarities, expected.similarities, atol=1e-5)
    assert (found.rows == expected.rows).float().mean() > 0.9
    assert (found.rows >= parts["raw", 0].n_rows).any()
    for model in written.values():
        index.check_model(model)


def test_center_writing_names_a_query_that_is_nothing_but_its_mean(written_banks: dict[tuple[str, str], tll.Bank]) -> None:
    index = tll.ContextualIndex(written_banks["raw", "float16"], NAMES, device="cpu", transform="center_writing")
    vectors = queries(2, 3, 256)
    vectors[1, 0] = 0.3
    with pytest.raises(tll.InvalidInputError, match=r"1 of \d+ queries cannot be .*: the query at index \(1, 0\) is zero"):
        index.search(vectors)


# The model


def test_a_model_is_checked_once(any_model: Any, bank: tll.Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(index_module, "check_fingerprint", lambda *arguments, **settings: calls.append(settings))
    index = tll.ContextualIndex([bank, bank], device="cpu")
    index.check_model(any_model)
    index.check_model(any_model)
    assert len(calls) == 2
    index.check_model(any_model, force=True)
    index.check_model(tll.load_demo_model())
    assert len(calls) == 6
    assert not any(settings["without_means"] for settings in calls)
