"""What a page shows, and the browser that opens it."""

from pathlib import Path
from typing import Any

CHROMIUM = Path("/usr/bin/chromium")


def texts_of(component: Any) -> str:
    """All that a Dash component shows."""
    if component is None or isinstance(component, str | int | float):
        return str(component or "")
    if isinstance(component, list | tuple):
        return "".join(map(texts_of, component))
    return texts_of(getattr(component, "children", None))


def found(components: Any, class_name: str) -> list[Any]:
    """All components of a class, in order."""
    if isinstance(components, list | tuple):
        return [one for part in components for one in found(part, class_name)]
    here = [components] if class_name in (getattr(components, "className", None) or "").split() else []
    return here + (found(components.children, class_name) if getattr(components, "children", None) is not None else [])
