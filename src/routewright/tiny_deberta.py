"""A small DeBERTa-v2 with a tokenizer of its own, built from the training texts, for machines with no weights.

The architecture is DeBERTa-v3's (disentangled attention, shared keys, no absolute positions), two layers deep, so
that everything downstream (the DebertaV2 and Auto classes, serving, evaluation) meets the same file formats as with
the real base model. It learns from random weights: good for tests, quickstarts and pools with easy surface cues.

The vocabulary is counted, not fitted: whole words by frequency, then short pieces inside words, then characters, each
scored by its log frequency and segmented by the tokenizer's own unigram search. The library's unigram trainer gives
other scores on each run, and a run that is rebuilt after a crash must meet the same token ids.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from routewright.errors import MissingSetup

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # the library's tokenizer expects [UNK] as id 1
MAX_POSITIONS = 512
PROBE_TEXTS = 64  # texts looked at by check_tokenizer


def build_vocabulary(texts: Iterable[str], size: int = 4000) -> list[tuple[str, float]]:
    """(piece, log probability) pairs, special tokens first; the same texts give the same list.

    60 % of the room goes to whole words seen at least twice, the rest to pieces of 2-4 characters; every character
    seen, and all of ASCII, is always kept, so that only strange signs become [UNK].
    """
    words: Counter[str] = Counter()
    for text in texts:
        words.update(_runs(text))
    characters = Counter(string.ascii_letters + string.digits + string.punctuation + "▁")  # never unknown
    pieces: Counter[str] = Counter()
    for word, count in words.items():
        for character in word:
            characters[character] += count
        for width in (2, 3, 4):
            for start in range(len(word) - width + 1):
                pieces[word[start:start + width]] += count
    # Numbers are read digit by digit: a vocabulary of the numbers that happened to occur would not carry over.
    pieces = Counter({piece: count for piece, count in pieces.items() if not any(c.isdigit() for c in piece)})
    room = max(0, size - len(SPECIAL_TOKENS) - len(characters))
    kept: dict[str, int] = {}
    for word, count in _most_common(words, int(room * 0.6)):
        if count > 1 and len(word) > 1 and not any(c.isdigit() for c in word):
            kept[word] = count
    for piece, count in _most_common(pieces, room):
        if len(kept) >= room or count < 2:
            break
        kept.setdefault(piece, count)
    total = sum(characters.values()) or 1
    vocabulary = [(token, 0.0) for token in SPECIAL_TOKENS]
    vocabulary += [(piece, math.log(count / total)) for piece, count in _most_common(Counter(kept), len(kept))]
    # A character is a last resort: below every word that holds it.
    vocabulary += [(c, math.log(count / total) - 10.0) for c, count in _most_common(characters, len(characters))
                   if c not in kept]
    return vocabulary


def build_tiny(texts: Sequence[str], num_labels: int, seed: int = 42, vocabulary_size: int = 4000,
               **config: Any) -> tuple[Any, Any]:
    """(model, tokenizer): an untrained DebertaV2ForSequenceClassification and its tokenizer. No file, no network.

    `config` reaches DebertaV2Config, for the label names and for other sizes.
    """
    import torch
    from transformers import DebertaV2Config, DebertaV2ForSequenceClassification, DebertaV2Tokenizer

    vocabulary = build_vocabulary(texts, vocabulary_size)
    tokenizer = DebertaV2Tokenizer(vocab=vocabulary, model_max_length=MAX_POSITIONS)
    sizes = dict(hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256,
                 hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1, max_position_embeddings=MAX_POSITIONS)
    # DeBERTa-v3's own choices, scaled down: 32 buckets where the base model has 256.
    style = dict(relative_attention=True, position_buckets=32, max_relative_positions=-1, share_att_key=True,
                 pos_att_type=["p2c", "c2p"], norm_rel_ebd="layer_norm", position_biased_input=False,
                 type_vocab_size=0, layer_norm_eps=1e-7, pooler_dropout=0.0, pooler_hidden_act="gelu")
    settings = {**sizes, **style, "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id,
                "num_labels": num_labels, **config}
    settings.setdefault("pooler_hidden_size", settings["hidden_size"])
    if "id2label" in settings:
        settings.pop("num_labels")
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)  # the weights depend on the seed alone, not on what ran before
    try:
        model = DebertaV2ForSequenceClassification(DebertaV2Config(**settings))
    finally:
        torch.random.set_rng_state(state)
    return model, tokenizer


def check_tokenizer(tokenizer: Any, texts: Sequence[str], source: str | Path) -> None:
    """Stop when the tokenizer is blank or does not know the data.

    The library builds a blank tokenizer without a word when the vocabulary file is missing; every word is then
    [UNK] and training looks normal. Raises MissingSetup when more than half the tokens of the texts are unknown.
    """
    probe = [t for t in texts[:PROBE_TEXTS] if t.strip()] or ["How many apples are left?"]
    ids = [i for row in tokenizer(probe, add_special_tokens=False)["input_ids"] for i in row]
    unknown = sum(i == tokenizer.unk_token_id for i in ids) / max(1, len(ids))
    if unknown > 0.5 or not ids:
        raise MissingSetup(f"{source}: its tokenizer knows {len(tokenizer)} tokens and reads {unknown:.0%} of your "
                           "text as unknown; a vocabulary file (spm.model or tokenizer.json) is missing, so download "
                           "the base model again (`pip install sentencepiece` is needed for DeBERTa-v3)")


def _runs(text: str) -> list[str]:
    """Runs of letters, of digits and of signs; one that starts a word carries the word mark, as the tokenizer's do."""
    found = []
    for word in re.sub(r"\s+", " ", text).strip().split(" "):
        runs = re.findall(r"[^\W\d_]+|\d+|[\W_]+", word)
        found += ["▁" + run if i == 0 else run for i, run in enumerate(runs)]
    return found


def _most_common(counts: Counter[str], n: int) -> list[tuple[str, int]]:
    """Like Counter.most_common, with ties in alphabetical order instead of insertion order."""
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:n]
