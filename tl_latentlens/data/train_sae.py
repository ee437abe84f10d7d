r"""Train an SAE with SAELens: the embedded one, or one of another model's residual stream.

    python -m tl_latentlens.data.train_sae concepts.txt --out OUT
    python -m tl_latentlens.data.train_sae concepts.txt --out OUT --model smollm2 --kind bridge --dtype bfloat16 \
        --hook-name blocks.14.hook_resid_post --d-sae 4608 --k 32 --tokens 3300000 --checkpoints CHECKPOINTS --int8

A BatchTopK sparse autoencoder, saved as SAELens saves it for use (a JumpReLU SAE). Each text is read alone after BOS, as in
a bank, and BOS itself is left out. Every fiftieth block of five texts is never trained on, and `evaluate` measures on those,
with the model in float32.
"""

import json
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from datasets import Dataset
from jaxtyping import Float, Int
from sae_lens import (  # pyright: ignore[reportMissingImports]
    BatchTopKTrainingSAEConfig,
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from tl_latentlens.corpus.texts import load_corpus
from tl_latentlens.directions.features.sae import TensorSAE, load_sae
from tl_latentlens.directions.features.sae_int8 import quantize
from tl_latentlens.model.loading import load_model

DATA = Path(__file__).parent
CONTEXT, SAE_BATCH_TOKENS, SEED, CHECKPOINTS = 40, 1024, 0, 20
BLOCK, HELD_OUT_BLOCK_EVERY = 5, 50  # the concept corpus has five sentences a concept
MASSIVE = 10  # times the median length
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


def split_texts(texts: list[str]) -> tuple[list[str], list[str]]:
    """Training texts, shuffled, and held-out texts: every fiftieth block of five neighboring texts."""
    held_out = [text for i, text in enumerate(texts) if i // BLOCK % HELD_OUT_BLOCK_EVERY == 0]
    training = [text for i, text in enumerate(texts) if i // BLOCK % HELD_OUT_BLOCK_EVERY]
    random.Random(SEED).shuffle(training)
    return training, held_out


def token_rows(texts: list[str], tokenizer: Any) -> Dataset:
    """Each text after BOS, cut or padded to CONTEXT tokens; padding is the BOS token, which is excluded in training."""
    bos = tokenizer.bos_token
    rows = tokenizer([bos + text for text in texts], padding="max_length", truncation=True, max_length=CONTEXT)
    return Dataset.from_dict({"input_ids": rows["input_ids"]})


@dataclass(frozen=True)
class SAESettings:
    """What is trained, and on how much."""

    model: str
    hook_name: str
    d_sae: int
    tokens: int
    k: float
    lr: float


def train_sae(model: Any, rows: Dataset, settings: SAESettings, checkpoints: Path | None) -> Any:
    """SAELens' own training, without its logging and output folder; it goes on from the last checkpoint in the folder."""
    steps = settings.tokens // SAE_BATCH_TOKENS
    states = (
        [] if checkpoints is None else sorted(checkpoints.glob("*/*/trainer_state.pt"), key=lambda path: path.stat().st_mtime)
    )
    config = LanguageModelSAERunnerConfig(
        sae=BatchTopKTrainingSAEConfig(
            d_in=model.cfg.d_model, d_sae=settings.d_sae, k=settings.k, normalize_activations="expected_average_only_in"
        ),
        model_name=settings.model,
        model_from_pretrained_kwargs={},
        hook_name=settings.hook_name,
        context_size=CONTEXT,
        exclude_special_tokens=True,
        store_batch_size_prompts=128,
        n_batches_in_buffer=1024,
        n_batches_for_norm_estimate=20,
        training_tokens=settings.tokens,
        train_batch_size_tokens=SAE_BATCH_TOKENS,
        lr=settings.lr,
        lr_warm_up_steps=steps // 20,
        lr_decay_steps=steps // 3,
        dead_feature_window=100,
        feature_sampling_window=500,
        logger=LoggingConfig(log_to_wandb=False),
        n_checkpoints=CHECKPOINTS if checkpoints else 0,
        checkpoint_path=str(checkpoints) if checkpoints else None,
        resume_from_checkpoint=str(states[-1].parent) if states else None,
        output_path=None,
        seed=SEED,
    )
    torch.manual_seed(SEED)  # initial weights and the order of activations
    return LanguageModelSAETrainingRunner(config, override_dataset=rows, override_model=model).run()


def held_out_batches(texts: list[str], model: Any) -> Iterator[tuple[Int[Tensor, "batch pos"], Tensor]]:
    """Token ids after BOS, padded on the right, and a mask of the real tokens."""
    texts = sorted(texts, key=len)
    for start in tqdm(range(0, len(texts), 64), desc="measuring"):
        batch = model.tokenizer(
            [model.tokenizer.bos_token + text for text in texts[start : start + 64]], padding=True, return_tensors="pt"
        )
        yield batch["input_ids"][:, : model.cfg.n_ctx], batch["attention_mask"][:, : model.cfg.n_ctx].bool()


def after_bos(value: Tensor, *, hook: Any, by: Any) -> Tensor:
    """A hook that replaces every position but the first."""
    return torch.cat([value[:, :1], by(value[:, 1:])], dim=1)


def decoded(features: Float[Tensor, "... d_sae"], sae: TensorSAE) -> Float[Tensor, "... d_in"]:
    """The activations that features stand for."""
    assert sae.b_dec is not None
    return features @ sae.W_dec + sae.b_dec


def reconstruction(vectors: Float[Tensor, "... d_in"], sae: TensorSAE) -> Float[Tensor, "... d_in"]:
    """What the SAE makes of activations."""
    return decoded(sae.encode(vectors), sae)


def explained_variance(vectors: Float[Tensor, "n d_in"], squared_errors: Float[Tensor, " n"]) -> float:
    """1 less the squared errors as a share of the variance of some activations."""
    variance = (vectors.double() - vectors.double().mean(0)).square().sum()
    return 1 - (squared_errors.sum() / variance).item()


@torch.no_grad()
def evaluate(model: Any, sae: Any, hook_name: str, texts: list[str]) -> dict[str, Any]:
    """Figures on texts, each read alone; BOS is neither replaced nor counted.

    `loss_recovered` is (zero ablation - SAE) / (zero ablation - clean) of the losses, in nats a token: 1 where the SAE's
    output serves the model as well as the activation, 0 where it is no better than zeros. A few massive activations, longer
    than ten times the median, may hold nearly all variance: it is given without them too.
    """
    replacements = {"clean": lambda x: x, "sae": partial(reconstruction, sae=sae), "zero_ablation": torch.zeros_like}
    losses = dict.fromkeys(replacements, 0.0)
    fired = torch.zeros(len(sae.W_dec))
    activations: list[Tensor] = []
    errors: list[Tensor] = []
    for ids, real in held_out_batches(texts, model):
        for name, by in replacements.items():
            logits = model.run_with_hooks(ids, fwd_hooks=[(hook_name, partial(after_bos, by=by))])
            nats = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
            losses[name] += nats[real[:, 1:].flatten()].sum().item()
        _, cache = model.run_with_cache(ids, names_filter=hook_name)
        vectors: Float[Tensor, "n d_in"] = cache[hook_name][:, 1:][real[:, 1:]]
        features = sae.encode(vectors)
        fired += (features > 0).sum(0)
        activations.append(vectors)
        errors.append((vectors - decoded(features, sae)).double().square().sum(-1))
    vectors, squared_errors = torch.cat(activations), torch.cat(errors)
    targets, lengths = len(vectors), vectors.norm(dim=-1)
    is_usual = lengths <= MASSIVE * lengths.median()
    losses = {name: loss / targets for name, loss in losses.items()}
    density = fired / targets
    return {
        "held_out_texts": len(texts),
        "held_out_tokens": targets,
        "l0": density.sum().item(),
        "dead_share": (fired == 0).float().mean().item(),
        "density_quantiles": {str(q): torch.quantile(density, q).item() for q in QUANTILES},
        "explained_variance": explained_variance(vectors, squared_errors),
        "explained_variance_without_massive": explained_variance(vectors[is_usual], squared_errors[is_usual]),
        "massive_share": 1 - is_usual.float().mean().item(),
        "nats_per_token": losses,
        "loss_recovered": (losses["zero_ablation"] - losses["sae"]) / (losses["zero_ablation"] - losses["clean"]),
    }


def main(
    corpus: Annotated[
        str, typer.Argument(help="texts, one a line (or anything load_corpus reads); demo: the embedded")
    ] = "demo",
    out: Annotated[Path, typer.Option(help="folder for the SAE")] = DATA / "demo_sae",
    model_name: Annotated[str, typer.Option("--model", help="as load_model takes it")] = "demo",
    kind: Annotated[str | None, typer.Option(help="its class, as load_model takes it")] = None,
    dtype: Annotated[str, typer.Option(help="of the model's weights while training")] = "float32",
    hook_name: Annotated[str, typer.Option(help="the activation to encode")] = "blocks.3.hook_resid_post",
    d_sae: Annotated[int, typer.Option(help="number of features")] = 1536,
    tokens: Annotated[int, typer.Option(help="tokens to train on, BOS not counted")] = 1_500_000,
    k: Annotated[float, typer.Option(help="features active a token, on average")] = 24,
    lr: Annotated[float, typer.Option(help="peak learning rate")] = 1e-3,
    int8: Annotated[bool, typer.Option("--int8", help="write W_enc and W_dec in eight bits, which load_sae reads")] = False,
    checkpoints: Annotated[Path | None, typer.Option(help="folder for them; a killed training goes on from the last")] = None,
) -> None:
    """Train, save in SAELens' format for use, and write the held-out figures to training.json."""
    start = time.time()
    settings = SAESettings(model_name, hook_name, d_sae, tokens, k, lr)
    model = load_model(model_name, kind=kind, dtype=dtype)
    training, held_out = split_texts(list(load_corpus(corpus)))
    trained = train_sae(model, token_rows(training, model.tokenizer), settings, checkpoints)
    trained.save_inference_model(out)
    minutes = (time.time() - start) / 60
    weights = out / "sae_weights.safetensors"
    if int8:
        save_file(quantize(load_file(weights)), weights)
    sae = load_sae(out)  # the figures are of what was saved
    record = {
        **evaluate(load_model(model_name, kind=kind), sae, hook_name, held_out),
        **asdict(settings),
        "trained_as": trained.cfg.architecture(),
        "saved_as": sae.architecture,
        "int8": int8,
        "dtype": dtype,
        "batch_tokens": SAE_BATCH_TOKENS,
        "tokens_trained": -(-tokens // SAE_BATCH_TOKENS) * SAE_BATCH_TOKENS,
        "training_texts": len(training),
        "minutes": minutes,
        "sae_lens": version("sae-lens"),
        "transformer_lens": version("transformer-lens"),
    }
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
