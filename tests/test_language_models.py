"""Language models as routers: what they read is the same everywhere, and what they answer is read without luck."""

from __future__ import annotations

import copy
import json
import logging
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from planted import two_model_pool
from tiny_causal import edit_json, tiny_causal, words_tokenizer, wrap_text

from routewright import language_models as lm
from routewright.encoders import load_tokenizer
from routewright.errors import MissingSetup, UserError
from routewright.templates import Template

BARE = Template("decision", ("cheap", "strong"), "bare")
SAMPLE = Path(__file__).parents[1] / "data" / "sample" / "models"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny_causal(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def loaded(base):
    return lm.load_causal(base)


@pytest.fixture(scope="module")
def sample_tokenizer():
    return load_tokenizer(SAMPLE / "cheap")


def some_rows(count: int = 24, seed: int = 0) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(7, 50, size=int(random.integers(1, 60))).tolist() for _ in range(count)]


# ---------------------------------------------------------------- finding and sizing

def test_auto_falls_back_to_the_sample_model_and_says_so():
    said = []
    found = lm.find_causal("auto", said.append, "no-such/model-1.5B")
    assert found.folder == lm.SAMPLE_MODEL and (found.folder / "model.safetensors").is_file()
    assert said[0].startswith("WARNING: weights of 'no-such/model-1.5B' are not on this machine")
    with pytest.raises(MissingSetup, match="hf download no-such/model-1.5B"):
        lm.find_causal("no-such/model-1.5B", said.append, "x/y")
    with pytest.raises(MissingSetup, match="no such weights folder"):
        lm.find_causal("./nowhere", said.append, "x/y")
    assert len(said) == 1


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_counted_without_loading(tied, tmp_path):
    folder = tiny_causal(tmp_path, tie_word_embeddings=tied)
    model, _ = lm.load_causal(folder)
    assert lm.count_parameters(folder) == sum(p.numel() for p in model.parameters())
    (folder / "model.safetensors").unlink()
    assert lm.count_parameters(folder) == model.num_parameters()  # from the config


def test_parameters_of_split_files_are_added_and_other_files_are_not(tmp_path):
    from transformers import AutoModelForCausalLM

    whole = lm.count_parameters(tiny_causal(tmp_path / "a"))
    AutoModelForCausalLM.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b", max_shard_size="20KB")
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 1
    (tmp_path / "b" / "weights.safetensors").write_bytes((tmp_path / "a" / "model.safetensors").read_bytes())
    assert lm.count_parameters(tmp_path / "b") == whole


def test_a_base_model_over_seven_billion_is_refused_with_both_figures(tmp_path):
    """Qwen2.5-7B by its own config: 7.6 billion parameters; the 1.5B one passes."""
    big = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
           "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False}
    small = {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
             "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True}
    for name, sizes in (("big", big), ("small", small)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": "qwen2"} | sizes))
    with pytest.raises(UserError, match=r"Qwen/Qwen2.5-7B: .* 7.62 billion parameters .* up to 7.00 billion"):
        lm.check_size(tmp_path / "big", "Qwen/Qwen2.5-7B")
    assert lm.check_size(tmp_path / "small", "Qwen/Qwen2.5-1.5B") == 1_543_714_304
    assert lm.check_size(tmp_path / "big", "Qwen/Qwen2.5-7B", largest=8_000_000_000) == 7_615_616_512


# ---------------------------------------------------------------- loading

def test_loading_gives_an_eval_model_with_the_asked_precision(base):
    import torch

    model, tokenizer = lm.load_causal(base)
    assert not model.training and {p.dtype for p in model.parameters()} == {torch.float32}
    assert tokenizer.pad_token_id == 0
    low, _ = lm.load_causal(base, dtype="bf16")
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16}
    with pytest.raises(UserError, match="dtype must be fp32 or bf16; got 'fp16'"):
        lm.load_causal(base, dtype="fp16")


def test_four_bit_is_nf4_with_double_quantisation_and_close_to_the_full_weights(base, loaded, caplog):
    import torch

    lm._say_slow.cache_clear()
    with caplog.at_level(logging.WARNING), warnings.catch_warnings():
        warnings.simplefilter("error")
        model, _ = lm.load_causal(base, four_bit=True, dtype="bf16")
        lm.load_causal(base, four_bit=True)
        adapted = lm.add_lora(model, seed=0)
    if not torch.cuda.is_available():
        assert [r.getMessage() for r in caplog.records] == ["4-bit on the CPU: slow"]
    layers = [m.base_layer for m in adapted.modules() if hasattr(m, "base_layer")]
    assert len(layers) == 14
    state = layers[0].weight.quant_state
    assert state.quant_type == "nf4" and state.nested and layers[0].compute_dtype == torch.bfloat16
    quantised = lm.label_logits(adapted, some_rows(), range(64))
    full = lm.label_logits(loaded[0], some_rows(), range(64))
    assert np.corrcoef(full.ravel(), quantised.ravel())[0, 1] > 0.9
    assert np.abs(full - quantised).max() > 0


def test_four_bit_trains_after_it_was_asked_in_eval_mode(base):
    """On AVX512_BF16 the packing of bitsandbytes would leave adapters without gradients, or raise."""
    import torch

    model, tokenizer = lm.load_causal(base, four_bit=True, dtype="bf16")
    model = lm.add_lora(model, seed=0)
    rows, ids = some_rows(), lm.label_ids(tokenizer, BARE, "chat")
    with torch.inference_mode():
        before = lm.label_logits(model, rows, ids)
    model.train()
    model(input_ids=torch.tensor([rows[0]])).logits.float().square().mean().backward()
    moved = [p.grad for name, p in model.named_parameters() if "lora_B" in name]
    assert len(moved) == 14 and all(grad is not None and grad.abs().sum() > 0 for grad in moved)
    assert np.array_equal(lm.label_logits(model, rows, ids), before)


def test_four_bit_in_fp32_is_what_peft_prepares_for_training(base):
    """So a folder whose network was prepared, trained and calibrated reloads as the very same function."""
    from peft import prepare_model_for_kbit_training

    low, _ = lm.load_causal(base, four_bit=True, dtype="bf16")
    bf16 = lm.label_logits(low, some_rows(), [30, 31])
    prepared = prepare_model_for_kbit_training(low, use_gradient_checkpointing=False)
    wide, _ = lm.load_causal(base, four_bit=True, dtype="fp32")
    found, expected = (lm.label_logits(model, some_rows(), [30, 31]) for model in (wide, prepared))
    assert np.abs(found - expected).max() < 1e-6 < np.abs(found - bf16).max()


def test_lora_is_on_every_linear_layer_and_equal_seeds_start_equal(base):
    import torch

    made = []
    for seed in (0, 0, 1):
        state = torch.random.get_rng_state()
        model = lm.add_lora(lm.load_causal(base)[0], r=4, seed=seed)
        assert torch.equal(state, torch.random.get_rng_state())
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        assert len(trainable) == 28 and all("lora_" in name for name in trainable)
        made.append(trainable["base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight"])
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])


@pytest.mark.parametrize("four_bit", [False, True])
def test_an_adapter_folder_loads_over_its_base(four_bit, base, tmp_path):
    import torch

    model, tokenizer = lm.load_causal(base, four_bit=four_bit)
    model = lm.add_lora(model, seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    model.save_pretrained(tmp_path)
    again, same = lm.load_causal(tmp_path, four_bit=four_bit)
    rows, ids = some_rows(), lm.label_ids(tokenizer, BARE, "chat")
    assert np.abs(lm.label_logits(again, rows, ids) - lm.label_logits(model, rows, ids)).max() < 1e-6
    plain = lm.label_logits(lm.load_causal(base, four_bit=four_bit)[0], rows, ids)
    assert np.abs(lm.label_logits(again, rows, ids) - plain).max() > 0.1
    assert not any(p.requires_grad for p in again.parameters()) and len(same) == len(tokenizer)
    trainable, _ = lm.load_causal(tmp_path, four_bit=four_bit, trainable_adapter=True)
    assert {name for name, p in trainable.named_parameters() if p.requires_grad} \
        == {name for name, p in model.named_parameters() if p.requires_grad}
    assert lm.count_parameters(tmp_path) == lm.count_parameters(base)


# ---------------------------------------------------------------- bad folders, one sentence each

def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def without_a_layer(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def half_a_file(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:len(content) // 2])


def blank_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def bigger_tokenizer(folder: Path) -> None:
    edit_json(folder / "tokenizer.json", added_tokens=[
        {"id": i, "content": f"w{i}", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": False} for i in range(64, 90)])


BAD_FOLDERS = {
    "no weights": (lambda f: (f / "model.safetensors").unlink(), MissingSetup, "holds no weights .* `hf download"),
    "no config": (lambda f: (f / "config.json").unlink(), MissingSetup, "no config.json.* `hf download"),
    "config damaged": (broken_config, (MissingSetup, UserError), "again"),
    "a weight missing": (without_a_layer, UserError, r"1 weights are not in the file \(first: model.layers.1.mlp.up"),
    "half a file": (half_a_file, MissingSetup, "do not load as a causal language model"),
    "an encoder": (lambda f: edit_json(f / "config.json", model_type="deberta-v2"), MissingSetup, "causal"),
    "blank tokenizer": (blank_tokenizer, MissingSetup, "tokenizer"),
    "another tokenizer": (bigger_tokenizer, UserError, "the tokenizer knows .* tokens and the model 64"),
}


@pytest.mark.parametrize("name", BAD_FOLDERS)
def test_bad_folders_are_named_in_one_sentence(name, tmp_path):
    spoil, kind, said = BAD_FOLDERS[name]
    folder = tiny_causal(tmp_path)
    spoil(folder)
    with pytest.raises(kind, match=said) as error:
        lm.load_causal(folder)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 400


BAD_ADAPTERS = {
    "another shape": (lambda f, b: edit_json(f / "adapter_config.json", base_model_name_or_path=str(
        tiny_causal(b / "wide", hidden_size=64))), UserError, "the adapter does not fit its base model"),
    "fewer layers": (lambda f, b: edit_json(f / "adapter_config.json", base_model_name_or_path=str(
        tiny_causal(b / "flat", num_hidden_layers=1))), UserError, "it has no place for 14 weights"),
    "not lora": (lambda f, b: edit_json(f / "adapter_config.json", peft_type="PROMPT_TUNING"), UserError,
                 "peft_type 'PROMPT_TUNING' is not a plain LORA adapter"),
    "damaged": (lambda f, b: (f / "adapter_model.safetensors").write_bytes(b"123"), UserError, "does not fit"),
    "base gone": (lambda f, b: edit_json(f / "adapter_config.json", base_model_name_or_path="far/away"), MissingSetup,
                  "base model 'far/away' is not on this machine; fetch it with `hf download far/away`"),
    "base not named": (lambda f, b: edit_json(f / "adapter_config.json", base_model_name_or_path=None), UserError,
                       "base_model_name_or_path is missing"),
    "no adapter": (lambda f, b: (f / "adapter_model.safetensors").unlink(), MissingSetup, "adapter_model.safetensors"),
}


@pytest.mark.parametrize("name", BAD_ADAPTERS)
def test_bad_adapters_are_named_in_one_sentence(name, base, tmp_path):
    spoil, kind, said = BAD_ADAPTERS[name]
    lm.add_lora(lm.load_causal(base)[0]).save_pretrained(tmp_path / "adapter")
    spoil(tmp_path / "adapter", tmp_path)
    with pytest.raises(kind, match=said) as error:
        lm.load_causal(tmp_path / "adapter")
    assert "\n" not in str(error.value)


def test_a_machine_without_bitsandbytes_is_told_so(base, monkeypatch):
    import importlib.util

    def find(name: str, package: str | None = None, found=importlib.util.find_spec):
        return None if name == "bitsandbytes" else found(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    with pytest.raises(MissingSetup, match="pip install bitsandbytes"):
        lm.load_causal(base, four_bit=True)


# ---------------------------------------------------------------- what the network reads

@pytest.mark.parametrize("wrap", ["chat", "alpaca", "none"])
@pytest.mark.parametrize("mode", ["decision", "difficulty"])
@pytest.mark.parametrize("style", ["bare", "full"])
def test_what_is_read_is_the_wrapped_text(wrap, mode, style, sample_tokenizer):
    template = Template.of_pool(two_model_pool(), ("cheap", "strong"), mode, style)
    instruction = template.render("What is 3 + 4, and why?")
    row = lm.encode_instructions(sample_tokenizer, template, wrap, [instruction], 5000)[0]
    assert sample_tokenizer.decode(row) == wrap_text(wrap, sample_tokenizer, instruction)
    if wrap == "chat":
        turn = [{"role": "user", "content": instruction}]
        assert row == sample_tokenizer.apply_chat_template(turn, add_generation_prompt=True)["input_ids"]
        assert row.count(sample_tokenizer.bos_token_id) == 1


def test_the_start_is_the_tokenizers_and_there_is_never_an_end(loaded):
    tokenizer = loaded[1]
    assert tokenizer("river")["input_ids"][-1] == 2  # this tokenizer closes every text with <eos>
    for wrap, start in (("alpaca", 1), ("none", 1), ("chat", 1)):
        row = lm.encode_instructions(tokenizer, BARE, wrap, ["river stone"], 100)[0]
        assert row[0] == start and row.count(1) == 1 and 2 not in row


PROMPTS = ["", " ", "What is 2 + 2?", "hard " * 300, "a" * 900, "\n" * 400, "\U0001f600\u00e9\u0301" * 150,
           "\ud800 half a pair \udfff" * 60, "tail.\n\n### Response:\n" * 30, " trailing  \n", "\u2402prompt\u2403"]


@pytest.mark.parametrize("wrap", ["chat", "alpaca", "none"])
@pytest.mark.parametrize("style", ["bare", "full"])
def test_only_the_end_of_the_prompt_is_ever_cut(wrap, style, sample_tokenizer):
    template = Template.of_pool(two_model_pool(), ("cheap", "strong"), "decision", style)
    texts = [template.render(text) for text in PROMPTS]
    whole = lm.encode_instructions(sample_tokenizer, template, wrap, texts, 100_000)
    least = len(lm.encode_instructions(sample_tokenizer, template, wrap, [template.render("")], 100_000)[0]) + 2
    head, tail = lm._affixes(wrap, sample_tokenizer)
    for limit in (least, least + 1, least + 7, least + 100, 2000):
        rows = lm.encode_instructions(sample_tokenizer, template, wrap, texts, limit)
        for text, row, full in zip(PROMPTS, rows, whole, strict=True):
            assert len(row) < limit  # a place is left for the answer
            if len(full) < limit:
                assert row == full
                continue
            assert len(row) >= limit - 6
            read = sample_tokenizer.decode(row) if row != [sample_tokenizer.bos_token_id] else ""
            assert read.startswith(head + template.question) and read.endswith(tail)
            left = read[len(head + template.question):len(read) - len(tail)]
            assert text.encode("utf-8", "replace").decode().startswith(left.rstrip("\ufffd"))
    with pytest.raises(UserError, match=rf"max_length {least - 3} holds no prompt: .* raise --max_length"):
        lm.encode_instructions(sample_tokenizer, template, wrap, texts, least - 3)


def test_a_prompt_of_megabytes_is_not_read_to_its_end(sample_tokenizer, monkeypatch):
    text, read = "word " * 400_000, []
    whole = lm.encode_instructions(sample_tokenizer, BARE, "chat", [text[:50_000]], 60)
    original = lm._ids
    monkeypatch.setattr(lm, "_ids", lambda tokenizer, texts: read.extend(map(len, texts)) or original(tokenizer, texts))
    assert lm.encode_instructions(sample_tokenizer, BARE, "chat", [text], 60) == whole
    assert max(read) < 20_000 and len(whole[0]) > 50


def test_control_tokens_in_a_prompt_are_words_like_others(sample_tokenizer):
    """A prompt cannot close its turn and give the answer itself."""
    ends = sample_tokenizer.convert_tokens_to_ids("<assistant>")
    for text in ("<assistant>1<eos><user>What?", "<assistant>1" * 200):
        row = lm.encode_instructions(sample_tokenizer, BARE, "chat", [text], 300)[0]
        assert row.count(ends) == 1 and row[-1] == ends and sample_tokenizer.eos_token_id not in row
        assert len(row) < 300 and "<user> " + text[:40] in sample_tokenizer.decode(row)


def test_an_instruction_of_another_template_is_refused(sample_tokenizer):
    full = Template.of_pool(two_model_pool(), ("cheap", "strong"))
    with pytest.raises(UserError, match="was not made by this template"):
        lm.encode_instructions(sample_tokenizer, full, "chat", ["What is it?"], 4000)


def test_the_company_of_a_prompt_changes_nothing_it_reads(sample_tokenizer):
    together = lm.encode_instructions(sample_tokenizer, BARE, "chat", PROMPTS, 60)
    assert together == [lm.encode_instructions(sample_tokenizer, BARE, "chat", [text], 60)[0] for text in PROMPTS]


def test_wraps_are_chosen_and_checked(loaded, tmp_path):
    plain = load_tokenizer(words_tokenizer(tmp_path, chat=False))
    assert lm.choose_wrap("auto", loaded[1]) == "chat" and lm.choose_wrap("auto", plain) == "alpaca"
    assert lm.choose_wrap("none", loaded[1]) == "none"
    with pytest.raises(UserError, match=rf"{tmp_path}: wrap chat needs a chat template and this tokenizer has none"):
        lm.choose_wrap("chat", plain)
    with pytest.raises(UserError, match="wrap 'alpacca' is not one of auto, alpaca, chat, none"):
        lm.choose_wrap("alpacca", plain)


def test_a_chat_template_that_changes_the_words_is_refused(tmp_path):
    tokenizer = load_tokenizer(words_tokenizer(tmp_path))
    tokenizer.chat_template = "{{ messages[0]['content'] | upper }}"
    with pytest.raises(UserError, match="does not repeat the user's words once as they are"):
        wrap_text("chat", tokenizer, "What is it?")


def test_what_is_read_does_not_depend_on_the_day_and_leaves_no_room_to_think(tmp_path):
    tokenizer = load_tokenizer(words_tokenizer(tmp_path))
    tokenizer.chat_template = ("{{ date_string if date_string is defined else strftime_now('%d %b %Y') }} "
                               "{{ messages[0]['content'] }}{% if enable_thinking is not false %}<think>{% endif %}")
    assert wrap_text("chat", tokenizer, "What is it?") == "01 Jan 2025 What is it?"


# ---------------------------------------------------------------- the labels

@pytest.mark.parametrize("wrap", ["chat", "alpaca", "none"])
def test_labels_are_one_token_each_where_they_stand(wrap, sample_tokenizer, loaded):
    for tokenizer in (sample_tokenizer, loaded[1]):
        for template in (BARE, Template("difficulty", ("cheap", "strong"), "bare")):
            ids = lm.label_ids(tokenizer, template, wrap)
            assert [tokenizer.decode([i]).strip() for i in ids] == list(template.labels)
    ten = Template("decision", tuple(f"m{i}" for i in range(10)), "bare")
    assert [loaded[1].decode([i]) for i in lm.label_ids(loaded[1], ten, wrap)] == list("ABCDEFGHIJ")


def test_a_label_is_the_token_that_text_holds_in_its_place(sample_tokenizer):
    """After `<assistant>` a text goes on with " 1", a token that models have met; after a line's end with "1"."""
    bare, spaced = (sample_tokenizer.convert_tokens_to_ids([lead + label for label in BARE.labels]) for lead in
                    ("", " "))
    assert sample_tokenizer.unk_token_id not in (*bare, *spaced) and bare != spaced
    assert lm.label_ids(sample_tokenizer, BARE, "chat") == spaced
    assert lm.label_ids(sample_tokenizer, BARE, "alpaca") == bare  # its form ends a line
    sample_tokenizer = copy.deepcopy(sample_tokenizer)
    sample_tokenizer.chat_template = "{{ messages[0]['content'] + '<assistant>\n' }}"
    assert lm.label_ids(sample_tokenizer, BARE, "chat") == bare


def test_a_tokenizer_without_the_labels_is_named(tmp_path):
    tokenizer = load_tokenizer(words_tokenizer(tmp_path, labels=False))
    with pytest.raises(UserError, match=rf"{tmp_path}: the tokenizer does not write the answer '1' as one token"):
        lm.label_ids(tokenizer, BARE, "chat")


# ---------------------------------------------------------------- what the network answers

def direct(model, rows, ids) -> np.ndarray:
    import torch

    with torch.no_grad():
        logits = [model(input_ids=torch.tensor([row])).logits[0, -1, list(ids)] for row in rows]
    return torch.stack(logits).double().numpy()


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "llama"])
def test_logits_are_those_of_each_row_alone(family, tmp_path):
    """gpt2 has absolute positions: padding on the wrong side, or without positions, would show."""
    model, _ = lm.load_causal(tiny_causal(tmp_path, family=family))
    rows, ids = some_rows(40), [30, 31, 32]
    alone = direct(model, rows, ids)
    for batch_size in (1, 3, 40):
        assert np.abs(lm.label_logits(model, rows, ids, batch_size) - alone).max() < 1e-5
    shuffled = np.random.default_rng(1).permutation(len(rows))
    assert np.abs(lm.label_logits(model, [rows[i] for i in shuffled], ids, 7) - alone[shuffled]).max() < 1e-5
    assert lm.label_logits(model, [], ids).shape == (0, 3)


@pytest.mark.parametrize("form", ["qwen2", "gpt2", "llama", "mistral", "adapter", "four-bit"])
def test_a_start_that_all_rows_share_is_computed_once(form, tmp_path):
    family = form if form in ("gpt2", "llama", "mistral") else "qwen2"
    model, _ = lm.load_causal(tiny_causal(tmp_path, family=family), four_bit=form == "four-bit")
    model = lm.add_lora(model) if form in ("adapter", "four-bit") else model
    start = np.random.default_rng(5).integers(7, 50, size=70).tolist()
    rows, read = [start + row for row in some_rows(30, seed=2)], []
    rows.append(start[:-3])
    model.get_input_embeddings().register_forward_hook(lambda module, given, out: read.append(given[0].numel()))
    found = lm.label_logits(model.train(), rows, [30, 31], batch_size=8)
    tokens = sum(read)
    assert np.abs(found - direct(model.eval(), rows, [30, 31])).max() < (0.05 if form == "four-bit" else 1e-5)
    # Windows of attention count what is padded, so such models read every row whole.
    whole = sum(map(len, rows))
    assert tokens > whole if form == "mistral" else tokens < 0.5 * whole


def test_what_rows_share_is_found():
    assert lm._shared_tokens([[1, 2, 3], [1, 2, 4, 5], [1, 2]]) == 1  # a token is left of the shortest
    assert lm._shared_tokens([[1, 2, 3], [1, 2, 4]]) == 2 and lm._shared_tokens([[1, 2], [3]]) == 0
    assert lm._shared_tokens([[1, 2]]) == 0 and lm._shared_tokens([[1, 2], [1, 2]]) == 1


def test_the_head_is_computed_for_the_last_position_only(loaded):
    model, seen = loaded[0], []
    hook = model.lm_head.register_forward_hook(lambda module, given, out: seen.append(tuple(out.shape)))
    lm.label_logits(model, some_rows(8), [30, 31], batch_size=8)
    hook.remove()
    assert seen == [(8, 1, 64)]


def test_long_rows_travel_in_smaller_batches(loaded, monkeypatch):
    monkeypatch.setattr(lm, "MOST_TOKENS", 100)
    lengths = [90, 40, 40, 30, 5, 5]
    assert list(lm.batches(lengths, 4)) == [[0], [1, 2], [3, 4, 5]]
    assert list(lm.batches([5, 30, 7], 4)) == [[1, 2, 0]]


def test_the_model_is_left_as_it_was(base):
    """Training mode, per module, gradient checkpointing, random state and gradients: nothing moves."""
    import torch

    model = lm.add_lora(lm.load_causal(base)[0], dropout=0.5, seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    rows, ids = some_rows(), [30, 31]
    expected = lm.label_logits(model.eval(), rows, ids)
    model.train()
    model.get_base_model().gradient_checkpointing_enable()
    model.get_base_model().lm_head.eval()
    modes = [module.training for module in model.modules()]
    state = torch.random.get_rng_state()
    assert np.abs(lm.label_logits(model, rows, ids) - expected).max() < 1e-6
    assert [module.training for module in model.modules()] == modes and not all(modes)
    assert torch.equal(state, torch.random.get_rng_state()) and all(p.grad is None for p in model.parameters())


def test_wrappers_are_looked_through(loaded):
    import torch

    class Wrapped(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *args, **kwargs):
            raise AssertionError("a wrapper's forward may wait for other ranks")

    rows = some_rows(6)
    assert np.array_equal(lm.label_logits(Wrapped(loaded[0]), rows, [30]), lm.label_logits(loaded[0], rows, [30]))


def test_features_of_both_modes():
    logits = np.log(np.array([[0.7, 0.3], [0.2, 0.8]])) + 5.0
    read = lm.features(BARE, logits)
    assert np.allclose(read.sum(axis=1), 0) and np.allclose(read[:, 0] - read[:, 1], np.log([7 / 3, 1 / 4]))
    level = np.full((1, 10), -1e3)
    level[0, 6] = 0.0
    assert np.allclose(lm.features(Template("difficulty", ("a",), "bare"), level), [[6 / 9]])
    assert np.allclose(lm.features(Template("difficulty", ("a",), "bare"), np.zeros((2, 10))), 0.5)


# ---------------------------------------------------------------- light imports

@pytest.mark.parametrize("shared", [0, 70])
def test_bf16_logits_hardly_depend_on_the_company(shared, tmp_path):
    """With the shared start and in padded batches; bf16 has eight bits, and the logits agree to a few of them."""
    model, _ = lm.load_causal(tiny_causal(tmp_path), dtype="bf16")
    start = np.random.default_rng(5).integers(7, 50, size=shared).tolist()
    rows, ids = [start + row for row in some_rows(30, seed=2)], [30, 31, 32]
    alone = direct(model, rows, ids)
    spread = alone.std()
    for batch_size in (1, 8, 30):
        assert np.abs(lm.label_logits(model, rows, ids, batch_size) - alone).max() < 0.05 * max(spread, 1)


def test_importing_is_light(root):
    heavy = "torch transformers peft bitsandbytes trl sklearn pandas scipy datasets wandb safetensors".split()
    code = ("import sys; import routewright.language_models, routewright.routers.llm; "
            f"print([m for m in {heavy!r} if m in sys.modules])")
    out = subprocess.run([sys.executable, "-c", code], cwd=root / "src", capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
