"""The head that every page opens with: what it shows, of which model and bank, made when and by which call."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from html import escape
from itertools import groupby

from tl_latentlens.views.text import hook_headings, printable

_MAX_KINDS = 6  # Of hook names that are written out.


@dataclass(frozen=True)
class PageHead:
    """The head of a page.

    Attributes:
        title: The heading.
        lead: What the reader looks at, in one sentence.
        model: The model, such as "demo, 6 layers"; empty where it is not known.
        bank: The bank, such as "demo.h5, 46,220 rows"; empty where it is not known.
        hook_names: The hook names that were searched.
        call: The command or the call that made what is shown; empty where it is not known.
        notes: What each figure and color means, a paragraph each.
        made_on: The day on which the page was made.
    """

    title: str
    lead: str
    model: str = ""
    bank: str = ""
    hook_names: Sequence[str] = ()
    call: str = ""
    notes: Sequence[str] = ()
    made_on: date = field(default_factory=date.today)

    def facts(self) -> list[tuple[str, str]]:
        """Model, bank, hook names and day, each with its name."""
        facts = [("model", self.model), ("bank", self.bank), ("hooks", hook_names_phrase(self.hook_names))]
        return [*((name, text) for name, text in facts if text), ("made", self.made_on.isoformat())]


def head_html(head: PageHead) -> str:
    """The head as HTML; all texts are escaped."""
    facts = "".join(f"<span><small>{name}</small> {_text(text)}</span>" for name, text in head.facts())
    call = f"<p>Made by <code>{_text(head.call)}</code></p>" if head.call else ""
    notes = "".join(f"<p>{_text(note)}</p>" for note in head.notes)
    more = f'<details class="about"><summary>How to read this page</summary>{notes}{call}</details>' if notes or call else ""
    return (
        f'<header class="head">\n<h1>{_text(head.title)}</h1>\n<p class="lead">{_text(head.lead)}</p>\n'
        f'<p class="facts">{facts}</p>\n{more}\n</header>'
    )


def hook_names_phrase(hook_names: Sequence[str]) -> str:
    """Hook names in a few words: "blocks.*.hook_resid_post, layers 0–3, 5", one kind after the other, the first of many."""
    layers_of: dict[str, list[int]] = {}
    for name in hook_names:
        [heading], kind = hook_headings([name])
        layers_of.setdefault(kind or name, []).extend([int(heading)] if kind else [])
    phrases = [f"{kind}{_layers_phrase(sorted(layers))}" for kind, layers in layers_of.items()]
    n_more = len(phrases) - _MAX_KINDS
    return "; ".join(phrases[:_MAX_KINDS]) + (f" and {n_more} more" if n_more > 0 else "")


def _layers_phrase(layers: Sequence[int]) -> str:
    """Layers with their runs joined; empty for none."""
    runs = []
    for _, run in groupby(enumerate(layers), lambda numbered: numbered[1] - numbered[0]):
        numbers = [layer for _, layer in run]
        runs.append(str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}–{numbers[-1]}")
    return f", layer{'s' * (len(layers) > 1)} {', '.join(runs)}" if runs else ""


def _text(text: str) -> str:
    return escape(printable(text))
