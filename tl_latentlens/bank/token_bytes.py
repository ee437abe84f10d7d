"""The bytes of the tokens of a bank, read when they are first asked for."""

from bisect import bisect_left
from collections.abc import Iterable

from tl_latentlens.bank.file import BankFile
from tl_latentlens.bank.folder import BankFolder
from tl_latentlens.errors import BankCorruptError


class TokenBytes(dict[int, bytes]):
    """Token id → the bytes of its text. It fills as tokens are looked up: vocabularies are large, and few tokens are."""

    def __init__(self, file: BankFile | BankFolder, without: Iterable[int] = ()) -> None:
        """Look tokens up in a bank file; those of `without` have no bytes."""
        super().__init__(dict.fromkeys(without, b""))
        self._file = file

    def __missing__(self, token_id: int) -> bytes:
        token_ids, starts, all_bytes = self._file.map_token_bytes()
        place = bisect_left(token_ids, token_id)
        if place == len(token_ids) or token_ids[place] != token_id:
            raise BankCorruptError(f"{self._file.path} holds no text for token id {token_id}; rebuild it")
        self[token_id] = all_bytes[starts[place] : starts[place + 1]].tobytes()
        return self[token_id]
