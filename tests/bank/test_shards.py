"""Shards of a bank: each built alone, together the bank that one process would have built."""

import os
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import shards

import tl_latentlens as tll
from tl_latentlens.bank.shards import Shard, as_shard, shard_from_environment, shard_of_plan
from tl_latentlens.corpus.plan import Plan, PlanSettings, block_starts, make_plan, prompts_from_lists

NAMES = ["blocks.1.hook_resid_post", "blocks.3.attn.hook_z"]
build, build_all = (partial(function, hook_names=NAMES) for function in (shards.build, shards.build_all))
VARIABLES = ("RANK", "WORLD_SIZE", *(f"SLURM_ARRAY_TASK_{part}" for part in ("ID", "COUNT", "MIN", "STEP")))


@pytest.fixture(autouse=True)
def _no_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture(scope="module")
def model() -> Any:
    return tll.load_demo_model()


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [*list(tll.load_corpus("demo"))[:120], "", "The same text twice.", "The same text twice."]


@pytest.fixture(scope="module")
def whole(model: Any, texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> tll.Bank:
    with pytest.MonkeyPatch.context() as patch:
        for variable in VARIABLES:
            patch.delenv(variable, raising=False)
        return build(model, texts, tmp_path_factory.mktemp("whole") / "bank.h5")


@pytest.fixture(scope="module")
def folder(model: Any, texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        for variable in VARIABLES:
            patch.delenv(variable, raising=False)
        return build_all(model, texts, tmp_path_factory.mktemp("shards") / "bank", 3)


# Together they are the whole


@pytest.mark.parametrize("n", [1, 2, 4, 50])
def test_merged_shards_are_the_bank_of_one_process(model, texts, whole: tll.Bank, tmp_path: Path, n: int) -> None:
    merged = tll.merge_bank(build_all(model, texts, tmp_path / "bank", n), tmp_path / "merged.h5", progress=False)
    assert merged.path.read_bytes() == whole.path.read_bytes()
    assert len(list((tmp_path / "bank").iterdir())) == n


@pytest.mark.parametrize("settings", [{"repeat": True}, {"dtype": "bfloat16", "max_rows_per_token": 3}, {"dtype": "float32"}])
def test_merged_shards_of_other_settings(model, texts, tmp_path: Path, settings: dict[str, Any]) -> None:
    one = build(model, texts[:40], tmp_path / "one.h5", **settings)
    merged = tll.merge_bank(
        build_all(model, texts[:40], tmp_path / "bank", 3, **settings), tmp_path / "merged.h5", progress=False
    )
    assert merged.path.read_bytes() == one.path.read_bytes()


def test_folder_reads_as_the_whole(folder: Path, whole: tll.Bank) -> None:
    bank = tll.Bank.open(folder)
    assert len(bank.file.files) == 3
    bank.verify()
    assert (bank.n_rows, bank.hook_names, bank.model_info) == (whole.n_rows, whole.hook_names, whole.model_info)
    assert (bank.plan_digest, bank.plan.digest, bank.blocks()) == (whole.plan_digest, whole.plan_digest, whole.blocks())
    assert bank.plan.n_truncated == whole.plan.n_truncated
    rows = np.array([bank.n_rows - 1, 0, 500, 3, 500])
    for name in [*NAMES, f"{NAMES[1]}[1]"]:
        assert np.array_equal(bank.vectors(name), whole.vectors(name))
        assert np.array_equal(bank.vectors_at(name, rows), whole.vectors(name)[rows])
        assert np.array_equal(bank.vectors_at(name, slice(5, None, 7)), whole.vectors(name)[5::7])
        assert np.array_equal(bank.activations(name, rows), whole.activations(name, rows))
        assert np.array_equal(bank.norms(name), whole.norms(name))
        np.testing.assert_allclose(bank.mean(name), whole.mean(name), rtol=0, atol=1e-15)
        np.testing.assert_allclose(bank.std(name), whole.std(name), rtol=0, atol=1e-14)
    for row in rows.tolist():
        ours, theirs = bank.row(row), whole.row(row)
        assert (ours.token, ours.position, ours.prompt_index) == (theirs.token, theirs.position, theirs.prompt_index)
        assert (ours.prompt_text, ours.context()) == (theirs.prompt_text, theirs.context())
    assert bank.fingerprint.prompts == whole.fingerprint.prompts
    assert bank.n_bytes == sum(path.stat().st_size for path in folder.iterdir())
    assert f"{bank.n_bytes / 1e6:,.1f} MB" in bank._repr_html_()


def test_a_shard_is_a_bank(folder: Path, whole: tll.Bank) -> None:
    shard = tll.Bank.open(folder / "shard-00001-of-00003.h5")
    place = shard.file.metadata.shard
    assert place is not None
    assert (place.index, place.n, place.n_rows, place.plan_digest) == (1, 3, whole.n_rows, whole.plan_digest)
    rows = slice(place.first_row, place.first_row + shard.n_rows)
    assert 0 < shard.n_rows < whole.n_rows
    assert np.array_equal(shard.vectors(NAMES[0]), whole.vectors(NAMES[0])[rows])
    assert shard.row(0).context() == whole.row(place.first_row).context()
    assert shard.row(0).prompt_index + place.first_prompt == whole.row(place.first_row).prompt_index
    found = tll.ContextualIndex(shard).search(np.asarray(shard.vectors(NAMES[0])[:4], np.float32), top_k=1, hook_names=NAMES[0])
    assert found.rows[:, 0].tolist() == [0, 1, 2, 3]


def test_a_shard_without_rows(model, tmp_path: Path) -> None:
    folder = build_all(model, ["The river ran over its bank."], tmp_path / "bank", 2)
    empty, whole = tll.Bank.open(folder / "shard-00001-of-00002.h5"), tll.Bank.open(folder)
    assert (empty.n_rows, empty.blocks()) == (0, [])
    empty.verify()
    assert "0 contextual tokens" in empty._repr_html_()
    assert tll.ContextualIndex(empty).search(np.ones((2, empty.d(NAMES[0])), np.float32), hook_names=NAMES[0]).rows.shape == (
        2,
        0,
    )
    found = tll.ContextualIndex(whole).search(np.asarray(whole.vectors(NAMES[0]), np.float32), top_k=1, hook_names=NAMES[0])
    assert found.rows[:, 0].tolist() == list(range(whole.n_rows))


def test_files_by_hook_name_and_by_rows(model, texts, whole: tll.Bank, folder: Path, tmp_path: Path) -> None:
    parts = tmp_path / "parts"
    (parts / "deep").mkdir(parents=True)
    build(model, texts, parts / "z.h5", hook_names=NAMES[1])
    for index in range(2):
        build(model, texts, parts / "deep" / f"resid{index}.h5", hook_names=NAMES[0], shard=f"{index}/2")
    bank = tll.Bank.open(parts)
    bank.verify()
    assert set(bank.hook_names) == set(NAMES)
    assert bank.n_rows == whole.n_rows
    for name in NAMES:
        assert np.array_equal(bank.vectors(name), whole.vectors(name))
    merged = tll.merge_bank(parts, tmp_path / "merged.h5", progress=False)
    assert np.array_equal(merged.vectors(NAMES[0]), whole.vectors(NAMES[0]))
    merged.verify()


def test_a_plan_is_shared_out_by_tokens() -> None:
    rng = np.random.default_rng(0)
    plan = make_plan(
        prompts_from_lists([rng.integers(1, 90, rng.integers(0, 30)).tolist() for _ in range(300)]), PlanSettings()
    )
    starts = block_starts(plan, 64, 1000)
    for n in (2, 3, 7, len(starts) - 1, len(starts), 200):
        parts = [shard_of_plan(plan, starts, Shard(index, n)) for index in range(n)]
        places = [place for _, place in parts if place is not None]
        assert [place.first_row for place in places] == np.cumsum([0, *(part.n_rows for part, _ in parts[:-1])]).tolist()
        assert [place.first_prompt for place in places] == np.cumsum([0, *(part.n_prompts for part, _ in parts[:-1])]).tolist()
        assert np.array_equal(np.concatenate([part.tokens for part, _ in parts]), plan.tokens)
        cuts = [
            block_starts(part, 64, 1000) + place.first_row for part, place in zip([p for p, _ in parts], places, strict=True)
        ]
        assert np.array_equal(np.unique(np.concatenate(cuts)), starts)  # the blocks of the whole
        sizes = [len(part.tokens) for part, _ in parts]
        if n < len(starts):
            assert min(part.n_rows for part, _ in parts) > 0
        if n <= 3:
            assert max(sizes) - min(sizes) < 150
    assert shard_of_plan(plan, starts, Shard(0, 1)) == (plan, None)


# Which shard


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"RANK": "0", "WORLD_SIZE": "1"}, None),
        ({"RANK": "2", "WORLD_SIZE": "4"}, Shard(2, 4)),
        ({"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "4"}, Shard(3, 4)),
        ({"SLURM_ARRAY_TASK_ID": "4", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "1"}, Shard(3, 4)),
        ({"SLURM_ARRAY_TASK_ID": "6", "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "2", "SLURM_ARRAY_TASK_STEP": "2"},
         Shard(2, 3)),
        ({"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "4", "RANK": "0", "WORLD_SIZE": "1"}, Shard(3, 4)),
    ],
)  # fmt: skip
def test_the_environment_says_which(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: Shard | None
) -> None:
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    assert shard_from_environment(Path("bank")) == expected


@pytest.mark.parametrize(
    ("environment", "problem"),
    [
        (
            {"RANK": "1", "WORLD_SIZE": "2", "SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_TASK_COUNT": "2"},
            "torchrun says rank 1 ",
        ),
        ({"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_TASK_MIN": "3"}, "an array with gaps"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK='one'; expected a whole number"),
        ({"RANK": "5", "WORLD_SIZE": "2"}, "expected (i, n)"),
    ],
)
def test_an_environment_that_says_no_one_shard(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], problem: str
) -> None:
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(tll.InvalidInputError, match=re.escape(problem)):
        shard_from_environment(Path("bank"))


def test_ranks_do_not_write_into_one_file(model, texts, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(tll.InvalidInputError, match=r"in process 1 of 2 .*expected a folder.*shard=\(0, 1\)"):
        build(model, texts, tmp_path / "bank.h5")
    assert not list(tmp_path.iterdir())
    assert build(model, texts[:3], tmp_path / "bank.h5", shard=(0, 1)).file.metadata.shard is None
    shard = build(model, texts, tmp_path / "bank")
    assert shard.path.name == "shard-00001-of-00002.h5"


@pytest.mark.parametrize("shard", [(3, 3), (-1, 2), "1", "1/0", (1,), (0.0, 2), (True, 2), "a/b", 3, {"i": 1}])
def test_no_shard(shard: Any) -> None:
    with pytest.raises(tll.InvalidInputError, match=r"expected \(i, n\) or 'i/n' with i from 0 to n - 1"):
        as_shard(shard)


# What does not fit


def test_lacking_shards_are_named(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "bank")
    (tmp_path / "bank" / "shard-00002-of-00003.h5").unlink()
    (tmp_path / "bank" / "shard-00000-of-00003.h5").rename(tmp_path / "bank" / "shard-00000-of-00003.h5.partial")
    with pytest.raises(tll.BankError, match=r"it lacks shard 0 of 3, shard 2 of 3 \(begun: shard-00000-of-00003.h5.partial\)"):
        tll.Bank.open(tmp_path / "bank")
    with pytest.raises(tll.BankError, match="is not complete"):
        tll.ContextualIndex(tmp_path / "bank")
    with pytest.raises(tll.BankError, match="is not complete"):
        tll.merge_bank(tmp_path / "bank", tmp_path / "merged.h5")
    assert not (tmp_path / "merged.h5").exists()


def test_a_shard_of_another_plan_is_refused(model, texts, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "bank")
    (tmp_path / "bank" / "shard-00002-of-00003.h5").unlink()
    for settings, what in (
        ({"seed": 1}, "plan settings: there "),
        ({"dtype": "float32"}, "dtype: there float16, in this call float32"),
        ({"batch_tokens": 128}, "batch_tokens: there 64, in this call 128"),
    ):
        with pytest.raises(tll.BankError, match=f"shards of another bank; they differ in .*{what}"):
            build(model, texts, tmp_path / "bank", shard=(2, 3), **settings)
    with pytest.raises(tll.BankError, match="number of shards: there 3, in this call 4"):
        build(model, texts, tmp_path / "bank", shard=(2, 4))
    with pytest.raises(tll.BankError, match="corpus or its tokens"):
        build(model, texts[:-1], tmp_path / "bank", shard=(2, 3))
    assert build(model, texts, tmp_path / "bank", shard=(2, 3), batch_tokens=None).file.metadata.batch_tokens == 64
    tll.Bank.open(tmp_path / "bank").verify()
    other = build(model, texts[:9], tmp_path / "bank" / "other.h5")
    with pytest.raises(tll.BankError, match=rf"{re.escape(str(other.path))} .*are not of one bank; they have different plans"):
        tll.Bank.open(tmp_path / "bank")


def test_a_finished_shard_is_opened_and_another_call_is_refused(model, texts, folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert build(model, texts, folder, shard=(1, 3)).n_rows > 0
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    with pytest.raises(tll.BankError, match="differs in hook names"):
        build(model, texts, folder, shard=(1, 3), hook_names=2)


def test_the_same_part_twice(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "bank")
    shutil.copy(folder / "shard-00001-of-00003.h5", tmp_path / "bank" / "copy.h5")
    with pytest.raises(tll.BankError, match="hold the same part of the bank; keep one of them"):
        tll.Bank.open(tmp_path / "bank")


def test_one_flipped_byte_is_found(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "bank")
    damaged = tmp_path / "bank" / "shard-00002-of-00003.h5"
    place = tll.Bank.open(damaged).file.head.datasets[f"hooks/{NAMES[0]}/vectors"].offset
    with damaged.open("r+b") as file:
        file.seek(place + 11)
        byte = file.read(1)
        file.seek(place + 11)
        file.write(bytes([byte[0] ^ 1]))
    for read in (tll.ContextualIndex, lambda path: tll.merge_bank(path, tmp_path / "merged.h5", progress=False)):
        with pytest.raises(tll.BankCorruptError, match=rf"{re.escape(str(damaged))}: hook name '{NAMES[0]}', block 0"):
            read(tmp_path / "bank")
    assert not (tmp_path / "merged.h5").exists()


def test_a_merge_goes_on(folder: Path, whole: tll.Bank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tl_latentlens.bank.partial_file import PartialFile

    write_block, written = PartialFile.write_block, []

    def stop_at_the_third(partial: PartialFile, block: int, buffer: Any) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(block)
        write_block(partial, block, buffer)

    with monkeypatch.context() as patch:
        patch.setattr(PartialFile, "write_block", stop_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            tll.merge_bank(folder, tmp_path / "merged.h5", progress=False)
    assert os.listdir(tmp_path) == ["merged.h5.partial"]
    tll.merge_bank(folder, tmp_path / "merged.h5", progress=False)
    assert (tmp_path / "merged.h5").read_bytes() == whole.path.read_bytes()
    with pytest.raises(tll.BankError, match="exists already"):
        tll.merge_bank(folder, tmp_path / "merged.h5", progress=False)


def test_copied_plan_of_no_rows() -> None:
    plan = Plan(np.zeros(0, np.int32), np.zeros(1, np.int64), np.zeros(0, np.int64), PlanSettings())
    assert block_starts(plan, 64, 10).tolist() == [0]
