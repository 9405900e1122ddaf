"""Score every router of a YAML file on one outcome cache, beside the controls, in replay: no model is called.

    python src/evaluate.py --cache data/sample --routers configs/routers/quickstart.yaml --output_dir data/runs/eval
    python src/evaluate.py --cache data/sample --router_type trained_deberta --router_model_path data/runs/deberta

Reads an outcome cache (outcomes.jsonl.gz and pool.yaml) and router folders; routers without a folder are fitted on the
cache's train split. Settings are chosen on dev and reported on test, with paired intervals over prompts. Writes
report.html (one file, opens offline), leaderboard.md, comparison.json, results_<router>.json, decisions.parquet,
samples.csv, PNG charts, provenance.json and timing.json, and records the run in W&B (offline without a key).
About 10 CPU seconds for the sample cache (2,000 prompts, 5 fitted routers, 1,000 resamples), most of it fitting;
scoring 100,000 prompts x 20 models x 6 routers takes 8 s and 1.1 GB once the estimates are there (one EPYC core).
"""

from __future__ import annotations

from typing import Literal

from routewright.evaluation import evaluate
from routewright.launch import launch


def main(
    *,
    # Files
    cache: str = "data/sample",  # outcome cache: a folder with outcomes.* and pool.yaml, or a file
    routers: str | None = None,  # YAML with `routers: [{name, kind or path, options}, ...]`
    output_dir: str = "data/runs/evaluate",  # where the report goes
    pool: str | None = None,  # other prices for the same outcomes; no model is called again
    # One router
    router_type: str | None = None,  # a router by kind, beside or instead of the file
    router_model_path: str | None = None,  # its folder, where it was trained
    # Prompts
    models: list[str] | None = None,  # only these models of the cache, in this order
    train_split: str = "train",  # split that routers are fitted on
    dev_split: str = "dev",  # split that settings are chosen on
    test_split: str = "test",  # split that scores are reported on
    seeds: int | list[int] = 1,  # a count or a list; each divides the prompts anew and refits; 1 keeps recorded splits
    allow_overlap: bool = False,  # score routers that were trained on test prompts, and say so in the report
    # Scoring
    reward: str = "linear",  # linear, binary, capped, offline_dpo, xrouter_code, xrouter_readme
    cost_weight: float | None = None,  # reward per USD; linear without it: where cheapest and best model earn the same
    n_settings: int = 101,  # cost weights swept per router
    n_resamples: int = 1000,  # bootstrap resamples, shared by all routers
    level: float = 0.95,  # of the intervals
    # Output
    plots: bool = True,  # write PNG charts
    wandb: Literal["auto", "online", "offline", "off"] = "auto",  # auto: online with a key, else offline
    wandb_project: str = "routewright",  # where the run is filed
) -> None:
    evaluate(**locals())


if __name__ == "__main__":
    launch(main)
