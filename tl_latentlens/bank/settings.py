"""Settings of a build that are checked before anything is run."""

from pathlib import Path

from tl_latentlens.bank.format import DTYPES
from tl_latentlens.corpus.paths import absolute_path
from tl_latentlens.errors import BankError, InvalidInputError


def require_settings(dtype: str, batch_tokens: int | None) -> None:
    """Check how a bank is to be written.

    Raises:
        InvalidInputError: An unknown dtype, or `batch_tokens` below 1.
    """
    if dtype not in DTYPES:
        raise InvalidInputError(f"got dtype={dtype!r}; expected one of {list(DTYPES)}")
    if batch_tokens is not None and batch_tokens < 1:
        raise InvalidInputError(f"got batch_tokens={batch_tokens}; expected at least 1")


def require_folder(path: str | Path) -> None:
    """Check that the folder of a bank to be written is there.

    Raises:
        BankError: It is not.
    """
    given, folder = Path(path), absolute_path(path).parent
    if not folder.is_dir():
        raise BankError(f"no folder {given.parent} to write {given.name} in; create it first")
