"""`tl-latentlens decode`: read texts token by token."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tl_latentlens.cli.options import BankArgument, DataOption, DeviceOption, HookOption, KindOption, ModelOption
from tl_latentlens.cli.output import console, note, print_table, require_folders
from tl_latentlens.errors import InvalidInputError

if TYPE_CHECKING:
    import pandas as pd


def decode(
    bank: BankArgument,
    text: Annotated[list[str], typer.Argument(help="one or more texts")],
    model: ModelOption = "demo",
    hook_name: HookOption = None,
    word: Annotated[str | None, typer.Option(help="read only the token that ends this word; default: all")] = None,
    top_k: Annotated[int, typer.Option(help="neighbors for each token and hook name")] = 3,
    repeat: Annotated[
        bool, typer.Option("--repeat", help="run each text twice and read the second copy, as for a bank built with --repeat")
    ] = False,
    transform: Annotated[
        str, typer.Option(help="`raw`, `center`, `standardize`, `remove_top`, `csls` or `center_writing`; see the docs")
    ] = "auto",
    calibrate: Annotated[
        bool, typer.Option(help="also show how likely a random activation comes as near (p), and dim what chance explains")
    ] = False,
    allow_mismatch: Annotated[bool, typer.Option(help="read on, with a warning, where the bank is of another model")] = False,
    json: DataOption = None,
    html: Annotated[
        Path | None, typer.Option(help="write all readings as one page too, layers × tokens; it needs no network")
    ] = None,
    kind: KindOption = None,
    device: DeviceOption = None,
) -> None:
    """Run texts through a model and read every token by its nearest neighbors in a bank, beside the logit lens.

    Example: `tl-latentlens decode demo.h5 "We fished and sat on the grassy bank" --model demo --word bank`
    """
    import tl_latentlens as tll
    from tl_latentlens.bank.build import cut_note
    from tl_latentlens.model.heads import head_result_layer, is_head_name
    from tl_latentlens.model.tokenize import tokenize
    from tl_latentlens.views.terminal import lens_table

    require_folders(html)
    heads = [name for name in hook_name or [] if is_head_name(name) and head_result_layer(name) is None]
    index = tll.ContextualIndex(bank, heads or None, device, transform=transform, allow_mismatch=allow_mismatch)
    loaded = tll.load_model(model, kind=kind, device=device)
    index.check_model(loaded)  # first of all: a forgotten --model shows as a bank of another model
    if n_truncated := tokenize(loaded, text, repeat=repeat).n_truncated:
        note(cut_note(loaded, n_truncated, len(text), repeat), "note")
    if index.banks[0].plan.settings.repeat != repeat:
        note(
            f"the bank was built {'without' if repeat else 'with'} --repeat, so its rows saw other texts than these: "
            f"{'leave --repeat out' if repeat else 'add --repeat'}",
            "note",
        )
    result = _read(loaded, list(text), index, repeat, hook_names=hook_name, top_k=top_k, calibrate=calibrate)
    empty = [i for i, decoded in enumerate(result.decoded) if not decoded.any()]
    if len(empty) == len(text):
        raise InvalidInputError("got no text with a token to read; give at least one word")
    for i in empty:
        note(f"text {i} has no token to read", "note")
    positions = places(result, word)
    if json is None:
        console.print(lens_table(result, neighbors=top_k, positions=positions, width=console.width))
    else:
        print_table(json, readings(result, positions))
    if html is not None:
        result.to_html(html)
        note(f"wrote {html}")


def places(result: Any, word: str | None) -> list[tuple[int, int]]:
    """(batch, pos) of the tokens that end a word, or of all that were read.

    Raises:
        InvalidInputError: No token ends it.
    """
    from tl_latentlens.corpus.words import word_ending_at

    read = [tuple(place) for place in result.positions.tolist()]
    ending = [(b, p) for b, p in read if word is None or word_ending_at(result.tokens[b], p) == word.strip()]
    if not ending:
        raise InvalidInputError(f"no token of the text ends the word {word!r}; its tokens are {result.tokens}")
    return ending


def readings(result: Any, positions: list[tuple[int, int]]) -> "pd.DataFrame":
    """`to_dataframe()` at these places alone."""
    table = result.to_dataframe()
    return table[table.set_index(["batch", "pos"]).index.isin(positions)]


def _read(model: Any, texts: list[str], index: Any, repeat: bool, **settings: Any) -> Any:
    import tl_latentlens as tll

    if not repeat:
        hooks = tll.latentlens_hooks(index, model=model, **settings)
        model.run_with_hooks(texts, fwd_hooks=hooks)
        return hooks.result
    run = tll.repeated(model, texts)
    hooks = tll.latentlens_hooks(index, positions=run.second_copy, model=model, **settings)
    model.run_with_hooks(run.tokens, attention_mask=run.attention_mask, fwd_hooks=hooks)
    result = hooks.result
    lines = zip(result.tokens or [], result.decoded, strict=True)
    once = [[token if read else "" for token, read in zip(*line, strict=True)] for line in lines]
    return replace(result, tokens=once)  # so that a title shows the text once
