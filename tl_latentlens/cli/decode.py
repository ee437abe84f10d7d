"""`tl-latentlens decode`: read texts token by token."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer

import tl_latentlens as tll
from tl_latentlens.bank.planning import cut_note
from tl_latentlens.cli.options import BankArgument, DataOptions, HookOption, ModelOptions
from tl_latentlens.cli.output import command_line, console, note, print_table, require_folders
from tl_latentlens.corpus.words import positions_ending_word
from tl_latentlens.errors import InvalidInputError
from tl_latentlens.model.heads import head_result_layer, is_head_name
from tl_latentlens.model.tokenize import run_input, tokenize


def decode(
    bank: BankArgument,
    text: Annotated[list[str], typer.Argument(help="one or more texts")],
    *,
    model: ModelOptions,
    data: DataOptions,
    hook_name: HookOption = None,
    word: Annotated[str | None, typer.Option(help="read only the tokens that end this word, in any case; default: all")] = None,
    strip: Annotated[
        str | None,
        typer.Option(help="show only the other words of this word over the layers, in a line for each run that reads alike"),
    ] = None,
    top_k: Annotated[int, typer.Option(help="neighbors for each token and hook name")] = 3,
    words: Annotated[int, typer.Option(help="nearest other words, which say what a token means; 0: none")] = 8,
    repeat: Annotated[
        bool, typer.Option("--repeat", help="run each text twice and read the second copy, as for a bank built with --repeat")
    ] = False,
    transform: Annotated[
        str, typer.Option(help="`raw`, `center`, `standardize`, `remove_top`, `csls` or `center_writing`; see the docs")
    ] = "auto",
    calibrate: Annotated[
        bool | None,
        typer.Option(
            "--calibrate/--no-calibrate",
            help="also give, as data, how likely a random activation comes as near to each neighbor; or not even say, as by "
            "default, whether the bank knows each token",
            show_default=False,
        ),
    ] = None,
    allow_mismatch: Annotated[bool, typer.Option(help="read on, with a warning, where the bank is of another model")] = False,
    html: Annotated[
        Path | None,
        typer.Option(help="write all readings as one page, layers × tokens, in place of tables; it needs no network"),
    ] = None,
) -> None:
    """Run texts through a model and read every token by its nearest neighbors in a bank, beside the logit lens.

    Example: `tl-latentlens decode demo.h5 "We fished and sat on the grassy bank" --word bank`
    """
    require_folders(html)
    if strip is not None and not words:
        raise InvalidInputError("got --strip with --words 0; a strip shows other words: leave --words out")
    heads = [name for name in hook_name or [] if is_head_name(name) and head_result_layer(name) is None]
    index = tll.ContextualIndex(bank, heads or None, model.device, transform=transform, allow_mismatch=allow_mismatch)
    loaded = model.load_for(index.banks[0])
    index.check_model(loaded)  # before anything else
    _note_differences(loaded, index, text, repeat)
    settings: dict[str, Any] = {"hook_names": hook_name, "top_k": top_k, "words": words}
    settings |= {} if calibrate is None else {"calibrate": calibrate}
    result = _read_repeated(loaded, index, text, settings) if repeat else _read(loaded, index, text, settings)
    _require_tokens(result)
    if calibrate is not False:
        _note_what_is_not_calibrated(result)
    word = word if strip is None else strip
    positions = positions_of(result, word)
    for i in sorted({batch for batch, _ in result.positions.tolist()} - {batch for batch, _ in positions}):
        note(f"text {i} does not have the word {word!r}", "note")
    strips = [] if strip is None else [result.word_strip(pos, batch) for batch, pos in positions]
    if data.as_json is not None:
        print_table(data.as_json, pd.concat([s.to_dataframe() for s in strips]) if strips else readings_at(result, positions))
    elif strips:
        console.print(*(one.to_rich(width=console.width) for one in strips))
    elif html is None:
        console.print(result.to_rich(top_k, positions, width=console.width))
    if html is not None:
        result.to_html(html, call=command_line())
        note(f"wrote {html}")


def positions_of(result: tll.LensResult, word: str | None) -> list[tuple[int, int]]:
    """(batch, pos) of the decoded tokens that end a word; None: of all decoded tokens.

    Raises:
        InvalidInputError: No token ends it.
    """
    decoded = [(int(batch), int(pos)) for batch, pos in result.positions]
    if word is None:
        return decoded
    found = {(b, p) for b, tokens in enumerate(result.text_tokens) for p in positions_ending_word(tokens, word)}
    positions = [place for place in decoded if place in found]
    if not positions:
        tokens = [[token for token in tokens if token] for tokens in result.text_tokens]
        raise InvalidInputError(f"no token of the text ends the word {word!r}; its tokens are {tokens}")
    return positions


def readings_at(result: tll.LensResult, positions: list[tuple[int, int]]) -> pd.DataFrame:
    """The lines of `result.to_dataframe()` at some positions (batch, pos)."""
    table = result.to_dataframe()
    is_chosen = table.set_index(["batch", "pos"]).index.isin(positions)
    return table.loc[is_chosen]


def _note_differences(model: Any, index: tll.ContextualIndex, texts: list[str], repeat: bool) -> None:
    """Say where texts are cut, or where the bank was built otherwise than they are read."""
    if n_truncated := tokenize(model, texts, repeat=repeat).n_truncated:
        note(cut_note(model, n_truncated, len(texts), repeat), "note")
    if index.banks[0].plan.settings.repeat != repeat:
        note(
            f"the bank was built {'without' if repeat else 'with'} --repeat, so its rows saw other texts than these: "
            f"{'leave --repeat out' if repeat else 'add --repeat'}",
            "note",
        )


def _require_tokens(result: tll.LensResult) -> None:
    """Say which texts have no token to read.

    Raises:
        InvalidInputError: None of them has.
    """
    empty = [i for i, decoded in enumerate(result.decoded) if not decoded.any()]
    if len(empty) == len(result.decoded):
        raise InvalidInputError("got no text with a token to read; give at least one word")
    for i in empty:
        note(f"text {i} has no token to read", "note")


def _note_what_is_not_calibrated(result: tll.LensResult) -> None:
    """Say of which hook names `known` is not computed, and why."""
    for name in result.hook_names:
        found = result.found[name]
        if found.known is None:
            is_held = name in found.index.hook_names
            why = "no token of the bank stands in two texts" if is_held else "the bank does not hold this hook name"
            note(f"{name} is without p: {why}, so nothing tells how near known tokens are", "note")


def _read(model: Any, index: tll.ContextualIndex, texts: list[str], settings: dict[str, Any]) -> tll.LensResult:
    hooks = tll.latentlens_hooks(index, model=model, **settings)
    given = run_input(model, texts)
    model.run_with_hooks(given.input, attention_mask=given.attention_mask, fwd_hooks=hooks)
    return hooks.result


def _read_repeated(model: Any, index: tll.ContextualIndex, texts: list[str], settings: dict[str, Any]) -> tll.LensResult:
    """Readings of the second copy of each text. The first copy has empty tokens, so that a title shows the text once."""
    keep_special_tokens = index.banks[0].plan.settings.keep_special_tokens
    run = tll.repeated(model, texts, keep_special_tokens=keep_special_tokens)
    hooks = tll.latentlens_hooks(index, positions=run.second_copy, model=model, **settings)
    model.run_with_hooks(run.tokens, attention_mask=run.attention_mask, fwd_hooks=hooks)
    result = hooks.result
    lines = zip(result.tokens or [], result.decoded, strict=True)
    tokens = [[token if is_decoded else "" for token, is_decoded in zip(*line, strict=True)] for line in lines]
    return replace(result, tokens=tokens)
