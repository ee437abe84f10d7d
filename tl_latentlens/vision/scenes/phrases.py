"""Phrases of captions: how a list of things is told."""

RETELLINGS = (
    "We can see {}.",
    "There is {}.",
    "The picture shows {}.",
    "I see {}.",
    "Here are {}.",
    "In the picture there is {}.",
    "You can find {} here.",
    "{} can be seen.",
    "Somebody drew {}.",
    "Look at {}.",
)


def article(thing: str) -> str:
    """A thing with its article."""
    return ("an " if thing[0] in "aeio" else "a ") + thing


def joined(items: list[str]) -> str:
    """Items as they stand in a sentence."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
