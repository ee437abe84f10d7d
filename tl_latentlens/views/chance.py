"""When chance explains that a neighbor is near, and how that chance is written."""

from typing import Any

from tl_latentlens.views.data import DirectionNearness

CHANCE_LEVEL = 0.01  # From this chance on, a random activation comes as near often enough that the neighbor says nothing.


def is_chance(chance: Any) -> Any:
    """True where chance alone explains that a neighbor is near; elementwise for an array, False for None (not computed)."""
    return chance is not None and chance >= CHANCE_LEVEL


def nearness_sentence(nearness: DirectionNearness) -> str:
    """What the nearness of a direction's neighbors says, with its figures."""
    verdict = "; may be chance" if is_chance(nearness.p) else ""
    return f"random directions come as near: p = {nearness.p:.2g} (z = {nearness.z:.1f}){verdict}"


def format_chance(chance: float) -> str:
    """A chance in few characters: `3e-04` below the level, `0.25` from there on."""
    return f"{chance:.2f}" if is_chance(chance) else f"{chance:.0e}"
