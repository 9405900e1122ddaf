"""Encoders: what loads, what is refused and how quickly, and that a vector is the same however it was come by."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import minilm_folder

from routewright.encoders import (
    TextEncoder,
    TfidfEncoder,
    find_weights,
    load_encoder,
    load_tokenizer,
    longest_input,
    make_encoder,
    surface_numbers,
    weights_identity,
)
from routewright.errors import MissingSetup, UserError

TEXTS = [f"what is {i} plus {i * 3} when the {word} weighs {i % 7}.5 kilograms?" for i in range(60)
         for word in ("apple", "stone")]


def word_level_tokenizer(folder, config):
    """A custom tokenizer saved beside a config of another family: the case the stock loader gets wrong."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = "[UNK] [PAD] What is 2 + ? the a b c d e f g h i j k".split()
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(folder)
    config.save_pretrained(folder)
    return tokenizer


# ---------------------------------------------------------------- loading

@pytest.mark.parametrize("name", ["microsoft/deberta-v3-base", "no-such/model", "/no/such/folder", "a/b/c", "one-word",
                                  "./here"])
def test_missing_weights_are_said_within_seconds(name):
    start = time.perf_counter()
    with pytest.raises(MissingSetup) as error:
        load_tokenizer(name)
    assert time.perf_counter() - start < 5
    assert name in str(error.value)
    if name[0] not in "./" and name.count("/") < 2:
        assert f"hf download {name}" in str(error.value)


def test_a_custom_tokenizer_is_not_replaced_by_its_neighbour_config(tmp_path):
    from transformers import AutoTokenizer, Qwen2Config

    truth = word_level_tokenizer(tmp_path, Qwen2Config())
    probe = "What is 2 + 2?"
    assert AutoTokenizer.from_pretrained(tmp_path)(probe)["input_ids"] != truth.encode(probe).ids  # the trap is real
    loaded = load_tokenizer(tmp_path)
    assert loaded(probe)["input_ids"] == truth.encode(probe).ids
    assert loaded.pad_token == "[PAD]" and loaded.unk_token == "[UNK]"


def test_a_blank_tokenizer_is_refused(tmp_path):
    from transformers import Qwen2Config

    word_level_tokenizer(tmp_path, Qwen2Config())
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(MissingSetup, match="tokenizer is blank .* vocabulary file"):
        load_tokenizer(tmp_path)


def test_a_vocabulary_of_other_words_is_refused_by_its_probe(tmp_path):
    from transformers import LlamaConfig

    word_level_tokenizer(tmp_path, LlamaConfig())
    assert len(load_tokenizer(tmp_path)) == 19
    with pytest.raises(MissingSetup, match="100% of the probe"):
        load_tokenizer(tmp_path, probe="zebra crossing")


def test_a_torn_tokenizer_file_is_named(tmp_path):
    from transformers import LlamaConfig

    word_level_tokenizer(tmp_path, LlamaConfig())
    path = tmp_path / "tokenizer.json"
    path.write_text(path.read_text()[:100])
    with pytest.raises(MissingSetup, match="tokenizer.json: not readable"):
        load_tokenizer(tmp_path)


def test_a_folder_with_only_a_sentencepiece_vocabulary(tmp_path):
    """What microsoft/deberta-v3-base ships: spm.model, and no tokenizer.json."""
    import sentencepiece
    from transformers import DebertaV2Config

    (tmp_path / "text").write_text("\n".join(TEXTS * 3))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "spm"), vocab_size=80, hard_vocab_limit=False,
        pad_id=0, bos_id=1, eos_id=2, unk_id=3, pad_piece="[PAD]", bos_piece="[CLS]", eos_piece="[SEP]",
        unk_piece="[UNK]", minloglevel=2)
    DebertaV2Config(vocab_size=128).save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false, "vocab_type": "spm"}')
    tokenizer = load_tokenizer(tmp_path, probe=TEXTS[0])
    truth = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spm.model"))
    assert tokenizer(TEXTS[0], add_special_tokens=False)["input_ids"] == truth.encode(TEXTS[0])
    (tmp_path / "spm.model").unlink()
    with pytest.raises(MissingSetup, match="tokenizer (is blank|does not load)"):
        load_tokenizer(tmp_path)


def test_a_standard_tokenizer_stays_what_it_is():
    tokenizer = load_tokenizer(minilm_folder())
    assert type(tokenizer).__name__.startswith("Bert") and tokenizer.pad_token == "[PAD]" and len(tokenizer) == 30522


def test_an_encoder_with_missing_weights_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = minilm_folder()
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        (tmp_path / file).write_bytes((folder / file).read_bytes())
    with pytest.raises(MissingSetup, match="weights do not load"):
        load_encoder(tmp_path)
    weights = load_file(folder / "model.safetensors")
    gone = next(key for key in sorted(weights) if "layer.2" in key)
    save_file({key: value for key, value in weights.items() if key != gone}, tmp_path / "model.safetensors",
              metadata={"format": "pt"})
    with pytest.raises(MissingSetup, match="weights are missing from the file"):
        load_encoder(tmp_path)


def test_identity_changes_with_the_weights(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(bytes(5 << 20))
    first = weights_identity(tmp_path)
    assert first == weights_identity(tmp_path) and len(first) == 16
    (tmp_path / "model.safetensors").write_bytes(bytes((5 << 20) - 1) + b"\1")
    assert weights_identity(tmp_path) != first


# ---------------------------------------------------------------- tfidf

def test_tfidf_is_rebuilt_exactly_from_plain_files(tmp_path):
    for options in ({}, {"dimensions": 0, "features": 200}, {"characters": False}, {"surface": False}):
        folder = tmp_path / "-".join(map(str, options.values() or "d"))
        encoder = TfidfEncoder(**options).fit(TEXTS)
        before = encoder.encode(TEXTS[:20] + ["words never seen before", ""])
        encoder.save(folder)
        assert {p.suffix for p in folder.iterdir()} == {".json", ".safetensors"}
        after = TfidfEncoder(**options).load(folder).encode(TEXTS[:20] + ["words never seen before", ""])
        assert np.abs(before - after).max() < 1e-6 and before.dtype == np.float32


def test_tfidf_text_vectors_have_unit_length_and_digits_count():
    encoder = TfidfEncoder(surface=False).fit(TEXTS)
    assert np.allclose(np.linalg.norm(encoder.encode(TEXTS), axis=1), 1, atol=1e-5)
    assert "7" in encoder._parts[0].vocabulary_


def test_tfidf_learns_from_train_texts_only():
    encoder = TfidfEncoder(dimensions=16).fit(TEXTS)
    alone = encoder.encode(TEXTS[:1])
    encoder.encode(["something else entirely"] * 50)
    assert np.allclose(alone, encoder.encode(TEXTS[:1]), atol=1e-6)


@pytest.mark.parametrize("texts", [["a"], ["", ""], ["one", "two"], ["!!!", "???"]])
def test_tfidf_of_next_to_nothing(texts):
    try:
        vectors = TfidfEncoder().fit(texts).encode([*texts, "new"])
    except UserError as error:
        assert "no words" in str(error)
    else:
        assert np.isfinite(vectors).all() and len(vectors) == len(texts) + 1


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(max_size=60), min_size=1, max_size=5))
def test_surface_numbers_are_finite_for_any_text(texts):
    rows = surface_numbers(texts)
    assert rows.shape == (len(texts), 10) and np.isfinite(rows).all() and (rows >= 0).all()


def test_surface_numbers_read_numbers():
    few, many = surface_numbers(["add 3 apples", "add 3 to 1,200 and 45.5, then 7"])
    assert many[3] > few[3] and many[4] == 4 and few[4] == 1


# ---------------------------------------------------------------- sentence vectors

@pytest.fixture(scope="module")
def minilm():
    return minilm_folder()


def test_vectors_agree_with_sentence_transformers(minilm):
    from sentence_transformers import SentenceTransformer

    texts = ["short", "a rather longer sentence about rivers and stones " * 40, "What is 2 + 2?", "", "naïve café"]
    ours = TextEncoder(str(minilm), cache=False).encode(texts)
    theirs = SentenceTransformer(str(minilm), local_files_only=True).encode(texts, normalize_embeddings=True)
    assert np.abs(ours - theirs).max() < 1e-5
    assert np.isfinite(TextEncoder(str(minilm), cache=False).encode(["half a pair \ud800", "\x00"])).all()


def test_the_cache_gives_the_same_vectors_and_remembers_what_they_cost(minilm, tmp_path):
    texts = ["a river", "two stones and a window", "a river"]
    first = TextEncoder(str(minilm), cache=tmp_path)
    vectors = first.encode(texts)
    assert (vectors[0] == vectors[2]).all() and len(list(tmp_path.glob("*.npz"))) == 1
    second = TextEncoder(str(minilm), cache=tmp_path)
    again = second.encode(texts[::-1])
    assert (again == vectors[::-1]).all()
    assert second.seconds_per_text > 2 * second.spent_per_text  # a cached vector still reports its price
    third = TextEncoder(str(minilm), cache=tmp_path)
    third.encode(["a new text"])
    assert len(TextEncoder(str(minilm), cache=tmp_path)._cache._rows) == 3


def test_a_damaged_cache_is_built_anew(minilm, tmp_path, caplog):
    TextEncoder(str(minilm), cache=tmp_path).encode(["a river"])
    file = next(tmp_path.glob("*.npz"))
    for damage in (file.read_bytes()[:50], b""):
        file.write_bytes(damage)
        assert TextEncoder(str(minilm), cache=tmp_path).encode(["a river"]).shape == (1, 384)
        assert "damaged" in caplog.text
        caplog.clear()


def test_another_length_limit_is_another_identity(minilm):
    text = ["word " * 300]
    full, cut = (TextEncoder(str(minilm), cache=False, max_length=n) for n in (None, 16))
    assert full.identity != cut.identity
    assert np.abs(full.encode(text) - cut.encode(text)).max() > 1e-3


def test_plain_encoder_folders_are_mean_pooled(tmp_path):
    """A folder without modules.json, here a tiny DeBERTa: padding must not leak into the mean."""
    import torch
    from transformers import DebertaV2Model

    from routewright.tiny_deberta import build_tiny

    model, tokenizer = build_tiny(TEXTS, 2)
    tokenizer.save_pretrained(tmp_path)
    DebertaV2Model.save_pretrained(model.deberta, tmp_path)
    texts = ["what is 3 plus 9", TEXTS[0] * 3]
    together = TextEncoder(str(tmp_path), cache=False).encode(texts)
    network, loaded = load_encoder(tmp_path)
    assert longest_input(network, loaded) >= 512
    with torch.inference_mode():
        hidden = network(**loaded(texts[0], return_tensors="pt")).last_hidden_state[0].mean(0).numpy()
    assert np.abs(together[0] - hidden / np.linalg.norm(hidden)).max() < 1e-5


def test_other_chains_fall_back_to_sentence_transformers(minilm, tmp_path):
    for path in minilm.rglob("*"):
        if path.is_file() and path.suffix in (".json", ".txt", ".safetensors"):
            target = tmp_path / path.relative_to(minilm)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(path)
    pooling = tmp_path / "1_Pooling" / "config.json"
    modes = json.loads(pooling.read_text())
    pooling.unlink()
    pooling.write_text(json.dumps(modes | {"pooling_mode_mean_tokens": False, "pooling_mode_max_tokens": True}))
    vectors = TextEncoder(str(tmp_path), cache=False).encode(["a river", "a stone"])
    assert vectors.shape == (2, 384) and np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_make_encoder_names_wrong_options(minilm):
    with pytest.raises(UserError, match=r"no option 'max_len' \(did you mean 'max_length'\?\)"):
        make_encoder({"name": str(minilm), "max_len": 3})
    assert make_encoder("tfidf").name == "tfidf" and find_weights(minilm) == minilm
