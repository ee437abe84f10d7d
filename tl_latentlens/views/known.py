"""When the bank does not know a token, and how the shares that say so are written."""

from typing import Any

KNOWN_LEVEL = 0.05  # Up to this share, the token is further from its nearest row than all but so many tokens of the bank.


def is_unknown(known: Any) -> Any:
    """True where the bank does not know the token; elementwise for an array, False for None and NaN (not computed)."""
    return known is not None and known <= KNOWN_LEVEL


def format_share(share: float | None) -> str:
    """A share with two digits, `<.01` below a hundredth; empty for None."""
    return "" if share is None else f"{share:.2f}" if share >= 0.01 else "<.01"
