"""What it takes to plan a corpus beside tokenizing it, and how much memory: texts → tokens → rows → blocks.

The texts come from a generator, so that no one holds them. "Past the tokenizer" is `tokenize` with a tokenizer that has its
ids ready.
"""

from collections import Counter
from collections.abc import Iterator
from itertools import cycle, islice
from types import SimpleNamespace
from typing import Any

import numpy as np

import tl_latentlens as tll
from benchmarks.measure import Settings, WrongResultError, alternate, table
from tl_latentlens.corpus.plan import Plan, Prompts, block_starts
from tl_latentlens.index.word_coverage import word_coverage
from tl_latentlens.model.tokenize import tokenize

BLOCK_TOKENS, BLOCK_ROWS = 32768, 2**17


def run(settings: Settings) -> str:
    """Tables for the corpus, and for one of four times the texts; ten million random tokens or, where large, 100 million."""
    model = tll.load_demo_model()
    texts = list(islice(tll.load_corpus(settings.corpus), 400_000))
    check(tokenize(model, texts[:2000]))
    rows = []
    for times in (1, 4):
        n = times * len(texts)
        prompts = tokenize(model, islice(cycle(texts), n))
        ready = ReadyTokenizer(model, texts)
        rows += timed(
            settings,
            {
                "tokenizer and all": lambda n=n: tll.plan_corpus(model, (text for text in islice(cycle(texts), n))),
                "past the tokenizer": lambda n=n, ready=ready: tokenize(
                    ready.model, (text for text in islice(cycle(texts), n))
                ),
                "make_plan": lambda prompts=prompts: tll.make_plan(prompts),
            },
            f"{n:,} texts",
            prompts,
        )
    prompts = random_prompts(100_000_000 if settings.large else 10_000_000)
    plan = tll.make_plan(prompts)
    words = ["".join(chr(97 + int(digit)) for digit in f"{i:05}") for i in range(1, 50_001)]
    texts_of = {0: b""} | {i: f" {word}".encode() for i, word in enumerate(words, start=1)}
    rows += timed(
        settings,
        {
            "make_plan": lambda: tll.make_plan(prompts),
            "make_plan, no cap": lambda: tll.make_plan(prompts, tll.PlanSettings(max_rows_per_token=None)),
            "make_plan, encoder": lambda: tll.make_plan(prompts, tll.PlanSettings(bidirectional=True)),
            "row_prompts, block_starts": lambda: block_starts(fresh(plan), BLOCK_TOKENS, BLOCK_ROWS),
            "digest": lambda: fresh(plan).digest,
            "rows of 1,000 wanted words": lambda: word_coverage(fresh(plan), words[:1000], texts_of, (0,), "english"),
        },
        "random, 10 to 50 a prompt",
        prompts,
    )
    return f"## Planning\n\n{table(rows)}"


def timed(settings: Settings, calls: dict[str, Any], corpus: str, prompts: Prompts) -> list[dict[str, Any]]:
    """One row of the table for each call."""
    n = len(prompts.tokens)
    return [
        {
            "corpus": corpus,
            "tokens": f"{n:,}",
            "what": name,
            "time": timing,
            "M tokens/s": n / timing.median / 1e6,
            "peak, bytes a token": timing.peak_bytes / n,
        }
        for name, timing in alternate(calls, settings.repeats).items()
    ]


class ReadyTokenizer:
    """A tokenizer that takes no time: it has the ids of some texts, which come again and again in the same order."""

    def __init__(self, model: Any, texts: list[str]) -> None:
        """Tokenize the texts."""
        self._ids = dict(zip(texts, model.tokenizer(texts, add_special_tokens=False)["input_ids"], strict=True))
        self.pad_token_id, self.bos_token_id, self.eos_token_id = (
            getattr(model.tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")
        )
        self.model = SimpleNamespace(tokenizer=self, cfg=model.cfg, to_tokens=model.to_tokens)

    def __call__(self, texts: list[str], **_: Any) -> dict[str, Any]:
        """The ids of several texts."""
        return {"input_ids": [self._ids[text] for text in texts]}


def random_prompts(n: int) -> Prompts:
    """Prompts of 10 to 50 tokens after BOS, ids drawn as unevenly as words are."""
    rng = np.random.default_rng(0)
    starts = np.r_[0, np.cumsum(rng.integers(10, 50, n // 30))]
    tokens = np.minimum(rng.zipf(1.2, starts[-1]), 50_000).astype(np.int32)
    special = np.zeros(len(tokens), bool)
    special[starts[:-1]] = True
    return Prompts(np.where(special, 0, tokens), starts, special)


def fresh(plan: Plan) -> Plan:
    """The same plan, nothing of it cached."""
    return Plan(plan.tokens, plan.prompt_starts, plan.row_tokens, plan.settings)


def check(prompts: Prompts, cap: int = 5) -> None:
    """Compare a plan with loops over sets of prefixes.

    Raises:
        WrongResultError: They differ.
    """
    places = list(_distinct_prefixes(prompts))
    kept, count = [], Counter()
    for place in np.random.default_rng(0).permutation(places):
        count[prompts.tokens[place]] += 1
        if count[prompts.tokens[place]] <= cap:
            kept.append(place)
    if sorted(kept) != tll.make_plan(prompts, tll.PlanSettings(cap)).row_tokens.tolist():
        raise WrongResultError("make_plan keeps other rows than a loop over sets of prefixes")


def _distinct_prefixes(prompts: Prompts) -> Iterator[int]:
    seen = set()
    for start, end in zip(prompts.starts[:-1], prompts.starts[1:], strict=True):
        for place in range(start, end):
            prefix = prompts.tokens[start : place + 1].tobytes()
            if prefix not in seen and not prompts.special[place]:
                yield place
            seen.add(prefix)
