"""Score one router: the short form of evaluate.py, with the same evaluation, controls and report.

    python src/run.py --router_type trained_deberta --router_model_path data/runs/deberta
    python src/run.py --router_type probe --router_model_path data/runs/probe
    python src/run.py --router_type self_questioning --router_model_path data/sample/models/cheap
    python src/run.py --router_type logit_score --router.score entropy
    python src/run.py --config configs/routers/one.yaml        # with router_type and router_model_path in it

`router_type` is a kind of this project or one of CoBench's names (logits_margin, max_logits, top10_variance, entropy,
confidence_margin). `router_model_path` is a router folder; for the types that read prompts with a base model (probe,
self_questioning, the logit scores, semantic_entropy) it may be the folder or hub id of that model, and the rest is
fitted on the train split. What such a router was is kept as router.yaml in the output folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from routewright.errors import UserError
from routewright.evaluation import evaluate
from routewright.launch import launch

# CoBench's names for what are options of one kind here.
ALIASES = {"logits_margin": ("logit_score", {"score": "margin"}), "max_logits": ("logit_score", {"score": "max_logit"}),
           **{name: ("logit_score", {"score": name}) for name in ("top10_variance", "entropy", "confidence_margin")}}
ON_A_BASE = ("probe", "self_questioning", "logit_score", "semantic_entropy")


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
    entry = router_entry(router_type, router_model_path, router or {})
    named = {"router_type": entry["kind"], "router_model_path": entry.get("path")}
    if set(entry) - {"kind", "path"}:
        named = {"routers": write_entry(entry, Path(output_dir))}
    evaluate(**named, cache=cache, output_dir=output_dir, pool=pool, seeds=seeds, cost_weight=cost_weight,
             n_resamples=n_resamples, allow_overlap=allow_overlap, wandb=wandb)


def router_entry(kind: str, path: str | None, options: dict[str, Any]) -> dict[str, Any]:
    """The entry of a routers file that these flags stand for. Raises UserError for an option given twice."""
    own, fixed = ALIASES.get(kind, (kind, {}))
    for name in ("kind", "path", "name", *fixed):
        if name in options:
            raise UserError(f"--router.{name}: " + (f"router_type {kind!r} says it already" if name in fixed else
                                                    "give it as --router_type or --router_model_path"))
    entry = {"kind": own, **fixed, **options}
    if kind != own:
        entry["name"] = kind
    if path is None:
        return entry
    folder = Path(path)
    if own in ON_A_BASE and not (folder / "router.json").is_file() and (
            not folder.is_dir() or (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file()):
        if folder.exists() or path.count("/") == 1:  # a model's folder, or a hub id
            return {**entry, "base": path}
    return {**entry, "path": path}


def write_entry(entry: dict[str, Any], folder: Path) -> str:
    """router.yaml in the output folder: what was scored, as evaluate.py --routers reads it."""
    import yaml

    from routewright.routers import from_entry
    from routewright.textfiles import write_atomic

    if "path" not in entry:
        from_entry(entry, "--router")  # a wrong option leaves no file behind
    text = yaml.safe_dump({"routers": [{"name": entry["kind"], **entry}]}, sort_keys=False, allow_unicode=True)
    return str(write_atomic(folder / "router.yaml", text))


if __name__ == "__main__":
    launch(main)
