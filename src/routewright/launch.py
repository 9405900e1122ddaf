"""The Fire door: every script's `main` is called through here, and only with arguments that were checked first.

Plain Fire runs the function and complains of a misspelt flag afterwards, reads `--fp16 false` as a true text, and
hands `5e-7` from YAML over as text. `launch(main)` reads an optional `--config file.yaml`, then the flags (flags
win; `--trainer.learning_rate 5e-7` reaches into a mapping), checks every name and every type against main's
signature, prints what was resolved, and only then starts the work. Errors end in one sentence and an exit code:
0 done, 1 a defect of ours, 2 bad input (nothing was written), 3 stopped half-way and resumable, 4 the machine lacks
something, 130 interrupted.
"""

from __future__ import annotations

import inspect
import math
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from routewright.errors import MissingSetup, PartialRun, UserError
from routewright.textfiles import nearest, parse_yaml, read_yaml, write_atomic

_OWN = {"config": "a YAML file with any of the options above; flags win over it", "debug": "show tracebacks"}
_YES, _NO = {"true", "yes", "on", "1"}, {"false", "no", "off", "0"}


@dataclass(frozen=True)
class Option:
    """One parameter of main: its name, type, default, help text and the heading it stands under."""

    name: str
    kind: Any
    default: Any
    help: str
    group: str

    @property
    def required(self) -> bool:
        return self.default is inspect.Parameter.empty


def launch(main: Callable[..., Any], argv: Sequence[str] | None = None) -> None:
    """Run `main` with the options of the command line and exit with the right code. Never returns."""
    sys.exit(run(main, sys.argv[1:] if argv is None else list(argv)))


def run(main: Callable[..., Any], argv: list[str]) -> int:
    """What `launch` does, with the exit code as its value: the testable half."""
    first_rank = os.environ.get("RANK", "0") == "0"
    speaks = os.environ.get("LOCAL_RANK", "0") == "0"  # on every node one rank tells of errors
    debug = "--debug" in argv or bool(os.environ.get("ROUTEWRIGHT_DEBUG"))
    if not first_rank:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    options = read_options(main)
    resolved: dict[str, Any] = {}
    try:
        if any(word in ("-h", "--help") for word in argv):
            if first_rank:
                print(help_text(main, options), flush=True)
            return 0
        try:
            resolved, source = resolve(options, argv)
            if first_rank:
                print(_resolved_text(options, resolved, source), file=sys.stderr, flush=True)
            _check_folder(resolved.get("output_dir"))
            main(**resolved)
        except BaseException as error:
            if not isinstance(error, (UserError, MissingSetup)):
                _save(resolved, first_rank)
            raise
        _save(resolved, first_rank)
        sys.stdout.flush()  # here, where a reader that has left is no traceback
        return 0
    except (UserError, PartialRun, MissingSetup) as error:
        what = "stopped" if isinstance(error, PartialRun) else "error"
        return _tell(f"{what}: {error}", error.exit_code, speaks, debug)
    except KeyboardInterrupt:
        return _tell("interrupted", 130, speaks, debug)
    except BrokenPipeError:  # the reader of our output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:  # a defect of ours: one line, and the way to the rest
        frame = _last_frame(error)
        return _tell(f"internal error: {type(error).__name__}: {error} (at {frame}); run again with --debug for the "
                     "traceback", 1, True, debug)


def _tell(message: str, code: int, speaks: bool, debug: bool) -> int:
    if speaks:
        if debug:
            import traceback
            traceback.print_exc()
        print(message, file=sys.stderr, flush=True)
    return code


def _last_frame(error: BaseException) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "unknown" if trace is None else f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"


def _check_folder(output_dir: str | None) -> None:
    """Raise UserError where the output folder cannot come to be, before hours of work are spent on it."""
    if not output_dir:
        return
    path = Path(output_dir).absolute()
    there = next(p for p in (path, *path.parents) if p.exists())
    if not there.is_dir():
        raise UserError(f"--output_dir {output_dir}: {there} is a file; name a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"--output_dir {output_dir}: {there} cannot be written; name another folder")


def _save(resolved: dict[str, Any], first_rank: bool) -> None:
    """Leave config.resolved.yaml in the run folder, so that the run can be repeated with --config."""
    folder = resolved.get("output_dir")
    if folder and first_rank and Path(folder).is_dir():
        import yaml
        text = yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True)
        write_atomic(Path(folder) / "config.resolved.yaml", text)


# ---------------------------------------------------------------- what main offers

def read_options(main: Callable[..., Any]) -> dict[str, Option]:
    """The options of a main function, in order, with the comments of its signature as help."""
    hints = typing.get_type_hints(main)
    notes = _signature_notes(main)
    found = {}
    for name, parameter in inspect.signature(main).parameters.items():
        assert parameter.kind is parameter.KEYWORD_ONLY, f"{main.__module__}.main: {name} must be keyword-only"
        assert name in hints and name not in _OWN, f"{main.__module__}.main: {name} needs a type, and is not reserved"
        help_line, group = notes.get(name, ("", ""))
        found[name] = Option(name, hints[name], parameter.default, help_line, group)
    return found


def _signature_notes(main: Callable[..., Any]) -> dict[str, tuple[str, str]]:
    """name -> (help, group). A comment of up to three words alone on its line is a heading; other comments belong
    to the parameter on their line or below them."""
    notes: dict[str, tuple[str, str]] = {}
    group, above = "", []
    lines = inspect.getsource(main).splitlines()
    start = next(i for i, line in enumerate(lines) if line.lstrip().startswith("def "))
    for line in lines[start + 1:]:
        text = line.strip()
        if text.startswith(")"):
            break
        if text.startswith("#"):
            note = text.lstrip("# ").strip()
            if re.fullmatch(r"[A-Z][\w-]*( [\w-]+){0,2}", note) and not above:
                group = note
            else:
                above.append(note)
            continue
        match = re.match(r"(\w+)\s*:", text)
        if match:
            beside = text.split("  # ", 1)[1].strip() if "  # " in text else ""
            notes[match[1]] = (" ".join([*above, beside]).strip(), group)
            above = []
    return notes


def help_text(main: Callable[..., Any], options: dict[str, Option]) -> str:
    """The help a person can read: what the script does, then every option with its type, default and meaning."""
    doc = inspect.getdoc(main) or sys.modules[main.__module__].__doc__ or ""
    script = Path(sys.argv[0]).name
    lines = [f"{script}: {doc.strip()}", "", f"usage: python {script} [--config FILE.yaml] [--option value ...]"]
    group = None
    for option in options.values():
        if option.group != group:
            group = option.group
            lines += ["", f"{group}:"]
        default = "required" if option.required else f"default {_show(option.default)}"
        lines += _wrapped(f"  --{option.name}", f"{_kind_name(option.kind)}, {default}. {option.help}".strip())
    lines += ["", "Always:"]
    for name, text in _OWN.items():
        lines += _wrapped(f"  --{name}", text)
    return "\n".join(lines)


def _wrapped(head: str, text: str) -> list[str]:
    import textwrap

    body = textwrap.wrap(text, 92)
    indent = " " * 28
    lines = [f"{head:<27} {body[0]}"] if len(head) < 28 else [head, indent + body[0]]
    return lines + [indent + line for line in body[1:]]


def _kind_name(kind: Any) -> str:
    if kind is types.NoneType:
        return "none"
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_kind_name(k) for k in typing.get_args(kind))
    if origin is typing.Literal:
        return "|".join(str(v) for v in typing.get_args(kind))
    if origin is list:
        return f"list of {_kind_name(typing.get_args(kind)[0])}"
    return {str: "text", int: "whole number", float: "number", bool: "true|false", list: "list",
            dict: "mapping"}.get(origin or kind, str(kind))


def _show(value: Any) -> str:
    return '""' if value == "" else "none" if value is None else str(value)


def _resolved_text(options: dict[str, Option], resolved: dict[str, Any], source: dict[str, str]) -> str:
    width = max((len(name) for name in options), default=0)
    origin = {name: "" if source[name] == "default" else f"  ({source[name]})" for name in options}
    return "\n".join(f"{name:<{width}}  {_show(resolved[name])}{origin[name]}" for name in options)


# ---------------------------------------------------------------- what the user gave

def resolve(options: dict[str, Option], argv: list[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """(value per option, where it came from: default, file or flag). Raises UserError before anything starts."""
    flags = _parse_flags(options, argv)
    values = {o.name: dict(o.default) if isinstance(o.default, dict) else o.default for o in options.values()}
    source = dict.fromkeys(options, "default")
    if "config" in flags:
        file = flags.pop("config")
        for key, value in read_yaml(file).items():
            where = f"{file}: {key}"
            if key not in options:
                raise UserError(f"{file}: unknown key {key!r}{nearest(str(key), options)}; --help lists the options")
            values[key] = _from_yaml(value, options[key].kind, where)
            source[key] = "file"
    flags.pop("debug", None)
    for name, text in flags.items():
        head, _, inner = name.partition(".")
        if inner:
            target = values[head] = dict(values[head] or {})
            *path, last = inner.split(".")
            for step in path:
                target[step] = dict(target.get(step) or {})
                target = target[step]
            target[last] = _yaml_value(text, f"--{name}")
        else:
            values[head] = _from_text(text, options[head].kind, f"--{name}")
        source[head] = "flag"
    for option in options.values():
        if values[option.name] is inspect.Parameter.empty:
            raise UserError(f"--{option.name} is needed ({option.help or _kind_name(option.kind)})")
    return values, source


def _parse_flags(options: dict[str, Option], argv: list[str]) -> dict[str, str]:
    """Flag -> text. Names are checked here; the split into flags and values is Fire's."""
    known = [*options, *_OWN]
    words = list(argv)
    checked: list[str] = []
    seen: set[str] = set()
    at = 0
    while at < len(words):
        word = words[at]
        at += 1
        if not word.startswith("--") or word == "--":
            first = next(iter(options), "config")
            raise UserError(f"{word!r} stands alone; every value needs its flag, as in --{first} {word}")
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        head, _, inner = name.partition(".")
        if head not in known and head.startswith("no") and head[2:].lstrip("_") in options and not equals:
            head = name = head[2:].lstrip("_")
            equals, value = "=", "false"
        if head not in known:
            raise UserError(f"unknown option --{head}{nearest(head, known)}; --help lists the options")
        if inner and not (head in options and _takes(options[head].kind, dict)):
            raise UserError(f"--{head} holds one value, so --{name} means nothing")
        if not equals:
            flagged = head == "debug" or (head in options and not inner and _takes(options[head].kind, bool))
            has_value = at < len(words) and not words[at].startswith("--")
            if not has_value and not flagged:
                raise UserError(f"--{name} has no value")
            if has_value and (not flagged or words[at].lower() in _YES | _NO):
                value = words[at]
                at += 1
            else:
                value = "true"
        if name in seen:
            raise UserError(f"--{name} is given twice; keep one")
        seen.add(name)
        checked.append(f"--{name}={value}")
    return _through_fire(checked)


def _through_fire(checked: list[str]) -> dict[str, str]:
    import fire
    from fire.decorators import SetParseFn

    @SetParseFn(str)  # values stay text: main's signature decides their types, not their looks
    def collect(**flags: str) -> _Plan:
        return _Plan(flags)

    # A dot in a flag is no Python name for Fire's help machinery, but it is a plain key for its parser.
    plan = fire.Fire(collect, command=checked, serialize=lambda _: [])
    return plan._flags


class _Plan:
    """What Fire returns. It has no public member, so Fire has nothing to walk into."""

    def __init__(self, flags: dict[str, str]) -> None:
        self._flags = flags


def _takes(kind: Any, wanted: type) -> bool:
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return any(_takes(k, wanted) for k in typing.get_args(kind))
    return (origin or kind) is wanted


def _yaml_value(text: str, where: str) -> Any:
    """A scalar, list or mapping written on the command line, with 5e-7 as a number at any depth."""
    try:
        return parse_yaml(text, where)
    except UserError:
        raise UserError(f"{where}: {text!r} is not a value (lists are [a, b], mappings {{a: 1}})") from None


def _from_text(text: str, kind: Any, where: str) -> Any:
    """A flag's text as the type of its option. Raises UserError with the text and the type."""
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        members = typing.get_args(kind)
        if types.NoneType in members and text.lower() in ("none", "null"):
            return None
        errors = []
        # Numbers before text: `int | str` reads 3 as a number and "auto" as text.
        for member in sorted((m for m in members if m is not types.NoneType), key=lambda m: m is str):
            try:
                return _from_text(text, member, where)
            except UserError as error:
                errors.append(error)
        raise errors[0]
    if origin is typing.Literal:
        for choice in typing.get_args(kind):
            if str(choice) == text:
                return choice
        choices = [str(c) for c in typing.get_args(kind)]
        raise UserError(f"{where}: {text!r} is not one of {', '.join(choices)}{nearest(text, choices)}")
    if kind is str:
        return text
    if kind is bool:
        if text.lower() in _YES | _NO:
            return text.lower() in _YES
        raise UserError(f"{where}: {text!r} is neither true nor false")
    if kind in (int, float):
        try:
            number = kind(text.replace("_", ""))
        except ValueError:
            raise UserError(f"{where}: {text!r} is not a {_kind_name(kind)}") from None
        return _finite(number, where)
    if (origin or kind) is list:
        value = _yaml_value(text if text.startswith("[") else f"[{text}]", where)
        return _from_yaml(value, kind, where)
    if (origin or kind) is dict:
        return _from_yaml(_yaml_value(text, where), kind, where)
    raise AssertionError(f"{where}: options of type {kind} are not supported")


def _finite(number: float, where: str) -> float:
    """No option wants nan or inf, and both pass every test of the kind `x < 0`."""
    if not math.isfinite(number):
        raise UserError(f"{where}: {number} is no finite number")
    return number


def _from_yaml(value: Any, kind: Any, where: str) -> Any:
    """A YAML value checked against the type of its option. Raises UserError with the value and the type."""
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        members = typing.get_args(kind)
        if value is None and types.NoneType in members:
            return None
        for member in members:
            try:
                return _from_yaml(value, member, where)
            except UserError:
                continue
    elif origin is typing.Literal:
        if value in typing.get_args(kind):
            return value
        if isinstance(value, (int, float, bool)) and str(value) in typing.get_args(kind):
            return str(value)
    elif (origin or kind) is list and isinstance(value, list):
        inner = typing.get_args(kind)
        if not inner:
            return value
        if inner[0] is str:  # list members such as 0.5 or no are meant as they are written
            if all(isinstance(v, (str, int, float)) and not isinstance(v, bool) for v in value):
                return [str(v) for v in value]
        else:
            return [_from_yaml(v, inner[0], f"{where}[{i}]") for i, v in enumerate(value)]
    elif (origin or kind) is dict and isinstance(value, dict):
        return value
    elif kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return _finite(float(value), where)
    elif kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    elif kind in (str, int, bool) and type(value) is kind:
        return value
    hint = "; put it in quotes" if kind is str and value is not None else ""
    raise UserError(f"{where}: {value!r} is not a {_kind_name(kind)}{hint}")
