"""Checkpoint folders that are whole or not there: written aside, synced, sealed with a manifest, then renamed.

A training run leaves `checkpoint-<step>` folders. The stock Trainer takes the newest one, whole or not, and fails on
it; here a folder counts only when its `manifest.json` (written last) agrees with every file beside it. What does not
agree is set aside under another name, with the damaged file named, and the one before it is used.

    with staged_folder("data/runs/deberta/final", kind="deberta") as folder:
        model.save_pretrained(folder)                  # the name appears only when everything is on disk
    found = newest_verified("data/runs/deberta")       # Checkpoint(path, manifest) or None

Nothing here imports torch, so the rules can be tested (and a run folder inspected) in milliseconds.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from routewright.errors import UserError
from routewright.textfiles import fsync_folder, write_atomic, write_json

MANIFEST = "manifest.json"
_NAME = re.compile(r"^checkpoint-(\d+)$")
_EPOCH_NAME = re.compile(r"^checkpoint_epoch_(\d+)(\.json)?$")


class DamagedFolder(UserError):
    """A folder that disagrees with its manifest; `file` names the first file that does."""

    def __init__(self, folder: Path, file: str, what: str) -> None:
        super().__init__(f"{folder / file}: {what}; resume from another checkpoint or start anew with --resume none")
        self.folder, self.file, self.what = folder, file, what


@dataclass(frozen=True)
class Checkpoint:
    """A verified folder and what its manifest says about it."""

    path: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.manifest["step"])


def warn(message: str) -> None:
    """One line on stderr: the run goes on."""
    print(f"warning: {message}", file=sys.stderr, flush=True)


# ---- fingerprints ---------------------------------------------------------------------------------------------------

def fingerprint(value: Any) -> str:
    """16 hex digits of anything JSON can hold, of bytes, or of a file's content (a Path). Key order does not matter.

    An iterable that is no list (a generator of rows) is digested row by row, so a large set needs no second copy.
    """
    if isinstance(value, Path):
        return _file_digest(value)[:16]
    digest = hashlib.sha256()
    if isinstance(value, bytes):
        digest.update(value)
    elif isinstance(value, Iterator):
        for row in value:
            digest.update(_canonical(row) + b"\n")
    else:
        digest.update(_canonical(value))
    return digest.hexdigest()[:16]


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=str).encode()


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two sets of fingerprints, one phrase each: `config learning_rate: 0.001 then, 0.01 now`.

    A value that is itself a mapping is compared key by key. A name that only one side has is a difference.
    """
    then, now = json.loads(_canonical(then)), json.loads(_canonical(now))
    found = []
    for name in sorted({*then, *now}):
        a, b = then.get(name), now.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            found += [f"{name} {key}: {_short(a.get(key))} then, {_short(b.get(key))} now"
                      for key in sorted({*a, *b}) if a.get(key) != b.get(key)]
        elif a != b:
            found.append(f"{name}: {_short(a)} then, {_short(b)} now")
    return found


def _short(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


# ---- writing --------------------------------------------------------------------------------------------------------

def seal(folder: str | Path, **facts: Any) -> dict[str, Any]:
    """Sync every file of the folder, then write its manifest: sizes, sha256, and the facts given.

    The manifest is written last, so a folder that has one had everything on disk before it.
    """
    folder = Path(folder)
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST):
        path.chmod(folder.stat().st_mode & 0o666)  # safetensors writes private files; a checkpoint follows its folder
        _sync(path)
        files[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": _file_digest(path)}
    for inner in (p for p in folder.rglob("*") if p.is_dir()):
        fsync_folder(inner)
    manifest = json.loads(_canonical({**facts, "files": files}))
    manifest["seal"] = fingerprint(manifest)
    write_json(folder / MANIFEST, manifest)
    return manifest


def publish(staged: str | Path, final: str | Path) -> Path:
    """Give a sealed folder its name. A folder that has the name already is exchanged for it and removed."""
    staged, final = Path(staged), Path(final)
    if not final.exists():
        os.rename(staged, final)
    elif not _exchange(staged, final):
        old = final.with_name(f".old-{final.name}")
        shutil.rmtree(old, ignore_errors=True)
        os.rename(final, old)
        os.rename(staged, final)
        staged = old
    fsync_folder(final.parent)
    shutil.rmtree(staged, ignore_errors=True)
    return final


@contextlib.contextmanager
def staged_folder(final: str | Path, **facts: Any) -> Iterator[Path]:
    """A temporary folder beside `final` that takes its name, sealed, when the block ends well, and vanishes otherwise.

    `facts` go into the manifest. Call it on one rank only.
    """
    final = Path(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    if not final.exists() and (old := final.with_name(f".old-{final.name}")).is_dir():
        os.rename(old, final)
    staged = final.with_name(f".tmp-{final.name}-{os.getpid()}")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir()
    try:
        yield staged
        seal(staged, **facts)
        publish(staged, final)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names in one step where the kernel can (Linux renameat2): no instant without the folder."""
    try:
        at_cwd, exchange = -100, 2
        return ctypes.CDLL(None).renameat2(at_cwd, os.fsencode(a), at_cwd, os.fsencode(b), exchange) == 0
    except (AttributeError, OSError):
        return False


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _file_digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- checking -------------------------------------------------------------------------------------------------------

def verify(folder: str | Path) -> Checkpoint:
    """Read the whole folder against its manifest. Raises DamagedFolder (a UserError) naming the first bad file.

    Files the manifest does not list are ignored: notes a person left there do no harm.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such checkpoint folder; see `ls {folder.parent}`")
    manifest = _read_manifest(folder)
    for name, wanted in sorted(manifest["files"].items()):
        path = folder / name
        if not path.is_file():
            raise DamagedFolder(folder, name, "the file is missing")
        size = path.stat().st_size
        if size != wanted["size"]:
            raise DamagedFolder(folder, name, f"{size} bytes, but {wanted['size']} were written")
        if _file_digest(path) != wanted["sha256"]:
            raise DamagedFolder(folder, name, "the content is not what was written (sha256 differs)")
    return Checkpoint(folder, manifest)


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        claimed = manifest.pop("seal")
        if fingerprint(manifest) != claimed or not isinstance(manifest["files"], dict):
            raise ValueError("its own digest differs")
    except FileNotFoundError:
        raise DamagedFolder(folder, MANIFEST, "the file is missing: the folder was never finished") from None
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise DamagedFolder(folder, MANIFEST, f"the file is damaged ({error})") from None
    return manifest


def checkpoints(run_folder: str | Path) -> list[tuple[int, Path]]:
    """(step, folder) of every `checkpoint-<step>`, oldest first, verified or not."""
    run_folder = Path(run_folder)
    if not run_folder.is_dir():
        return []
    found = [(int(m[1]), p) for p in run_folder.iterdir() if (m := _NAME.match(p.name)) and p.is_dir()]
    return sorted(found)


def newest_verified(run_folder: str | Path, say: Callable[[str], None] = warn) -> Checkpoint | None:
    """The newest whole checkpoint. Torn or damaged newer ones are renamed `torn-checkpoint-<step>`, one line each."""
    for _, path in reversed(checkpoints(run_folder)):
        try:
            found = verify(path)
            if _NAME.match(path.name)[1] != str(found.manifest.get("step")):
                raise DamagedFolder(path, MANIFEST, f"it belongs to step {found.manifest.get('step')}")
            return found
        except DamagedFolder as damage:
            aside = set_aside(path, "torn")
            say(f"{path.name} is not whole ({damage.file}: {damage.what}); set aside as {aside.name}")
    return None


# ---- housekeeping ---------------------------------------------------------------------------------------------------

def set_aside(path: Path, prefix: str) -> Path:
    """Rename a checkpoint to `<prefix>-<name>` (`.2`, `.3` ... when taken); nothing is deleted."""
    aside, number = path.with_name(f"{prefix}-{path.name}"), 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"{prefix}-{path.name}.{number}")
    os.rename(path, aside)
    fsync_folder(path.parent)
    return aside


def set_aside_newer(run_folder: str | Path, step: int) -> list[str]:
    """Rename every checkpoint after `step` to `previous-...`: another branch must not be resumed by mistake."""
    return [set_aside(path, "previous").name for at, path in checkpoints(run_folder) if at > step]


def clean(run_folder: str | Path) -> None:
    """Remove what a killed run left half-written, and bring back a folder caught between two names.

    Only for the process that holds the run's lock.
    """
    run_folder = Path(run_folder)
    for path in list(run_folder.iterdir()) if run_folder.is_dir() else []:
        if path.name.startswith(".old-checkpoint-") and not (final := path.with_name(path.name[5:])).exists():
            os.rename(path, final)
        elif path.name.startswith((".tmp-checkpoint-", ".old-checkpoint-", ".gone-checkpoint-", ".tmp-link-")):
            path.unlink() if path.is_symlink() or path.is_file() else shutil.rmtree(path, ignore_errors=True)


def rotate(run_folder: str | Path, keep: int | None, protect: Iterable[str | Path] = ()) -> list[str]:
    """Delete the oldest checkpoints until `keep` are left; returns the names deleted.

    Never deleted: the newest one that verifies, epoch targets (`checkpoint_epoch_k`), and those in `protect`
    (the best one; one just sealed, which is taken as verified). They count towards `keep`.
    """
    found = checkpoints(run_folder)
    if not keep or keep < 1 or len(found) <= keep:
        return []
    safe = {Path(p).name for p in protect} | {p.name for p in epoch_names(run_folder).values()}
    for _, path in reversed(found):
        if path.name in safe:
            break
        with contextlib.suppress(DamagedFolder):
            verify(path)
            safe.add(path.name)
            break
    gone = [path for _, path in found if path.name not in safe][: len(found) - keep]
    for path in gone:
        # Renamed first: a kill inside the removal must not leave half a folder under a checkpoint's name.
        doomed = path.with_name(f".gone-{path.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        os.rename(path, doomed)
        shutil.rmtree(doomed, ignore_errors=True)
    return [path.name for path in gone]


def name_epoch(run_folder: str | Path, epoch: int, target: str) -> Path:
    """`checkpoint_epoch_<epoch>` -> `target` (a name beside it): a relative link, loadable as a path.

    Where links are not possible, a `checkpoint_epoch_<epoch>.json` with {"checkpoint": target}; see `resolve`.
    """
    run_folder = Path(run_folder)
    link, fresh = run_folder / f"checkpoint_epoch_{epoch}", run_folder / f".tmp-link-{epoch}-{os.getpid()}"
    try:
        fresh.unlink(missing_ok=True)
        os.symlink(target, fresh, target_is_directory=True)
        os.replace(fresh, link)
    except OSError:
        link = write_atomic(link.with_name(link.name + ".json"), json.dumps({"checkpoint": target}) + "\n")
    fsync_folder(run_folder)
    return link


def epoch_names(run_folder: str | Path) -> dict[str, Path]:
    """{`checkpoint_epoch_k`: the folder it stands for} of every epoch name, broken ones too."""
    run_folder, found = Path(run_folder), {}
    for path in run_folder.iterdir() if run_folder.is_dir() else []:
        if not (match := _EPOCH_NAME.match(path.name)):
            continue
        if path.is_symlink():
            found[path.name] = run_folder / os.readlink(path)
        elif match[2]:
            with contextlib.suppress(ValueError, KeyError, OSError):
                found[path.stem] = run_folder / json.loads(path.read_bytes())["checkpoint"]
    return found


def repair_epoch_names(run_folder: str | Path) -> None:
    """Drop names whose folder is gone; add those a kill prevented (the manifest says which epoch had ended)."""
    run_folder = Path(run_folder)
    for name, target in epoch_names(run_folder).items():
        if not target.is_dir():
            (run_folder / name).unlink(missing_ok=True)
            (run_folder / f"{name}.json").unlink(missing_ok=True)
    for _, path in checkpoints(run_folder):
        with contextlib.suppress(DamagedFolder):
            epoch = _read_manifest(path).get("epoch_ended")
            if epoch and f"checkpoint_epoch_{epoch}" not in epoch_names(run_folder):
                name_epoch(run_folder, epoch, path.name)


def resolve(path: str | Path) -> Path:
    """The folder behind `.../checkpoint-48`, `.../checkpoint_epoch_3` (link or pointer file). Raises UserError."""
    path = Path(path)
    if path.is_dir():
        return path.resolve() if path.is_symlink() else path
    target = epoch_names(path.parent).get(path.name.removesuffix(".json"))
    if target is None or not target.is_dir():
        known = [p.name for _, p in checkpoints(path.parent)] + sorted(epoch_names(path.parent))
        raise UserError(f"{path}: no such checkpoint folder; there are: {', '.join(known) or 'none'}")
    return target


class RunLock:
    """One training run per output folder: an flock that dies with its process.

    Raises UserError naming the other process when the folder is still taken after `wait` seconds.
    """

    def __init__(self, run_folder: str | Path, wait: float = 10.0) -> None:
        import fcntl

        Path(run_folder).mkdir(parents=True, exist_ok=True)
        self.path = Path(run_folder) / ".lock"
        self._file = open(self.path, "a+")  # noqa: SIM115 - held for the whole run
        until = time.monotonic() + wait
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    self._file.seek(0)
                    owner = self._file.read().strip() or "unknown"
                    self._file.close()
                    raise UserError(f"{run_folder}: another run (pid {owner}) is training into this folder; wait for "
                                    "it or choose another output folder") from None
                time.sleep(0.1)
            except OSError as error:
                warn(f"{self.path}: this file system has no locks ({error.strerror}); do not start a second run here")
                break
        self._file.seek(0)
        self._file.truncate()
        self._file.write(f"{os.getpid()}\n")
        self._file.flush()

    def release(self) -> None:
        self._file.close()
