"""Encoder routers: right columns in the right order, however the batches fall, and no score from an untrained head."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from planted import make_table, minilm_folder, two_model_pool

from routewright.errors import MissingSetup, UserError
from routewright.metrics import auroc
from routewright.router_data import SEPARATOR
from routewright.routers import from_entry, load_router, make_router, write_card
from routewright.schema import Prompt
from routewright.tiny_deberta import build_tiny

PROMPTS = [Prompt(f"p{i}", f"{'river stone ' * (i * 7 % 23)}case {i} plain or hard",
                  context="a window" if i % 3 else "") for i in range(41)]
MODELS = ("cheap", "strong", "other")


def checkpoint(folder, outputs: int, seed: int = 0, card: dict | None = None, separator: bool = False, models=MODELS):
    """A tiny checkpoint with random weights far enough from zero, so that swapped rows or columns show."""
    model, tokenizer = build_tiny([*(p.prompt for p in PROMPTS), *MODELS, "a window what is"], outputs, seed)
    if separator:
        tokenizer.add_special_tokens({"additional_special_tokens": [SEPARATOR]})
        model.resize_token_embeddings(len(tokenizer))
    torch.manual_seed(seed)
    with torch.no_grad():
        model.deberta.embeddings.word_embeddings.weight.normal_(0, 1.0)
        model.classifier.weight.normal_(0, 0.5)
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if card is not None:
        write_card(folder, kind="trained_deberta", name="t", models=models, pool=None, train_prompts=PROMPTS[:1],
                   base_model="tiny", options=card)
    return model, tokenizer


def logits_one_by_one(model, tokenizer, texts):
    """(N, K), each text alone: nothing is padded, so padding cannot hide a mistake."""
    with torch.inference_mode():
        return np.vstack([model(**tokenizer(*t, return_tensors="pt")).logits.numpy() for t in texts])


def softmax_last(logits):
    return torch.softmax(torch.tensor(logits), dim=1)[:, -1].numpy()


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_pool_form_one_output_per_model(tmp_path, batch_size):
    model, tokenizer = checkpoint(tmp_path, 3, card={"form": "pool", "max_length": 512})
    estimate = load_router(tmp_path, batch_size=batch_size).estimate(PROMPTS)
    texts = [(f"{p.prompt}\n{p.context}" if p.context else p.prompt,) for p in PROMPTS]
    expected = 1 / (1 + np.exp(-logits_one_by_one(model, tokenizer, texts)))
    assert estimate.shape == (41, 3) and np.abs(estimate - expected).max() < 1e-5
    assert np.ptp(expected, axis=0).min() > 1e-3 and np.ptp(expected, axis=1).min() > 1e-3  # rows and columns do differ


def test_pair_form_reads_the_name_of_each_model(tmp_path):
    model, tokenizer = checkpoint(tmp_path, 2, card={"form": "pair", "compat": False, "max_length": 512})
    estimate = load_router(tmp_path, batch_size=8).estimate(PROMPTS)
    for column, name in enumerate(MODELS):
        expected = softmax_last(logits_one_by_one(model, tokenizer, [(p.prompt, name) for p in PROMPTS]))
        assert np.abs(estimate[:, column] - expected).max() < 1e-5


def test_a_cobench_checkpoint_without_router_json(tmp_path):
    model, tokenizer = checkpoint(tmp_path, 2, separator=True)
    router = from_entry({"name": "cobench", "kind": "trained_deberta", "path": str(tmp_path), "form": "pair"})
    with pytest.raises(UserError, match="does not know its models yet"):
        router.estimate(PROMPTS)
    estimate = router.bind(("cheap", "strong"), two_model_pool()).estimate(PROMPTS)
    for column, name in enumerate(("cheap", "strong")):
        texts = [(f"{p.prompt} {SEPARATOR} {name} {SEPARATOR}",) for p in PROMPTS]
        assert np.abs(estimate[:, column] - softmax_last(logits_one_by_one(model, tokenizer, texts))).max() < 1e-5
    found = load_router(tmp_path).bind(("cheap", "strong"), two_model_pool())  # the form is seen from the two outputs
    assert np.allclose(found.estimate(PROMPTS), estimate)


@pytest.mark.parametrize(("outputs", "expected"), [
    (1, lambda z: 1 / (1 + np.exp(-z[:, 0]))),
    (3, lambda z: torch.softmax(torch.tensor(z), 1).numpy() @ np.array([0, 0.5, 1])),
])
def test_pair_form_with_one_or_several_labels(tmp_path, outputs, expected):
    model, tokenizer = checkpoint(tmp_path, outputs, card={"form": "pair"})
    estimate = load_router(tmp_path).estimate(PROMPTS[:5])
    logits = logits_one_by_one(model, tokenizer, [(p.prompt, "cheap") for p in PROMPTS[:5]])
    assert np.abs(estimate[:, 0] - expected(logits)).max() < 1e-5


def test_long_questions_keep_the_models_name(tmp_path):
    checkpoint(tmp_path, 2, card={"form": "pair", "max_length": 32})
    estimate = load_router(tmp_path).estimate([Prompt("long", "river stone " * 400)])
    assert np.ptp(estimate[0]) > 1e-6


def test_binding_keeps_the_trained_columns(tmp_path):
    checkpoint(tmp_path, 3, card={"form": "pool"})
    whole = load_router(tmp_path).estimate(PROMPTS)
    router = load_router(tmp_path).fit(make_table(n=20))  # a cache of two of its three models, in another order
    assert router.models == ("cheap", "strong") and router.pool.names == ("cheap", "strong")
    assert np.allclose(router.estimate(PROMPTS), whole[:, :2])
    with pytest.raises(UserError, match="the pool has none of them"):
        load_router(tmp_path).bind(("x", "y"), None)


def test_a_pool_form_of_another_size_is_named(tmp_path):
    checkpoint(tmp_path, 3)
    router = make_router("trained_deberta", path=str(tmp_path), form="pool").bind(("cheap", "strong"), two_model_pool())
    with pytest.raises(UserError, match="3 outputs and the router 2 models"):
        router.estimate(PROMPTS)


def test_a_copy_scores_the_same(tmp_path):
    checkpoint(tmp_path / "a", 3, card={"form": "pool"})
    router = load_router(tmp_path / "a")
    copy = load_router(router.save(tmp_path / "b"))
    assert np.array_equal(copy.estimate(PROMPTS), router.estimate(PROMPTS)) and copy.name == "t"
    assert copy.as_card() == {**router.as_card()}


def test_a_base_model_is_no_router(tmp_path):
    with pytest.raises(UserError, match="would be random; this is a base model"):
        make_router("trained_deberta", path=str(minilm_folder()), form="pair").bind(("a",), None).estimate(PROMPTS)
    with pytest.raises(MissingSetup, match="no such weights folder"):
        make_router("trained_deberta", path=str(tmp_path / "gone")).bind(("a",), None).estimate(PROMPTS)


def test_a_folder_of_another_kind_is_named(tmp_path):
    (tmp_path / "router.json").write_text(json.dumps({"kind": "linear", "models": ["a"]}))
    with pytest.raises(UserError, match="kind is 'linear'"):
        make_router("trained_deberta", path=str(tmp_path))


def test_the_frozen_encoder_gets_a_fitted_head(tmp_path):
    """CoBench left this head at its random start, and its scores were noise."""
    table = make_table(n=260, seed=2)
    train, dev, test = table.split("train"), table.split("dev"), table.split("test")
    router = make_router("deberta", encoder=str(minilm_folder()), cache=str(tmp_path / "c")).fit(train, dev, 0)
    estimate = router.estimate(test.prompts)
    assert router.weights.any() and auroc(test.quality[:, 0], estimate[:, 0]) > 0.7
    again = load_router(router.save(tmp_path / "r"))
    assert np.abs(again.estimate(test.prompts) - estimate).max() < 1e-6
