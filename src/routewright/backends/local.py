"""Local models through transformers: batched generation from weights folders, greedy or sampled.

What an outcome of this backend holds:

- tokens: input with the chat template around it; output as generated, the closing end-of-text token included;
- latency_s: the seconds of the batch divided by its size, which is what a call costs here, not what one call alone
  would have taken;
- logprob_mean, logprob_min: of the generated tokens, under the model's own distribution (temperature 1);
- finish_reason: "stop" or "length"; a prompt beyond the context window is an outcome with `error` set.

Sampling adds Gumbel noise to logits / temperature and takes the largest, which draws from the tempered distribution
exactly. The noise of a prompt is seeded by (seed, model, sample, prompt text), so an answer does not depend on which
prompts shared its batch (up to rounding in the matrix products).
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from routewright.backends.base import Backend, Sampling, message_of, outcome_of
from routewright.encoders import (
    find_weights,
    load_tokenizer,
    longest_input,
    quiet_loading,
    torch_device,
    weights_identity,
)
from routewright.errors import MissingSetup, UserError
from routewright.pool import Pool
from routewright.schema import Outcome, Prompt, TokenUsage


class LocalBackend(Backend):
    """The models of a pool that have a `path:`, which is read relative to the pool file. Loaded at the first call."""

    def __init__(self, pool: Pool, batch_size: int = 64, root: str | Path | None = None) -> None:
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1; got {batch_size}")
        self.pool = pool
        self.batch_size = batch_size
        self.root = Path(root) if root is not None else Path(pool.source).parent if pool.source else Path()
        self._loaded: dict[str, tuple[Any, Any]] = {}

    def folder(self, model_name: str) -> Path:
        """Where the weights lie. Raises UserError without `path:`, MissingSetup without the folder."""
        path = self.pool[model_name].path
        if not path:
            raise UserError(f"{self.pool.source or self.pool.name}: model {model_name!r} has no path; give it `path:`, "
                            "a weights folder relative to the pool file")
        return find_weights(self.root / path if (self.root / path).is_dir() or path.startswith(".") else path)

    def identity(self, model_name: str) -> str:
        return weights_identity(self.folder(model_name))

    def call_many(self, model_name: str, prompts: Sequence[Prompt], sampling: Sampling,
                  sample: int = 0) -> list[Outcome]:
        """Batches of prompts of similar length; the order of the answers is that of `prompts`."""
        model, tokenizer = self._load(model_name)
        asked = [tokenizer(_as_chat(tokenizer, prompt), add_special_tokens=not tokenizer.chat_template)["input_ids"]
                 for prompt in prompts]
        spec = self.pool[model_name]
        window = min(longest_input(model, tokenizer), spec.context_window or 10**9)
        limit = min(sampling.max_new_tokens, spec.max_output_tokens or 10**9)
        answers: list[Outcome | None] = [None] * len(prompts)
        fitting = []
        for i, ids in enumerate(asked):
            if len(ids) >= window:
                answers[i] = outcome_of(prompts[i], model_name, sample, token_usage=TokenUsage(len(ids)),
                                        finish_reason="error",
                                        error=f"the prompt has {len(ids)} tokens and the context window {window}")
            else:
                fitting.append(i)
        fitting.sort(key=lambda i: len(asked[i]))
        for start in range(0, len(fitting), self.batch_size):
            batch = fitting[start:start + self.batch_size]
            room = min(limit, window - max(len(asked[i]) for i in batch))
            seeds = [_seed(sampling.seed, model_name, sample, prompts[i]) for i in batch]
            began = time.perf_counter()
            drawn = _generate(model, tokenizer, [asked[i] for i in batch], sampling, room, seeds)
            seconds = (time.perf_counter() - began) / len(batch)
            for i, (tokens, logprobs, stopped) in zip(batch, drawn, strict=True):
                answers[i] = outcome_of(
                    prompts[i], model_name, sample, response=tokenizer.decode(tokens, skip_special_tokens=True).strip(),
                    token_usage=TokenUsage(len(asked[i]), len(tokens)), finish_reason="stop" if stopped else "length",
                    latency_s=round(seconds, 6), logprob_mean=round(sum(logprobs) / len(logprobs), 5),
                    logprob_min=round(min(logprobs), 5))
        return answers  # type: ignore[return-value]

    def _load(self, model_name: str) -> tuple[Any, Any]:
        if model_name not in self._loaded:
            import torch
            from transformers import AutoModelForCausalLM

            folder = self.folder(model_name)
            tokenizer = load_tokenizer(folder)
            if tokenizer.pad_token_id is None:
                tokenizer.pad_token = tokenizer.eos_token
            try:
                with quiet_loading():
                    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True,
                                                                 use_safetensors=True, trust_remote_code=False)
            except Exception as error:  # noqa: BLE001 - the loader raises a dozen kinds, all mean the same to the user
                first = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
                raise MissingSetup(f"{folder}: the weights of {model_name!r} do not load ({first}); "
                                   "fetch or train them again") from None
            model = model.to(torch_device()).eval()
            # The first generation pays for lazy set-up, which is no model's latency.
            _generate(model, tokenizer, [tokenizer("1")["input_ids"]], Sampling(), 2, [0])
            self._loaded[model_name] = (model, tokenizer)
        return self._loaded[model_name]


def _as_chat(tokenizer: Any, prompt: Prompt) -> str:
    """The prompt as the model was taught to see one: its chat template where it has one, else the bare text."""
    text = message_of(prompt)
    if not tokenizer.chat_template:
        return text
    turn = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)


def _seed(seed: int, model_name: str, sample: int, prompt: Prompt) -> int:
    text = f"{seed}\n{model_name}\n{sample}\n{message_of(prompt)}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def _generate(model: Any, tokenizer: Any, asked: Sequence[Sequence[int]], sampling: Sampling, room: int,
              seeds: Sequence[int]) -> list[tuple[list[int], list[float], bool]]:
    """(tokens with the end token, log-probability of each, whether it ended by itself) per row of the batch."""
    import torch
    from transformers import GenerationConfig, LogitsProcessorList

    width = max(len(ids) for ids in asked)
    ids = torch.full((len(asked), width), tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(asked):
        ids[row, width - len(tokens):] = torch.tensor(tokens)
        mask[row, width - len(tokens):] = 1
    ends = _end_tokens(model, tokenizer)
    chooser = _Chooser(sampling, seeds)
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids.to(model.device), attention_mask=mask.to(model.device),
            logits_processor=LogitsProcessorList([chooser]),
            generation_config=GenerationConfig(max_new_tokens=room, do_sample=False, use_cache=True,
                                               pad_token_id=tokenizer.pad_token_id, eos_token_id=sorted(ends)))
    drawn = out[:, width:].cpu().tolist()
    logprobs = torch.stack(chooser.logprobs, 1).tolist()
    results = []
    for tokens, values in zip(drawn, logprobs, strict=True):
        end = next((i for i, token in enumerate(tokens) if token in ends), None)
        length = len(tokens) if end is None else end + 1
        results.append((tokens[:length], values[:length], end is not None))
    return results


def _end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Every token that ends an answer: the tokenizer's and those of the model's own generation settings."""
    known = getattr(model.generation_config, "eos_token_id", None)
    ends = set(known if isinstance(known, (list, tuple)) else [known]) | {tokenizer.eos_token_id}
    return {token for token in ends if token is not None}


class _Chooser:
    """A logits processor that makes the greedy search draw: it perturbs the scores, and notes the log-probability of
    the token they lead to while the untouched logits are at hand, so that no step's logits have to be kept."""

    def __init__(self, sampling: Sampling, seeds: Sequence[int]) -> None:
        import numpy as np

        self.sampling = sampling
        seeds = seeds if sampling.temperature > 0 else ()
        self.streams = [np.random.Generator(np.random.PCG64(seed)) for seed in seeds]
        self.logprobs: list[Any] = []

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        import torch

        plain = torch.log_softmax(scores.float(), -1)
        drawn = plain if not self.streams else self._perturbed(plain)
        self.logprobs.append(plain.gather(1, drawn.argmax(-1, keepdim=True))[:, 0].cpu())
        return drawn

    def _perturbed(self, logprobs: Any) -> Any:
        import numpy as np
        import torch

        tempered = logprobs / self.sampling.temperature
        if self.sampling.top_p < 1:
            ordered, order = tempered.softmax(-1).sort(-1, descending=True)
            beyond = ordered.cumsum(-1) - ordered >= self.sampling.top_p  # the token that crosses top_p stays
            tempered = tempered.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), float("-inf"))
        noise = np.stack([stream.gumbel(size=tempered.shape[-1]) for stream in self.streams])
        return tempered + torch.from_numpy(noise).to(tempered)
