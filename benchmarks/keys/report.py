"""What the keys benchmark found: Markdown tables with 95 % intervals over scenes, and a figure."""

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Float

from benchmarks.keys.tasks import Score
from benchmarks.measure import table
from tl_latentlens.statistics.intervals import Mean, mean_of, share_of

ONE_MEAN, OWN_MEAN = "one mean", "each position's mean"
TASKS = {
    "foreground": "Foreground: IoU of a linear probe trained on five scenes (null: its labels shuffled)",
    "co-segmentation": "Co-segmentation: IoU of the object that four scenes share, by k-means (null: another group's object)",
    "referring": 'Referring: the patch with the largest dot product with "red circle" is one (null: phrases of absent objects)',
    "correspondence": "Correspondence: the nearest patch in another scene is the same object's (null: a third scene's objects)",
    "propagation": "Propagation: IoU of masks carried by nearest neighbors (null: from a third scene)",
}
WHOLE = ("residual", "keys", "values")
ALL = ("keys", "values")
_COLORS = {"residual": "C7", "keys": "C0", "values": "C1", "random projection": "C2"}


@dataclass(eq=False)
class Figures:
    """All that is measured, seed after seed.

    Attributes:
        n_layers: Of the model.
        scores: (centering, task, site) → a score for each seed.
        spreads: For each seed, of each layer, cell and head.
        losses: (what is blocked or put before the image, layer) → of each scene; layer n_layers stands for all of them.
        prefixes: (what stands before the image, site) → 1 for each scene whose asked object was found.
    """

    n_layers: int
    scores: dict[tuple[str, str, str], list[Score]] = field(default_factory=lambda: defaultdict(list))
    spreads: list[Float[np.ndarray, "layer cell head"]] = field(default_factory=list)
    losses: dict[tuple[str, int | None], list[np.ndarray]] = field(default_factory=lambda: defaultdict(list))
    prefixes: dict[tuple[str, str], list[np.ndarray]] = field(default_factory=lambda: defaultdict(list))

    def add(self, centering: str, task: str, site: str, score: Score) -> None:
        """The score of one seed."""
        self.scores[centering, task, site].append(score)

    def add_loss(self, kind: str, layer: int | None, losses: Float[np.ndarray, " scene"]) -> None:
        """The caption losses of one seed."""
        self.losses[kind, layer].append(losses)

    def mean(self, task: str, site: str, centering: str = ONE_MEAN) -> Mean:
        """Over the scenes of all seeds."""
        return share_of(self._right(task, site, centering))

    def null(self, task: str, site: str, centering: str = ONE_MEAN) -> float:
        """The mean where there is nothing to find."""
        return float(np.concatenate([score.null for score in self.scores[centering, task, site]]).mean())

    def _right(self, task: str, site: str, centering: str = ONE_MEAN) -> Float[np.ndarray, " scene"]:
        return np.concatenate([score.right for score in self.scores[centering, task, site]])

    def heads(self, task: str, site: str) -> list[float]:
        """The mean of each head of "keys 2" or "values 2"."""
        names = [name for _, of, name in self.scores if of == task and name.startswith(f"{site}[")]
        return [float(self._right(task, name).mean()) for name in dict.fromkeys(names)]

    def best_head(self, task: str, site: str) -> tuple[int, Mean]:
        """The best head on every other scene, and how it does on the rest."""
        names = list(dict.fromkeys(name for _, of, name in self.scores if of == task and name.startswith(f"{site}[")))
        best = max(range(len(names)), key=lambda head: self._right(task, names[head])[::2].mean())
        return best, share_of(self._right(task, names[best])[1::2])

    def added_loss(self, kind: str, layer: int | None) -> Mean:
        """How much more the captions cost than with nothing blocked (or nothing before the image), scene by scene."""
        base = "prefix: nothing" if kind.startswith("prefix") else "nothing"
        more = np.stack(self.losses[kind, layer]).reshape(len(self.losses[base, None]), -1, len(self.losses[base, None][0]))
        return mean_of((more.mean(1) - np.stack(self.losses[base, None])).ravel())


def tables(figures: Figures) -> str:
    """All tables as Markdown."""
    n_scenes = len(figures.scores[ONE_MEAN, "foreground", "encoder"]) * len(
        figures.scores[ONE_MEAN, "foreground", "encoder"][0].right
    )
    parts = [
        "## Keys and values of visual tokens",
        f"{n_scenes} scenes of {len(figures.spreads)} seeds; in brackets the null. By layer:",
    ]
    for task, title in TASKS.items():
        parts += [f"{title}.", _task(figures, task)]
    parts += ["The same with each position's own mean (over other scenes) taken away:", _own_means(figures)]
    parts += [
        "Spread of the keys from image to image, and what blocking a sixth of them for the text adds to the caption loss "
        f"(nats a token; {_base(figures, 'nothing')} with nothing blocked):",
        _blocking(figures),
    ]
    parts += ["The object asked for is found (referring, one of four) with text before the image:", _prefixes(figures)]
    return "\n\n".join(parts)


def _base(figures: Figures, kind: str) -> str:
    return f"{np.concatenate(figures.losses[kind, None]).mean():.3f}"


def cell(mean: Mean, digits: int = 2) -> str:
    """A mean and the larger half of its interval."""
    return f"{mean.mean:.{digits}f} ± {mean.half:.{digits}f}"


def _line(first: str, cells: list[str]) -> dict[str, str]:
    return {"": first, **{str(layer): one for layer, one in enumerate(cells)}}


def _task(figures: Figures, task: str) -> str:
    layers, lines = range(figures.n_layers), []
    for kind in (*WHOLE, "random projection"):
        sites = [f"{kind} {layer}" for layer in layers]
        lines.append(_line(kind, [f"{cell(figures.mean(task, s))} ({figures.null(task, s):.2f})" for s in sites]))
    for kind in ALL:
        best = [figures.best_head(task, f"{kind} {layer}") for layer in layers]
        lines.append(_line(f"{kind}, best head", [f"{cell(mean)} (head {head})" for head, mean in best]))
        ranges = [figures.heads(task, f"{kind} {layer}") for layer in layers]
        lines.append(_line(f"{kind}, all heads from … to", [f"{min(one):.2f} – {max(one):.2f}" for one in ranges]))
    for site in ("encoder", "pixels"):
        if (ONE_MEAN, task, site) in figures.scores:
            score = f"{cell(figures.mean(task, site))} ({figures.null(task, site):.2f})"
            lines.append(_line(f"{site}, before any layer", [score, *[""] * (figures.n_layers - 1)]))
    return table(lines)


def _own_means(figures: Figures) -> str:
    lines = []
    for task in TASKS:
        for kind in WHOLE:
            sites = [f"{kind} {layer}" for layer in range(figures.n_layers)]
            cells = [f"{cell(figures.mean(task, s, OWN_MEAN))} ({figures.null(task, s, OWN_MEAN):.2f})" for s in sites]
            lines.append({"task": task, **_line(kind, cells)})
    return table(lines)


def _blocking(figures: Figures) -> str:
    spreads = np.stack(figures.spreads)
    lines = []
    for name, of in {"lowest": np.min, "median": np.median, "highest": np.max}.items():
        cells = [f"{of(spreads[:, layer]):.2f}" for layer in range(figures.n_layers)]
        lines.append({**_line(f"{name} spread", cells), "all layers": ""})
    order = spreads.argsort(2)[:, :, : round(spreads.shape[2] / 6)]
    where = [f"{np.median(order[:, layer]) + 1:.0f}" for layer in range(figures.n_layers)]
    lines.append({**_line("of the least spread, median patch (of 36)", where), "all layers": ""})
    for kind in ("least", "random", "most"):
        cells = [cell(figures.added_loss(kind, layer), 3) for layer in range(figures.n_layers + 1)]
        lines.append({**_line(f"blocked: {kind}{' spread' * (kind != 'random')}", cells[:-1]), "all layers": cells[-1]})
    return table(lines)


def _prefixes(figures: Figures) -> str:
    lines = []
    for kind in dict.fromkeys(kind for kind, _ in figures.prefixes):
        for site in ALL:
            means = [share_of(np.concatenate(figures.prefixes[kind, f"{site} {layer}"])) for layer in range(figures.n_layers)]
            loss = f"+{cell(figures.added_loss(f'prefix: {kind}', None), 3)}"
            loss = _base(figures, "prefix: nothing") if kind == "nothing" else loss
            lines.append({"before the image": kind, **_line(site, list(map(cell, means))), "caption loss": loss})
    return table(lines)


def draw(figures: Figures, path: Path) -> None:
    """A panel for each task, and one for what blocking adds to the loss; the file's ending says which format."""
    from matplotlib import rcParams  # pyright: ignore[reportMissingImports]
    from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]

    rcParams["svg.hashsalt"] = "keys"  # the same figure is the same file
    figure = Figure(figsize=(13, 7.4), layout="constrained")
    *panels, last = figure.subplots(2, 3).ravel()
    layers = np.arange(figures.n_layers)
    for axis, task in zip(panels, TASKS, strict=True):
        for kind, color in _COLORS.items():
            means = [figures.mean(task, f"{kind} {layer}") for layer in layers]
            axis.plot(layers, [m.mean for m in means], "o-", color=color, label=kind)
            axis.fill_between(layers, [m.low for m in means], [m.high for m in means], color=color, alpha=0.2)
            if kind in ALL:
                axis.plot(
                    layers, [figures.heads(task, f"{kind} {layer}") for layer in layers], "-", color=color, lw=0.6, alpha=0.6
                )
                own = [figures.mean(task, f"{kind} {layer}", OWN_MEAN).mean for layer in layers]
                axis.plot(layers, own, "--", color=color)
        axis.plot(
            layers, [figures.null(task, f"values {layer}") for layer in layers], ":", color="black", label="null (values)"
        )
        if (ONE_MEAN, task, "encoder") in figures.scores:
            axis.axhline(figures.mean(task, "encoder").mean, color="C3", lw=1, label="vision encoder")
        axis.set(title=task, ylim=(-0.02, 1.04), xlabel="layer")
        axis.grid(alpha=0.3)
    panels[0].plot([], [], "-", color="gray", lw=0.6, label="single heads")
    panels[0].plot([], [], "--", color="gray", label="less each position's mean")
    panels[0].legend(fontsize="small", loc="center")
    heads = [*map(str, layers), "all"]
    for kind, color in {"least": "C0", "random": "C7", "most": "C3"}.items():
        means = [figures.added_loss(kind, layer) for layer in range(len(heads))]
        errors = np.abs(np.array([[m.mean - m.low, m.high - m.mean] for m in means])).T
        label = f"{kind} spread" if kind != "random" else "random"
        last.errorbar(np.arange(len(heads)), [m.mean for m in means], errors, fmt="o-", color=color, capsize=3, label=label)
    last.set_xticks(range(len(heads)), heads)
    last.set(title="a sixth of the keys blocked", xlabel="layer", ylabel="added caption loss, nats a token")
    last.legend(fontsize="small")
    last.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
