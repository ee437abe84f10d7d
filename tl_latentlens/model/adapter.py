"""All that is asked of a TransformerLens model, HookedTransformer and TransformerBridge alike.

Models are known by what they have (`cfg`, `hook_dict`, `run_with_hooks`), never by their class, which TransformerLens 4
does not share with 3.
"""

import hashlib
import json
import re
from array import array
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tl_latentlens.corpus.plan import Prompts
from tl_latentlens.errors import InvalidInputError
from tl_latentlens.model.heads import fires_as, head_of, output_layer
from tl_latentlens.model.info import ModelInfo

DEMO_MODEL = Path(__file__).parents[1] / "data" / "demo_model"
NO_TOKENIZER = hashlib.sha256(b"").hexdigest()  # stands for the vocabulary of a model without tokenizer
_TOKENIZE_CHARACTERS = 2**18  # of text handed to the tokenizer at once
_RESIDUAL = re.compile(
    r"(blocks\.\d+\.(hook_(resid_pre|resid_mid|resid_post|attn_out|mlp_out|in|out)|attn\.hook_result\[(\d+|:)\])|hook_(pos_)?embed)"
    r"(\.hook_sae_(input|output|recons|error))?"
)
# What a hook name ends with, and the setting without which it never fires.
_SWITCHES = {
    "attn.hook_result": "use_attn_result",
    "hook_mlp_in": "use_hook_mlp_in",
    "hook_attn_in": "use_attn_in",
    **{f"hook_{part}_input": "use_split_qkv_input" for part in "qkv"},
}
# What a bridge itself calls a hook point: SAEs are attached under these names, and SAETransformerBridge has no others.
_ON_BRIDGE = {
    "hook_resid_pre": "hook_in",
    "hook_resid_mid": "ln2.hook_in",
    "hook_resid_post": "hook_out",
    "hook_attn_out": "attn.hook_out",
    "hook_mlp_out": "mlp.hook_out",
    "attn.hook_z": "attn.o.hook_in",
    "mlp.hook_post": "mlp.out.hook_in",
}


def require_model(model: Any) -> None:
    """Check that `model` is a TransformerLens model.

    Raises:
        InvalidInputError: It has no `cfg`, `hook_dict` or `run_with_hooks`.
    """
    if not is_model(model):
        raise InvalidInputError(
            f"got a {type(model).__name__}; expected a TransformerLens model (HookedTransformer or TransformerBridge), "
            "for instance TransformerBridge.boot_transformers(name)"
        )


def is_model(thing: Any) -> bool:
    """True for what can be used as a TransformerLens model."""
    # The class is asked first: the hook_dict of a bridge is a property that takes milliseconds.
    return all(hasattr(type(thing), name) or hasattr(thing, name) for name in ("run_with_hooks", "cfg", "hook_dict"))


def model_device(model: Any) -> torch.device:
    """Where the model's embedding lies."""
    return next(model.parameters()).device


def is_bidirectional(model: Any) -> bool:
    """True for encoders such as BERT, whose activations depend on the whole prompt."""
    if getattr(model.cfg, "attention_dir", "causal") == "bidirectional":
        return True
    return "bert" in str(getattr(model.cfg, "architecture", "") or getattr(model.cfg, "original_architecture", "")).lower()


def describe_model(model: Any) -> ModelInfo:
    """What a bank stores to name its model."""
    require_model(model)
    cfg, weight = model.cfg, getattr(model, "W_E", None)
    name = str(getattr(cfg, "model_name", "custom"))
    vocabulary = json.dumps(sorted(model.tokenizer.get_vocab().items())) if model.tokenizer is not None else ""
    return ModelInfo(
        name=Path(name).name if Path(name).is_dir() else name,  # a local folder is named by its last part alone
        class_name=type(model).__name__,
        n_layers=int(cfg.n_layers),
        d_model=int(cfg.d_model),
        d_vocab=int(cfg.d_vocab),
        n_ctx=int(cfg.n_ctx),
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        centered=weight is not None and _is_centered(weight.detach().float()),
        tokenizer=hashlib.sha256(vocabulary.encode()).hexdigest(),
    )


def _is_centered(embedding: Float[Tensor, "d_vocab d_model"]) -> bool:
    """Means of raw rows are about their length / d_model; where centred ones were rounded to bfloat16, 1 % of that."""
    length = torch.linalg.vector_norm(embedding) / embedding.shape[0] ** 0.5
    return bool(embedding.mean(-1).abs().max() * embedding.shape[1] < 0.1 * length)


def tokenize(model: Any, texts: Iterable[str], *, repeat: bool = False) -> Prompts:
    """The prompts of texts: the tokens of `model.to_tokens`, without padding, cut at n_ctx.

    Args:
        model: Whose tokens to make.
        texts: Read one by one.
        repeat: Cut them so that BOS text text fits n_ctx.

    Raises:
        InvalidInputError: The model has no tokenizer, or cannot read a text twice: it is bidirectional, or puts tokens
            after a text.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise InvalidInputError("the model has no tokenizer; give it one (model.set_tokenizer) to build a bank from text")
    before, after = _around_text(model)
    if repeat and (after or is_bidirectional(model)):
        why = f"to_tokens puts {after} after a text" if after else "it sees the whole text at once"
        raise InvalidInputError(f"got repeat=True for a model that cannot read a text twice: {why}; leave repeat out")
    room = (model.cfg.n_ctx - len(before) - len(after)) // (1 + repeat)
    buffer, lengths, truncated = array("i"), array("q"), 0
    for batch in _in_batches(texts):
        for ids in tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]:
            kept = [*before, *ids[:room], *after]
            buffer.fromlist(kept)
            lengths.append(len(kept))
            truncated += len(ids) > room
    tokens = np.asarray(buffer, np.int32)
    starts = np.r_[0, np.cumsum(lengths)].astype(np.int64)
    special = np.zeros(len(tokens), bool)
    for place in range(len(before)):
        special[starts[:-1] + place] = True
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id not in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        special |= tokens == tokenizer.pad_token_id
    return Prompts(tokens, starts, special, truncated)


@dataclass(frozen=True)
class RepeatedTexts:
    """Texts as a repeat bank's model saw them, each twice, right-padded.

    Attributes:
        tokens: BOS text text, [batch, pos].
        attention_mask: 1 at tokens, 0 at padding.
        second_copy: True in the second copy, whose tokens know what comes after them: the `positions` for `latentlens_hooks`.
    """

    tokens: Int[Tensor, "batch pos"]
    attention_mask: Int[Tensor, "batch pos"]
    second_copy: Bool[Tensor, "batch pos"]


def repeated(model: Any, texts: str | Sequence[str]) -> RepeatedTexts:
    """Texts to run twice, as for a bank that was built with `repeat=True`.

    >>> run = repeated(model, "A boat by the bank.")                              # doctest: +SKIP
    >>> hooks = latentlens_hooks(index, positions=run.second_copy)
    >>> model.run_with_hooks(run.tokens, attention_mask=run.attention_mask, fwd_hooks=hooks)

    Args:
        model: A causal HookedTransformer or TransformerBridge.
        texts: One text or several, of any lengths; each is cut so that both copies fit n_ctx.

    Raises:
        InvalidInputError: The model has no tokenizer, is bidirectional, or puts tokens after a text.
    """
    require_model(model)
    prompts = tokenize(model, [texts] if isinstance(texts, str) else texts, repeat=True)
    start = len(_around_text(model)[0])
    each = [torch.from_numpy(prompt) for prompt in np.split(prompts.tokens, prompts.starts[1:-1])]
    runs = [torch.cat([prompt, prompt[start:]]).long() for prompt in each]
    tokens = pad_sequence(runs, batch_first=True, padding_value=model.tokenizer.pad_token_id or 0)
    columns = torch.arange(tokens.shape[1])
    inside = columns < torch.tensor([len(run) for run in runs])[:, None]
    second = inside & (columns >= torch.tensor([len(prompt) for prompt in each])[:, None])
    device = model_device(model)
    return RepeatedTexts(tokens.to(device), inside.long().to(device), second.to(device))


def _in_batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text) + 1  # of empty texts there may be many too
        if size >= _TOKENIZE_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _around_text(model: Any) -> tuple[list[int], list[int]]:
    """The ids that `model.to_tokens` puts before (BOS) and after a text; what it does depends on model and tokenizer."""
    bare = model.tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = model.to_tokens("a")[0].tolist()
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    raise InvalidInputError(
        f"model.to_tokens('a') gives {whole}, which does not hold the tokenizer's own {bare}; plan your own tokens (make_plan)"
    )


def token_bytes(model: Any, ids: Sequence[int]) -> dict[int, bytes]:
    """The bytes that each token stands for in running text, its leading space included.

    Bytes and not strings, since a token of a byte-level vocabulary may be part of a character.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        return {int(i): f"[{i}]".encode() for i in ids}
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    parts = b"" if decoder is None else decoder.__getstate__()  # JSON
    byte_level, word_piece = b'"ByteLevel"' in parts, b'"WordPiece"' in parts
    special = set(tokenizer.all_special_ids)
    alphabet = _byte_alphabet()
    texts: dict[int, bytes] = {}
    pieces = tokenizer.convert_ids_to_tokens([int(i) for i in ids])
    for i, piece in zip(map(int, ids), pieces, strict=True):
        if piece is None or i in special:
            texts[i] = (piece or f"[{i}]").encode()
        elif byte_level and all(c in alphabet for c in piece):
            texts[i] = bytes(alphabet[c] for c in piece)
        elif match := re.fullmatch(r"<0x([0-9A-F]{2})>", piece):
            texts[i] = bytes([int(match[1], 16)])
        elif word_piece:
            texts[i] = (piece[2:] if piece.startswith("##") else " " + piece).encode()
        else:
            texts[i] = piece.replace("▁", " ").encode()
    return texts


def single_tokens(model: Any, tokens: Sequence[str | int]) -> list[int]:
    """The ids of tokens given as texts, with their leading spaces, or as ids.

    Raises:
        InvalidInputError: A text that is not one token, an id outside the vocabulary, or no token at all.
    """
    if not tokens:
        raise InvalidInputError('got no tokens; expected at least one, for instance " the"')
    return [_single_token(model, token) for token in tokens]


def _single_token(model: Any, token: str | int) -> int:
    d_vocab = int(model.cfg.d_vocab)
    if not isinstance(token, str):
        if token != int(token) or not 0 <= token < d_vocab:
            raise InvalidInputError(f"got token id {token}; the vocabulary has ids 0 to {d_vocab - 1:,}")
        return int(token)
    if model.tokenizer is None:
        raise InvalidInputError(f"got {token!r}, but the model has no tokenizer; give token ids")
    # SentencePiece puts a space of its own before a text that begins with one.
    piece = model.tokenizer.get_vocab().get(token.replace(" ", "▁"))
    ids = model.tokenizer(token, add_special_tokens=False)["input_ids"] if piece is None else [piece]
    if len(ids) != 1:
        pieces = [text.decode("utf-8", errors="replace") for text in map(token_bytes(model, ids).__getitem__, ids)]
        raise InvalidInputError(f"got {token!r}, which the model reads as {pieces}; expected one token: one of these, or an id")
    return int(ids[0])


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's table of printable stand-ins for bytes: printable bytes stand for themselves, the rest follow from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def run_hooked(
    model: Any,
    tokens: Int[Tensor, "batch pos"],
    mask: Bool[Tensor, "batch pos"] | None,
    fwd_hooks: list[tuple[str, Callable]],
) -> None:
    """Run the model for its hooks only: no gradient, no logits, no layer after the last hook."""
    extra: dict[str, Any] = {} if mask is None else {"attention_mask": mask.long()}
    stop = None if is_bidirectional(model) else _layer_after([name for name, _ in fwd_hooks])
    if stop == model.cfg.n_layers and hasattr(model, "adapter"):
        # A bridge does not stop behind its last block, and would compute logits though none are asked for.
        stop = None
        if "ln_final.hook_in" in model.hook_dict:
            fwd_hooks = [*fwd_hooks, ("ln_final.hook_in", _stop)]
    with evaluating(model), torch.no_grad(), suppress(_StopRun):
        model.run_with_hooks(tokens, fwd_hooks=fwd_hooks, return_type=None, stop_at_layer=stop, **extra)


class _StopRun(Exception):  # noqa: N818 - it ends a run, it is no error
    """Raised from a hook behind the last one that is needed."""


def _stop(activation: Tensor, hook: Any) -> None:
    raise _StopRun


def _layer_after(hook_names: Iterable[str]) -> int | None:
    """First layer that no hook needs, or None where the whole model must run."""
    layers = []
    for name in hook_names:
        if name in ("hook_embed", "hook_pos_embed"):
            layers.append(0)
        elif match := re.match(r"blocks\.(\d+)\.", name):
            layers.append(int(match[1]) + 1)
        else:
            return None
    return max(layers)


def flat_activation(name: str, activation: Tensor, batch_pos: Sequence[int]) -> Float[Tensor, "batch pos d"]:
    """An activation as [batch, pos, d]; heads are laid side by side, or one is taken, where the name is that of a head.

    Raises:
        InvalidInputError: It has no batch and pos in front, as attention patterns have not; or not that head.
    """
    by_position = name.endswith(("hook_pattern", "hook_attn_scores"))  # with as many heads as tokens the shape would not tell
    if by_position or activation.ndim < 3 or tuple(activation.shape[:2]) != tuple(batch_pos):
        raise InvalidInputError(
            f"{name} has shape {tuple(activation.shape)}; expected [batch, pos, ...] with batch and pos {tuple(batch_pos)}: "
            "only activations with a vector for each token can be banked or decoded"
        )
    head = head_of(name)
    if head is None:
        return rearrange(activation.detach(), "batch pos ... -> batch pos (...)")
    if activation.ndim != 4 or head >= activation.shape[2] or output_layer(name) is not None:
        heads = f"heads 0 to {activation.shape[2] - 1}" if activation.ndim == 4 else "no heads"
        raise InvalidInputError(f"got {name!r}; {fires_as(name)} has {heads}, and is what is taken here as it is")
    return activation.detach()[:, :, head]


def head_outputs(model: Any, layer: int, z: Float[Tensor, "... head d_head"]) -> Float[Tensor, "... head d_model"]:
    """What each attention head adds to the output of its layer, z @ W_O, as `attn.hook_result` has it: without the bias b_O.

    Args:
        model: A TransformerLens model.
        layer: Whose heads.
        z: `blocks.{layer}.attn.hook_z`, all heads.

    Raises:
        InvalidInputError: z has another shape than the layer's W_O takes.
    """
    weight = _output_weight(model, layer)
    if tuple(z.shape[-2:]) != tuple(weight.shape[:2]):
        raise InvalidInputError(
            f"got z of shape {tuple(z.shape)}; expected [..., {weight.shape[0]} heads, d_head {weight.shape[1]}], the "
            f"activation blocks.{layer}.attn.hook_z"
        )
    return einsum(z.to(weight.device, weight.dtype), weight, "... head d_head, head d_head d_model -> ... head d_model")


def head_output(model: Any, layer: int, head: int, z: Float[Tensor, "... d_head"]) -> Float[Tensor, "... d_model"]:
    """What one attention head adds to the output of its layer; see `head_outputs`."""
    weight = _output_weight(model, layer)
    return z.to(weight.device, weight.dtype) @ weight[head]


def _output_weight(model: Any, layer: int) -> Float[Tensor, "head d_head d_model"]:
    return model.blocks[layer].attn.W_O.detach()


def switched_off(model: Any, hook_name: str) -> str | None:
    """What to do about a hook name that the model's settings keep from firing; None where they do not."""
    flag = next((flag for end, flag in _SWITCHES.items() if hook_name.endswith(end)), None)
    if flag is None or getattr(model.cfg, flag, True):
        return None
    by_head = f"; or use {hook_name.removesuffix('result')}z, from which latentlens_hooks computes {hook_name}[head]"
    return f"model.set_{flag}(True) switches it on{by_head * hook_name.endswith('hook_result')}"


def name_on_bridge(hook_name: str) -> str:
    """What a bridge itself calls a hook point."""
    block = re.fullmatch(r"(blocks\.\d+\.)(.+)", hook_name)
    return block[1] + _ON_BRIDGE.get(block[2], block[2]) if block else hook_name


def sae_input(hook_name: str, known: Container[str]) -> str | None:
    """Where an attached SAE reads what the model gave at a hook name that it replaces; None where none does.

    Args:
        hook_name: Of the activation.
        known: The model's hook names.
    """
    names = (f"{name}.hook_sae_input" for name in (hook_name, name_on_bridge(hook_name)))
    return None if hook_name in known else next((name for name in names if name in known), None)


def in_residual_stream(hook_name: str) -> bool:
    """True for activations in the space of the residual stream, which the model's unembedding can read."""
    return _RESIDUAL.fullmatch(hook_name) is not None


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Without dropout. A new HookedTransformer is in training mode; to switch a bridge takes many milliseconds."""
    was_training = model.training
    switched = any(part.training for part in model.modules())
    try:
        if switched:
            model.eval()
        yield
    finally:
        if switched:
            model.train(was_training)


@contextmanager
def without_hooks(module: torch.nn.Module) -> Iterator[None]:
    """Call a part of a model without firing the hooks on it, the user's or ours."""
    held = [(part, part._forward_hooks) for part in module.modules() if part._forward_hooks and hasattr(part, "fwd_hooks")]
    try:
        for part, hooks in held:
            part._forward_hooks = type(hooks)()
        yield
    finally:
        for part, hooks in held:
            part._forward_hooks = hooks
