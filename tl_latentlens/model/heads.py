"""Names of single attention heads: `blocks.3.attn.hook_z[5]` is head 5 of a hook name, `blocks.3.attn.hook_z[:]` all heads."""

import re

_HEAD = re.compile(r"(.+)\[(\d+|:)\]")
_OUTPUT = re.compile(r"(blocks\.(\d+)\.attn\.)hook_result\[(\d+|:)\]")


def hook_point(name: str) -> str:
    """A hook name without its head."""
    match = _HEAD.fullmatch(name)
    return match[1] if match else name


def head_of(name: str) -> int | None:
    """The head that is named, or None for a whole hook name or all heads."""
    match = _HEAD.fullmatch(name)
    return int(match[2]) if match and match[2] != ":" else None


def of_all_heads(name: str) -> bool:
    """True for names that end with [:]."""
    return name.endswith("[:]")


def names_heads(name: str) -> bool:
    """True for one head, or all heads, of a hook name."""
    return _HEAD.fullmatch(name) is not None


def output_layer(name: str) -> int | None:
    """The layer of `attn.hook_result[head]`, which is computed from `attn.hook_z` through W_O; None for other names."""
    match = _OUTPUT.fullmatch(name)
    return int(match[2]) if match else None


def fires_as(name: str) -> str:
    """The hook name to hook for a name: heads are read from their hook point, their outputs from `attn.hook_z`."""
    return _OUTPUT.sub(r"\1hook_z", name) if output_layer(name) is not None else hook_point(name)


def head_names(name: str, n_heads: int) -> list[str]:
    """The names that a name stands for: its heads one by one for [:], else itself."""
    return [f"{hook_point(name)}[{head}]" for head in range(n_heads)] if of_all_heads(name) else [name]
