"""What several tests share: the environment of a test run, recorded data where present, and the planted tables."""

from __future__ import annotations

import os
from pathlib import Path

# Before anything imports torch: two cores, no network, no account.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["WANDB_MODE"] = "offline"
os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")

import pytest
from planted import make_table, two_model_pool

from routewright.outcomes import OutcomeTable
from routewright.pool import Pool

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def shared_data():
    """A function: the folder of one recorded data set, or skip with the reason."""

    def folder(name: str) -> Path:
        path = SHARED / name
        if not path.exists():
            pytest.skip(f"recorded outcomes {path} are not on this machine")
        return path

    return folder


@pytest.fixture(scope="session")
def tiny_pool() -> Pool:
    return two_model_pool()


@pytest.fixture(scope="session")
def planted_table() -> OutcomeTable:
    """300 prompts with a planted signal; splits recorded."""
    return make_table()
