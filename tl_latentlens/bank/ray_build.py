"""Shards built by Ray actors that each hold the model (extra "ray"): Ray places them, and runs again what a dead node had."""

import os
import sys
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from tl_latentlens.bank.bank import Bank
from tl_latentlens.bank.build import build_bank
from tl_latentlens.bank.planning import origin_of, plan_corpus, plan_notes
from tl_latentlens.bank.ray_cluster import MAX_RETRIES, connected_ray
from tl_latentlens.corpus.paths import absolute_path
from tl_latentlens.corpus.plan import Plan
from tl_latentlens.corpus.plan_file import is_plan_path, save_plan
from tl_latentlens.corpus.texts import load_corpus
from tl_latentlens.errors import BankError, InvalidInputError

_OF_PLAN = ("max_rows_per_token", "seed", "repeat", "keep_special_tokens")  # arguments that decide the rows
_PLAN_NAME = "bank.plan"
_SHARDS_PER_WORKER = 4  # so that a slow worker holds up the others for a part of its share only


class ShardBuilder:
    """A process that holds the model and builds one shard after the other."""

    def __init__(self, load: Callable[[], Any]) -> None:
        """Load nothing yet; the process may be started again."""
        self._load = load

    @cached_property
    def _model(self) -> Any:
        return self._load()

    def plan(self, texts: Any, path: str, settings: dict[str, Any]) -> list[str]:
        """Plan the corpus and save the plan; returns notes to the user."""
        plan = plan_corpus(self._model, texts, **settings)
        save_plan(plan, path, origin_of(self._model))
        return list(plan_notes(self._model, plan))

    def build(self, texts: Any, folder: str, shard: tuple[int, int], settings: dict[str, Any]) -> tuple[int, int]:
        """Build a shard, or go on with it; returns its rows and tokens."""
        with build_bank(self._model, texts, folder, shard=shard, progress=False, **settings) as bank:
            return bank.n_rows, len(bank.plan.tokens)


def build_bank_on_ray(
    load: Callable[[], Any],
    texts: Any,
    folder: str | Path,
    *,
    n_workers: int | None = None,
    n_shards: int | None = None,
    gpus_per_worker: float | None = None,
    address: str | None = None,
    progress: bool = True,
    **settings: Any,
) -> Bank:
    """Run a corpus through a model on a Ray cluster, shard by shard, and keep the contextual vectors of its tokens.

    Each worker loads the model once. A worker whose process or node dies is started again, and its shard goes on where it was.
    The same call resumes a run that was stopped. All workers write into `folder`, so it is on a file system that they share.

    Args:
        load: Loads the model, in each worker: `functools.partial(load_model, "gpt2")`.
        texts: As `build_bank` takes them. One worker plans them, and the plan is kept in the folder for all.
        folder: The folder of the bank, in which each shard has a file.
        n_workers: How many workers; None: one a `gpus_per_worker`, or one on a cluster without GPUs.
        n_shards: How many shards; None: four a worker. A folder that has shards keeps its number.
        gpus_per_worker: None: 1 where the cluster has GPUs, else 0.
        address: Of the cluster; "auto": the one that runs on this machine; None: that of RAY_ADDRESS, or one that is started
            here.
        progress: Show a progress bar of the shards.
        settings: The other arguments of `build_bank`, such as `hook_names`.

    Returns:
        The bank.

    Raises:
        MissingExtraError: Ray is not installed.
        InvalidInputError: More GPUs a worker than the cluster has.
        BankError: As `build_bank`, of any shard.
    """
    ray, path = connected_ray(address), absolute_path(folder)
    if path.suffix == ".h5":
        raise InvalidInputError(f"got the file {folder}; expected a folder for the shards, such as {path.with_suffix('')}")
    try:
        path.mkdir(exist_ok=True)
    except OSError as error:
        raise BankError(f"the folder {path} for the shards of the bank cannot be made: {error}") from error
    n_gpus = ray.cluster_resources().get("GPU", 0)
    per_worker = min(1.0, n_gpus) if gpus_per_worker is None else gpus_per_worker
    if per_worker > n_gpus:
        raise InvalidInputError(f"got gpus_per_worker={per_worker:g}; the Ray cluster has {n_gpus:g} GPUs")
    n_workers = n_workers or max(1, int(n_gpus // per_worker) if per_worker else 1)
    n_shards = n_shards or _n_shards_in(path) or _SHARDS_PER_WORKER * n_workers
    builder = ray.remote(ShardBuilder).options(
        num_gpus=per_worker,
        num_cpus=0,  # so that as many as are asked for find a place; their threads share the processors
        max_restarts=-1,
        max_task_retries=MAX_RETRIES,
        runtime_env={"env_vars": _environment(ray, n_workers)},
    )
    workers = [builder.remote(load) for _ in range(min(n_workers, n_shards))]
    if not is_plan_path(texts):
        of_plan = {name: settings.pop(name) for name in _OF_PLAN if name in settings}
        of_plan["hook_names"], planned = settings.get("hook_names"), str(path / _PLAN_NAME)
        corpus = ray.put(texts if isinstance(texts, Plan) else list(load_corpus(texts)))
        notes = _result(ray, workers[0].plan.remote(corpus, planned, of_plan))
        for note in notes if progress else ():
            tqdm.write(note, file=sys.stderr)
        texts = planned
    try:
        _build_all(ray, workers, (str(texts), str(path)), n_shards, settings, progress)
    except KeyboardInterrupt:
        n_done = len(list(path.glob("shard-*.h5")))
        raise KeyboardInterrupt(
            f"stopped; {path} keeps {n_done} of {n_shards} shards, and what others have so far: the same call goes on"
        ) from None
    return Bank.open(path)


def _build_all(
    ray: Any, workers: list[Any], where: tuple[str, str], n_shards: int, settings: dict[str, Any], progress: bool
) -> None:
    """Give each worker one shard after the other, until all are built."""
    left, running = list(range(n_shards))[::-1], {}
    with tqdm(total=n_shards, unit=" shards", desc=Path(where[1]).name, disable=not progress) as bar:
        n_rows = 0
        free = list(workers)
        while left or running:
            while left and free:
                worker = free.pop()
                running[worker.build.remote(*where, (left.pop(), n_shards), settings)] = worker
            (done, *_), _ = ray.wait(list(running))
            free.append(running.pop(done))
            n_rows += _result(ray, done)[0]
            bar.set_postfix_str(f"{n_rows:,} rows, {len(workers)} workers", refresh=False)
            bar.update()


def _result(ray: Any, task: Any) -> Any:
    """What a task returned.

    Raises:
        BankError: Its worker died again and again.
    """
    try:
        return ray.get(task)
    except ray.exceptions.RayActorError as error:
        raise BankError(
            f"a worker died {MAX_RETRIES + 1} times on one shard, and was given up: {error}. It may lack memory: give it fewer "
            "batch_tokens, or run fewer workers; the same call goes on"
        ) from error


def _n_shards_in(folder: Path) -> int | None:
    """The number of shards that a folder was begun with."""
    names = [path.name.split(".")[0] for path in folder.glob("shard-*-of-*.h5*")]
    return int(names[0].rpartition("-")[2]) if names and names[0].rpartition("-")[2].isdigit() else None


def _environment(ray: Any, n_workers: int) -> dict[str, str]:
    """The environment of the workers: their threads share the processors, and they are no ranks of another launcher."""
    n_threads = max(1, int(ray.cluster_resources().get("CPU", 1)) // n_workers)
    offline = {name: os.environ[name] for name in ("HF_HUB_OFFLINE", "HF_HOME") if name in os.environ}
    return {"OMP_NUM_THREADS": str(n_threads), **offline}
