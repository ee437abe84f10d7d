"""Train the embedded SAE with SAELens: `python -m tl_latentlens.data.train_sae concepts.txt --out OUT`.

A BatchTopK sparse autoencoder of the embedded model's residual stream, saved as SAELens saves it for use (a JumpReLU
SAE). Each text is read alone after BOS, as in a bank, and BOS itself is left out. Every fiftieth block of five texts is
never trained on, and `evaluate` measures on those.
"""

import json
import random
import time
from collections.abc import Iterator
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
    SAE,
    BatchTopKTrainingSAEConfig,
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
)
from torch import Tensor
from tqdm.auto import tqdm

from tl_latentlens.corpus.texts import load_corpus
from tl_latentlens.model.loading import load_demo_model

DATA = Path(__file__).parent
HOOK_NAME = "blocks.3.hook_resid_post"
D_SAE, CONTEXT, SAE_BATCH_TOKENS, SEED = 1536, 40, 1024, 0
BLOCK, HELD_OUT_BLOCK_EVERY = 5, 50  # the concept corpus has five sentences a concept
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


def train_sae(model: Any, rows: Dataset, tokens: int, k: float, lr: float) -> Any:
    """SAELens' own training, without its logging, checkpoints and output folder."""
    steps = tokens // SAE_BATCH_TOKENS
    config = LanguageModelSAERunnerConfig(
        sae=BatchTopKTrainingSAEConfig(
            d_in=model.cfg.d_model, d_sae=D_SAE, k=k, normalize_activations="expected_average_only_in"
        ),
        model_name="demo",
        model_from_pretrained_kwargs={},
        hook_name=HOOK_NAME,
        context_size=CONTEXT,
        exclude_special_tokens=True,
        store_batch_size_prompts=128,
        n_batches_in_buffer=1024,
        n_batches_for_norm_estimate=20,
        training_tokens=tokens,
        train_batch_size_tokens=SAE_BATCH_TOKENS,
        lr=lr,
        lr_warm_up_steps=steps // 20,
        lr_decay_steps=steps // 3,
        dead_feature_window=100,
        feature_sampling_window=500,
        logger=LoggingConfig(log_to_wandb=False),
        checkpoint_path=None,
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


@torch.no_grad()
def evaluate(model: Any, sae: Any, texts: list[str]) -> dict[str, Any]:
    """Figures on texts, each read alone; BOS is neither replaced nor counted.

    `loss_recovered` is (zero ablation - SAE) / (zero ablation - clean) of the losses, in nats a token: 1 where the SAE's
    output serves the model as well as the activation, 0 where it is no better than zeros.
    """
    replacements = {"clean": lambda x: x, "sae": sae, "zero_ablation": torch.zeros_like}
    losses = dict.fromkeys(replacements, 0.0)
    fired = torch.zeros(sae.cfg.d_sae)
    targets, squared_error, squares, total = 0, 0.0, 0.0, torch.zeros(sae.cfg.d_in, dtype=torch.float64)
    for ids, real in held_out_batches(texts, model):
        for name, by in replacements.items():
            logits = model.run_with_hooks(ids, fwd_hooks=[(HOOK_NAME, partial(after_bos, by=by))])
            nats = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
            losses[name] += nats[real[:, 1:].flatten()].sum().item()
        _, cache = model.run_with_cache(ids, names_filter=HOOK_NAME)
        vectors: Float[Tensor, "n d_in"] = cache[HOOK_NAME][:, 1:][real[:, 1:]]
        features = sae.encode(vectors)
        fired += (features > 0).sum(0)
        squared_error += (vectors - sae.decode(features)).double().square().sum().item()
        squares += vectors.double().square().sum().item()
        total += vectors.double().sum(0)
        targets += len(vectors)
    losses = {name: loss / targets for name, loss in losses.items()}
    density = fired / targets
    variance = squares - total.square().sum().item() / targets
    return {
        "held_out_texts": len(texts),
        "held_out_tokens": targets,
        "l0": density.sum().item(),
        "dead_share": (fired == 0).float().mean().item(),
        "density_quantiles": {str(q): torch.quantile(density, q).item() for q in QUANTILES},
        "explained_variance": 1 - squared_error / variance,
        "nats_per_token": losses,
        "loss_recovered": (losses["zero_ablation"] - losses["sae"]) / (losses["zero_ablation"] - losses["clean"]),
    }


def main(
    corpus: Annotated[
        str, typer.Argument(help="texts, one a line (or anything load_corpus reads); demo: the embedded")
    ] = "demo",
    out: Annotated[Path, typer.Option(help="folder for the SAE")] = DATA / "demo_sae",
    tokens: Annotated[int, typer.Option(help="tokens to train on, BOS not counted")] = 1_500_000,
    k: Annotated[float, typer.Option(help="features active a token, on average")] = 24,
    lr: Annotated[float, typer.Option(help="peak learning rate")] = 1e-3,
) -> None:
    """Train, save in SAELens' format for use, and write the held-out figures to training.json."""
    start = time.time()
    model = load_demo_model("hooked")
    training, held_out = split_texts(list(load_corpus(corpus)))
    trained = train_sae(model, token_rows(training, model.tokenizer), tokens, k, lr)
    trained.save_inference_model(out)
    minutes = (time.time() - start) / 60
    sae = SAE.load_from_disk(out)  # the figures are of what was saved
    record = {
        **evaluate(model, sae, held_out),
        "hook_name": HOOK_NAME,
        "trained_as": trained.cfg.architecture(),
        "saved_as": sae.cfg.architecture(),
        "d_sae": D_SAE,
        "k": k,
        "lr": lr,
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
