"""`tl-latentlens plan`: what a bank would cost, and which words it would have, before it is built."""

from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import typer
from rich.table import Table
from rich.text import Text

import tl_latentlens as tll
from tl_latentlens.cli.corpus_options import CorpusArgument, CorpusOptions, PlanOptions
from tl_latentlens.cli.options import DataOptions, HookOption, ModelOptions
from tl_latentlens.cli.output import console, note, print_tables
from tl_latentlens.corpus.plan_file import require_plan_path
from tl_latentlens.errors import CorpusError
from tl_latentlens.views.text import printable, short_hook_name

_SHOWN_WORDS = 40
_DAY, _HOUR, _MINUTE = 86400, 3600, 60


def plan(
    corpus: CorpusArgument,
    *,
    model: ModelOptions,
    data: DataOptions,
    texts: CorpusOptions,
    plan: PlanOptions,
    hook_name: HookOption = None,
    words: Annotated[Path | None, typer.Option(help="a file of wanted words, one a line: how many rows each would get")] = None,
    language: Annotated[str, typer.Option(help="of the stemmer that tells inflections, or `none`")] = "english",
    save: Annotated[
        Path | None, typer.Option(help="write the plan here (.plan): builds take it in place of the corpus, and plan nothing")
    ] = None,
) -> None:
    """Say what a bank would cost before it is built: rows, bytes, time, cards, and the rows of wanted words.

    Example: `tl-latentlens plan corpus.txt --model gpt2 --words wanted.txt --save gpt2.plan`
    """
    wanted = None if words is None else _read_words(words)
    if save is not None:
        require_plan_path(save)
    planned = tll.plan_bank(
        model.load(),
        texts.load(corpus),
        hook_names=hook_name,
        words=wanted,
        language=None if language == "none" else language,
        **plan.settings(),
    )
    if save is not None:
        note(f"the plan is in {planned.save(save)}", "note")
    if data.as_json is None:
        _print(planned)
        return
    costs = {
        "n_tokens": planned.n_tokens,
        "n_prompts": planned.plan.n_prompts,
        "n_rows": planned.n_rows,
        "tokens_to_run": planned.tokens_to_run,
        "bytes_on_disk": planned.bytes_on_disk,
        "bytes_on_gpu": planned.bytes_on_gpu,
        "bytes_of_model": planned.bytes_of_model,
        "seconds": planned.seconds,
    }
    tables = {"cards": planned.cards()} | ({} if planned.coverage is None else {"words": planned.coverage})
    if data.as_json:
        print_tables(True, tables, **costs, widths=planned.widths, tokens_per_second=list(planned.tokens_per_second))
    else:
        print_tables(False, {"costs": pd.DataFrame([costs]), **tables})


def _read_words(path: Path) -> list[str]:
    """The words of a file, one a line.

    Raises:
        CorpusError: It cannot be read.
    """
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise CorpusError(
            f"the wanted words in {path} cannot be read: {error}; expected a text file, one word a line"
        ) from error


def _print(planned: tll.BankPlan) -> None:
    console.print(_cost_table(planned))
    cards = planned.cards()
    fits_all = np.flatnonzero((cards["n_cards"].to_numpy() == 1) & (cards["model"].to_numpy() == "fits"))
    shown = cards.head(int(fits_all[0]) + 1) if len(fits_all) else cards  # larger cards hold all, too
    title = "What fits a GPU" + ", and so do larger ones" * bool(len(fits_all))
    console.print(_frame_table(shown, title, ["memory, GB", "index holds", "cards for all", "weights"]))
    if planned.coverage is not None:
        _print_coverage(planned.coverage)


def _cost_table(planned: tll.BankPlan) -> Table:
    table = Table(show_header=False, title="Cost", title_justify="left", title_style="bold")
    table.add_column(style="dim")
    table.add_column()
    rates = planned.tokens_per_second
    measured = f" ({len(rates)} batches measured, {min(rates):,.0f} to {max(rates):,.0f} tokens/s)" if rates else ""
    settings = planned.plan.settings
    cap = "no cap" if settings.max_rows_per_token is None else f"at most {settings.max_rows_per_token} a token id"
    lines = {
        "corpus": f"{planned.n_tokens:,} tokens in {planned.plan.n_prompts:,} texts",
        "rows": f"{planned.n_rows:,} ({cap})",
        "hook names": "\n".join(f"{short_hook_name(name)}  [{d}]" for name, d in planned.widths.items()),
        "to run": f"{planned.tokens_to_run:,} tokens, about {_duration(planned.seconds)} in one process{measured}",
        "on disk": f"{_size(planned.bytes_on_disk)} ({planned.dtype})",
        "on a GPU": f"{_size(planned.bytes_on_gpu)}, for a search of all hook names",
        "the model": f"{_size(planned.bytes_of_model)} of weights",
    }
    for key, value in lines.items():
        table.add_row(key, Text(value))
    return table


def _frame_table(frame: pd.DataFrame, title: str, headings: list[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for heading, dtype in zip(headings, frame.dtypes, strict=True):
        table.add_column(heading, justify="right" if pd.api.types.is_numeric_dtype(dtype) else "left")
    for line in frame.itertuples(index=False):
        table.add_row(*(f"{value:,}" if isinstance(value, int | float) else Text(printable(str(value))) for value in line))
    return table


def _print_coverage(coverage: pd.DataFrame) -> None:
    """The words with the fewest rows, and those that get none."""
    n_rows = coverage["inflection_rows"].to_numpy()
    without = coverage["word"][n_rows == 0].tolist()
    order = np.argsort(n_rows, kind="stable")
    found = coverage.iloc[order[n_rows[order] > 0]]
    more = f", the {_SHOWN_WORDS} with the fewest rows" if len(found) > _SHOWN_WORDS else ""
    title = f"Wanted words: {len(found):,} of {len(coverage):,} would have rows{more}"
    headings = ["word", "rows", "with inflections", "texts", "inflections"]
    if len(found):
        console.print(_frame_table(found.head(_SHOWN_WORDS), title, headings))
    if without:
        more = f" and {len(without) - _SHOWN_WORDS:,} more" if len(without) > _SHOWN_WORDS else ""
        console.print(Text(printable(f"Without a row ({len(without):,}): {', '.join(without[:_SHOWN_WORDS])}{more}")))


def _size(n_bytes: int) -> str:
    """A number of bytes in MB or GB."""
    return f"{n_bytes / 1e6:,.0f} MB" if n_bytes < 1e9 else f"{n_bytes / 1e9:,.1f} GB"


def _duration(seconds: float) -> str:
    """A length of time in words."""
    if seconds != seconds:
        return "an unknown time"
    if seconds < _MINUTE:
        return f"{seconds:.0f} s"
    if seconds < _HOUR:
        return f"{seconds / _MINUTE:.0f} min"
    return f"{seconds / _HOUR:.1f} h" if seconds < 2 * _DAY else f"{seconds / _DAY:.1f} days"
