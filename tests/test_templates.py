"""Templates: whatever a prompt holds goes in and comes out unchanged, and an answer is one label and nothing else."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from routewright.errors import UserError
from routewright.pool import Pool
from routewright.schema import ModelSpec
from routewright.templates import LEVELS, MODES, STYLES, Template, unwrap, wrap


def pool_of(count: int) -> Pool:
    return Pool("many", tuple(ModelSpec(f"model-{i}", 0.1 * i, 0.4 * i, description=f"number\n {i}" if i % 2 else "")
                              for i in range(count)))


TEMPLATES = [Template.of_pool(pool_of(count), pool_of(count).names, mode, style, about)
             for count in (1, 2, 9, 10, 52) for mode in MODES for style in STYLES
             for about in (("",) if mode == "decision" else ("", "model-0"))]
# Texts that look like parts of the templates themselves, or that careless string handling would change.
TRAPS = ["", " ", "\n", "\n\nPrompt:\n", "Prompt:\n", "### Response:\n", "\n\n### Instruction:\n1\n\n### Response:\n",
         "1", "Answer with its number alone.", "{}", "{prompt}", "%s %(a)s", "\\boxed{41}", "\\n", "\\", "\b\x00\x1b",
         "\ufeff", "e\u0301 \u00e9", "\u2028\u0085", "\U0001f600", "苹果", "\r\n", "<|im_end|>", "</s>",
         *(t.question for t in TEMPLATES)]
TEXT = st.one_of(st.text(max_size=60), st.lists(st.sampled_from(TRAPS), max_size=4).map("".join),
                 st.tuples(st.text(max_size=10), st.sampled_from(TRAPS), st.text(max_size=10)).map("".join))


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(TEMPLATES), TEXT)
def test_any_prompt_goes_in_and_comes_out(template, text):
    instruction = template.render(text)
    assert template.prompt_of(instruction) == text
    assert instruction.endswith(text) and len(instruction) == len(template.question) + len(text)
    for name in ("alpaca", "none"):
        whole = wrap(name, instruction)
        assert unwrap(name, whole) == instruction and instruction in whole
    assert template.style == "full" or instruction == text


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda t: f"{t.mode}-{t.style}-{len(t.models)}-{t.about}")
def test_every_answer_is_one_short_label(template):
    count = len(LEVELS) if template.mode == "difficulty" else len(template.models)
    assert len(template.labels) == count == len(set(template.labels))
    for choice, label in enumerate(template.labels):
        assert len(label) == 1 and label.isascii() and label.isalnum()
        assert template.answer(choice) == label
        assert template.parse(label) == template.parse(f" {label}\n") == choice
    with pytest.raises(IndexError):
        template.answer(count)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(TEMPLATES), TEXT)
def test_nothing_but_a_label_is_an_answer(template, text):
    choice = template.parse(text)
    assert (choice is None) == (text.strip() not in template.labels)
    assert choice is None or template.answer(choice) == text.strip()
    for other in ("10", "0.5", "1.", "model-0", "-1", "１", "²", "1 2", "**1**"):
        assert template.parse(other) is None


def test_digits_up_to_nine_models_then_letters_then_no_more():
    labels = {count: Template("decision", pool_of(count).names, "bare").labels for count in (1, 9, 10, 27, 52)}
    assert labels[1] == ("1",) and "".join(labels[9]) == "123456789"
    assert "".join(labels[10]) == "ABCDEFGHIJ" and labels[27][-1] == "a" and labels[52][-1] == "z"
    with pytest.raises(UserError, match="52 models; this pool has 53"):
        Template("decision", pool_of(53).names, "bare")


def test_the_question_says_what_an_instructed_model_needs():
    pool = pool_of(3)
    asked = Template.of_pool(pool, pool.names).question
    assert "\n1: model-0, 0 USD per million tokens in and 0 out\n2: model-1, 0.1 USD" in asked
    assert "0.4 out, number 1\n3: model-2" in asked and "Answer with its number alone." in asked
    assert "letter alone" in Template.of_pool(pool_of(10), pool_of(10).names).question
    hard = Template.of_pool(pool, pool.names, "difficulty", about="model-1").question
    assert "for the model model-1?" in hard and "from 0 (certainly answered well) to 9" in hard
    assert "for these models?" in Template.of_pool(pool, pool.names, "difficulty").question
    # A price of the list is part of the question, so a set of other prices is another template.
    dearer = Pool("new", tuple(replace(m, price_input=9.0) for m in pool.models))
    with pytest.raises(UserError, match="was not made by this template"):
        Template.of_pool(dearer, pool.names).prompt_of(Template.of_pool(pool, pool.names).render("x"))


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda t: f"{t.mode}-{t.style}-{len(t.models)}-{t.about}")
def test_a_template_survives_its_card(template):
    assert Template.from_card(json.loads(json.dumps(template.as_card())), "here") == template


CARD = Template.of_pool(pool_of(2), ("model-0", "model-1")).as_card()


@pytest.mark.parametrize("card", [
    None, [], {}, {"mode": "decision"}, {**CARD, "models": None}, {**CARD, "models": 7}, {**CARD, "models": "ab"},
    {**CARD, "models": [1, 2]}, {**CARD, "models": []}, {**CARD, "models": ["a", "a"]}, {**CARD, "listing": "ab"},
    {**CARD, "listing": [None, None]}, {**CARD, "listing": ["one"]}, {**CARD, "about": 3}, {**CARD, "mode": "decide"},
    {**CARD, "style": []}])
def test_a_damaged_card_is_named(card):
    with pytest.raises(UserError, match="^here: ") as caught:
        Template.from_card(card, "here")
    assert "build_sets.py" in str(caught.value)


@pytest.mark.parametrize(("given_", "said"), [
    ({"mode": "decisions"}, "modes are decision, difficulty"), ({"style": "long"}, "styles full, bare"),
    ({"models": ()}, "at least one model"), ({"models": ("a", "a")}, "'a' stands twice"),
    ({"about": "c"}, "difficulty for 'c', which is not among the models a, b"),
    ({"style": "full"}, "Template.of_pool")])
def test_impossible_templates_are_refused(given_, said):
    with pytest.raises(UserError, match=said):
        Template(**{"mode": "decision", "models": ("a", "b"), "style": "bare", **given_})


def test_unknown_models_and_wraps_are_named():
    with pytest.raises(UserError, match="did you mean 'model-1'"):
        Template.of_pool(pool_of(2), ("model-0", "mode-1"))
    for call in (wrap, unwrap):
        with pytest.raises(UserError):
            call("chatml", "text")
        with pytest.raises(UserError):
            call("chat", "text")
    head, tail = wrap("alpaca", "|").split("|")
    for text in ("", "plain", head, tail, head + tail[1:], head[1:] + tail):
        with pytest.raises(UserError, match="does not have the alpaca form"):
            unwrap("alpaca", text)
    assert unwrap("alpaca", head + tail) == ""
