"""The banks of an index: opened, and known to be of one model."""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from tl_latentlens.bank.bank import Bank
from tl_latentlens.errors import InvalidInputError
from tl_latentlens.model.info import ModelInfo


def open_banks(bank: Bank | str | Path | Sequence[Bank | str | Path]) -> list[Bank]:
    """The banks that a user gave, those given as paths opened.

    Raises:
        InvalidInputError: An empty list.
        BankError: A path that is no finished bank.
    """
    sources = [bank] if isinstance(bank, Bank | str | Path) else list(bank)
    banks = [source if isinstance(source, Bank) else Bank.open(source) for source in sources]
    if not banks:
        raise InvalidInputError("got an empty list of banks; expected at least one")
    return banks


def different_models(first: ModelInfo, other: ModelInfo, *, ignores_centering: bool) -> str:
    """A message that says how the models of two banks differ; empty where both can be in one index.

    The classes of the models may differ, since they give the same activations.

    Args:
        first: The model of one bank.
        other: The model of the other.
        ignores_centering: Raw and mean-centered weights count as the same.
    """
    ignored = {"class_name", *(["centered"] if ignores_centering else [])}
    compared = [field.name for field in fields(first) if field.compare and field.name not in ignored]
    differing = [name for name in compared if getattr(first, name) != getattr(other, name)]
    if not differing:
        return ""
    described = (", ".join(f"{name}={getattr(side, name)!r}" for name in differing) for side in (first, other))
    centering = " or, without their means, with transform='center_writing'" * (differing == ["centered"])
    return f"banks of different models: {' and '.join(described)}; index them apart{centering}"
