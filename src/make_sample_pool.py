"""Make the sample pool: write the prompts, train its models from scratch, save them with their tokenizer and prices.

A cheap model that answers at once, a middle and a strong one that write their working first; all three of the Qwen2
architecture, trained on word problems generated here (routewright.samplepool tells what they are and why). The
prompts of the cache are drawn first and held out of training by text. Next, record the cache:

    python src/make_sample_pool.py                         # all three, one after the other
    python src/make_sample_pool.py --models strong         # one process per model uses two cores better
    python src/build_cache.py --prompts data/sample/prompts.jsonl.gz --pool data/sample/pool.yaml
    python src/make_sample_pool.py --report true           # data/sample/README.md and data/sample_*.jsonl

Can be stopped at any time: the same command goes on from the last checkpoint (every 200 steps) and ends in the same
weights. Reads nothing. Writes prompts.jsonl.gz, pool.yaml and models/<name>/ into the output folder, checkpoints
into the work folder. Measured minutes, machine and accuracies: data/sample/README.md, written by the last command.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

from routewright import samplepool
from routewright.errors import UserError
from routewright.launch import launch
from routewright.prompts import assign_splits, group_near_duplicates
from routewright.textfiles import nearest, write_atomic, write_json, write_jsonl


def main(
    *,
    # Files
    output_dir: str = "data/sample",  # prompts, pool file and models go here
    work_dir: str = "data/runs/sample_pool",  # checkpoints, to go on after a stop
    # Prompts
    prompts: int = 2000,  # prompts of the cache, held out of training
    seed: int = 1,  # of the prompts; each model has its own seed in samplepool.RECIPES
    # Training
    models: list[str] | None = None,  # names to train; default: all
    quick: bool = False,  # minute-long smaller training, for tests
    # Report
    report: bool = False,  # write README.md, and beside output_dir sample_data.jsonl, from the recorded cache instead
):
    """Generate the prompts, train the models of the sample pool from scratch, save them."""
    out = Path(output_dir)
    if report:
        return _report(out)
    if prompts < 1:
        raise UserError(f"--prompts must be at least 1; got {prompts}")
    recipes = _chosen(models, quick)

    problems = samplepool.cache_problems(seed, prompts, samplepool.QUICK_RECIPES if quick else samplepool.RECIPES)
    asked = [problem.as_prompt(i) for i, problem in enumerate(problems)]
    groups = group_near_duplicates([p.prompt for p in asked])
    splits = assign_splits(groups, salt="sample")
    asked = [replace(p, group=g, split=s) for p, g, s in zip(asked, groups, splits, strict=True)]
    fields = ("prompt_id", "prompt", "task", "group", "split", "reference")
    write_jsonl(out / "prompts.jsonl.gz", ({name: getattr(p, name) for name in fields} for p in asked))
    write_atomic(out / "pool.yaml", samplepool.POOL_YAML)

    held_out = {problem.text for problem in samplepool.reserved_problems(seed, prompts)}
    tokenizer = samplepool.build_tokenizer(samplepool.vocabulary_texts())
    for recipe in recipes:
        model, measured = samplepool.train(recipe, tokenizer, held_out, Path(work_dir) / f"{recipe.name}.pt",
                                           say=functools.partial(print, flush=True))
        folder = out / "models" / recipe.name
        samplepool.save_model(model, tokenizer, folder)
        write_json(folder / "training.json", {**samplepool.as_row(recipe), "measured": measured})
        print(f"{recipe.name}: {measured['parameters']:,} parameters, {measured['minutes']} min -> {folder}",
              flush=True)


def _report(out: Path) -> None:
    from routewright.outcomes import read_outcomes

    outcomes = read_outcomes(out)
    written = [write_atomic(out / "README.md", samplepool.readme(outcomes, out)),
               write_jsonl(out.parent / "sample_data.jsonl", samplepool.cobench_rows(outcomes))]
    print(f"written: {', '.join(map(str, written))}")


def _chosen(names: list[str] | None, quick: bool) -> list[samplepool.Recipe]:
    recipes = {r.name: r for r in (samplepool.QUICK_RECIPES if quick else samplepool.RECIPES)}
    for name in names or ():
        if name not in recipes:
            raise UserError(f"--models {name}: the sample pool has no such model{nearest(name, recipes)}; "
                            f"known: {', '.join(recipes)}")
    return [recipes[name] for name in names or recipes]


if __name__ == "__main__":
    launch(main)
