"""What reading along costs: a forward pass bare, with hooks at every layer, with a cache; then what `hooks.result` takes."""

import tempfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch

import tl_latentlens as tll
from benchmarks.measure import Settings, WrongResultError, alternate, measured, table
from benchmarks.models import load_benchmark_model

TOP_K = 5
MOST_TEXTS = 20_000


def run(settings: Settings) -> str:
    """Two tables, for one prompt of 16 tokens and for 8 of 64."""
    model = load_benchmark_model(settings)
    texts = list(islice(tll.load_corpus(settings.corpus), MOST_TEXTS))
    names = [f"blocks.{layer}.hook_resid_post" for layer in range(model.cfg.n_layers)]
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        bank = tll.build_bank(model, texts, Path(folder) / "bank.h5", hook_names=names, progress=False)
        index = tll.ContextualIndex(bank, device=settings.device)
        inputs = [prompts(model, texts, *shape) for shape in ((1, 16), (8, 64))]
        forward = [row for tokens in inputs for row in passes(model, index, tokens, settings.repeats)]
        reading = [row for tokens in inputs for row in readings(model, index, tokens, settings.repeats)]
    head = f"## Reading along at {len(names)} layers, {index.n_rows:,} rows each"
    return f"{head}\n\n{table(forward)}\n\nThen, when it is asked for:\n\n{table(reading)}"


def prompts(model: Any, texts: list[str], batch: int, pos: int) -> torch.Tensor:
    """Tokens [batch, pos] of the corpus, each prompt with what the model wants in front."""
    words = " ".join(texts[: batch * pos]).split(" ")
    each = len(words) // batch
    return torch.cat([model.to_tokens(" ".join(words[i * each :][:each]))[:, :pos] for i in range(batch)])


def passes(model: Any, index: tll.ContextualIndex, tokens: torch.Tensor, repeats: int) -> list[dict[str, Any]]:
    """What hooks add to a forward pass.

    Raises:
        WrongResultError: The hooked logits are not the bare ones.
    """
    names = list(index.hook_names)
    hooks = tll.latentlens_hooks(index, top_k=TOP_K)
    nothing = [(name, lambda activation, hook: None) for name in names]
    timings = alternate(
        {
            "bare": lambda: model(tokens),
            "hooks that do nothing": lambda: model.run_with_hooks(tokens, fwd_hooks=nothing),
            "`latentlens_hooks`": lambda: model.run_with_hooks(tokens, fwd_hooks=hooks),
            "`run_with_cache`": lambda: model.run_with_cache(tokens, names_filter=names)[0],
        },
        repeats,
    )
    bare = timings["bare"]
    for name, timing in timings.items():
        if not torch.equal(timing.result, bare.result):
            raise WrongResultError(f"{name} changes the logits")
    return [
        {
            "tokens": " × ".join(map(str, tokens.shape)),
            "forward pass": name,
            "time": timing,
            "added": _added(timing.median, bare.median),
            "a hook": "" if timing is bare else f"{1e6 * (timing.median - bare.median) / len(names):,.0f} µs",
        }
        for name, timing in timings.items()
    ]


def _added(seconds: float, bare: float) -> str:
    return f"{1e3 * (seconds - bare):,.2f} ms, {seconds / bare - 1:.1%}"


def readings(model: Any, index: tll.ContextualIndex, tokens: torch.Tensor, repeats: int) -> list[dict[str, Any]]:
    """What the result takes, and its parts.

    Raises:
        WrongResultError: Its neighbors are not those of a search of the cached activations.
    """
    hooks = tll.latentlens_hooks(index, top_k=TOP_K)
    model.run_with_hooks(tokens, fwd_hooks=hooks)
    result = hooks.result
    decoded = torch.from_numpy(result.decoded).to(tokens.device)
    cache = model.run_with_cache(tokens, names_filter=list(index.hook_names))[1]
    vectors = torch.stack([cache[name][decoded] for name in index.hook_names])
    for name, part in zip(index.hook_names, vectors, strict=True):
        found, read = index.search(part, TOP_K, query_hook_name=name, distinct=True), result.found[name]
        if not torch.equal(found.rows, read.rows) or not torch.equal(found.hook_ids, read.hook_ids):
            raise WrongResultError(f"{name}: hooks.result has other neighbors than index.search")

    def after_a_run(**options: Any) -> Callable[[], Any]:
        some_hooks = tll.latentlens_hooks(index, top_k=TOP_K, **options)

        def timed() -> Any:
            model.run_with_hooks(tokens, fwd_hooks=some_hooks)
            return measured(lambda: some_hooks.result, memory=False)

        return timed

    own_tokens = [result.token(*place) for place in result.positions.tolist()]

    def other_words() -> None:
        for name, part in zip(index.hook_names, vectors, strict=True):
            index.search_words(part, query_hook_name=name, unlike=own_tokens)

    calls: dict[str, Callable[[], Any]] = {
        "`hooks.result`": after_a_run(),
        "`words=0, calibrate=False, distinct=False`": after_a_run(words=0, calibrate=False, distinct=False),
        "`words=0, calibrate=False`": after_a_run(words=0, calibrate=False),
        "`words=0`": after_a_run(words=0),
        "`calibrate=False`": after_a_run(calibrate=False),
        "of it, search": lambda: index.search(vectors, TOP_K),
        "of it, each row once": lambda: index.search(vectors, TOP_K, distinct=True),
        "of it, other words": other_words,
        "of it, logit lens": lambda: tll.logit_lens(model, vectors, TOP_K),
        "`result.cells()`: the texts": result.cells,
        "`result.to_dataframe()`": result.to_dataframe,
        "once a model: `check_model`": lambda: index.check_model(model, force=True),
    }
    return [
        {"tokens": " × ".join(map(str, tokens.shape)), "vectors": vectors[..., 0].numel(), "what": name, "time": timing}
        for name, timing in alternate(calls, repeats).items()
    ]
