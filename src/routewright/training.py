"""What every training script does the same way: its console, its tracker scalars, the check of `--trainer.*`, which
checkpoints stay, and the final weights beside them."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from routewright.errors import UserError
from routewright.textfiles import nearest

LOG_STEPS, LOG_SECONDS = 25, 30.0  # a console line at least this often

Say = Callable[[str], None]


def console() -> Say:
    """Prints to stderr on rank 0; silent on every other rank."""
    if os.environ.get("RANK", "0") != "0":
        return lambda text: None
    return lambda text: print(text, file=sys.stderr, flush=True)


def check_sizes(given: Mapping[str, Any], least: Mapping[str, int]) -> None:
    """Raise UserError for an option below its least value, or rows per update that the devices cannot share evenly."""
    for name, smallest in least.items():
        if given[name] < smallest:
            raise UserError(f"--{name} must be {smallest} or more; got {given[name]}")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    whole = given["batch_size"] * world
    if given["global_batch_size"] % whole:
        raise UserError(f"--global_batch_size {given['global_batch_size']} is no multiple of batch_size x devices = "
                        f"{given['batch_size']} x {world} = {whole}; choose one, or another --batch_size")


def check_trainer_names(extra: dict[str, Any], owned: Mapping[str, str],
                        arguments: str = "transformers:TrainingArguments") -> dict[str, Any]:
    """The settings of `--trainer.*`, if the library knows each and none is the script's own. Raises UserError.

    owned: library name -> the script's option for it. arguments: module:class of the library's settings.
    """
    if not extra:
        return extra
    import importlib
    from dataclasses import fields

    quiet_libraries()
    module, _, cls = arguments.partition(":")
    known = {f.name: f for f in fields(getattr(importlib.import_module(module), cls)) if f.init}
    for name, value in extra.items():
        if name in owned:
            raise UserError(f"--trainer.{name}: this script sets it; use --{owned[name]}")
        if name not in known:
            raise UserError(f"--trainer.{name}: {module}.{cls} has no such setting{nearest(name, known)}")
        if value is False and name.endswith("_strategy"):  # a bare `no` is false in YAML
            extra[name] = value = "no"
        default = known[name].default
        number = isinstance(value, (int, float))
        if type(default) in (bool, int, float) and (not number or isinstance(default, bool) != isinstance(value, bool)):
            raise UserError(f"--trainer.{name}: {value!r} is no {type(default).__name__} (its default is {default!r})")
    return extra


def best_by(extra: Mapping[str, Any], measured: Collection[str]) -> dict[str, Any]:
    """The settings that say which checkpoint is best: by `--trainer.metric_for_best_model`, else the first of
    `measured`; a loss should be low, everything else high. Raises UserError for a name that is not measured."""
    name = str(extra.get("metric_for_best_model") or next(iter(measured))).removeprefix("eval_")
    if name not in measured:
        raise UserError(f"--trainer.metric_for_best_model {name}: this run measures {', '.join(measured)}"
                        f"{nearest(name, measured)}")
    return {"metric_for_best_model": name, "greater_is_better": extra.get("greater_is_better", name != "loss")}


def own_settings(arguments: Any, extra: Mapping[str, Any]) -> dict[str, Any]:
    """Of the settings in `--trainer.*` those that only a library's own trainer knows, such as a label smoothing: they
    shape the loss, so a run is resumed with the same ones only."""
    from dataclasses import fields

    from transformers import TrainingArguments

    common = {f.name for f in fields(TrainingArguments)}
    return {name: getattr(arguments, name) for name in extra if name not in common}


@contextmanager
def told_as_user_errors(extra: Mapping[str, Any]) -> Iterator[None]:
    """While a library's trainer is made: what it refuses of the settings in `--trainer.*`, as UserError."""
    try:
        yield
    except (ValueError, TypeError, NotImplementedError, ImportError) as error:
        if not extra or isinstance(error, UserError):
            raise
        given = ", ".join(f"--trainer.{name}" for name in extra)
        told = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"the library's trainer refuses these settings ({given}): {told}") from None


@contextmanager
def unrounded(model: Any) -> Iterator[None]:
    """While TRL makes a trainer: it rounds what is trained over 4-bit weights to bf16, where a step of 5e-5 on a weight
    of .02 is lost; afterwards it is as it came."""
    packed = getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)
    came = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad and packed}
    yield
    for name, parameter in model.named_parameters():
        if name in came:
            parameter.data = came[name].to(parameter.device)


def quiet_libraries() -> None:
    """Leave the console to the run: progress bars per saved file and notes about packages that play no part here."""
    import contextlib
    import io
    import logging

    import torch
    for name in ("bitsandbytes", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else deepspeed, imported by accelerate, warns of a missing GPU
    with contextlib.redirect_stdout(io.StringIO()):
        import transformers.trainer  # noqa: F401 - it prints a line about W&B on import
    from transformers.utils import logging as hf_logging
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()


def make_reporter(tracker: Any, say: Say, on_epoch: Callable[[int], None] | None = None) -> Any:
    """A callback: console lines and tracker scalars from the library's logs; `on_epoch` hears each epoch begin."""
    from transformers import TrainerCallback

    class Reporter(TrainerCallback):
        began = spoke = time.monotonic()
        first_step = 0
        over = False  # what is scored afterwards is not of the last step, and the script tells it itself

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.began = self.spoke = time.monotonic()
            self.first_step = state.global_step
            self.over = False

        def on_train_end(self, *_: Any, **__: Any) -> None:
            self.over = True

        def tell(self, state: Any, words: str) -> None:
            self.spoke = time.monotonic()
            made, left = state.global_step - self.first_step, state.max_steps - state.global_step
            wait = f"  at most {span((self.spoke - self.began) / made * left)} left" if made and left else ""
            say(f"step {state.global_step}/{state.max_steps}  epoch {state.epoch or 0:.2f}  {words}{wait}")

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if time.monotonic() - self.spoke > LOG_SECONDS and not control.should_log:
                self.tell(state, "training")

        def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if time.monotonic() - self.spoke > LOG_SECONDS:
                self.tell(state, "scoring the validation rows")

        def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if on_epoch:
                on_epoch(int(state.epoch or 0))

        def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **_: Any) -> None:
            if not state.is_world_process_zero or not logs or "train_runtime" in logs or self.over:
                return
            shown = {name: value for name, value in logs.items() if is_score(name) and isinstance(value, (int, float))}
            scalars = {f"dev/{k[5:]}" if k.startswith("eval_") else f"train/{k}": v for k, v in shown.items()}
            tracker.log(scalars, step=state.global_step)
            words = "  ".join(f"{k.replace('eval_', 'dev ')} {v:.4g}" for k, v in shown.items() if k != "epoch")
            self.tell(state, words)

    return Reporter()


def last_epochs() -> Any:
    """A callback that names each epoch's checkpoint and keeps the newest `save_total_limit` and the best; the rest is
    deleted."""
    from routewright import checkpoints as ck
    from routewright.trainer import EpochNames

    class LastEpochs(EpochNames):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            super().on_save(args, state, control, **kwargs)
            if args.should_save and args.save_total_limit:
                self.drop_older(Path(args.output_dir), state.best_model_checkpoint, args.save_total_limit)

        def drop_older(self, folder: Path, best: str | None, newest: int) -> None:
            keep = {path.name for _, path in ck.checkpoints(folder)[-newest:]} | ({Path(best).name} if best else set())
            for name, target in ck.epoch_names(folder).items():
                if target.name not in keep:  # its name would keep the checkpoint
                    (folder / name).unlink(missing_ok=True)
                    (folder / f"{name}.json").unlink(missing_ok=True)
            ck.rotate(folder, len(keep), protect=keep)

    return LastEpochs()


def kept_checkpoint(run: Any) -> Path:
    """The checkpoint whose weights a run ends with: the best, or the last for `--trainer.load_best_model_at_end false`.
    It need not be there."""
    if run.args.load_best_model_at_end and run.state.best_model_checkpoint:
        return Path(run.state.best_model_checkpoint)
    return Path(run.args.output_dir) / f"checkpoint-{run.state.global_step}"


def span(seconds: float) -> str:
    """A length of time as a person says it."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def is_score(name: str) -> bool:
    """Whether a figure of the library's logs says something about the model, not about the clock."""
    return not name.endswith(("_runtime", "_per_second", "_time", "flos"))


def weight_files(folder: str | Path) -> list[str]:
    """Names of the weight files of a model or adapter folder."""
    return sorted(file.name for file in Path(folder).glob("*model*.safetensors"))


def save_weights(run: Any, out: Path) -> None:
    """The final weights and the tokenizer beside the checkpoints, in Hugging Face form. Every rank calls it.

    router.json goes first, and whoever writes it does so last: a folder that has it is whole.
    """
    if run.is_world_process_zero():
        (out / "router.json").unlink(missing_ok=True)
        for name in weight_files(out):  # of an earlier run, perhaps in other pieces
            (out / name).unlink()
    run.accelerator.wait_for_everyone()
    run.save_model(str(out))
    if run.is_world_process_zero():
        (out / "training_args.bin").unlink(missing_ok=True)  # a pickle, and nothing reads it
        (out / "README.md").unlink(missing_ok=True)  # peft's empty form of a model card
    run.accelerator.wait_for_everyone()


def is_complete(run: Any, out: Path, *files: str) -> bool:
    """Whether a run that was finished before left all it should: the weights it had chosen, and these files."""
    from routewright.checkpoints import fingerprint

    kept = kept_checkpoint(run)
    if not (run.was_finished and all((out / name).is_file() for name in files)):
        return False
    names = weight_files(kept)
    return bool(names) and names == weight_files(out) and all(
        fingerprint(out / name) == fingerprint(kept / name) for name in names)


def write_router(run: Any, out: Path, kind: str, source: Any, tokenizer: Any, **settings: Any) -> None:
    """Calibrate a trained language model on the outcomes of its `TrainingSet` and write router.json.

    Rank 0 does it, or all ranks together where each holds a part of the weights. Every rank may call it.
    """
    from routewright.routers.llm import write_llm_router

    if not (run.is_world_process_zero() or run.is_deepspeed_enabled or run.is_fsdp_enabled):
        return
    model = run.accelerator.unwrap_model(run.model, keep_fp32_wrapper=False)
    write_llm_router(out, kind=kind, model=model, tokenizer=tokenizer, template=source.template, train=source.table,
                     dev=source.dev_table, **settings)
