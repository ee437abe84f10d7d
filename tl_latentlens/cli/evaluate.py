"""`tl-latentlens evaluate`: measure how often the neighbors are right."""

from pathlib import Path
from typing import Annotated

import typer

import tl_latentlens as tll
from tl_latentlens.cli.options import BankArgument, DataOptions, HookOption, ModelOptions
from tl_latentlens.cli.output import WRITERS, command_line, console, note, print_tables, require_folders, require_writable


def evaluate(
    bank: BankArgument,
    *,
    model: ModelOptions,
    data: DataOptions,
    hook_name: HookOption = None,
    transform: Annotated[
        list[str] | None,
        typer.Option(
            "--transform",
            "-t",
            help="a transform; give it several times for several, or `all`; default: `auto`, raw, but centered for an SAE",
        ),
    ] = None,
    senses: Annotated[
        str,
        typer.Option(help="labelled uses of ambiguous words: `demo`, or a .csv or .jsonl file (text, word, sense, held_out)"),
    ] = "demo",
    sae: Annotated[str | None, typer.Option(help="also score the labels of all features of this SAE (see `label-sae`)")] = None,
    n_tokens: Annotated[int, typer.Option(help="tokens of the bank that are read, and replaced by their neighbors")] = 300,
    top_k: Annotated[int, typer.Option(help="neighbors that vote or are read")] = 5,
    seed: Annotated[int, typer.Option(help="seed of what is drawn at random")] = 0,
    out: Annotated[Path | None, typer.Option(help="write every figure to this .csv, .parquet or .json file too")] = None,
    html: Annotated[Path | None, typer.Option(help="write a page to this file too: charts over the layers, and tables")] = None,
) -> None:
    """Measure without a judge how often the neighbors are right, at each hook name and with each transform, beside nulls.

    Example: `tl-latentlens evaluate demo.h5 --html evaluation.html`
    """
    require_writable(out)
    require_folders(html)
    opened = tll.Bank.open(bank)
    loaded = model.load_for(opened)
    evaluation = tll.evaluate(
        loaded,
        opened,
        hook_names=hook_name,
        transforms="all" if transform == ["all"] else transform,
        senses=senses,
        sae=None if sae is None else tll.load_sae(sae),
        n_tokens=n_tokens,
        top_k=top_k,
        device=model.device,
        seed=seed,
    )
    if data.as_json is None:
        console.print(evaluation.to_rich(width=console.width))
    else:
        labels = {} if evaluation.labels is None else {"labels": evaluation.labels}
        print_tables(data.as_json, {"measures": evaluation.to_dataframe(), **labels})
    if out is not None:
        WRITERS[out.suffix](evaluation.to_dataframe(), out)
        note(f"wrote {out}")
    if html is not None:
        evaluation.to_html(html, call=command_line())
        note(f"wrote {html}")
