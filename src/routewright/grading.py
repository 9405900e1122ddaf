r"""Grading: how good is a response, given the reference answer? One function per rule, all pure text to `Grade`.

    squad_em, squad_f1  the official SQuAD v1.1 rule: lower case, punctuation and articles out, best of the references
    number              the final number of a worked answer (GSM8K and kin), compared as exact fractions
    choice              the letter A-J of a multiple-choice answer
    math                LaTeX answers, compared by math-verify in a child process that is killed when it takes too long
    exact               equal texts after trimming
    korquad_char        character F1 after KorQuAD v1.0; only to reproduce figures published with it

A model writes the responses, so they are hostile input: nothing here evaluates them, every pattern runs in linear time,
and only `math` may take long, within MATH_SECONDS. A response that gives no answer, or two, is wrong.

**Percent.** A percent sign divides by a hundred: "42%" equals "0.42" and "42\%", and does not equal "42". A grader that
drops the sign accepts 42% where 42 was asked, which is off by a factor of a hundred. The price: where a question asks
for a percentage and the reference is a bare 60, the answer "60%" is refused (25 of 10,552 recorded GSM8K answers).
"""

from __future__ import annotations

import atexit
import json
import os
import re
import select
import string
import subprocess
import sys
import threading
import time
import unicodedata
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from routewright.errors import MissingSetup, UserError
from routewright.textfiles import nearest

MATH_SECONDS = 4.0  # wall clock for one comparison; a comparison that needs more counts as not equal
MATH_CHARACTERS = 500  # a longer final answer is no final answer
TAIL = 20_000  # characters at the end of a response that are searched for its final answer
_DIGITS = 60  # more digits or larger exponents than this are refused before they become a number


@dataclass(frozen=True, slots=True)
class Grade:
    """`quality` in [0, 1]; `correct` is the yes-or-no of the same rule (for F1 rules: the exact match)."""

    correct: bool
    quality: float
    grader: str


def grade(grader: str, response: str, reference: Any) -> Grade:
    """Grade one response. `reference` is a text, a number, or a list of acceptable ones (the best counts).

    Raises UserError for an unknown grader, a missing reference, or a reference that the grader cannot read.
    """
    if grader not in GRADERS:
        raise UserError(f"unknown grader {grader!r}{nearest(str(grader), GRADERS)}; known: {', '.join(GRADERS)}")
    if not isinstance(response, str):
        raise UserError(f"a response must be text to be graded; got {response!r}")
    references = _references(reference, grader)
    return GRADERS[grader](response, references)


def _references(reference: Any, grader: str) -> list[str]:
    listed = reference if isinstance(reference, (list, tuple)) else [reference]
    texts = []
    for item in listed:
        if isinstance(item, bool) or not isinstance(item, (str, int, float)) or not str(item).strip():
            raise UserError(f"grader {grader!r} needs a reference answer (a text, a number or a list of them); "
                            f"got {reference!r}")
        texts.append(str(item))
    if not texts:
        raise UserError(f"grader {grader!r} needs a reference answer; the list is empty")
    return texts


def _yes_no(grader: str, correct: bool) -> Grade:
    return Grade(correct, float(correct), grader)


# ---------------------------------------------------------------- spans: SQuAD, KorQuAD, exact

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_KORQUAD_BLANKS = str.maketrans(dict.fromkeys("'\"()<>\u300a\u300b\u3008\u3009\u2018\u2019", " "))


def squad_normalise(text: str) -> str:
    """The official SQuAD v1.1 order: lower case, ASCII punctuation out, articles out, blanks collapsed."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def bag_f1(predicted: Iterable[str], gold: Iterable[str]) -> float:
    """F1 of two bags of tokens. Symmetric, in [0, 1]; two empty bags are equal (v1.1's script says 0 there)."""
    predicted, gold = Counter(predicted), Counter(gold)
    if not predicted or not gold:
        return float(predicted == gold)
    both = (predicted & gold).total()
    return 2 * both / (predicted.total() + gold.total())


def squad_em(response: str, references: list[str]) -> Grade:
    return _yes_no("squad_em", any(squad_normalise(response) == squad_normalise(gold) for gold in references))


def squad_f1(response: str, references: list[str]) -> Grade:
    tokens = squad_normalise(response).split()
    best = max(bag_f1(tokens, squad_normalise(gold).split()) for gold in references)
    return Grade(squad_em(response, references).correct, best, "squad_f1")


def korquad_char(response: str, references: list[str]) -> Grade:
    """Articles stay and F1 counts characters, so "1066" against "1660" scores 1.0. Not for new results."""
    def normal(text: str) -> str:
        return " ".join(text.translate(_KORQUAD_BLANKS).lower().translate(_PUNCTUATION).split())

    answer = normal(response)
    best = max(bag_f1(answer.replace(" ", ""), normal(gold).replace(" ", "")) for gold in references)
    return Grade(any(answer == normal(gold) for gold in references), best, "korquad_char")


def exact(response: str, references: list[str]) -> Grade:
    """Equal after Unicode composition (NFC) and trimming; case and inner blanks count."""
    answer = unicodedata.normalize("NFC", response).strip()
    return _yes_no("exact", any(answer == unicodedata.normalize("NFC", gold).strip() for gold in references))


# ---------------------------------------------------------------- where the final answer stands

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_ANSWER = re.compile(r"(?:####|<answer>|\b(?:answer|result)[\"'*_]{0,3}(?:\s+(?:is|was|would\s+be|equals)\b|\s*[:=])"
                     r"(?:\s*[:=])?)", re.IGNORECASE)


def last_boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...}, braces matched; "" when it is never closed, None when there is none.

    A box inside a box is opened: \boxed{\boxed{42}} gives 42.
    """
    opened = [found.end() for found in _BOX.finditer(text)]
    if not opened:
        return None
    outermost = ""
    covered = -1
    for start in opened:
        if start < covered:
            continue  # inside the box just read
        end = _closing(text, start)
        outermost, covered = ("", len(text)) if end < 0 else (text[start:end], end)
    inner = last_boxed(outermost)
    return outermost.strip() if inner is None else inner


def _closing(text: str, start: int) -> int:
    """Index of the brace that closes the one before `start`, or -1. Escaped braces do not count."""
    depth, i = 1, start
    while i < len(text):
        if text[i] == "\\":
            i += 2
            continue
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return i
        i += 1
    return -1


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    found = deque(pattern.finditer(text), maxlen=1)
    return found[0] if found else None


def _after_marker(text: str) -> str | None:
    """What follows the last 'answer is', 'answer:' or '####': the rest of its line, or the next that is not empty."""
    found = _last(_ANSWER, text)
    if found is None:
        return None
    lines = [line for line in text[found.end():].split("\n") if line.strip(" *_`$:\t\r")]
    return lines[0].split("</answer>")[0] if lines else ""


# ---------------------------------------------------------------- number

_SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_PLAIN = r"(?:\d+(?:,\d+)*(?:\.\d+)?|\.\d+)"
_WRAPPER = re.compile(r"\\(?:text(?:bf|it)?|math(?:rm|bf|it)|operatorname|mbox|displaystyle|left|right|bf|rm)\b\s*")
_FRACTION = re.compile(rf"\\[dtc]?frac\s*\{{\s*([-+]?{_PLAIN})\s*\}}\s*\{{\s*([-+]?{_PLAIN})\s*\}}"
                       r"|\\[dtc]?frac\s*(\d)\s*(\d)")
_POWER = re.compile(rf"^({_PLAIN})?\s*(?:\\times|\\cdot|[*x\u00d7])?\s*10\s*\^\s*\{{?\s*([-+]?\d{{1,3}})\s*\}}?")
_VALUE = re.compile(rf"^({_PLAIN})(?:[eE]([-+]?\d{{1,3}})(?![\w.]))?(?:\s+(\d+)\s*/\s*(\d+)|\s*/\s*({_PLAIN}))?")
_UNIT = re.compile(r"^[A-Za-z\u00b0\u00b2\u00b3\u20ac\u00a3\u00a5'/.\- ]{0,40}"
                   r"(?:(?<=[A-Za-z])\s?\^\s*\{?[23]\}?)?[ .]*$")
_NOT_UNITS = frozenset("or and not to minus plus times over divided than less more e i x y pi".split())
_SYMBOL = re.compile(r"^[A-Za-z][A-Za-z ]{0,20}(?:_\{?\w{1,10}\}?)?\s*=(?!=)")
_IN_TEXT = re.compile(
    r"(?<![\w.,/^])(?:[-+\u2212]\s?)?[$\u20ac\u00a3]?\s?(?:[-+\u2212]\s?)?"
    rf"(?:\\[dtc]?frac\s*\{{[^{{}}]{{1,40}}\}}\s*\{{[^{{}}]{{1,40}}\}}|{_PLAIN})"
    r"(?:[eE][-+]?\d{1,3}(?![\w.])|\s+\d{1,9}\s*/\s*\d{1,9}|\s*/\s*\d+(?:,\d+)*(?:\.\d+)?)?"
    r"\s*(?:\\?%|percent\b)?(?:\s*(?:"
    + "|".join(_SCALES) + r")\b)?", re.IGNORECASE)
_BETWEEN = re.compile(r"\s*[;|/]\s*|,\s+|\s+(?:or|and)\s+|\s+")
_BARE = re.compile(r"[-+]?\$?\d[\d.,%]*")
_OR_BEFORE = re.compile(r"\d[\s*$)]*\bor\b[\s*$(]*$", re.IGNORECASE)
_SECOND = re.compile(r"^\s*(?:,|or|and|/|;|to|-)\s*[$\u20ac\u00a3]?\s?[-+]?\d")
_POWER_AFTER = re.compile(r"^(?:[eE][-+]?|\*\*|\s*\^\s*\{?)-?\d")  # 1e9999 is no 1, and 9^9 no 9
_POWER_BEFORE = re.compile(r"\d(?:\*\*|\s*\^\s*\{?)$")


def read_number(text: str) -> Fraction | None:
    r"""The value of a text that is one number and nothing else but decoration; None otherwise.

    Reads signs, thousands separators, decimals, exponents (1e3, 2 \times 10^3), fractions (3/4, \frac{3}{4}, 1 1/2),
    percent (divides by 100), currency signs, scale words (3 million), one unit after the number (12 cm^2, 18 dollars)
    and `x = ` before it. Refuses anything with an operator, two numbers, or more than 60 digits.
    """
    text = _undress(text)
    text = _SYMBOL.sub("", text).strip()
    sign, text = _take_sign(text)
    if text[:1] in "$\u20ac\u00a3":
        text = text[1:].strip()
        second, text = _take_sign(text)
        sign *= second
    value, rest = _take_value(text)
    if value is None:
        return None
    rest = rest.strip()
    if re.match(r"%|percent\b", rest, re.IGNORECASE):
        value /= 100
        rest = re.sub(r"^(?:%|percent)", "", rest, flags=re.IGNORECASE).strip(" .")
    word = re.match(r"[A-Za-z]+", rest)
    if word and word[0].lower() in _SCALES:
        value *= _SCALES[word[0].lower()]
        rest = rest[word.end():].strip()
    if not _UNIT.match(rest) or _NOT_UNITS & set(re.findall(r"[a-z]+", rest.lower())):
        return None
    return sign * value


def _undress(text: str) -> str:
    """Without LaTeX spacing and font commands, math signs, markdown and outer brackets."""
    text = unicodedata.normalize("NFKC", text[:1000]).replace("\u2212", "-").replace("\\%", "%").replace("\\$", "$")
    text = re.sub(r"\\[,!;: ]|~|\{,\}(?=\d{3})",
                  lambda m: "," if m[0] == "{,}" else "" if m[0] in ("\\,", "\\!") else " ", text)
    text = re.sub(r"\\(?:circ|degree)s?\b", "\u00b0", text).replace("^\u00b0", "\u00b0").replace("^{\u00b0}", "\u00b0")
    text = _WRAPPER.sub("", text)
    text = re.sub(r"\\[()\[\]]", " ", text)
    if text.count("$") > 1 or text.strip().endswith("$"):
        text = text.replace("$$", " ").strip()
        text = text[1:-1] if text.startswith("$") and text.endswith("$") and len(text) > 1 else text
    before = None
    while before != text:
        before = text
        text = text.strip(" \t\r\n*_`\"'").rstrip(".:;,").strip()  # "!" stays: 42! is no 42
        if len(text) > 1 and (text[0], text[-1]) in (("(", ")"), ("[", "]")) and not set("()[]") & set(text[1:-1]):
            text = text[1:-1]
        # A group of braces that is no argument: {42}, or the remains of \text{ dollars}.
        text = re.sub(r"(?<![\\\w}^_])\{([^{}]*)\}|(?<=\d)\{([^{}\d]*)\}",
                      lambda m: m[1] if m[1] is not None else f" {m[2]}", text)
    return text


def _take_sign(text: str) -> tuple[int, str]:
    if text[:1] in ("-", "+") and text[1:2] not in ("-", "+"):
        return (-1 if text[0] == "-" else 1), text[1:].strip()
    return 1, text


def _take_value(text: str) -> tuple[Fraction | None, str]:
    """(value, rest of the text) of the unsigned number that the text starts with."""
    if found := _FRACTION.match(text):
        top, bottom = (found[1], found[2]) if found[1] is not None else (found[3], found[4])
        above, below = _decimal(top.lstrip("+-")), _decimal(bottom.lstrip("+-"))
        if above is None or not below:
            return None, text
        sign = (-1) ** (top.startswith("-") + bottom.startswith("-"))
        return sign * above / below, text[found.end():]
    if found := _POWER.match(text):
        head = _decimal(found[1]) if found[1] else Fraction(1)
        power = int(found[2])
        return (None if head is None or abs(power) > _DIGITS else head * Fraction(10) ** power), text[found.end():]
    found = _VALUE.match(text)
    if not found:
        return None, text
    value = _decimal(found[1])
    if value is None:
        return None, text
    if found[2]:
        if abs(int(found[2])) > _DIGITS:
            return None, text
        value *= Fraction(10) ** int(found[2])
    if found[3]:
        top, bottom = _decimal(found[3]), _decimal(found[4])
        value = None if top is None or not bottom else value + top / bottom
    elif found[5]:
        bottom = _decimal(found[5])
        value = None if not bottom else value / bottom
    elif mixed := _FRACTION.match(text[found.end():].lstrip()):
        part, rest = _take_value(text[found.end():].lstrip())
        return (None if part is None or mixed[0].count("-") else value + part), rest
    return value, text[found.end():]


def _decimal(text: str) -> Fraction | None:
    """An unsigned decimal. Commas must stand in groups of three: 1,00 and (1,2) are no numbers."""
    if len(text) > _DIGITS:
        return None
    whole, point, part = text.partition(".")
    if "," in whole and not re.fullmatch(r"\d{1,3}(?:,\d{3})+", whole):
        return None
    return Fraction(f"{whole.replace(',', '') or '0'}{point}{part}")


def final_number(response: str) -> Fraction | None:
    r"""The number a worked answer ends in: the last \boxed{}, else what follows 'answer is', else the last number.

    A box that holds no single number, or is never closed, gives None: what stands before it was not the answer.
    """
    response = response[-TAIL:]
    box = last_boxed(response)
    if box is not None:
        return read_number(box)
    stated = _after_marker(response)
    if stated is not None:
        whole = read_number(stated)
        if whole is not None:
            return whole
        first = _IN_TEXT.search(stated)
        if first:
            rest = stated[first.end():]
            return None if _SECOND.match(rest) or _POWER_AFTER.match(rest) else read_number(first[0])
    last = _last(_IN_TEXT, response)
    # "41 or 42" and a bare list of numbers are guesses. (1 1/2 looks like a list too, and is read first.)
    if last is None or _POWER_AFTER.match(response[last.end():last.end() + 20]):
        return None
    before = response[max(0, last.start() - 20):last.start()]
    if _OR_BEFORE.search(before) or _POWER_BEFORE.search(before):
        return None
    parts = _BETWEEN.split(response.strip(" \n.$")) if len(response) < 1000 else []
    if len(parts) > 1 and all(_BARE.fullmatch(part) for part in parts):
        return read_number(response)
    return read_number(last[0].strip())


def number(response: str, references: list[str]) -> Grade:
    """Equal values as exact fractions: 6.00 is 6, 1,000 is 1000, 3/4 is .75; 0.333 is not 1/3."""
    golds = [_gold_number(gold) for gold in references]
    found = final_number(response)
    return _yes_no("number", found is not None and found in golds)


def _gold_number(text: str) -> Fraction:
    value = read_number(text.rpartition("\nA:")[2].lstrip("# "))  # "A: 18" ends OpenAI's example solutions
    if value is None and (_BOX.search(text) or _ANSWER.search(text)):
        value = final_number(text)  # a worked solution as GSM8K publishes it: ... #### 18
    if value is None:
        raise UserError(f"grader 'number' cannot read the reference {text[:60]!r} as a number; "
                        "use the grader math or exact")
    return value


# ---------------------------------------------------------------- choice

_LETTER = re.compile(r"[\s(\[{*_\"'`$]*(?:\\(?:text|mathrm|mathbf|textbf)\s*\{)?\s*(?:option|choice)?"
                     r"[\s(\[{*_\"'`$]*([A-J])"
                     r"(?P<rest>[\s)\]}*_\"'`$.:,;!-].*)?$", re.DOTALL | re.IGNORECASE)
_ALONE = re.compile(r"[\s(\[{*_\"'`$]*([A-Ja-j])[\s)\]}*_\"'`$.:]*")
_BRACKETED = re.compile(r"[(\[]\s*([A-J])\s*[)\]]")
_LINE_START = re.compile(r"^[ \t*_>-]*[(\[]?([A-J])(?:[)\]]|[.:](?=\s|$)|\*\*)", re.MULTILINE)
_NAMED = re.compile(r"\b(?:option|choice)\s+(?:is\s+)?[(\[*\"']*([A-J])\b(?!['\u2019])", re.IGNORECASE)
_ANOTHER = re.compile(r"^[\s)\]}*_\"'`$.]*(?:,|and|or|/|&|\+)\s*[(\[*\"'$]*(?:option\s+)?[A-J](?![A-Za-z])",
                      re.IGNORECASE)
_AFTER_LETTER = frozenset("because since as which for it is and but so with from in by due given".split())


def read_letter(text: str) -> str | None:
    """The letter that a short text gives as its answer; None when it opens with a word, or names two letters."""
    found = _LETTER.match(text)
    if not found:
        return None
    letter, rest = found[1], found["rest"] or ""
    bracketed = text[:found.start(1)].rstrip(" *_\"'`$")[-1:] in ("(", "[", "{") or rest[:1] in ")]}"
    if _ANOTHER.match(rest):
        return None
    if not bracketed and rest[:1].isspace():
        # "A" and "I" are words, and so may any letter be ("a", "C major"): a sentence must not lend its first word.
        word = re.match(r"\s+([A-Za-z']+)", rest)
        if word and word[1].lower() not in _AFTER_LETTER and (letter.islower() or letter in "AI"):
            return None
    if letter.islower() and not bracketed and not _ALONE.fullmatch(text):
        return None
    return letter.upper()


def final_letter(response: str) -> str | None:
    r"""The letter a response settles on: \boxed{}, else 'answer is', else the response itself, else its only option."""
    response = response[-TAIL:]
    box = last_boxed(response)
    if box is not None:
        return read_letter(box)
    stated = _after_marker(response)
    if stated is not None:
        letter = read_letter(stated)
        if letter is not None or _ANOTHER.search(f",{stated}"):
            return letter
    if _ALONE.fullmatch(response):
        return read_letter(response)
    for pattern in (_LINE_START, _NAMED, _BRACKETED):
        letters = {letter.upper() for letter in pattern.findall(response)}
        if len(letters) == 1:
            return letters.pop()
        if letters:
            return None
    return None


def choice(response: str, references: list[str]) -> Grade:
    """The letter A-J that the response settles on, against the reference's letter."""
    golds = set()
    for gold in references:
        letter = read_letter(gold) or final_letter(gold)
        if letter is None:
            raise UserError(f"grader 'choice' needs a letter A-J as reference; got {gold[:60]!r}")
        golds.add(letter)
    return _yes_no("choice", final_letter(response) in golds)


# ---------------------------------------------------------------- math

_DOLLARS = re.compile(r"\$\$(.{1,500}?)\$\$|(?<![\\$])\$([^$]{1,500})\$|\\\((.{1,500}?)\\\)|\\\[(.{1,500}?)\\\]",
                      re.DOTALL)
_HUGE = re.compile(r"\^\s*\{?\s*-?\d{4,}|\^[^,;=]*\^|!\s*!|\d{3,}\s*\}?\)?\s*!|\)\s*!|\d{61,}|\\uparrow")
_SIDE = re.compile(r"^\s*[A-Za-z](?:_\{?\w{1,3}\}?)?(?:\s*\(\s*[a-z]\s*\))?\s*$")


def final_expression(response: str) -> str | None:
    r"""The LaTeX a response ends in: the last \boxed{}, else the formula after 'answer is', else the last formula."""
    response = response[-TAIL:]
    box = last_boxed(response)
    if box is not None:
        return box or None
    stated = _after_marker(response)
    for text in (stated, response):
        found = _DOLLARS.findall(text or "")
        if found:
            return next(part for part in found[-1] if part).strip()
    if stated is not None:
        return stated.strip().rstrip(".") or None
    return response.strip() if "\n" not in response.strip() and len(response) < 100 else None


def math(response: str, references: list[str]) -> Grade:
    r"""Equal as mathematics: \sqrt{8} is 2\sqrt{2}. Plain numbers go by the rule of `number`, percent included.

    The answer must be a value: `x = 42` is read as 42, `41 = 42` is refused. Powers and factorials that no reference
    answer needs are refused unread; whatever else takes more than MATH_SECONDS counts as wrong.
    """
    golds = [_gold_expression(gold) for gold in references]
    found = final_expression(response)
    if not _BOX.search(response) and not _DOLLARS.search(response):
        # Prose without a formula: where the reference is a plain number, its last number is the answer.
        values = [read_number(gold) for gold in golds]
        number_found = final_number(response) if any(value is not None for value in values) else None
        if number_found is not None and number_found in values:
            return _yes_no("math", True)
    return _yes_no("math", found is not None and any(_same_value(found, gold) for gold in golds))


def _gold_expression(text: str) -> str:
    found = last_boxed(text)
    if found is None:
        found = text.strip()
        if len(found) > 1 and found[0] == found[-1] == "$":
            found = found.strip("$").strip()
    if not found:
        raise UserError(f"grader 'math' cannot read the reference {text[:60]!r}")
    return found


def _same_value(answer: str, gold: str) -> bool:
    if len(answer) > MATH_CHARACTERS or len(gold) > MATH_CHARACTERS:
        return False
    if "".join(answer.split()) == "".join(gold.split()):
        return True
    if "=" in answer and "=" not in gold:
        left, _, right = answer.rpartition("=")
        if not _SIDE.match(left):
            return False
        answer = right.strip()
    numbers = read_number(answer), read_number(gold)
    if None not in numbers:
        return numbers[0] == numbers[1]
    if answer.count("%") != gold.count("%") or _HUGE.search(answer):
        return False
    return _CHILD.same(gold, answer)


class _MathChild:
    """One child process that runs math-verify, so that a comparison which never ends can be killed.

    SIGALRM, which math-verify uses by default, works in a main thread only; a thread cannot be killed at all. The
    child starts at the first comparison (about a second) and ends with its parent. Safe to use from threads.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None

    def same(self, gold: str, answer: str, seconds: float = MATH_SECONDS) -> bool:
        with self.lock:
            if self.process is None or self.process.poll() is not None:
                self._start()
            try:
                self.process.stdin.write(json.dumps([gold, answer]).encode() + b"\n")
                self.process.stdin.flush()
                line = self._line(seconds)
            except OSError:
                line = b""
            if line not in (b"1\n", b"0\n"):  # too long, or it died of memory
                self.stop()
            return line == b"1\n"

    def _start(self) -> None:
        source = str(Path(__file__).resolve().parents[1])
        code = f"import sys; sys.path.insert(0, {source!r}); from routewright.grading import _serve; _serve()"
        self.process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.DEVNULL)
        if self._line(120.0) != b"ready\n":
            self.stop()
            raise MissingSetup("grader 'math' could not start math-verify; "
                               "install it with: pip install -r requirements.txt")

    def _line(self, seconds: float) -> bytes:
        handle, line, end = self.process.stdout.fileno(), b"", time.monotonic() + seconds
        poll = select.poll()
        poll.register(handle, select.POLLIN | select.POLLHUP)
        while not line.endswith(b"\n"):
            left = end - time.monotonic()
            if left <= 0 or not poll.poll(left * 1000):
                return b""
            part = os.read(handle, 4096)
            if not part:
                return b""
            line += part
        return line

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            for pipe in (self.process.stdin, self.process.stdout):
                try:
                    pipe.close()
                except OSError:
                    pass
            self.process = None

    def forget(self) -> None:
        """After a fork: the child belongs to the parent."""
        self.__init__()


_CHILD = _MathChild()
atexit.register(_CHILD.stop)
os.register_at_fork(after_in_child=_CHILD.forget)


def _serve() -> None:
    """The child: one JSON pair [gold, answer] per line in, 1 or 0 out."""
    import logging
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    logging.disable(logging.CRITICAL)
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # whatever a library prints is no answer
    from math_verify import LatexExtractionConfig, parse, verify

    # LaTeX only: the plain-expression reader of math-verify goes through sympy's parse_expr, which evaluates text.
    reader = [LatexExtractionConfig()]

    def read(latex: str) -> list[Any]:
        return parse(f"${latex.strip('$ ')}$", extraction_config=reader, fallback_mode="no_fallback",
                     parsing_timeout=None)

    read("1")
    answers.write(b"ready\n")
    for line in sys.stdin.buffer:
        try:
            gold, answer = json.loads(line)
            left, right = read(gold), read(answer)
            equal = bool(left) and bool(right) and verify(left, right, timeout_seconds=None)
        except (Exception, MemoryError):  # the answer is not comparable; that is no reason to stop grading
            equal = False
        answers.write(b"1\n" if equal else b"0\n")


GRADERS: dict[str, Callable[[str, list[str]], Grade]] = {
    "squad_em": squad_em, "squad_f1": squad_f1, "number": number, "choice": choice, "math": math, "exact": exact,
    "korquad_char": korquad_char,
}
