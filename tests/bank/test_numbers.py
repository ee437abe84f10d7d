"""Bad numbers and extreme ones: what cannot be a direction is refused by name, and all else is banked as it is."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tl_latentlens as tll
from tl_latentlens.bank.batches import Batch
from tl_latentlens.bank.format import ModelRecord, partial_path
from tl_latentlens.model.fingerprint import Fingerprint
from tl_latentlens.model.info import ModelInfo

HOOK = "blocks.0.hook_resid_post"
LENGTH = 4  # tokens of each prompt
DTYPES = ["float16", "bfloat16", "float32"]
TINY = float(np.finfo(np.float32).tiny)


def bound(dtype: str, d: int) -> float:
    """Most that storage moves a unit vector, and so any cosine with it.

    Rounding moves a component x by at most u |x|, half the spacing of numbers at x, or in float16 by half its smallest number
    where that is more: |ṽ - v| <= u |v| + sqrt(d) 2^-25. Division and length in float32 are within the slack that u / (1 + u)
    leaves; stored in float32 they are all there is.
    """
    return {"float16": 2.0**-11 + d**0.5 * 2.0**-25, "bfloat16": 2.0**-8, "float32": 2.0**-23}[dtype]


def fill(
    path: Path,
    rows: np.ndarray | torch.Tensor,
    *,
    dtype: str = "float16",
    change: Callable[[Batch, torch.Tensor], object] | None = None,
) -> tll.Bank:
    """A bank whose row i is the direction of `rows[i]`, through the hooks that a model would call."""
    rows = torch.as_tensor(rows)
    n = len(rows)
    plan = tll.make_plan(tll.prompts_from_lists([range(1, n + 1)[at : at + LENGTH] for at in range(0, n, LENGTH)]))
    assert plan.n_rows == n
    info = ModelInfo("none", "HookedTransformer", 1, rows.shape[1], n + 1, 64, "float32", False, "0" * 64)
    known = Fingerprint(((1,),), {HOOK: np.ones((1, rows.shape[1]), np.float32)})
    texts = {int(i): f" {i}".encode() for i in np.unique(plan.tokens)}
    with tll.BankWriter.create(
        path, plan, ModelRecord(info, {HOOK: rows.shape[1]}, known, texts), dtype=dtype, batch_tokens=2 * LENGTH
    ) as writer:
        for batch in writer.batches():
            activation = torch.full((*batch.tokens.shape, rows.shape[1]), torch.nan, dtype=rows.dtype)  # padding is never read
            activation[batch.row_batch, batch.row_pos] = rows[batch.rows]
            for _, hook_fn in tll.bank_hooks(writer, batch):
                hook_fn(activation, hook=None)
    return tll.Bank.open(path)


def recorded(rows: torch.Tensor, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """The stored vectors, float64, and the norms of activations, by the hook alone."""
    given: list[torch.Tensor] = []
    writer: Any = SimpleNamespace(hook_names=(HOOK,), dtype=dtype, write=lambda name, batch, *parts: given.extend(parts))
    n = len(rows)
    at = torch.arange(n)
    batch = Batch(torch.zeros((1, n), dtype=torch.long), torch.ones((1, n), dtype=torch.bool), at.numpy(), 0 * at, at, 0, n)
    ((_, hook_fn),) = tll.bank_hooks(writer, batch)
    hook_fn(rows[None], hook=None)
    vectors, norms = given
    assert vectors.dtype == getattr(torch, dtype)
    assert norms.dtype == torch.float32
    return vectors.double().numpy(), norms.numpy()


def unit(rows: np.ndarray | torch.Tensor) -> np.ndarray:
    rows = np.asarray(rows, np.float64)
    largest = np.abs(rows).max(-1, keepdims=True)
    return rows / largest / np.linalg.norm(rows / largest, axis=-1, keepdims=True)


def gaussian(n: int, d: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, d))


# Refused


@pytest.mark.parametrize(
    ("value", "norm"),
    [
        (torch.nan, "nan"),
        (torch.inf, "inf"),
        (-torch.inf, "inf"),
        (0.0, r"0\.0"),
        (1e-40, r"3\.\d+e-40"),  # float32 holds it, with fewer digits
        (2.0**-149, r"4\.\d+e-45"),
        (3.4e38, "inf"),  # finite, but the length is not
    ],
)
@pytest.mark.usefixtures("small_blocks")
def test_what_has_no_direction_is_named_and_the_rest_kept(tmp_path: Path, value: float, norm: str) -> None:
    rows = gaussian(30, 12)
    bad = rows.copy()
    bad[22] = value  # prompt 5, position 2: the third block of four
    path = tmp_path / "a.h5"
    with pytest.raises(
        tll.InvalidInputError,
        match=rf"^{HOOK}: 1 activations are NaN, inf or zero, the first at prompt 5, position 2 \(norm {norm}\); a bank holds "
        "directions, so check the model's dtype and weights, or leave this hook name out$",
    ):
        fill(path, torch.from_numpy(bad).float())
    assert [file.name for file in tmp_path.iterdir()] == [partial_path(path).name]
    shown: list[int] = []
    plain = tll.BankWriter.batches

    def watched(writer: tll.BankWriter, device: Any = None) -> Any:
        for batch in plain(writer, device):
            shown.append(batch.block)
            yield batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tll.BankWriter, "batches", watched)
        bank = fill(path, torch.from_numpy(rows).float())
    assert shown == [2, 3], "finished blocks were run again, or an unfinished one was not"
    np.testing.assert_allclose(np.array(bank.vectors(HOOK)), unit(rows), atol=1e-3)


@pytest.mark.parametrize("where", [0, 7, 11])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_one_component_is_enough(tmp_path: Path, bad: float, where: int) -> None:
    rows = torch.from_numpy(gaussian(5, 12)).float()
    rows[4, where] = bad
    with pytest.raises(tll.InvalidInputError, match=r"1 activations are .* at prompt 1, position 0 \(norm (nan|inf)\)"):
        fill(tmp_path / "a.h5", rows)
    assert not (tmp_path / "a.h5").exists()


def test_activations_of_double_precision_past_float32_are_refused(tmp_path: Path) -> None:
    rows = torch.from_numpy(gaussian(3, 4))
    rows[1] *= 1e39
    with pytest.raises(tll.InvalidInputError, match=r"1 activations are .* at prompt 0, position 1 \(norm inf\)"):
        fill(tmp_path / "a.h5", rows)


# Banked, however large or small


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [2 * TINY, 1e-36, 1e-30, 1e-20, 1.0, 65504.0, 65520.0, 1e5, 1e19, 1e30, 3.3e38])
def test_activations_of_any_length_are_banked_exactly(tmp_path: Path, dtype: str, length: float) -> None:
    """Past float16's range at the top; at the bottom components of 1e-38 and less, whose squares vanish in float32."""
    rows = torch.from_numpy(length * unit(gaussian(6, 40))).float()
    bank = fill(tmp_path / "a.h5", rows, dtype=dtype)
    np.testing.assert_allclose(bank.norms(HOOK), np.linalg.norm(rows.double(), axis=-1), rtol=2.0**-24)
    away = np.linalg.norm(bank.vectors(HOOK).astype(np.float64) - unit(rows), axis=-1)
    assert away.max() <= bound(dtype, 40)


def test_one_component_at_the_edge_of_float32(tmp_path: Path) -> None:
    largest, smallest = float(np.finfo(np.float32).max), 2.0**-149
    rows = torch.tensor([[largest, 0, 0], [-largest, 1, smallest], [TINY, 0, 0], [TINY, smallest, 0], [0, 0, -TINY]])
    bank = fill(tmp_path / "a.h5", rows)
    assert bank.norms(HOOK).tolist() == [largest, largest, TINY, TINY, TINY]
    assert bank.vectors(HOOK).tolist() == [[1, 0, 0], [-1, 0, 0], [1, 0, 0], [1, 2.0**-23, 0], [0, 0, -1]]
    found = tll.ContextualIndex(bank, device="cpu").search(torch.eye(3), 5)
    assert found.rows.tolist() == [[0, 2, 3, 4, 1], [3, 0, 1, 2, 4], [0, 1, 2, 3, 4]]
    assert found.similarities.tolist() == [[1, 1, 1, 0, -1], [2.0**-23, 0, 0, 0, 0], [0, 0, 0, 0, -1]]


def test_half_precision_activations_are_not_rounded_twice(tmp_path: Path) -> None:
    for kind in (torch.float16, torch.bfloat16):
        rows = torch.from_numpy(1000 * gaussian(5, 30)).to(kind)
        vectors, norms = recorded(rows, "float32")
        np.testing.assert_allclose(norms, np.linalg.norm(rows.double(), axis=-1), rtol=2.0**-24)
        assert np.linalg.norm(vectors - unit(rows.double()), axis=-1).max() <= bound("float32", 30)


# Dimensions and rows that never change


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("small_blocks")
def test_a_constant_dimension_has_deviation_zero(tmp_path: Path, dtype: str) -> None:
    rows = np.zeros((30, 6))
    rows[:, 0] = 3  # and 4 elsewhere: the length is 5, and 0.6 is stored in every row
    rows[np.arange(30), 1 + np.arange(30) % 5] = 4 * (-1.0) ** np.arange(30)
    rows *= 2.0 ** np.random.default_rng(0).integers(-20, 20, (30, 1))
    bank = fill(tmp_path / "a.h5", rows.astype(np.float32), dtype=dtype)
    stored = bank.vectors(HOOK).astype(np.float64)
    assert len(bank.blocks()) == 4
    assert len(set(stored[:, 0])) == 1
    assert bank.std(HOOK)[0] == 0
    assert bank.mean(HOOK)[0] == stored[0, 0]
    assert (bank.std(HOOK)[1:] > 0.1).all()
    np.testing.assert_allclose(bank.mean(HOOK), stored.mean(0), atol=1e-15)
    np.testing.assert_allclose(bank.std(HOOK), stored.std(0), atol=1e-15)


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_rows_have_no_deviation_and_nothing_left_when_centered(tmp_path: Path, dtype: str) -> None:
    row = gaussian(1, 9)
    bank = fill(tmp_path / "a.h5", torch.from_numpy(np.repeat(row, 7, 0)).float(), dtype=dtype)
    assert bank.std(HOOK).tolist() == [0] * 9
    assert bank.mean(HOOK).tolist() == bank.vectors(HOOK)[0].astype(np.float64).tolist()
    queries = np.concatenate([row, gaussian(3, 9, seed=1)])
    for center_of in (None, HOOK):
        found = tll.ContextualIndex(bank, device="cpu", transform="center").search(queries[1:], 7, query_hook_name=center_of)
        assert not found.similarities.any()
        assert found.rows.tolist() == [list(range(7))] * 3
    plain = tll.ContextualIndex(bank, device="cpu").search(queries, 7)
    assert plain.similarities[0].tolist() == pytest.approx([1] * 7, abs=2 * bound(dtype, 9))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_that_is_nothing_but_its_mean_has_similarity_zero(tmp_path: Path, dtype: str) -> None:
    rows = gaussian(9, 10) + 0.5
    rows[[2, 6]] = [[0.7], [-3.0]]
    bank = fill(tmp_path / "a.h5", torch.from_numpy(rows).float(), dtype=dtype)
    found = tll.ContextualIndex(bank, device="cpu", transform="center_writing").search(gaussian(4, 10, seed=2), 9)
    constant = (found.rows == 2) | (found.rows == 6)
    assert constant.sum() == 8
    assert not found.similarities[constant].any()
    assert found.similarities[~constant].all()


# What storage does to a cosine


@st.composite
def activation(draw: st.DrawFn) -> np.ndarray:
    """Vectors of many widths: plain, spiky over 16 decades, with one massive component, or half of the components alike."""
    d = draw(st.integers(1, 64) | st.sampled_from([256, 768, 4096]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["gaussian", "spiky", "massive", "alike", "small"]))
    values = rng.standard_normal(d)
    if kind == "spiky":
        values *= 10 ** rng.uniform(-8, 8, d)
    if kind == "massive":
        values[rng.integers(d)] = 10 ** rng.uniform(2, 6)
    if kind == "alike":
        values = np.where(rng.random(d) < 0.5, 1.0, rng.uniform(-2, 2))
    if kind == "small":  # all but one in float16's subnormal range
        values[1:] *= 10 ** rng.uniform(-8, -4, d - 1)
        values[0] = 1.0
    values[0] += not values.any()
    return values * 10 ** draw(st.floats(-25, 25))


@settings(deadline=None, max_examples=250, derandomize=True)
@given(values=activation(), dtype=st.sampled_from(DTYPES))
def test_storage_moves_no_cosine_further_than_stated(values: np.ndarray, dtype: str) -> None:
    rows = torch.from_numpy(values[None]).float()
    (stored,), (norm,) = recorded(rows, dtype)
    (exact,) = unit(rows)
    # The query that sees most of a difference is the difference's own direction.
    assert np.linalg.norm(stored - exact) <= bound(dtype, len(values))
    assert norm == pytest.approx(np.linalg.norm(rows.double()), rel=2.0**-24)


def halfway(dtype: str) -> np.ndarray:
    """63 components about half-way between two numbers of the type, and one that makes the length 1.

    They stand in turns just below and just above the middle, so that rounding changes the direction and not the length.
    """
    u = {"float16": 2.0**-11, "bfloat16": 2.0**-8}[dtype]
    signs = np.random.default_rng(0).choice([-1, 1], 63)
    values = np.r_[signs * 2.0**-3 * (1 + u * np.resize([0.99, 1.01], 63)), 0]
    values[-1] = np.sqrt(1 - values @ values) if values @ values < 1 else 0
    return values


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_stated_bound_is_nearly_reached(dtype: str) -> None:
    """So that what is promised is not merely large; for bfloat16 half of it would be too little."""
    rows = torch.from_numpy(100 * halfway(dtype)[None]).float()
    (stored,), _ = recorded(rows, dtype)
    (exact,) = unit(rows)
    away = np.linalg.norm(stored - exact)
    assert 0.9 * bound(dtype, 64) < away <= bound(dtype, 64)


def test_components_that_float16_cannot_hold_cost_what_is_stated() -> None:
    """4095 components of half its smallest number beside one of 1: they are stored as zero."""
    rows = torch.full((1, 4096), 2.0**-25)
    rows[0, 0] = 1
    (stored,), _ = recorded(rows, "float16")
    (exact,) = unit(rows)
    assert np.flatnonzero(stored).tolist() == [0]
    assert np.linalg.norm(stored - exact) == pytest.approx(64 * 2.0**-25, rel=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_search_shows_cosines_within_the_stated_bound(tmp_path: Path, dtype: str) -> None:
    """Through a bank and its index: random, spiky and massive rows, asked by themselves and by what rounding did to them."""
    d = 96
    rng = np.random.default_rng(3)
    rows = gaussian(40, d)
    rows[10:20] *= 10 ** rng.uniform(-6, 6, (10, d))
    rows[np.arange(20, 30), rng.integers(0, d, 10)] = 1e5
    if dtype != "float32":
        rows[30, :64], rows[30, 64:] = halfway(dtype), 0
    bank = fill(tmp_path / "a.h5", torch.from_numpy(rows).float(), dtype=dtype)
    exact = unit(rows.astype(np.float32))
    rounding = bank.vectors(HOOK).astype(np.float64) - exact
    queries = np.concatenate([exact, gaussian(20, d, seed=4), rounding[np.linalg.norm(rounding, axis=-1) > 0]])
    found = tll.ContextualIndex(bank, device="cpu").search(queries, 40)
    cosines = np.take_along_axis(unit(queries) @ exact.T, found.rows.numpy(), 1)
    apart = np.abs(found.similarities.numpy() - cosines)
    assert apart.max() <= bound(dtype, d) + 2.0**-23  # queries and results are float32
    if dtype != "float32":
        assert apart.max() > 0.7 * bound(dtype, d)
