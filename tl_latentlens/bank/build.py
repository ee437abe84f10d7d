"""The corpus run: texts → plan → batches → the model with bank hooks → a bank."""

import sys
import warnings
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from tl_latentlens.bank.allocator import freed_memory_kept
from tl_latentlens.bank.bank import Bank
from tl_latentlens.bank.create import cut_blocks
from tl_latentlens.bank.differences import differences_from_call
from tl_latentlens.bank.format import ModelRecord, ShardRecord, partial_path
from tl_latentlens.bank.lock import build_lock
from tl_latentlens.bank.planning import plan_corpus, plan_notes
from tl_latentlens.bank.record import bank_hooks
from tl_latentlens.bank.settings import require_folder, require_settings
from tl_latentlens.bank.shards import (
    as_shard,
    batch_tokens_of_shards,
    require_fitting_shards,
    shard_file,
    shard_from_environment,
    shard_of_plan,
)
from tl_latentlens.bank.writer import BankWriter
from tl_latentlens.corpus.paths import absolute_path
from tl_latentlens.corpus.plan import Plan
from tl_latentlens.errors import BankError
from tl_latentlens.model.describe import describe_model, model_device, parameters_of, require_embedded, require_model
from tl_latentlens.model.fingerprint import fingerprint
from tl_latentlens.model.fingerprint_causes import some
from tl_latentlens.model.fingerprint_check import check_fingerprint
from tl_latentlens.model.hook_names import expand_hook_names
from tl_latentlens.model.running import run_hooked
from tl_latentlens.model.running_text import running_text
from tl_latentlens.model.special_tokens import special_token_ids
from tl_latentlens.model.token_strings import token_bytes
from tl_latentlens.model.user_hooks import user_hook_points

_CPU_BATCH_WEIGHTS = 2**39  # Weights times tokens of one batch: some 20 seconds on a slow CPU.
_FINGERPRINT_PROMPTS, _FINGERPRINT_TOKENS = 4, 16  # So many prompts, and tokens of each, identify the model.


def build_bank(
    model: Any,
    texts: Any,
    path: str | Path,
    *,
    hook_names: int | str | Iterable[int | str] | Callable[[str], bool] | None = None,
    max_rows_per_token: int | None = 50,
    dtype: str = "float16",
    seed: int = 0,
    repeat: bool = False,
    keep_special_tokens: bool = False,
    progress: bool = True,
    batch_tokens: int | None = None,
    shard: tuple[int, int] | str | None = None,
) -> Bank:
    """Run a corpus through a model and keep the contextual vectors of its tokens.

    A build that was interrupted leaves `path.partial`; the same call resumes it. Ctrl-C loses the batch that was running, a
    kill also what was run in the ten seconds before. A finished bank of the same model, corpus and settings is opened and
    returned.

    Args:
        model: A HookedTransformer or TransformerBridge.
        texts: Anything `load_corpus` takes: a list of str, a path, a dataset, "demo". Or a `Plan`, or the path of one that was
            saved (.plan), whose settings stay.
        path: The bank file to make. Of a shard: the folder of the bank, in which each shard has a file; where it ends in .h5,
            the file of the shard.
        hook_names: Which activations: a name, a list, or a filter on names. Layers stand for their `hook_resid_post`: 3, -1
            (the last), "3-8", [3, 5, 7], range(3, 9), "all". None: `hook_resid_post` at up to eight layers spread evenly.
        max_rows_per_token: Most rows of one token id, a seeded uniform sample; None: no cap.
        dtype: How vectors are stored: "float16", "bfloat16" or "float32".
        seed: Seed of that sample.
        repeat: Run each text twice, BOS text text, and read the second copy, in which a token knows what comes after it too
            (echo embeddings, arXiv 2402.15449). The bank holds each text once. Read activations against it with `repeated`.
        keep_special_tokens: Make rows of the special tokens in the texts too, such as those of a chat template, and decode
            them against this bank. BOS before a text and padding are never rows.
        progress: Show a progress bar with tokens/s and the time left.
        batch_tokens: Most tokens of one batch, padding included; None: 1024 on the CPU (more fall out of its
            caches; fewer for models of over 5e8 weights), 16384 on a GPU. Where a folder has shards: theirs.
        shard: Build part `i` of `n` alone, (i, n) or "i/n", with i from 0 to n - 1. None: what torchrun (RANK, WORLD_SIZE) or a
            SLURM array says, else the whole. (0, 1) is the whole whatever they say. Each process writes a file of its own and
            waits for no other. `Bank.open` takes the folder as one bank, and `merge_bank` makes one file of it, byte for byte
            the one that a single process would have made. With more shards than blocks some hold no rows.

    Returns:
        The bank; of a shard, that shard.

    Raises:
        UnknownHookError: A hook name the model does not have.
        CorpusError: No text, or no token besides BOS.
        BankError: The file cannot be written, or `path` holds a bank of something else.
        InvalidInputError: NaN, inf or zero activations; `repeat` for an encoder, or a model that puts tokens after a text.
    """
    require_model(model)
    names = expand_hook_names(model, hook_names)
    require_settings(dtype, batch_tokens)
    require_folder(path)
    part = as_shard(shard) if shard is not None else shard_from_environment(Path(path))
    path = absolute_path(path)
    if part is not None:
        path = shard_file(path, part)
    _require_no_other_build(path)
    plan = plan_corpus(
        model,
        texts,
        hook_names=names,
        max_rows_per_token=max_rows_per_token,
        seed=seed,
        repeat=repeat,
        keep_special_tokens=keep_special_tokens,
    )
    for note in plan_notes(model, plan) if progress else ():
        tqdm.write(note, file=sys.stderr)
    record, place = None, None
    if part is not None and part.n > 1:
        record = record_model(model, plan, names)
        batch_tokens = batch_tokens or batch_tokens_of_shards(path) or default_batch_tokens(model)
        plan, place = shard_of_plan(plan, cut_blocks(plan, record.widths, dtype, batch_tokens), part)
        require_fitting_shards(path, record, place, plan.settings, dtype, batch_tokens)
    if path.exists():
        bank = _open_finished(path, plan, model, names, dtype, place)
        if progress:
            tqdm.write(f"{path} is complete already", file=sys.stderr)
        return bank
    record = record or record_model(model, plan, names)
    _run_corpus(model, path, plan, record, dtype, batch_tokens, progress, place)
    return Bank.open(path)


def _require_no_other_build(path: Path) -> None:
    """Name a process that builds the bank already, before the planning, and take away the lock of one that was killed.

    Raises:
        BankError: Another process builds it, or the folder cannot be written to and has no finished bank.
    """
    try:
        with build_lock(path):
            pass
    except BankError:
        if not path.exists():  # a finished bank may lie where nothing can be written
            raise


def _run_corpus(
    model: Any,
    path: Path,
    plan: Plan,
    record: ModelRecord,
    dtype: str,
    batch_tokens: int | None,
    progress: bool,
    shard: ShardRecord | None,
) -> None:
    """Run the batches that are left through the model, which fills the bank, and finish it.

    Raises:
        KeyboardInterrupt: The user stopped it; the message says how much is kept.
    """
    most_tokens = batch_tokens or default_batch_tokens(model)
    writer = None
    try:
        with (
            freed_memory_kept() if model_device(model).type == "cpu" else nullcontext(),
            BankWriter.create(path, plan, record, dtype=dtype, batch_tokens=most_tokens, shard=shard) as writer,
        ):
            _run_batches(model, writer, batch_tokens, progress)
    except KeyboardInterrupt:
        if not partial_path(path).exists():
            raise
        kept = "what is done"
        if writer is not None:
            kept = f"{writer.tokens_to_run - writer.tokens_left:,} of {writer.tokens_to_run:,} tokens"
        raise KeyboardInterrupt(f"stopped; {partial_path(path)} keeps {kept}, and the same call resumes it") from None


def default_batch_tokens(model: Any) -> int:
    """Most tokens of one batch, padding included: 16,384 on a GPU; on the CPU 1,024, and fewer for models of over 5e8 weights.

    What a CPU computes in seconds should not wait in memory for minutes: a batch that a build is stopped in is lost.
    """
    if model_device(model).type != "cpu":
        return 16384
    n_weights = sum(parameter.numel() for parameter in parameters_of(model))
    return max(64, min(1024, _CPU_BATCH_WEIGHTS // max(1, n_weights)))


def _run_batches(model: Any, writer: BankWriter, batch_tokens: int | None, progress: bool) -> None:
    """Run the batches that are left, with a progress bar."""
    name = writer.path.name
    with tqdm(total=writer.tokens_to_run, unit=" tokens", unit_scale=True, desc=name, disable=not progress) as bar:
        if writer.tokens_left < writer.tokens_to_run:
            bar.initial = bar.n = writer.tokens_to_run - writer.tokens_left  # The rate counts this run alone.
            bar.set_description(f"{name} (resumed)")
        if progress and batch_tokens not in (None, writer.batch_tokens):
            tqdm.write(
                f"{partial_path(writer.path)} was begun with batch_tokens={writer.batch_tokens}, which stays", file=sys.stderr
            )
        for batch in writer.batches(model_device(model)):
            run_hooked(model, batch.tokens, batch.attention_mask, bank_hooks(writer, batch))
            bar.update(batch.n_tokens)


def record_model(
    model: Any, plan: Plan, hook_names: int | str | Iterable[int | str] | Callable[[str], bool] | None = None
) -> ModelRecord:
    """The record of a model that a bank stores, for `BankWriter.create`; runs a few prompts of the plan to fingerprint it."""
    require_model(model)
    require_embedded(model, plan.tokens, plan.prompt_starts)
    names = expand_hook_names(model, hook_names)
    if hooked := tuple(user_hook_points(model)):
        warnings.warn(
            f"the model has hooks at {some(hooked)}: what they change goes into the bank, which then belongs to a model with "
            "these hooks; model.reset_hooks() removes them",
            stacklevel=3,
        )
    prompts = np.unique(plan.row_prompts[: 50 * _FINGERPRINT_PROMPTS])[:_FINGERPRINT_PROMPTS]
    spans = [(plan.prompt_starts[prompt], plan.prompt_starts[prompt + 1]) for prompt in prompts]
    model_fingerprint = fingerprint(model, [plan.tokens[a:b][:_FINGERPRINT_TOKENS].tolist() for a, b in spans], names)
    return ModelRecord(
        info=describe_model(model),
        widths={name: vectors.shape[1] for name, vectors in model_fingerprint.activations.items()},
        fingerprint=model_fingerprint,
        token_bytes=token_bytes(model, np.unique(plan.tokens).tolist()),
        special_ids=tuple(sorted(special_token_ids(model.tokenizer))),
        dropped_space="" if model.tokenizer is None else running_text(model.tokenizer).dropped_space,
        hooked=hooked,
    )


def _open_finished(path: Path, plan: Plan, model: Any, names: list[str], dtype: str, shard: ShardRecord | None) -> Bank:
    try:
        bank = Bank.open(path)
    except BankError as error:
        raise type(error)(
            f"{error} (it stands where the bank is to go and was left as it is: move it or choose another path)"
        ) from error
    differences = differences_from_call(bank.file, plan, dtype, names, shard=shard)
    if differences:
        raise BankError(
            f"{path} exists and differs in {'; '.join(differences)}. Repeat the old call, choose another path, or delete the "
            "file"
        )
    check_fingerprint(model, bank.fingerprint, bank.model_info, hooked=bank.file.metadata.hooked)
    return bank
