"""Trains a probe: a small head on the hidden states of the pool's cheap model, one output per model of the pool.

The cheap model reads each prompt once; per layer the mean over the prompt's tokens is kept. The head learns from these
states which models will answer well. Kinds of probe (after CoBench / RouterXBench): last layer; mean, max, or both over
layers; layers weighted by a learnt softmax; or by shares drawn from a Dirichlet in training (the paper's best).

Departures from CoBench's script:
- one output per model, trained on the mean quality over the recorded samples, not on one greedy answer
- every layer is standardised before layers meet; outputs are calibrated on dev
- learning rate 1e-3 and a weight decay of 1e-3, where 1e-4 without one is still falling after its 50 epochs on few rows
- dev is the cache's dev split, never a random fifth of the training rows, so near-duplicates cannot help
- states, layers, base weights and normalisers stand in the router folder and are checked on loading; safetensors only

Run it:
  python src/train_probe.py                       # on the shipped sample, over its cheap model
  python src/train_probe.py --probe_kind all      # tries the six kinds, keeps the best
  python src/train_probe.py --cache MINE --base Qwen/Qwen2.5-1.5B-Instruct --wrap chat

Reads the cache (splits train and dev). Writes the router folder (router.json, weights.safetensors), dev_scores.json,
monitor.jsonl and config.resolved.yaml. The expensive part, reading the states, is kept under data/runs/.cache batch by
batch: a killed run loses one batch of it, and the same line again goes on from there and trains anew, in seconds, to
the same bytes. Measured on one AMD EPYC core, on the sample cache (1,591 prompts): 7.4 CPU seconds and 0.45 GB, of
which the states take 1.9 and the head 1; all six kinds 8 CPU seconds where the states are there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np

from routewright.errors import UserError
from routewright.launch import launch
from routewright.textfiles import write_json
from routewright.training import Say, console

Kinds = Literal["last", "mean", "max", "mean_max", "softmax", "dirichlet", "all"]


def main(
    *,
    # Files
    cache: str = "data/sample",  # outcome cache: a folder or a file
    pool: str | None = None,  # pool file with prices; by default the pool.yaml beside the cache
    output_dir: str = "data/runs/probe",  # the router folder to write
    # Data
    split_seed: int | None = None,  # divide the cache anew, as evaluate.py --seeds does; none: its recorded splits
    max_samples: int = 4000,  # train prompts used, drawn at random; 0: all
    # Base model
    base: str = "",  # weights folder or hub id; empty: the `path` of the pool's cheapest model
    wrap: Literal["none", "chat", "alpaca", "auto"] = "none",  # what stands around the prompt; none: its bare text
    max_length: int = 1024,  # tokens kept of a prompt
    precision: Literal["auto", "fp32", "bf16"] = "auto",  # of the base model; auto: bf16 on a GPU that has it
    read_batch: int = 32,  # prompts per forward pass of the base model
    # Probe
    probe_kind: Kinds = "dirichlet",  # all: tries the six kinds and keeps the one with the best dev loss
    hidden_sizes: list[int] | None = None,  # layers of the head; none: 256 and 64; []: a linear head
    dropout: float = 0.1,  # before each layer of the head
    # Training
    batch_size: int = 32,  # rows per step
    learning_rate: float = 1e-3,  # of Adam; halved when the dev loss stands still for 5 epochs
    weight_decay: float = 1e-3,  # of the head's weights
    epochs: int = 50,  # at most
    patience: int = 8,  # epochs without a better dev loss before stopping, from epoch 10 on
    seeds: int = 1,  # random starts per kind; the one with the best dev loss is kept
    seed: int = 42,  # of the first start
    cost_weight: float | None = None,  # quality a dollar must buy; none: where cheapest and best model earn the same
    # Run
    state_cache: str = "",  # folder of cached states; by default data/runs/.cache, `none` keeps none
    wandb: bool = False,  # record to W&B, offline where there is no key
    check_only: bool = False,  # check options, cache and base model, then stop
) -> None:
    """Train a probe on the hidden states of the cheap model and write its router folder."""
    from routewright import tracking
    from routewright.outcomes import OutcomeTable
    from routewright.router_data import check_soft_labels
    from routewright.scoring import indifference_weight

    say, out = console(), Path(output_dir)
    options = {"base": base, "wrap": wrap, "max_length": max_length, "precision": precision, "read_batch": read_batch,
               "cache": state_cache, "dropout": dropout, "batch_size": batch_size, "learning_rate": learning_rate,
               "weight_decay": weight_decay, "epochs": epochs, "patience": patience, "max_samples": max_samples}
    if hidden_sizes is not None:
        options["hidden_sizes"] = hidden_sizes
    kinds = probe_kinds(probe_kind)
    make(kinds[0], out.name, options)  # a wrong option must not wait for the data
    if seeds < 1 or (cost_weight is not None and cost_weight < 0):
        raise UserError(f"--seeds must be 1 or more and --cost_weight 0 or more; got {seeds}, {cost_weight}")

    table = OutcomeTable.load(cache, pool)
    if split_seed is not None:
        from routewright.prompts import seed_splits

        table = table.with_splits(seed_splits(table.prompts, split_seed))
    train, dev = table.split("train"), table.split("dev")
    for warning in check_soft_labels(train.quality_mean, train.models, cache):
        say(f"WARNING: {warning}")
    first = make(kinds[0], out.name, options).bind(train.models, train.pool)
    first.prepare()
    found = first.card["base"]
    say(f"{train.n} train and {dev.n} dev prompts; base model {first.base}: {found['layers']} layers of states of size "
        f"{found['width']}, embeddings included")
    if check_only:
        return

    weight = indifference_weight(train) if cost_weight is None else cost_weight
    method = {**options, "base": first.base, "probe_kind": probe_kind, "cost_weight": weight, "rows": train.n}
    with tracking.start("routewright", f"train_probe-{out.name}", out, method, mode="auto" if wandb else "off",
                        job_type="train") as tracker:
        runs = train_all(kinds, seeds, seed, out, options, train, dev, weight, tracker, say)
        best = min(runs, key=lambda run: run["dev_loss"])
        router = best.pop("router")
        router.decision = {"cost_weight": weight} if cost_weight is not None else {}
        (out / "router.json").unlink(missing_ok=True)
        router.save(out)
        report(best, runs, router, train, dev, out, tracker, say)


def probe_kinds(asked: str) -> tuple[str, ...]:
    from routewright.routers.probe import PROBES

    return PROBES if asked == "all" else (asked,)


def make(kind: str, name: str, options: dict[str, Any]) -> Any:
    """An unfitted probe router. Raises UserError for options out of range."""
    from routewright.routers import make_router

    return make_router("probe", name=name, probe=kind, **options)


# --- training ---------------------------------------------------------------------------------------------------------

def train_all(kinds: tuple[str, ...], seeds: int, seed: int, out: Path, options: dict[str, Any], train: Any, dev: Any,
              weight: float, tracker: Any, say: Say) -> list[dict[str, Any]]:
    """One dict per kind and random start: its scores on dev, and the fitted router of the best dev loss alone."""
    from routewright.monitor import DecisionMonitor
    from routewright.reward import Reward
    from routewright.sets import reward_table

    # Cost in USD, as the evaluation counts it: the cost weight is quality per USD.
    rewards = reward_table(dev, Reward.named("linear", cost_weight=weight), "usd")
    alone = len(kinds) * seeds == 1
    runs: list[dict[str, Any]] = []
    for kind in kinds:
        for start in range(seed, seed + seeds):
            router = make(kind, out.name, options)
            mark = "" if alone else f"{kind}-{start}/"
            monitor = DecisionMonitor(dev, rewards, Prefixed(tracker, mark), say if alone else quiet,
                                      folder=out if alone else None, total_steps=options["epochs"])
            if alone:
                monitor.resume(0)  # the head is trained anew, so is the record of its decisions
            router.on_epoch = epoch_listener(monitor, train, dev, weight, tracker, mark, say if alone else quiet)
            router.fit(train, dev, start)
            router.on_epoch = None
            history = router.history
            run = {"probe": kind, "seed": start, "epochs": len(history),
                   "dev_loss": min(row["dev_loss"] for row in history), **dev_scores(router, train, dev, weight)}
            runs.append(run)
            if run["dev_loss"] <= min(other["dev_loss"] for other in runs):
                for other in runs:
                    other.pop("router", None)
                run["router"] = router
            say(f"{kind}, seed {start}: {len(history)} epochs, dev loss {run['dev_loss']:.4f}, "
                f"AUROC {run.get('auroc', float('nan')):.3f}")
    return runs


class Prefixed:
    """A tracker whose scalars stand under a prefix, so that several heads can share one run."""

    def __init__(self, tracker: Any, prefix: str) -> None:
        self.tracker, self.prefix = tracker, prefix

    def log(self, scalars: dict[str, Any], step: int | None = None) -> None:
        # W&B takes no step twice, and several heads count from 1 each.
        self.tracker.log({self.prefix + name: value for name, value in scalars.items()},
                         step=None if self.prefix else step)


def quiet(text: str) -> None:
    pass


def epoch_listener(monitor: Any, train: Any, dev: Any, weight: float, tracker: Any, mark: str, say: Say) -> Any:
    """What hears each epoch's end: losses, AUROC and the decisions at this cost weight go to tracker and console."""
    from routewright import decide

    expected = decide.expected_cost(train, dev)
    log = Prefixed(tracker, mark).log

    def on_epoch(epoch: int, losses: dict[str, float], estimate: Any) -> None:
        guess = estimate()
        area = mean_auroc(dev, guess)
        log({"train/loss": losses["train_loss"], "dev/loss": losses["dev_loss"], "dev/auroc": area,
             "train/learning_rate": losses["learning_rate"]}, step=epoch)
        seen = monitor.observe(epoch, decide.choose(guess, expected, weight))
        say(f"epoch {epoch}  loss {losses['train_loss']:.4f}  dev loss {losses['dev_loss']:.4f}  dev AUROC {area:.3f}  "
            f"dev quality {seen['dev/quality']:.4f}  gain over a constant {seen['collapse/gain']:+.4f}")

    return on_epoch


# --- scores -----------------------------------------------------------------------------------------------------------

def aurocs(dev: Any, estimate: np.ndarray) -> dict[str, float]:
    """AUROC per model of the estimates (N, M) against the recorded answers; models of one class are left out."""
    from routewright.metrics import auroc

    areas = {model: auroc(dev.quality[:, i] >= 0.5, estimate[:, i]) for i, model in enumerate(dev.models)}
    return {model: float(area) for model, area in areas.items() if area is not None}


def mean_auroc(dev: Any, estimate: np.ndarray) -> float:
    areas = aurocs(dev, estimate)
    return float(np.mean(list(areas.values()))) if areas else float("nan")


def dev_scores(router: Any, train: Any, dev: Any, weight: float) -> dict[str, Any]:
    """Scores of the kept epoch on dev: AUROC per model and their mean, AIQ, quality and USD a prompt at the weight."""
    from routewright import decide, metrics

    estimate = router.estimate(dev.prompts)
    expected = decide.expected_cost(train, dev)
    swept = decide.sweep_scores(estimate, expected, dev.quality, dev.cost, decide.cost_weights(estimate, expected))
    chosen = decide.choose(estimate, expected, weight)
    areas = aurocs(dev, estimate)
    found = {"auroc": float(np.mean(list(areas.values()))) if areas else None,
             **{f"auroc/{model}": area for model, area in areas.items()},
             "aiq": metrics.aiq(swept.cost, swept.quality, metrics.pool_range(dev.cost)),
             "brier": metrics.brier(estimate, dev.quality_mean),
             "quality": float(metrics.picked(dev.quality, chosen).mean()),
             "cost_usd": float(metrics.picked(dev.cost, chosen).mean()),
             "seconds_per_prompt": float(router.overhead(dev.prompts[:1])[1].mean())}
    return {name: value for name, value in found.items() if value is not None}


def report(best: dict[str, Any], runs: list[dict[str, Any]], router: Any, train: Any, dev: Any, out: Path, tracker: Any,
           say: Say) -> None:
    """dev_scores.json, the tracker's summary, and the table of kinds where several were trained."""
    from routewright.tracking import dev_names

    shares = router.layer_weights
    scores = {**rounded(best), "train_prompts": train.n, "dev_prompts": dev.n,
              "tried": sorted((rounded(run) for run in runs), key=lambda run: run["dev_loss"])}
    if shares is not None:
        scores["layer_weights"] = [round(float(share), 4) for share in shares]
    write_json(out / "dev_scores.json", scores)
    tracker.summary(dev_names(rounded(best)))
    if len(runs) > 1:
        columns = ["probe", "seed", "epochs", "dev_loss", "auroc", "aiq", "quality", "cost_usd"]
        tracker.table("tried", columns, [[run.get(name) for name in columns] for run in scores["tried"]])
        say(table_of(scores["tried"]))
    areas = "  ".join(f"{name.removeprefix('auroc/')} {value:.3f}" for name, value in best.items() if "auroc/" in name)
    say(f"kept {best['probe']}, seed {best['seed']}: dev loss {best['dev_loss']:.4f}, AUROC {areas}, "
        f"AIQ {best.get('aiq', float('nan')):.4f}\nrouter: {out}")


def rounded(run: dict[str, Any]) -> dict[str, Any]:
    return {name: round(value, 8 if name == "cost_usd" else 6) if isinstance(value, float) else value
            for name, value in run.items() if name != "router"}


def table_of(runs: list[dict[str, Any]]) -> str:
    """The kinds that were tried, best dev loss first."""
    lines = [f"{'probe':<10} {'seed':>5} {'epochs':>6} {'dev loss':>8} {'AUROC':>6} {'AIQ':>7} {'quality':>8} "
             f"{'USD/1k':>8}"]
    for run in runs:
        lines.append(f"{run['probe']:<10} {run['seed']:>5} {run['epochs']:>6} {run['dev_loss']:>8.4f} "
                     f"{run.get('auroc', float('nan')):>6.3f} {run.get('aiq', float('nan')):>7.4f} "
                     f"{run['quality']:>8.4f} {run['cost_usd'] * 1000:>8.4f}")
    return "\n".join(lines)


if __name__ == "__main__":
    launch(main)
