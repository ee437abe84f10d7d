"""When chance explains that a neighbor is near, how that chance is written, and how directions were compared."""

from typing import Any

from tl_latentlens.views.data import DirectionNearness

CHANCE_LEVEL = 0.01  # From this chance on, a random activation comes as near often enough that the neighbor says nothing.


NEARNESS_LEGEND = f"p: share of random directions as near (chance: ≥ {CHANCE_LEVEL:g}); z: σ above random rows"


def is_chance(chance: Any) -> Any:
    """True where chance alone explains that a neighbor is near; elementwise for an array, False for None (not computed)."""
    return chance is not None and chance >= CHANCE_LEVEL


def nearness_sentence(nearness: DirectionNearness) -> str:
    """What the nearness of a direction's neighbors says, with its figures."""
    verdict = "; may be chance" if is_chance(nearness.p) else ""
    return f"random directions come as near: p = {nearness.p:.2g} (z = {nearness.z:.1f}){verdict}"


def geometry_note(transform: str) -> str:
    """How directions were compared with rows."""
    notes = {
        "raw": "compared with the rows as they are (raw)",
        "center": "compared with the rows less the mean of their hook name (center)",
    }
    return notes.get(transform, f"compared with the rows under the transform {transform}")


def format_chance(chance: float) -> str:
    """A chance in few characters: `3e-04` below the level, `0.25` from there on."""
    return f"{chance:.2f}" if is_chance(chance) else f"{chance:.0e}"


def direction_notes(transform: str, *, has_scores: bool) -> list[str]:
    """What the figures of a page of directions mean."""
    notes = [
        f"v is {geometry_note(transform)}. The number before each row is its cosine with the end of the vector, the small one "
        "behind it its layer."
    ]
    if has_scores:
        notes.append(
            "p is the share of random directions whose neighbors are at least as near; z is how far these are above random "
            f"rows, in standard deviations. From p = {CHANCE_LEVEL:g} on chance explains them, and they are faint."
        )
    return notes
