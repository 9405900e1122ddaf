"""Scores of routers, in two forms.

`compat` gives the numbers that published systems print, with their conventions and traps, so that results can be laid
beside theirs. `sound` gives the same ideas with the traps removed; reports use it by default, and its functions are
here by their plain names.

Shapes: N prompts, M models; quality (N, M) in [0, 1], cost (N, M) in USD. Two-model scores mean P(the cheap model
suffices), higher = the cheap model is enough; `compat` functions that take the other polarity say so.
"""

from routewright.metrics import compat, sound
from routewright.metrics.sound import (
    Collapse,
    Reliability,
    ThresholdCurve,
    aiq,
    apgr,
    auroc,
    brier,
    chance_sd,
    collapse,
    cpt,
    ece,
    frontier,
    hull,
    mix_quality,
    mix_weights,
    oracle,
    pgr,
    picked,
    pool_range,
    quality_at_share,
    regret,
    reliability,
    reward_oracle,
    shuffled_quality,
    threshold_curve,
    youden,
)

arena_score = compat.routerarena_score

__all__ = [
    "Collapse", "Reliability", "ThresholdCurve", "aiq", "apgr", "arena_score", "auroc", "brier", "chance_sd",
    "collapse", "compat", "cpt", "ece", "frontier", "hull", "mix_quality", "mix_weights", "oracle", "pgr", "picked",
    "pool_range", "quality_at_share", "regret", "reliability", "reward_oracle", "shuffled_quality", "sound",
    "threshold_curve", "youden",
]
