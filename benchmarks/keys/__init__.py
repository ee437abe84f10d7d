"""What keys and values of visual tokens hold: `python -m benchmarks keys --figure docs/_static/keys.svg`.

After Liu et al. (arXiv 2510.04819), on scenes whose truth is known. They and their vision-language models are those of
`benchmarks.scenes`. Vectors of patches are recorded here and given to `tasks`; then keys that hardly change from image to image
are blocked, and text is put before the image.
"""

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

import tl_latentlens as tll
from benchmarks.keys.report import ONE_MEAN, OWN_MEAN, Figures, draw, tables
from benchmarks.keys.tasks import (
    correspond,
    cosegment,
    distinct_objects,
    foreground,
    placed,
    propagate,
    refer,
    scenes_of,
)
from benchmarks.measure import Settings
from benchmarks.scenes import trained
from tl_latentlens.vision.scenes.connector import ConnectorSettings, SceneModel, run_embeddings
from tl_latentlens.vision.scenes.render import COLORS, GRID, PATCH, SHAPES, Scenes, caption, draw_scenes

SEEDS = (0, 1, 2)
SCENES = 100  # of each seed that the tasks are judged on
SHOTS = 5  # scenes with labels, for the probe
GROUP, GROUPS, EACH = 4, 25, 4  # scenes that share an object, such groups, objects of a scene
SHARE = 1 / 6  # of the keys that are blocked
DRAWS = 5  # random choices of as many
_HELD_OUT = 10**6 + 1  # no training step has this number, and `benchmarks.scenes` another
Sites = dict[str, Float[Tensor, "scene cell ..."]]


def run(settings: Settings) -> str:
    """Train what the folder does not hold yet, record, judge, and tell what came out."""
    start = time.perf_counter()
    folder = settings.folder or Path("build/scenes")
    folder.mkdir(parents=True, exist_ok=True)
    model = tll.load_demo_model()
    figures = Figures(model.cfg.n_layers)
    for seed in tqdm(SEEDS, desc="seeds"):
        scene_model, _ = trained(model, folder, ConnectorSettings(seed))
        measure_tasks(scene_model, seed, figures)
        measure_blocking(scene_model, seed, figures)
        measure_prefix(scene_model, seed, figures)
    if settings.figure is not None:
        draw(figures, settings.figure)
    minutes = (time.perf_counter() - start) / 60
    return f"{tables(figures)}\n\n{minutes:.1f} minutes in all, less what {folder} held already."


# Recording


@torch.no_grad()
def recorded(scene_model: SceneModel, scenes: Scenes, prefix: Int[Tensor, "scene text"] | None = None) -> Sites:
    """What stands behind every patch, by its name: keys and values of all heads side by side, and one by one, and their input.

    Args:
        scene_model: Whose.
        scenes: What it sees.
        prefix: Tokens before the image of each scene; None: BOS alone.

    Returns:
        For layer 2, "residual 2" [scene, cell, d_model], "keys 2" and "values 2" [scene, cell, all heads], and for their heads
        "keys 2[0]" [scene, cell, d_head].
    """
    visual = scene_model.visual_tokens(scenes)
    sites = _run(scene_model.model, _embedded(scene_model.model, visual, prefix))
    return {name: activation[:, -visual.shape[1] :] for name, activation in sites.items()}


def _embedded(model: Any, visual: Float[Tensor, "scene cell d_model"], prefix: Int[Tensor, "scene text"] | None) -> Tensor:
    bos = torch.full((len(visual), 1), model.tokenizer.bos_token_id)
    return torch.cat([model.W_E[bos if prefix is None else torch.cat([bos, prefix], 1)], visual], 1)


def _run(model: Any, embeddings: Float[Tensor, "scene pos d_model"]) -> Sites:
    found: Sites = {}

    def keep(site: str) -> Any:
        def hook_function(activation: Tensor, hook: Any) -> None:
            found[site] = activation.detach().flatten(2).clone()
            if activation.ndim == 4:
                found.update(
                    {f"{site}[{head}]": activation[:, :, head].detach().clone() for head in range(activation.shape[2])}
                )

        return hook_function

    points = {"residual": "hook_resid_pre", "keys": "attn.hook_k", "values": "attn.hook_v"}
    hooks = [
        (f"blocks.{layer}.{point}", keep(f"{site} {layer}"))
        for layer in range(model.cfg.n_layers)
        for site, point in points.items()
    ]
    run_embeddings(model, embeddings, fwd_hooks=hooks, return_type=None)
    return found


@torch.no_grad()
def recorded_texts(model: Any) -> dict[str, Float[Tensor, "phrase d"]]:
    """The same of "red circle", for every color with every shape: the mean of its two tokens, behind BOS and an article."""
    ids = torch.tensor([[model.tokenizer.bos_token_id, *_ids(model, " the")]] * (len(COLORS) * len(SHAPES)))
    sites = _run(model, model.W_E[torch.cat([ids, phrase_tokens(model)], 1)])
    return {name: activation[:, -2:].mean(1) for name, activation in sites.items()}


def phrase_tokens(model: Any) -> Int[Tensor, "phrase 2"]:
    """The ids of " red circle", for every color with every shape."""
    return torch.tensor([_ids(model, f" {color} {shape}") for color in COLORS for shape in SHAPES])


def _ids(model: Any, text: str) -> list[int]:
    return model.tokenizer(text, add_special_tokens=False)["input_ids"]


def _before(scene_model: SceneModel, scenes: Scenes) -> Sites:
    """What the language model did not make: the vision encoder's features, and the pixels of each patch."""
    pixels = rearrange(scenes.images, "n (r h) (c w) rgb -> n (r c) (h w rgb)", h=PATCH, w=PATCH)
    images = torch.from_numpy(scenes.images)
    with torch.no_grad():
        return {"encoder": scene_model.encoder(images), "pixels": torch.from_numpy(pixels)}


def _projected(sites: Sites, d_head: int) -> Sites:
    """As wide as a head, but chosen by nothing: a random projection of what the heads of a layer read."""
    made = {}
    for name in [name for name in sites if name.startswith("residual")]:
        weight = torch.randn(sites[name].shape[-1], d_head, generator=torch.Generator().manual_seed(len(name)))
        made[name.replace("residual", "random projection")] = sites[name] @ weight
    return made


# The tasks


def measure_tasks(scene_model: SceneModel, seed: int, figures: Figures) -> None:
    """Every task by every site, on scenes of a seed that were never seen: centered by one mean, or each position by its own."""
    rng = np.random.default_rng((seed, _HELD_OUT))
    few, many, others = (draw_scenes(n, rng) for n in (SHOTS, SCENES, SCENES))
    objects = distinct_objects(SCENES, EACH, rng)
    sources, targets = (placed(objects, GRID**2, rng) for _ in range(2))
    groups, common = _groups(rng)
    moved = {name: scenes_of(ids, rng) for name, ids in {"from": sources, "to": targets, "groups": groups}.items()}
    drawn = {"few": few, "many": many, "others": others, **moved}
    texts = recorded_texts(scene_model.model)
    texts.update(_projected(texts, scene_model.model.cfg.d_head))
    sites = {name: _all_sites(scene_model, scenes) for name, scenes in drawn.items()}
    truth = rearrange(groups == common, "(group scene) cell -> group scene cell", scene=GROUP)
    for site, patches in sites["others"].items():
        means = {ONE_MEAN: patches.flatten(0, 1).mean(0), **({} if "[" in site else {OWN_MEAN: patches.mean(0)})}
        for centering, mean in means.items():
            at = {name: one[site] - mean for name, one in sites.items()}
            grouped = rearrange(at["groups"], "(group scene) cell d -> group scene cell d", scene=GROUP)
            pair = at["from"], at["to"], sources, targets
            figures.add(centering, "foreground", site, foreground(at["few"], few.filled, at["many"], many.filled))
            figures.add(centering, "co-segmentation", site, cosegment(grouped, truth, seed))
            if site in texts:
                figures.add(centering, "referring", site, refer(at["many"], texts[site] - texts[site].mean(0), many))
            figures.add(centering, "correspondence", site, correspond(*pair))
            figures.add(centering, "propagation", site, propagate(*pair))


def _groups(rng: np.random.Generator) -> tuple[Int[np.ndarray, "scene cell"], Int[np.ndarray, "scene 1"]]:
    """Scenes, group after group, and the one object that all scenes of a group have; the others are drawn for each scene."""
    drawn = distinct_objects(GROUPS * GROUP, EACH + 1, rng)
    common = np.repeat(drawn[::GROUP, :1], GROUP, 0)
    others = np.array([line[line != one][: EACH - 1] for line, [one] in zip(drawn, common, strict=True)])
    return placed(np.concatenate([common, others], 1), GRID**2, rng), common


def _all_sites(scene_model: SceneModel, scenes: Scenes) -> Sites:
    sites = recorded(scene_model, scenes)
    return {**_before(scene_model, scenes), **sites, **_projected(sites, scene_model.model.cfg.d_head)}


# Blocking, and text before the image


@torch.no_grad()
def caption_losses(
    scene_model: SceneModel, scenes: Scenes, hooks: Any = (), prefix: Int[Tensor, "scene text"] | None = None
) -> Float[np.ndarray, " scene"]:
    """Nats a caption token, the mean of each scene; always the same captions."""
    model, rng = scene_model.model, np.random.default_rng(0)
    captions = [torch.tensor(_ids(model, ". " + caption(scenes, scene, rng))) for scene in range(len(scenes.colors))]
    ids = pad_sequence(captions, batch_first=True, padding_value=-1)
    seen = _embedded(model, scene_model.visual_tokens(scenes), prefix)
    logits = run_embeddings(model, torch.cat([seen, model.W_E[ids.clamp(min=0)]], 1), fwd_hooks=list(hooks))
    losses = F.cross_entropy(logits[:, seen.shape[1] - 1 : -1].mT, ids, reduction="none", ignore_index=-1)
    return (losses.sum(1) / (ids >= 0).sum(1)).numpy()


def measure_blocking(scene_model: SceneModel, seed: int, figures: Figures) -> None:
    """The caption loss where text does not see some keys of a layer: those with the least spread, the most, or any."""
    rng = np.random.default_rng((seed, _HELD_OUT, 1))
    others, scenes = (draw_scenes(SCENES, rng) for _ in range(2))
    sites = recorded(scene_model, others)
    n_heads = scene_model.model.cfg.n_heads
    spreads = [
        tll.key_spread(rearrange(sites[f"keys {layer}"], "n p (head d) -> n p head d", head=n_heads))
        for layer in range(figures.n_layers)
    ]
    figures.spreads.append(torch.stack(spreads).numpy())
    figures.add_loss("nothing", None, caption_losses(scene_model, scenes))
    orders = {"least spread": spreads, "most spread": [-spread for spread in spreads]}
    for number in range(DRAWS):  # other patches, but as many that are the same ones in all heads and layers
        patches = torch.from_numpy(rng.permutation(GRID**2))
        orders[f"random {number}"] = [spread[patches] for spread in spreads]
    for kind, order in orders.items():
        masks = {f"blocks.{layer}.attn.hook_k": lowest(one) for layer, one in enumerate(order)}
        for layer, (name, mask) in enumerate(masks.items()):
            hooks = tll.block_attention({name: mask}, first_query=len(mask))
            figures.add_loss(kind.split(" ")[0], layer, caption_losses(scene_model, scenes, hooks))
        hooks = tll.block_attention(masks, first_query=GRID**2 + 1)
        figures.add_loss(kind.split(" ")[0], figures.n_layers, caption_losses(scene_model, scenes, hooks))


def lowest(values: Float[Tensor, "cell head"]) -> Bool[Tensor, "pos head"]:
    """True at the lowest SHARE of each head's cells; positions start with BOS."""
    ranks = values.argsort(0).argsort(0)
    return F.pad(ranks < round(SHARE * len(ranks)), (0, 0, 1, 0))


def measure_prefix(scene_model: SceneModel, seed: int, figures: Figures) -> None:
    """Referring to an object of each scene, and the caption loss, with its name before the image, another's, or nothing."""
    rng = np.random.default_rng((seed, _HELD_OUT, 2))
    model = scene_model.model
    objects = distinct_objects(SCENES, EACH + 1, rng)  # the first is asked for, the last is not in the scene
    ids = placed(objects[:, :EACH], GRID**2, rng)
    scenes, texts, tokens = scenes_of(ids, rng), recorded_texts(model), phrase_tokens(model)
    prefixes = {"nothing": None, "its name": tokens[objects[:, 0]], "another name": tokens[objects[:, -1]]}
    prefixes["any words"] = torch.from_numpy(rng.choice(tokens.numpy().ravel(), (SCENES, 2)))
    order = rng.permutation(model.cfg.d_vocab)[: 2 * SCENES]
    prefixes["any tokens"] = torch.from_numpy(order.reshape(SCENES, 2))
    for kind, prefix in prefixes.items():
        figures.add_loss(f"prefix: {kind}", None, caption_losses(scene_model, scenes, prefix=prefix))
        for site, patches in recorded(scene_model, scenes, prefix).items():
            if "[" not in site:
                asked = (texts[site] - texts[site].mean(0))[objects[:, 0]]
                at = torch.einsum("scd,sd->sc", patches - patches.mean((0, 1)), asked).argmax(1).numpy()
                found = ids[np.arange(SCENES), at] == objects[:, 0]
                figures.prefixes[kind, site].append(found.astype(float))
