"""A pair as one sequence: the same log-probs, losses and metrics as TRL's own DPOTrainer, and what keeps them so."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest

from routewright import language_models, shared_prefix
from routewright.errors import UserError
from routewright.shared_prefix import LOSSES, REFERENCE, SharedPairs, answer_columns, pair_mask, read_reference

METRICS = ("loss", "rewards/margins", "rewards/accuracies", "rewards/chosen", "rewards/rejected", "logps/chosen",
           "logps/rejected", "logits/chosen", "logits/rejected", "entropy", "mean_token_accuracy", "grad_norm")


def make_rows(count=12, seed=0, longest=7, shortest=1):
    """Pairs with prompts of 3 to 40 tokens and answers of unequal length."""
    draw = np.random.default_rng(seed)
    ids = lambda low, high: draw.integers(5, 90, size=int(draw.integers(low, high + 1))).tolist()
    return [{"prompt_ids": ids(3, 40), "chosen_ids": ids(shortest, longest), "rejected_ids": ids(shortest, longest)}
            for _ in range(count)]


@pytest.fixture(scope="module")
def tokenizer():
    return language_models.load_causal(language_models.SAMPLE_MODEL)[1]


@pytest.fixture(scope="module")
def base():
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(3)
    # Weights ten times the usual spread: attention must matter, or a wrong mask would go unseen.
    return Qwen2ForCausalLM(Qwen2Config(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.2, pad_token_id=0, eos_token_id=1))


def warm(base, seed=1):
    """A copy with LoRA adapters that are past their start, as a warm start leaves them."""
    import torch

    model = language_models.add_lora(copy.deepcopy(base), r=4, alpha=8, dropout=0.0, seed=seed)
    torch.manual_seed(seed)
    for name, value in model.named_parameters():
        if "lora_B" in name:
            value.data.normal_(0, 0.05)
    return model


def settings(out, **more):
    from trl import DPOConfig

    return DPOConfig(**{
        "output_dir": str(out), "use_cpu": True, "bf16": False, "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 3, "gradient_accumulation_steps": 2, "max_steps": 6, "learning_rate": 5e-2,
        "beta": 0.3, "logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
        "max_length": 64, "seed": 5, "activation_checkpointing": False, "dataloader_pin_memory": False, **more})


def make(kind, model, out, rows, tokenizer, dev=None, **more):
    """A stock or a shared trainer on rows of token ids."""
    from datasets import Dataset
    from trl import DPOTrainer

    class Stock(DPOTrainer):
        def _prepare_dataset(self, dataset, *args):
            return dataset

    cls = Stock if kind == "stock" else shared_prefix.SharedPrefixTrainer
    return cls(model=model, args=settings(out, **more), train_dataset=Dataset.from_list(rows),
               eval_dataset=Dataset.from_list(dev) if dev else None, processing_class=tokenizer)


def stock_logps(trainer, rows):
    """(N, 2) from the library's own collator and forward pass."""
    import torch
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    batch = DataCollatorForPreference(0, 64)(rows)
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    trainer.model.eval()
    with torch.no_grad():
        found = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels,
                              fused_lm_head=True, use_cache=False).log_probs.sum(1)
    return found.view(2, -1).T.numpy()


# --- layout -----------------------------------------------------------------------------------------------------------

def test_a_pair_is_one_row_with_positions_that_begin_anew():
    batch = SharedPairs(0)([{"prompt_ids": [5, 6, 7], "chosen_ids": [8, 9], "rejected_ids": [10, 11, 12]},
                            {"prompt_ids": [5], "chosen_ids": [8], "rejected_ids": [9, 10]}])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 0, 10, 11], [0, 0, 5, 0, 0, 9, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 3, 4], [0, 0, 0, 0, 0, 1, 0]]
    assert batch["part"].tolist() == [[0, 0, 0, 1, -1, 2, 2], [-1, -1, 0, -1, -1, 2, -1]]
    assert batch["answer_ids"][:, 1:].tolist() == [[8, 9, 0], [8, 0, 0], [10, 11, 12], [9, 10, 0]]
    assert answer_columns(7, 3).tolist() == [[2, 3, 4], [2, 5, 6]]
    seen = pair_mask(batch["part"])[0, 0]
    assert seen[6].tolist() == [True, True, True, False, False, True, True]  # rejected sees the prompt and itself
    assert not seen[3, 4:].any() and seen.diagonal().all()


def test_answers_of_one_token_add_nothing_to_the_row():
    batch = SharedPairs(0)([{"prompt_ids": [5, 6, 7], "chosen_ids": [8], "rejected_ids": [9]}])
    assert batch["input_ids"].tolist() == [[5, 6, 7]] and answer_columns(3, 1).tolist() == [[2], [2]]


def test_a_long_answer_is_cut_as_the_library_cuts_it():
    batch = SharedPairs(0, max_length=5)([{"prompt_ids": [5, 6, 7], "chosen_ids": [8, 9, 10], "rejected_ids": [8]}])
    assert batch["completion_mask"].sum(1).tolist() == [2, 1]


# --- log-probs --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_log_probs_are_those_of_separate_sequences_and_an_open_mask_would_show(base, tokenizer, tmp_path, monkeypatch,
                                                                              attention):
    model = warm(base)
    model.set_attn_implementation(attention)
    rows = make_rows()
    trainer = make("shared", model, tmp_path, rows, tokenizer)
    wanted = stock_logps(trainer, rows)
    assert np.abs(trainer.pair_logps(trainer.train_dataset, 12) - wanted).max() < 1e-4
    assert wanted.min() < -30  # there is something to be wrong about

    def open_mask(part):
        import torch

        order = torch.arange(part.shape[1])
        return ((order[:, None] >= order) & (part >= 0)[:, None] | (order[:, None] == order))[:, None]

    monkeypatch.setattr(shared_prefix, "pair_mask", open_mask)
    assert np.abs(trainer.pair_logps(trainer.train_dataset, 12) - wanted).max() > 0.5
    with pytest.raises(UserError, match="does not read a pair as one sequence"):
        trainer.add_reference()


def test_the_company_a_pair_keeps_does_not_matter(base, tokenizer, tmp_path):
    trainer = make("shared", warm(base), tmp_path, make_rows(), tokenizer)
    alone, together = (trainer.pair_logps(trainer.train_dataset, size) for size in (1, 12))
    assert np.abs(alone - together).max() < 1e-4


def test_all_losses_are_the_librarys(base, tokenizer, tmp_path):
    import torch

    rows = make_rows(4)
    model = warm(base)
    stock = make("stock", copy.deepcopy(model), tmp_path / "a", rows, tokenizer)
    ours = make("shared", model, tmp_path / "b", rows, tokenizer)
    ours.add_reference()
    for trainer in (stock, ours):  # away from the reference, where losses differ
        torch.manual_seed(9)
        for name, value in sorted(trainer.model.named_parameters()):
            if "lora_B" in name and ".ref." not in name:
                value.data.add_(0.05 * torch.randn_like(value))
    batches = stock.data_collator(rows), ours.data_collator(list(ours.train_dataset))
    seen = {}
    for loss in LOSSES:
        for trainer in (stock, ours):
            trainer.loss_types, trainer.label_smoothing = [loss], 0.1
        one, two = (t._compute_loss(t.model, b, False).item() for t, b in zip((stock, ours), batches, strict=True))
        assert abs(one - two) < 1e-4 * max(1, abs(one)), loss
        seen[loss] = round(one, 3)
    assert len(set(seen.values())) >= len(LOSSES) - 1, seen


# --- training ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("more", [{}, {"activation_checkpointing": True, "loss_type": "ipo"}])
def test_a_whole_training_gives_the_stock_losses_and_metrics(base, tokenizer, tmp_path, more):
    """LoRA from a warm start, unequal lengths, accumulation, evaluations: every logged figure to 1e-4 of its size."""
    rows, dev = make_rows(16), make_rows(7, seed=1)
    history = {}
    for kind in ("stock", "shared"):
        trainer = make(kind, warm(base), tmp_path / kind, rows, tokenizer, dev, eval_strategy="steps", eval_steps=3,
                       **more)
        trainer.train()
        history[kind] = [h for h in trainer.state.log_history if "train_runtime" not in h]
    assert len(history["stock"]) == len(history["shared"]) == 8
    compared = 0
    for one, two in zip(history["stock"], history["shared"], strict=True):
        for name in [n for n in one if n.removeprefix("eval_") in METRICS]:
            if name == "rewards/accuracies" and one["step"] == 1:
                continue  # nothing but rounding stands between the answers yet
            assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-4), (name, one["step"])
            compared += 1
    assert compared > 80
    first, last = history["shared"][0], history["shared"][-2]
    assert last["loss"] < first["loss"] - 0.05 and last["rewards/margins"] > 0.1


def test_the_start_is_the_reference_and_a_second_life_reads_it(base, tokenizer, tmp_path, monkeypatch):
    rows, dev = make_rows(8), make_rows(4, seed=1)
    first = make("shared", warm(base), tmp_path, rows, tokenizer, dev, max_steps=3)
    assert list(first.model.peft_config) == ["default"]  # no second adapter is held
    first.train()
    history = first.state.log_history
    assert history[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert abs(history[0]["rewards/margins"]) < 1e-5
    trained = first.pair_logps(first.train_dataset)
    kept = np.array([first.train_dataset["ref_chosen_logps"], first.train_dataset["ref_rejected_logps"]]).T
    assert np.abs(trained - kept).max() > 0.1

    second = make("shared", warm(base), tmp_path, rows, tokenizer, dev, max_steps=3)
    with monkeypatch.context() as patch:
        patch.setattr(second, "pair_logps", lambda rows: pytest.fail("the reference was computed again"))
        second.add_reference()
    assert second.train_dataset["ref_chosen_logps"] == first.train_dataset["ref_chosen_logps"]

    # Other rows, or another start, are another reference.
    for model, train in ((warm(base), make_rows(8, seed=7)), (warm(base, seed=2), rows)):
        third = make("shared", model, tmp_path, train, tokenizer, dev)
        with pytest.raises(UserError, match="began with other pairs or other start weights"):
            third.add_reference(resuming=True)
        third.add_reference()
        assert third.train_dataset["ref_chosen_logps"] != first.train_dataset["ref_chosen_logps"]
    (tmp_path / REFERENCE).write_bytes(b"\x08torn")
    assert read_reference(tmp_path / REFERENCE) is None


def test_full_weights_train_without_a_second_model(base, tokenizer, tmp_path):
    trainer = make("shared", copy.deepcopy(base), tmp_path, make_rows(8), tokenizer, max_steps=4, learning_rate=5e-3)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    assert trainer.ref_model is None
    assert all(not p.equal(before[n]) for n, p in trainer.model.named_parameters())
    assert trainer.state.log_history[-2]["rewards/margins"] > 0


def test_text_pairs_are_prepared_as_the_library_does(base, tokenizer, tmp_path):
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16,
                                         num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1))
    rows = [{"prompt": f"{i} + 4 = ", "chosen": str(i + 4), "rejected": "7 or so"} for i in range(4)]
    from datasets import Dataset

    trainer = shared_prefix.SharedPrefixTrainer(model=model, args=settings(tmp_path, max_steps=1),
                                                train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    assert trainer.train_dataset[0]["chosen_ids"][-1] == tokenizer.eos_token_id
    assert np.abs(trainer.pair_logps(trainer.train_dataset) - stock_logps(trainer, list(trainer.train_dataset))
                  ).max() < 1e-4


# --- refusals ---------------------------------------------------------------------------------------------------------

def test_what_this_layout_cannot_serve_is_refused(base, tokenizer, tmp_path):
    rows = make_rows(4)
    for more, told in (({"loss_type": "aot"}, "loss 'aot' is not one of"), ({"loss_type": "sigmod"}, "'sigmod'"),
                       ({"sync_ref_model": True}, "no sync_ref_model"),
                       ({"truncation_mode": "keep_end"}, "keep_start")):
        with pytest.raises(UserError, match=told):
            make("shared", base, tmp_path, rows, tokenizer, **more)
    odd = copy.deepcopy(base)
    odd.config.layer_types = ["full_attention", "sliding_attention", "full_attention"]
    with pytest.raises(UserError, match="full attention only; this model has sliding_attention"):
        make("shared", odd, tmp_path, rows, tokenizer)
    odd.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UserError, match="load the model with sdpa"):
        make("shared", odd, tmp_path, rows, tokenizer)


def test_importing_stays_light():
    import subprocess
    import sys

    code = ("import sys, json, routewright.shared_prefix; "
            "print(json.dumps([m for m in ('torch', 'trl') if m in sys.modules]))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="src", check=True)
    assert json.loads(done.stdout) == []
