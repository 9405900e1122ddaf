"""A pool of two tiny untrained models with the sample pool's tokenizer: what they say is noise, how is real."""

from __future__ import annotations

from dataclasses import replace

import pytest


def write_pool(folder):
    from routewright import samplepool
    tokenizer = samplepool.build_tokenizer(samplepool.vocabulary_texts())
    for recipe in samplepool.QUICK_RECIPES[::2]:
        model = samplepool.make_model(replace(recipe, hidden=16), tokenizer)
        samplepool.save_model(model, tokenizer, folder / "models" / recipe.name)
    (folder / "pool.yaml").write_text(
        "name: tiny\nmodels:\n"
        "  - {name: cheap, price_input: 0.1, price_output: 0.4, path: models/cheap, max_output_tokens: 12}\n"
        "  - {name: strong, price_input: 1.5, price_output: 6.0, path: models/strong, max_output_tokens: 12}\n")
    return folder / "pool.yaml"


@pytest.fixture(scope="session")
def pool_file(tmp_path_factory):
    return write_pool(tmp_path_factory.mktemp("pool"))


@pytest.fixture(scope="session")
def local(pool_file):
    from routewright.backends.local import LocalBackend
    from routewright.pool import Pool
    return LocalBackend(Pool.load(pool_file), batch_size=4)


@pytest.fixture(scope="session")
def prompts():
    from routewright import samplepool
    return [p.as_prompt(i) for i, p in enumerate(samplepool.make_problems("backends", 10))]


@pytest.fixture(scope="session")
def replay(local, prompts):
    """A recording of everything the contract tests ask."""
    from routewright.backends.base import Sampling
    from routewright.backends.replay import ReplayBackend
    drawn = ((0, Sampling()), (1, Sampling(0.7)))
    return ReplayBackend([outcome for name in ("cheap", "strong") for sample, sampling in drawn
                          for outcome in local.call_many(name, prompts, sampling, sample)])
