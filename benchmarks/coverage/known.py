"""Whether a bank knows a token: held-out texts whose tokens it has or lacks, and vectors of no token."""

import tempfile
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool

import tl_latentlens as tll
from benchmarks.coverage.demo import demo_model
from benchmarks.coverage.lines import Line
from benchmarks.measure import Settings

TITLE = "`known` at 0.05 or less, by texts in the bank: at most one in twenty of the tokens that it has"
_N_TEXTS = (300, 1000, 3000)
_N_HELD_OUT = 300
_HOOK_NAMES = [0, 3, 5]
_LEVEL = 0.05
_WANTED = (0.0, 0.06)  # The first tokens of texts are often the bank's own, so it may be less.


def lines(settings: Settings) -> list[Line]:
    """The share of tokens that are not known, by texts in the bank and hook name."""
    texts = list(np.random.default_rng(0).permutation(np.array(list(tll.load_corpus("demo")), object)))
    with tempfile.TemporaryDirectory() as folder:
        return [
            line
            for n in _N_TEXTS
            for line in of_bank(texts[-n:], texts[:_N_HELD_OUT], Path(folder) / f"{n}.h5", settings.draws)
        ]


def of_bank(texts: list[str], held_out: list[str], path: Path, n_made_up: int) -> list[Line]:
    """The tokens of held-out texts that a bank has and those that it lacks, and made-up vectors."""
    model = demo_model()
    bank = tll.build_bank(model, texts, path, hook_names=_HOOK_NAMES, progress=False)
    index = tll.ContextualIndex(bank, device="cpu")
    hooks = tll.latentlens_hooks(index, top_k=1, logit_lens=False, calibrate=True)
    model.run_with_hooks(held_out, fwd_hooks=hooks)
    result = hooks.result
    token_ids = model.to_tokens(held_out).cpu().numpy()[result.decoded]
    is_held = np.isin(token_ids, index.bank_rows.token_ids())
    found = []
    for layer, name in zip(_HOOK_NAMES, index.hook_names, strict=True):
        known = _known(result.found[name])
        for what, chosen, wanted in (("has", is_held, _WANTED), ("lacks", ~is_held, None)):
            found.append(_line(f"tokens that the bank {what}, layer {layer}", len(texts), known[chosen] <= _LEVEL, wanted))
        rows = np.asarray(bank.vectors(name)[:]).astype(np.float64)
        made_up = np.random.default_rng(1).multivariate_normal(rows.mean(0), np.cov(rows.T), n_made_up)
        searched = index.search(torch.from_numpy(made_up), 1, query_hook_name=name, calibrate=True)
        found.append(_line(f"made-up vectors, layer {layer}", len(texts), _known(searched) <= _LEVEL, None))
    return found


def _known(found: tll.SearchResult) -> np.ndarray:
    if found.known is None:
        raise RuntimeError("the texts share no token")
    return found.known.cpu().numpy()


def _line(what: str, n_texts: int, is_unknown: Bool[np.ndarray, " cases"], wanted: tuple[float, float] | None) -> Line:
    return Line(what, n_texts, _LEVEL, float(is_unknown.mean()), len(is_unknown), wanted)
