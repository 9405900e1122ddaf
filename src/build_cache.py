"""Build an outcome cache: every model of a pool answers every prompt, several times (forced traversal).

Sample 0 is the greedy call, samples 1.. are drawn at `temperature`. Every answer goes into a journal, synced to disk
batch by batch, so a stopped build goes on where it was: the same command calls only what is missing. When all is there
the answers are graded and written as one cache file, whole or not at all.

    python src/build_cache.py --prompts data/sample/prompts.jsonl.gz --pool data/sample/pool.yaml \\
        --output_dir data/outcomes/mine
    python src/build_cache.py ... --dry_run true            # what would be called, and nothing else
    python src/build_cache.py ... --regrade true --grader exact   # new grades for recorded answers, no call

Reads prompts (JSON lines) and a pool whose models have `path:`. Writes outcomes.jsonl.gz, pool.yaml, cache.json (how it
was made) and journal.jsonl into the output folder. Delete the journal once you will not record more into this cache.
The sample pool (2,000 prompts x 3 models x 3 samples) took under 4 minutes on two busy cores.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from routewright.backends import Backend, Sampling, backend_for
from routewright.errors import UserError
from routewright.grading import grade
from routewright.launch import launch
from routewright.outcomes import cache_file, fingerprint, outcome_from_row, read_outcomes, write_outcomes
from routewright.pool import Pool, estimate_tokens, price_per_call
from routewright.prompts import assign_splits, check_straddle, full_text, group_prompts, prompts_hash, read_prompts
from routewright.schema import Outcome, Prompt
from routewright.textfiles import read_yaml, write_atomic, write_json

Job = tuple[str, int, Prompt, str]  # model, sample, prompt, key of the call


def main(
    *,
    # Files
    prompts: str = "",  # JSON lines: prompt, reference, and where known prompt_id, task, group, split, context
    pool: str = "",  # pool file; every model needs `path:`, relative to that file
    output_dir: str = "data/outcomes/new",  # the cache folder
    # Traversal
    models: list[str] | None = None,  # default: all of the pool
    samples: int = 3,  # answers per prompt and model; the first is greedy
    temperature: float = 0.7,  # of the samples after the first
    top_p: float = 1.0,  # of the samples after the first
    max_new_tokens: int = 128,  # a pool model's own max_output_tokens lowers it
    seed: int = 0,  # of the drawn samples
    limit: int | None = None,  # only the first so many prompts, to try things out
    batch_size: int = 64,  # prompts per forward pass
    # Grading
    grader: str = "number",  # squad_em, squad_f1, number, choice, math, exact, korquad_char
    regrade: bool = False,  # only grade the recorded answers anew
    # Run
    dry_run: bool = False,  # say what would be called, and stop
):
    """Record what every model of a pool answers to every prompt, grade it, write the outcome cache."""
    out = Path(output_dir)
    if regrade:
        with locked(out, must_exist=True):
            return _regrade(out, grader)
    for name, value in (("prompts", prompts), ("pool", pool)):
        if not value:
            raise UserError(f"--{name} is missing; name a file")
    for name, value in (("samples", samples), ("batch_size", batch_size)):
        if value < 1:
            raise UserError(f"--{name} must be at least 1; got {value}")

    asked = _checked_prompts(prompts, limit, grader)
    members = Pool.load(pool)
    names = [members[name].name for name in dict.fromkeys(models or members.names)]
    settings = [Sampling(max_new_tokens=max_new_tokens, seed=seed),
                *[Sampling(temperature, top_p, max_new_tokens, seed)] * (samples - 1)]
    backend = backend_for(members, names, batch_size)
    jobs = [(name, sample, prompt, _key(prompt, backend.identity(name), name, settings[sample], sample))
            for name in names for sample in range(samples) for prompt in asked]

    if dry_run:
        return _tell_plan(jobs, _read_journal(out / "journal.jsonl"), members, max_new_tokens)
    with locked(out):
        recorded = _read_journal(out / "journal.jsonl", repair=True)
        _call_missing(jobs, recorded, backend, settings, out / "journal.jsonl", batch_size)
        outcomes = [_as_asked(recorded[key], prompt, name, sample) for name, sample, prompt, key in jobs]
        outcomes = [_graded(outcome, grader) for outcome in outcomes]
        write_outcomes(out, outcomes)
        _copy_pool(Path(pool), out)
        write_json(out / "cache.json", {
            "prompts": len(asked), "prompts_hash": prompts_hash(asked),
            "models": {name: backend.identity(name) for name in names}, "samples": samples, "temperature": temperature,
            "top_p": top_p, "max_new_tokens": max_new_tokens, "seed": seed, "grader": grader,
            "fingerprint": fingerprint(outcomes)})
    _tell_result(out, outcomes)


# Before any call -----------------------------------------------------------------------------------------------------

def _checked_prompts(path: str, limit: int | None, grader: str) -> list[Prompt]:
    """Prompts with groups and splits, whose references the grader can read. Raises UserError."""
    if limit is not None and limit < 1:
        raise UserError(f"--limit must be at least 1; got {limit}")
    asked = read_prompts(path)[:limit]
    for prompt in asked:
        try:
            grade(grader, "", prompt.reference)
        except UserError as error:
            raise UserError(f"{path}: prompt {prompt.prompt_id!r}: {error}") from None
    if any(p.split for p in asked) and not all(p.split for p in asked):
        bare = next(p for p in asked if not p.split)
        raise UserError(f"{path}: prompt {bare.prompt_id!r} has no split and others have one; "
                        "give all of them a split, or none")
    tied = group_prompts(asked)
    names: dict[str, str] = {}  # the file's own name for a group, where it has one
    groups = [names.setdefault(group, p.group or group) for p, group in zip(asked, tied, strict=True)]
    if any(p.split for p in asked):
        splits = [p.split for p in asked]
        ids = [p.prompt_id for p in asked]
        check_straddle(dict(zip(ids, groups, strict=True)), dict(zip(ids, splits, strict=True)),
                       f"{path}: its splits leak", "leave `split` out of the file to have clean ones assigned")
    else:
        splits = assign_splits(groups)
    return [replace(p, group=g, split=s) for p, g, s in zip(asked, groups, splits, strict=True)]


def _key(prompt: Prompt, identity: str, name: str, sampling: Sampling, sample: int) -> str:
    """Names a call: what is asked, who answers, how it is drawn. Ids, splits and references may change freely."""
    seed = sampling.seed if sampling.temperature else 0
    drawn = [sampling.temperature, sampling.top_p, sampling.max_new_tokens, seed]
    text = json.dumps([prompt.prompt, prompt.context, name, identity, drawn, sample], ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


@contextmanager
def locked(folder: Path, must_exist: bool = False) -> Iterator[None]:
    """One builder per cache folder. Raises UserError naming the process that holds it."""
    if must_exist:
        cache_file(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".build.lock"
    with open(path, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise UserError(f"{folder}: process {holder} is building this cache; wait for it, or choose another "
                            "--output_dir") from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield  # the file stays: removing a lock that another process may just have opened would let two in


# The journal ---------------------------------------------------------------------------------------------------------

def _read_journal(path: Path, repair: bool = False) -> dict[str, Outcome]:
    """Recorded outcomes by key. A torn last line, left by a kill, is passed over, and cut off with `repair`."""
    if not path.is_file():
        return {}
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data) and repair:
        with open(path, "r+b") as file:
            file.truncate(whole)
            os.fsync(file.fileno())
    recorded = {}
    for number, line in enumerate(data[:whole].splitlines(), 1):
        try:
            row = json.loads(line)
            recorded[row["key"]] = outcome_from_row(row["outcome"], f"{path}:{number}")
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{path}:{number}: not a journal line ({type(error).__name__}); "
                            "remove the line to have it called again") from None
    return recorded


def _call_missing(jobs: Sequence[Job], recorded: dict[str, Outcome], backend: Backend, settings: Sequence[Sampling],
                  journal: Path, batch_size: int) -> None:
    """Call what the journal does not hold, or holds as failed; each batch is on disk before the next is called."""
    with open(journal, "ab") as file:
        for name, sample in dict.fromkeys((job[0], job[1]) for job in jobs):
            ours = [job for job in jobs if job[:2] == (name, sample)]
            todo = {key: prompt for _, _, prompt, key in ours if key not in recorded or recorded[key].error}
            if not todo:
                print(f"{name} sample {sample}: all {len(ours)} recorded", flush=True)
                continue
            keys = sorted(todo, key=lambda key: len(full_text(todo[key])))  # batches of similar length
            began = time.monotonic()
            for start in range(0, len(keys), batch_size):
                part = keys[start:start + batch_size]
                answers = backend.call_many(name, [todo[key] for key in part], settings[sample], sample)
                recorded.update(zip(part, answers, strict=True))
                for key, answer in zip(part, answers, strict=True):
                    row = {"key": key, "outcome": answer.as_row()}
                    file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
                done = start + len(part)
                seconds = time.monotonic() - began
                if start // batch_size % 5 == 4 or done == len(keys):
                    print(f"{name} sample {sample}: {done}/{len(keys)} called, {seconds:.0f} s, "
                          f"{seconds / done * (len(keys) - done):.0f} s left", flush=True)


def _as_asked(found: Outcome, prompt: Prompt, name: str, sample: int) -> Outcome:
    """The recorded answer under the identity that the prompt has today."""
    return replace(found, prompt_id=prompt.prompt_id, prompt=prompt.prompt, context=prompt.context, task=prompt.task,
                   group=prompt.group or prompt.prompt_id, split=prompt.split, reference=prompt.reference,
                   model_name=name, sample=sample)


def _graded(outcome: Outcome, grader: str) -> Outcome:
    if outcome.error:
        return replace(outcome, is_correct=False, quality=0.0, grader=grader)
    worth = grade(grader, outcome.response, outcome.reference)
    return replace(outcome, is_correct=worth.correct, quality=worth.quality, grader=worth.grader)


def _regrade(out: Path, grader: str) -> None:
    file = cache_file(out)
    outcomes = read_outcomes(file)
    fresh = []
    for outcome in outcomes:
        try:
            fresh.append(_graded(outcome, grader))
        except UserError as error:
            raise UserError(f"{file}: prompt {outcome.prompt_id!r}: {error}") from None
    changed = sum(a.quality != b.quality for a, b in zip(outcomes, fresh, strict=True))
    write_outcomes(file, fresh)
    if (out / "cache.json").is_file():
        made = json.loads((out / "cache.json").read_text(encoding="utf-8"))
        write_json(out / "cache.json", {**made, "grader": grader, "fingerprint": fingerprint(fresh)})
    print(f"{file}: {len(fresh)} answers graded by {grader!r}, {changed} grades changed, no call made")


# What is told and left behind ----------------------------------------------------------------------------------------

def _tell_plan(jobs: Sequence[Job], recorded: dict[str, Outcome], pool: Pool, max_new_tokens: int) -> None:
    for name in dict.fromkeys(job[0] for job in jobs):
        calls = [(prompt, key) for model, _, prompt, key in jobs if model == name]
        left = [prompt for prompt, key in calls if key not in recorded or recorded[key].error]
        tokens = sum(estimate_tokens(len(full_text(prompt))) for prompt in left)
        longest = min(max_new_tokens, pool[name].max_output_tokens or max_new_tokens)
        most = price_per_call(pool[name], tokens, len(left) * longest)
        print(f"{name}: {len(calls)} calls, {len(calls) - len(left)} recorded, {len(left)} to make, about {tokens} "
              f"input tokens, at most {most:.4f} USD at the pool's prices")
    print("dry run: nothing was called")


def _tell_result(out: Path, outcomes: Sequence[Outcome]) -> None:
    calls, right, tokens = Counter(), Counter(), Counter()
    for outcome in outcomes:
        key = outcome.model_name, outcome.sample
        calls[key] += 1
        right[key] += outcome.quality or 0.0
        tokens[key] += outcome.token_usage.output
    for (name, sample), n in calls.items():
        print(f"{name} sample {sample}: quality {right[name, sample] / n:.3f}, "
              f"{tokens[name, sample] / n:.1f} output tokens")
    print(f"written: {cache_file(out)} ({len(outcomes)} outcomes)")


def _copy_pool(source: Path, out: Path) -> None:
    """The pool file beside the cache, so that evaluation finds the prices; weights paths stay right from there."""
    target = out / "pool.yaml"
    if target.exists() and target.samefile(source):
        return
    import yaml

    raw = read_yaml(source)
    for model in raw["models"]:
        if model.get("path") and (source.parent / model["path"]).exists():
            model["path"] = os.path.relpath(source.parent / model["path"], out)
    write_atomic(target, yaml.safe_dump(raw, sort_keys=False, allow_unicode=True))


if __name__ == "__main__":
    launch(main)
