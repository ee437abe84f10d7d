"""`tl-latentlens info` and `verify`: the contents of a bank, and a check of all its bytes."""

from dataclasses import asdict

from rich.table import Table
from rich.text import Text

import tl_latentlens as tll
from tl_latentlens.cli.options import BankArgument, DataOptions
from tl_latentlens.cli.output import console, print_record
from tl_latentlens.views.text import printable, short_hook_name

_SPECIAL_NOTE = ", special tokens of the texts kept"
_REPEAT_NOTE = ", each text run twice and read in its second copy (repeat)"


def info(bank: BankArgument, *, data: DataOptions) -> None:
    """Show what a bank holds: model, rows, hook names, plan.

    Example: `tl-latentlens info demo.h5`
    """
    print_info(tll.Bank.open(bank), data.as_json)


def verify(bank: BankArgument, *, data: DataOptions) -> None:
    """Read a bank whole and check every checksum.

    Example: `tl-latentlens verify demo.h5`
    """
    opened = tll.Bank.open(bank)
    opened.verify(progress=True)
    if data.as_json is None:
        console.print(f"{bank}: every checksum matches", markup=False)
    else:
        print_record(data.as_json, {"path": str(bank), "n_rows": opened.n_rows, "verified": True})


def print_info(bank: tll.Bank, json: bool | None) -> None:
    """Print the model, rows, hook names and plan of a bank."""
    if json is None:
        console.print(_info_table(bank))
        return
    plan = bank.plan
    counts = {"n_rows": bank.n_rows, "n_prompts": plan.n_prompts, "n_tokens": len(plan.tokens), "n_truncated": plan.n_truncated}
    stored = {"dtype": bank.dtype, "n_bytes": bank.n_bytes, **_parts(bank)}
    widths = {"hook_names": {name: bank.d(name) for name in bank.hook_names}}
    model, settings = asdict(bank.model_info), asdict(plan.settings)
    print_record(
        json,
        {"path": str(bank.path), **counts, **stored, **widths, "model": model, "plan": settings, "versions": bank.versions},
    )


def _parts(bank: tll.Bank) -> dict[str, int]:
    """The number of files where there are several, and the place of a shard."""
    shard, n_files = bank.file.metadata.shard, len(bank.file.files)
    return {"shard": shard.index, "n_shards": shard.n} if shard else {"n_files": n_files} if n_files > 1 else {}


def _parts_note(bank: tll.Bank) -> str:
    shard, n_files = bank.file.metadata.shard, len(bank.file.files)
    if shard:
        return f", shard {shard.index} of {shard.n} (rows from {shard.first_row:,} on, of {shard.n_rows:,})"
    return f" in {n_files} files" if n_files > 1 else ""


def _info_table(bank: tll.Bank) -> Table:
    model, plan = bank.model_info, bank.plan
    cap = plan.settings.max_rows_per_token
    table = Table(show_header=False, title=Text(printable(str(bank.path))), title_justify="left", title_style="bold")
    table.add_column(style="dim")
    table.add_column()
    weights = f"{model.dtype}{', mean-centred' if model.centered else ''}"
    lines = {
        "model": f"{model.name} ({model.class_name}, {model.n_layers} layers, d_model {model.d_model}, {weights})",
        **({"loaded from": model.source} if model.source else {}),
        **({"quantization": model.quantization} if model.quantization else {}),
        "rows": f"{bank.n_rows:,} contextual tokens of {len(plan.tokens):,} tokens in {plan.n_prompts:,} prompts",
        "plan": f"{'no cap' if cap is None else f'at most {cap} rows'} a token id, seed {plan.settings.seed}, "
        f"{plan.n_truncated:,} prompts cut at n_ctx {model.n_ctx}{_REPEAT_NOTE if plan.settings.repeat else ''}"
        f"{_SPECIAL_NOTE if plan.settings.keep_special_tokens else ''}",
        "hook names": "\n".join(f"{short_hook_name(name)}  [{bank.n_rows:,}, {bank.d(name)}]" for name in bank.hook_names),
        "stored as": f"{bank.dtype}, {bank.n_bytes / 1e6:,.1f} MB{_parts_note(bank)}",
        "built with": ", ".join(f"{name} {number}" for name, number in bank.versions.items()),
    }
    for key, value in lines.items():
        table.add_row(key, Text("\n".join(map(printable, value.split("\n")))))
    return table
