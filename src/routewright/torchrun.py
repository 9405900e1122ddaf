"""torchrun and `accelerate launch` with our exit codes.

    python -m routewright.torchrun --standalone --nproc_per_node=2 -- script.py --flags
    accelerate launch --config rtx4060.yaml src/train_dpo.py --flags          (through cmd/bin/accelerate)

Both end with code 1 and a page of traceback whatever their ranks ended with. Launchers go through here, so that a
stopped job ends in 3 and one line, bad input in 2, a machine that lacks something in 4, as a single process does.
`accelerate` also gets the spelling it does not know: `--config` before the script means `--config_file`, and a name
that is not in the current folder is looked for among the project's profiles.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from routewright.errors import MissingSetup, UserError

GO_ON = "run the same line again to go on from the last checkpoint"
# They retell each end below the sentence that explains it; LOGLEVEL in the environment brings them back.
CHATTY = ("torch.distributed.elastic.multiprocessing.api", "torch.distributed.elastic.agent.server.api")
PROFILES = Path(__file__).resolve().parents[2] / "accelerate_configs"


def run(argv: Sequence[str]) -> int:
    """Run torchrun's command line. Returns the exit code: 0, the code of the rank that explains the end, or 1."""
    from torch.distributed.run import main

    return _ending(lambda: main(list(argv)))


def _ending(launch: Callable[[], Any]) -> int:
    """The exit code of a job whose ranks are started by `launch`; at most one line on stderr."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # A restarted worker must not meet the store of the job before it.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    for name in CHATTY if "LOGLEVEL" not in os.environ else ():
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        launch()
        return 0
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        codes = {f.exitcode for f in error.failures.values()}
        known = [code for code in (3, 2, 4) if code in codes]  # that rank has told its sentence already
        if known and 1 not in codes:  # a defect of ours is not cured by running the line again
            return known[0]
        how, cure = ((failure.signal_name(), GO_ON) if failure.exitcode < 0 else
                     (f"code {failure.exitcode}", "its message stands above"))
        print(f"error: rank {rank} ended with {how}; all ranks were stopped, {cure}", file=sys.stderr)
        return 1
    except SignalException as error:
        print(f"stopped by {error.sigval.name}; {GO_ON}", file=sys.stderr)
        return 3
    except subprocess.CalledProcessError as error:  # accelerate's way with one process, which has told why
        if error.returncode >= 0:
            return error.returncode
        print(f"error: the script ended with {signal.Signals(-error.returncode).name}; {GO_ON}", file=sys.stderr)
        return 1


# ---- accelerate -----------------------------------------------------------------------------------------------------

def accelerate(argv: Sequence[str]) -> int:
    """Run accelerate's command line with its profile spelt as it wants it. Returns the exit code."""
    words = list(argv)
    if importlib.util.find_spec("accelerate") is None:
        print(f"error: accelerate is not installed for {sys.executable}; run cmd/setup.sh, then . cmd/env.sh",
              file=sys.stderr)
        return MissingSetup.exit_code
    if words[:1] == ["launch"] and any(word.startswith("--config") for word in words):
        from accelerate.commands.launch import launch_command_parser

        takes_value = {flag: action.nargs is None for action in launch_command_parser()._actions
                       for flag in action.option_strings}
        try:
            words[1:] = spelt(words[1:], takes_value)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return error.exit_code
    from accelerate.commands.accelerate_cli import main

    if words[:1] == ["launch"]:
        # The script writes its checkpoint on a signal; the launcher passes it on and waits for that. torchrun's agent,
        # which accelerate uses for several processes, puts its own handlers in the place of these.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _pass_on)
    sys.argv = ["accelerate", *words]
    return _ending(main)


def spelt(words: Sequence[str], takes_value: Mapping[str, bool], profiles: Path = PROFILES) -> list[str]:
    """The words after `accelerate launch` with `--config X` as `--config_file PATH`; those of the script are untouched.

    takes_value: {option of accelerate launch: whether a value follows}; it tells where the script's name stands.
    Raises UserError where there is no such profile.
    """
    made: list[str] = []
    at = 0
    while at < len(words):
        word = words[at]
        flag, equals, value = word.partition("=")
        if not word.startswith("-") or word == "--":
            break
        at += 1
        if flag not in ("--config", "--config_file", "--config-file"):
            # An unknown option is accelerate's to refuse; its value is taken along, so that nothing is misread.
            more = not equals and takes_value.get(flag, False)
            made += words[at - 1:at + more]
            at += more
            continue
        if not equals:
            if at == len(words):
                raise UserError(f"{flag} names no profile; {_known(profiles)}")
            value = words[at]
            at += 1
        made += ["--config_file", find_profile(value, profiles)]
    return [*made, *words[at:]]


def find_profile(name: str, profiles: Path = PROFILES) -> str:
    """The path of a profile: as given; else by its name, with or without .yaml, among the project's. UserError."""
    if Path(name).is_file():
        return name
    bare = Path(name).name
    for path in (profiles / bare, profiles / f"{bare}.yaml"):
        if path.is_file() and Path(name).parent in (Path(), Path(profiles.name)):
            return str(path)
    raise UserError(f"{name}: no such launch profile; {_known(profiles)}")


def _known(profiles: Path) -> str:
    return f"{profiles} has {', '.join(sorted(path.name for path in profiles.glob('*.yaml')))}"


def _pass_on(number: int, frame: Any) -> None:
    """Hand a signal to the processes this one started. Ctrl-C reaches them by itself, from the terminal."""
    if number == signal.SIGINT:
        return
    with contextlib.suppress(OSError):
        for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
            os.kill(int(pid), number)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
