"""Workers as Ray actors (extra "ray"): Ray places them, and starts one again where its node or process dies."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tl_latentlens.bank.ray_cluster import MAX_RETRIES, connected_ray
from tl_latentlens.errors import InvalidInputError
from tl_latentlens.index.found_rows import FoundRows
from tl_latentlens.index.questions import LabelQuestion, RowQuestion
from tl_latentlens.index.workers import RowWorker, WorkerFile, dealt_out
from tl_latentlens.search.geometry import RowGeometry


class RayWorkers:
    """Actors that hold the files of an index, in the cluster that Ray is connected to, or else one on this machine."""

    def __init__(
        self,
        files: Sequence[WorkerFile],
        hook_names: Sequence[str],
        options: Mapping[str, Any],
        n_workers: int | None,
        *,
        verify: bool,
    ) -> None:
        """Start the actors; each opens its files.

        Args:
            files: All files of the index.
            hook_names: The hook names of the index, in its order.
            options: `device`, `dtype` and `memory_budget` of the search; device None: CUDA where the cluster has a GPU.
            n_workers: How many actors; None: one a file, and no more than there are GPUs, or processors.
            verify: Check every block first.

        Raises:
            MissingExtraError: Ray is not installed.
            BankError: A file cannot be opened where an actor runs.
            BankCorruptError: A block does not match its checksum.
        """
        self._ray = connected_ray()
        cluster = self._ray.cluster_resources()
        n_gpus, n_cpus = int(cluster.get("GPU", 0)), max(1, int(cluster.get("CPU", 1)))
        device = options["device"] or ("cuda" if n_gpus else "cpu")
        on_gpu = torch.device(device).type == "cuda"
        if on_gpu and not n_gpus:
            raise InvalidInputError(f"got device={device!r}; the Ray cluster has no GPU: use device='cpu'")
        self._files = dealt_out(files, n_workers or (n_gpus if on_gpu else n_cpus))
        n_threads = max(1, n_cpus // len(self._files))
        actor = self._ray.remote(RowWorker).options(
            num_gpus=int(on_gpu),
            num_cpus=0,  # so that as many as are asked for find a place; their threads share the processors
            max_restarts=-1,
            max_task_retries=MAX_RETRIES,
            runtime_env={"env_vars": {"OMP_NUM_THREADS": str(n_threads), "HF_HUB_OFFLINE": "1"}},
        )
        options = {**options, "device": device}
        self._actors = [actor.remote(its_files, tuple(hook_names), options, verify) for its_files in self._files]
        self._sent: dict[str, tuple[Any, Any]] = {}
        self._ray.get([worker.open.remote() for worker in self._actors])

    def __str__(self) -> str:
        return f"{len(self._actors)} Ray actors"

    def rank_rows(self, transform: str, geometries: Mapping[str, RowGeometry], question: RowQuestion) -> list[FoundRows]:
        """The answer of each actor."""
        sent, asked = self._sent_once(f"geometry {transform}", geometries, dict), self._ray.put(question)
        return self._ray.get([actor.rank_rows.remote(transform, sent, asked) for actor in self._actors])

    def rank_labels(
        self, transform: str, geometries: Mapping[str, RowGeometry], question: LabelQuestion, labels: Int[Tensor, " rows"]
    ) -> list[FoundRows]:
        """The answer of each actor."""
        sent, asked = self._sent_once(f"geometry {transform}", geometries, dict), self._ray.put(question)
        answers = []
        for i, (actor, files) in enumerate(zip(self._actors, self._files, strict=True)):
            spans = {file.first_row: file.n_rows for file in files}
            own = self._sent_once(
                f"labels {i}", labels, lambda whole, spans=spans: {a: whole[a : a + n].clone() for a, n in spans.items()}
            )
            answers.append(actor.rank_labels.remote(transform, sent, asked, own))
        return self._ray.get(answers)

    def _sent_once(self, name: str, value: Any, what: Any) -> Any:
        """A reference to something in Ray's store, where it is put again only if it is another object."""
        if name not in self._sent or self._sent[name][0] is not value:
            self._sent[name] = value, self._ray.put(what(value))
        return self._sent[name][1]
