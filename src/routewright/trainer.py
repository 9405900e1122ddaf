"""The training safety net: a mixin for any `transformers.Trainer` that makes a run survive what machines do to it.

    from routewright.checkpoints import fingerprint
    from routewright.rank_watch import guard_process
    from routewright.trainer import EpochNames, SafeTrainer, safety_arguments

    guard_process()                                             # a worker ends when its torchrun agent is gone
    args = TrainingArguments(output_dir=out, **safety_arguments(), learning_rate=2e-5, save_total_limit=2)
    trainer = SafeTrainer(model=model, args=args, train_dataset=train, callbacks=[EpochNames()],
                          fingerprints={"data": fingerprint(rows), "config": {"max_length": 256}})
    trainer.run(resume="auto")                                  # "auto" | "none" | a checkpoint's path

`class MyTrainer(SafetyNet, Trainer)` gives the same to a subclass (TRL's SFT, DPO and GRPO trainers too).
What `run` promises, on every rank:

- A checkpoint is whole or not there (`checkpoints`): written aside, synced, sealed with sizes and sha256, renamed.
- `auto` takes the newest whole one, sets torn ones aside with one line each, or starts fresh and says so. On the CPU
  the resumed losses and weights are bit-identical to those of an unbroken run: sampler order (samplers with a
  `generator` are seeded anew for each epoch, also alike on all ranks), all random states, optimizer, schedule,
  the window of the logged loss, early-stopping counters. A collator must not draw from the global random state.
- Other data, other settings or another global batch than the checkpoint's stop with UserError naming what changed.
  Another number of ranks keeps the global batch by changing gradient accumulation, or stops (DeepSpeed always does).
- NaN or Inf in a loss or in the gradient norm: all ranks stop before the optimizer step, nothing is saved,
  `nan_batch.json` names step and rows, PartialRun (exit 3). Under an fp16 scaler only the loss counts, because an
  overflowing norm is how the scaler finds its scale.
- SIGTERM or SIGINT: the step is finished, a checkpoint written, PartialRun. A rank that cannot reach the end of its
  step within `grace_seconds` ends anyway; so does one whose peer on the same machine has died.
- Out of memory: PartialRun with batch size, length, and the next smaller setting.
- `train_log.jsonl`: step, epoch, loss, grad_norm, learning_rate of every optimizer step, cut to the step resumed from.

Launchers set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 (else a restarted gloo job meets the store of the one before).
Importing this module does not import torch; `SafeTrainer` and `EpochNames` do, on first use.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import math
import os
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from routewright import checkpoints as ck
from routewright.errors import MissingSetup, PartialRun, UserError
from routewright.rank_watch import Watch, guard_process, machine
from routewright.textfiles import write_atomic, write_json

# The TrainingArguments that shape the path of the weights; the global batch is compared apart.
TRAJECTORY = (
    "seed", "data_seed", "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm",
    "num_train_epochs", "max_steps", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio",
    "optim", "optim_args", "bf16", "fp16", "tf32", "label_smoothing_factor", "neftune_noise_alpha",
    "train_sampling_strategy", "dataloader_drop_last",
)
TRAIN_LOG = "train_log.jsonl"
NAN_FILE = "nan_batch.json"


def safety_arguments() -> dict[str, Any]:
    """TrainingArguments that a sound run needs; merge your own over them.

    `use_cpu`: without it two CPU ranks each train alone. `average_tokens_across_devices=False`: encoder classifiers
    would multiply their loss by the number of ranks. The process-group timeout is explicit, in seconds.
    Call it before TrainingArguments are made: it also keeps DeepSpeed on CPU ranks from compiling an extension.
    """
    import torch

    gpu = torch.cuda.is_available()
    if not gpu and "WORLD_SIZE" in os.environ:
        _without_shared_memory_extension()
    return {"use_cpu": not gpu, "dataloader_pin_memory": gpu, "average_tokens_across_devices": False,
            "ddp_find_unused_parameters": False, "ddp_timeout": 600, "report_to": "none"}


def _without_shared_memory_extension() -> None:
    """Let DeepSpeed's CPU ranks talk over gloo alone.

    Else each start builds an extension for reductions in shared memory: a C++ compiler, a minute and 3 GB the first
    time, and a failed run where there is no compiler. It only matters for speed, between ranks of one machine.
    """
    with contextlib.suppress(ImportError):
        # Not `import deepspeed.comm.torch as ...`: an attribute of that name hides the module, it is torch itself.
        importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None


class _Stopped(Exception):
    """A signal was obeyed and the checkpoint is written."""


# ---- the mixin ------------------------------------------------------------------------------------------------------

class SafetyNet:
    """Stands before a Trainer in the bases: `class MyTrainer(SafetyNet, Trainer)`. Start it with `run`.

    fingerprints: {"data": text, "config": {option: value}}; stored with every checkpoint, compared on resume.
    row_names: a sequence or function from a row's index in the training set to a name a person knows; used
    for `nan_batch.json`. grace_seconds: from a signal to the forced end; below the 30 s torchrun grants.
    """

    def __init__(self, *args: Any, fingerprints: dict[str, Any] | None = None,
                 row_names: Sequence[Any] | Callable[[int], Any] | None = None, grace_seconds: float = 25.0,
                 **kwargs: Any) -> None:
        self._fingerprints = dict(fingerprints or {})
        self._row_names = row_names
        self._grace = grace_seconds
        self._watch: Watch | None = None
        self._staging: Path | None = None
        self._point: ck.Checkpoint | None = None
        self.was_finished = False
        self._world_changed = False
        self._restored = False
        self._stop_agreed = False
        self._seen_step: int | None = None
        self._log_file: Any = None
        self._log_line: dict[str, Any] = {}
        self._window: list[Any] = []
        self._epoch_loader: tuple[Any, int] | None = None
        self._micro_batches = 0
        self._batch_shape: tuple[int, ...] = ()
        self._began = time.time()
        gpus = _take_one_gpu(kwargs.get("args"))
        super().__init__(*args, **kwargs)
        if gpus > 1:
            self._say(f"this process trains on one of {gpus} GPUs; ./cmd/run_train_*.sh uses all of them")
        if self.is_deepspeed_enabled:  # two lines a step, of DeepSpeed's own calls
            warnings.filterwarnings("ignore", message=".*is deprecated. Please use", category=FutureWarning,
                                    module="torch.distributed")
        if not _loss_counts_items(self.accelerator.unwrap_model(self.model)):
            self.model_accepts_loss_kwargs = False

    # -- the public door --

    def run(self, resume: str | Path = "auto") -> Any:
        """Train from the right place to the end; returns the Trainer's TrainOutput.

        resume: "auto" (newest whole checkpoint of output_dir, else fresh), "none" (fresh; older ones are set aside),
        or the path of one checkpoint. `was_finished` then tells whether nothing was left to train. Raises UserError
        (2), PartialRun (3), MissingSetup (4). Call it on every rank.
        """
        guard_process()
        self._check_ranks()
        self._set_timeout()
        lock: ck.RunLock | None = None
        self._watch = Watch(self._peers(), self._grace)
        try:
            def prepare() -> ck.Checkpoint | None:
                nonlocal lock
                lock = ck.RunLock(self.args.output_dir)
                return self._choose(str(resume))

            self._point = self._from_rank_0(prepare)
            self._adopt(self._point)
            result = self.train(resume_from_checkpoint=str(self._point.path) if self._point else None)
            self._watch.peers = {}
            self._barrier()
            if self._watch.requested:
                raise PartialRun(f"{self._signal_name()} arrived as training ended; {self._how_to_resume()}")
            return result
        except BaseException as error:
            if self.args.world_size > 1:
                self._watch.leave()
            told = self._explain(error)
            if self.args.world_size > 1:
                self._watch.end_with(getattr(told, "exit_code", 1))
            if told is error:
                raise
            raise told from (None if isinstance(error, _Stopped) else error)
        finally:
            self._watch.close()
            if self._log_file:
                self._log_file.close()
                self._log_file = None
            if lock:
                lock.release()

    def _explain(self, error: BaseException) -> BaseException:
        """The error a person should read in place of this one."""
        import torch

        if isinstance(error, _Stopped):
            return PartialRun(f"{self._signal_name()} after step {self.state.global_step} of "
                              f"{self.state.max_steps}; {self._how_to_resume()}")
        if isinstance(error, KeyboardInterrupt):
            return PartialRun(f"interrupted; {self._how_to_resume()}")
        text = str(error)
        if "No space left" in text or "PytorchStreamWriter failed" in text:
            return MissingSetup(f"{self.args.output_dir}: the disk is full or not writable; free space, then "
                                f"{self._how_to_resume()}")
        if isinstance(error, (UserError, PartialRun, MissingSetup)):
            return error
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in text:
            return PartialRun(self._out_of_memory())
        if self.args.world_size > 1 and isinstance(error, (RuntimeError, OSError)):
            told = self._watch.unwell()
            if told:
                self._watch.end_stopped()
                self._watch.leave(3)  # enough for the message; the interpreter's own end takes 6 s on a busy machine
                # Rank 0 speaks for all, unless it is the one that is gone.
                if 0 in self._watch.peers:
                    print(f"rank {self.args.process_index}: {told}", file=sys.stderr, flush=True)
                return PartialRun(f"{told}; {self._how_to_resume()}")
            if isinstance(error, torch.distributed.DistError) or "gloo" in text or "Timed out" in text:
                return PartialRun(f"a rank did not answer within {self.args.ddp_timeout} s or left "
                                  f"({text.splitlines()[0][:120]}); {self._how_to_resume()}")
        return error

    def _signal_name(self) -> str:
        number = self._watch.requested if self._watch else None
        return signal.Signals(number).name if number else "a signal to another rank"

    def _how_to_resume(self) -> str:
        found = ck.checkpoints(self.args.output_dir)
        return (f"run the same command again to continue from {found[-1][1]}" if found
                else "no checkpoint was written yet, the same command starts anew")

    def _out_of_memory(self) -> str:
        batch, steps = self.args.per_device_train_batch_size, self.args.gradient_accumulation_steps
        if not self.model.training and self.is_in_train:
            batch = self.args.per_device_eval_batch_size
            return (f"out of memory in evaluation at step {self.state.global_step} with batch size {batch}; try "
                    f"--trainer.per_device_eval_batch_size {max(1, batch // 2)}, then {self._how_to_resume()}")
        shape = self._batch_shape
        length = shape[1] if len(shape) > 1 else 0
        seen = f"batch size {shape[0] if shape else batch}" + (f" x length {length}" if length else "")
        smaller = next((b for b in range(batch // 2, 0, -1) if batch * steps % b == 0), 0)
        cure = (f"--batch_size {smaller} --global_batch_size {batch * steps * self.args.world_size} (rows per update "
                "stay the same)" if smaller
                else f"a shorter length ({max(1, length // 2)}) or --trainer.activation_checkpointing true")
        return f"out of memory at step {self.state.global_step} with {seen}; try {cure}, then {self._how_to_resume()}"

    # -- ranks --

    def _check_ranks(self) -> None:
        started = int(os.environ.get("WORLD_SIZE", 1))
        if started > 1 and self.args.world_size == 1:
            raise UserError(f"torchrun started {started} ranks but each would train alone; pass use_cpu=True to "
                            "TrainingArguments on a machine without GPUs (safety_arguments does)")
        if self.args.save_on_each_node:
            raise UserError("save_on_each_node is not supported: checkpoints need one folder that all nodes share")

    def _set_timeout(self) -> None:
        # With use_cpu the Trainer forgets its ddp_timeout, and a hung rank would hold the others for 30 minutes.
        if self.args.world_size > 1:
            from datetime import timedelta

            from torch.distributed import distributed_c10d

            distributed_c10d._set_pg_timeout(timedelta(seconds=self.args.ddp_timeout))

    def _peers(self) -> dict[int, int]:
        mine = (machine(), os.getpid())
        return {rank: pid for rank, (machine, pid) in enumerate(self._from_all(mine))
                if machine == mine[0] and pid != mine[1]}

    def _from_all(self, value: Any) -> list[Any]:
        if self.args.world_size == 1:
            return [value]
        import torch.distributed as dist

        box: list[Any] = [None] * self.args.world_size
        dist.all_gather_object(box, value)
        return box

    def _from_rank_0(self, work: Callable[[], Any]) -> Any:
        """Do it on rank 0 only; every rank gets the result, or raises what rank 0 raised."""
        box: list[Any] = [None, None]
        if self.args.process_index == 0:
            try:
                box = [work(), None]
            except (UserError, PartialRun, MissingSetup, OSError) as error:
                kind = type(error) if not isinstance(error, (ck.DamagedFolder, OSError)) else (
                    UserError if isinstance(error, UserError) else MissingSetup)
                box = [None, (kind, str(error))]
        if self.args.world_size > 1:
            import torch.distributed as dist

            dist.broadcast_object_list(box, src=0)
        if box[1]:
            raise box[1][0](box[1][1])
        return box[0]

    def _barrier(self) -> None:
        self.accelerator.wait_for_everyone()

    def _say(self, message: str) -> None:
        if self.args.process_index == 0:
            print(message, flush=True)

    # -- where to begin --

    def _choose(self, resume: str) -> ck.Checkpoint | None:
        """Rank 0: the checkpoint to start from; the folder is left so that a later `auto` finds this run's own."""
        folder = self.args.output_dir
        ck.clean(folder)
        if resume == "none":
            moved = ck.set_aside_newer(folder, -1)
            if moved:
                self._say(f"starting anew; earlier checkpoints are kept as {', '.join(moved)}")
            ck.repair_epoch_names(folder)
            return None
        if resume == "auto":
            found = ck.newest_verified(folder)
        else:
            found = ck.verify(ck.resolve(resume))
            if "step" not in found.manifest:
                raise UserError(f"{resume}: not a training checkpoint; its {ck.MANIFEST} names no step")
        if found is None:
            self._say(f"no checkpoint in {folder}: starting fresh")
        else:
            self._compare(found)
            if found.path.resolve().parent == Path(folder).resolve():
                ck.set_aside_newer(folder, found.step)
            told = f"(step {found.step} of {found.manifest.get('max_steps', '?')})"
            self._say(f"{found.path} {told} is the end of this run: nothing is left to train" if _ended(found)
                      else f"resuming from {found.path} {told}")
        ck.repair_epoch_names(folder)
        return found

    def _what_we_train(self) -> dict[str, Any]:
        trainer = {name: getattr(self.args, name, None) for name in TRAJECTORY}
        with contextlib.suppress(TypeError):
            trainer["rows"] = len(self.train_dataset)
        trainer["sharding"] = self._sharding()
        return {**self._fingerprints, "trainer": {k: v if isinstance(v, (int, float, dict, type(None))) else
                                                  str(getattr(v, "value", v)) for k, v in trainer.items()}}

    def _sharding(self) -> str | None:
        """How weights and optimizer are spread over the ranks: a checkpoint's parts fit that way alone."""
        if self.is_deepspeed_enabled:
            return f"ZeRO-{self.accelerator.state.deepspeed_plugin.zero_stage}"
        return "FSDP" if self.is_fsdp_enabled else None

    def _compare(self, found: ck.Checkpoint) -> None:
        changed = ck.differences(found.manifest.get("fingerprints", {}), self._what_we_train())
        if changed:
            raise UserError(f"{found.path}: this run differs from the one that wrote the checkpoint "
                            f"({'; '.join(changed)}); give the same, or start anew with --resume none")
        ranks = found.manifest["world_size"]
        if self.is_deepspeed_enabled and ranks != self.args.world_size:
            raise UserError(f"{found.path}: written by {ranks} ranks under DeepSpeed, each with its part of the "
                            f"optimizer, and here are {self.args.world_size} ranks; start {ranks} again, or begin anew "
                            "with --resume none")
        self._accumulation_for(found)

    def _accumulation_for(self, found: ck.Checkpoint) -> int:
        """Gradient accumulation that keeps the checkpoint's global batch. Raises UserError where none does."""
        then, ranks_then = found.manifest["global_batch"], found.manifest["world_size"]
        batch, ranks, steps = self.args.train_batch_size, self.args.world_size, self.args.gradient_accumulation_steps
        if batch * ranks * steps == then:
            return steps
        if ranks == ranks_then or then % (batch * ranks):
            raise UserError(
                f"{found.path}: trained with a global batch of {then} ({ranks_then} ranks), this run has {ranks} "
                f"ranks x {batch} rows x {steps} accumulation steps; choose --trainer.per_device_train_batch_size and "
                f"--trainer.gradient_accumulation_steps so that the product is {then}, or start anew "
                "with --resume none")
        return then // (batch * ranks)

    def _adopt(self, found: ck.Checkpoint | None) -> None:
        """Every rank: take over what the checkpoint fixes."""
        step = found.step if found else 0
        self.was_finished = found is not None and _ended(found)
        if found:
            self._world_changed = found.manifest["world_size"] != self.args.world_size
            steps = self._accumulation_for(found)
            if steps != self.args.gradient_accumulation_steps:
                self._say(f"{self.args.world_size} ranks instead of {found.manifest['world_size']}: gradient "
                          f"accumulation {self.args.gradient_accumulation_steps} -> {steps} keeps the global batch of "
                          f"{found.manifest['global_batch']}")
                self.args.gradient_accumulation_steps = steps
            # Else early stopping forgets its count and the resumed run ends elsewhere.
            self.args.restore_callback_states_from_checkpoint = True
        if self.args.process_index == 0:
            self._log_file = _open_train_log(Path(self.args.output_dir) / TRAIN_LOG, step)

    def _restore(self) -> None:
        """Once, after the Trainer has reset its counters: the unlogged loss and the totals of the broken run."""
        if self._restored:
            return
        self._restored = True
        self._seen_step = self.state.global_step
        if not self._point:
            self._began = time.time()
            return
        states = [json.loads(p.read_bytes()) for p in sorted(self._point.path.glob("run_state_*.json"))]
        mine = next((s for s in states if s["rank"] == self.args.process_index), states[0])
        window = [s["loss_window"] for s in states]
        self._tr_loss.fill_(sum(window) / len(window) if self._world_changed else mine["loss_window"])
        self._total_loss_scalar = mine["loss_total"]
        self._globalstep_last_logged = mine["last_logged"]
        self._initial_global_step = 0
        self._began = time.time() - mine["seconds"]
        self._find_best()

    def _find_best(self) -> None:
        """The best checkpoint lies beside the one resumed from, wherever the run folder is now and is seen from.

        The Trainer forgets one whose recorded path is gone, and would keep the last weights in place of the best.
        """
        recorded = json.loads((self._point.path / "trainer_state.json").read_bytes())["best_model_checkpoint"]
        if not recorded:
            return
        best = self._point.path.parent / Path(recorded).name
        self.state.best_model_checkpoint = str(best) if best.is_dir() else None
        if not best.is_dir() and self.args.process_index == 0:
            ck.warn(f"{best}, the best checkpoint so far, is gone; a later one will be kept in its place")

    # -- hooks into the Trainer's loop --

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        self._restore()
        if self.was_finished:
            # Early stopping had ended it: the steps that are left will not be made.
            self.control.should_training_stop = True
            return None
        epoch, loader = kwargs["epoch"], kwargs["train_dataloader"]
        skipped = kwargs["steps_trained_in_current_epoch"] if epoch == kwargs["epochs_trained"] else 0
        self._micro_batches = skipped if self._point else 0
        self._epoch_loader = (loader, epoch)
        self._seed_sampler(loader, epoch)
        return super()._run_epoch(*args, **kwargs)

    def _seed_sampler(self, loader: Any, epoch: int) -> None:
        """Make the order of an epoch depend on (seed, epoch) alone, alike on every rank and after a resume."""
        import torch

        sampler = _innermost_sampler(loader)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)
        elif hasattr(sampler, "generator"):
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            sampler.generator = torch.Generator().manual_seed(seed + epoch)

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(inputs, dict) or hasattr(inputs, "keys"):
            shapes = [v.shape for v in inputs.values() if hasattr(v, "shape")]
            self._batch_shape = tuple(max(shapes, key=len, default=()))
        loss = super().training_step(model, inputs, *args, **kwargs)
        self._window.append(loss.detach())
        self._micro_batches += 1
        return loss

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        result = super().compute_loss(model, inputs, *args, **kwargs)
        # DeepSpeed steps the optimizer inside backward: the loss is the last thing seen before it.
        if self.is_in_train and model.training and self.is_deepspeed_enabled:
            loss = result[0] if isinstance(result, tuple) else result
            self._micro_batches += 1
            self._agree([loss.detach()], 0.0)
            self._micro_batches -= 1
        return result

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        losses, self._window = self._window, []
        self._agree(losses, grad_norm)
        return grad_norm

    def _agree(self, losses: list[Any], grad_norm: Any) -> None:
        """All ranks, before the optimizer step: stop together on NaN or Inf, note a signal, keep the log line.

        One gather of three numbers a step: loss, gradient norm, signal seen.
        """
        import torch

        norm = 0.0 if grad_norm is None else float(grad_norm)
        mine = torch.stack([torch.stack([x.float() for x in losses]).sum(),
                            torch.tensor(norm, device=losses[0].device),
                            torch.tensor(float(self._signalled()), device=losses[0].device)])
        rows = self.accelerator.gather(mine).view(-1, 3).tolist()
        scaler = getattr(self.accelerator, "scaler", None)
        norm_counts = scaler is None or not scaler.is_enabled()
        if not all(math.isfinite(loss) and (math.isfinite(norm) or not norm_counts) for loss, norm, _ in rows):
            self._stop_on_nan(losses, rows)
        self._stop_agreed = self._stop_agreed or any(stop for _, _, stop in rows)
        self._log_line = {"loss": sum(loss for loss, _, _ in rows) / len(rows), "grad_norm": rows[0][1]}

    def _signalled(self) -> bool:
        return bool(self._watch and self._watch.requested)

    def _stop_on_nan(self, losses: list[Any], rows: list[list[float]]) -> None:
        values = [float(x) for x in losses]
        first = self._micro_batches - len(values)
        bad = [i for i, value in enumerate(values) if not math.isfinite(value)] or list(range(len(values)))
        if all(math.isfinite(value) for value in values) and not all(math.isfinite(loss) for loss, _, _ in rows):
            bad = []  # another rank's batch
        report = self._from_all({
            "rank": self.args.process_index, "rows": [r for i in bad for r in self._rows_of(first + i)],
            "losses": [repr(value) for value in values]})
        step = self.state.global_step + 1
        finite_loss = all(math.isfinite(loss) for loss, _, _ in rows)
        what = "gradient norm" if finite_loss else "loss"
        seen = next(v for loss, norm, _ in rows for v in ((norm,) if finite_loss else (loss,)) if not math.isfinite(v))
        path = Path(self.args.output_dir) / NAN_FILE
        if self.args.process_index == 0:
            write_json(path, {"step": step, "what": what, "value": repr(seen), "ranks": report})
        self._barrier()
        named = [str(r) for part in report for r in part["rows"]]
        listed = ", ".join(named[:8]) + (f" and {len(named) - 8} more" if len(named) > 8 else "")
        raise PartialRun(f"the {what} is {seen} at step {step} (rows {listed or 'unknown'}); stopped before the "
                         f"update, nothing new was saved; look at {path}, mend the rows or lower the "
                         f"learning rate, then {self._how_to_resume()}")

    def _rows_of(self, micro_batch: int) -> list[Any]:
        """Names or indices of the rows of this rank's n-th batch of the epoch: its order is walked once more."""
        if self._epoch_loader is None:
            return []
        loader, epoch = self._epoch_loader
        self._seed_sampler(loader, epoch)
        batches = _batch_sampler(loader)
        for number, batch in enumerate(batches if batches is not None else ()):
            if number == micro_batch:
                names = self._row_names
                return [i if names is None else names(i) if callable(names) else names[i] for i in batch]
        return []

    def _maybe_log_save_evaluate(self, tr_loss: Any, grad_norm: Any, model: Any, trial: Any, epoch: Any, *args: Any,
                                 **kwargs: Any) -> None:
        step_end = self.state.global_step != self._seen_step
        self._seen_step = self.state.global_step
        last_of_epoch = self.state.epoch is not None and float(self.state.epoch).is_integer()
        held = False
        if step_end:
            self._write_log_line(kwargs.get("learning_rate"))
            # The epoch's last checkpoint waits for the epoch's evaluation: a resume must not skip it.
            held = last_of_epoch and (self.control.should_save or self._stop_agreed)
            self.control.should_save = (self.control.should_save or self._stop_agreed) and not held
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, epoch, *args, **kwargs)
        if held:
            self.control.should_save = True
        elif self._stop_agreed:
            raise _Stopped

    def _evaluate(self, *args: Any, **kwargs: Any) -> Any:
        metrics = super()._evaluate(*args, **kwargs)
        # An evaluation can outlast many steps: a signal during it is obeyed right after.
        if any(self._from_all(self._signalled())):
            self._stop_agreed = True
            self.control.should_save = True
        return metrics

    def _write_log_line(self, learning_rate: float | None) -> None:
        if self._log_file:
            rate = self._get_learning_rate() if learning_rate is None else learning_rate
            line = {"step": self.state.global_step, "epoch": self.state.epoch, **self._log_line,
                    "learning_rate": float(rate)}
            self._log_file.write(json.dumps(line) + "\n")
            self._log_file.flush()

    def _finalize_training(self, trial: Any, num_train_samples: Any, start_time: float) -> Any:
        self._restore()
        # The totals span all lives of the run, so the clock does too.
        start_time = self._began if self._point else start_time
        limit, self.args.save_total_limit = self.args.save_total_limit, None  # the Trainer would delete epoch targets
        try:
            return super()._finalize_training(trial, num_train_samples, start_time)
        finally:
            self.args.save_total_limit = limit

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        self._from_rank_0(lambda: ck.verify(best) and None)
        super()._load_best_model()

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self._world_changed:
            from transformers import set_seed

            set_seed(self.args.seed + 100_003 * self.state.global_step + self.args.process_index)
        else:
            super()._load_rng_state(checkpoint)

    # -- saving --

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """The Trainer writes its checkpoint into a staging folder; rank 0 seals it and gives it its name."""
        run_folder = Path(super()._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        staging = Path(self._from_rank_0(lambda: str(_fresh(run_folder / f".tmp-{name}-{os.getpid()}"))))
        self._staging = staging
        try:
            super()._save_checkpoint(model, trial)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)  # a full disk needs the room
            raise
        finally:
            self._staging = None
        write_json(staging / name / f"run_state_{self.args.process_index}.json", {
            "rank": self.args.process_index, "loss_window": self._tr_loss.item(), "loss_total": self._total_loss_scalar,
            "last_logged": self._globalstep_last_logged, "seconds": time.time() - self._began,
            "stopping": bool(self.control.should_training_stop)})
        self._barrier()
        # Where the best one is this one, the Trainer noted the staging path.
        best = self.state.best_model_checkpoint
        if best and Path(best).parent == staging:
            self.state.best_model_checkpoint = str(run_folder / name)
        self._from_rank_0(lambda: self._finish_checkpoint(staging / name, run_folder / name))
        self._barrier()

    def _finish_checkpoint(self, staged: Path, final: Path) -> None:
        self.state.save_to_json(str(staged / "trainer_state.json"))
        if self._log_file:
            os.fsync(self._log_file.fileno())
        epoch = float(self.state.epoch or 0)
        ck.seal(staged, step=self.state.global_step, max_steps=self.state.max_steps, epoch=epoch,
                epoch_ended=int(epoch) if epoch.is_integer() and epoch > 0 else None,
                world_size=self.args.world_size, accumulation=self.args.gradient_accumulation_steps,
                global_batch=self.args.train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps,
                fingerprints=self._what_we_train())
        ck.publish(staged, final)
        staged.parent.rmdir()
        best = self.state.best_model_checkpoint
        ck.rotate(final.parent, self.args.save_total_limit, protect=[final, *([best] if best else [])])


def _take_one_gpu(args: Any) -> int:
    """The GPUs that the Trainer would spread one process over, by nn.DataParallel; it is told to take one of them.

    Else the encoders' batch would grow with the machine, and TRL's trainers stop.
    """
    gpus = args.n_gpu if args is not None else 0
    if gpus > 1:
        args._n_gpu = 1
    return gpus


def _loss_counts_items(model: Any) -> bool:
    """Whether a model's forward divides its loss by the `num_items_in_batch` that the Trainer passes.

    The Trainer takes any forward with **kwargs for one that does. The encoder classifiers (BERT, DeBERTa) have
    **kwargs and take a plain mean, so their loss and gradients would grow with the accumulation steps and ranks.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    try:
        source = inspect.getsource(inspect.unwrap(type(model).forward))
    except (OSError, TypeError):
        return True
    return any(word in source for word in ("loss_function", "num_items_in_batch", "loss_kwargs"))


def _ended(found: ck.Checkpoint) -> bool:
    """Whether the run had decided to end (all steps made, or early stopping) when it wrote this checkpoint."""
    return bool(json.loads((found.path / "run_state_0.json").read_bytes())["stopping"])


def _fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _open_train_log(path: Path, step: int) -> Any:
    """The log open for appending, cut after `step`; at 0 an older log is kept beside it."""
    lines = []
    if path.exists() and step == 0:
        os.replace(path, path.with_name("previous-" + path.name))
    elif path.exists():
        for line in path.read_text().splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):  # the last line may be torn
                if json.loads(line)["step"] <= step:
                    lines.append(line + "\n")
    write_atomic(path, "".join(lines))
    return open(path, "a", encoding="utf-8")  # noqa: SIM115 - open as long as the run


def _batch_sampler(loader: Any) -> Any:
    """What yields lists of row indices for this rank, or None for a stream."""
    batches = getattr(loader, "batch_sampler", None)
    if batches is None and hasattr(getattr(loader, "sampler", None), "batch_size"):
        return loader.sampler
    return batches


def _innermost_sampler(loader: Any) -> Any:
    """The sampler beneath the shards and batches that accelerate wraps around it."""
    found = _batch_sampler(loader)
    while found is not None:
        inner = getattr(found, "batch_sampler", None) or getattr(found, "sampler", None)
        if inner is None or not hasattr(inner, "__iter__"):
            return found
        found = inner
    return None


# ---- classes that need transformers ---------------------------------------------------------------------------------

def _make_safe_trainer() -> type:
    from transformers import Trainer

    about = {"__module__": __name__, "__doc__": "A Trainer in the safety net: see `run`."}
    return type("SafeTrainer", (SafetyNet, Trainer), about)


def _make_epoch_names() -> type:
    from transformers import TrainerCallback

    class EpochNames(TrainerCallback):
        """Saves at each epoch's end and names it: `checkpoint_epoch_3` -> `checkpoint-48`, a path that loads."""

        def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            saves = getattr(args.save_strategy, "value", args.save_strategy) != "no"
            if saves and float(state.epoch).is_integer():
                control.should_save = True
            return control

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if args.should_save and float(state.epoch).is_integer():
                ck.name_epoch(args.output_dir, int(state.epoch), f"checkpoint-{state.global_step}")

    EpochNames.__module__, EpochNames.__qualname__ = __name__, "EpochNames"
    return EpochNames


_LAZY = {"SafeTrainer": _make_safe_trainer, "EpochNames": _make_epoch_names}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        globals()[name] = _LAZY[name]()
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def train_log(output_dir: str | Path) -> list[dict[str, Any]]:
    """The rows of a run's `train_log.jsonl`: step, epoch, loss, grad_norm, learning_rate. A torn line is dropped."""
    rows = []
    for line in (Path(output_dir) / TRAIN_LOG).read_text().splitlines():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows
