"""Exact nearest neighbors: ours, FAISS's flat index and plain torch over the same vectors; and up to their text, latentlens."""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from torch.nn.functional import normalize

import tl_latentlens as tll
from benchmarks.checking import D_MODEL, HOOK_NAMES, make_bank
from benchmarks.measure import Settings, Timing, WrongResultError, alternate, megabytes, table
from benchmarks.models import known_peak_flops
from tl_latentlens.search.approximate import ApproximateSearch
from tl_latentlens.search.vectors import VectorSearch

TOP_K = 10
BANDWIDTH = {"H100": 3.35e12, "H200": 4.8e12}  # bytes a second, of the SXM boards' data sheets


def run(settings: Settings) -> str:
    """Three tables: vectors to row numbers, vectors to neighbors with their text, and what approximate search gives."""
    n, d = (1_000_000, 768 if settings.device == "cpu" else 4096) if settings.large else (200_000, 768)
    counts = [1, 16, 256, 1000] if settings.large else [1, 16, 256]
    return f"{exact(n, d, counts, settings)}\n\n{with_text(64, settings)}\n\n{approximate(100_000, 256, settings)}"


def exact(n: int, d: int, counts: list[int], settings: Settings) -> str:
    """Time, ratio and memory of each contestant for each number of queries."""
    stored = random_units(n, d, settings.device)
    search = VectorSearch(stored, settings.device)
    flat, kind = _faiss_flat(stored, settings.device)
    wide = stored if settings.device != "cpu" else normalize(stored.float(), dim=-1)

    def plain(queries: torch.Tensor) -> np.ndarray:
        return (queries.to(wide) @ wide.T).topk(TOP_K).indices.cpu().numpy()

    rows = []
    for count in counts:
        queries = _queries(stored, count)
        calls: dict[str, Callable[[], Any]] = {
            "tl-latentlens": lambda q=queries: search.top_k(q, TOP_K).rows.cpu().numpy(),
            kind: lambda q=queries: flat.search(q.numpy(), TOP_K)[1],
            "torch, matmul and topk": lambda q=queries: plain(q),
        }
        if settings.device != "cpu":  # as hooks hold them
            there = queries.to(settings.device)
            calls["tl-latentlens, queries and rows left there"] = lambda q=there: search.top_k(q, TOP_K).rows
        timings = alternate(calls, settings.repeats)
        ours = timings["tl-latentlens"].result
        if settings.device != "cpu":  # where the others round
            require_same_rows(stored, queries, ours, brute_force(stored, queries), "a brute force in float32", 1e-6)
        for name in list(calls)[1:]:
            apart = 0 if name.startswith("tl-") else 1e-6 if settings.device == "cpu" else 1e-3
            require_same_rows(stored, queries, ours, torch.as_tensor(timings[name].result).cpu().numpy(), name, apart)
        for name, timing in timings.items():
            ratio = timing.median / timings["tl-latentlens"].median
            line = {"queries": count, "": name, "time": timing, "against ours": ratio, "memory": megabytes(_memory(timing))}
            rows.append(line | _roofline(timing.median, n, d, count, wide, settings))
    return f"## Exact top-{TOP_K} of {n:,} × {d}\n\n{table(rows)}"


def with_text(count: int, settings: Settings) -> str:
    """From vectors to neighbors with token and context, over a bank of three hook names."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bank.h5"
        make_bank(path, 65_536)
        index = tll.ContextualIndex(path, device=settings.device)
        layers = _as_layers(index)
        queries = _queries(layers[0]["embeddings"].half(), count).to(settings.device)
        calls = {"tl-latentlens": lambda: index.search(queries, TOP_K).neighbors()}
        try:
            import latentlens  # pyright: ignore[reportMissingImports]

            peer = latentlens.ContextualIndex(layers)
            calls["latentlens"] = lambda: peer.search(queries, TOP_K)
        except ImportError:
            pass
        timings = alternate(calls, settings.repeats)
    ours = timings["tl-latentlens"]
    for mine, theirs in zip(ours.result, timings.get("latentlens", ours).result, strict=True):
        if theirs and hasattr(theirs[0], "caption"):
            _require_same_neighbors(mine, theirs)
    rows = [
        {"": name, "time": timing, "against ours": timing.median / ours.median, "memory": megabytes(_memory(timing))}
        for name, timing in timings.items()
    ]
    note = (
        "" if "latentlens" in timings else "\n\nlatentlens is not installed here (`pip install --no-deps latentlens==0.1.0`)."
    )
    size = f"{len(HOOK_NAMES)} hook names × {index.n_rows:,} × {D_MODEL}"
    return f"## {count} vectors to {TOP_K} neighbors with text, {size}\n\n{table(rows)}{note}"


def approximate(n: int, d: int, settings: Settings) -> str:
    """Exact search beside FAISS's approximate indices with exact re-ranking, over vectors in clusters, 256 queries."""
    generator = torch.Generator().manual_seed(2)
    centers = torch.randn(1000, d, generator=generator)

    def clustered(count: int) -> torch.Tensor:
        chosen = centers[torch.randint(1000, (count,), generator=generator)]
        return normalize(chosen + torch.randn(count, d, generator=generator), dim=-1)

    stored, queries = clustered(n).half(), clustered(256).to(settings.device)
    n_lists = round(4 * n**0.5)
    factories = (f"IVF{n_lists},RaBitQ", f"IVF{n_lists},PQ{d // 4}x4fs", "HNSW32")
    options = {"its default": None} | {f"`{name}`": name for name in factories}
    searches: dict[str, VectorSearch] = {"exact": VectorSearch(stored, settings.device)}
    for name, factory in options.items():
        searches[name] = search = ApproximateSearch(stored, settings.device, factory=factory)
        if factory is not None and factory.startswith("IVF"):
            faiss.ParameterSpace().set_index_parameter(search.faiss, "nprobe", n_lists // 16)
    timings = alternate({name: partial(search.top_k, queries, TOP_K) for name, search in searches.items()}, settings.repeats)
    rows = []
    for name, search in searches.items():
        recall = search.recall(queries, TOP_K) if isinstance(search, ApproximateSearch) else 1.0
        ratio = timings[name].median / timings["exact"].median
        rows.append({"search": name, "time": timings[name], "against exact": ratio, f"recall@{TOP_K}": f"{recall:.3f}"})
    return f"## Approximate top-{TOP_K}, 256 queries, {n:,} × {d} in 1,000 clusters\n\n{table(rows)}"


def random_units(n: int, d: int, device: str = "cpu") -> torch.Tensor:
    """Random unit vectors [n, d], float16, made a few at a time where they are to lie."""
    generator = torch.Generator(device).manual_seed(0)
    units = torch.empty((n, d), dtype=torch.float16, device=device)
    for part in units.split(2**14):
        part.copy_(normalize(torch.randn(part.shape, generator=generator, device=device), dim=-1))
    return units


def brute_force(stored: torch.Tensor, queries: torch.Tensor) -> np.ndarray:
    """The nearest rows [q, TOP_K] by products in float32 with rows of length 1, block by block."""
    asked, best, rows = queries.to(stored.device), None, None
    for first in range(0, len(stored), 2**16):
        scores = asked @ normalize(stored[first : first + 2**16].float(), dim=-1).T
        ids = torch.arange(first, first + scores.shape[1], device=stored.device).expand(scores.shape)
        if best is not None and rows is not None:
            scores, ids = torch.cat([best, scores], 1), torch.cat([rows, ids], 1)
        best, place = scores.topk(TOP_K)
        rows = ids.gather(1, place)
    assert rows is not None
    return rows.cpu().numpy()


def require_same_rows(
    stored: torch.Tensor, queries: torch.Tensor, ours: np.ndarray, theirs: np.ndarray, name: str, apart: float
) -> None:
    """The same ids, but where two rows are no farther apart in float64 than a contestant can tell.

    Raises:
        WrongResultError: Another row, or a row twice.
    """
    query, place = np.nonzero(ours != theirs)
    chosen = (normalize(stored[torch.from_numpy(ids[query, place])].double(), dim=-1).cpu().numpy() for ids in (ours, theirs))
    units = normalize(queries.double(), dim=-1).numpy()[query]
    first, second = ((rows * units).sum(-1) for rows in chosen)
    repeated = any(len(set(ids)) < len(ids) for ids in ours.tolist())
    if repeated or (np.abs(first - second) > apart).any():
        raise WrongResultError(f"{len(query)} of {ours.size} neighbors are not those of {name}")


def _queries(stored: torch.Tensor, count: int) -> torch.Tensor:
    """Unit vectors, every other one near a stored row."""
    generator = torch.Generator().manual_seed(1)
    queries = normalize(torch.randn((count, stored.shape[1]), generator=generator), dim=-1)
    queries[::2] += stored[: count * 7 : 14].float().cpu()
    return normalize(queries, dim=-1)


def _faiss_flat(stored: torch.Tensor, device: str) -> tuple[Any, str]:
    """FAISS's exact index over the rows at length 1: float32 on a CPU, float16 on a GPU."""
    if device == "cpu" or not hasattr(faiss, "StandardGpuResources"):
        flat: Any = faiss.IndexFlatIP(stored.shape[1])
        kind = "faiss IndexFlatIP, float32, CPU"
    else:
        config = faiss.GpuIndexFlatConfig()
        config.useFloat16 = True
        flat = faiss.GpuIndexFlatIP(faiss.StandardGpuResources(), stored.shape[1], config)
        kind = "faiss GpuIndexFlatIP, float16"
    for part in stored.split(2**16):
        flat.add(normalize(part.float(), dim=-1).cpu().numpy())
    return flat, kind


def _roofline(seconds: float, n: int, d: int, count: int, held: torch.Tensor, settings: Settings) -> dict[str, str]:
    """On a known GPU: the share of the time that reading the vectors once, or multiplying them, must take."""
    if settings.device == "cpu":
        return {}
    name = torch.cuda.get_device_name()
    bandwidth = next((value for gpu, value in BANDWIDTH.items() if gpu in name), None)
    reading = n * d * held.itemsize / bandwidth if bandwidth else 0.0
    peak_flops = settings.peak_flops or known_peak_flops(settings.device)
    multiplying = 2 * n * d * count / peak_flops if peak_flops else 0.0
    return {"of the roofline": f"{max(reading, multiplying) / seconds:.0%}"}


def _memory(timing: Timing) -> int:
    return timing.peak_bytes + timing.peak_device_bytes


def _as_layers(index: tll.ContextualIndex) -> dict[int, dict[str, Any]]:
    """The bank as latentlens holds it: float32 vectors, and a dict for each row."""
    bank = index.banks[0]
    rows = [bank.row(row) for row in range(bank.n_rows)]
    metadata = [
        {"token_str": row.token, "caption": row.prompt_text, "position": row.position, "token_id": row.token_id} for row in rows
    ]
    vectors = {
        layer: normalize(torch.from_numpy(np.array(bank.vectors(name))).float(), dim=-1)
        for layer, name in enumerate(HOOK_NAMES)
    }
    return {layer: {"embeddings": embeddings, "metadata": metadata} for layer, embeddings in vectors.items()}


def _require_same_neighbors(ours: list[tll.Neighbor], theirs: list[Any]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        same = (mine.token, mine.position, HOOK_NAMES.index(mine.hook_name))
        if abs(mine.similarity - other.similarity) > 1e-5:
            raise WrongResultError(f"similarity {mine.similarity} against latentlens' {other.similarity}")
        if same != (other.token_str, other.position, other.contextual_layer) and abs(mine.similarity - other.similarity) > 1e-6:
            raise WrongResultError(f"neighbor {same} against latentlens' {other}")
