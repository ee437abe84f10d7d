"""Passages that the embedded model is trained on: concepts, the project's own corpus, lists retold; and batches of them."""

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from tl_latentlens.corpus.texts import demo_labels
from tl_latentlens.vision.scenes.phrases import RETELLINGS, article, joined

Passage = list[tuple[list[int], list[int]]]  # each sentence's tokens: as the first after BOS, and with a space before it
BATCH_TOKENS = 4096
SENTENCES_A_CONCEPT, HELD_OUT_CONCEPT_EVERY = 5, 100
APART_SHARE = 0.3  # This share of the passages is read sentence by sentence.

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
    held_out = passages[::HELD_OUT_CONCEPT_EVERY]
    return [p for i, p in enumerate(passages) if i % HELD_OUT_CONCEPT_EVERY], held_out


def retold_list(rng: random.Random, scenes: list[str]) -> str:
    """A list and the same list told again: half drawn from words, half from the corpus's scene descriptions."""
    if rng.random() < 0.5:
        items = [scene.rstrip(".") for scene in rng.sample(scenes, rng.randint(1, 2))]
        items = [item[0].lower() + item[1:] for item in items]
        first, frame = "; ".join(items), rng.choice(("We can see this: {}.", "It shows {}.", "In words: {}."))
        return f"{first}. {frame.format(' and '.join(items))}"
    items = []
    for _ in range(rng.randint(2, 6)):
        size = rng.choice(SIZES) + " " if rng.random() < 0.3 else ""
        items.append("nothing" if rng.random() < 0.2 else f"{size}{rng.choice(COLORS)} {rng.choice(THINGS)}")
    things = [article(item) for item in items if item != "nothing"]
    retelling = rng.choice(RETELLINGS).format(joined(things)) if things else "We can see nothing."
    return f"{', '.join(items)}. {retelling[0].upper()}{retelling[1:]}"


def epoch_rows(passages: list[Passage], lengths: tuple[int, ...], bos: int, seed: int) -> Iterator[np.ndarray]:
    """Batches [rows, length] of packed passages, BATCH_TOKENS tokens each, the length drawn anew for every batch.

    Each row starts with BOS at the start of a sentence, so position 0 looks in training as it does in use; a sentence
    that a row's end cuts off is read again, whole, at the start of the next row. A share of the passages is taken
    apart, and each of their sentences is read after a BOS of its own, as single sentences are in use.
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
        is_apart = rng.random() < APART_SHARE
        for place, (first, later) in enumerate(sentences):
            row += later if place and row and not is_apart else [bos, *first]
            if len(row) >= length:
                rows.append(row[:length])
                row = [] if len(row) == length else [bos, *first]
            if len(rows) * length >= BATCH_TOKENS:
                yield np.array(rows)
                length, rows = rng.choice(lengths), []


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
