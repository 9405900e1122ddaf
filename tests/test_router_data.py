"""Rows are checked one by one and named by file and line; labels, splits, token ids and batch order behave."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from routewright import router_data
from routewright.errors import UserError
from routewright.router_data import LengthGroupedOrder, PairData

ROOT = Path(__file__).resolve().parents[1]


def write(path, rows):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def row(**change):
    return {"question": "How many?", "llm_id": "cheap", "label": 1, **change}


def without(name):
    found = row()
    del found[name]
    return found


def test_reads_cobench_rows_and_ignores_other_fields(tmp_path):
    data = router_data.read_pairs(write(tmp_path / "a.jsonl", [row(), row(question="Why?", label=0, source="x")]))
    assert data.questions == ["How many?", "Why?"] and data.llm_ids == ["cheap", "cheap"]
    assert data.labels.tolist() == [1, 0] and data.labels.dtype == np.int64 and data.lines == [1, 2]


BAD = {
    "no question": (without("question"), "`question` is missing"),
    "no label": (without("label"), "`label` is missing"),
    "misspelt": ({"question": "a", "llm_id": "b", "lable": 1}, "did you mean 'lable'"),
    "number as question": (row(question=7), "int 7"),
    "empty question": (row(question="  "), "not empty"),
    "null llm": (row(llm_id=None), "NoneType None"),
    "label 7 of 4": (row(label=7), "NUM_LABELS is 4"),
    "label -1": (row(label=-1), "label` is -1"),
    "label 1.5": (row(label=1.5), "float 1.5"),
    "label '2'": (row(label="2"), "str '2'"),
    "label None": (row(label=None), "NoneType None"),
    "label true": (row(label=True), "write 1"),
    "half a surrogate": ('{"question": "\\ud800", "llm_id": "a", "label": 1}', "surrogate"),
    "torn": ('{"question": "a", "llm', "not JSON"),
    "a list": ("[1, 2]", "expected a JSON object"),
    "NaN": ('{"question": "a", "llm_id": "b", "label": NaN}', "no JSON number"),
    "key twice": ('{"question": "a", "question": "b", "llm_id": "c", "label": 1}', "stands twice"),
}


@pytest.mark.parametrize("name", BAD)
def test_every_bad_row_is_named_by_file_and_line(tmp_path, name):
    bad, words = BAD[name]
    path = write(tmp_path / "d.jsonl", [row(), row(label=0), bad, row()])
    with pytest.raises(UserError, match="d.jsonl:3: ") as error:
        router_data.read_pairs(path, num_labels=4)
    assert words in str(error.value) and "\n" not in str(error.value)
    data = router_data.read_pairs(path, num_labels=4, skip_bad=1)
    assert len(data) == 3 and len(data.skipped) == 1 and "d.jsonl:3" in data.skipped[0]
    with pytest.raises(UserError, match="d.jsonl:5: .*1 bad rows were skipped"):
        router_data.read_pairs(write(path, [row(), row(), bad, row(), bad]), num_labels=4, skip_bad=1)


def test_empty_and_missing_files(tmp_path):
    with pytest.raises(UserError, match="empty"):
        router_data.read_pairs(write(tmp_path / "e.jsonl", []))
    with pytest.raises(UserError, match="no usable row"):
        router_data.read_pairs(write(tmp_path / "e.jsonl", ["x"]), skip_bad=3)
    with pytest.raises(UserError, match="no such file"):
        router_data.read_pairs(tmp_path / "none.jsonl")


def test_shares_for_one_output(tmp_path):
    data = router_data.read_pairs(write(tmp_path / "s.jsonl", [row(label=0.25), row(label=1)]), num_labels=1)
    assert data.labels.tolist() == [0.25, 1.0]
    with pytest.raises(UserError, match=r"in \[0, 1\]"):
        router_data.read_pairs(write(tmp_path / "s.jsonl", [row(label=1.5)]), num_labels=1)


def pairs(labels, questions=None):
    n = len(labels)
    questions = questions or [f"question {i}" for i in range(n)]
    return PairData(questions, ["m"] * n, np.asarray(labels), list(range(1, n + 1)), "d.jsonl")


def test_one_class_stops_and_imbalance_warns_with_the_table():
    with pytest.raises(UserError, match="all 5 labels are 1"):
        router_data.check_labels(pairs([1] * 5), 2)
    assert router_data.check_labels(pairs([0, 1] * 5), 2) == []
    (warning,) = router_data.check_labels(pairs([0] + [1] * 19), 2)
    assert "label 0: 1 rows (5.0%)" in warning and "--class_weights balanced" in warning
    assert "no row carries label 2, 3" in router_data.check_labels(pairs([0, 1] * 5), 4)[0]
    (clash,) = router_data.check_labels(pairs([0, 1], ["same", "same"]), 2)
    assert "lines 1 and 2" in clash


def test_soft_labels_without_variation():
    with pytest.raises(UserError, match="nothing to learn"):
        router_data.check_soft_labels(np.ones((4, 2)), ["a", "b"])
    (warning,) = router_data.check_soft_labels(np.array([[1, 0], [1, 1.0]]), ["a", "b"])
    assert "'a'" in warning


def test_weights_even_the_classes_out():
    labels = np.array([0] * 9 + [1])
    weights = router_data.class_weights(labels, 3)
    assert weights[2] == 0 and weights[0] * 9 == pytest.approx(weights[1] * 1)
    assert weights[labels].mean() == pytest.approx(1)
    assert router_data.positive_weights(np.array([[.25, 1.0], [.25, 1.0]])).tolist() == [3.0, 1 / 20]


def test_hold_out_is_stable_and_keeps_duplicates_together():
    fruit = "apples pears plums".split()
    texts = [f"Question number {i} about {fruit[i % 3]} and {i * 37 % 101} more" for i in range(200)]
    texts += texts[:50]
    train, dev = router_data.hold_out(texts, .1)
    assert sorted([*train, *dev]) == list(range(250)) and 5 <= len(dev) <= 60
    assert not {texts[i] for i in train} & {texts[i] for i in dev}
    again = router_data.hold_out(texts[::-1], .1)[1]
    assert {texts[i] for i in dev} == {texts[::-1][i] for i in again}
    with pytest.raises(UserError, match="too few"):
        router_data.hold_out(["a", "a"], .1)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 512), min_size=1, max_size=400), st.integers(1, 33), st.integers(0, 5),
       st.integers(0, 3))
def test_an_epoch_sees_every_row_in_whole_batches_and_is_a_function_of_seed_and_epoch(lengths, batch, seed, epoch):
    order = LengthGroupedOrder(lengths, batch, seed)
    order.set_epoch(epoch)
    rows = list(order)
    assert len(rows) == len(order) and len(rows) % batch == 0
    assert set(rows) == set(range(len(lengths)))
    assert len(rows) - len(lengths) < batch or len(lengths) < batch
    assert max(lengths) == max(lengths[i] for i in rows[:batch])
    same = LengthGroupedOrder(lengths, batch, seed)
    same.set_epoch(epoch)
    assert list(same) == rows


def test_order_pads_little_and_changes_with_the_epoch():
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.lognormal(4, .8, 8000).astype(int) + 5, 512)
    order = LengthGroupedOrder(lengths, 32, seed=1)

    def useful(rows):
        grid = lengths[rows.reshape(-1, 32)]
        return grid.sum() / (grid.max(1) * 32).sum()

    first = order.order()
    assert useful(first) > .93 > .5 > useful(LengthGroupedOrder(lengths, 32, 1, grouped=False).order())
    order.set_epoch(1)
    assert (order.order() != first).mean() > .9
    # Batches must not be the same company each epoch.
    company = Counter(tuple(sorted(b)) for b in first.reshape(-1, 32).tolist())
    assert not company.keys() & {tuple(sorted(b)) for b in order.order().reshape(-1, 32).tolist()}
    # Nor may their lengths fall within the epoch: short and long batches alternate.
    means = lengths[first.reshape(-1, 32)].mean(1)[1:]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < .25


def test_batches_are_padded_to_their_longest():
    rows = router_data.with_labels([{"input_ids": [5, 6, 7]}, {"input_ids": [8]}], np.array([[.5, 1.0], [0.0, 0.25]]))
    batch = router_data.PadBatch(pad_id=0)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].shape == (2, 2) and "token_type_ids" not in batch
    assert router_data.PadBatch(0, multiple=8)(rows)["input_ids"].shape == (2, 8)
    assert router_data.PadBatch(0, fixed_length=16)(rows)["input_ids"].shape == (2, 16)


def test_the_shipped_sample_is_valid():
    data = router_data.read_pairs(ROOT / "data" / "sample_data.jsonl")
    assert len(data) >= 400 and router_data.check_labels(data, 2) == []
    assert len(set(data.llm_ids)) >= 2


class TestTiny:
    """The tiny base model reloads as itself through every class that others will use."""

    texts = [f"Ada has {i} apples and buys {i * 7} more. How many apples are there?" for i in range(50)]

    def test_the_vocabulary_is_a_function_of_the_texts(self):
        from routewright.tiny_deberta import build_vocabulary

        first = build_vocabulary(self.texts)
        assert first == build_vocabulary(self.texts[::-1]) and [p for p, _ in first[:2]] == ["[PAD]", "[UNK]"]
        assert len({p for p, _ in first}) == len(first)
        assert "▁apples" in dict(first) and "▁12" not in dict(first)
        assert len(build_vocabulary(self.texts, size=150)) == 150

    def test_saved_and_loaded(self, tmp_path):
        import torch
        from transformers import (
            AutoModelForSequenceClassification,
            AutoTokenizer,
            DebertaV2ForSequenceClassification,
            DebertaV2Tokenizer,
        )

        from routewright.tiny_deberta import build_tiny, check_tokenizer

        model, tokenizer = build_tiny(self.texts, 2)
        twin, _ = build_tiny(self.texts, 2)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
        check_tokenizer(tokenizer, self.texts, "tiny")
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        model.eval()
        batch = tokenizer(self.texts[:4], ["cheap"] * 4, return_tensors="pt", padding=True)
        with torch.no_grad():
            wanted = model(**batch).logits
            for kind in (AutoModelForSequenceClassification, DebertaV2ForSequenceClassification):
                assert torch.equal(kind.from_pretrained(tmp_path).eval()(**batch).logits, wanted)
        for kind in (AutoTokenizer, DebertaV2Tokenizer):
            loaded = kind.from_pretrained(tmp_path)
            for text in [*self.texts[:5], "unseen wörds, \n\n 3.14 + x", "한국어"]:
                assert loaded(text, "cheap")["input_ids"] == tokenizer(text, "cheap")["input_ids"]

    def test_a_blank_tokenizer_is_noticed(self):
        from transformers import DebertaV2Tokenizer

        from routewright.errors import MissingSetup
        from routewright.tiny_deberta import check_tokenizer

        with pytest.raises(MissingSetup, match="some/folder: .*unknown"):
            check_tokenizer(DebertaV2Tokenizer(), self.texts, "some/folder")

    def test_encoding_keeps_the_model_name_on_long_questions(self):
        from routewright.tiny_deberta import build_tiny

        _, tokenizer = build_tiny([*self.texts, "cheap"], 2)
        (native,) = router_data.encode(tokenizer, ["apples " * 600], ["cheap"], max_length=64)
        name = tokenizer("cheap", add_special_tokens=False)["input_ids"]
        assert len(native["input_ids"]) == 64 and native["input_ids"][-1 - len(name):-1] == name
        tokenizer.add_special_tokens({"additional_special_tokens": [router_data.SEPARATOR]})
        (compat,) = router_data.encode(tokenizer, ["How many?"], ["cheap"], compat=True)
        assert compat["input_ids"].count(tokenizer.convert_tokens_to_ids(router_data.SEPARATOR)) == 2
