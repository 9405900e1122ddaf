"""Hidden states of a base model: what they are, that padding leaves no trace, and the cache that survives a kill."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from planted import make_table

from routewright import hidden_states
from routewright.errors import MissingSetup, UserError
from routewright.hidden_states import StateReader, base_shape, cheap_model, encode, open_base
from routewright.pool import Pool
from routewright.schema import ModelSpec


@pytest.fixture(scope="module")
def base(root):
    return str(root / "data" / "sample" / "models" / "cheap")


@pytest.fixture(scope="module")
def texts():
    return [p.prompt for p in make_table(n=40, seed=1).prompts]


def test_states_are_the_means_over_the_prompts_tokens(base, texts):
    import torch

    reader = StateReader(base, cache=False)
    states = reader.read(texts[:5])
    model, tokenizer = reader.open()
    assert states.shape == (5, *base_shape(Path(base))) == (5, 3, 64) and states.dtype == np.float32
    for text, state in zip(texts, states, strict=False):
        batch = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            hidden = model(**batch, output_hidden_states=True).hidden_states
        wanted = torch.stack([layer[0].mean(0) for layer in hidden]).numpy()
        assert np.abs(state - wanted).max() < 1e-5


def test_other_architectures_give_the_same_kind_of_states(base, texts, tmp_path):
    """GPT-2 names its layers otherwise, and its config too."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from routewright.encoders import load_tokenizer
    from routewright.samplepool import save_model

    tokenizer = load_tokenizer(base)
    torch.manual_seed(0)
    save_model(GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=256)),
               tokenizer, tmp_path)
    reader = StateReader(str(tmp_path), cache=False)
    states = reader.read(texts[:3])
    model, _ = reader.open()
    assert states.shape == (3, *base_shape(tmp_path)) == (3, 3, 32)
    with torch.no_grad():
        hidden = model(**tokenizer(texts[0], return_tensors="pt"), output_hidden_states=True).hidden_states
    assert np.abs(states[0] - torch.stack([layer[0].mean(0) for layer in hidden]).numpy()).max() < 1e-5


@pytest.mark.parametrize("wrap", ["none", "chat"])
def test_padding_and_batches_leave_no_trace(base, texts, wrap):
    mixed = [*texts, "Why?", "word " * 150]
    together = StateReader(base, cache=False, wrap=wrap, batch_size=len(mixed)).read(mixed)
    alone = StateReader(base, cache=False, wrap=wrap, batch_size=1).read(mixed)
    assert np.abs(together - alone).max() < 1e-5
    backwards = StateReader(base, cache=False, wrap=wrap, batch_size=7).read(mixed[::-1])[::-1]
    assert np.abs(together - backwards).max() < 1e-5


def test_the_chat_wrap_is_the_models_own_and_auto_finds_it(base, texts):
    _, tokenizer = open_base(Path(base), "fp32")
    row = encode(tokenizer, ["Why?"], "chat", 100)[0]
    assert tokenizer.decode(row) == tokenizer.apply_chat_template(
        [{"role": "user", "content": "Why?"}], tokenize=False, add_generation_prompt=True)
    plain, chat, auto = (StateReader(base, cache=False, wrap=w).read(texts[:3]) for w in ("none", "chat", "auto"))
    assert np.array_equal(chat, auto) and np.abs(plain - chat).max() > 0.01


def test_long_prompts_are_cut_at_their_own_end(base):
    _, tokenizer = open_base(Path(base), "fp32")
    for wrap in ("none", "chat"):
        row = encode(tokenizer, ["Ann has 7 coins. " * 200], wrap, 60)[0]
        assert 50 <= len(row) <= 60
        whole = tokenizer.decode(row)
        assert ("Ann has 7" in whole) and (whole.endswith("<assistant>") == (wrap == "chat"))
    reader = StateReader(base, cache=False, max_length=1024)  # the base itself takes 512
    assert np.isfinite(reader.read(["Ann has 7 coins. " * 400])).all()


def test_empty_and_broken_texts_have_states(base):
    states = StateReader(base, cache=False).read(["", "\ud800 half a pair", "Why?"])
    assert np.isfinite(states).all() and np.abs(states).max() > 0
    assert StateReader(base, cache=False).read([]).shape[0] == 0


# ---------------------------------------------------------------- the cache

def test_states_are_read_once_and_keep_what_they_cost(base, texts, tmp_path):
    first = StateReader(base, cache=tmp_path, batch_size=8)
    states = first.read(texts)
    assert first.fresh == len(texts) and first.seconds_per_text > 0
    again = StateReader(base, cache=tmp_path)
    assert np.array_equal(again.read(texts[::-1]), states[::-1]) and again.fresh == 0
    assert again.seconds_per_text > 2 * again.spent_per_text or again.seconds_per_text > 1e-4
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1  # batches are merged when a reading is complete
    other = StateReader(base, cache=tmp_path, wrap="chat")
    other.read(texts[:2])
    assert other.fresh == 2  # another wrap is another reading


def test_equal_texts_are_read_once(base, tmp_path):
    reader = StateReader(base, cache=tmp_path)
    states = reader.read(["Why?", "What?", "Why?"])
    assert reader.fresh == 2 and np.array_equal(states[0], states[2])


def test_a_stopped_reading_loses_one_batch(base, texts, tmp_path, monkeypatch):
    whole = StateReader(base, cache=False).read(texts)
    calls = []

    def stop_at_the_third(self, *args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, *args)

    original = StateReader._compute
    monkeypatch.setattr(StateReader, "_compute", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        StateReader(base, cache=tmp_path, batch_size=8).read(texts)
    monkeypatch.setattr(StateReader, "_compute", original)
    again = StateReader(base, cache=tmp_path, batch_size=8)
    assert np.abs(again.read(texts) - whole).max() < 1e-5
    assert again.fresh == len(texts) - 16


@pytest.mark.parametrize("damage", ["torn", "empty", "gone"])
def test_a_damaged_block_is_read_anew(base, texts, tmp_path, damage, caplog):
    states = StateReader(base, cache=tmp_path).read(texts)
    block = next(tmp_path.rglob("*.safetensors"))
    data = block.read_bytes()
    block.unlink() if damage == "gone" else block.write_bytes(data[:len(data) // 2] if damage == "torn" else b"")
    again = StateReader(base, cache=tmp_path)
    assert np.abs(again.read(texts) - states).max() < 1e-5 and again.fresh == len(texts)
    assert ("is damaged" in caplog.text) == (damage != "gone")


def test_a_block_that_another_process_merged_away_is_found_again(base, texts, tmp_path):
    for folder, part in (("a", texts[:10]), ("b", texts[10:20])):
        StateReader(base, cache=tmp_path / folder).read(part)
    block = next((tmp_path / "b").rglob("*.safetensors"))
    shutil.copy(block, next((tmp_path / "a").iterdir()))
    behind = StateReader(base, cache=tmp_path / "a")  # knows two blocks
    other = StateReader(base, cache=tmp_path / "a")
    other.read(texts[20:25])
    assert len(list((tmp_path / "a").rglob("*.safetensors"))) == 1
    assert np.array_equal(behind.read(texts[:20]), other.read(texts[:20])) and behind.fresh == other.fresh == 0


def test_other_weights_are_another_reading(base, texts, tmp_path):
    from safetensors.numpy import load_file, save_file

    copy = tmp_path / "copy"
    shutil.copytree(base, copy)
    reader = StateReader(str(copy), cache=tmp_path / "cache")
    before = reader.read(texts[:2])
    weights = load_file(copy / "model.safetensors")
    name = sorted(weights)[0]
    save_file({**weights, name: weights[name] * np.float16(1.5)}, copy / "model.safetensors", metadata={"format": "pt"})
    hidden_states._OPEN.clear()
    changed = StateReader(str(copy), cache=tmp_path / "cache")
    assert np.abs(changed.read(texts[:2]) - before).max() > 1e-3 and changed.fresh == 2


def test_another_chat_template_is_another_reading(base, texts, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(base, copy)
    template = copy / "chat_template.jinja"
    assert template.is_file()
    for wrap, fresh in (("chat", 2), ("none", 0)):
        StateReader(str(copy), cache=tmp_path / "cache", wrap=wrap).read(texts[:2])
        before = template.read_text()
        template.write_text("{{ 'Answer: ' }}" + before)
        hidden_states._OPEN.clear()
        changed = StateReader(str(copy), cache=tmp_path / "cache", wrap=wrap)
        changed.read(texts[:2])
        assert changed.fresh == fresh
        template.write_text(before)


def test_an_adapter_over_changed_weights_is_another_reading(base, texts, tmp_path):
    from routewright.language_models import add_lora, load_causal

    copy = tmp_path / "copy"
    shutil.copytree(base, copy)
    add_lora(load_causal(copy)[0], r=2).save_pretrained(tmp_path / "adapter")
    first = StateReader(str(tmp_path / "adapter"), cache=tmp_path / "cache")
    states = first.read(texts[:2])
    shutil.copytree(base.replace("cheap", "mid"), copy, dirs_exist_ok=True)
    assert StateReader(str(tmp_path / "adapter"), cache=tmp_path / "cache").weights != first.weights
    assert np.abs(states - StateReader(str(base), cache=False).read(texts[:2])).max() < 1e-4  # a fresh adapter is none


def test_memory_holds_batches_not_all_tokens(base):
    """(N, T, L, D) of these prompts would be 37 MB of float32; what is kept of them is 0.3 MB."""
    import tracemalloc

    texts = [f"Ann has {i} coins and finds {i} more. " * 10 for i in range(400)]
    reader = StateReader(base, cache=False, batch_size=8)
    reader.read(texts[:8])
    tracemalloc.start()
    reader.read(texts)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8e6


def test_a_damaged_base_is_named(base, texts, tmp_path, monkeypatch):
    monkeypatch.setattr(StateReader, "_compute", lambda self, m, t, texts, rows: np.full((len(rows), 3, 64), np.nan))
    with pytest.raises(UserError, match="no numbers"):
        StateReader(base, cache=tmp_path).read(texts)


# ---------------------------------------------------------------- finding the base

def test_the_cheap_model_is_the_pools_cheapest(root, tmp_path):
    name, path = cheap_model(Pool.load(root / "data" / "sample" / "pool.yaml"))
    assert name == "cheap" and Path(path).name == "cheap" and (Path(path) / "config.json").is_file()
    hub = Pool("p", (ModelSpec("a", 2, 2, path="some/hub-id"), ModelSpec("b", 1, 1, path="other/hub-id")))
    assert cheap_model(hub) == ("b", "other/hub-id")
    with pytest.raises(UserError, match="'b', the cheapest model, has no `path`"):
        cheap_model(Pool("p", (ModelSpec("a", 2, 2, path="x"), ModelSpec("b", 1, 1))))


def test_a_base_that_is_none_is_named(tmp_path):
    with pytest.raises(MissingSetup, match="hf download no-such/model"):
        StateReader("no-such/model", cache=False)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(MissingSetup, match="num_hidden_layers"):
        base_shape(tmp_path)


def test_a_base_without_chat_template_refuses_the_chat_wrap(base, tmp_path):
    copy = tmp_path / "plain"
    shutil.copytree(base, copy, ignore=shutil.ignore_patterns("chat_template.jinja"))
    with pytest.raises(UserError, match="chat template"):
        StateReader(str(copy), cache=False, wrap="chat").read(["Why?"])
    assert StateReader(str(copy), cache=False, wrap="auto").wrap == "none"
