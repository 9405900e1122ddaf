"""Memory and speed of the training steps in the shapes of real base models, with random weights and without the hub.

    python tests/benchmarks/bench_llm_gpu.py                      # everything; without a GPU: the arithmetic
    python tests/benchmarks/bench_llm_gpu.py --cases dpo --max_length 8192 --cap_gb 8
    python tests/benchmarks/bench_llm_gpu.py --cases dpo --cpu --steps 1 --max_length 256     # a real step on a CPU

dpo      train_dpo in the rtx4060 profile: Qwen2.5-1.5B in NF4, LoRA r 16 on all linear layers, batch 1, activation
         checkpointing, prompt shared by the pair, 8-bit Adam; under a cap of 8 GB for the process
sft      train_llm: Qwen2.5-0.5B in full, bf16
deberta  train_deberta: DeBERTa-v3-base in full, bf16, batches of 32

Each case runs the script itself (its options, its trainer) on rows that fill `--max_length`, and reports the peak of
the allocator over the whole run, loading included, useful tokens a second (median step), and two utilisations: MFU
counts the arithmetic of the model itself, HFU also what activation checkpointing computes twice; both against the
dense bf16 rate of the data sheet, or of a large matmul where the GPU is not in the table. The bar: `dpo` at its default
length peaks under 7.5 GB. What the CUDA context itself takes (0.3-0.5 GB) is not in the allocator's figures.

Without a GPU nothing is measured, and the bytes of a DPO step are added up from the formulae below. On a CPU the working
set of one layer at the real width was measured (torch's own record of allocations, 256 and 512 tokens): 290,520 and
289,780 bytes a token, where the formula for a CPU says 308,096.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

BAR_GB = 7.5  # of an 8 GB card
LORA_RANK = 16
LENGTHS = (512, 1024, 2048, 4096, 8192)
ANSWER_TOKENS, PROMPT_TOKENS = 8, 300  # of the trial whose logits are 8 of 308 positions


@dataclass(frozen=True)
class Shape:
    """A decoder of the Qwen2 family as its published config.json has it; sizes in numbers, not bytes."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int

    @property
    def kv_width(self) -> int:
        return self.hidden // self.heads * self.kv_heads

    @property
    def linear_sizes(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of the linear layers of one block: q, k, v, o, gate, up, down."""
        h, i, k = self.hidden, self.intermediate, self.kv_width
        return [(h, h), (h, k), (h, k), (h, h), (h, i), (h, i), (i, h)]

    @property
    def linear_parameters(self) -> int:
        return self.layers * sum(a * b for a, b in self.linear_sizes)

    @property
    def embedding_parameters(self) -> int:
        return self.vocab * self.hidden  # tied with the head

    @property
    def parameters(self) -> int:
        """All of them: Qwen2 has biases on q, k and v, two norms a block and one at the end."""
        small = self.layers * (self.hidden + 2 * self.kv_width + 2 * self.hidden) + self.hidden
        return self.linear_parameters + self.embedding_parameters + small

    def lora_parameters(self, rank: int = LORA_RANK) -> int:
        return self.layers * sum((a + b) * rank for a, b in self.linear_sizes)


QWEN_1_5B = Shape(1536, 28, 12, 2, 8960, 151_936)
QWEN_0_5B = Shape(896, 24, 14, 2, 4864, 151_936)
# DeBERTa-v3-base: hidden 768, 12 layers, intermediate 3072, vocabulary 128,100, 2 x 256 relative positions.
DEBERTA = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
           "vocab_size": 128_100, "max_position_embeddings": 512, "position_buckets": 256, "relative_attention": True,
           "pos_att_type": ["p2c", "c2p"], "share_att_key": True, "norm_rel_ebd": "layer_norm", "type_vocab_size": 0,
           "position_biased_input": False, "layer_norm_eps": 1e-7, "max_relative_positions": -1, "pad_token_id": 0}

# Dense bf16 rates with fp32 accumulation, TFLOP/s, from NVIDIA's data sheets.
RATES = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "RTX 4090": 165, "RTX 4060": 30}


# ---- bytes -----------------------------------------------------------------------------------------------------------

def nf4_bytes(parameters: int) -> float:
    """NF4 with double quantisation: half a byte each, one 8-bit scale for 64 of them, one float for 256 scales."""
    return parameters * (1 / 2 + 1 / 64 + 4 / (64 * 256))


def adapter_bytes(parameters: int, adam_bits: int = 32) -> int:
    """LoRA weights and gradients in float32, and the two moments of Adam."""
    return parameters * (4 + 4 + 2 * adam_bits // 8)


def static_bytes(shape: Shape, adam_bits: int = 32, embedding_bytes: int = 2) -> float:
    """What lies in memory between two steps; the 0.1 MB of norms and biases are left out."""
    return (nf4_bytes(shape.linear_parameters) + embedding_bytes * shape.embedding_parameters
            + adapter_bytes(shape.lora_parameters(), adam_bits))


def checkpoint_bytes(shape: Shape, tokens: int) -> int:
    """The bf16 input of every block, which activation checkpointing keeps."""
    return 2 * shape.layers * shape.hidden * tokens


def plain_layer_bytes(shape: Shape, tokens: int) -> int:
    """bf16 values of one block kept while it is computed again: 4 of the MLP's width and 6 of the hidden width."""
    return 2 * (4 * shape.intermediate + 6 * shape.hidden) * tokens


def adapter_layer_bytes(shape: Shape, tokens: int, mask_bytes: int = 1, rank: int = LORA_RANK) -> int:
    """What LoRA adds to a block: each of the 7 inputs dropped out in float32 with its mask, and the low-rank values.

    mask_bytes: 1 on a GPU; a CPU keeps the mask in float32.
    """
    inputs = sum(a for a, _ in shape.linear_sizes)
    return ((4 + mask_bytes) * inputs + 4 * rank * len(shape.linear_sizes)) * tokens


def gradient_bytes(shape: Shape, tokens: int) -> int:
    """Gradients alive at the block's widest place, the input of `down`: in float32 through LoRA, twice in bf16."""
    return 8 * shape.intermediate * tokens


def layer_bytes(shape: Shape, tokens: int, mask_bytes: int = 1) -> int:
    """All that one block needs while it is computed again and differentiated."""
    return (plain_layer_bytes(shape, tokens) + adapter_layer_bytes(shape, tokens, mask_bytes)
            + gradient_bytes(shape, tokens))


def logit_bytes(shape: Shape, positions: int) -> dict[str, int]:
    """Logits of `positions` places: bf16, float32, and their gradient in bf16."""
    return {"bf16": 2 * shape.vocab * positions, "fp32": 4 * shape.vocab * positions,
            "gradient": 2 * shape.vocab * positions}


def mask_bytes_of(tokens: int) -> int:
    """The bf16 attention mask of a pair that shares its prompt: one number for each pair of places."""
    return 2 * tokens * tokens


def budget(shape: Shape, tokens: int, adam_bits: int = 8, answer_positions: int = ANSWER_TOKENS) -> dict[str, float]:
    """The bytes of a DPO step by part, on a GPU. `tokens`: the prompt once, and both answers."""
    logits = logit_bytes(shape, 2 * answer_positions)
    parts = {"weights": nf4_bytes(shape.linear_parameters) + 2 * shape.embedding_parameters,
             "adapter": float(adapter_bytes(shape.lora_parameters(), adam_bits)),
             "checkpoints": float(checkpoint_bytes(shape, tokens)), "one layer": float(layer_bytes(shape, tokens)),
             "mask": float(mask_bytes_of(tokens)), "answer logits": float(sum(logits.values()))}
    return {**parts, "peak": sum(parts.values())}


# ---- arithmetic ------------------------------------------------------------------------------------------------------

def dpo_flops(shape: Shape, recomputed: bool) -> float:
    """FLOP a token of a LoRA step: 2 P forward and 2 P for the gradient of the activations (the weights are frozen);
    checkpointing adds a second forward pass. Without attention and logits."""
    return (6 if recomputed else 4) * shape.linear_parameters


def sft_flops(shape: Shape, answer_only: bool) -> float:
    """FLOP a token of full training, 6 P; the head counts for every place, or (answer_only) for next to none."""
    return 6 * (shape.linear_parameters + (0 if answer_only else shape.embedding_parameters))


def deberta_flops(length: int, tokens_per_batch: int) -> float:
    """FLOP a token of a training step of DeBERTa-v3-base, with its three attention terms."""
    h, layers, span = DEBERTA["hidden_size"], DEBERTA["num_hidden_layers"], 2 * DEBERTA["position_buckets"]
    linear = 4 * h * h + 2 * h * DEBERTA["intermediate_size"]
    attention = 2 * length * h + 2 * span * h  # content by content and values; content by position, both ways
    positions = 2 * span * h * h / tokens_per_batch  # keys and queries of the positions, once a batch
    return 3 * 2 * layers * (linear + attention + positions)


def print_arithmetic(max_length: int | None) -> None:
    shape = QWEN_1_5B
    print("No GPU here: nothing was measured; this is the arithmetic of a DPO step (Qwen2.5-1.5B, NF4, LoRA r 16, "
          f"{shape.lora_parameters() / 1e6:.1f}M trained parameters, 8-bit Adam).")
    print("GB by part; a token counts once for both answers of a pair, and one layer at a time is computed again.\n")
    lengths = sorted({*LENGTHS, *([max_length] if max_length else [])})
    names = list(budget(shape, 1))
    print("tokens  " + "  ".join(f"{n:>13}" for n in names) + f"  {'full logits':>13}")
    for tokens in lengths:
        parts = budget(shape, tokens)
        full = sum(logit_bytes(shape, tokens).values())
        print(f"{tokens:6}  " + "  ".join(f"{parts[n] / 1e9:13.2f}" for n in names) + f"  {full / 1e9:13.2f}")
    longest = max(t for t in range(256, 65_537, 256) if budget(shape, t)["peak"] < BAR_GB * 1e9)
    print(f"\n`full logits` is what a trainer adds that computes the head for every place. Under {BAR_GB} GB up to "
          f"{longest:,} tokens; the CUDA context takes 0.3-0.5 GB more.\nFLOP a token: DPO "
          f"{dpo_flops(shape, True) / 1e9:.2f} G (4P = {dpo_flops(shape, False) / 1e9:.2f} G without recomputing), SFT "
          f"of 0.5B {sft_flops(QWEN_0_5B, False) / 1e9:.2f} G, DeBERTa-v3-base {deberta_flops(512, 16_384) / 1e9:.2f} "
          "G at 512 tokens.")
