"""Fit a light router on an outcome cache: nearest neighbours, logistic regression, matrix factorisation, and the like.

These routers read a prompt through a fixed encoder and fit what little comes after it, so they train in seconds on a
CPU and are the yardstick every heavier router has to pass. Kinds:

  knn          similarity-weighted mean quality of the nearest train prompts
  linear       a logistic regression per model, penalty chosen on dev
  mf           matrix factorisation after RouteLLM (arXiv 2406.18665), on soft quality labels instead of preferences
  deberta      frozen pretrained encoder, standardised mean-pooled states, logistic head per model
  group_table  mean quality per task, shrunk to the global mean (a control)
  length       longer prompts to dearer models; nothing is fitted (a control)

The encoder is `tfidf` (no weights needed), a weights folder, or a hub id that was fetched with `hf download`.

Run it:
  python src/train_embedding.py --kind linear --output_dir data/runs/linear
  python src/train_embedding.py --kind mf --encoder sentence-transformers/all-MiniLM-L6-v2 --router.dimensions 64

Reads the cache (splits train and dev). Writes the router folder (router.json, weights.safetensors, the encoder's
vocabulary) and dev_scores.json. On two CPU cores: 1-3 s for 800 prompts with tfidf; embedding with MiniLM takes about
30 ms per prompt of 60 tokens once, and is cached under data/runs/.cache.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Literal

from routewright.launch import launch

ENCODED = ("knn", "linear", "mf", "deberta")


def main(
    *,
    # Files
    cache: str = "data/sample",  # outcome cache: a folder or a file
    pool: str | None = None,  # pool file with prices; by default the pool.yaml beside the cache
    output_dir: str = "data/runs/embedding",  # the router folder to write
    # Router
    kind: Literal["knn", "linear", "mf", "deberta", "group_table", "length"] = "linear",  # which router to fit
    name: str = "",  # its name in reports; by default the name of the folder
    encoder: str = "",  # tfidf, a weights folder or a hub id; by default tfidf (deberta: microsoft/deberta-v3-base)
    router: dict | None = None,  # more options of the kind, e.g. --router.k 20 --router.dimensions 64
    cost_weight: float | None = None,  # quality a dollar must buy; kept in router.json for serving
    # Run
    embedding_cache: str = "",  # folder of cached embeddings; by default data/runs/.cache, `none` keeps none
    seed: int = 0,  # seed of every random start
    wandb: bool = False,  # record to W&B, offline where there is no key
) -> None:
    """Fit a light router (knn, linear, mf, deberta, group_table, length) on an outcome cache and write its folder."""
    from routewright import tracking
    from routewright.errors import UserError
    from routewright.outcomes import OutcomeTable
    from routewright.router_data import check_soft_labels
    from routewright.routers import make_router
    from routewright.textfiles import write_json

    options = dict(router or {})
    for key, value in (("encoder", encoder), ("cache", embedding_cache)):
        if not value:
            continue
        if kind not in ENCODED:
            flag = "embedding_cache" if key == "cache" else key
            raise UserError(f"--{flag} has no meaning for kind {kind}, which reads no encoder; leave it out")
        options[key] = value
    for key in ("kind", "name"):
        if key in options:
            raise UserError(f"--router.{key}: give it as --{key}")
    # Built before the cache is read: a wrong option must not wait for the data.
    fitted = make_router(kind, name=name or Path(output_dir).name, **options)
    table = OutcomeTable.load(cache, pool)
    train, dev = table.split("train"), table.split("dev") if "dev" in table.splits else None
    if fitted.needs_training:
        check_soft_labels(train.quality_mean, train.models, cache)  # its warnings are those of the router itself

    start = time.perf_counter()
    fitted.fit(train, dev, seed)
    if cost_weight is not None:
        fitted.decision = {"cost_weight": cost_weight}
    seconds = time.perf_counter() - start
    fitted.save(output_dir)

    scores = {"kind": kind, "train_prompts": train.n, "fit_seconds": round(seconds, 3)}
    if dev is None:
        print("no dev split in the cache: defaults were used where dev would have chosen, and nothing is scored",
              file=sys.stderr)
    else:
        method = {"kind": kind, **fitted.options, "rows": train.n, "cost_weight": cost_weight}
        with tracking.start("routewright", f"train_embedding-{Path(output_dir).name}", output_dir, method,
                            mode="auto" if wandb else "off", job_type="train") as tracker:
            scores |= dev_scores(fitted, train, dev, tracker)
    write_json(Path(output_dir) / "dev_scores.json", scores)
    print(f"{kind} router of {train.n} train prompts in {seconds:.1f} s -> {output_dir}")
    for model, row in scores.get("models", {}).items():
        auroc = "-" if row["auroc"] is None else f"{row['auroc']:.3f}"
        print(f"  {model}: dev quality {row['quality']:.3f}, estimate {row['estimate']:.3f}, Brier {row['brier']:.4f} "
              f"(constant {row['brier_constant']:.4f}), AUROC {auroc}")
    if dev is not None:
        found = scores["decisions"]
        shares = ", ".join(f"{model} {found[f'share/{model}']:.0%}" for model in dev.models)
        print(f"  decisions where cheapest and best model earn the same: {shares}; dev reward "
              f"{found['dev/reward']:.3f}, {found['collapse/gain']:+.3f} against the best constant model")


def dev_scores(router, train, dev, tracker) -> dict:
    """How the estimates fare on dev: per model, Brier score beside that of the constant mean, and AUROC; as decisions,
    the figures of `monitor`."""
    from routewright.metrics import auroc, brier
    from routewright.monitor import monitor_of_estimates

    estimate = router.estimate(dev.prompts)
    monitor, rule = monitor_of_estimates(train, dev, tracker, print)
    _, seconds = router.overhead(dev.prompts)
    models = {}
    for column, model in enumerate(router.models):
        truth, guess = dev.quality_mean[:, column], estimate[:, column]
        models[model] = {"quality": float(truth.mean()), "estimate": float(guess.mean()),
                         "brier": brier(guess, truth), "brier_constant": float(truth.var()),
                         "auroc": auroc(dev.quality[:, column] >= 0.5, guess)}
    tracker.log({f"dev/auroc/{model}": row["auroc"] for model, row in models.items() if row["auroc"] is not None}, 0)
    return {"dev_prompts": dev.n, "models": models, "decisions": monitor.observe(0, rule(estimate)),
            "seconds_per_prompt": float(seconds.mean())}


if __name__ == "__main__":
    launch(main)
