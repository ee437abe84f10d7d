"""Banks built and searched by Ray actors, also where one of them is killed."""

import itertools
import os
import shlex
import signal
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support.docs import DOCS
from support.shards import NAMES, TRANSFORMS, build, build_all, differences, queries

import tl_latentlens as tll
from tl_latentlens import cli
from tl_latentlens.bank.shards import Shard

ray = pytest.importorskip("ray")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A cluster of two processors; its workers find the tests' modules."""
    paths = os.pathsep.join(str(path) for path in (Path(__file__).parents[1], Path(__file__).parents[2]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", paths)
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
        yield ray
        ray.shutdown()


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return list(tll.load_corpus("demo", limit=50))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    folder = tmp_path_factory.mktemp("ray")
    model = tll.load_demo_model()
    build(model, texts, folder / "one.h5", shard=(0, 1))
    build_all(model, texts, folder / "bank", 4)
    return folder


@pytest.fixture(scope="module")
def ours(cluster: Any, folder: Path) -> tll.ContextualIndex:
    """The four shards, held by two actors."""
    return tll.ContextualIndex(folder / "bank", on="ray", n_workers=2)


def test_actors_search_as_one_index_does(ours: tll.ContextualIndex, folder: Path) -> None:
    one = tll.Bank.open(folder / "one.h5")
    assert "on 2 Ray actors" in repr(ours)
    assert list(differences(ours, tll.ContextualIndex(one), queries(one))) == []
    assert list(differences(ours.for_directions, tll.ContextualIndex(one).for_directions, queries(one))) == []


@pytest.mark.parametrize("transform", sorted(set(TRANSFORMS) - {"raw", "center"}))
def test_actors_compare_as_one_index_does(ours: tll.ContextualIndex, folder: Path, transform: str) -> None:
    """Each transform in turn, among the same actors."""
    one = tll.Bank.open(folder / "one.h5")
    other = object.__new__(tll.ContextualIndex)
    vars(other).update(vars(ours), transform=transform, _searches=ours._searches.with_transform(transform), _known_tokens={})
    other._words = ours._words.searched_by(other._searches)
    assert list(differences(other, tll.ContextualIndex(one, transform=transform), queries(one))) == []


def test_a_killed_actor_is_replaced(ours: tll.ContextualIndex, folder: Path) -> None:
    one = tll.Bank.open(folder / "one.h5")
    theirs = tll.ContextualIndex(one)
    expected = theirs.search(queries(one), 7)
    actor = ours._searches.workers._actors[1]
    os.kill(ray.get(actor.open.remote()), signal.SIGKILL)
    found = ours.search(queries(one), 7)
    assert found.rows.equal(expected.rows)
    assert found.similarities.equal(expected.similarities)
    assert list(differences(ours, theirs, queries(one))) == []


def test_a_damaged_shard_is_named(cluster: Any, folder: Path, tmp_path: Path) -> None:
    bank = build_all(tll.load_demo_model(), list(tll.load_corpus("demo", limit=20)), tmp_path / "bank", 2)
    damaged = bank / Shard(1, 2).file_name
    offset = tll.Bank.open(damaged).file.head.datasets[f"hooks/{NAMES[0]}/vectors"].offset
    with damaged.open("r+b") as file:
        file.seek(offset)
        file.write(b"\x12\x34\x56")
    with pytest.raises(tll.BankCorruptError, match=f"{damaged.name}: hook name"):
        tll.ContextualIndex(bank, on="ray", n_workers=2)


def test_shards_are_built_by_actors_of_which_one_dies(cluster: Any, folder: Path, texts: list[str], tmp_path: Path) -> None:
    settings: dict[str, Any] = {"hook_names": NAMES, "batch_tokens": 64, "progress": False}
    load = partial(dying_once, str(tmp_path / "died"))
    bank = tll.build_bank_on_ray(load, texts, tmp_path / "bank", n_workers=2, n_shards=3, **settings)
    assert (tmp_path / "died").exists()
    assert len(bank.file.files) == 3
    one = tll.build_bank(tll.load_demo_model(), texts, tmp_path / "one.h5", **settings)
    assert tll.merge_bank(bank.path, tmp_path / "merged.h5", progress=False).path.read_bytes() == one.path.read_bytes()


def test_the_command(cluster: Any, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    (tmp_path / "corpus.txt").write_text("\n".join(texts[:20]))
    monkeypatch.chdir(tmp_path)
    (command,) = [
        line for line in (DOCS / "scaling.md").read_text().splitlines() if line.startswith("tl-latentlens") and "--ray" in line
    ]
    monkeypatch.setattr(sys, "argv", shlex.split(command))
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code, capsys.readouterr().err
    assert "in 4 files" in capsys.readouterr().out


def dying_once(mark: str) -> Any:
    """The model; the first process that has run three batches of it is killed."""
    from tl_latentlens.bank import build as build_module

    run_hooked, n_run = build_module.run_hooked, itertools.count()

    def run_or_die(*arguments: Any) -> None:
        if next(n_run) == 3 and not Path(mark).exists():
            Path(mark).write_text("")
            os.kill(os.getpid(), signal.SIGKILL)
        run_hooked(*arguments)

    build_module.run_hooked = run_or_die
    return tll.load_demo_model()


def test_errors_of_workers_reach_the_caller(cluster: Any, texts: list[str], tmp_path: Path) -> None:
    with pytest.raises(tll.UnknownHookError, match="no_such_hook"):
        tll.build_bank_on_ray(tll.load_demo_model, texts, tmp_path / "bank", hook_names="no_such_hook", progress=False)
    with pytest.raises(tll.InvalidInputError, match="the Ray cluster has 0 GPUs"):
        tll.build_bank_on_ray(tll.load_demo_model, texts, tmp_path / "bank", gpus_per_worker=1, progress=False)
    with pytest.raises(tll.InvalidInputError, match="expected a folder for the shards"):
        tll.build_bank_on_ray(tll.load_demo_model, texts, tmp_path / "bank.h5", progress=False)
