"""Preference pairs as one sequence: TRL's DPOTrainer without computing the prompt of a pair twice.

A router's pair is one long prompt and two short answers. Stock TRL runs prompt + chosen and prompt + rejected, and
on a CPU projects every position onto the vocabulary. Here a pair is one row

    [padding | prompt | chosen but for its last token | rejected but for its last token]

with position ids that begin anew for the second answer and a 4-D attention mask in which the answers do not see each
other, and the LM head reads only the positions that predict an answer token. Answers of one token, such as a router's
labels, add nothing to the row at all. Losses, metrics and their names stay the library's own: what it is handed has
the layout that it knows.

    trainer = SharedPrefixTrainer(model=model, args=DPOConfig(...), train_dataset=pairs, processing_class=tokenizer)
    class Mine(SafetyNet, SharedPrefixTrainer): ...          # in the training safety net

Departures from the stock trainer, besides speed:

- The reference is the policy as it stands when training begins, a warm start included. Its log-probs are computed
  before the first step and kept in the run folder (REFERENCE) under a fingerprint of rows and start weights, so a
  resumed run reads what the first one wrote. No second model or adapter is held.
- Trainable weights beside 4-bit ones stay in the precision they came in (float32 from peft). TRL rounds them to bf16,
  where a step of 5e-5 on a weight of .02 is lost.

Importing this module imports neither torch nor trl; `SharedPrefixTrainer` does, on first use.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from routewright.errors import UserError
from routewright.training import unrounded

REFERENCE = "reference_logps.safetensors"
# Stock losses that judge one pair at a time. `aot` sorts a batch, which batches of one row make meaningless.
LOSSES = ("sigmoid", "hinge", "ipo", "robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down",
          "discopop", "sigmoid_norm", "sft")
_FULL_ATTENTION = ("full_attention", "attention")
_PROMPT, _CHOSEN, _REJECTED, _PADDING = 0, 1, 2, -1

Row = dict[str, list[int]]


# ---- rows to tensors ------------------------------------------------------------------------------------------------

class SharedPairs:
    """Collator: rows of `prompt_ids`, `chosen_ids`, `rejected_ids` to one sequence a pair.

    Prompts end in the same column (padding stands left of them), so the positions that predict answer tokens are alike
    for all rows. max_length: tokens of prompt + one answer; the end of a longer answer is cut, as the stock collator
    does. Returns, for B pairs, T columns and answers of up to A tokens: input_ids, position_ids, part (B, T) with 0 the
    prompt, 1 and 2 the answers, -1 padding; answer_ids and completion_mask (2B, A + 1), chosen above rejected, whose
    first column is not scored; and the reference log-probs (B,) where the rows have them.
    """

    def __init__(self, pad_token_id: int, max_length: int | None = None) -> None:
        self.pad, self.max_length = pad_token_id, max_length

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        import torch

        prompts = [row["prompt_ids"] for row in rows]
        answers = [[self._cut(row, name) for row in rows] for name in ("chosen_ids", "rejected_ids")]
        width = max(len(ids) for ids in prompts)
        longest = max(1, *(len(ids) for side in answers for ids in side))
        columns = width + 2 * (longest - 1)
        ids = torch.full((len(rows), columns), self.pad)
        positions, part = torch.zeros_like(ids), torch.full_like(ids, _PADDING)

        def put(row: int, column: int, tokens: list[int], first: int, name: int) -> None:
            stop = column + len(tokens)
            ids[row, column:stop] = torch.tensor(tokens, dtype=torch.long)
            positions[row, column:stop] = torch.arange(first, first + len(tokens))
            part[row, column:stop] = name

        answer_ids = torch.full((2 * len(rows), longest + 1), self.pad)
        scored = torch.zeros_like(answer_ids)
        for i, prompt in enumerate(prompts):
            put(i, width - len(prompt), prompt, 0, _PROMPT)
            for side, name in enumerate((_CHOSEN, _REJECTED)):
                answer = answers[side][i]
                put(i, width + side * (longest - 1), answer[:-1], len(prompt), name)
                answer_ids[side * len(rows) + i, 1:1 + len(answer)] = torch.tensor(answer, dtype=torch.long)
                scored[side * len(rows) + i, 1:1 + len(answer)] = 1
        batch = {"input_ids": ids, "position_ids": positions, "part": part, "answer_ids": answer_ids,
                 "completion_mask": scored}
        for name in ("ref_chosen_logps", "ref_rejected_logps"):
            if name in rows[0]:
                batch[name] = torch.tensor([row[name] for row in rows], dtype=torch.float32)
        return batch

    def _cut(self, row: Row, name: str) -> list[int]:
        room = len(row[name]) if self.max_length is None else max(0, self.max_length - len(row["prompt_ids"]))
        return row[name][:room]


def pair_mask(part: Any) -> Any:
    """(B, 1, T, T) bool: who sees whom. Causal; an answer sees the prompt and itself, nobody sees padding.

    Every position sees itself, so that no row of the softmax is empty.
    """
    import torch

    query, key = part[:, :, None], part[:, None, :]
    order = torch.arange(part.shape[1], device=part.device)
    seen = (order[:, None] >= order) & ((key == _PROMPT) | ((key == query) & (key != _PADDING)))
    return (seen | (order[:, None] == order))[:, None]


def answer_columns(columns: int, longest: int) -> Any:
    """(2, A): the columns whose hidden states predict the tokens of the chosen and of the rejected answer."""
    import torch

    last = columns - 2 * (longest - 1) - 1  # the prompt's end, which predicts the first token of both
    steps = torch.arange(longest)
    return torch.stack([last + steps, torch.where(steps == 0, last, last + longest - 1 + steps)])


# ---- the trainer ----------------------------------------------------------------------------------------------------

def _make_trainer() -> type:
    """The subclass of trl.DPOTrainer. trl is imported here, not with the package: it takes seconds."""
    import torch
    from accelerate.utils import is_peft_model
    from trl import DPOTrainer

    class SharedPrefixTrainer(DPOTrainer):
        __doc__ = __doc_of_trainer__

        def __init__(self, model: Any, args: Any, *, peft_config: Any = None, data_collator: Any = None,
                     processing_class: Any = None, **more: Any) -> None:
            _check_arguments(args, model, more)
            # For adapters the library keeps no second model either way, and `True` would hash the weights wastefully.
            args.precompute_ref_log_probs = peft_config is None and not is_peft_model(model)
            pad = processing_class.pad_token_id
            with unrounded(model):
                super().__init__(
                    model=model, args=args, peft_config=peft_config, processing_class=processing_class,
                    data_collator=data_collator or SharedPairs(
                        processing_class.eos_token_id if pad is None else pad, args.max_length), **more)
            self.precompute_ref_logps = True
            if peft_config is not None:  # adapters that the library has just made, perhaps in bf16
                for parameter in (p for p in self.model.parameters() if p.requires_grad):
                    parameter.data = parameter.data.float()
            if "ref" in getattr(self.model, "peft_config", {}):
                self.model.delete_adapter("ref")  # the library's copy of a warm start; the log-probs replace it
            self._columns: Any = None
            self._engine: Any = None
            self._reading = self.model.get_base_model() if is_peft_model(self.model) else self.model
            self._reading.base_model.register_forward_hook(self._keep_answers)

        # -- one sequence a pair --

        def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
            if "prompt_ids" in next(iter(dataset)):
                return dataset  # tokenised by the caller
            return super()._prepare_dataset(dataset, processing_class, args, dataset_name)

        def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
            if return_outputs:
                raise UserError("pairs are read without whole logits, so compute_metrics has nothing to read; use "
                                "the trainer's own metrics")
            if "ref_chosen_logps" not in inputs:
                raise UserError("these pairs have no reference log-probs; add_reference() computes them before the "
                                "first step")
            known = {"input_ids": inputs["answer_ids"], "attention_mask": inputs["part"] != _PADDING,
                     **{name: inputs[name] for name in ("completion_mask", "ref_chosen_logps", "ref_rejected_logps")}}
            return super()._compute_loss(lambda **given: self._read(model, inputs, given["labels"]), known, False)

        def _read(self, model: Any, inputs: dict[str, Any], labels: Any) -> Any:
            """Figures of each answer token, (2B, A), as the library's fused LM head returns them."""
            part, longest = inputs["part"], labels.shape[1] - 1
            mask = (part != _PADDING).long() if longest == 1 else self._four_d(pair_mask(part))
            self._columns = answer_columns(part.shape[1], longest).to(part.device)
            try:
                return model(input_ids=inputs["input_ids"], position_ids=inputs["position_ids"], attention_mask=mask,
                             shift_labels=labels[:, 1:], fused_lm_head=True, use_cache=False)
            finally:
                self._columns = None

        def _four_d(self, seen: Any) -> Any:
            if self._reading.config._attn_implementation != "eager":
                return seen
            dtype = self._reading.dtype
            return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)

        def _keep_answers(self, module: Any, given: Any, found: Any) -> Any:
            """Between the backbone and the LM head: only the positions that predict an answer token go on."""
            if self._columns is not None:
                hidden = found.last_hidden_state[:, self._columns]  # (B, 2, A, H)
                found.last_hidden_state = hidden.transpose(0, 1).flatten(0, 1)
            return found

        # -- the reference --

        def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
            return dataset  # the library's moment, in its constructor; ours is add_reference

        def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
            self.add_reference(resuming=bool(resume_from_checkpoint))
            self._engine = None
            return super().train(resume_from_checkpoint, *args, **kwargs)

        def add_reference(self, resuming: bool = False) -> None:
            """Put the start policy's log-probs beside each pair; all ranks. Call it before any weight has moved.

            They come from the run folder where a run with these rows and start weights left them. A run that resumes
            must find no others there: raises UserError.
            """
            sets = {name: rows for name, rows in (("train", self.train_dataset), ("eval", self.eval_dataset)) if rows}
            if all("ref_chosen_logps" in rows.column_names for rows in sets.values()):
                return
            file = Path(self.args.output_dir) / REFERENCE
            mark, found = self._start_mark(sets), read_reference(file)
            if found and found.pop("mark") != mark:
                if resuming:
                    raise UserError(f"{file}: the run began with other pairs or other start weights than this one has; "
                                    "give the same base model, warm start and data, or start anew with --resume none")
                found = None
            held = self.accelerator.gather(torch.tensor([found is not None], device=self.accelerator.device))
            if not held.all():
                self._check_sharing(next(iter(sets.values())))
                found = {name: self.pair_logps(rows) for name, rows in sets.items()}
                if self.is_world_process_zero():
                    write_reference(file, mark, found)
            for name, rows in sets.items():
                rows = rows.add_column("ref_chosen_logps", found[name][:, 0].tolist())
                setattr(self, f"{name}_dataset", rows.add_column("ref_rejected_logps", found[name][:, 1].tolist()))

        def _start_mark(self, sets: dict[str, Any]) -> str:
            """Digest of the rows and of every weight as it stands now; packed 4-bit ones are left out."""
            digest = hashlib.sha256()
            for name, rows in sorted(sets.items()):
                digest.update(name.encode())
                for row in rows:
                    digest.update(repr([row[k] for k in ("prompt_ids", "chosen_ids", "rejected_ids")]).encode())
            for name, value in sorted(self.model.named_parameters()):
                if value.is_floating_point() and value.numel():
                    digest.update(name.encode())
                    digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
            return digest.hexdigest()[:16]

        def pair_logps(self, rows: Any, batch_size: int | None = None) -> np.ndarray:
            """(N, 2) float32: log-probs of the chosen and the rejected answer under the weights as they stand.

            All ranks call it and get the whole; each computes its share. No random state is touched.
            """
            size = batch_size or self.args.per_device_eval_batch_size
            order = np.argsort([len(row["prompt_ids"]) for row in rows], kind="stable")
            batches = [order[at:at + size].tolist() for at in range(0, len(order), size)]
            world, rank, device = self.args.world_size, self.args.process_index, self.accelerator.device
            sums = torch.zeros(len(rows), 2, dtype=torch.float64, device=device)
            model = self._scoring_model()
            with self._scoring():
                for turn in range(math.ceil(len(batches) / world)):  # as many on each rank: sharded weights need it
                    at = turn * world + rank
                    chosen = batches[at % len(batches)]
                    batch = self.data_collator([rows[i] for i in chosen])
                    batch = {name: value.to(device) for name, value in batch.items()}
                    found = self._logps(model, batch)
                    if at < len(batches):
                        sums[chosen] = found.to(sums)
            return self.accelerator.reduce(sums, "sum").float().cpu().numpy()

        def _logps(self, model: Any, batch: dict[str, Any]) -> Any:
            labels = batch["answer_ids"].masked_fill(batch["completion_mask"] == 0, -100)
            return self._read(model, batch, labels).log_probs.sum(dim=1).view(2, -1).T

        @contextmanager
        def _scoring(self) -> Iterator[None]:
            modes = [(module, module.training) for module in self.model.modules()]
            self.model.eval()  # which also rests activation checkpointing
            try:
                with torch.no_grad(), self.accelerator.autocast():
                    yield
            finally:
                for module, mode in modes:
                    module.training = mode

        def _scoring_model(self) -> Any:
            if not self.is_deepspeed_enabled:
                return self.model
            if self.model_wrapped is not self.model:
                return self.model_wrapped
            if self._engine is None:  # before training the weights may lie sharded and on the CPU
                from trl.models import prepare_deepspeed

                self._engine = prepare_deepspeed(self.model, self.accelerator)
            return self._engine

        def _check_sharing(self, rows: Any) -> None:
            """Read the longest-answered of the first pairs both ways; raises UserError where they differ.

            Some architectures (recurrent ones, positions made from the mask) pass over a 4-D mask in silence.
            """
            from trl.trainer.dpo_trainer import DataCollatorForPreference

            row = max((rows[i] for i in range(min(len(rows), 32))),
                      key=lambda r: min(len(r["chosen_ids"]), len(r["rejected_ids"])))
            answered = max(len(row["chosen_ids"]), len(row["rejected_ids"]))
            if answered < 2:
                return  # nothing but the prompt is read
            plain = DataCollatorForPreference(self.data_collator.pad, self.data_collator.max_length)([row])
            plain, shared = ({name: value.to(self.accelerator.device) for name, value in batch.items()}
                             for batch in (plain, self.data_collator([row])))
            labels = plain["input_ids"].masked_fill(plain["completion_mask"] == 0, -100)
            model = self._scoring_model()
            with self._scoring():
                apart = model(input_ids=plain["input_ids"], attention_mask=plain["attention_mask"], labels=labels,
                              fused_lm_head=True, use_cache=False).log_probs.sum(dim=1)
                differ = float((self._logps(model, shared)[0] - apart).abs().max())
            low = torch.is_autocast_enabled(self.accelerator.device.type) or self._reading.dtype != torch.float32 \
                or self.accelerator.mixed_precision != "no"
            if not differ < (0.1 if low else 1e-3) * answered:
                raise UserError(f"{self._reading.config.model_type}: this architecture does not read a pair as one "
                                f"sequence (its log-probs are off by {differ:.3g}); take a base model with plain "
                                "attention, such as Qwen2.5 or Llama, or answers of one token")

    SharedPrefixTrainer.__module__, SharedPrefixTrainer.__qualname__ = __name__, "SharedPrefixTrainer"
    return SharedPrefixTrainer


__doc_of_trainer__ = """TRL's DPOTrainer on one sequence per pair; its arguments, losses and metrics are the library's.

Args:
    model: a loaded causal language model, or its peft model (a warm start is the reference then, adapter included)
    args: a DPOConfig; `loss_type` out of LOSSES
    train_dataset, eval_dataset: text pairs as the library takes them, or rows with `prompt_ids`, `chosen_ids` and
        `rejected_ids`, which are left as they are

Raises UserError for settings that this layout cannot serve.
"""


def _check_arguments(args: Any, model: Any, more: dict[str, Any]) -> None:
    unknown = [name for name in args.loss_type if name not in LOSSES]
    if unknown:
        raise UserError(f"loss {unknown[0]!r} is not one of {', '.join(LOSSES)}")
    if more.get("ref_model") is not None or args.sync_ref_model:
        raise UserError("the reference is the policy at the start of training, so no ref_model and no sync_ref_model")
    if args.truncation_mode != "keep_start":
        raise UserError(f"truncation_mode {args.truncation_mode!r}: pairs are cut at their end (keep_start)")
    config = model.config.get_text_config()
    attention = config._attn_implementation
    if attention not in ("sdpa", "eager"):
        raise UserError(f"attention {attention!r} takes no mask of our own; load the model with sdpa")
    odd = [kind for kind in getattr(config, "layer_types", None) or () if kind not in _FULL_ATTENTION]
    if odd or getattr(config, "output_router_logits", False):
        raise UserError(f"{config.model_type}: pairs share their prompt under full attention only; this model has "
                        f"{odd[0] if odd else 'expert-balance losses'}; take another base model")


# ---- the reference file ---------------------------------------------------------------------------------------------

def read_reference(file: Path) -> dict[str, Any] | None:
    """{set: (N, 2) log-probs} of the file and its `mark`, or None where it is missing or damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="np") as opened:
            return {"mark": (opened.metadata() or {}).get("mark"),
                    **{name: opened.get_tensor(name) for name in opened.keys()}}  # noqa: SIM118
    except (OSError, SafetensorError):
        return None


def write_reference(file: Path, mark: str, logps: dict[str, np.ndarray]) -> None:
    """Write the file whole or not at all."""
    from safetensors.numpy import save

    from routewright.textfiles import write_atomic

    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, save({name: np.ascontiguousarray(v) for name, v in logps.items()}, metadata={"mark": mark}))


def __getattr__(name: str) -> Any:
    if name == "SharedPrefixTrainer":
        globals()[name] = _make_trainer()
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
