"""Reading and writing text files so that a mistake names its file and line, and a crash leaves the old file.

One reader for JSON lines, one for YAML, one atomic writer: every stage uses these.
"""

from __future__ import annotations

import difflib
import gzip
import io
import json
import os
import re
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from routewright.errors import UserError

DAMAGED_GZIP = (EOFError, gzip.BadGzipFile, zlib.error)


def nearest(name: str, known: Iterable[str]) -> str:
    """' (did you mean X?)' or ''."""
    close = difflib.get_close_matches(name, [str(k) for k in known], n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


def need_file(path: str | Path) -> Path:
    """The path, if it is a readable file. Raises UserError that names the nearest existing file."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: is a folder; a file is needed here")
    if not path.is_file():
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"{path}: no such file{nearest(path.name, beside)}")
    return path


def open_text(path: str | Path) -> io.TextIOBase:
    """A UTF-8 text reader; .gz is unpacked on the way."""
    path = need_file(path)
    if path.suffix == ".gz":
        return io.TextIOWrapper(gzip.open(path, "rb"), encoding="utf-8-sig")
    return open(path, encoding="utf-8-sig")


def read_jsonl(path: str | Path,
               on_bad: Callable[[UserError], None] | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of each line. Blank lines are passed over.

    Raises UserError at the first line that is no JSON object: torn lines, bad UTF-8, duplicate keys, NaN. With `on_bad`
    that error is handed over instead, and reading goes on unless `on_bad` raises. A damaged gzip file always raises,
    and so does an empty file: nothing downstream can use it.
    """
    number = 0
    seen = False
    try:
        with open_text(path) as reader:
            # Bytes are decoded line by line: a text reader decodes ahead, and would name the wrong line.
            for number, raw in enumerate(reader.buffer, 1):
                where = f"{path}:{number}"
                try:
                    line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                    if not line.strip():
                        continue
                    seen = True
                    row = parse_row(line, where, torn=not line.endswith("\n"))
                except (UserError, UnicodeDecodeError) as error:
                    seen = True
                    named = error if isinstance(error, UserError) else damage(error, where)
                    if on_bad is None:
                        raise named from None
                    on_bad(named)
                else:
                    yield number, row
    except DAMAGED_GZIP as error:
        raise damage(error, f"{path}:{number + 1}") from None
    if not seen:
        raise UserError(f"{path}: the file is empty; one JSON object per line is needed")


def damage(error: Exception, where: str) -> UserError:
    """The sentence for bytes that cannot be read: UnicodeDecodeError, or one of DAMAGED_GZIP."""
    if isinstance(error, UnicodeDecodeError):
        return UserError(f"{where}: not valid UTF-8 ({error.reason} at byte {error.start}); re-save the file as UTF-8")
    return UserError(f"{where}: the gzip file is damaged or cut short ({error}); fetch or write it again")


def parse_row(line: str, where: str, torn: bool = False) -> dict[str, Any]:
    """The object of one JSON line. Raises UserError that starts with `where`; `torn` says that the line has no end."""
    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) != len(items):
            keys = [k for k, _ in items]
            twice = next(k for k in keys if keys.count(k) > 1)
            raise UserError(f"{where}: key {twice!r} stands twice in one object; keep one")
        return found

    def constant(name: str) -> Any:
        raise UserError(f"{where}: {name} is no JSON number; write null or leave the field out")

    try:
        row = json.loads(line, object_pairs_hook=pairs, parse_constant=constant)
    except json.JSONDecodeError as error:
        hint = "the last line is cut off; remove it or write the file again" if torn else "fix or remove the line"
        raise UserError(f"{where}: not JSON ({error.msg} at column {error.colno}: {line[:60].strip()!r}); "
                        f"{hint}") from None
    except UserError:
        raise
    except ValueError as error:  # a whole number of thousands of digits
        raise UserError(f"{where}: not readable ({error}); fix or remove the line") from None
    except RecursionError:
        raise UserError(f"{where}: nested too deeply to be a row; remove the line") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected a JSON object, got {type(row).__name__}; each line is one {{...}}")
    return row


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML mapping. Numbers such as 1e-5 are read as numbers (plain PyYAML gives text). Raises UserError."""
    try:
        text = need_file(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not valid UTF-8 ({error.reason})") from None
    raw = parse_yaml(text, str(path))
    if raw is None:
        raise UserError(f"{path}: the file is empty; a mapping of keys is needed")
    if not isinstance(raw, dict):
        raise UserError(f"{path}: expected a mapping of keys, got {type(raw).__name__}")
    return raw


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text, with 1e-5 as a number. Raises UserError that starts with `where`."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    # YAML 1.1 wants a dot in a float; people write 1e-5.
    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9]+)[eE][-+]?[0-9]+$"), list("-+0123456789."))

    def mapping(loader: yaml.SafeLoader, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = loader.construct_object(key_node, deep=True)
            place = f"{where}:{key_node.start_mark.line + 1}"
            if isinstance(key, (list, dict)):
                raise UserError(f"{place}: a {type(key).__name__} cannot be a key; write a name")
            if key in seen:
                raise UserError(f"{place}: key {key!r} stands twice; keep one")
            seen.add(key)
        return yaml.SafeLoader.construct_mapping(loader, node, deep)

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    try:
        return yaml.load(text, Loader)  # noqa: S506 - Loader is a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{where}{line}: not YAML ({getattr(error, 'problem', error)})") from None
    except (ValueError, RecursionError) as error:  # 2026-13-45 as a date, or a thousand brackets
        if isinstance(error, UserError):
            raise
        raise UserError(f"{where}: not YAML ({error})") from None


def check_keys(raw: dict[str, Any], required: Sequence[str], optional: Sequence[str], where: str) -> None:
    """Every required key present, no key unknown. Raises UserError with the nearest known name."""
    known = [*required, *optional]
    for key in raw:
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}{nearest(str(key), known)}; "
                            f"known: {', '.join(dict.fromkeys(known))}")
    for key in required:
        if key not in raw:
            raise UserError(f"{where}: `{key}` is missing")


def write_atomic(path: str | Path, data: str | bytes | Callable[[Any], None]) -> Path:
    """Write a whole file or leave the old one: temporary file beside it, fsync, rename.

    `data` is the text, the bytes, or a function that writes into the open binary file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            if callable(data):
                data(file)
            else:
                file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes it private
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)
    return path


def fsync_folder(folder: str | Path) -> None:
    """Make a rename in this folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: str | Path, value: Any) -> Path:
    """Sorted, indented, no NaN: two equal runs give equal bytes."""
    return write_atomic(path, json.dumps(value, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n")


def write_jsonl(path: str | Path, rows: Iterable[dict[str, Any]]) -> Path:
    """One object per line; .gz is packed, with no time stamp so that equal rows give equal bytes."""
    def write(file: Any) -> None:
        packed = gzip.GzipFile(filename="", fileobj=file, mode="wb", mtime=0) if str(path).endswith(".gz") else None
        target = packed or file
        for row in rows:
            line = json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
            # Half of a surrogate pair, as cut answers hold, goes back to the escape it was read from.
            target.write(line.encode("utf-8", "backslashreplace"))
        if packed:
            packed.close()

    return write_atomic(path, write)


def check_present(row: Mapping[str, Any], name: str, needed: Sequence[str], where: str) -> None:
    """Raise UserError that starts with `where` unless the row has this field; names the nearest one it has instead."""
    if name not in row:
        close = nearest(name, [k for k in row if k not in needed])
        raise UserError(f"{where}: `{name}` is missing{close}; a row needs {', '.join(needed)}")


def check_row_text(value: Any, name: str, where: str) -> None:
    """Raise UserError that starts with `where` unless a row's field is a text that a tokenizer can read."""
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: `{name}` must be a text that is not empty; got {short(value)}")
    if any("\ud800" <= c <= "\udfff" for c in value):
        raise UserError(f"{where}: `{name}` holds half of a surrogate pair, which no tokenizer can read; fix or "
                        "remove the row")


def short(value: Any) -> str:
    """A value as an error message quotes it: its type and the start of its text."""
    text = repr(value)
    return f"{type(value).__name__} {text[:40]}{'...' if len(text) > 40 else ''}"
