"""The options of a corpus and of the plan of its rows, of the commands that plan or build a bank."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer

import tl_latentlens as tll
from tl_latentlens.cli.option_groups import OptionGroup
from tl_latentlens.corpus.plan_file import is_plan_path
from tl_latentlens.corpus.texts import TextStream
from tl_latentlens.errors import InvalidInputError

CorpusArgument = Annotated[
    str,
    typer.Argument(
        help="a .txt, .csv, .tsv, .jsonl, .json or .parquet file, a folder of them, `demo`, the id of a hub dataset, or a plan "
        "(.plan) that `tl-latentlens plan` saved"
    ),
]


@dataclass
class CorpusOptions(OptionGroup):
    """Where the texts are in a corpus."""

    text_column: Annotated[
        str, typer.Option(help="column that holds the text (tables, datasets); dots lead into nested fields")
    ] = "text"
    field: Annotated[str | None, typer.Option(help="where the records are in a .json file, for instance data.rows")] = None
    split: Annotated[str, typer.Option(help="split of a hub dataset")] = "train"
    limit: Annotated[int | None, typer.Option(help="read at most this many texts")] = None

    def load(self, corpus: str) -> Sequence[str] | TextStream | str:
        """The texts of a corpus; the path of a plan as it is.

        Raises:
            CorpusError: It cannot be read.
            InvalidInputError: A limit for a plan.
        """
        if is_plan_path(corpus):
            if self.limit is not None:
                raise InvalidInputError(f"got --limit with the plan {corpus}, which has its texts; leave it out, or plan again")
            return corpus
        return tll.load_corpus(corpus, text_column=self.text_column, field=self.field, split=self.split, limit=self.limit)


@dataclass
class PlanOptions(OptionGroup):
    """What decides the rows of a bank, and how they are stored."""

    max_rows_per_token: Annotated[int, typer.Option(help="most rows of one token id, a uniform sample; 0: no cap")] = 50
    store_dtype: Annotated[str, typer.Option(help="how vectors are stored: float16, bfloat16 or float32")] = "float16"
    dtype: Annotated[str | None, typer.Option("--dtype", hidden=True)] = None
    seed: Annotated[int, typer.Option(help="seed of the sample")] = 0
    repeat: Annotated[
        bool, typer.Option("--repeat", help="run each text twice and read the second copy, whose tokens know what comes after")
    ] = False
    keep_special_tokens: Annotated[
        bool, typer.Option("--keep-special-tokens", help="make rows of special tokens in the texts too (chat templates)")
    ] = False
    batch_tokens: Annotated[int | None, typer.Option(help="most tokens of one batch; less needs less memory")] = None

    def settings(self) -> dict[str, Any]:
        """The arguments of `build_bank` and `plan_bank`."""
        return {
            "max_rows_per_token": self.max_rows_per_token or None,
            "dtype": self.dtype or self.store_dtype,
            "seed": self.seed,
            "repeat": self.repeat,
            "keep_special_tokens": self.keep_special_tokens,
            "batch_tokens": self.batch_tokens,
        }
