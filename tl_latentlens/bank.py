"""The bank file, read: open, look up rows, map vectors, verify. `writer` fills it, `bank_format` says what stands where."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
from jaxtyping import Float

from tl_latentlens.bank_format import (
    DTYPES,
    Fingerprint,
    Layout,
    ModelInfo,
    block_checksum,
    check_metadata,
    partial_path,
    read_user_block,
)
from tl_latentlens.errors import BankCorruptError, BankError, InvalidInputError, UnknownHookError
from tl_latentlens.plan import Plan


@dataclass(frozen=True)
class Row:
    """One contextual token of a bank: a token in its prompt."""

    row: int
    token_id: int
    token: str
    position: int
    prompt_index: int
    bank: "Bank"

    @property
    def prompt_tokens(self) -> list[str]:
        """The strings of the prompt's tokens, BOS included."""
        return [self.bank.token_string(i) for i in self.bank.prompt(self.prompt_index)]

    @property
    def prompt_text(self) -> str:
        """The prompt's text, without special tokens."""
        return self.bank.text(self.bank.prompt(self.prompt_index))

    def context(self, width: int = 80, marks: tuple[str, str] = ("«", "»")) -> str:
        """The text around the token, at most `width` characters to each side, the token between `marks`."""
        ids = self.bank.prompt(self.prompt_index)
        before, after = self.bank.text(ids[: self.position]), self.bank.text(ids[self.position + 1 :])
        bare = self.token.lstrip()
        lead = self.token[: len(self.token) - len(bare)] if bare else ""
        before = before if len(before) <= width else "…" + before[len(before) - width :]
        after = after if len(after) <= width else after[:width] + "…"
        return f"{before}{lead}{marks[0]}{bare or self.token}{marks[1]}{after}".replace("\n", " ").strip()


class Bank:
    """A finished bank file. Opening reads metadata only; vectors are memory-mapped when asked for."""

    def __init__(self, path: Path, layout: "Layout") -> None:
        """Use `Bank.open`."""
        self.path = path
        self._layout = layout

    @classmethod
    def open(cls, path: str | Path) -> "Bank":
        """Open a finished bank.

        Raises:
            BankError: No such file, or not a bank, or a bank that is still being built.
            BankCorruptError: The file's metadata is not what was written.
        """
        path = Path(path).expanduser()
        if not path.is_file():
            partial = partial_path(path)
            hint = f"; {partial.name} is there: the same build call resumes it" if partial.exists() else ""
            raise BankError(f"no bank file at {path}{hint}")
        if not read_user_block(path)["complete"]:
            raise BankError(f"{path} is an unfinished bank; run the same build call again to resume it")
        return cls(path, Layout(path))

    def __enter__(self) -> "Bank":
        """Return the bank itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Let go of the memory maps."""
        self.close()

    def __repr__(self) -> str:
        return f"Bank({str(self.path)!r}: {self.n_rows} rows, {len(self.hook_names)} hook names, {self.model_info.name})"

    def close(self) -> None:
        """Let go of the memory maps; the bank maps them again if it is used again."""
        self._layout.close()

    @property
    def n_rows(self) -> int:
        """Contextual tokens in the bank; the same rows for every hook name."""
        return self.plan.n_rows

    @property
    def hook_names(self) -> tuple[str, ...]:
        """The banked hook names, in the order they were asked for."""
        return tuple(self._layout.widths)

    @property
    def model_info(self) -> ModelInfo:
        """The model that filled the bank."""
        return self._layout.model

    @property
    def dtype(self) -> str:
        """How the vectors are stored: "float16", "bfloat16" or "float32"."""
        return self._layout.dtype

    @property
    def versions(self) -> dict[str, str]:
        """Package versions that built the bank."""
        return self._layout.versions

    @property
    def plan(self) -> Plan:
        """Which rows were kept, and of which prompts; the tokens are memory-mapped."""
        return self._layout.plan

    @property
    def plan_digest(self) -> str:
        """sha256 of the plan: banks with the same digest have the same rows."""
        return self._layout.plan_digest

    def d(self, hook_name: str) -> int:
        """Width of a hook name's vectors."""
        self._require(hook_name)
        return self._layout.widths[hook_name]

    def vectors(self, hook_name: str) -> Float[np.ndarray, "rows d"]:
        """The unit-length vectors of a hook name, memory-mapped; writing to them does not reach the file."""
        self._require(hook_name)
        stored = self._layout.map(f"hooks/{hook_name}/vectors")
        return stored.view(DTYPES[self.dtype][0])

    def norms(self, hook_name: str) -> Float[np.ndarray, " rows"]:
        """Length of each activation before it was normalised, float32, memory-mapped."""
        self._require(hook_name)
        return self._layout.map(f"hooks/{hook_name}/norms")

    def mean(self, hook_name: str) -> Float[np.ndarray, " d"]:
        """Mean of the unit-length vectors, per dimension, float64."""
        self._require(hook_name)
        return np.array(self._layout.map(f"hooks/{hook_name}/mean"))

    def std(self, hook_name: str) -> Float[np.ndarray, " d"]:
        """Standard deviation of the unit-length vectors, per dimension, float64 (divided by n)."""
        self._require(hook_name)
        return np.array(self._layout.map(f"hooks/{hook_name}/std"))

    def row(self, row: int) -> Row:
        """Look up one row.

        Raises:
            InvalidInputError: `row` is outside [0, n_rows).
        """
        row = int(row)
        if not 0 <= row < self.n_rows:
            raise InvalidInputError(f"got row {row}; the bank has rows 0 to {self.n_rows - 1}")
        at = int(self.plan.row_tokens[row])
        prompt = int(np.searchsorted(self.plan.prompt_starts, at, side="right")) - 1
        token = int(self.plan.tokens[at])
        return Row(row, token, self.token_string(token), at - int(self.plan.prompt_starts[prompt]), prompt, self)

    def prompt(self, prompt_index: int) -> list[int]:
        """Token ids of a prompt, BOS included."""
        start, end = self.plan.prompt_starts[prompt_index : prompt_index + 2]
        return self.plan.tokens[start:end].tolist()

    def token_string(self, token_id: int) -> str:
        """The text of one token; bytes that are no whole character show as the replacement character."""
        return self._token_bytes[token_id].decode("utf-8", errors="replace")

    def text(self, token_ids: Sequence[int]) -> str:
        """The text of tokens in sequence, special tokens left out."""
        special = self._layout.special_ids
        return b"".join(self._token_bytes[i] for i in token_ids if i not in special).decode("utf-8", errors="replace")

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """The stored prompts and activations by which the model is known again."""
        starts = self._layout.map("fingerprint/prompt_starts").tolist()
        tokens = self._layout.map("fingerprint/tokens").tolist()
        prompts = tuple(tuple(tokens[a:b]) for a, b in pairwise(starts))
        return Fingerprint(prompts, {n: np.array(self._layout.map(f"fingerprint/{n}")) for n in self.hook_names})

    def verify(self, hook_names: Sequence[str] | None = None) -> None:
        """Check every checksum, metadata and vectors.

        Raises:
            BankCorruptError: Naming the hook name and the block that differ.
        """
        check_metadata(self.path)
        for name in self.hook_names if hook_names is None else hook_names:
            self._require(name)
            # Mapped anew: `vectors` hands out private copies that the user may have written to.
            parts = (self._layout.map_file(f"hooks/{name}/{part}") for part in ("vectors", "norms", "checksums"))
            vectors, norms, expected = parts
            for block, (first, last) in enumerate(self.blocks()):
                if block_checksum(vectors[first:last], norms[first:last]) != int(expected[block]):
                    raise BankCorruptError(
                        f"{self.path}: hook name {name!r}, block {block} (rows {first} to {last - 1}) does not match its "
                        "checksum; the file was changed or the disk is failing: copy the bank again or rebuild it"
                    )

    def blocks(self) -> Iterator[tuple[int, int]]:
        """First row and end of each checksummed block."""
        starts = self._layout.map("block_starts").tolist()
        return pairwise(starts)

    @cached_property
    def _token_bytes(self) -> dict[int, bytes]:
        ids, starts = self._layout.map("token_ids").tolist(), self._layout.map("token_byte_starts").tolist()
        blob = self._layout.map("token_bytes").tobytes()
        return {i: blob[a:b] for i, a, b in zip(ids, starts[:-1], starts[1:], strict=True)}

    def _require(self, hook_name: str) -> None:
        if hook_name not in self._layout.widths:
            raise UnknownHookError(f"the bank {self.path} has no hook name {hook_name!r}; it has {list(self.hook_names)}")
