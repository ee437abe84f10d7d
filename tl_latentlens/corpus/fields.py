"""Fields of records by name: a column, or dots that lead into nested fields and through lists."""

from collections.abc import Iterable
from typing import Any

from tl_latentlens.errors import CorpusError


def require_column(column: str, columns: list[str], source: str, hint: str = "") -> None:
    """Check that a source has a column; a hint is added to the error.

    Raises:
        CorpusError: It has not.
    """
    if column not in columns:
        raise CorpusError(
            f"{source} has no column {column!r}; it has {columns}; pass text_column=... (--text-column in a shell){hint}"
        )


def top_column(column: str, columns: list[str]) -> str:
    """The column itself where there is one of that name, else the part before the first dot."""
    return column if column in columns else column.partition(".")[0]


def texts_of_records(records: Iterable[Any], column: str) -> list[Any]:
    """What stands at a column, or nested field, of each record; all of it where lists are on the way.

    Raises:
        CorpusError: A record has no such field.
    """
    return [value for record in records for value in _values(record, column)]


def text_of_record(record: Any, column: str) -> Any:
    """What stands at a column, or nested field, of one record.

    Raises:
        CorpusError: It has no such field, or a list is on the way.
    """
    values = _values(record, column)
    if len(values) != 1:
        raise CorpusError(f"{column!r} holds {len(values)} texts in one example, expected one; flatten the dataset first")
    return values[0]


def values_at(value: Any, field: str, source: str) -> list[Any]:
    """What stands at a path of dots in a JSON value; several values where a list is on the way.

    Raises:
        CorpusError: There is no such field.
    """
    values = [value]
    for name in field.split("."):
        values = [item for found in values for item in (found if isinstance(found, list) else [found])]
        for found in values:
            if not isinstance(found, dict) or name not in found:
                names = list(found) if isinstance(found, dict) else f"a {type(found).__name__}"
                raise CorpusError(f"{source} has no field {field!r}: for {name!r} it has {names}")
        values = [found[name] for found in values]
    return values


def _values(value: Any, path: str) -> list[Any]:
    if isinstance(value, list):
        return [found for item in value for found in _values(item, path)]
    columns = list(value) if isinstance(value, dict) else []
    name = top_column(path, columns)
    require_column(name, columns, "an example")
    return [value[name]] if name == path else _values(value[name], path.partition(".")[2])
