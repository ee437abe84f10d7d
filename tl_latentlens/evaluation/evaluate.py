"""Figures that say how often the neighbors are right, by hook name and transform, beside their nulls; no judge is needed."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Group
from tqdm.auto import tqdm

from tl_latentlens.bank.bank import Bank
from tl_latentlens.directions.features.label import label_features
from tl_latentlens.directions.features.sae import hook_names_of, require_sae
from tl_latentlens.directions.features.sae_fit import warn_of_other_model
from tl_latentlens.errors import InvalidInputError
from tl_latentlens.evaluation.agreement import reader_agreement
from tl_latentlens.evaluation.held_out import draw_held_out_rows, neighbors_in_other_prompts
from tl_latentlens.evaluation.labelled_uses import find_uses, load_senses
from tl_latentlens.evaluation.page_head import evaluation_head
from tl_latentlens.evaluation.senses import activations_of_uses, sense_accuracy, votes_of_baselines, votes_of_index
from tl_latentlens.evaluation.substitution import substitution
from tl_latentlens.evaluation.word_lists import votes_of_words
from tl_latentlens.index.contextual import ContextualIndex
from tl_latentlens.index.transforms import TRANSFORMS
from tl_latentlens.model.describe import require_model
from tl_latentlens.model.direction import is_bidirectional
from tl_latentlens.model.heads import is_head_name
from tl_latentlens.statistics.measures import Measure, ReaderKey
from tl_latentlens.views.curves import measure_curves
from tl_latentlens.views.data import MeasurePanel
from tl_latentlens.views.evaluation import evaluation_page
from tl_latentlens.views.files import output_path
from tl_latentlens.views.page_head import PageHead
from tl_latentlens.views.terminal.evaluation import evaluation_tables
from tl_latentlens.views.terminal.layout import plain_text


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The figures of an evaluation.

    Attributes:
        measures: Sense accuracy, agreement, substitution, as far as the model allows.
        transforms: The transforms that were compared.
        labels: Label scores over a whole SAE, a block of lines for each transform; None without an SAE.
        head: What the page of it opens with; None: a title alone.
    """

    measures: list[Measure]
    transforms: tuple[str, ...]
    labels: pd.DataFrame | None = field(repr=False, default=None)
    head: PageHead | None = field(repr=False, default=None)

    def __str__(self) -> str:
        return plain_text(self.to_rich())

    def to_rich(self, *, width: int | None = None) -> Group:
        """Tables for the terminal (`rich.print`): each measure, readers by hook names, and what each transform gains.

        Args:
            width: In characters; None: the terminal's.
        """
        return evaluation_tables(self._panels(), self.transforms, self._gains_over_first(), self.labels, width)

    def to_html(self, path: str | Path, *, call: str = "") -> Path:
        """Write one page that needs no network and no plotly: a chart of each measure, its table, and what transforms gain.

        It follows the light or dark setting of its reader, and can be read on a phone.

        Args:
            path: The file.
            call: The command that made the figures, for the page's head; empty: the call of `evaluate`.

        Returns:
            The file's path.

        Raises:
            InvalidInputError: No such folder.
        """
        path = output_path(path)
        head = self.head or PageHead("Is the lens right?", "How often the nearest rows of a bank agree with the truth.")
        head = replace(head, call=call or head.call)
        page = evaluation_page(self._panels(), self.transforms, self._gains_over_first(), self.labels, head)
        path.write_text(page, encoding="utf-8")
        return path

    def to_dataframe(self) -> pd.DataFrame:
        """A line for each measure, hook name and reader: mean, 95 % interval (low, high), n, unit and kind.

        `mean` is the mean of shares, or the geometric mean of KL divergences: `kind` says which. A reader is a transform,
        another lens, or a null; hook_name "" is that of readers that need none.
        """
        return pd.concat([measure.table() for measure in self.measures], ignore_index=True)

    def gains(self, over: str = "raw") -> pd.DataFrame:
        """The gain of each transform over another, averaged over hook names, with paired 95 % intervals.

        Columns: measure, reader, mean, gain (above 0: better), low, high, n, kind. An interval that holds 0 is within the
        noise; there is none where fewer than four senses or tokens differ. The gain of a KL is relative: 0.05 where it is 5 %
        lower.

        Raises:
            InvalidInputError: A transform that was not compared.
        """
        if over not in self.transforms:
            raise InvalidInputError(f"got over={over!r}; expected one of the transforms compared, {list(self.transforms)}")
        readers = [reader for reader in self.transforms if reader != over]
        return pd.concat([measure.gains(readers, over) for measure in self.measures], ignore_index=True)

    def plot(self) -> Any:
        """Each measure over the hook names, one line a reader, with intervals (a plotly Figure).

        Raises:
            MissingExtraError: plotly is not installed.
        """
        return measure_curves(self._panels(), self.transforms)

    def _gains_over_first(self) -> pd.DataFrame | None:
        """The gains over the first transform; None where there is one alone."""
        return self.gains(self.transforms[0]) if len(self.transforms) > 1 else None

    def _panels(self) -> list[MeasurePanel]:
        """The measures as views draw them."""
        return [MeasurePanel(m.name, m.unit, m.lower_is_better, m.table(), m.kind, m.about) for m in self.measures]


def evaluate(
    model: Any,
    bank: Bank | ContextualIndex | str | Path,
    *,
    hook_names: int | str | Sequence[int | str] | None = None,
    transforms: str | Sequence[str] | None = None,
    senses: str | Path | pd.DataFrame | None = "demo",
    sae: Any = None,
    n_tokens: int = 300,
    top_k: int = 5,
    device: str | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Evaluation:
    """Measure how often the neighbors are right, for each hook name and transform, without a judge.

    - sense accuracy: labelled uses of ambiguous words, each asked for its sense by its nearest labelled uses, and by those
      with which it shares the most other words (of the first transform).
    - next token and topic: tokens of the bank read by their neighbors in other prompts, which agree with the token's own
      text or not.
    - KL of a neighbor: the neighbor's activation put in the token's place; how far the model's predictions move.
    - with an SAE, what `label_features` says of all its features.

    The modules `senses`, `agreement` and `substitution` say more.

    Args:
        model: The bank's model.
        bank: A bank, its path, or an index of one bank, whose transform, hook names and device are used.
        hook_names: Which of its hook names, whole ones, not single heads, or layers (3, "3-8", "all"); None: all.
        transforms: Which transforms to compare, or "all"; None: the index's own, which is "auto" where a bank is given:
            activations raw, features centered.
        senses: Labelled uses: "demo", a .csv or .jsonl file or a table with columns text, word, sense and, where some uses are
            held out, held_out; None: leave this measure out.
        sae: What `label_features` takes; it is read where the bank holds its hook name.
        n_tokens: Tokens of the bank that are read and replaced.
        top_k: Neighbors that vote or are read.
        device: As `ContextualIndex` takes it.
        seed: Of everything drawn at random.
        progress: Show progress bars.

    Raises:
        ModelMismatchError: The model is not the bank's.
        InvalidInputError: No transforms, or one that is not known; n_tokens or top_k below 1.
        CorpusError: Labelled uses that cannot be read.
    """
    own = bank if isinstance(bank, ContextualIndex) else None
    transforms = _transforms_to_compare(transforms, own)
    bank = _checked_bank(model, bank, transforms, sae, n_tokens, top_k)
    if own is not None:
        hook_names, device = hook_names or own.hook_names, device or str(own.device)
    held_out = draw_held_out_rows(bank, n_tokens, seed)
    uses = None if senses is None else find_uses(model, load_senses(senses), bank.plan.settings)
    use_activations: dict[str, Any] = {}
    votes: dict[ReaderKey, Any] = {}
    neighbors: dict[ReaderKey, Any] = {}
    summaries: list[pd.DataFrame] = []
    for transform in dict.fromkeys(transforms):
        # One index at a time: each may hold a copy of the bank on the device.
        settings: dict[str, Any] = {"verify": not neighbors, "allow_mismatch": own is not None and own.allow_mismatch}
        index = ContextualIndex(bank, hook_names, device, transform=transform, **settings)
        if not neighbors:
            _check_index(index, model)
            if uses is not None:
                use_activations = activations_of_uses(model, uses, index.hook_names, progress)
                votes = votes_of_baselines(model, uses, use_activations, top_k, progress)
        if uses is not None:
            votes |= votes_of_index(index, uses, use_activations, top_k)
            if not neighbors:
                votes |= votes_of_words(index, uses, use_activations, top_k, progress)
        neighbors |= {
            ReaderKey(index.transform, name): neighbors_in_other_prompts(index, held_out, name, top_k)
            for name in tqdm(
                index.hook_names, f"neighbors, {index.transform}", unit=" hook names", delay=2, disable=not progress
            )
        }
        if sae is not None:
            summaries += _label_summaries(sae, index, seed, progress)
    measures = [] if uses is None else [sense_accuracy(uses, votes)]
    measures += reader_agreement(held_out, neighbors, seed=seed, progress=progress)
    if not is_bidirectional(model):
        measures += substitution(model, held_out, neighbors, ranks=sorted({1, top_k}), seed=seed, progress=progress)
    compared = tuple(dict.fromkeys(key.reader for key in neighbors))
    labels = pd.concat(summaries, ignore_index=True) if summaries else None
    read = list(dict.fromkeys(key.hook_name for key in neighbors if key.hook_name))
    return Evaluation(measures, compared, labels, evaluation_head(bank, read, compared, n_tokens, top_k, seed))


def _transforms_to_compare(transforms: str | Sequence[str] | None, own: ContextualIndex | None) -> list[str]:
    """The names of the transforms; without any, that of the index, or what `ContextualIndex` takes by default."""
    if transforms is None:
        return ["auto" if own is None or own.direction_transform != own.transform else own.transform]
    if transforms == "all":
        return list(TRANSFORMS)
    return [transforms] if isinstance(transforms, str) else list(transforms)


def _checked_bank(model: Any, bank: Any, transforms: list[str], sae: Any, n_tokens: int, top_k: int) -> Bank:
    """The bank, opened; the other arguments are checked too."""
    require_model(model)
    if not isinstance(bank, Bank | ContextualIndex | str | Path):
        raise InvalidInputError(f"got a {type(bank).__name__}; expected a bank, its path, or an index")
    if isinstance(bank, ContextualIndex) and len(bank.banks) != 1:
        raise InvalidInputError(f"got an index of {len(bank.banks)} banks; expected one: evaluate each bank by itself")
    if sae is not None:
        require_sae(sae)
    if not transforms or n_tokens < 1 or top_k < 1:
        raise InvalidInputError(
            f"got transforms={transforms}, n_tokens={n_tokens}, top_k={top_k}; expected one or more of each"
        )
    if isinstance(bank, ContextualIndex):
        return bank.banks[0]
    return bank if isinstance(bank, Bank) else Bank.open(bank)


def _check_index(index: ContextualIndex, model: Any) -> None:
    if any(is_head_name(name) for name in index.hook_names):
        raise InvalidInputError(f"got heads, {list(index.hook_names)}; expected whole hook names")
    index.check_model(model)


def _label_summaries(sae: Any, index: ContextualIndex, seed: int, progress: bool) -> list[pd.DataFrame]:
    """The summary of all features' labels; none, with a warning, if the index lacks the activation that the SAE reads."""
    encoder_hook = hook_names_of(sae)[0]
    if encoder_hook not in index.hook_names:
        warn_of_other_model(sae, index, stacklevel=3)
        message = f"no label scores: the SAE reads {encoder_hook}, the bank holds {list(index.hook_names)}"
        warnings.warn(message, stacklevel=3)
        return []
    features = label_features(sae, index, hook_name=encoder_hook, seed=seed, progress=progress)
    return [features.summary().assign(transform=features.transform)]
