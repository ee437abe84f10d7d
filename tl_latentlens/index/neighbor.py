"""One found contextual token."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Neighbor:
    """One found contextual token.

    Attributes:
        token: Its text, with its leading space.
        context: The text around it, the token marked «so».
        position: Its position in its prompt, BOS counted.
        prompt_index: Which text of the corpus.
        row: Its row in the index (in the bank, where the index holds one bank).
        hook_name: The hook name whose vector was found; where the row was found at several, the best.
        similarity: Cosine in [-1, 1].
        chance: How likely a random activation comes as near, in (0, 1] (`ContextualIndex.chances`); None where it was not
            asked for.
        hook_names: All hook names at which the row was found, the best first. More than one where each row is listed once
            (`distinct=True`).
    """

    token: str
    context: str
    position: int
    prompt_index: int
    row: int
    hook_name: str
    similarity: float
    chance: float | None = None
    hook_names: tuple[str, ...] = ()
