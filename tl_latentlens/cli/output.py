"""Output of the commands: results on stdout, as tables or as data; notes on stderr; tables written to files."""

import shlex
import sys
from collections.abc import Callable, Mapping
from json import dumps, loads
from pathlib import Path
from typing import Any

import pandas as pd
import typer
from rich.console import Console
from rich.text import Text

from tl_latentlens.errors import InvalidInputError
from tl_latentlens.views.text import printable

console = Console()
notes = Console(stderr=True)

_LIST_COLUMNS = ("neighbors", "max_activating")
WRITERS: dict[str, Callable[[pd.DataFrame, Path], object]] = {
    ".csv": lambda table, path: _join_lists(table).to_csv(path, index=False),
    ".parquet": lambda table, path: table.to_parquet(path, index=False),
    ".json": lambda table, path: table.to_json(path, orient="records", indent=1),
}


def require_folders(*paths: Path | None) -> None:
    """Check, before anything is computed, that the folders of the files to write exist.

    Raises:
        InvalidInputError: A folder is missing.
    """
    for path in paths:
        if path is not None and not path.parent.is_dir():
            raise InvalidInputError(f"no folder for {path}; make it first")


def require_writable(out: Path | None) -> None:
    """Check that `--out` has an ending that names a format, and a folder that exists.

    Raises:
        InvalidInputError: It has not.
    """
    if out is not None and (out.suffix not in WRITERS or not out.parent.is_dir()):
        raise InvalidInputError(f"got --out {out}; expected a name that ends in {', '.join(WRITERS)}, in a folder that exists")


def command_line() -> str:
    """The command as it was typed, for the head of a page."""
    return shlex.join(["tl-latentlens", *sys.argv[1:]])


def note(message: str, kind: str = "", style: str = "") -> None:
    """Print a line on stderr, as "kind: message"; control characters are shown as signs."""
    text = "\n".join(printable(line) for line in message.split("\n"))
    notes.print(Text.assemble((f"{kind}: " if kind else "", style), text), soft_wrap=True)


def print_table(json: bool, table: pd.DataFrame) -> None:
    """Print a table as JSON records, or as CSV, where lists are joined by " | "."""
    if json:
        print_record(True, _records(table))
    else:
        _join_lists(table).to_csv(sys.stdout, index=False)


def print_tables(json: bool, tables: Mapping[str, pd.DataFrame], **fields: Any) -> None:
    """Print several tables: in JSON an object of lists and further fields, in CSV one table whose column `table` names each."""
    if json:
        print_record(True, {**fields, **{name: _records(table) for name, table in tables.items()}})
        return
    stacked = pd.concat(
        [_with_nullable_integers(table).assign(table=name) for name, table in tables.items()], ignore_index=True
    )
    stacked.insert(0, "table", stacked.pop("table"))
    print_table(False, stacked)


def print_record(json: bool, record: Any) -> None:
    """Print a record as a JSON object, or as one line of CSV, where nested fields get names with dots."""
    if json:
        typer.echo(dumps(record, indent=1, ensure_ascii=False))
    else:
        pd.json_normalize(record).to_csv(sys.stdout, index=False)


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    return loads(str(table.to_json(orient="records")))  # NaN becomes null


def _with_nullable_integers(table: pd.DataFrame) -> pd.DataFrame:
    """The table with integers that do not become floats where another table lacks the column."""
    return table.astype({name: "Int64" for name in table.select_dtypes("integer")})


def _join_lists(table: pd.DataFrame) -> pd.DataFrame:
    """The table with its lists of contexts joined by " | "."""
    return table.assign(**{name: table[name].str.join(" | ") for name in _LIST_COLUMNS if name in table})
