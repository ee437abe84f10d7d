"""Train the embedded demo model: `python -m tl_latentlens.data.train concepts.txt --out OUT`.

The model is a small GPT-2 (6 layers, d_model 256, vocabulary 4096). It reads three kinds of passage: the five sentences
of each concept of the LatentLens concept corpus, kept together; the training sentences of the project's own corpus; and
short lists retold in a sentence, so that it learns to read from its context. Every hundredth concept and the sentences
marked `held_out` in corpus_labels.csv are never trained on, and `evaluate` measures on them.
"""

import json
import math
import random
import re
import time
from collections.abc import Iterator
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
from tl_latentlens.vision.scenes.connector import fast_products
from tl_latentlens.vision.scenes.phrases import RETELLINGS, article, joined

DATA = Path(__file__).parent
BOS = "<|endoftext|>"
Passage = list[tuple[list[int], list[int]]]  # each sentence's tokens: as the first after BOS, and with a space before it
VOCAB, N_CTX, BATCH_TOKENS = 4096, 256, 4096
SENTENCES_A_CONCEPT, HELD_OUT_EVERY = 5, 100
APART_SHARE = 0.3
TOKENIZER_OWN_REPEATS = 12  # enough for every ambiguous word of the own corpus to be one token

COLORS = "red blue green yellow black white orange purple brown pink gray".split()
SIZES = "small large tiny tall big thin little huge".split()
THINGS = (
    "circle square triangle star ring cross line dot oval diamond heart arrow cat dog horse bird fish duck cow sheep rabbit "
    "frog snake bee cup ball box chair apple sun moon cloud tree hill house boat road book key lamp bag hat flower stone"
).split()


def concept_passages(path: Path) -> tuple[list[list[str]], list[list[str]]]:
    """The concept corpus as (training passages, held-out passages), one passage of five sentences a concept."""
    lines = path.read_text(encoding="utf-8").splitlines()
    passages = [lines[i : i + SENTENCES_A_CONCEPT] for i in range(0, len(lines), SENTENCES_A_CONCEPT)]
    held_out = passages[::HELD_OUT_EVERY]
    return [p for i, p in enumerate(passages) if i % HELD_OUT_EVERY], held_out


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


def retold_list(rng: random.Random, scenes: list[str]) -> str:
    """A list and the same list told again: half drawn from words, half from the corpus's scene descriptions."""
    if rng.random() < 0.5:
        told = [scene.rstrip(".") for scene in rng.sample(scenes, rng.randint(1, 2))]
        told = [scene[0].lower() + scene[1:] for scene in told]
        first, frame = "; ".join(told), rng.choice(("We can see this: {}.", "It shows {}.", "In words: {}."))
        return f"{first}. {frame.format(' and '.join(told))}"
    items = []
    for _ in range(rng.randint(2, 6)):
        size = rng.choice(SIZES) + " " if rng.random() < 0.3 else ""
        items.append("nothing" if rng.random() < 0.2 else f"{size}{rng.choice(COLORS)} {rng.choice(THINGS)}")
    seen = [article(item) for item in items if item != "nothing"]
    retelling = rng.choice(RETELLINGS).format(joined(seen)) if seen else "We can see nothing."
    return f"{', '.join(items)}. {retelling[0].upper()}{retelling[1:]}"


def epoch_rows(passages: list[Passage], lengths: tuple[int, ...], bos: int, seed: int) -> Iterator[np.ndarray]:
    """Batches [rows, length] of packed passages, BATCH_TOKENS tokens each, the length drawn anew for every batch.

    Each row starts with BOS at the start of a sentence, so position 0 looks in training as it does in use; a sentence
    that a row's end cuts off is read again, whole, at the start of the next row. A share of the passages is taken apart
    and each of its sentences read after a BOS of its own, as single sentences are in use.
    """
    rng = random.Random(seed)
    order = list(range(len(passages)))
    rng.shuffle(order)
    length = rng.choice(lengths)
    rows: list[list[int]] = []
    row: list[int] = []
    for i in order:
        sentences = list(passages[i])
        rng.shuffle(sentences)
        apart = rng.random() < APART_SHARE
        for place, (first, later) in enumerate(sentences):
            row += later if place and row and not apart else [bos, *first]
            if len(row) >= length:
                rows.append(row[:length])
                row = [] if len(row) == length else [bos, *first]
            if len(rows) * length >= BATCH_TOKENS:
                yield np.array(rows)
                length, rows = rng.choice(lengths), []


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
    """How often a held-out ambiguous word is nearer (cosine) to the training uses of its own sense than of another.

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


def training_passages(
    concepts: list[list[str]], tokenizer: PreTrainedTokenizerFast, own_repeats: int, retold_share: float
) -> list[Passage]:
    """Tokenised passages of one epoch: the concepts, the own corpus, and lists retold as a share of all characters."""
    corpus = demo_labels()
    corpus = corpus[~corpus.held_out]
    passages = list(concepts)
    for _, group in corpus.groupby(["kind", "concept", "sense"], sort=False):
        texts = list(group.text)
        passages += [texts[i : i + 5] for i in range(0, len(texts), 5)] * own_repeats
    characters = sum(len(sentence) for passage in passages for sentence in passage)
    rng, scenes = random.Random(0), corpus.loc[corpus.kind == "scene", "text"].tolist()
    missing = characters * retold_share / (1 - retold_share)
    while missing > 0:
        passages.append([retold_list(rng, scenes) for _ in range(3)])
        missing -= sum(map(len, passages[-1]))
    flat = [sentence for passage in passages for sentence in passage]
    first, later = tokenizer(flat)["input_ids"], tokenizer([" " + sentence for sentence in flat])["input_ids"]
    pairs = iter(zip(first, later, strict=True))
    return [[next(pairs) for _ in passage] for passage in passages]


def _optimizers(model: GPT2LMHeadModel, lr: float) -> list[torch.optim.Optimizer]:
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".h." in name]
    others = [p for name, p in model.named_parameters() if p.ndim < 2 or ".h." not in name]
    muon = torch.optim.Muon(matrices, lr=lr, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)]


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
    sizes: dict[str, Any] = {"n_ctx": N_CTX}  # TransformerLens reads n_ctx, which GPT2Config itself does not name
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=N_CTX, **sizes, n_embd=256, n_layer=6, n_head=4, bos_token_id=0, eos_token_id=0,
        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=0.0, architectures=["GPT2LMHeadModel"],
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    optimizers = _optimizers(model, lr)
    passages = training_passages(training, tokenizer, own_repeats, retold_share)
    tokens = sum(len(later) for passage in passages for _, later in passage)

    def loss_of(ids: torch.Tensor) -> torch.Tensor:
        with fast_products():
            hidden = model.transformer(ids).last_hidden_state
            logits = model.lm_head(hidden[:, :-1].flatten(0, 1))
        return F.cross_entropy(logits.float(), ids[:, 1:].flatten())

    checkpoint, done, log = out / "checkpoint.pt", 0, []
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        done, log = state["step"], state["log"]
    batches = (b for epoch in range(10**6) for b in epoch_rows(passages, (N_CTX // 2, N_CTX), 0, epoch))
    compiled = torch.compile(loss_of, dynamic=False)
    bar = tqdm(zip(range(steps), batches, strict=False), total=steps, desc=f"training, {tokens / 1e6:.2f}M tokens an epoch")
    start = time.time()
    for step, batch in bar:
        if step < done:
            continue
        fraction = min(1.0, (step + 1) / 150) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * fraction
        loss = compiled(torch.from_numpy(batch))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")
        if (step + 1) % save_every == 0 or step + 1 == steps:
            figures = evaluate(model, held_out, tokenizer)
            log.append({"step": step + 1, "batch_loss": loss.item(), **figures})
            bar.write(json.dumps(log[-1]))
            states = [optimizer.state_dict() for optimizer in optimizers]
            torch.save({"model": model.state_dict(), "optimizers": states, "step": step + 1, "log": log}, checkpoint)
    model.half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    settings = out / "tokenizer_config.json"  # transformers 4 does not know the class that 5 writes
    settings.write_text(settings.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
    model.float()  # the figures are of the weights as saved, rounded to half precision
    record = {
        **evaluate(model, held_out, tokenizer),
        "parameters": sum(p.numel() for p in model.parameters()),
        "epochs": steps * BATCH_TOKENS / tokens,
        "tokens_read": steps * BATCH_TOKENS,
        "steps": steps,
        "lr": lr,
        "minutes_since_start_or_resume": (time.time() - start) / 60,
        "log": log,
    }
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(train)
