"""Training a connector on a frozen TransformerLens model: patch features in, visual tokens out, captions the only teacher.

This is how the paper's vision-language models are made (arXiv 2602.00462): vision encoder and language model are frozen, and an
MLP between them learns from captions alone. Nothing pulls a visual token towards the embedding of any word.
"""

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from tl_latentlens.errors import InvalidInputError
from tl_latentlens.vision.scenes.encoder import WIDTH, PatchEncoder
from tl_latentlens.vision.scenes.render import COLORS, SHAPES, Scenes, caption, draw_scenes


class Connector(nn.Module):
    """An MLP from patch features to visual tokens, which are as long as the language model's own embeddings (rms).

    A longer vector would drown what the blocks add to it, and be the same at every layer.
    """

    def __init__(self, d_model: int, rms: float) -> None:
        """For a model of width d_model whose embeddings have this root mean square."""
        super().__init__()
        self.rms = rms
        self.layers = nn.Sequential(nn.Linear(WIDTH, d_model), nn.GELU(), nn.Linear(d_model, d_model))

    def forward(self, features: Float[Tensor, "scene cell width"]) -> Float[Tensor, "scene cell d_model"]:
        """Visual tokens."""
        tokens = self.layers(features)
        return F.layer_norm(tokens, tokens.shape[-1:]) * self.rms


@dataclass(frozen=True)
class ConnectorSettings:
    """The settings that a training depends on. New scenes are drawn for every step, so none is seen twice."""

    seed: int = 0
    steps: int = 300
    batch: int = 32
    lr: float = 2e-3


@dataclass(frozen=True, eq=False)
class SceneModel:
    """A vision-language model: frozen encoder, connector, frozen language model.

    Attributes:
        model: A HookedTransformer or TransformerBridge.
        encoder: Of the patches.
        connector: From its features to the model's embeddings.
        losses: Nats a caption token at each step of the training.
    """

    model: Any
    encoder: PatchEncoder
    connector: Connector
    losses: list[float] = field(repr=False)

    def visual_tokens(self, scenes: Scenes) -> Float[Tensor, "scene cell d_model"]:
        """The visual tokens that the connector makes, one of each patch."""
        with torch.no_grad():
            features = self.encoder(torch.from_numpy(scenes.images))
        return self.connector(features)

    def run_with_hooks(self, scenes: Scenes, **options: Any) -> Any:
        """Run the language model on BOS and the visual tokens of each scene, which stand at positions 1 to 36.

        Args:
            scenes: What it sees.
            options: For the model's own `run_with_hooks`, such as `fwd_hooks`.
        """
        return run_embeddings(self.model, with_bos(self.model, self.visual_tokens(scenes)), **options)


def fast_products() -> torch.autocast:
    """bfloat16 where the processor multiplies it; elsewhere float32, which is a hundred times faster there."""
    return torch.autocast("cpu", torch.bfloat16, enabled=torch.ops.mkldnn._is_mkldnn_bf16_supported())


def new_connector(model: Any, seed: int) -> Connector:
    """An untrained connector for a model."""
    torch.manual_seed(seed)
    lengths = torch.linalg.vector_norm(model.W_E.detach().float(), dim=-1)
    return Connector(model.cfg.d_model, float(lengths.median()) / model.cfg.d_model**0.5)


def run_embeddings(model: Any, embeddings: Float[Tensor, "batch pos d_model"], **options: Any) -> Any:
    """Run a model on embeddings in place of tokens; both model classes add the positions of theirs.

    Args:
        model: A TransformerBridge takes floats as `inputs_embeds`; a HookedTransformer starts at layer 0, behind its
            embeddings, so learned positions are added here (rotary models have none to add).
        embeddings: Of tokens and of what stands in their place.
        options: For `model.run_with_hooks`, such as `fwd_hooks`.
    """
    if hasattr(model, "adapter"):
        return model.run_with_hooks(embeddings, **options)
    if model.cfg.positional_embedding_type == "standard":
        embeddings = embeddings + model.W_pos[: embeddings.shape[1]]
    return model.run_with_hooks(embeddings, start_at_layer=0, **options)


def train_connector(
    model: Any, encoder: PatchEncoder, path: Path, settings: ConnectorSettings, *, every: int = 100
) -> SceneModel:
    """Train a connector, or go on where `path` was left; a finished one is only loaded.

    Args:
        model: The language model; its weights are frozen.
        encoder: Frozen too.
        path: The checkpoint, written every so many steps and at the end.
        settings: Seed, steps, batch and learning rate.
        every: Steps between checkpoints.

    Raises:
        InvalidInputError: `path` holds a training with other settings.
    """
    model.eval().requires_grad_(False)
    connector = new_connector(model, settings.seed)
    optimizer = torch.optim.AdamW(connector.parameters(), lr=settings.lr, betas=(0.9, 0.95), weight_decay=0.0)
    losses: list[float] = []
    if path.exists():
        state = torch.load(path, weights_only=True)
        if state["settings"] != vars(settings):
            raise InvalidInputError(
                f"{path} holds a training with {state['settings']}, not {vars(settings)}; delete it, or choose another folder"
            )
        connector.load_state_dict(state["connector"])
        optimizer.load_state_dict(state["optimizer"])
        losses = state["losses"]
    scene_model = SceneModel(model, encoder, connector, losses)
    for step in tqdm(range(len(losses), settings.steps), desc=path.stem, initial=len(losses), total=settings.steps, delay=2):
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * _rate(step, settings.steps)
        rng = np.random.default_rng((settings.seed, step))  # A resumed training sees what it would have seen.
        loss = caption_loss(scene_model, draw_scenes(settings.batch, rng), rng).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(connector.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if len(losses) % every == 0 or len(losses) == settings.steps:
            states = {"connector": connector.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({**states, "losses": losses, "settings": vars(settings)}, path.with_suffix(".partial"))
            os.replace(path.with_suffix(".partial"), path)  # a kill leaves the old checkpoint or the new one
    return scene_model


def _rate(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / 50) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def caption_loss(scene_model: SceneModel, scenes: Scenes, rng: np.random.Generator) -> Float[Tensor, " tokens"]:
    """Cross-entropy in nats of every caption token, each caption behind the visual tokens of its scene."""
    logits, ids = _caption_logits(scene_model, scenes, rng)
    return F.cross_entropy(logits.float(), ids, reduction="none")


@torch.no_grad()
def caption_accuracy(scene_model: SceneModel, scenes: Scenes, seen: Scenes, rng: np.random.Generator) -> float:
    """Share of the color and shape words of captions that are the model's first choice, given the words before them.

    Args:
        scene_model: The model that writes the captions.
        scenes: The scenes that the captions describe.
        seen: The scenes that the model sees: the same, or others as a control.
        rng: Chooses the captions' sentences.
    """
    logits, ids = _caption_logits(scene_model, scenes, rng, seen)
    words = torch.tensor([_ids(scene_model.model, f" {word}")[0] for word in (*COLORS, *SHAPES)])
    is_word = torch.isin(ids, words)
    return float((logits.argmax(-1) == ids)[is_word].float().mean())


def _caption_logits(
    scene_model: SceneModel, scenes: Scenes, rng: np.random.Generator, seen: Scenes | None = None
) -> tuple[Float[Tensor, "tokens d_vocab"], Int[Tensor, " tokens"]]:
    """The logits for each caption token, and its id; padding is left out."""
    model = scene_model.model
    captions = [torch.tensor(_ids(model, ". " + caption(scenes, i, rng))) for i in range(len(scenes.colors))]
    ids = pad_sequence(captions, batch_first=True, padding_value=-1)
    is_token: Bool[Tensor, "scene pos"] = ids >= 0
    with fast_products():
        logits = run_embeddings(model, with_bos(model, scene_model.visual_tokens(seen or scenes), ids.clamp(min=0)))
    return logits[:, -ids.shape[1] - 1 : -1][is_token], ids[is_token]


def with_bos(
    model: Any, visual: Float[Tensor, "scene cell d_model"], after: Int[Tensor, "scene pos"] | None = None
) -> Float[Tensor, "scene all_pos d_model"]:
    """Embeddings of BOS, visual tokens, and the tokens after them."""
    bos = torch.full((len(visual), 1), model.tokenizer.bos_token_id)
    embedding = model.W_E
    visual = visual.to(embedding.device)  # the encoder stays on the CPU
    parts = [embedding[bos], visual] if after is None else [embedding[bos], visual, embedding[after]]
    return torch.cat(parts, 1)


def _ids(model: Any, text: str) -> list[int]:
    return model.tokenizer(text, add_special_tokens=False)["input_ids"]
