"""Score one router: the short form of evaluate.py, with the same evaluation, controls and report.

    python src/run.py --router_type trained_deberta --router_model_path data/runs/deberta
    python src/run.py --config configs/routers/one.yaml        # with router_type and router_model_path in it
"""

from __future__ import annotations

from typing import Literal

from routewright.evaluation import evaluate
from routewright.launch import launch


def main(
    *,
    # Router
    router_type: str,  # its kind: trained_deberta, deberta, knn, linear, mf, length, group_table, ...
    router_model_path: str | None = None,  # its folder, where it was trained
    # Files
    cache: str = "data/sample",  # outcome cache: a folder with outcomes.* and pool.yaml, or a file
    output_dir: str = "data/runs/run",  # where the report goes
    pool: str | None = None,  # other prices for the same outcomes
    # Scoring
    seeds: int | list[int] = 1,  # a count or a list of seeds
    cost_weight: float | None = None,  # reward per USD; default: where cheapest and best model earn the same
    n_resamples: int = 1000,  # bootstrap resamples, shared by all routers
    allow_overlap: bool = False,  # score a router that was trained on test prompts, and say so
    # Output
    wandb: Literal["auto", "online", "offline", "off"] = "auto",  # auto: online with a key, else offline
) -> None:
    evaluate(**locals())


if __name__ == "__main__":
    launch(main)
