"""A finished bank: open it, look up rows, map vectors, verify. `writer` fills it, `file` knows what stands where."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from tqdm.auto import tqdm

from tl_latentlens.bank.datasets import MEAN, STD
from tl_latentlens.bank.file import BankFile
from tl_latentlens.bank.folder import BankFolder
from tl_latentlens.bank.format import partial_path
from tl_latentlens.bank.moments import mean_and_std_of_heads
from tl_latentlens.bank.token_bytes import TokenBytes
from tl_latentlens.corpus.paths import absolute_path
from tl_latentlens.corpus.plan import Plan
from tl_latentlens.errors import BankCorruptError, BankError, InvalidInputError, UnknownHookError
from tl_latentlens.model.fingerprint import Fingerprint
from tl_latentlens.model.heads import head_names, head_of, hook_point, is_head_name
from tl_latentlens.model.info import ModelInfo
from tl_latentlens.views.context import Context, end_of_text, start_of_text
from tl_latentlens.views.data import PropertyTable
from tl_latentlens.views.notebook import NOTEBOOK_EXAMPLES, properties_html
from tl_latentlens.views.text import short_hook_name


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
        """The prompt's text, without special tokens, as the tokenizer's `decode` gives it."""
        text, dropped_space = self.bank.text(self.bank.prompt(self.prompt_index)), self.bank.file.metadata.dropped_space
        text = text.removeprefix(" ") if dropped_space == "start" else text
        return text.removesuffix(" ") if dropped_space == "end" else text

    def context(self, width: int = 80, marks: tuple[str, str] = ("«", "»")) -> str:
        """The text around the token, at most `width` characters to each side, the token between `marks`."""
        return self.window(width).marked(marks)

    def window(self, width: int = 80) -> Context:
        """The token with the text around it, at most `width` characters to each side, newlines as spaces.

        Where the text is cut, it is cut between words.
        """
        before, after = self._around(width + 4)
        before = before if len(before) <= width else "…" + end_of_text(before, before[len(before) - width :])
        after = after if len(after) <= width else start_of_text(after, after[:width]) + "…"
        context = Context.around(before, self.token, after)
        return Context(context.before.replace("\n", " ").lstrip(), self.token, context.after.replace("\n", " ").rstrip())

    def _around(self, n_characters: int) -> tuple[str, str]:
        """The text before and after the token: all of it, or at least so many characters.

        The outermost three may be wrong, where the cut goes through the bytes of a character.
        """
        token_ids, text = self.bank._prompt(self.prompt_index), self.bank.text
        ids_before, ids_after = token_ids[: self.position], token_ids[self.position + 1 :]
        before, after = text(ids_before[-n_characters:].tolist()), text(ids_after[:n_characters].tolist())
        # Most tokens have a character or more. Tokens that are parts of characters, or no text, have less.
        if len(ids_before) > n_characters and len(before) < n_characters:
            before = text(ids_before.tolist())
        if len(ids_after) > n_characters and len(after) < n_characters:
            after = text(ids_after.tolist())
        return before, after


class Bank:
    """A finished bank file. Opening reads metadata only; vectors are memory-mapped when asked for."""

    def __init__(self, path: Path, file: BankFile | BankFolder) -> None:
        """Use `Bank.open`."""
        self.path = path
        self.file = file
        self._moments_of_heads: dict[str, dict[str, Float[np.ndarray, "head d_head"]]] = {}

    @classmethod
    def open(cls, path: str | Path) -> "Bank":
        """Open a finished bank: a file, or a folder of its shards or of files by hook name, or of both.

        Raises:
            BankError: No such file, or not a bank, or a bank that is still being built or lacks parts.
            BankCorruptError: The file's metadata is not what was written.
        """
        given, path = Path(path), absolute_path(path)
        if path.is_dir():
            return cls(path, BankFolder(path))
        if not path.is_file():
            partial = partial_path(path)
            hint = f"; {partial.name} is there: the same build call resumes it" if partial.exists() else ""
            raise BankError(f"no bank file at {given}{hint}")
        file = BankFile(path)
        if not file.head.complete:
            raise BankError(f"{path} is an unfinished bank; run the same build call again to resume it")
        return cls(path, file)

    def __enter__(self) -> "Bank":
        """Return the bank itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Let go of the memory maps."""
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, or a bank in another process, opens the file again."""
        return reopen_bank, (str(self.path), self.file.digest)

    def __repr__(self) -> str:
        return f"Bank({str(self.path)!r}: {self.n_rows} rows, {len(self.hook_names)} hook names, {self.model_info.name})"

    def _repr_html_(self) -> str:
        model, plan = self.model_info, self.plan
        cap = plan.settings.max_rows_per_token
        n_examples = NOTEBOOK_EXAMPLES if self.n_rows else 0  # a shard may have no rows
        examples = dict.fromkeys(((2 * np.arange(n_examples) + 1) * self.n_rows // (2 * NOTEBOOK_EXAMPLES)).tolist())
        properties = {
            "model": f"{model.name}, {model.n_layers} layers, d_model {model.d_model}",
            "rows": f"{self.n_rows:,} contextual tokens of {plan.n_prompts:,} prompts",
            "plan": f"{'no cap' if cap is None else f'at most {cap} rows'} a token id, seed {plan.settings.seed}"
            + ", each text run twice" * plan.settings.repeat,
            "hook names": [f"{short_hook_name(name)} [{self.d(name)}]" for name in self.hook_names],
            "stored as": f"{self.dtype}, {self.n_bytes / 1e6:,.1f} MB, {self.path}",
        }
        return properties_html(PropertyTable("Bank", properties, [self.row(row).window() for row in examples]))

    def close(self) -> None:
        """Let go of the memory maps; the bank maps them again if it is used again."""
        self.file.close()

    @property
    def n_rows(self) -> int:
        """Contextual tokens in the bank; the same rows for every hook name."""
        return self.plan.n_rows

    @property
    def hook_names(self) -> tuple[str, ...]:
        """The banked hook names, in the order they were asked for."""
        return tuple(self.file.widths)

    @property
    def model_info(self) -> ModelInfo:
        """The model that filled the bank."""
        return self.file.metadata.model

    @property
    def dtype(self) -> str:
        """Storage type of the vectors: "float16", "bfloat16" or "float32"."""
        return self.file.metadata.dtype

    @property
    def n_bytes(self) -> int:
        """Bytes of its file, or files."""
        return sum(file.path.stat().st_size for file in self.file.files)

    @property
    def versions(self) -> dict[str, str]:
        """Package versions that built the bank."""
        return self.file.metadata.versions

    @property
    def plan(self) -> Plan:
        """The kept rows and their prompts; the tokens are memory-mapped."""
        return self.file.plan

    @property
    def plan_digest(self) -> str:
        """sha256 of the plan: banks with the same digest have the same rows."""
        return self.file.metadata.plan_digest

    def n_heads(self, hook_name: str) -> int:
        """Heads that stand side by side in a hook name's vectors; 1 for all other hook names."""
        self._require(hook_name)
        return self.file.metadata.n_heads.get(hook_point(hook_name), 1)

    def head_names(self, hook_name: str) -> list[str]:
        """The hook names that a name stands for: each head of `blocks.3.attn.hook_z[:]`, else the name itself.

        Raises:
            UnknownHookError: The bank does not have it.
        """
        names = head_names(hook_name, self.n_heads(hook_name))
        self._require(names[-1])
        return names

    def d(self, hook_name: str) -> int:
        """Width of a hook name's vectors; of a head's, d_head."""
        self._require(hook_name)
        return self.file.widths[hook_point(hook_name)] // (1 if head_of(hook_name) is None else self.n_heads(hook_name))

    def vectors(self, hook_name: str) -> Float[np.ndarray, "rows d"]:
        """The unit-length vectors of a hook name, memory-mapped; writing to them does not reach the file.

        Those of a head, `blocks.3.attn.hook_z[5]`, are columns of them, whose length varies. Of several shards they are copied
        into memory; `vector_parts` maps those of each.
        """
        self._require(hook_name)
        return self._columns(hook_name, self.file.map_vectors(hook_point(hook_name)))

    def vector_parts(self, hook_name: str) -> list[tuple[int, Float[np.ndarray, "rows d"]]]:
        """The vectors of a hook name, memory-mapped file by file: the row at which each begins, and its vectors."""
        self._require(hook_name)
        point = hook_point(hook_name)
        return [(first, self._columns(hook_name, file.map_vectors(point))) for first, file in self.file.parts_of(point)]

    def vectors_at(self, hook_name: str, rows: slice | Int[np.ndarray, " n"]) -> Float[np.ndarray, "n d"]:
        """The vectors of some rows, in the dtype of the bank, in memory; rows in any order, or a slice."""
        parts = self.vector_parts(hook_name)
        if len(parts) == 1:
            return parts[0][1][rows]
        return _at(parts, np.arange(self.n_rows)[rows])

    def _columns(self, hook_name: str, vectors: Float[np.ndarray, "rows d"]) -> Float[np.ndarray, "rows d_head"]:
        """Those of a head, or all."""
        width, head = self.d(hook_name), head_of(hook_name)
        return vectors if head is None else vectors[:, head * width : (head + 1) * width]

    def norms(self, hook_name: str) -> Float[np.ndarray, " rows"]:
        """Length of each activation (all heads together) before it was divided by it, float32, memory-mapped."""
        self._require(hook_name)
        return self.file.map_norms(hook_point(hook_name))

    def activations(self, hook_name: str, rows: slice | Int[np.ndarray, " n"]) -> Float[np.ndarray, "n d"]:
        """The activations as the model gave them, up to the precision of `dtype`: vectors x norms, float32, in memory.

        Args:
            hook_name: As `vectors` takes it: a hook name, or one head of it.
            rows: Row numbers in any order, or a slice; slice(None): all.

        Raises:
            UnknownHookError: The bank does not have it.
        """
        return np.asarray(self.vectors_at(hook_name, rows), np.float32) * np.asarray(self.norms(hook_name)[rows])[:, None]

    def mean(self, hook_name: str) -> Float[np.ndarray, " d"]:
        """Mean of the vectors, each brought to length 1, per dimension, float64."""
        return self._moment(hook_name, MEAN)

    def std(self, hook_name: str) -> Float[np.ndarray, " d"]:
        """Standard deviation of the vectors, each brought to length 1, per dimension, float64 (divided by n)."""
        return self._moment(hook_name, STD)

    def _moment(self, hook_name: str, moment: str) -> Float[np.ndarray, " d"]:
        self._require(hook_name)
        head, point = head_of(hook_name), hook_point(hook_name)
        if head is None:
            mean, std = self.file.moments(point)
            return mean if moment == MEAN else std
        if point not in self._moments_of_heads:
            vectors = [part for _, part in self.vector_parts(point)]
            mean, std = mean_and_std_of_heads(vectors, self.n_heads(point))
            self._moments_of_heads[point] = {MEAN: mean, STD: std}
        return self._moments_of_heads[point][moment][head]

    def row(self, row: int) -> Row:
        """Look up one row.

        Raises:
            InvalidInputError: `row` is outside [0, n_rows).
        """
        row = int(row)
        if not 0 <= row < self.n_rows:
            raise InvalidInputError(f"got row {row}; the bank has rows 0 to {self.n_rows - 1}")
        plan = self.plan
        row_token = plan.row_tokens.item(row)
        prompt = int(plan.prompt_starts.searchsorted(row_token, "right")) - 1
        token_id, position = plan.tokens.item(row_token), row_token - plan.prompt_starts.item(prompt)
        return Row(row, token_id, self.token_string(token_id), position, prompt, self)

    def prompt(self, prompt_index: int) -> list[int]:
        """Token ids of a prompt, BOS included."""
        return self._prompt(prompt_index).tolist()

    def _prompt(self, prompt_index: int) -> Int[np.ndarray, " pos"]:
        plan = self.plan
        start, end = plan.prompt_starts[prompt_index : prompt_index + 2].tolist()
        return plan.tokens[start:end]

    def token_string(self, token_id: int) -> str:
        """The text of one token; bytes that are no whole character show as the replacement character."""
        return self._token_bytes[token_id].decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token's text, which may be part of a character; none for a special token."""
        return self._plain_bytes[token_id]

    def text(self, token_ids: Sequence[int]) -> str:
        """The text of tokens in sequence, special tokens left out."""
        return b"".join(map(self._plain_bytes.__getitem__, token_ids)).decode("utf-8", errors="replace")

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """The stored prompts and activations by which the model is known again."""
        return self.file.fingerprint

    def verify(self, hook_names: Sequence[str] | None = None, *, progress: bool = False) -> None:
        """Check every checksum, metadata and vectors.

        Args:
            hook_names: Whose vectors to check; None: all.
            progress: Show a progress bar.

        Raises:
            BankCorruptError: Naming the hook name and the block that differ.
        """
        self.file.check()
        names = self.hook_names if hook_names is None else hook_names
        for name in names:
            self._require(name)
        parts = [(name, file) for name in names for _, file in self.file.parts_of(hook_point(name))]
        for name, file in tqdm(parts, desc="verify", unit=" hook names", disable=not progress):
            for block in file.bad_blocks(hook_point(name)):
                first, last = file.blocks()[block]
                raise BankCorruptError(
                    f"{file.path}: hook name {name!r}, block {block} (rows {first} to {last - 1}) does not match its "
                    "checksum; the file was changed or the disk is failing: copy the bank again or rebuild it"
                )

    def blocks(self) -> list[tuple[int, int]]:
        """First row and end of each checksummed block."""
        return self.file.blocks()

    @cached_property
    def _token_bytes(self) -> TokenBytes:
        return TokenBytes(self.file)

    @cached_property
    def _plain_bytes(self) -> TokenBytes:
        return TokenBytes(self.file, without=self.file.metadata.special_ids)

    def _require(self, hook_name: str) -> None:
        point = hook_point(hook_name)
        if point not in self.file.widths:
            raise UnknownHookError(f"the bank {self.path} has no hook name {hook_name!r}; it has {list(self.hook_names)}")
        if not is_head_name(hook_name):
            return
        n_heads = self.file.metadata.n_heads.get(point)
        if n_heads is None:
            raise UnknownHookError(
                f"the bank {self.path} knows no heads of {point!r}, asked for as {hook_name!r}: the activation has none, or "
                f"the bank was built before heads were counted; use {point!r}, or rebuild the bank"
            )
        if (head_of(hook_name) or 0) >= n_heads:
            raise UnknownHookError(f"{point!r} has heads 0 to {n_heads - 1} in the bank {self.path}, got {hook_name!r}")


def _at(parts: Sequence[tuple[int, np.ndarray]], rows: Int[np.ndarray, " n"]) -> np.ndarray:
    """The values at some rows of parts that follow each other."""
    values = np.empty((len(rows), *parts[0][1].shape[1:]), parts[0][1].dtype)
    for first, part in parts:
        is_in = (rows >= first) & (rows < first + len(part))
        values[is_in] = part[rows[is_in] - first]
    return values


def reopen_bank(path: str, digest: str) -> Bank:
    """The bank at a path, if the file is still the one that had this digest in its head.

    Raises:
        BankError: As `Bank.open`, or another bank stands there now.
    """
    bank = Bank.open(path)
    if bank.file.digest != digest:
        raise BankError(
            f"{path} is another bank than the one that was copied or sent (its digest is {bank.file.digest}, expected "
            f"{digest}); put that file back, or open this one: Bank.open({path!r})"
        )
    return bank
