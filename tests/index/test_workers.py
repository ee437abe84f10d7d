"""Searches by several workers: what they find is what one index finds, bit by bit."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.shards import TRANSFORMS, build, build_all, differences, queries

import tl_latentlens as tll
from tl_latentlens.index.found_rows import FoundRows, ranked_together, ranked_together_by_label
from tl_latentlens.index.workers import WorkerFile, dealt_out

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`one.h5`, and `bank` of four shards."""
    folder = tmp_path_factory.mktemp("workers")
    model, texts = tll.load_demo_model(), list(tll.load_corpus("demo", limit=50))
    build(model, texts, folder / "one.h5", shard=(0, 1))
    build_all(model, texts, folder / "bank", 4)
    return folder


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_folder_is_searched_as_one_file(folder: Path, transform: str) -> None:
    ours, theirs = (tll.ContextualIndex(folder / name, transform=transform) for name in ("bank", "one.h5"))
    assert list(differences(ours, theirs, queries(theirs.banks[0]))) == []
    assert list(differences(ours.for_directions, theirs.for_directions, queries(theirs.banks[0]))) == []


def test_processes_of_torchrun(folder: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ended = subprocess.run(
        [*command, "--module", "support.two_ranks", str(folder)],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert [(folder / f"rank{rank}.json").read_text() for rank in range(2)] == ["[]", "[]"]
    merged = tll.merge_bank(folder / "by_rank", folder / "by_rank.h5", progress=False)
    assert merged.path.read_bytes() == (folder / "one.h5").read_bytes()


def test_no_group_of_processes(folder: Path) -> None:
    with pytest.raises(tll.InvalidInputError, match=r"start them with torchrun, and call torch.distributed.init_process_group"):
        tll.ContextualIndex(folder / "bank", on="distributed")


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"on": "dask"}, r"got on='dask'; expected None, 'ray' or 'distributed'"),
        ({"n_workers": 2}, r"got n_workers=2 with on=None; expected at least 1, with on='ray'"),
        ({"on": "ray", "n_workers": 0}, "got n_workers=0"),
        ({"on": "ray", "approximate": True}, "workers search exactly"),
    ],
)
def test_settings_that_do_not_go_together(folder: Path, settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(tll.InvalidInputError, match=problem):
        tll.ContextualIndex(folder / "bank", **settings)


@given(st.lists(st.integers(0, 50).map(lambda n: n + 1), min_size=1, max_size=20), st.integers(1, 25))
def test_files_are_dealt_out(sizes: list[int], n: int) -> None:
    files = [WorkerFile(str(i), "", i, ("a",), size) for i, size in enumerate(sizes)]
    dealt = dealt_out(files, n)
    assert [file for its in dealt for file in its] == files  # in order, each once
    assert len(dealt) == min(n, len(files))
    assert all(dealt)
    if len(set(sizes)) == 1:
        assert max(map(len, dealt)) - min(map(len, dealt)) <= 1


@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 12))
def test_answers_are_ranked_together(seed: int, n_workers: int, top_k: int) -> None:
    rng = np.random.default_rng(seed)
    rows = np.arange(40).reshape(20, 2)  # a row at each of two hook names
    worker = np.sort(rng.integers(0, n_workers, 20))
    similarities = rng.integers(0, 6, (20, 2)).astype(np.float32) / 8  # many are equal
    labels = torch.from_numpy(rng.integers(-1, 5, 20))

    def best(of: np.ndarray, by_label: bool) -> FoundRows:
        found, seen = [], set()
        for row, hook_id in sorted(np.ndindex(rows.shape), key=lambda at: (-similarities[at], at[1], at[0])):
            label = int(labels[row])
            if of[row] and not (by_label and (label < 0 or label in seen)):
                found.append((similarities[row, hook_id], row, hook_id))
                seen.add(label)
        padding = [(np.nan, -1, -1)] * (top_k - len(found)) if by_label else []
        columns = zip(*[*found[:top_k], *padding], strict=True) if found or padding else ((), (), ())
        a, b, c = (np.array([column]) for column in columns)
        return FoundRows(
            torch.from_numpy(a.astype(np.float32)), torch.from_numpy(b.astype(int)), torch.from_numpy(c.astype(int))
        )

    for by_label in (False, True):
        answers = [best(worker == i, by_label) for i in range(n_workers)]
        ours = ranked_together_by_label(answers, top_k, labels) if by_label else ranked_together(answers, top_k)
        theirs = best(np.ones(20, bool), by_label)
        assert torch.equal(ours.rows, theirs.rows)
        assert torch.equal(ours.hook_ids, theirs.hook_ids)
        assert torch.equal(ours.similarities.nan_to_num(9), theirs.similarities.nan_to_num(9))
