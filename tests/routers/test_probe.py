"""Probes: every kind learns a planted signal, their folder holds all of it, and another base is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from planted import make_table

from routewright.errors import UserError
from routewright.metrics import auroc
from routewright.routers import load_router, make_router
from routewright.routers.probe import PROBES, head_logits, initial_head, layer_shares, train_head
from routewright.schema import Prompt


@pytest.fixture(scope="module")
def parts():
    table = make_table(n=400, seed=3)
    return table.split("train"), table.split("dev"), table.split("test")


@pytest.fixture(scope="module")
def models(root):
    return root / "data" / "sample" / "models"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("states"))


@pytest.fixture(scope="module")
def base(models, tmp_path_factory):
    """A Qwen2 with random weights: all its layers keep what the words are. The sample's forgets those it never saw."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from routewright.encoders import load_tokenizer
    from routewright.samplepool import save_model

    tokenizer = load_tokenizer(models / "cheap")
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True))
    folder = tmp_path_factory.mktemp("base") / "random"
    save_model(model, tokenizer, folder)
    return str(folder)


def made(models, cache, **options):
    return make_router("probe", **{"base": str(models / "cheap"), "cache": cache, "epochs": 25, "hidden_sizes": [32],
                                   "learning_rate": 3e-3, **options})


@pytest.mark.parametrize("probe", PROBES)
def test_every_kind_learns_and_survives_its_folder(probe, base, models, cache, parts, tmp_path):
    train, dev, test = parts
    router = made(models, cache, base=base, probe=probe, name="mine").fit(train, dev, 0)
    estimate = router.estimate(test.prompts)
    assert estimate.shape == (test.n, 2) and 0 <= estimate.min() and estimate.max() <= 1
    assert auroc(test.quality[:, 0] >= 0.5, estimate[:, 0]) > 0.75
    hard = np.array(["hard" in p.prompt for p in test.prompts])
    assert estimate[~hard, 0].mean() > estimate[hard, 0].mean() + 0.3
    assert np.abs(estimate.mean(axis=0) - test.quality.mean(axis=0)).max() < 0.12
    again = load_router(router.save(tmp_path / "r"))
    assert again.options == router.options and again.name == "mine"
    assert np.array_equal(again.estimate(test.prompts), estimate)
    assert {p.suffix for p in (tmp_path / "r").iterdir()} == {".json", ".safetensors"}
    card = json.loads((tmp_path / "r" / "router.json").read_text())
    assert card["base"]["layers"] == 3 and card["base"]["width"] == 64 and card["options"]["probe"] == probe


def test_equal_seeds_give_equal_bytes_and_leave_torch_alone(models, cache, parts, tmp_path):
    import torch

    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    for run in "ab":
        made(models, cache).fit(*parts[:2], 7).save(tmp_path / run)
    assert torch.equal(torch.rand(3), wanted)
    for file in ("router.json", "weights.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    made(models, cache).fit(*parts[:2], 8).save(tmp_path / "c")
    first, other = ((tmp_path / run / "weights.safetensors").read_bytes() for run in "ac")
    assert first != other


@pytest.mark.parametrize("probe", ["softmax", "dirichlet"])
def test_learnt_layer_weights_find_the_layer_that_knows(probe):
    """Six layers of noise and one that carries the label: its share must grow, without the whole head failing."""
    random = np.random.default_rng(0)
    x = random.normal(size=(600, 7, 8)).astype(np.float32)
    y = (random.random((600, 2)) < 0.5).astype(float)
    x[:, 4, :2] += 2 * (2 * y - 1)
    parameters, history = train_head(
        x[:450], y[:450], (x[450:], y[450:]), 0, probe=probe, hidden_sizes=[16], dropout=0.0, learning_rate=0.02,
        weight_decay=0.0, batch_size=32, epochs=40, patience=40)
    shares = layer_shares(parameters)
    assert shares.argmax() == 4 and shares[4] > 0.4 and shares.sum() == pytest.approx(1.0)
    assert auroc(y[450:, 0] > 0.5, head_logits(parameters, x[450:])[:, 0]) > 0.85
    assert history[-1]["dev_loss"] < history[0]["dev_loss"] - 0.1


def test_dirichlet_draws_in_training_and_stands_at_its_expectation_afterwards():
    import torch

    from routewright.routers.probe import _train_logits

    random = np.random.default_rng(0)
    start = initial_head(4, 3, np.full((5, 2), 0.5), "dirichlet", [], 0)
    start["weight_0"] = random.normal(size=(4, 2)).astype(np.float32)
    x = np.repeat(random.normal(size=(1, 3, 4)).astype(np.float32), 4000, axis=0)
    values = {key: torch.from_numpy(value) for key, value in start.items()}
    torch.manual_seed(0)
    drawn = _train_logits(values, torch.from_numpy(x), "dirichlet", 0.0).numpy()
    expected = head_logits(start, x[:1])
    assert drawn.std(axis=0).min() > 0.1  # another mixture for every prompt
    assert np.abs(drawn.mean(axis=0) - expected).max() < 0.1  # whose mean is what serving computes
    fixed = _train_logits(values, torch.from_numpy(x[:3]), "softmax", 0.0).numpy()
    assert np.allclose(fixed, expected, atol=1e-5)


def test_an_untrained_head_knows_the_mean_quality():
    y = np.array([[1.0, 0.2], [0.5, 0.4]])
    start = initial_head(6, 3, y, "mean", [8, 4], 0)
    found = 1 / (1 + np.exp(-head_logits(start, np.ones((2, 6), np.float32))))
    assert np.allclose(found, y.mean(axis=0), atol=1e-6)


def test_fits_without_dev_on_a_handful_and_on_a_sample(models, cache, parts):
    train, dev, test = parts
    few = train.rows(np.arange(6))
    assert np.isfinite(made(models, cache).fit(few, None, 0).estimate(test.prompts[:3])).all()
    part = made(models, cache, max_samples=40).fit(train, dev, 0)
    assert np.isfinite(part.estimate([Prompt("e", ""), Prompt("s", "\ud800 half a pair")])).all()
    assert part.estimate([]).shape == (0, 2)


def test_references_and_responses_never_reach_an_estimate(models, cache, parts):
    def told(table, text):
        return replace(table, prompts=[replace(p, reference=text) for p in table.prompts],
                       responses=[dict.fromkeys(table.models, text) for _ in table.prompts])

    train, dev, test = parts
    plain = made(models, cache, epochs=3).fit(train, dev, 0).estimate(test.prompts)
    other = made(models, cache, epochs=3).fit(told(train, "hard"), told(dev, "hard"), 0)
    assert np.array_equal(other.estimate(told(test, "hard").prompts), plain)


def test_overhead_holds_the_forward_pass_although_it_is_cached(models, tmp_path, parts):
    train, dev, test = parts
    router = made(models, str(tmp_path), epochs=2, gpu_usd_per_hour=3600.0).fit(train, dev, 0)
    router.estimate(test.prompts)  # the first look
    again = load_router(router.save(tmp_path / "r"))
    again.estimate(test.prompts)
    assert again.reader.fresh == 0
    usd, seconds = again.overhead(test.prompts)
    cached = again.reader._cache._seconds.values()
    assert seconds[0] > 0.9 * np.median(list(cached)) > 1e-5
    assert np.allclose(usd, seconds)


def test_a_model_with_one_quality_is_warned_of_and_stays_there(models, cache, parts, caplog):
    train, dev, test = parts
    ones = [replace(t, quality_mean=np.column_stack([t.quality_mean[:, 0], np.ones(t.n)])) for t in (train, dev)]
    estimate = made(models, cache).fit(*ones, 0).estimate(test.prompts)
    assert "gives model 'strong' the same quality (1)" in caplog.text
    assert estimate[:, 1].min() > 0.95 and np.ptp(estimate[:, 0]) > 0.3


# ---------------------------------------------------------------- what people get wrong

def test_another_base_model_is_refused_in_one_sentence(models, cache, parts, tmp_path):
    folder = made(models, cache, epochs=2).fit(*parts[:2], 0).save(tmp_path / "r")
    with pytest.raises(UserError, match=r"on a base model with 3 layers of states of size 64 .* has 5 of size 96"):
        load_router(folder, base=str(models / "strong"))
    card = json.loads((folder / "router.json").read_text())
    card["base"]["weights"] = "0123456789abcdef"
    (folder / "router.json").write_text(json.dumps(card))
    with pytest.raises(UserError, match="fitted on other weights"):
        load_router(folder)
    del card["base"]
    (folder / "router.json").write_text(json.dumps(card))
    with pytest.raises(UserError, match="`base` is damaged"):
        load_router(folder)


@pytest.mark.parametrize("change", ["missing", "another shape", "nan"])
def test_damaged_weights_are_refused(change, models, cache, parts, tmp_path):
    from safetensors.numpy import load_file, save_file

    folder = made(models, cache, epochs=2).fit(*parts[:2], 0).save(tmp_path / "r")
    whole = load_file(folder / "weights.safetensors")
    for key, value in whole.items():
        state = dict(whole)
        if change == "missing":
            del state[key]
        else:
            state[key] = np.full_like(value, np.nan) if change == "nan" else np.concatenate([value, value])
        save_file(state, folder / "weights.safetensors")
        with pytest.raises(UserError, match="again"):
            load_router(folder).estimate(parts[2].prompts[:2])


@pytest.mark.parametrize(("options", "said"), [
    ({"probe": "dirichlett"}, r"probe must be one of .* did you mean 'dirichlet'|probe must be one of"),
    ({"hidden_sizes": [0]}, "hidden_sizes must be a list of whole numbers above 0"),
    ({"hidden_sizes": [True]}, "hidden_sizes must be a list"),
    ({"dropout": 1.0}, "dropout must be below 1"), ({"learning_rate": 0.0}, "learning_rate must be"),
    ({"epochs": 0}, "epochs must be 1 or more"), ({"patience": 0}, "patience must be 1 or more"),
    ({"wrap": "raw"}, "wrap must be one of"), ({"max_length": 0}, "max_length must be 1 or more"),
    ({"hiden_sizes": [3]}, "did you mean 'hidden_sizes'"),
])
def test_wrong_options_are_named(options, said):
    with pytest.raises(UserError, match=said):
        make_router("probe", **options)
