"""The memory arithmetic of tests/benchmarks/bench_llm_gpu.py: hand-worked figures, and real tensors on a CPU."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))
import bench_llm_gpu as bench  # noqa: E402

SMALL = bench.Shape(hidden=256, layers=2, heads=4, kv_heads=2, intermediate=1024, vocab=1024)


def test_shapes_have_the_published_parameter_counts():
    assert bench.QWEN_1_5B.parameters == 1_543_714_304
    assert bench.QWEN_0_5B.parameters == 494_032_768
    # By hand: q and o 1536 x 1536, k and v 1536 x 256, three of 1536 x 8960; 28 blocks.
    assert bench.QWEN_1_5B.linear_parameters == 28 * (2 * 1536 * 1536 + 2 * 1536 * 256 + 3 * 1536 * 8960)
    assert bench.QWEN_1_5B.lora_parameters() == 28 * 16 * (2 * 3072 + 2 * 1792 + 3 * 10_496) == 18_464_768


def test_the_budget_of_the_8_gb_card_worked_by_hand():
    shape, gb = bench.QWEN_1_5B, 1e9
    assert bench.nf4_bytes(shape.linear_parameters) / gb == pytest.approx(.68, abs=.005)
    assert 2 * shape.embedding_parameters / gb == pytest.approx(.47, abs=.005)
    assert bench.adapter_bytes(shape.lora_parameters(), 32) / gb == pytest.approx(.30, abs=.005)
    assert bench.static_bytes(shape) / gb == pytest.approx(1.44, abs=.005)
    logits = bench.logit_bytes(shape, 8192)
    assert [round(logits[k] / gb, 1) for k in ("bf16", "fp32", "gradient")] == [2.5, 5.0, 2.5]
    answers = bench.logit_bytes(shape, 8192 * bench.ANSWER_TOKENS // (bench.PROMPT_TOKENS + bench.ANSWER_TOKENS))
    parts = (answers["fp32"], bench.checkpoint_bytes(shape, 8192), bench.plain_layer_bytes(shape, 8192))
    assert [p / gb for p in parts] == pytest.approx([.13, .70, .74], abs=.006)
    assert (bench.static_bytes(shape) + sum(parts)) / gb == pytest.approx(3.0, abs=.02)
    # LoRA's own values and the gradients come on top of that sum; the bar still holds at every length shown.
    assert bench.budget(shape, 1024)["step"] / gb == pytest.approx(1.7, abs=.05)
    assert 3.0 < bench.budget(shape, 8192)["step"] / gb < 5
    assert all(bench.budget(shape, length)["peak"] / gb < bench.BAR_GB for length in bench.LENGTHS)
    assert bench.budget(shape, 8192)["step"] + sum(logits.values()) > 8 * gb, "full logits must not fit"


def test_flops_worked_by_hand():
    assert bench.dpo_flops(bench.QWEN_1_5B, True) == pytest.approx(7.86e9, rel=1e-3)
    assert bench.sft_flops(bench.QWEN_0_5B, False) == pytest.approx(2.96e9, rel=2e-3)
    assert bench.sft_flops(bench.QWEN_0_5B, True) == pytest.approx(2.15e9, rel=2e-3)
    assert bench.deberta_flops(88, 2816) == pytest.approx(.59e9, rel=.01)
    assert bench.deberta_flops(512, 16_384) == pytest.approx(.63e9, rel=.01)


def test_without_a_gpu_it_says_that_nothing_was_measured():
    done = subprocess.run([sys.executable, str(ROOT / "tests/benchmarks/bench_llm_gpu.py"), "--max_length", "3000"],
                          capture_output=True, text=True, env={"PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr
    assert "nothing was measured" in done.stdout and "\n  3000 " in done.stdout


@pytest.mark.parametrize("words", [
    "--steps 0", "--steps many", "--max_length 0", "--max_length -5", "--max_length 99999", "--batch_size 0",
    "--cap_gb 0", "--cap_gb nan", "--cases nope", "--json nowhere/figures.json"])
def test_wrong_arguments_stop_in_a_sentence_before_anything_is_built(words, capsys):
    with pytest.raises(SystemExit) as ended:
        bench.read_options(words.split())
    said = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 2 and f"error: {'argument ' * ('json' not in words)}{words.split()[0]}" in said


def test_a_card_too_small_for_one_case_goes_on_to_the_next(monkeypatch, capsys, tmp_path):
    from routewright.errors import PartialRun

    def measure(case, options):
        if case != "sft":
            raise PartialRun("out of memory at step 0")
        return {"case": case, "max_length": 8, "batch": 1, "tokens": 8, "seconds": 1.0, "loading_s": 1, "resident": 1}

    monkeypatch.setattr(bench, "measure", measure)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for cases, code in (("deberta sft", 0), ("dpo sft", 1)):  # the bar is dpo's alone
        monkeypatch.setattr(sys, "argv", ["bench", "--cpu", "--cases", *cases.split()])
        assert bench.main() == code
        said = capsys.readouterr().out
        assert f"{cases.split()[0]:8} was not measured: out of memory" in said and "8 tokens/s" in said


def test_the_rate_is_the_named_cards_own():
    assert bench.peak_rate("NVIDIA A100-SXM4-80GB") == (312, "data sheet")
    assert bench.peak_rate("NVIDIA L40S")[0] == 362 and bench.peak_rate("NVIDIA L4")[0] == 121
    assert bench.peak_rate("NVIDIA GeForce RTX 4060 Laptop GPU")[0] == 30
    assert bench.known_rate("NVIDIA RTX A1000 Laptop GPU") == 0  # no A100


@pytest.fixture(scope="module")
def four_bit(tmp_path_factory):
    """A model of the small shape as the profile trains it: NF4, LoRA on all linear layers, checkpointed."""
    from routewright.language_models import add_lora, load_causal

    folder = bench.write_decoder(SMALL, tmp_path_factory.mktemp("small"))
    model, _ = load_causal(folder, four_bit=True, dtype="bf16")
    model = add_lora(model, seed=0).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    return model


def test_nf4_bytes_are_those_of_a_quantised_model(four_bit):
    found = trained = count = 0
    for name, parameter in four_bit.named_parameters():
        if type(parameter).__name__ == "Params4bit":
            state = parameter.quant_state
            scales = (state.absmax, state.state2.absmax)
            found += parameter.numel() * parameter.element_size() + sum(s.numel() * s.element_size() for s in scales)
            count += state.shape.numel()
        elif parameter.requires_grad:
            assert parameter.element_size() == 4, name
            trained += parameter.numel()
    assert count == SMALL.linear_parameters and trained == SMALL.lora_parameters()
    assert found == pytest.approx(bench.nf4_bytes(count), rel=1e-3)
    embedding = four_bit.get_input_embeddings().weight
    assert embedding.numel() * embedding.element_size() == 2 * SMALL.embedding_parameters


def peak_of(work):
    """The highest sum of torch's allocations while `work` runs, in bytes."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    now = peak = 0
    for event in seen.profiler.kineto_results.events():
        now += event.nbytes() if event.name() == "[memory]" else 0
        peak = max(peak, now)
    return peak


def test_the_working_set_of_a_step_is_what_the_formulae_say(four_bit):
    """Torch's record of every allocation of a forward and backward pass: its highest sum beside the formulae."""
    import torch

    tokens = 512
    ids = torch.randint(0, 1000, (1, tokens))

    def step():
        logits = four_bit(input_ids=ids, use_cache=False, logits_to_keep=4).logits
        logits.float().logsumexp(-1).sum().backward()
        four_bit.zero_grad()

    step()
    peak = peak_of(step)
    expected = (bench.checkpoint_bytes(SMALL, tokens) + bench.layer_bytes(SMALL, tokens, mask_bytes=4)
                + 4 * SMALL.lora_parameters())  # the gradients of the adapters
    assert .85 * expected < peak < 1.05 * expected
    # The parts that LoRA adds are no rounding error: without them the formula would promise half of it.
    assert peak > 1.5 * (bench.checkpoint_bytes(SMALL, tokens) + bench.plain_layer_bytes(SMALL, tokens))


def test_reading_decisions_takes_what_the_formula_says(four_bit):
    from routewright.language_models import label_logits

    rows = np.random.default_rng(0).integers(5, 600, (4, 256)).tolist()  # unlike from the first token on
    label_logits(four_bit, rows, [1, 2])
    peak = peak_of(lambda: label_logits(four_bit, rows, [1, 2]))
    assert peak == pytest.approx(bench.forward_bytes(SMALL, 4 * 256), rel=.03)


@pytest.mark.slow
def test_every_case_runs_and_counts_the_tokens_it_was_asked_for(tmp_path):
    options = argparse.Namespace(steps=2, max_length=64, batch_size=2, cap_gb=8)
    small = bench.Shape(64, 2, 4, 2, 128, 1024)
    encoder = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64,
               "vocab_size": 2000}
    for case, shape, tokens in (("dpo", small, 64), ("sft", small, 128), ("deberta", encoder, 128)):
        found = bench.measure(case, options, shape)
        assert tokens - 2 <= found["tokens"] <= tokens and found["seconds"] > 0, case
        assert "tokens/s" in bench.report(found, 0.0)
