"""Indices as they are copied and sent to other processes: by the files of their banks, each loaded once in a process.

A result that was computed elsewhere brings its index along. It would be loaded once for every result if it were not found here.
"""

from collections.abc import Sequence
from typing import Any, TypeVar
from uuid import uuid4
from weakref import WeakValueDictionary

from tl_latentlens.bank.bank import Bank, reopen_bank

_Index = TypeVar("_Index", bound="ReopenedIndex")
_opened: WeakValueDictionary[str, Any] = WeakValueDictionary()


class ReopenedIndex:
    """An index that is itself where it is copied, and that another process makes again of the same files.

    Attributes:
        banks: Its banks.
        allow_mismatch: Whether another model, or another bank's, is a warning only.
    """

    banks: list[Bank]
    allow_mismatch: bool
    _settings: dict[str, Any]  # arguments of the class, but for the banks and `allow_mismatch`
    _key: str  # names the index in all processes

    def _remember(self, settings: dict[str, Any], key: str | None = None) -> None:
        """Keep how the index was made; it is found again by its key as long as someone holds it."""
        self._settings, self._key = settings, key or uuid4().hex
        _opened[self._key] = self

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy is the index itself, whose vectors never change; another process opens the files again."""
        files = [(str(bank.path), bank.file.digest) for bank in self.banks]
        return reopen_index, (type(self), self._key, files, {**self._settings, "allow_mismatch": self.allow_mismatch})


def reopen_index(kind: type[_Index], key: str, files: Sequence[tuple[str, str]], settings: dict[str, Any]) -> _Index:
    """The index of this process that has a key, or a new one of the same files and settings.

    Args:
        kind: Its class.
        key: The name of the index in all processes.
        files: Path and digest of each bank.
        settings: How it was made.

    Raises:
        BankError: A file is no longer there, or another bank stands in its place.
        InvalidInputError: This machine lacks the device.
    """
    opened = _opened.get(key)
    if opened is not None and all(bank.file.is_in_place for bank in opened.banks):
        return opened
    index = kind([reopen_bank(*file) for file in files], **settings)  # type: ignore[call-arg]
    index._remember(index._settings, key)
    return index
