"""Builds that are stopped, killed, cut off from power and damaged in any order end as the file of an undisturbed build."""

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test
from support.banks import (
    NUMPY_DTYPES,
    TORCH_DTYPES,
    StopBuildError,
    at_most,
    blocks_of,
    give,
)
from support.tape import (
    ACTS,
    PAGE,
    PLAN,
    RECORD,
    WIDTHS,
    builds_though_damaged,
    left_by_kill,
    left_by_power_cut,
    moments,
    offsets,
    survivals,
    taped,
    whole_of,
)

from tl_latentlens.bank.bank import Bank
from tl_latentlens.bank.batches import Batch
from tl_latentlens.bank.format import partial_path
from tl_latentlens.bank.writer import BankWriter
from tl_latentlens.errors import BankError
from tl_latentlens.index.contextual import ContextualIndex
from tl_latentlens.search.vectors import VectorSearch


@pytest.fixture(autouse=True, scope="module")
def small_blocks() -> Iterator[None]:
    with blocks_of(1):
        yield


def stored_vectors(dtype: str) -> dict[str, np.ndarray]:
    """What a bank of `dtype` holds, in float64."""
    found = {}
    for name, rows in ACTS.items():
        tensor = torch.from_numpy(rows)
        unit = tensor / torch.linalg.vector_norm(tensor, dim=-1, keepdim=True)
        found[name] = unit.to(TORCH_DTYPES[dtype]).double().numpy()
    return found


def nearest(vectors: list[np.ndarray], query: np.ndarray, k: int) -> list[tuple[int, int]]:
    """(hook, row) by similarity, then hook, then row; brute force."""
    unit = (query / np.linalg.norm(query)).astype(np.float32).astype(np.float64)
    scores = [(part * unit).sum(-1).astype(np.float32) for part in vectors]
    ranked = sorted((-float(s), hook, row) for hook, part in enumerate(scores) for row, s in enumerate(part))
    return [(hook, row) for _, hook, row in ranked[:k]]


class BankMachine(RuleBasedStateMachine):
    """A bank at one path, and what a user, a failing machine and a failing disk do to it."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.path = self.folder / "a.h5"
        self.partial = partial_path(self.path)
        self.done: set[int] = set()
        self.given: set[tuple[int, str, int]] = set()
        self.writer: BankWriter | None = None
        self.finished = False
        self.stale = False

    @initialize(dtype=st.sampled_from(["float16", "bfloat16", "float32"]))
    def choose(self, dtype: str) -> None:
        self.dtype = dtype
        self.whole = whole_of(dtype)
        self.n_blocks = len(self.whole.starts) - 1
        self.vectors = stored_vectors(dtype)

    def create(self, **kwargs: Any) -> BankWriter:
        return BankWriter.create(self.path, PLAN, RECORD, **{"dtype": self.dtype, "batch_tokens": 16, **kwargs})

    # Building

    @precondition(lambda self: not self.writer and not self.finished)
    @rule(batch_tokens=st.sampled_from([16, 4096]), odd=st.booleans(), n=st.integers(0, 8))
    def start(self, batch_tokens: int, odd: bool, n: int) -> None:
        if not self.partial.exists():
            batch_tokens = 16  # a resumed build takes that of the file
            if odd:  # left by a build that was killed while it created its file
                (self.folder / "a.h5.partial.new").write_bytes(self.whole.data[:9000])
        elif odd:
            self.ask_for_something_else()
        self.taping = taped(self.path)
        self.tape = self.taping.__enter__()
        self.given = self.whole.saved_rows(self.path)
        self.writer = self.create(batch_tokens=batch_tokens)
        self.batches = self.writer.batches()
        self.stale = False
        assert self.writer.tokens_left == self.tokens_left()
        assert self.writer.tokens_to_run == sum(batch.n_tokens for batch in self.whole.batches)
        self.append(None, n, False)

    @precondition(lambda self: self.writer)
    @rule(
        names=st.one_of(st.none(), st.sets(st.sampled_from(list(WIDTHS)), min_size=1)), n=st.integers(1, 8), again=st.booleans()
    )
    def append(self, names: set[str] | None, n: int, again: bool) -> None:
        assert self.writer
        if again:  # as a loop does after an error that it caught
            self.settle()
            self.batches = self.writer.batches()
        for _ in range(n):
            batch = next(self.batches, None)
            if batch is not None:
                assert batch.block not in self.done
                self.give(batch, tuple(names or WIDTHS))

    def give(self, batch: Batch, names: tuple[str, ...]) -> None:
        assert self.writer
        give(self.writer, batch, ACTS, names)
        self.given.update((batch.block, name, row) for name in names for row in batch.rows.tolist())

    def settle(self) -> None:
        """Wait for the writer's thread, that a run of the test is like the one before it."""
        assert self.writer
        left = self.tokens_left()
        with at_most(20):
            while self.writer.tokens_left != left:
                time.sleep(0.001)

    def tokens_left(self) -> int:
        """Tokens of the batches of which some row was neither handed over nor saved before."""
        left = [batch for batch in self.whole.batches if batch.block not in self.done and not self.has(batch)]
        return sum(batch.n_tokens for batch in left)

    def has(self, batch: Batch) -> bool:
        return {(batch.block, name, row) for name in WIDTHS for row in batch.rows.tolist()} <= self.given

    def blocks_given(self) -> set[int]:
        """The blocks of which every row of every hook name was handed over."""
        spans = enumerate(pairwise(self.whole.starts))
        wanted = [{(block, name, row) for name in WIDTHS for row in range(*span)} for block, span in spans]
        return {block for block in range(self.n_blocks) if wanted[block] <= self.given}

    @precondition(lambda self: self.writer)
    @rule(error=st.sampled_from([None, StopBuildError(), KeyboardInterrupt()]))
    def leave(self, error: BaseException | None) -> None:
        assert self.writer
        complete = self.done | self.blocks_given() == set(range(self.n_blocks))
        self.writer.__exit__(type(error) if error else None, error, None)
        self.end_session()
        if complete and error is None:
            self.is_finished()
        else:
            self.done |= self.blocks_given()

    @precondition(lambda self: self.writer)
    @rule()
    def finish(self) -> None:
        assert self.writer
        for batch in self.writer.batches():
            self.give(batch, tuple(WIDTHS))
        self.writer.__exit__(None, None, None)
        self.end_session()
        self.is_finished()

    def end_session(self) -> None:
        self.taping.__exit__(None, None, None)
        self.writer = None

    def is_finished(self) -> None:
        assert self.path.read_bytes() == self.whole.data
        self.finished = True

    @precondition(lambda self: self.writer)
    @rule(data=st.data(), power=st.booleans(), finishing=st.booleans())
    def kill(self, data: st.DataObject, power: bool, finishing: bool) -> None:
        """At any moment since the session began, the last ones included."""
        assert self.writer
        if finishing:
            for batch in self.writer.batches():
                self.give(batch, tuple(WIDTHS))
            self.writer.__exit__(None, None, None)
        else:
            self.writer.__exit__(StopBuildError, StopBuildError(), None)
        self.end_session()
        at = data.draw(moments(self.tape))
        if power:
            image = left_by_power_cut(self.tape, at, data.draw(survivals()))
        else:
            image = left_by_kill(self.tape, at, data.draw(st.integers(0, 5000)))
        if "rename" in self.tape.events[:at]:
            assert image == self.whole.data
            self.is_finished()
            return
        self.path.unlink(missing_ok=True)
        self.partial.write_bytes(image)
        (self.folder / "a.h5.lock").write_text("process 999999999 on elsewhere since 2001-01-01")
        self.stale = True
        self.whole.check_blocks(image)
        self.done = self.whole.blocks(image)

    def ask_for_something_else(self) -> None:
        before = self.partial.read_bytes()
        other = "float32" if self.dtype == "float16" else "float16"
        with pytest.raises(
            BankError, match=rf"cannot be resumed, .* dtype: the file has {self.dtype}, this call {other}\. Repeat"
        ):
            self.create(dtype=other)
        assert self.partial.read_bytes()[PAGE:] == before[PAGE:]  # the first copy of the head may have been mended

    @precondition(lambda self: not self.writer and not self.finished and self.partial.exists())
    @rule(data=st.data(), bit=st.integers(0, 7))
    def damage_the_partial_file(self, data: st.DataObject, bit: int) -> None:
        self.stale = False
        if builds_though_damaged(self.path, data.draw(offsets(self.whole)), bit, self.dtype):
            self.is_finished()

    # Reading

    @precondition(lambda self: self.finished)
    @rule()
    def read(self) -> None:
        with Bank.open(self.path) as bank:
            bank.verify()
            assert bank.hook_names == tuple(WIDTHS)
            for name, expected in self.vectors.items():
                found = bank.vectors(name)
                assert found.dtype == NUMPY_DTYPES[self.dtype]
                np.testing.assert_array_equal(found.astype(np.float64), expected)
                np.testing.assert_allclose(bank.norms(name), np.linalg.norm(ACTS[name], axis=1), rtol=1e-6)
                np.testing.assert_allclose(bank.mean(name), expected.mean(0), atol=1e-12)
                np.testing.assert_allclose(bank.std(name), expected.std(0), atol=1e-7)

    @precondition(lambda self: self.finished)
    @rule(seed=st.integers(0, 9), k=st.integers(1, 12), name=st.sampled_from(list(WIDTHS)))
    def search(self, seed: int, k: int, name: str) -> None:
        query = np.random.default_rng(seed).standard_normal(WIDTHS[name]).astype(np.float32)
        with Bank.open(self.path) as bank:
            found = VectorSearch(bank.vectors(name), "cpu").top_k(query, k)
            assert found.rows.tolist() == [row for _, row in nearest([self.vectors[name]], query, k)]
            index = ContextualIndex(bank, device="cpu")
            across = index.search(query, k)
        hooks = [hook for hook, width in WIDTHS.items() if width == WIDTHS[name]]
        places = zip([index.hook_names[i] for i in across.hook_ids.tolist()], across.rows.tolist(), strict=True)
        assert list(places) == [(hooks[hook], row) for hook, row in nearest([self.vectors[h] for h in hooks], query, k)]

    @precondition(lambda self: self.finished)
    @rule(data=st.data(), bit=st.integers(0, 7))
    def damage_the_bank(self, data: st.DataObject, bit: int) -> None:
        """Any bit of the file is under a checksum."""
        at = data.draw(offsets(self.whole))
        for _ in range(2):
            with self.path.open("r+b") as file:
                file.seek(at)
                byte = file.read(1)[0]
                file.seek(at)
                file.write(bytes([byte ^ 1 << bit]))
            if byte == self.whole.data[at]:
                with pytest.raises(BankError, match=r"a\.h5: "):
                    verify(self.path)
        verify(self.path)

    @precondition(lambda self: self.finished)
    @rule()
    def delete(self) -> None:
        self.path.unlink()
        self.finished = False
        self.done.clear()

    # At any time

    @invariant()
    def no_file_is_left_over(self) -> None:
        expected = {"a.h5"} if self.finished else {"a.h5.partial"} & set(os.listdir(self.folder))
        expected |= {"a.h5.lock"} if self.writer or self.stale else set()
        record = set() if self.finished else {"a.h5.partial.rows"}
        assert set(os.listdir(self.folder)) - record == expected

    @invariant()
    def nobody_reads_an_unfinished_bank(self) -> None:
        if not self.finished:
            hint = "; a.h5.partial is there: the same build call resumes it" if self.partial.exists() else ""
            with pytest.raises(BankError) as caught:
                Bank.open(self.path)
            assert str(caught.value) == f"no bank file at {self.path}{hint}"

    @invariant()
    def nobody_else_builds(self) -> None:
        if self.writer or self.finished:
            message = "exists already; open it" if self.finished else f"is being built by process {os.getpid()} on "
            with pytest.raises(BankError, match=rf"a\.h5 {message}"):
                self.create()
            self.stale = False

    @invariant()
    def journal_is_true(self) -> None:
        if not self.writer and self.partial.exists():
            image = self.partial.read_bytes()
            assert self.whole.blocks(image) == self.done
            self.whole.check_blocks(image)

    def teardown(self) -> None:
        if self.writer:
            with suppress(BankError):
                self.writer.__exit__(StopBuildError, StopBuildError(), None)
            self.end_session()
        shutil.rmtree(self.folder)


def verify(path: Path) -> None:
    with Bank.open(path) as bank:
        bank.verify()


def test_bank_in_any_order_of_events() -> None:
    run_state_machine_as_test(
        BankMachine,
        settings=settings(
            deadline=None,
            max_examples=60,
            stateful_step_count=20,
            derandomize=True,
            phases=[Phase.generate],  # to shrink a failure would take minutes
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
        ),
    )
