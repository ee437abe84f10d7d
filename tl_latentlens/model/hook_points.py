"""Facts about single hook points: which space they are in, what switches them on, their names on a bridge and under an SAE.

Whole lists of hook names are checked and chosen in `hook_names`; names of attention heads are read in `heads`.
"""

import re
from collections.abc import Container
from typing import Any

_RESIDUAL_STREAM = re.compile(
    r"(blocks\.\d+\.(hook_(resid_pre|resid_mid|resid_post|attn_out|mlp_out|in|out)|attn\.hook_result\[(\d+|:)\])|hook_(pos_)?embed)"
    r"(\.hook_sae_(input|output|recons|error))?"
)
_SWITCHES = {
    "attn.hook_result": "use_attn_result",
    "hook_mlp_in": "use_hook_mlp_in",
    "hook_attn_in": "use_attn_in",
    **{f"hook_{part}_input": "use_split_qkv_input" for part in "qkv"},
}
"""The end of a hook name → the setting of `model.cfg` without which that hook point never fires."""
_BRIDGE_NAMES = {
    "hook_resid_pre": "hook_in",
    "hook_resid_mid": "ln2.hook_in",
    "hook_resid_post": "hook_out",
    "hook_attn_out": "attn.hook_out",
    "hook_mlp_out": "mlp.hook_out",
    "attn.hook_z": "attn.o.hook_in",
    "mlp.hook_post": "mlp.out.hook_in",
}
"""Hook point within a block → the bridge's own name. SAEs are attached under these; SAETransformerBridge has no others."""


def in_residual_stream(hook_name: str) -> bool:
    """True for activations in the space of the residual stream, which the model's unembedding can read."""
    return _RESIDUAL_STREAM.fullmatch(hook_name) is not None


def forward_order(hook_name: str) -> tuple[int, int]:
    """A key that sorts hook names as they fire: the block, and the place in it; a bridge lists its hook points otherwise."""
    match = re.match(r"blocks\.(\d+)\.", hook_name)
    if match is None:
        return (-1 if hook_name in ("hook_embed", "hook_pos_embed") else 10**9), 0
    parts = ("resid_pre", "attn", "resid_mid", "mlp", "resid_post")
    return int(match[1]), next((i for i, part in enumerate(parts) if part in hook_name), len(parts))


def switch_on_hint(model: Any, hook_name: str) -> str | None:
    """Advice for the user where the model's settings keep a hook point from firing; None where they do not."""
    setting = next((setting for end, setting in _SWITCHES.items() if hook_name.endswith(end)), None)
    if setting is None or getattr(model.cfg, setting, True):
        return None
    by_head = f"; or use {hook_name.removesuffix('result')}z, from which latentlens_hooks computes {hook_name}[head]"
    return f"model.set_{setting}(True) switches it on{by_head * hook_name.endswith('hook_result')}"


def bridge_hook_name(hook_name: str) -> str:
    """The name that a bridge itself uses for a hook point."""
    block = re.fullmatch(r"(blocks\.\d+\.)(.+)", hook_name)
    return block[1] + _BRIDGE_NAMES.get(block[2], block[2]) if block else hook_name


def sae_input_name(hook_name: str, known: Container[str]) -> str | None:
    """The hook name of the input of an attached SAE that replaces a hook point; None where no SAE replaces it.

    The SAE's input is the activation that the model gave there.

    Args:
        hook_name: The hook name of the activation.
        known: The model's hook names.
    """
    names = (f"{name}.hook_sae_input" for name in (hook_name, bridge_hook_name(hook_name)))
    return None if hook_name in known else next((name for name in names if name in known), None)
