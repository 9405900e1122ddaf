"""Prompts: keys, near-duplicate groups, splits without leaks, and the overlap check."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routewright.errors import UserError
from routewright.prompts import (
    assign_splits,
    check_no_overlap,
    check_straddle,
    find_overlap,
    group_near_duplicates,
    group_prompts,
    normalise,
    numbers_in,
    prompts_hash,
    read_prompts,
    text_hash,
)
from routewright.schema import Prompt

WORDS = ("river stone window garden paper silver market morning travel winter letter simple engine bottle castle "
         "doctor "
         "forest handle island jacket kitchen ladder mirror needle orange pencil quarter rabbit saddle ticket").split()


def sentences(n: int, seed: int = 0, length: int = 40) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=length)).capitalize() + f", case {i}?" for i in range(n)]


# ---------------------------------------------------------------- keys

@pytest.mark.parametrize(("a", "b"), [
    ("What is  it?", "what is it"), ("\u201cHello\u201d, he said.", '"Hello" he said'), ("\uff21\uff22", "ab"),
    ("1,000 men", "1000 men"),
    ("a well-known follow-up", "a well known follow up"), ("5 \u2212 3", "5 - 3"), ("Stra\u00dfe", "STRASSE"),
    ("x\n\ty", "x y"),
])
def test_what_does_not_change_the_question(a, b):
    assert normalise(a) == normalise(b)
    assert text_hash(a) == text_hash(b)


@pytest.mark.parametrize(("a", "b"), [
    ("f(x) = x + 1", "f(x) = x - 1"), ("2*(3+4)", "2*3+4"), ("a < b", "a > b"), ("3.5", "35"), ("3.5", "3 5"),
    ("-3", "3"), ("5%", "5"), ("x-y", "x y"),
])
def test_what_changes_the_question(a, b):
    assert normalise(a) != normalise(b)


@given(st.text(max_size=80))
def test_normalise_is_idempotent_and_keeps_something(text):
    once = normalise(text)
    assert normalise(once) == once
    assert bool(once) == bool(text.split()) or not once


def test_numbers_in_order():
    assert numbers_in("He paid $1,250.50 for 3 of 10 - then -4") == ("1250.50", "3", "10", "-4")


def test_prompts_hash_has_no_order():
    a = [Prompt(str(i), text) for i, text in enumerate(sentences(5))]
    assert prompts_hash(a) == prompts_hash(a[::-1] + a[:1])
    assert prompts_hash(a) != prompts_hash(a[:4])
    assert prompts_hash([Prompt("1", "summarise",
                                context="x")]) != prompts_hash([Prompt("1", "summarise", context="y")])


# ---------------------------------------------------------------- groups

def planted(n: int = 100, seed: int = 1) -> tuple[list[str], list[str]]:
    """Prompts, and a near-duplicate of each: other case and punctuation, a changed word, a word more, a word less."""
    rng = random.Random(seed)
    originals = sentences(n, seed)
    copies = []
    for i, text in enumerate(originals):
        words = text.split()
        at = rng.randrange(5, 30)
        if i % 4 == 0:
            copies.append(text.upper().replace(" ", "  ") + "!!")
        elif i % 4 == 1:
            copies.append(" ".join([*words[:at], "quite", *words[at:]]))
        elif i % 4 == 2:
            copies.append(" ".join([*words[:at], "replaced", *words[at + 1:]]))
        else:
            copies.append(" ".join([*words[:at], *words[at + 1:]]))
    return originals, copies


def test_every_planted_duplicate_is_found_and_none_straddles_a_split():
    originals, copies = planted()
    others = sentences(1000, seed=99)
    groups = group_near_duplicates([*originals, *others, *copies])
    assert groups[:100] == groups[-100:]
    assert len(set(groups)) == 1100  # nothing else was joined
    splits = assign_splits(groups)
    assert splits[:100] == splits[-100:]
    found = find_overlap([Prompt(f"a{i}", t) for i, t in enumerate([*originals, *others])],
                         [Prompt(f"b{i}", t) for i, t in enumerate(copies)])
    assert {(o.a_id, o.b_id) for o in found} == {(f"a{i}", f"b{i}") for i in range(100)}
    assert sum(o.kind == "exact" for o in found) == 25
    assert all(o.similarity >= 0.8 for o in found)


def test_the_same_template_with_other_numbers_is_another_prompt():
    texts = [f"Ann has {a} pears and buys {b} more at the market before noon, how many pears does she have in the "
             f"evening of that day"
             for a in range(10) for b in range(10)]
    assert len(set(group_near_duplicates(texts))) == 100
    assert len(set(group_near_duplicates(texts, threshold=0.5, numbers_matter=False))) == 1


def test_groups_depend_on_content_only():
    originals, copies = planted(20)
    texts = [*originals, *copies]
    names = dict(zip(texts, group_near_duplicates(texts), strict=True))
    shuffled = random.Random(3).sample(texts, len(texts))
    assert group_near_duplicates(shuffled) == [names[t] for t in shuffled]
    assert group_near_duplicates([]) == []


def test_groups_equal_the_exact_answer_by_brute_force():
    rng = random.Random(5)
    base = sentences(12, seed=5, length=25)
    texts = []
    for text in base:
        words = text.split()
        texts.append(text)
        for _ in range(4):
            words = list(words)
            words[rng.randrange(20)] = rng.choice(WORDS)
            texts.append(" ".join(words))

    def shingles(text):
        tokens = normalise(text).split()
        return {tuple(tokens[i:i + 3]) for i in range(len(tokens) - 2)}

    sets = [shingles(t) for t in texts]
    expected = list(range(len(texts)))
    for i in range(len(texts)):
        for j in range(i):
            if len(sets[i] & sets[j]) / len(sets[i] | sets[j]) >= 0.7:
                old, new = expected[i], expected[j]
                expected = [new if e == old else e for e in expected]
    groups = group_near_duplicates(texts, threshold=0.7)
    assert len(set(groups)) == len(set(expected)) == len(set(zip(groups, expected, strict=True)))


def test_short_prompts_are_equal_or_different():
    groups = group_near_duplicates(["Hi", "hi!", "Ho", "", "  ", "one two", "one two three"])
    assert groups[0] == groups[1] != groups[2]
    assert groups[3] == groups[4]
    assert len(set(groups)) == 5


def test_character_shingles_find_a_changed_word_in_a_short_prompt():
    a = "Which river flows through the old town of Bern in Switzerland"
    b = "Which river flows through the old city of Bern in Switzerland"
    assert len(set(group_near_duplicates([a, b]))) == 2
    assert len(set(group_near_duplicates([a, b], threshold=0.7, shingle=5, unit="character"))) == 1


@pytest.mark.parametrize("options", [{"threshold": 0}, {"threshold": 1.1}, {"shingle": 0}, {"unit": "syllable"}])
def test_group_options_are_checked(options):
    with pytest.raises(UserError):
        group_near_duplicates(["a", "b"], **options)


def test_fourteen_thousand_prompts_take_seconds(shared_data):
    import gzip
    import json
    import time

    with gzip.open(shared_data("routellm") / "mmlu.jsonl.gz", "rt") as rows:
        texts = [json.loads(line)["prompt"] for line in rows]
    start = time.process_time()
    groups = group_near_duplicates(texts)
    assert time.process_time() - start < 30
    assert 13_500 < len(set(groups)) < 13_937  # 13,937 texts differ to the letter


# ---------------------------------------------------------------- splits

def test_splits_are_stable_and_near_their_shares():
    groups = [f"g{i}" for i in range(5000)]
    splits = assign_splits(groups)
    assert assign_splits(groups[::-1])[::-1] == splits
    assert assign_splits(groups[:10]) == splits[:10]  # more prompts move none
    assert splits.count("train") / 5000 == pytest.approx(0.6, abs=0.03)
    assert splits.count("dev") / 5000 == pytest.approx(0.2, abs=0.03)
    assert assign_splits(groups, salt="other") != splits
    assert assign_splits(groups,
                         {"test": 0.2, "dev": 0.2, "train": 0.6}) == splits  # the order of the mapping is no matter
    assert set(assign_splits(groups, {"train": 0.5, "test": 0.5})) == {"train", "test"}


@pytest.mark.parametrize("fractions", [{"train": 0.6}, {"train": 1.2, "test": -0.2}, {"train": 0.5, "tset": 0.5},
                                       {"train": "1"}, {}])
def test_bad_fractions_are_refused(fractions):
    with pytest.raises(UserError):
        assign_splits(["a"], fractions)


# ---------------------------------------------------------------- leaks

def test_overlap_kinds():
    text = sentences(1)[0]
    a = [Prompt("a0", text), Prompt("a1", "Something else entirely, said once", group="shared"),
         Prompt("a2", "Nothing in common")]
    b = [Prompt("b0", text.upper()), Prompt("b1", "A text of its own", group="shared"),
         Prompt("b2", "own group", group="b2")]
    assert [(o.kind, o.a_id, o.b_id) for o in find_overlap(a, b)] == [("exact", "a0", "b0"), ("group", "a1", "b1")]
    assert find_overlap(a, []) == [] == find_overlap([], b)
    near = [Prompt("c", text + " indeed")]
    assert [o.kind for o in find_overlap(a, near)] == ["near"]
    assert find_overlap(a, near, near=False) == []


def test_the_same_id_in_two_sources_is_no_overlap():
    assert find_overlap([Prompt("p0", "alpha beta", group="p0")], [Prompt("p0", "gamma delta", group="p0")]) == []


def test_the_check_names_and_counts():
    a = [Prompt(f"a{i}", t) for i, t in enumerate(sentences(10))]
    check_no_overlap(a[:5], a[5:], "train", "test")
    with pytest.raises(UserError,
                       match=r"5 of 10 prompts of train stand in the test split too \(5 exact\): 'a0' = 'a0'.*; "
                             r"\.\.\.;"):
        check_no_overlap(a, a[:5], "train", "the test split")


def test_ten_thousand_against_ten_thousand_is_quick():
    import time

    a = [Prompt(f"a{i}", t) for i, t in enumerate(sentences(10_000, seed=1, length=30))]
    b = [Prompt(f"b{i}", t) for i,
         t in enumerate(sentences(10_000, seed=2, length=30))] + [Prompt("same", a[7].prompt + " x")]
    start = time.process_time()
    found = find_overlap(a, b)
    assert [(o.a_id, o.b_id) for o in found] == [("a7", "same")]
    assert time.process_time() - start < 30


# ---------------------------------------------------------------- reading

def test_read_prompts(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "What?", "prompt_id": "x", "reference": 4, "task": "t"}\n{"question": "Why?", "id": '
                    '7, "answer": ["a", "b"]}\n'
                    '{"instruction": "How?"}\n')
    first, second, third = read_prompts(file)
    assert (first.prompt_id, first.reference, first.task) == ("x", 4, "t")
    assert (second.prompt_id, second.prompt, second.reference) == ("7", "Why?", ["a", "b"])
    assert len(third.prompt_id) == 12


@pytest.mark.parametrize(("line", "says"), [
    ('{"promt": "x"}', "did you mean 'prompt'"), ('{"task": "x"}', "`prompt` is missing"),
    ('{"prompt": " "}', "non-empty"), ('{"prompt": null}', "non-empty"),
    ('{"prompt": "a\\ud800"}', "surrogate"), ('{"prompt": "x", "split": "tset"}', "split must be"),
    ('{"prompt": "x", "question": "y"}', "keep one"),
    ('{"prompt": "x", "task": 3}', "task must be text"), ('{"prompt": "x"', "not JSON"),
    ('[1]', "expected a JSON object"),
])
def test_bad_prompt_rows_are_named(tmp_path, line, says):
    file = tmp_path / "p.jsonl"
    file.write_text(f'{{"prompt": "fine"}}\n{line}\n')
    with pytest.raises(UserError, match="p.jsonl:2") as error:
        read_prompts(file)
    assert says in str(error.value)


def test_an_id_that_stands_twice_is_named(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "x", "id": "a"}\n{"prompt": "y", "id": "a"}\n')
    with pytest.raises(UserError, match="p.jsonl:2.*line 1"):
        read_prompts(file)


def test_groups_of_prompts_join_likeness_and_what_the_source_ties():
    a, b, c, d = (Prompt(str(i), text, group=group) for i, (text, group) in enumerate(
        [("What is two and two?", "para"), ("Another question altogether", "para"), ("what is two and two", ""),
         ("A third one", "")]))
    groups = group_prompts([a, b, c, d])
    assert groups[0] == groups[1] == groups[2] != groups[3]
    ids = dict(zip("0123", groups, strict=True))
    check_straddle(ids, {"0": "train", "1": "train", "2": "train", "3": "test"}, "what", "cure")
    with pytest.raises(UserError, match="what: 1 prompts have a near-duplicate in another split .*'2'.*; cure"):
        check_straddle(ids, {"0": "train", "1": "train", "2": "test", "3": "test"}, "what", "cure")
