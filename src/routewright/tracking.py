"""W&B runs behind one small object, so that no caller ever writes `if use_wandb`.

`start(...)` returns a `Tracker`: online when a key is present, offline when there is none, and a `Silent` one with the
same methods when tracking is off, on ranks other than 0, or where wandb is not installed. An offline run is shown
in the terminal by one command, printed when the run ends: `wandb leet FOLDER`.

Nothing secret is recorded: wandb stores the raw command line by default, outside of the config that it redacts, so
its metadata and code capture are switched off, and config entries that are named like keys, or that hold the value
of one, are masked.
"""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from routewright.errors import UserError

MODES = ("auto", "online", "offline", "off")
_SECRET_NAME = re.compile(r"(^|[_.-])(api[_-]?keys?|secret|password|passwd|credentials?|"
                          r"(hf|access|auth|bearer)[_-]?token)($|[_.-])", re.IGNORECASE)
_SECRET_VARIABLE = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD)$")


class Silent:
    """A tracker that does nothing. Its methods are the contract of every tracker."""

    folder: Path | None = None
    mode = "off"

    def log(self, scalars: Mapping[str, Any], step: int | None = None) -> None:
        """Record numbers. Entries that are None, NaN or infinite are left out."""

    def define(self, names: str, step: str) -> None:
        """Draw the metrics that match `names` (such as "frontier/*") over the metric `step`, not the step count."""

    def summary(self, values: Mapping[str, Any]) -> None:
        """The values that stand for the whole run."""

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table, one row a sequence of plain values."""

    def image(self, name: str, path: str | Path, caption: str = "") -> None:
        """A PNG file."""

    def artifact(self, name: str, kind: str, paths: Sequence[str | Path],
                 metadata: Mapping[str, Any] | None = None) -> None:
        """Files that belong together, versioned under `name`. `kind` is W&B's artifact type."""

    def finish(self, exit_code: int = 0) -> None:
        """End the run. Safe to call twice."""

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self.finish(1 if kind else 0)


class Tracker(Silent):
    """A W&B run, online or offline."""

    def __init__(self, run: Any, mode: str) -> None:
        self.run = run
        self.mode = mode
        self.folder = Path(run.settings.sync_dir)

    def log(self, scalars: Mapping[str, Any], step: int | None = None) -> None:
        kept = {k: v for k, v in scalars.items() if _loggable(v)}
        if kept:
            self.run.log(kept, step=step)

    def define(self, names: str, step: str) -> None:
        self.run.define_metric(step)
        self.run.define_metric(names, step_metric=step)

    def summary(self, values: Mapping[str, Any]) -> None:
        self.run.log({}, commit=True)  # the newest row is held back until the next step, and would overwrite these
        self.run.summary.update({k: v for k, v in values.items() if _loggable(v) or isinstance(v, str)})

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        import wandb

        # Every column may hold a gap (a model that recorded no latency), hence the mixed types.
        self.run.log({name: wandb.Table(columns=list(columns), data=[list(r) for r in rows], allow_mixed_types=True)})

    def image(self, name: str, path: str | Path, caption: str = "") -> None:
        import wandb

        self.run.log({name: wandb.Image(str(path), caption=caption or None)})

    def artifact(self, name: str, kind: str, paths: Sequence[str | Path],
                 metadata: Mapping[str, Any] | None = None) -> None:
        import wandb

        made = wandb.Artifact(re.sub(r"[^A-Za-z0-9._-]", "-", name), type=kind, metadata=dict(metadata or {}))
        for path in map(Path, paths):
            made.add_dir(str(path)) if path.is_dir() else made.add_file(str(path))
        self.run.log_artifact(made)

    def finish(self, exit_code: int = 0) -> None:
        if self.run is None:
            return
        url = self.run.url if self.mode == "online" else None
        self.run.finish(exit_code=exit_code)
        self.run = None
        if self.mode == "offline":
            print(f"W&B: recorded offline; see it with: wandb leet {self.folder}", flush=True)
        elif url:
            print(f"W&B: {url}", flush=True)


def start(project: str, name: str, folder: str | Path, config: Mapping[str, Any] | None = None, *, mode: str = "auto",
          job_type: str = "", group: str = "", tags: Sequence[str] = ()) -> Silent:
    """Begin a run; its files lie under `folder`/wandb.

    `mode`: auto is online when a key is present and offline otherwise; WANDB_MODE in the environment wins over auto
    and may only lower it (offline, disabled). Raises UserError for another mode, or for online without a key.
    """
    mode = check_mode(mode)
    if mode == "off" or os.environ.get("RANK", "0") != "0":
        return Silent()
    try:
        import wandb
    except ImportError:
        print("W&B: not installed, nothing is tracked; pip install wandb", file=sys.stderr)
        return Silent()
    Path(folder).mkdir(parents=True, exist_ok=True)
    try:
        return Tracker(_begin(wandb, project, name, folder, config, mode, job_type, group, tags), mode)
    except (wandb.Error, OSError) as error:
        if mode != "online":
            raise
        print(f"W&B: the server was not reached ({type(error).__name__}); recording offline", file=sys.stderr)
        wandb.teardown()
        return Tracker(_begin(wandb, project, name, folder, config, "offline", job_type, group, tags), "offline")


def _begin(wandb: Any, project: str, name: str, folder: str | Path, config: Mapping[str, Any] | None, mode: str,
           job_type: str, group: str, tags: Sequence[str]) -> Any:
    settings = wandb.Settings(x_disable_meta=True, save_code=False, disable_code=True, disable_git=True,
                              disable_job_creation=True, console="off", silent=True, init_timeout=20)
    return wandb.init(project=project, name=name or None, dir=str(folder), config=masked(dict(config or {})), mode=mode,
                      job_type=job_type or None, group=group or None, tags=list(tags) or None, settings=settings)


def check_mode(asked: str) -> str:
    """What an asked mode comes to on this machine: online, offline or off. Raises UserError."""
    if asked not in MODES:
        raise UserError(f"wandb mode {asked!r} is not one of {', '.join(MODES)}")
    environment = os.environ.get("WANDB_MODE", "").lower()
    if asked == "off" or environment == "disabled":
        return "off"
    if asked == "offline" or (environment in ("offline", "dryrun") and asked == "auto"):
        return "offline"
    if has_key():
        return "online"
    if asked == "online":
        raise UserError("wandb mode online needs a key; set WANDB_API_KEY or run `wandb login`, or use --wandb offline")
    return "offline"


def dev_names(scores: Mapping[str, Any]) -> dict[str, Any]:
    """Scores of the weights that were kept under the names of the training's own curves: `dev/` before each, but for
    `share/...` and `collapse/...`, so that the summary shows the kept weights and not the last step."""
    return {name if name.startswith(("share/", "collapse/")) else f"dev/{name}": value
            for name, value in scores.items()}


def has_key() -> bool:
    """Whether a W&B key is set in the environment or in the netrc file. The key itself is never returned or shown."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    import netrc

    host = re.sub(r"^https?://|/.*$", "", os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    for file in (os.environ.get("NETRC"), "~/.netrc", "~/_netrc"):
        try:
            if file and netrc.netrc(os.path.expanduser(file)).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def masked(value: Any, name: str = "") -> Any:
    """The value with its secrets replaced by "***": by the name of the key, or as the value of a key variable."""
    if isinstance(value, Mapping):
        return {str(k): masked(v, str(k)) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [masked(v, name) for v in value]
    if not isinstance(value, str) or not value:
        return value
    if _SECRET_NAME.search(name):
        return "***"
    for variable, secret in os.environ.items():
        if _SECRET_VARIABLE.search(variable) and len(secret) >= 8 and secret in value:
            value = value.replace(secret, "***")
    return value


def masked_command(argv: Sequence[str]) -> str:
    """A command line to show, with the values of options that are named like keys replaced by "***"."""
    import shlex

    shown: list[str] = []
    for word in argv:
        name, given, _ = word.partition("=")
        if shown and "=" not in shown[-1] and shown[-1].startswith("--") and _SECRET_NAME.search(shown[-1]):
            word = "***"
        elif given and name.startswith("--") and _SECRET_NAME.search(name):
            word = f"{name}=***"
        shown.append(masked(word))
    return shlex.join(shown)


def _loggable(value: Any) -> bool:
    return hasattr(value, "__float__") and not isinstance(value, str) and math.isfinite(float(value))
