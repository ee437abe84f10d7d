"""What the readings of visual tokens add up to: tables with 95 % intervals over scenes, and a figure."""

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from benchmarks.measure import table
from benchmarks.scenes.reading import N_WORDS, TOP_K, WORDS, Reading, RowWords, Truth, read, read_tokens
from tl_latentlens.statistics.intervals import Mean, share_of
from tl_latentlens.vision.scenes.render import Scenes

NO_EMBEDDINGS = "LatentLens, bank from block 0 on"
LENSES = ("LatentLens", "distinct words", "logit lens", "embedding lens")
CONTROLS = ("random rows", "background patches", "untrained connector")
PARTS = ("LatentLens, the color", "LatentLens, the shape", NO_EMBEDDINGS)
WHOLE = "100.0%"
_EMPTY = 2  # background patches of a scene that are read
Activations = dict[str, Float[Tensor, "scene cell d_model"]]


@dataclass(eq=False)
class Figures:
    """All that is measured, seed after seed.

    Attributes:
        names: Hook names, the connector's output first.
        n_rows: Of the bank of each corpus.
        shares: (what, reader, hook name) → for each scene, the share of its object patches.
        layers: Of the neighbors of each hook name (rows of the array), how many each hook name of the bank has.
        layers_without: The same where the bank has no embeddings.
        trainings: A line for each seed.
    """

    names: list[str]
    n_rows: dict[str, int]
    shares: dict[tuple[str, str, str], list[np.ndarray]] = field(default_factory=lambda: defaultdict(list))
    layers: np.ndarray = field(init=False)
    layers_without: np.ndarray = field(init=False)
    trainings: list[dict[str, Any]] = field(default_factory=list)
    _intervals: dict[tuple[str, str], list[Mean]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.layers, self.layers_without = np.zeros((2, len(self.names), len(self.names)), int)

    def add_training(self, seed: int, accuracy: float, losses: list[float], told: float, told_blind: float) -> None:
        """What a seed's encoder and connector have learnt."""
        line = {"seed": seed, "encoder: color and shape right": accuracy, "caption loss, last 20 steps": np.mean(losses[-20:])}
        words = {"caption words right": told, "seeing another scene": told_blind}
        self.trainings.append({name: float(value) if name != "seed" else value for name, value in {**line, **words}.items()})

    def add_readings(
        self, corpus: str, model: Any, scenes: Scenes, activations: Activations, words: RowWords, rng: np.random.Generator
    ) -> None:
        """Read object patches at each hook name by a corpus's index; of the whole corpus, the controls too."""
        truth, before = Truth.of(scenes), None
        for name in self.names:
            vectors = activations[name][torch.from_numpy(scenes.filled)]
            reading = read(vectors, words)
            named = {"LatentLens": reading.named}
            if corpus == WHOLE:
                named |= {"distinct words": words.named_by_words(vectors), **read_tokens(model, vectors)}
            for lens, one in named.items():
                self._add(corpus, lens, name, truth.right(one.by_token), truth.right(one.by_context))
                self._add(corpus, f"{lens}, other scenes", name, truth.shuffled(one.by_token), truth.shuffled(one.by_context))
            if corpus == WHOLE:
                for kind, label in enumerate(("the color", "the shape")):
                    by_level = (truth.of_kind(one, kind) for one in (reading.named.by_token, reading.named.by_context))
                    self._add(corpus, f"LatentLens, {label}", name, *by_level)
                later = read(vectors, words, self.names[1:])
                self._add(corpus, NO_EMBEDDINGS, name, truth.right(later.named.by_token), truth.right(later.named.by_context))
                self.layers_without[self.names.index(name)] += np.bincount(later.hook_ids.ravel(), minlength=len(self.names))
                random = words.named(rng.integers(0, words.index.n_rows, reading.rows.shape))
                self._add(corpus, "random rows", name, truth.right(random.by_token), truth.right(random.by_context))
                self._add_background(name, scenes, activations[name], words, truth, rng)
                self.layers[self.names.index(name)] += np.bincount(reading.hook_ids.ravel(), minlength=len(self.names))
                self._add_change(name, vectors, reading, before)
                before = vectors, reading

    def add_untrained(self, scenes: Scenes, activations: Activations, words: RowWords) -> None:
        """Read object patches behind a connector that was never trained."""
        truth = Truth.of(scenes)
        for name in self.names:
            named = read(activations[name][torch.from_numpy(scenes.filled)], words).named
            self._add(WHOLE, "untrained connector", name, truth.right(named.by_token), truth.right(named.by_context))

    def _add_background(
        self, name: str, scenes: Scenes, activation: Tensor, words: RowWords, truth: Truth, rng: np.random.Generator
    ) -> None:
        order = np.where(scenes.filled, 2.0, rng.random(scenes.filled.shape)).argsort(1)[:, :_EMPTY]
        scene = np.repeat(np.arange(len(order)), _EMPTY)
        named = read(activation[scene, order.ravel()], words).named
        by_token, by_context = (truth.background(kind, scene) for kind in (named.by_token, named.by_context))
        self._add(WHOLE, "background patches", name, by_token, by_context)
        self._add(WHOLE, "background patches, any word", name, named.by_token.max(1), named.by_context.max(1))

    def _add_change(self, name: str, vectors: Tensor, reading: Reading, before: tuple[Tensor, Reading] | None) -> None:
        if before is not None:
            same = (reading.rows[:, :, None] == before[1].rows[:, None, :]).any(2).mean(1)
            self.shares["same rows", "", name].append(same)
            self.shares["cosine", "", name].append(F.cosine_similarity(vectors, before[0], dim=-1).numpy())

    def _add(self, corpus: str, reader: str, name: str, by_token: np.ndarray, by_context: np.ndarray) -> None:
        self.shares[f"token {corpus}", reader, name].append(by_token)
        self.shares[f"context {corpus}", reader, name].append(by_context)

    def by_layer(self, what: str, reader: str) -> list[float]:
        """Means over the scenes of all seeds, at every hook name that has them."""
        each = (self.shares[what, reader, name] for name in self.names if (what, reader, name) in self.shares)
        return [float(np.concatenate(one).mean()) for one in each]

    def intervals(self, what: str, reader: str) -> list[Mean]:
        """The same with 95 % intervals."""
        if (what, reader) not in self._intervals:
            each = [np.concatenate(self.shares[what, reader, name]) for name in self.names]
            self._intervals[what, reader] = [share_of(one.astype(float)) for one in each]
        return self._intervals[what, reader]


def short(name: str) -> str:
    """A hook name as a table's heading."""
    return "connector" if name.endswith("resid_pre") else f"block {name.split('.')[1]}"


def tables(figures: Figures) -> str:
    """All tables as Markdown."""
    n_scenes = len(np.concatenate(figures.shares[f"token {WHOLE}", "LatentLens", figures.names[0]]))
    anything = figures.by_layer(f"token {WHOLE}", "background patches, any word")
    parts = [
        "## Visual tokens, read and judged by the truth",
        table(figures.trainings),
        f"Share of object patches whose top {TOP_K} (of distinct words {N_WORDS}) name their color or shape ({len(WORDS)} "
        f"words), {n_scenes} scenes of {len(figures.trainings)} seeds, bank of {figures.n_rows[WHOLE]:,} rows × "
        f"{len(figures.names)} hook names:",
        _shares(figures, f"token {WHOLE}", [*LENSES, *(f"{lens}, other scenes" for lens in LENSES), *CONTROLS, *PARTS]),
        "The same, where the whole text of a neighbor may name it:",
        _shares(figures, f"context {WHOLE}", ["LatentLens", "LatentLens, other scenes", *CONTROLS]),
        f"Background patches that name any of the {len(WORDS)} words: {', '.join(f'{share:.2f}' for share in anything)}.",
        *_of_several(figures),
        "Where neighbors come from: share of the neighbors at each hook name, by the hook name of the bank:",
        _layers(figures),
        "How much a visual token changes from the hook name before:",
        _change(figures),
    ]
    return "\n\n".join(parts)


def _of_several(figures: Figures) -> list[str]:
    """What only several seeds, or corpora, have."""
    parts = []
    if len(figures.trainings) > 1:
        parts.append(f"LatentLens by each seed (lowest, highest): {_by_seed(figures)}.")
    if len(figures.n_rows) > 1:
        parts += ["By size of the corpus (token level; in brackets, judged by other scenes):", _curve(figures)]
    return parts


def _line(figures: Figures, first: dict[str, str], cells: list[str]) -> dict[str, str]:
    heads = [short(name) for name in figures.names]
    return {**first, **dict(zip(heads[-len(cells) :], cells, strict=True))}


def _shares(figures: Figures, what: str, readers: list[str]) -> str:
    lines = []
    for reader in readers:
        cells = [f"{mean.mean:.2f} ± {mean.half:.2f}" for mean in figures.intervals(what, reader)]
        lines.append(_line(figures, {"reader": reader}, cells))
    return table(lines)


def _by_seed(figures: Figures) -> str:
    parts = []
    for name in figures.names:
        means = [seed.mean() for seed in figures.shares[f"token {WHOLE}", "LatentLens", name]]
        parts.append(f"{short(name)} {min(means):.2f}–{max(means):.2f}")
    return ", ".join(parts)


def _curve(figures: Figures) -> str:
    lines = []
    for corpus, rows in figures.n_rows.items():
        own, other = (figures.by_layer(f"token {corpus}", r) for r in ("LatentLens", "LatentLens, other scenes"))
        cells = [f"{a:.2f} ({b:.2f})" for a, b in zip(own, other, strict=True)]
        lines.append(_line(figures, {"corpus": corpus, "rows": f"{rows:,}"}, cells))
    return table(lines)


def _layers(figures: Figures) -> str:
    heads = [short(name) if i else "embeddings" for i, name in enumerate(figures.names)]
    counts = [*figures.layers, figures.layers_without[0]]
    lines = []
    for name, line in zip([*map(short, figures.names), "connector, bank from block 0 on"], counts, strict=True):
        cells = {head: f"{share:.2f}" for head, share in zip(heads, line / line.sum(), strict=True)}
        lines.append({"visual token at": name, **cells})
    return table(lines)


def _change(figures: Figures) -> str:
    kinds = {"cosine": "cosine to it", "same rows": "share of its neighbors' rows found again"}
    lines = []
    for what, label in kinds.items():
        lines.append(_line(figures, {"": label}, [f"{share:.2f}" for share in figures.by_layer(what, "")]))
    return table(lines)


def draw(figures: Figures, path: Path) -> None:
    """Lenses by layer, by size of the corpus where there are several, and layers of the neighbors, as `path` ends."""
    from matplotlib import rc_context  # pyright: ignore[reportMissingImports]
    from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]

    curve = [corpus for corpus in figures.n_rows if corpus.endswith("%")]
    has_curve = len(curve) > 1
    figure = Figure(figsize=(13 if has_curve else 9.5, 4.4), layout="constrained")
    left, *middle, right = figure.subplots(1, 2 + has_curve, width_ratios=(1.3, *[1] * has_curve, 1))
    heads = [short(name) for name in figures.names]
    x = np.arange(len(heads))
    for color, lens in enumerate(LENSES):
        means = figures.intervals(f"token {WHOLE}", lens)
        left.plot(x, [m.mean for m in means], "o-", color=f"C{color}", label=lens)
        left.fill_between(x, [m.low for m in means], [m.high for m in means], color=f"C{color}", alpha=0.2)
        left.plot(x, figures.by_layer(f"token {WHOLE}", f"{lens}, other scenes"), "--", color=f"C{color}", alpha=0.7)
    left.plot([], [], "--", color="gray", label="judged by other scenes")
    left.set(title=f"Patches whose top {TOP_K} name color or shape", ylim=(-0.02, 1.02), ylabel="share of object patches")
    left.legend(fontsize="small")
    left.set_xticks(x, heads, rotation=45)
    for axis in middle:
        for i, name in enumerate(figures.names):
            means = [figures.by_layer(f"token {corpus}", "LatentLens")[i] for corpus in curve]
            axis.plot([figures.n_rows[corpus] for corpus in curve], means, "o-", color=f"C{i}", label=short(name))
        axis.set(title="LatentLens, by rows of the bank", xscale="log", ylim=(-0.02, 1.02), xlabel="rows")
        axis.legend(fontsize="small")
    shares = figures.layers / figures.layers.sum(1, keepdims=True)
    image = right.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    right.set_xticks(x, ["embeddings", *heads[1:]], rotation=45)
    right.set_yticks(x, heads)
    right.set(title="Layer of the text neighbors", xlabel="text", ylabel="visual token at")
    figure.colorbar(image, ax=right, shrink=0.8, label="share of the neighbors")
    for axis in (left, *middle):
        axis.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context({"svg.hashsalt": "scenes"}):  # the same figure is the same file
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
