"""`tl-latentlens find-features`: the features, heads and neurons that write a word's meaning."""

from typing import Annotated

import typer

import tl_latentlens as tll
from tl_latentlens.cli.options import BankArgument, DataOptions, ModelOptions, hook_name_in_bank
from tl_latentlens.cli.output import console, print_tables
from tl_latentlens.errors import InvalidInputError


def find_features(
    sae: Annotated[str, typer.Argument(help="`demo`, a folder as SAELens saves it, or a safetensors file")],
    bank: BankArgument,
    text: Annotated[str, typer.Argument(help="a text, run up to the word")],
    *,
    model: ModelOptions,
    data: DataOptions,
    word: Annotated[str | None, typer.Option(help="the word: the last token that ends it is read")] = None,
    position: Annotated[int | None, typer.Option(help="a position in its place, BOS counted; negative: from the end")] = None,
    hook_name: Annotated[
        str | None,
        typer.Option("--hook-name", "-n", help="the activation that the SAE reads, or its layer, where it does not say"),
    ] = None,
    top_k: Annotated[int, typer.Option(help="components of each kind")] = 10,
    heads: Annotated[bool, typer.Option("--heads", help="the attention heads too")] = False,
    neurons: Annotated[bool, typer.Option("--neurons", help="the MLP neurons too")] = False,
    transform: Annotated[
        str, typer.Option(help="`auto`: neighbors of directions with each hook name's mean taken away; `raw`, or another")
    ] = "auto",
) -> None:
    """Find the SAE features, and heads and neurons, that write what a word means in its context.

    Example: `tl-latentlens find-features demo demo.h5 "We fished and sat on the grassy bank" --word bank --heads`
    """
    if word is not None and position is None:
        place: str | int = word
    elif position is not None and word is None:
        place = position
    else:
        raise InvalidInputError("expected one of --word and --position")
    opened = tll.Bank.open(bank)
    encoder = tll.load_sae(sae, hook_name=hook_name_in_bank(hook_name, opened))
    index = tll.ContextualIndex(opened, encoder.hook_name, device=model.device, transform=transform)
    loaded = model.load_for(opened)
    results = [tll.find_features(text, place, encoder, index, model=loaded, top_k=top_k)]
    for is_requested, find in ((heads, tll.find_heads), (neurons, tll.find_neurons)):
        if is_requested:
            results.append(find(text, place, index, model=loaded, hook_name=encoder.hook_name, top_k=top_k))
    if data.as_json is not None:
        meaning = results[0].meaning
        fields = {
            "tokens": meaning.tokens,
            "hook_name": meaning.hook_name,
            "by_token": meaning.by_token,
            "n_uses": meaning.n_uses,
        }
        alike = [near.context for near in meaning.alike()]
        print_tables(data.as_json, {f"{result.kind}s": result.to_dataframe() for result in results}, **fields, alike=alike)
        return
    console.print(results[0].meaning.to_rich(width=console.width), end="")
    for result in results:
        console.print(result.to_rich(width=console.width))
