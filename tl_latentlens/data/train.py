"""Train the embedded demo model: `python -m tl_latentlens.data.train concepts.txt --out OUT`.

The model is a small GPT-2 (6 layers, d_model 256, vocabulary 4096). It reads three kinds of passage: the five sentences
of each concept of the LatentLens concept corpus, kept together; the training sentences of the project's own corpus; and
short lists retold in a sentence, so that it learns to read from its context. Every hundredth concept and the sentences
marked `held_out` in corpus_labels.csv are never trained on, and `evaluate` measures on them.
"""

import json
import math
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from tl_latentlens.corpus.texts import demo_labels
from tl_latentlens.data.passages import BATCH_TOKENS, concept_passages, epoch_rows, training_passages
from tl_latentlens.vision.scenes.connector import fast_products

DATA = Path(__file__).parent
BOS = "<|endoftext|>"
VOCAB, N_CTX = 4096, 256
TOKENIZER_OWN_REPEATS = 12  # enough for every ambiguous word of the own corpus to be one token


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of GPT-2's kind; one special token serves as BOS, EOS and padding."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=[BOS], initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=BOS, eos_token=BOS, unk_token=BOS, pad_token=BOS, model_max_length=N_CTX
    )


def held_out_loss(model: GPT2LMHeadModel, texts: list[str], tokenizer: PreTrainedTokenizerFast) -> float:
    """Mean cross-entropy in nats a token over texts, each read alone after BOS."""
    total, count = 0.0, 0
    texts = sorted(texts, key=len)
    with torch.inference_mode():
        for start in range(0, len(texts), 64):
            batch = tokenizer([BOS + text for text in texts[start : start + 64]], padding=True, return_tensors="pt")
            ids = batch["input_ids"][:, :N_CTX]
            logits = model(ids).logits[:, :-1]
            losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
            kept = batch["attention_mask"][:, 1:N_CTX].flatten().bool()
            total, count = total + losses[kept].sum().item(), count + int(kept.sum())
    return total / count


def sense_accuracy(model: GPT2LMHeadModel, corpus: pd.DataFrame, tokenizer: PreTrainedTokenizerFast) -> dict[str, list[float]]:
    """The rate at which held-out ambiguous words are nearer (cosine) to training uses of their own sense than of another.

    `pairs`: for each held-out sentence, the share of all (own sense, other sense) pairs of training sentences in which
    the own sense is nearer; then the mean over held-out sentences. Chance is 0.5.
    `nearest`: the share of held-out sentences whose nearest training use has the own sense, as a lens would read it.
    Chance is the mean of 1 / number of senses, `nearest_chance`.
    In [0, 1], one figure for each layer of resid_post but the last (Hugging Face gives that one after ln_final).
    """
    senses = corpus[corpus.kind == "sense"]
    vectors = []
    with torch.inference_mode():
        for text, concept in zip(senses["text"], senses["concept"], strict=True):
            encoded = tokenizer(BOS + text, return_offsets_mapping=True)
            match = re.search(rf"\b{concept}\b", text)
            assert match is not None
            end = match.end() + len(BOS)
            position = next(i for i, (_, stop) in enumerate(encoded["offset_mapping"]) if stop >= end)
            out = model(torch.tensor([encoded["input_ids"]]), output_hidden_states=True)
            vectors.append(torch.stack([h[0, position] for h in out.hidden_states[1:-1]]))
    units = F.normalize(torch.stack(vectors).transpose(0, 1), dim=-1)
    similarity = units @ units.transpose(1, 2)
    word, sense, held = senses.concept.to_numpy(), senses.sense.to_numpy(), senses.held_out.to_numpy().astype(bool)
    pairs, nearest, chance = [], [], []
    for i in np.flatnonzero(held):
        own = torch.from_numpy((word == word[i]) & (sense == sense[i]) & ~held)
        other = torch.from_numpy((word == word[i]) & (sense != sense[i]) & ~held)
        to_own, to_other = similarity[:, i, own], similarity[:, i, other]
        pairs.append((to_own[:, :, None] > to_other[:, None, :]).float().mean((1, 2)))
        nearest.append((to_own.amax(-1) > to_other.amax(-1)).float())
        chance.append(1 / len(set(sense[word == word[i]])))
    by_layer = {"pairs": pairs, "nearest": nearest}
    figures = {name: torch.stack(shares).mean(0).tolist() for name, shares in by_layer.items()}
    return figures | {"nearest_chance": [float(np.mean(chance))]}


def evaluate(model: GPT2LMHeadModel, held_out: list[list[str]], tokenizer: PreTrainedTokenizerFast) -> dict:
    """The figures of the model card."""
    was_training = model.training
    model.eval()
    corpus = demo_labels()
    figures = {
        "nats_per_token_held_out_sentences": held_out_loss(model, [s for p in held_out for s in p], tokenizer),
        "nats_per_token_held_out_passages": held_out_loss(model, [" ".join(p) for p in held_out], tokenizer),
        "nats_per_token_held_out_sense_sentences": held_out_loss(
            model, corpus.loc[corpus.held_out, "text"].tolist(), tokenizer
        ),
        "sense_accuracy": sense_accuracy(model, corpus, tokenizer),
    }
    model.train(was_training)
    return figures


def _optimizers(model: GPT2LMHeadModel, lr: float) -> list[torch.optim.Optimizer]:
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".h." in name]
    others = [p for name, p in model.named_parameters() if p.ndim < 2 or ".h." not in name]
    muon = torch.optim.Muon(matrices, lr=lr, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)]


def _new_model(dropout: float) -> GPT2LMHeadModel:
    """A model of random weights."""
    sizes: dict[str, Any] = {"n_ctx": N_CTX}  # TransformerLens reads n_ctx, which GPT2Config itself does not name
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=N_CTX, **sizes, n_embd=256, n_layer=6, n_head=4, bos_token_id=0, eos_token_id=0,
        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=0.0, architectures=["GPT2LMHeadModel"],
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def _loss(model: GPT2LMHeadModel, ids: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats a token."""
    with fast_products():
        hidden = model.transformer(ids).last_hidden_state
        logits = model.lm_head(hidden[:, :-1].flatten(0, 1))
    return F.cross_entropy(logits.float(), ids[:, 1:].flatten())


def _resume(
    checkpoint: Path, model: GPT2LMHeadModel, optimizers: list[torch.optim.Optimizer]
) -> tuple[int, list[dict[str, Any]]]:
    """Load a checkpoint where there is one; returns the steps that are done, and their log."""
    if not checkpoint.exists():
        return 0, []
    state = torch.load(checkpoint, weights_only=True)
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return state["step"], state["log"]


def _lr_fraction(step: int, steps: int) -> float:
    """Share of the peak learning rate: 150 steps of warm-up, then a cosine down to 2 %."""
    return min(1.0, (step + 1) / 150) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def _take_step(
    loss_of: Callable[[torch.Tensor], torch.Tensor],
    model: GPT2LMHeadModel,
    optimizers: list[torch.optim.Optimizer],
    batch: torch.Tensor,
    lr: float,
) -> float:
    """Train on one batch; returns its loss."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
    loss = loss_of(batch)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def _save(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Save model and tokenizer, the weights rounded to half precision."""
    model.half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    settings = out / "tokenizer_config.json"  # transformers 4 does not know the class that 5 writes
    settings.write_text(settings.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))


def train(
    concepts: Annotated[Path, typer.Argument(help="concepts.txt: five sentences a concept, one a line")],
    out: Annotated[Path, typer.Option(help="folder for the Hugging Face model and its checkpoints")] = DATA / "demo_model",
    steps: Annotated[int, typer.Option(help=f"steps of {BATCH_TOKENS} tokens")] = 3600,
    lr: Annotated[float, typer.Option(help="peak learning rate")] = 3e-3,
    own_repeats: Annotated[int, typer.Option(help="readings of the own corpus an epoch")] = 3,
    retold_share: Annotated[float, typer.Option(help="share of the text that is lists retold")] = 0.11,
    dropout: Annotated[float, typer.Option(help="residual and embedding dropout")] = 0.0,
    save_every: Annotated[int, typer.Option(help="steps between checkpoints; a killed training resumes from the last")] = 200,
) -> None:
    """Train, evaluate, and save the model in half precision with its figures in training.json."""
    torch.manual_seed(0)
    training, held_out = concept_passages(concepts)
    out.mkdir(parents=True, exist_ok=True)
    own = demo_labels()
    tokenizer = train_tokenizer([s for p in training for s in p] + list(own[~own.held_out].text) * TOKENIZER_OWN_REPEATS)
    model = _new_model(dropout)
    optimizers = _optimizers(model, lr)
    passages = training_passages(training, tokenizer, own_repeats, retold_share)
    n_tokens = sum(len(later) for passage in passages for _, later in passage)
    compiled_loss = torch.compile(partial(_loss, model), dynamic=False)
    checkpoint = out / "checkpoint.pt"
    n_done, log = _resume(checkpoint, model, optimizers)
    batches = (b for epoch in range(10**6) for b in epoch_rows(passages, (N_CTX // 2, N_CTX), 0, epoch))
    bar = tqdm(zip(range(steps), batches, strict=False), total=steps, desc=f"training, {n_tokens / 1e6:.2f}M tokens an epoch")
    start = time.time()
    for step, batch in bar:
        if step < n_done:
            continue
        loss = _take_step(compiled_loss, model, optimizers, torch.from_numpy(batch), lr * _lr_fraction(step, steps))
        bar.set_postfix(loss=f"{loss:.3f}")
        if (step + 1) % save_every == 0 or step + 1 == steps:
            log.append({"step": step + 1, "batch_loss": loss, **evaluate(model, held_out, tokenizer)})
            bar.write(json.dumps(log[-1]))
            states = [optimizer.state_dict() for optimizer in optimizers]
            torch.save({"model": model.state_dict(), "optimizers": states, "step": step + 1, "log": log}, checkpoint)
    _save(model, tokenizer, out)
    model.float()  # the figures are of the weights as saved, rounded to half precision
    record = {
        **evaluate(model, held_out, tokenizer),
        "parameters": sum(p.numel() for p in model.parameters()),
        "epochs": steps * BATCH_TOKENS / n_tokens,
        "tokens_read": steps * BATCH_TOKENS,
        "steps": steps,
        "lr": lr,
        "minutes_since_start_or_resume": (time.time() - start) / 60,
        "log": log,
    }
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(train)
