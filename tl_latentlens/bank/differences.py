"""In what a bank differs from a call that would build it."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from tl_latentlens.bank.file import BankFile
from tl_latentlens.bank.folder import BankFolder
from tl_latentlens.bank.format import ModelRecord, ShardRecord
from tl_latentlens.corpus.plan import Plan


def differences_from_call(
    file: BankFile | BankFolder,
    plan: Plan,
    dtype: str,
    hook_names: Sequence[str],
    record: ModelRecord | None = None,
    shard: ShardRecord | None = None,
) -> list[str]:
    """The settings in which a bank differs from a call, one line each; empty where it is of this very call.

    Args:
        file: Of the bank.
        plan: The rows that the call would build.
        dtype: How it would store them.
        hook_names: For which activations.
        record: The model of the call; None: not compared here.
        shard: Which part of a bank the call would build; None: the whole.
    """
    metadata = file.metadata
    differences: list[str] = []

    def compare(setting: str, in_file: Any, in_call: Any) -> None:
        if in_file != in_call:
            differences.append(f"{setting}: the file has {in_file}, this call {in_call}")

    compare("shard", *(part and f"{part.index} of {part.n}" for part in (metadata.shard, shard)))
    compare("plan settings", *_different_fields(file.plan.settings, plan.settings))
    compare("corpus", *(f"{p.n_prompts:,} texts of {len(p.tokens):,} tokens" for p in (file.plan, plan)))
    if not differences:
        compare("corpus or its tokens", metadata.plan_digest, plan.digest)
    if not differences:
        compare("place among the shards", metadata.shard, shard)
    compare("hook names", list(metadata.hook_names), list(hook_names))
    compare("dtype", metadata.dtype, dtype)
    if record is not None:
        compare("model", *_different_fields(metadata.model, record.info))
    if record is not None and not differences:
        compare("widths", dict(file.widths), record.widths)
        stored = file.fingerprint
        compare("the fingerprint prompts", stored.prompts, record.fingerprint.prompts)
        agree = not differences and all(stored.agrees(record.fingerprint, name, record.info.dtype) for name in file.widths)
        if not differences and not agree:
            sides = f"{list(metadata.hooked)} in the file, {list(record.hooked)} in this call"
            why = f", or other hooks on it: {sides}" if metadata.hooked != record.hooked else ""
            differences.append(f"the model's activations: other weights under the same name{why}")
    return differences


def _different_fields(in_file: Any, in_call: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    names = [field.name for field in fields(in_file) if field.compare]
    names = [name for name in names if getattr(in_file, name) != getattr(in_call, name)]
    return {name: getattr(in_file, name) for name in names}, {name: getattr(in_call, name) for name in names}
