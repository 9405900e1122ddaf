"""Tiny causal language models for tests: built in milliseconds, taught a planted word in a second or two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from routewright.language_models import _affixes, encode_instructions, label_ids
from routewright.prompts import full_text

CHAT = ("{{ bos_token }}{% for m in messages %}<user> {{ m['content'] }} <end>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}")


def words_tokenizer(folder: Path, chat: bool = True, labels: bool = True) -> Path:
    """A tokenizer of whole words that adds <bos> and <eos>. Without `labels` it knows no answer but 2."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ("hard plain case river stone window garden paper silver market morning travel winter letter simple what "
             "is why a cheap strong the").split()
    special = ["<pad>", "<bos>", "<eos>", "<unk>", "<user>", "<end>", "<assistant>"]
    digits = list("0123456789ABCDEFGHIJKL") if labels else list("2")
    vocabulary = {word: i for i, word in enumerate([*special, *words, *digits, *"#:?.,\n"])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Whitespace()])
    made.post_processor = processors.TemplateProcessing("<bos> $A <eos>", "<bos> $A $B <eos>",
                                                        [("<bos>", 1), ("<eos>", 2)])
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>",
                                        unk_token="<unk>", additional_special_tokens=["<user>", "<end>", "<assistant>"],
                                        chat_template=CHAT if chat else None)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_causal(folder: Path, chat: bool = True, seed: int = 0, family: str = "qwen2", **config: Any) -> Path:
    """A folder with a random causal language model of some ten thousand parameters and its tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    words_tokenizer(folder, chat)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
             "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0,
             "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.1}
    if family == "gpt2":
        sizes = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 512, "pad_token_id": 0,
                 "bos_token_id": 1, "eos_token_id": 2}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(sizes | config))).save_pretrained(folder)
    return folder


def wrap_text(wrap: str, tokenizer: Any, instruction: str) -> str:
    """The instruction as the network reads it, up to where the answer begins."""
    return instruction.join(_affixes(wrap, tokenizer))


def teach(model: Any, tokenizer: Any, template: Any, wrap: str, prompts: list, labels: np.ndarray, *, steps: int = 80,
          learning_rate: float = 1e-2, seed: int = 0) -> float:
    """Train the trainable weights to answer `labels` (N,) places of the template's list. Returns the last loss."""
    import torch

    rows = encode_instructions(tokenizer, template, wrap, [template.render(full_text(p)) for p in prompts], 200)
    ids = torch.tensor(label_ids(tokenizer, template, wrap))
    random = np.random.default_rng(seed)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    model.train()
    for _ in range(steps):
        chosen = random.choice(len(rows), 32)
        last = torch.tensor([len(rows[i]) - 1 for i in chosen])
        batch = torch.nn.utils.rnn.pad_sequence([torch.tensor(rows[i]) for i in chosen], batch_first=True)
        logits = model(input_ids=batch).logits[torch.arange(len(chosen)), last][:, ids]
        loss = torch.nn.functional.cross_entropy(logits.float(), torch.tensor(labels[chosen]))
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    model.eval()
    return float(loss.detach())


def edit_json(file: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None drops a key."""
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
