"""Compare two prompt sets and name what they share, before a shared prompt makes a score worthless.

A set is a file or a folder: an outcome cache (folder, .jsonl, .jsonl.gz, .parquet), prompts (JSON lines), CoBench rows
(question, llm_id, label) or Alpaca rows (instruction, input, response or output). Two prompts are the same when they
are equal after normalisation, near-duplicates (three-word shingles, with equal numbers), or of one group in both sets.

    python src/check_leaks.py --a data/train.jsonl --b data/test.jsonl
    python src/check_leaks.py --a data/sample --split_a test --split_b train

Prints the counts and the first overlaps by id and text; exit code 3 when there is an overlap, 0 when there is none.
10,000 against 10,000 prompts take about 5 seconds of one core.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from routewright.errors import PartialRun, UserError
from routewright.launch import launch
from routewright.outcomes import read_outcomes
from routewright.prompts import check_text, find_overlap, read_prompts
from routewright.schema import Prompt
from routewright.textfiles import need_file, read_jsonl, write_json


def main(
    *,
    # Sets
    a: str,  # the prompts to check, such as a test set: a file or a cache folder
    b: str = "",  # the prompts they must not share, such as a train set; empty: the same as a
    split_a: str = "",  # only this split of a: train, dev, test
    split_b: str = "",  # only this split of b
    # Comparison
    near: bool = True,  # near-duplicates count too
    threshold: float = 0.8,  # Jaccard similarity of word triples from which prompts are near-duplicates
    # Output
    show: int = 5,  # overlaps to print
    output: str = "",  # JSON file for all overlaps
) -> None:
    """Compare two prompt sets and name what they share; exit 3 when they share anything."""
    b = b or a
    if Path(a).resolve() == Path(b).resolve() and (split_a == split_b or not (split_a and split_b)):
        raise UserError(f"--a and --b are both {a}; give two files, or two splits as in --split_a test --split_b train")
    if output and Path(output).is_dir():
        raise UserError(f"--output {output}: is a folder; name a file")
    first, second = read_set(a, split_a), read_set(b, split_b)
    overlaps = find_overlap(first, second, near=near, threshold=threshold)

    counts = {kind: sum(o.kind == kind for o in overlaps) for kind in ("exact", "near", "group")}
    names = [f"{path}{f' ({split})' if split else ''}" for path, split in ((a, split_a), (b, split_b))]
    print(f"{names[0]}: {len(first):,} prompts; {names[1]}: {len(second):,} prompts")
    print("shared: " + ", ".join(f"{n:,} {kind}" for kind, n in counts.items()))
    texts = [{p.prompt_id: p.prompt for p in prompts} for prompts in (first, second)]
    rows = [{"kind": o.kind, "similarity": round(o.similarity, 4), "a_id": o.a_id, "b_id": o.b_id,
             "a_text": texts[0][o.a_id], "b_text": texts[1][o.b_id]} for o in overlaps]
    for row in rows[:max(show, 0)]:
        print(f"{row['kind']} {row['similarity']:.2f}\n  a {row['a_id']}: {_short(row['a_text'])}\n"
              f"  b {row['b_id']}: {_short(row['b_text'])}")
    if output:
        write_json(output, {"a": names[0], "b": names[1], "prompts_a": len(first), "prompts_b": len(second),
                            "counts": counts, "overlaps": rows})
    if overlaps:
        raise PartialRun(f"{len(overlaps)} of {len(first)} prompts of {names[0]} stand in {names[1]} too; remove them "
                         "from one side, or split by group (import_outcomes.py --splits hash does)")


def read_set(path: str, split: str) -> list[Prompt]:
    """The prompts of a file or folder, each once. Raises UserError naming the file and line."""
    prompts = _read(Path(path))
    if split:
        found = Counter(p.split for p in prompts)
        prompts = [p for p in prompts if p.split == split]
        if not prompts:
            have = ", ".join(f"{name or 'unassigned'} {n}" for name, n in found.items())
            raise UserError(f"{path}: no prompt in split {split!r} (it has: {have}); name one of those")
    return prompts


def _read(path: Path) -> list[Prompt]:
    if path.is_dir() or path.suffix == ".parquet":
        return _of_outcomes(path)
    _, row = next(read_jsonl(need_file(path)))
    if "model_name" in row:
        return _of_outcomes(path)
    if "llm_id" in row:
        return _of_rows(path, "question")
    answered = "instruction" in row and ("response" in row or "output" in row)
    return _of_rows(path, "instruction") if answered else read_prompts(path)


def _of_outcomes(path: Path) -> list[Prompt]:
    return list({o.prompt_id: o.as_prompt for o in read_outcomes(path)}.values())


def _of_rows(path: Path, field: str) -> list[Prompt]:
    """The different questions of training rows, named by the line where each stands first."""
    found: dict[tuple[str, str], Prompt] = {}
    for line, row in read_jsonl(path):
        text, context = check_text(row.get(field), f"{path}:{line}", field), row.get("input") or ""
        if not isinstance(context, str):
            raise UserError(f"{path}:{line}: input must be text; got {context!r}")
        found.setdefault((text, context), Prompt(f"line {line}", text, context=context))
    return list(found.values())


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 200 else f"{text[:197]}..."


if __name__ == "__main__":
    launch(main)
