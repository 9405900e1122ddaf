"""Score one router: the short form of evaluate.py, with the same evaluation, controls and report.

    python src/run.py --router_type trained_deberta --router_model_path data/runs/deberta
    python src/run.py --router_type probe --router_model_path data/runs/probe
    python src/run.py --router_type self_questioning --router_model_path data/sample/models/cheap
    python src/run.py --router_type llm --router_model_path Qwen/Qwen2.5-0.5B-Instruct     # untrained, calibrated
    python src/run.py --router_type logit_score --router.score entropy
    python src/run.py --config configs/routers/one.yaml        # with router_type and router_model_path in it

`router_type` is a kind of this project or one of CoBench's names (logits_margin, max_logits, top10_variance, entropy,
confidence_margin). `router_model_path` is a router folder; for the types that read prompts with a language model (llm,
dpo, probe, self_questioning, the logit scores, semantic_entropy) it may be the folder or hub id of that model, and the
rest is fitted on the train split. evaluate.py takes both flags the same way, and so do `kind` and `path` in a routers
file. A router with further options is kept as router.yaml in the output folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from routewright.errors import UserError
from routewright.evaluation import check_entry, evaluate
from routewright.launch import launch


def main(
    *,
    # Router
    router_type: str,  # its kind: trained_deberta, llm, probe, self_questioning, knn, linear, length, ...
    router_model_path: str | None = None,  # its folder, where it was trained; or the base model of an untrained one
    router: dict | None = None,  # more options of the kind, e.g. --router.score entropy --router.wrap chat
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
    named = {"router_type": router_type, "router_model_path": router_model_path}
    if router:
        named = {"routers": write_entry(router_type, router_model_path, router, Path(output_dir))}
    evaluate(**named, cache=cache, output_dir=output_dir, pool=pool, seeds=seeds, cost_weight=cost_weight,
             n_resamples=n_resamples, allow_overlap=allow_overlap, wandb=wandb)


def write_entry(kind: str, path: str | None, options: dict[str, Any], folder: Path) -> str:
    """router.yaml in the output folder: what was scored, as evaluate.py --routers reads it.

    Raises UserError for a wrong option, and then leaves no file behind.
    """
    import yaml

    from routewright.textfiles import write_atomic

    for name in ("kind", "path", "name"):
        if name in options:
            raise UserError(f"--router.{name}: give it as --router_type or --router_model_path")
    given = {"kind": kind, **({"path": path} if path else {}), **options}
    check_entry(given, "--router_type, --router_model_path, --router")
    text = yaml.safe_dump({"routers": [given]}, sort_keys=False, allow_unicode=True)
    return str(write_atomic(folder / "router.yaml", text))


if __name__ == "__main__":
    launch(main)
