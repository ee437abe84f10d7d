"""Tokenizers of many kinds, and small models that have them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from support.models import TEXTS, available_kinds, load_any

CHAT = "<|im_start|>user\nWhere is the boat?<|im_end|>\n<|im_start|>model\nOn the bank.<|im_end|>\n"


def byte_level(*added: str, chat: bool = False) -> Tokenizer:
    """A byte-level vocabulary; with added tokens that are text, and those of a chat template."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>", *(["<|im_start|>", "<|im_end|>"] if chat else [])]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=420, special_tokens=special, initial_alphabet=alphabet))
    core.add_tokens([AddedToken(token, normalized=False) for token in added])
    return core


def of_symbols(symbols: str) -> Tokenizer:
    """A vocabulary of single characters, without an unknown token: sums, DNA, moves of a game."""
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", "<pad>", *symbols])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(""), "isolated")
    core.add_special_tokens(["<s>", "</s>", "<pad>"])
    return core


def word_level(decoder: Any = None) -> Tokenizer:
    """A vocabulary of words, decoded with spaces between them."""
    core = Tokenizer(models.WordLevel(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.train_from_iterator(TEXTS, trainers.WordLevelTrainer(special_tokens=["<s>", "</s>", "<pad>", "<unk>"]))
    if decoder is not None:
        core.decoder = decoder
    return core


def end_of_word() -> Tokenizer:
    """Subwords in lower case; the last of a word ends with `</w>`."""
    core = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    core.normalizer, core.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.BPEDecoder(suffix="</w>")
    special = ["<s>", "</s>", "<pad>", "<unk>"]
    core.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=160, special_tokens=special, end_of_word_suffix="</w>"))
    return core


def word_piece(cleanup: bool = False) -> Tokenizer:
    """BERT's kind, with its [CLS] and [SEP] as <s> and </s>."""
    core = Tokenizer(models.WordPiece(unk_token="<unk>"))
    core.normalizer, core.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece(cleanup=cleanup)
    special = ["<s>", "</s>", "<pad>", "<unk>"]
    core.train_from_iterator(TEXTS, trainers.WordPieceTrainer(vocab_size=160, special_tokens=special))
    return core


def metaspace(scheme: str = "always", template: str | None = None) -> Tokenizer:
    """SentencePiece's kind with byte fallback, as Llama and Gemma have it.

    Args:
        scheme: "always", "first" (no space after a special token) or "never".
        template: What the tokenizer itself puts around a text: "<s> $A".
    """
    symbols = sorted({letter for text in TEXTS for letter in text.replace(" ", "▁")} | {"▁"})
    pieces = ["<s>", "</s>", "<pad>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words = sorted({"▁" + word for text in TEXTS for word in text.rstrip(".").split()} | {"ban", "bo", "at", "k"})
    scores = [(piece, 0.0) for piece in pieces] + [(s, -9.0) for s in symbols] + [(w, -3.0) for w in words if len(w) > 1]
    core = Tokenizer(models.Unigram(list(dict(scores).items()), unk_id=3, byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    decoder: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    core.decoder = decoders.Sequence(decoder + ([] if scheme == "never" else [decoders.Strip(" ", 1, 0)]))
    core.add_special_tokens(["<s>", "</s>", "<pad>"])
    if template:
        ids = [("<s>", 0), ("</s>", 1)]
        core.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    return core


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte level": byte_level,
    "words": word_level,
    "words and a word-piece decoder": lambda: word_level(decoders.WordPiece(cleanup=False)),
    "end of word": end_of_word,
    "word pieces": word_piece,
    "word pieces, cleaned up": lambda: word_piece(cleanup=True),
    "metaspace": metaspace,
    "metaspace with BOS of its own": lambda: metaspace(template="<s> $A"),
    "metaspace with BOS and EOS": lambda: metaspace(template="<s> $A </s>"),
    "metaspace at the first word": lambda: metaspace("first"),
    "metaspace without a prefix": lambda: metaspace("never"),
}
"""A name for each kind of tokenizer that reads the texts of `support.models`."""


def wrapped(core: Tokenizer, **settings: Any) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of transformers; BOS, EOS, padding and the unknown token are those that the vocabulary has."""
    names = {"bos": "<s>", "eos": "</s>", "pad": "<pad>", "unk": "<unk>"}
    marks = {f"{role}_token": token for role, token in names.items() if core.token_to_id(token) is not None}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, **{**marks, **settings})


def model_with(tokenizer: Any, folder: Path, kind: str | None = None, n_extra: int = 0, **sizes: Any) -> Any:
    """A small random Llama that has a tokenizer.

    Args:
        tokenizer: Of transformers.
        folder: Where its files go.
        kind: "hooked" or "bridge"; None: the bridge where there is one.
        n_extra: Rows of the embedding beyond the vocabulary; negative for too few.
        sizes: Settings of the config.
    """
    settings = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    settings |= {"max_position_embeddings": 64, "vocab_size": len(tokenizer) + n_extra}
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**{**settings, **sizes})).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return load_any(folder, kind or available_kinds()[-1])
