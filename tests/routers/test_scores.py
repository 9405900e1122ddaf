"""Scores of the cheap model: one polarity, nothing saturated, and what each tells on a model with planted doubts."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import pytest
from planted import make_table
from tiny_causal import wrap_text

from routewright.errors import MissingSetup, UserError
from routewright.metrics import auroc
from routewright.routers import load_router, make_router
from routewright.routers.scores import (
    LOGIT_SCORES,
    SELF_QUESTION,
    TEXT_QUESTION,
    agreement,
    answer_clusters,
    logit_scores,
    parse_ease,
)

EVERY = {"self_questioning": {}, "self text": {"kind": "self_questioning", "form": "text"},
         "semantic_entropy": {"max_new_tokens": 3},
         **{score: {"kind": "logit_score", "score": score} for score in LOGIT_SCORES}}


def planted(n: int, seed: int):
    """Short prompts that say `hard` or `plain`; on the hard ones the cheap model is wrong nine times of ten."""
    table = make_table(n=n, seed=seed)

    def short(text: str) -> str:
        words = text.split()
        mark = "hard" if "hard" in words else "plain"
        return " ".join([words[0], mark, *words[-2:], mark])

    return replace(table, prompts=[replace(p, prompt=short(p.prompt)) for p in table.prompts])


@pytest.fixture(scope="module")
def parts():
    table = planted(300, 3)
    return table.split("train"), table.split("dev"), table.split("test")


@pytest.fixture(scope="module")
def cheap(root, tmp_path_factory):
    """A small Qwen2 trained for seconds to be sure of `plain` prompts and lost on `hard` ones, and to know it."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from routewright.encoders import load_tokenizer
    from routewright.samplepool import answer_loss, save_model

    tokenizer = load_tokenizer(root / "data" / "sample" / "models" / "cheap")
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, initializer_range=.05,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id))
    prompts, random = [p.prompt for p in planted(400, 9).prompts], np.random.default_rng(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=8e-3)

    def ids(texts):
        return tokenizer(texts, add_special_tokens=False)["input_ids"]

    def row(kind: int, text: str) -> tuple[str, str]:
        hard = "hard" in text
        if kind == 0:
            return text, f"{random.integers(200)}" if hard else "12"
        if kind == 1:
            return SELF_QUESTION.render(text), " 8" if hard else " 1"  # as `label_ids` reads it after this chat form
        return TEXT_QUESTION + text, "7" if hard else "93"

    for step in range(210):
        rows = [row(step % 3, prompts[i]) for i in random.choice(len(prompts), 16)]
        asked = ids([wrap_text("chat", tokenizer, question) for question, _ in rows])
        told = ids([f"{answer}<eos>" for _, answer in rows])
        width = max(len(a) + len(b) for a, b in zip(asked, told, strict=True))
        batch, labels = torch.full((16, width), tokenizer.pad_token_id), torch.full((16, width), -100)
        for i, (a, b) in enumerate(zip(asked, told, strict=True)):
            batch[i, :len(a) + len(b)] = torch.tensor(a + b)
            labels[i, len(a):len(a) + len(b)] = torch.tensor(b)
        loss = answer_loss(model, batch, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("models") / "cheap"
    save_model(model, tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("readings"))


def made(which: str, cheap, cache, **more):
    options = {"kind": which, **EVERY[which], "base": str(cheap), "cache": cache, "read_batch": 64, **more}
    return make_router(options.pop("kind"), **options)


@pytest.mark.parametrize("name", EVERY)
def test_every_score_knows_the_planted_doubts_in_one_polarity(name, cheap, cache, parts, tmp_path):
    train, dev, test = parts
    router = made(name, cheap, cache, name="mine").fit(train, dev, 0)
    scores = router.scores(test.prompts)
    hard = np.array(["hard" in p.prompt for p in test.prompts])
    assert scores.shape == (test.n,) and 0 <= scores.min() and scores.max() <= 1
    assert scores[~hard].mean() > scores[hard].mean()
    assert auroc(test.quality[:, 0] >= 0.5, scores) > 0.75
    assert router.card["train_auroc"] > 0.75
    estimate = router.estimate(test.prompts)
    assert estimate.shape == (test.n, 2)
    # Calibrated: on average right, on either half; and the strong model, which fails at random, stays nearly constant.
    assert np.abs(estimate.mean(axis=0) - test.quality.mean(axis=0)).max() < 0.15
    assert estimate[~hard, 0].mean() > 0.7 > 0.3 > estimate[hard, 0].mean()
    assert np.ptp(estimate[:, 1]) < 0.2
    again = load_router(router.save(tmp_path / "router"))
    assert np.array_equal(again.estimate(test.prompts), estimate) and again.name == "mine"
    assert {p.suffix for p in (tmp_path / "router").iterdir()} <= {".json", ".safetensors"}


def test_scores_need_no_fit(cheap, cache, parts):
    router = made("entropy", cheap, cache)
    assert np.array_equal(router.scores(parts[2].prompts),
                          made("entropy", cheap, cache).fit(*parts[:2]).scores(parts[2].prompts))


def test_the_base_is_the_cheapest_member_of_the_pool(cheap, cache, parts):
    train, dev, test = parts
    named = [replace(m, path=str(cheap)) if m.name == "cheap" else m for m in train.pool.models]
    pool = replace(train.pool, models=tuple(named))
    router = made("entropy", "", cache).fit(replace(train, pool=pool), dev, 0)
    assert router.base == str(cheap) and router.member == "cheap"
    with pytest.raises(UserError, match="'cheap', the cheapest model, has no `path`"):
        made("entropy", "", cache).fit(train, dev, 0)
    with pytest.raises(MissingSetup, match="hf download no-such/base"):
        made("entropy", "no-such/base", cache).fit(train, dev, 0)


# ---------------------------------------------------------------- what it costs

@pytest.mark.parametrize("name", ["self text", "semantic_entropy", "margin"])
def test_overhead_counts_the_generated_tokens_at_the_pools_prices(name, cheap, cache, parts):
    train, dev, test = parts
    named = tuple(replace(m, path=str(cheap)) if m.name == "cheap" else m for m in train.pool.models)
    train = replace(train, pool=replace(train.pool, models=named))
    router = made(name, cheap, cache).fit(train, dev, 0)
    router.estimate(test.prompts)
    usd, seconds = router.overhead(test.prompts)
    assert (seconds > 1e-5).all()  # although the readings come from the cache
    if name == "margin":  # one forward pass, nothing generated
        assert not usd.any()
    else:
        read = router._read(test.prompts)[:, -2:]
        assert np.allclose(usd, (read[:, 0] * 0.10 + read[:, 1] * 0.40) / 1e6) and usd.min() > 0
        least = 5 if name == "semantic_entropy" else 1
        assert read[:, 1].min() >= least and (read[:, 0] >= least * 5).all()
    paid = made(name, cheap, cache, gpu_usd_per_hour=3600.0).fit(train, dev, 0)
    paid.estimate(test.prompts)
    usd, seconds = paid.overhead(test.prompts)
    assert np.allclose(usd, seconds)  # the machine's time instead of tokens, never both
    foreign = made(name, cheap, cache).fit(parts[0], dev, 0)  # not a member of this pool: no price is known
    foreign.estimate(test.prompts)
    assert not foreign.overhead(test.prompts)[0].any()


def test_a_folder_pays_the_prices_of_the_evaluation(cheap, cache, parts, tmp_path):
    """`evaluate --pool newer.yaml` re-prices what the router itself spends too, not the answers alone."""
    from routewright.evaluation import Entry, _bind

    train, dev, test = parts
    pool = replace(train.pool, models=tuple(replace(m, path=str(cheap)) if m.name == "cheap" else m
                                            for m in train.pool.models))
    made("semantic_entropy", cheap, cache).fit(replace(train, pool=pool), dev, 0).save(tmp_path / "router")
    spent = []
    for factor in (1, 3):
        router = load_router(tmp_path / "router")
        newer = replace(pool, models=tuple(replace(m, price_input=m.price_input * factor, price_output=m.price_output *
                                                   factor) for m in pool.models))
        _bind(router, replace(test, pool=newer), Entry("here", "mine", {}))
        spent.append(router.overhead(test.prompts)[0])
    assert spent[0].min() > 0 and np.allclose(spent[1], 3 * spent[0])


def test_readings_of_another_question_are_not_taken(cheap, cache, parts, tmp_path, monkeypatch):
    """A change of the question, or of how answers are read, leaves cached readings behind."""
    from routewright.routers import scores

    for name, what in (("self text", "TEXT_QUESTION"), ("self_questioning", "_READING"), ("semantic_entropy", "ALIKE")):
        before = made(name, cheap, str(tmp_path))
        before.scores(parts[2].prompts[:3])
        assert before.reader.fresh == 3
        again = made(name, cheap, str(tmp_path))
        again.scores(parts[2].prompts[:3])
        assert again.reader.fresh == 0
        with monkeypatch.context() as changed:
            old = getattr(scores, what)
            changed.setattr(scores, what, "Easy? " + old if isinstance(old, str) else old * 1.25)
            other = made(name, cheap, str(tmp_path))
            other.scores(parts[2].prompts[:3])
            assert other.reader.fresh == 3, name


# ---------------------------------------------------------------- the parser

@pytest.mark.parametrize(("answer", "ease"), [
    (r"\boxed{85}", .85), (r"I think \boxed{ 7 }.", .07), (r"\boxed{150}", 1.0), (r"\boxed{-3}", 0.0), ("[40]", .4),
    (r"1. \boxed{60}", .6), (r"\boxed{72.5}", .72), (r"\boxed{90%}", .9), ("10", .10), ("about 10 of 100", .10),
    ("100", 1.0), ("0", 0.0), ("85%", .85), ("85/100", .85), ("It is 9.", .09), ("score:42", .42), ("007", .07),
])
def test_the_text_answer_is_read_as_a_whole_number(answer, ease):
    assert parse_ease(answer) == pytest.approx(ease)


@pytest.mark.parametrize("answer", ["", "easy", "1000", "3.5", "x10", "10th", "-5", "0.85", "1,000", "٣٠٠٠",
                                    "\\boxed{}", "\\boxed{high}", "2024-11"])
def test_what_names_no_whole_number_from_0_to_100_is_unparsable(answer):
    assert parse_ease(answer) is None


def test_unparsable_answers_score_one_half_and_are_counted(root, cache, parts, caplog):
    """The sample's cheap model was never asked such a thing: it answers with a guess at the sum, or with nothing."""
    base = root / "data" / "sample" / "models" / "cheap"
    router = made("self text", base, cache)
    with caplog.at_level(logging.WARNING, "routewright"):
        scores = router.scores(parts[2].prompts[:40])
    assert ((scores == 0.5).sum() >= router.unparsable) and (router.unparsable > 0) == ("name no number" in caplog.text)


# ---------------------------------------------------------------- logits

def test_logit_scores_follow_their_formulas():
    logits = np.array([[2.0, 1.0, 0.0, -1.0], [5.0, 5.0, 5.0, 5.0], [0.0, 30.0, 0.0, 0.0]])
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    found = dict(zip(LOGIT_SCORES, logit_scores(logits).T, strict=True))
    top = -np.sort(-p, axis=1)
    assert np.allclose(found["margin"], [1 / 2, 0, 30 / 31])
    assert np.allclose(found["confidence_margin"], top[:, 0] - top[:, 1])
    assert np.allclose(found["entropy"], 1 + (p * np.log(p)).sum(axis=1) / np.log(4))
    assert np.allclose(found["max_logit"], [.5 * (1 + x / (10 + x)) for x in (2, 5, 30)])
    variance = logits.var(axis=1)
    assert np.allclose(found["top10_variance"], variance / (1 + variance))


def test_no_score_saturates_and_every_one_keeps_its_order():
    """Sharper and sharper logits of the size language models have: the origin's sigmoid of the maximum is 1 for all."""
    random = np.random.default_rng(0)
    base = np.sort(random.normal(size=(1, 5000)))
    sharpness = np.linspace(2, 7, 40)[:, None]
    scores = logit_scores(base * sharpness)
    assert (np.diff(scores, axis=0) > 0).all() and scores.max() < 1
    saturated = 1 / (1 + np.exp(-(base * sharpness).max(axis=1) * 2))
    assert len(np.unique(saturated.astype(np.float32))) < 20 < len(np.unique(scores[:, 3].astype(np.float32)))


def test_scores_do_not_depend_on_the_company_a_prompt_keeps(cheap, parts):
    for name in ("margin", "self_questioning"):
        together = made(name, cheap, "none").scores(parts[2].prompts[:12])
        alone = [made(name, cheap, "none", read_batch=1).scores([p])[0] for p in parts[2].prompts[:12]]
        assert np.abs(together - alone).max() < 1e-5, name


def test_over_several_tokens_the_score_is_a_mean_that_stops_at_the_end(cheap, cache, parts):
    one, three = (made("entropy", cheap, cache, tokens=k).scores(parts[2].prompts[:20]) for k in (1, 3))
    plain = np.array(["plain" in p.prompt for p in parts[2].prompts[:20]])
    assert not np.allclose(one, three) and (three[plain].mean() > three[~plain].mean())
    # A `plain` answer is one sure token and a sure end; going on for longer changes nothing.
    assert np.allclose(made("entropy", cheap, cache, tokens=4).scores(parts[2].prompts[:20])[plain],
                       three[plain], atol=0.15)


# ---------------------------------------------------------------- semantic entropy

def test_clusters_and_agreement():
    assert answer_clusters(["12", "12", " 12 "]) == [3]
    assert answer_clusters(["12", "97", "12", "40"]) == [2, 1, 1]
    assert answer_clusters(["the answer is 12", "the answer is 13", "no idea"]) == [2, 1]
    assert answer_clusters(["", " "]) == [2]
    assert agreement(["a"] * 5) == 1.0 and agreement(list("abcde")) == pytest.approx(1 / 5)
    p = np.array([.6, .2, .2])
    assert agreement(["x", "x", "x", "y", "z"]) == pytest.approx(np.exp((p * np.log(p)).sum()))


def test_a_prompt_beyond_the_context_scores_zero(cheap, cache, parts):
    long = replace(parts[2].prompts[0], prompt="hard river " * 400)
    for name in ("semantic_entropy", "self text"):
        assert made(name, cheap, cache).scores([long, parts[2].prompts[1]])[0] == 0.0


# ---------------------------------------------------------------- what people get wrong

@pytest.mark.parametrize(("kind", "options", "said"), [
    ("logit_score", {"score": "entrpy"}, r"score must be one of .*did you mean 'entropy'"),
    ("logit_score", {"tokens": 0}, "tokens must be 1 or more"),
    ("self_questioning", {"form": "words"}, "form must be one of logits, text"),
    ("semantic_entropy", {"samples": 1}, "samples must be 2 or more"),
    ("semantic_entropy", {"temperature": 0.0}, "temperature must be 0.01 or more"),
    ("logit_score", {"wrap": "raw"}, "wrap must be one of auto"),
    ("semantic_entropy", {"wrap": "none"}, "in its chat form where it has one; leave wrap 'none' away"),
    ("self_questioning", {"wrap": "alpaca", "form": "text"}, "leave wrap 'alpaca' away"),
    ("logit_score", {"precision": "fp8"}, "precision must be one of"),
])
def test_wrong_options_are_named(kind, options, said):
    with pytest.raises(UserError, match=said):
        make_router(kind, **options)


def test_the_shipped_file_of_language_routers_can_be_made(root):
    from routewright.routers import from_entry
    from routewright.textfiles import read_yaml

    rows = read_yaml(root / "configs" / "routers" / "language.yaml")["routers"]
    kinds = [from_entry(row).kind for row in rows if "kind" in row]
    assert {"probe", "self_questioning", "logit_score", "semantic_entropy"} <= set(kinds)
    assert all("{seed}" in row["path"] for row in rows if "path" in row)


def test_a_score_at_chance_is_warned_of(cheap, cache, parts, caplog):
    train = parts[0]
    upside_down = replace(train, quality=1 - train.quality, quality_mean=1 - train.quality_mean)
    with caplog.at_level(logging.WARNING, "routewright"):
        router = made("entropy", cheap, cache).fit(upside_down, None, 0)
    assert "upside down" in caplog.text
    # The score keeps its polarity; the calibration learns that here it has to be turned.
    assert auroc(upside_down.quality[:, 0] >= 0.5, router.estimate(train.prompts)[:, 0]) > 0.75
