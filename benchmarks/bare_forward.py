"""The forward passes that a build needs, without the build: its batches, run up to the last banked layer."""

from pathlib import Path
from typing import Any

import tl_latentlens as tll
from tl_latentlens.bank.batches import Batch
from tl_latentlens.bank.build import record_model
from tl_latentlens.model.running import run_hooked

MAX_ROWS_PER_TOKEN = 50  # of every bank that is built here


def batches_of(model: Any, texts: list[str], path: Path, names: list[str], batch_tokens: int) -> list[Batch]:
    """The batches that a build runs, on the model's device."""
    plan = tll.plan_corpus(model, texts, max_rows_per_token=MAX_ROWS_PER_TOKEN)
    with tll.BankWriter.create(path, plan, record_model(model, plan, names), batch_tokens=batch_tokens) as writer:
        return list(writer.batches(next(model.parameters()).device))


def forward(model: Any, batches: list[Batch], last: str) -> None:
    """Run the model up to the last banked layer and keep nothing."""
    for batch in batches:
        run_hooked(model, batch.tokens, batch.attention_mask, [(last, lambda activation, hook: None)])
