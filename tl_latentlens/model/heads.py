"""Names of single attention heads: `blocks.3.attn.hook_z[5]` is head 5 of a hook name, `blocks.3.attn.hook_z[:]` all heads."""

import re

_HEAD_NAME = re.compile(r"(.+)\[(\d+|:)\]")
_HEAD_RESULT_NAME = re.compile(r"(blocks\.(\d+)\.attn\.)hook_result\[(\d+|:)\]")


def hook_point(name: str) -> str:
    """A name without its head."""
    match = _HEAD_NAME.fullmatch(name)
    return match[1] if match else name


def head_of(name: str) -> int | None:
    """The number of the head that is named, or None for a whole hook name and for all heads."""
    match = _HEAD_NAME.fullmatch(name)
    return int(match[2]) if match and match[2] != ":" else None


def is_head_name(name: str) -> bool:
    """True for one head, or all heads, of a hook name."""
    return _HEAD_NAME.fullmatch(name) is not None


def is_all_heads_name(name: str) -> bool:
    """True for names that end with [:]."""
    return name.endswith("[:]")


def head_result_layer(name: str) -> int | None:
    """The layer of `attn.hook_result[head]`, which is computed from `attn.hook_z` through W_O; None for other names."""
    match = _HEAD_RESULT_NAME.fullmatch(name)
    return int(match[2]) if match else None


def tl_hook_name(name: str) -> str:
    """The TransformerLens hook name from which an activation is taken.

    A head is taken from its hook point. `attn.hook_result[head]` is computed from `attn.hook_z`.
    """
    return _HEAD_RESULT_NAME.sub(r"\1hook_z", name) if head_result_layer(name) is not None else hook_point(name)


def head_names(name: str, n_heads: int) -> list[str]:
    """The names of all heads for a name that ends with [:], else the name itself."""
    return [f"{hook_point(name)}[{head}]" for head in range(n_heads)] if is_all_heads_name(name) else [name]
