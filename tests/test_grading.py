"""Graders: published values, equal forms that must pass, exploits that must not, and properties of each rule."""

from __future__ import annotations

import threading
import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from routewright import grading
from routewright.errors import UserError
from routewright.grading import GRADERS, bag_f1, final_letter, final_number, grade, last_boxed, read_number

words = st.text(alphabet="abcdefgh the12 .,'", max_size=30)


# ---------------------------------------------------------------- spans

@pytest.mark.parametrize(("response", "gold", "em", "f1"), [
    ("The Denver Broncos!", "Denver Broncos", 1, 1.0),
    ("Denver", "Denver Broncos", 0, 2 / 3),
    ("a  an the X", "x", 1, 1.0),
    ("1066", "1660", 0, 0.0),
    ("Carolina Panthers", "Denver Broncos", 0, 0.0),
    ("", "x", 0, 0.0),
    ("anthem", "them", 0, 0.0),  # articles go as whole words only
])
def test_squad_v11_rule(response, gold, em, f1):
    assert grade("squad_em", response, gold).quality == em
    assert grade("squad_f1", response, gold).quality == pytest.approx(f1)


def test_best_of_several_references():
    assert grade("squad_em", "October 1973", ["1973", "October 1973"]).correct
    assert grade("squad_f1", "in 1973", ["October", "1973"]).quality == pytest.approx(2 / 3)


def test_korquad_character_f1_reproduces_the_published_oddities():
    assert grade("korquad_char", "1066", "1660").quality == 1.0
    assert grade("korquad_char", "Denver Broncos", "Carolina Panthers").quality == pytest.approx(0.55, abs=0.005)
    assert not grade("korquad_char", "1066", "1660").correct


@given(st.lists(words), st.lists(words))
def test_bag_f1_is_symmetric_and_bounded(a, b):
    assert 0 <= bag_f1(a, b) <= 1
    assert bag_f1(a, b) == bag_f1(b, a)
    assert bag_f1(a, a) == 1


@given(st.text(max_size=60).filter(lambda text: text.strip()))
def test_a_reference_graded_against_itself_is_right(text):
    for name in ("squad_em", "squad_f1", "exact", "korquad_char"):
        assert grade(name, text, text).quality == 1, name


def test_recorded_squad_scores_are_reproduced(shared_data):
    import gzip
    import json

    with gzip.open(shared_data("squad_v1_dev") / "outcomes_dev.jsonl.gz", "rt") as rows:
        for _, line in zip(range(400), rows, strict=False):
            row = json.loads(line)
            for outcome in row["outcomes"].values():
                answer = outcome.get("answer") or ""
                assert grade("squad_em", answer, row["reference"]).quality == outcome["score"]
                assert grade("squad_f1", answer, row["reference"]).quality == pytest.approx(outcome["f1"], abs=1e-3)


# ---------------------------------------------------------------- number

@pytest.mark.parametrize(("response", "gold"), [
    ("6.00", "6"), ("1,000", "1000"), ("-3", "-3"), ("$0.50", "0.5"), ("3/4", ".75"), ("\u22123", "-3"), ("-$5", "-5"),
    ("$-5", "-5"),
    ("1 1/2", "1.5"), ("1e3", "1000"), ("042", "42"), ("+42", "42"), (".5", "1/2"), ("3 million dollars", "3000000"),
    (r"\boxed{42}", "42"), (r"\boxed{\frac{3}{4}}", "0.75"), (r"\boxed{-\frac{1}{2}}", "-1/2"),
    (r"\boxed{\dfrac{10}{4}}", "2.5"),
    (r"\boxed{1\frac{1}{2}}", "1.5"), (r"\boxed{\$1,234.50}", "1234.5"), (r"\boxed{1{,}000}", "1000"),
    (r"\boxed{1\,000}", "1000"),
    (r"\boxed{42 \text{ apples}}", "42"), (r"\boxed{\text{18 dollars}}", "18"), (r"\boxed{5\text{ cm}^2}", "5"),
    (r"\boxed{42^\circ}", "42"),
    (r"\boxed{x = 42}", "42"), (r"\boxed{\boxed{42}}", "42"), (r"\boxed{\mathbf{42}}", "42"), (r"\boxed{(42)}", "42"),
    (r"\boxed{{42}}", "42"),
    (r"\boxed{4.2\times 10^{1}}", "42"), (r"\boxed{84/2}", "42"), (r"\boxed{42.}", "42"), (r"\[ \boxed{18} \]", "18"),
    ("first 3, so \\boxed{7}", "7"), (r"\boxed{6} no: \boxed{7}", "7"), (r"\boxed{5 \text{ km/h}}", "5"),
    ("The answer is 42.", "42"), ("The answer is: **42**", "42"), ("the answer is 42 apples because 6 x 7", "42"),
    ("The answer is $18$.", "18"),
    ("The answer is $18", "18"), ("The answer is \\(18\\)", "18"), ("**Answer:** 7", "7"), ("Answer:\n\n7", "7"),
    ("work\n#### 1,800", "1800"),
    ("It has 3 and 5, so she makes $18 per day.", 18), ("Total: 18.", "18"), ("18!", "18"),
    ("It costs $1,250.00 in total.", "1250"),
    ("42%", "42%"), (r"\boxed{42\%}", "0.42"), ("that is 50 percent", "0.5"),
    ("18", "long solution <<9*2=18>>18\n#### 18"), ("18", "# 18"), ("18", "so\nA: 18"), ("18", 18), ("0.5", 0.5),
])
def test_equal_numbers(response, gold):
    assert grade("number", response, gold).correct


@pytest.mark.parametrize(("response", "gold"), [
    (r"\boxed{42\%}", "42"), ("42%", "42"), ("42", "42%"), (r"\boxed{41=42}", "42"), (r"\boxed{42=42}", "42"),
    (r"\boxed{42, 43}", "42"),
    (r"\boxed{42 or 43}", "42"), (r"\boxed{42 \text{ or } 41}", "42"), (r"\boxed{}", "42"), ("42 \\boxed{4", "42"),
    (r"\boxed{42+0}", "42"),
    (r"\boxed{42!}", "42"), (r"\boxed{10^{99999}}", "42"), (r"\boxed{\infty}", "42"), (r"\boxed{42}\boxed{41}", "42"),
    (r"\boxed{not 42}", "42"),
    (r"\boxed{42^2}", "42"), (r"\boxed{42x}", "42"), (r"\boxed{42\pi}", "42"), (r"\boxed{\frac{42}{0}}", "42"),
    (r"\boxed{--42}", "42"),
    ("The answer is 41 or 42", "42"), ("the answer is 42 or 41", "42"), ("the answer is 42, 41", "42"), ("nan", "42"),
    ("(1,2)", "2"),
    ("1e999999", "42"), ("9" * 100_000, "42"), ("", 42), ("1/0", "0"), ("abc42", "42"), ("1,00", "100"), ("3", "-3"),
    ("0.333", "1/3"), ("1e999999", "1"), ("9**9**9", "9"), ("10^100000", "100000"), ("The answer is 1e999999", "1"),
])
def test_exploits_and_unequal_numbers(response, gold):
    assert not grade("number", response, gold).correct


@given(st.integers(-10**12, 10**12),
       st.sampled_from(["{}", "{:,}", "{}.00", "\\boxed{{{}}}", "The answer is {:,}.", "So he has {} left.",
                                                      "#### {}", "\\boxed{{{:,} \\text{{ eggs}}}}", "**Answer: {}**"]))
def test_formatted_whole_numbers_come_back(value, form):
    assert final_number(form.format(value)) == value


@given(st.decimals(-10**6, 10**6, places=3, allow_nan=False),
       st.sampled_from(["{}", "{:,}", "\\boxed{{{}}}", "The answer is {:,}.", "\\boxed{{{}\\%}}"]))
def test_formatted_decimals_come_back(value, form):
    expected = Fraction(value) / (100 if "%" in form else 1)
    assert final_number(form.format(value)) == expected


@given(st.integers(-999, 999), st.integers(1, 999))
def test_fractions_come_back(top, bottom):
    assert read_number(f"{top}/{bottom}") == read_number(rf"\frac{{{top}}}{{{bottom}}}") == Fraction(top, bottom)


@settings(max_examples=300)
@given(st.text(alphabet="0123456789,.$%/-+eE \\boxed{}()=!^abcfrtn\n", max_size=80))
def test_any_text_is_graded_without_a_failure(text):
    for name in ("number", "choice"):
        assert grade(name, text, "7" if name == "number" else "B").quality in (0.0, 1.0)


def test_long_and_hostile_text_takes_no_time():
    start = time.perf_counter()
    for text in ("1," * 200_000, "\\boxed{" * 5_000, "$" * 100_000, " " * 200_000 + "x", "answer is " * 20_000,
                 "(" * 50_000, "9/" * 50_000,
                 "\\frac{1}" * 20_000, "{" * 20_000 + "}" * 20_000, "a" * 200_000, "-" * 100_000, "A)" * 50_000):
        for name, gold in (("number", "7"), ("choice", "B"), ("math", "7")):
            grade(name, text, gold)
            grade(name, f"\\boxed{{{text}}}", gold)
            grade(name, f"the answer is {text}", gold)
    assert time.perf_counter() - start < 10


def test_last_boxed_matches_braces():
    assert last_boxed("none") is None
    assert last_boxed(r"\boxed{a{b}c} and \boxed{\frac{1}{2}}") == r"\frac{1}{2}"
    assert last_boxed(r"\boxed{\{1,2\}}") == r"\{1,2\}"
    assert last_boxed(r"\boxed{1} \boxed{2") == ""


def test_recorded_gsm8k_verdicts_agree(shared_data):
    """ZeroEval's own verdicts on 8 models' full outputs; the rest is `60%` where the reference says 60."""
    import gzip
    import json

    folder = shared_data("zeroeval")
    with gzip.open(folder / "gsm.jsonl.gz", "rt") as rows:
        asked = {row["id"]: row for row in map(json.loads, rows)}
    with gzip.open(folder / "gsm_outputs_8models.jsonl.gz", "rt") as rows:
        outputs = [json.loads(line) for line in rows]
    differ = [o for o in outputs if grade("number", o["output"], asked[o["id"]]["reference"]).quality
              != asked[o["id"]]["outcomes"][o["model"]]["score"]]
    assert len(outputs) == 10_552 and len(differ) <= 30
    assert sum("%" in o["output"][-200:] for o in differ) >= 20


# ---------------------------------------------------------------- choice

@pytest.mark.parametrize(("response", "gold"), [
    ("B", "B"), ("(B)", "B"), ("b", "B"), ("(b)", "B"), ("**B**", "B"), ("B)", "B"), ("[B]", "B"), ("B. Paris", "B"),
    ("Answer: B", "B"),
    ("The answer is B.", "B"), ("the answer is (B)", "B"), (r"\boxed{B}", "B"), (r"\boxed{\text{B}}", "B"),
    (r"so $\boxed{\text{(B)}}$", "B"),
    ("The correct answer is **B) Paris**", "B"), ("The answer is A because it is", "A"), ("The answer is A", "A"),
    ("The answer is: A.", "A"),
    ("So it must be option C.", "C"), ("The correct option is D.", "D"), ("I think (D) is right", "D"),
    ("Answer:\nC", "C"), ("The answer is (J).", "J"),
    ("B", "(B)"), ("B", "B. Paris"),
])
def test_letters_that_are_answers(response, gold):
    assert grade("choice", response, gold).correct


@pytest.mark.parametrize(("response", "gold"), [
    ("A good question. I do not know", "A"), ("The answer is a matter of taste", "A"), ("I have no idea", "I"),
    ("I think so", "I"),
    ("The answer is A and B", "A"), ("A. x\nB. y", "A"), ("A or B", "A"), (r"\boxed{A, B}", "A"), ("Because", "B"),
    ("Apple", "A"),
    ("The answer is Apple", "A"), ("", "A"), ("The answer is A man", "A"), ("The answer is either B or C", "B"),
    ("a", "B"), ("Hello, a dog", "A"),
    ("I am a C major fan", "C"), ("Fine", "F"), ("K", "B"),
])
def test_words_are_no_letters(response, gold):
    assert not grade("choice", response, gold).correct


@given(st.sampled_from("ABCDEFGHIJ"), st.sampled_from(["{}", "({})", "Answer: {}", "The answer is {}.",
                                                       "\\boxed{{{}}}", "{}.", "Answer: ({})", "####  {}"]))
def test_letters_come_back(letter, form):
    assert final_letter(form.format(letter)) == letter


# ---------------------------------------------------------------- math

@pytest.mark.parametrize(("response", "gold"), [
    (r"\boxed{2\sqrt{2}}", r"\sqrt{8}"), (r"$2\sqrt2$", r"$\sqrt{8}$"), (r"The answer is $\frac{1}{2}$", ".5"),
    (r"\boxed{x^2+2x+1}", "(x+1)^2"),
    (r"\boxed{\{1,2\}}", r"\{2,1\}"), (r"\boxed{(1, 2)}", "(1,2)"), (r"\boxed{[0,1)}", "[0,1)"),
    (r"\boxed{x=42}", "42"), ("42", "42"),
    (r"\boxed{\infty}", r"\infty"), (r"\boxed{y=2x+1}", "y=2x+1"), (r"\boxed{\text{Evelyn}}", r"\text{Evelyn}"),
    (r"\boxed{5!}", "120"),
    (r"\boxed{10^{10}}", "10000000000"), (r"\boxed{\frac{\pi}{2}}", r"\pi/2"), (r"\boxed{42\%}", "0.42"),
    (r"\boxed{7}", r"So it is \boxed{7}."),
])
def test_equal_mathematics(response, gold):
    assert grade("math", response, gold).correct


@pytest.mark.parametrize(("response", "gold"), [
    (r"\boxed{42\%}", "42"), (r"\boxed{41=42}", "42"), (r"\boxed{42=42}", "42"), (r"\boxed{42,43}", "42"),
    (r"\boxed{nan}", "42"), (r"\boxed{x}", "42"),
    (r"\boxed{(1,2)}", "(1,3)"), (r"\boxed{\frac{1}{0}}", "42"), ("", "42"), (r"\boxed{9^{9^{9^{9}}}}", "42"),
    (r"\boxed{999999999!}", "42"),
    (r"\boxed{(2^{999})^{999}}", "x"), (r"\boxed{2^{(2^{(2^{(2^{5})})})}}", "42"),
    (r"\boxed{\sqrt{8}+10^{-3}}", r"\sqrt{8}"),
])
def test_unequal_or_hostile_mathematics(response, gold):
    start = time.perf_counter()
    assert not grade("math", response, gold).correct
    assert time.perf_counter() - start < 8


def test_no_text_is_ever_run(tmp_path):
    mark = tmp_path / "ran"
    for text in (f"__import__('os').system('touch {mark}')", f"\\boxed{{__import__('os').system('touch {mark}')}}",
                 f"$open('{mark}','w')$"):
        for name, gold in (("math", r"\sqrt{2}"), ("number", "42"), ("exact", "x")):
            assert not grade(name, text, gold).correct
    assert not mark.exists()


def test_math_gives_the_same_verdicts_in_threads():
    cases = [(r"\boxed{2\sqrt{2}}", r"\sqrt{8}", True), (r"\boxed{3\sqrt{2}}", r"\sqrt{8}", False),
             (r"\boxed{x+x}", "2x", True)]
    wrong: list[object] = []

    def work() -> None:
        for response, gold, expected in cases * 3:
            try:
                if grade("math", response, gold).correct != expected:
                    wrong.append((response, gold))
            except Exception as error:  # a thread must hand its failure over
                wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_comparison_that_hangs_is_killed_and_grading_goes_on():
    child = grading._CHILD
    assert grade("math", r"\boxed{2\sqrt{2}}", r"\sqrt{8}").correct
    first = child.process.pid
    start = time.perf_counter()
    assert not child.same("x", r"\sum_{i=1}^{9999999} \sin(i) \cdot \prod_{k=1}^{999999} (x+k)",
                          seconds=0.0)  # no time at all
    assert time.perf_counter() - start < 5
    assert child.process is None
    assert grade("math", r"\boxed{2\sqrt{2}}", r"\sqrt{8}").correct
    assert child.process.pid != first


# ---------------------------------------------------------------- many answers at once

def exploits(value: int) -> list[str]:
    """Answers that hold the right number and do not give it, or give more than it."""
    other = value + 7
    box = [f"{value}\\%", f"{other}={value}", f"{value}={value}", f"{other},{value}", f"{value},{other}",
           f"{value} \\text{{ or }} {other}",
           f"{value}+0", f"{value}!", f"{value}^1", f"{value}x", f"\\{{{value},{other}\\}}", f"({value},{other})",
           f"[{value},{other}]", f"{value}..{other}",
           f"{other}>{value}", f"\\le {value}", f"\\approx {value}", f"not {value}", f"{value}\\pm 1",
           f"\\text{{any of }} {value}, {other}", "nan", "\\infty", "",
           f"{value}; {other}", f"{value}\\cdot 10^{{99999}}", f"9^{{9^{{9^{{{value}}}}}}}", f"eval({value})",
           f"print({value})", f"{value}/0", f"--{value}",
           f"{value}%", f"{value} percent", f"{value} million", f"0.{value}", f"{value}.5", f"-{value}", f"{value}e5",
           f"1/{value}", f"{value} 1/2"]
    said = [f"The answer is {value} or {other}.", f"The answer is {other} or {value}.", f"{other} or {value}",
            f"{value}, {other}", f"{other} {value}",
            f"Answer: {value}%", f"{value}%", f"\\boxed{{{value}}} and \\boxed{{{other}}}", f"\\boxed{{{value}",
            f"The answer is {other}. {value}"]
    return [f"\\boxed{{{inside}}}" for inside in box] + said


def test_a_thousand_exploits_are_refused():
    accepted = [(answer, value) for value in range(11, 34) for answer in exploits(value)
                if grade("number", answer, str(value)).correct]
    assert not accepted
    assert sum(len(exploits(value)) for value in range(11, 34)) > 1000


def test_math_refuses_the_exploits_too():
    slow, accepted = [], []
    for answer in exploits(42):
        start = time.perf_counter()
        true_as_mathematics = answer in (r"\boxed{42+0}", r"\boxed{42^1}", r"\boxed{--42}")
        if grade("math", answer, "42").correct and not true_as_mathematics:
            accepted.append(answer)
        if time.perf_counter() - start > 5:
            slow.append(answer)
    assert not accepted and not slow


def test_hundreds_of_equal_forms_are_accepted():
    forms = ["{v}", "{v:,}", "{v}.00", "\\boxed{{{v}}}", "\\boxed{{{v:,}}}", "$\\boxed{{{v}}}$",
             "\\[\\boxed{{{v}}}\\]", "\\boxed{{\\text{{{v}}}}}",
             "\\boxed{{{v}\\text{{ units}}}}", "\\boxed{{\\${v}}}", "\\boxed{{x = {v}}}", "The answer is {v}.",
             "**Answer**: {v}", "Answer: ${v}$", "#### {v}",
             "Thus we get {v} apples in total.", "= {v}", "The final answer is \\( {v} \\).",
             "Final Answer: **{v:,}**", "\\boxed{{{v}\\,}}",
             "\\boxed{{{v}~\\mathrm{{kg}}}}", "\\fbox{{{v}}}", "\\boxed{{\\$ {v:,}.00}}", "Answer: {v} dollars",
             "The answer is therefore {v}",
             "<answer>{v}</answer>", '{{"reasoning": "5 things", "answer": "{v}"}}',
             "Therefore, the total is {v} (in dollars).", "So it is **{v}**",
             "The final answer is: $\\boxed{{{v}}}$. I hope it is correct."]
    cases = [(form.format(v=value), str(value)) for form in forms for value in range(3, 60_000, 3333)]
    assert len(cases) > 500
    assert [case for case in cases if not grade("number", *case).correct] == []
    assert [case for case in cases[::9] if not grade("math", *case).correct] == []


# ---------------------------------------------------------------- the door

def test_mistakes_are_named():
    with pytest.raises(UserError, match="did you mean 'number'"):
        grade("numbr", "1", "1")
    with pytest.raises(UserError, match="needs a reference"):
        grade("exact", "1", None)
    with pytest.raises(UserError, match="needs a reference"):
        grade("squad_em", "1", [])
    with pytest.raises(UserError, match="as a number"):
        grade("number", "1", "Paris")
    with pytest.raises(UserError, match="a letter A-J"):
        grade("choice", "A", "Paris")
    with pytest.raises(UserError, match="must be text"):
        grade("exact", None, "1")
    assert set(GRADERS) == {"squad_em", "squad_f1", "number", "choice", "math", "exact", "korquad_char"}
