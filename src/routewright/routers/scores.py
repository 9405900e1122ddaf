"""Scores that the cheap model gives away about itself, each turned into a router by one small calibration.

    self_questioning  it is asked how hard the prompt is for it, and the answer is read from logits or from text
    logit_score       how sure it is of its next token: margin, confidence_margin, entropy, max_logit, top10_variance
    semantic_entropy  how far several answers that it draws for the prompt disagree

`scores(prompts)` is P(the cheap model suffices), (N,) in [0, 1]: higher = the cheap model is enough, for every kind.
CoBench's variance score, exp(-variance), ran the other way, and its sigmoid of the largest logit is 1 for every prompt;
here x / (1 + x) keeps the order of all that is unbounded.

Fitting learns no more than a logistic regression per model from the score to quality (`calibration`) on the train
split; the sign is learnt too. A base model that was never taught to judge itself may know nothing of it: the AUROC on
the train prompts stands in router.json, and one at or below chance is warned of.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from routewright.backends.base import Sampling
from routewright.backends.local import LocalBackend
from routewright.calibration import Calibration
from routewright.errors import UserError
from routewright.hidden_states import PromptReader
from routewright.routers.probe import BaseModelRouter
from routewright.schema import ModelSpec, Outcome, Prompt, TokenUsage
from routewright.templates import Template

if TYPE_CHECKING:
    from routewright.outcomes import OutcomeTable

LOGIT_SCORES = ("margin", "confidence_margin", "entropy", "max_logit", "top10_variance")
CHANCE = 0.52  # AUROC up to which a score is said to know nothing
UNPARSABLE = 0.5  # the score of an answer that names no number
ALIKE = 0.7  # SequenceMatcher ratio above which two answers mean the same, CoBench's
_LOGIT_SCALE = 10.0  # logits of language models lie within a few tens
_READING = 2  # of how answers and levels are read; raised with a change of it, so that older cached readings are left
_PRIVATE = "base"  # the base model's name inside its own backend

log = logging.getLogger(__name__)


# ---------------------------------------------------------------- what all of them share

@dataclass(kw_only=True)
class ScoreRouter(BaseModelRouter):
    """One number per prompt, calibrated to quality per model.

    max_samples  train prompts that the calibration is fitted on, drawn at random; 0: all. Four numbers are learnt.
    """

    wrap: str = "auto"
    max_samples: int = 1000

    calibration: Calibration | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_least("max_samples", 0)

    def scores(self, prompts: Sequence[Prompt]) -> np.ndarray:
        """P(the cheap model suffices), (N,) in [0, 1], before calibration; needs a base model, no fit."""
        if not self.base:
            self.prepare()
        found = self._read(prompts)
        self._look(found)
        return found[:, self._column] if len(prompts) else np.zeros(0)

    @property
    def _column(self) -> int:
        """Which of the numbers read off a prompt is the score."""
        return 0

    def _look(self, found: np.ndarray) -> None:
        """Be shown what was read, (N, K)."""

    def _fit(self, train: OutcomeTable, dev: OutcomeTable | None, seed: int) -> None:
        from routewright.metrics import auroc

        self.prepare()
        if self.max_samples and train.n > self.max_samples:
            train = train.rows(np.sort(np.random.default_rng(seed).choice(train.n, self.max_samples, replace=False)))
        scores = self.scores(train.prompts)
        self.calibration = Calibration.fit(scores[:, None], train.quality_mean)
        cheap = self.pool.by_price()[0] if self.pool else self.models[0]
        area = auroc(train.quality[:, self.models.index(cheap)] >= 0.5, scores)
        self.card["train_auroc"] = None if area is None else round(area, 4)
        if area is not None and area <= CHANCE:
            what = "no better than chance" if area > 1 - CHANCE else "upside down, which the calibration turns round"
            log.warning("router %r: on the train prompts its score tells right from wrong answers of %r %s (AUROC "
                        "%.3f); the base model %s does not know itself in this way", self.name, cheap, what, area,
                        self.base)

    def _estimate(self, prompts: Sequence[Prompt]) -> np.ndarray:
        assert self.calibration is not None, "fit or load first"
        return self.calibration.apply(self.scores(prompts)[:, None])

    def overhead(self, prompts: Sequence[Prompt]) -> tuple[np.ndarray, np.ndarray]:
        """USD (N,) and seconds (N,). Where the base is a member of the pool and answers with text, its tokens are paid
        at the pool's prices; with `gpu_usd_per_hour` the machine's time is paid instead, never both."""
        usd, seconds = super().overhead(prompts)
        if self.gpu_usd_per_hour or not self.member or self.member not in self.models:
            return usd, seconds
        usages = self._usages(prompts)
        if usages is None:
            return usd, seconds
        return usd + np.array([self.pool.cost(self.member, usage) for usage in usages]), seconds

    def _check_asked_as_ever(self) -> None:
        if self.wrap != "auto":
            raise UserError(f"router {self.name!r}: its answers are asked for as all answers of the base model are, in "
                            f"its chat form where it has one; leave wrap {self.wrap!r} away")

    def _usages(self, prompts: Sequence[Prompt]) -> list[TokenUsage] | None:
        """Tokens of the answers that the score took, per prompt; None where nothing is generated."""
        return None

    def _state(self) -> dict[str, np.ndarray]:
        return self.calibration.state()

    def _set_state(self, state: dict[str, np.ndarray]) -> None:
        self.calibration = Calibration.from_state(state, len(self.models))
        if self.calibration.weights.shape[0] != 1:
            raise ValueError(f"the calibration takes {self.calibration.weights.shape[0]} scores")
        if not all(np.isfinite(value).all() for value in self.calibration.state().values()):
            raise ValueError("the calibration holds what is no number")


class _AnswerReader(PromptReader):
    """Reads what the base model writes, through the local backend: its answers are those of any other call, asked in
    its chat form where it has one. So no other wrap is possible."""

    def _encode(self, tokenizer: Any, model: Any, texts: list[str]) -> list[list[int]]:
        return [tokenizer(text)["input_ids"] for text in texts]  # for their lengths alone

    def _ask(self, model: Any, tokenizer: Any, texts: Sequence[str], sampling: Sampling,
             sample: int = 0) -> list[Outcome]:
        prompts = [Prompt(str(i), text) for i, text in enumerate(texts)]
        return _OpenBackend(model, tokenizer, self.batch_size).call_many(_PRIVATE, prompts, sampling, sample)


class _OpenBackend(LocalBackend):
    """The local backend over a model that is in memory already."""

    def __init__(self, model: Any, tokenizer: Any, batch_size: int) -> None:
        from routewright.pool import Pool

        super().__init__(Pool(_PRIVATE, (ModelSpec(_PRIVATE, 0.0, 0.0),)), batch_size)
        self._loaded[_PRIVATE] = (model, tokenizer)


# ---------------------------------------------------------------- self-questioning

@dataclass(frozen=True)
class SelfTemplate(Template):
    """The difficulty template, put to the model that is to answer: level 0 = certainly right, 9 = certainly wrong."""

    @property
    def question(self) -> str:
        return ("How hard is the prompt below for you? Answer with one digit, from 0 (you will certainly answer it "
                "right) to 9 (you will certainly answer it wrong).\n\nPrompt:\n")


SELF_QUESTION = SelfTemplate("difficulty", ("you",))
TEXT_QUESTION = ("On a scale from 0 to 100, how easy is it for you to answer the prompt below correctly? 0 means that "
                 "you will certainly be wrong, 100 that you will certainly be right. Do not answer the prompt itself: "
                 "answer with \\boxed{number} alone.\n\nPrompt:\n")
_BOXED = re.compile(r"\\boxed\s*\{\s*(-?\d+)(?:\.\d+)?\s*%?\s*\}|\[\s*(-?\d+)(?:\.\d+)?\s*%?\s*\]")
_WHOLE = re.compile(r"(?<![\w.,+-])(\d{1,3})(?![\w]|[.,]\d)")


def parse_ease(answer: str) -> float | None:
    """The number of a 0-100 answer as a share in [0, 1], or None where it names none.

    \\boxed{n} and [n] are taken first and clamped to 0..100; else the first whole number from 0 to 100 that stands by
    itself: the "10" of "10 of them" is 10 and never 1, while "3.5", "x10", "-5" and "1000" are no such numbers.
    """
    boxed = _BOXED.search(answer)
    if boxed:
        return min(100, max(0, int(boxed[1] or boxed[2]))) / 100
    return next((int(found) / 100 for found in _WHOLE.findall(answer) if int(found) <= 100), None)


class _LevelReader(PromptReader):
    what = "self-levels"

    def _more(self) -> tuple[Any, ...]:
        return _READING, SELF_QUESTION.question

    def _encode(self, tokenizer: Any, model: Any, texts: list[str]) -> list[list[int]]:
        from routewright.language_models import choose_wrap, encode_instructions

        asked = [SELF_QUESTION.render(text) for text in texts]
        return encode_instructions(tokenizer, SELF_QUESTION, choose_wrap(self.wrap, tokenizer), asked,
                                   self._longest(model, tokenizer))

    def _compute(self, model: Any, tokenizer: Any, texts: list[str], rows: list[list[int]]) -> np.ndarray:
        from routewright.language_models import features, label_ids, label_logits

        ids = label_ids(tokenizer, SELF_QUESTION, self.wrap)
        return 1.0 - features(SELF_QUESTION, label_logits(model, rows, ids, len(rows), tokenizer.pad_token_id or 0))


class _EaseReader(_AnswerReader):
    """(N, 4): the score, whether a number was found, input tokens, output tokens."""

    what = "self-text"

    def _more(self) -> tuple[Any, ...]:
        return _READING, TEXT_QUESTION, UNPARSABLE

    def _compute(self, model: Any, tokenizer: Any, texts: list[str], rows: list[list[int]]) -> np.ndarray:
        answers = self._ask(model, tokenizer, [TEXT_QUESTION + text for text in texts], Sampling(max_new_tokens=10))
        # A prompt beyond the context window will not be answered at all: that is a plain 0, not an unread answer.
        eases = [0.0 if answer.error else parse_ease(answer.response) for answer in answers]
        return np.array([(UNPARSABLE if ease is None else ease, ease is not None, answer.token_usage.input,
                          answer.token_usage.output) for ease, answer in zip(eases, answers, strict=True)], float)


@dataclass(kw_only=True)
class SelfQuestioningRouter(ScoreRouter):
    """The cheap model is asked how hard the prompt is for it.

    form `logits`: one forward pass, the expected level out of the logits of the ten digits. form `text`: CoBench's
    0-100 answer, greedy, at most 10 tokens; an answer without a number scores 0.5 and is counted, and a prompt beyond
    the base model's context scores 0. A model without instruction tuning says little in either form.
    """

    kind: ClassVar[str] = "self_questioning"

    form: str = "logits"

    unparsable: int = field(default=0, init=False)  # answers without a number, of the last `scores` (text form)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_choice("form", ("logits", "text"))
        if self.form == "text":
            self._check_asked_as_ever()

    def _make_reader(self, **options: Any) -> PromptReader:
        return (_LevelReader if self.form == "logits" else _EaseReader)(**options)

    def _look(self, found: np.ndarray) -> None:
        if self.form != "text" or not len(found):
            return
        self.unparsable = int((found[:, 1] == 0).sum())
        if self.unparsable:
            cure = "; use form logits, which needs no number" if self.unparsable * 2 > len(found) else ""
            log.warning("router %r: %d of %d answers of %s name no number from 0 to 100 and score %.1f%s", self.name,
                        self.unparsable, len(found), self.base, UNPARSABLE, cure)

    def _usages(self, prompts: Sequence[Prompt]) -> list[TokenUsage] | None:
        return _usages(self._read(prompts)[:, 2:]) if self.form == "text" else None


def _usages(tokens: np.ndarray) -> list[TokenUsage]:
    return [TokenUsage(int(inside), int(outside)) for inside, outside in tokens]


# ---------------------------------------------------------------- logits of the next token

def logit_scores(logits: np.ndarray) -> np.ndarray:
    """(B, 5), columns as LOGIT_SCORES, out of next-token logits (B, V). Each in [0, 1] and higher when surer.

    margin m = best minus second logit, as m / (1 + m); confidence_margin p1 - p2; entropy 1 - H / log V; max_logit x as
    (1 + x / (10 + |x|)) / 2; top10_variance v of the ten largest logits, as v / (1 + v).
    """
    logits = np.asarray(logits, np.float64)
    count = min(10, logits.shape[1])
    top = -np.sort(-np.partition(logits, -count, axis=1)[:, -count:], axis=1)  # (B, 10), descending
    odds = np.exp(logits - top[:, :1])
    total = odds.sum(axis=1)
    shares = odds / total[:, None]
    # p log p = share * (logit - best - log total), and 0 where the share is 0.
    entropy = np.log(total) - (shares * (logits - top[:, :1])).sum(axis=1)
    margin, variance = top[:, 0] - top[:, 1], top.var(axis=1)
    return np.stack([
        margin / (1 + margin),
        (1 - np.exp(-margin)) / total,
        1 - np.clip(entropy / np.log(logits.shape[1]), 0.0, 1.0),
        0.5 * (1 + top[:, 0] / (_LOGIT_SCALE + np.abs(top[:, 0]))),
        variance / (1 + variance)], axis=1)


class _LogitReader(PromptReader):
    """(N, 5): every score at once, so that all kinds share one forward pass. `tokens` > 1 goes on with the greedy
    answer and takes the mean over its first tokens, at a forward pass each."""

    what = "logits"

    def __init__(self, base: str, *, tokens: int = 1, **options: Any) -> None:
        self.tokens = tokens
        super().__init__(base, **options)

    def _more(self) -> tuple[Any, ...]:
        return (self.tokens,)

    def _longest(self, model: Any, tokenizer: Any) -> int:
        return max(1, super()._longest(model, tokenizer) - self.tokens)

    def _compute(self, model: Any, tokenizer: Any, texts: list[str], rows: list[list[int]]) -> np.ndarray:
        from routewright.language_models import label_logits

        words = range(model.get_input_embeddings().num_embeddings)
        ends = {tokenizer.eos_token_id, *_as_list(getattr(model.generation_config, "eos_token_id", None))}
        rows = [list(row) for row in rows]
        total, counts, open_rows = np.zeros((len(rows), len(LOGIT_SCORES))), np.zeros(len(rows)), range(len(rows))
        for _ in range(self.tokens):
            logits = label_logits(model, [rows[i] for i in open_rows], words, len(rows), tokenizer.pad_token_id or 0)
            total[open_rows] += logit_scores(logits)
            counts[open_rows] += 1
            for i, token in zip(open_rows, logits.argmax(axis=1).tolist(), strict=True):
                rows[i].append(token)
            open_rows = [i for i in open_rows if rows[i][-1] not in ends]
            if not open_rows:
                break
        return total / counts[:, None]


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


@dataclass(kw_only=True)
class LogitScoreRouter(ScoreRouter):
    """How sure the cheap model is of the token with which its answer begins.

    score   margin, confidence_margin, entropy, max_logit or top10_variance (see `logit_scores`)
    tokens  tokens of the greedy answer that the score is a mean over; 1 reads the prompt and generates nothing
    """

    kind: ClassVar[str] = "logit_score"

    score: str = "margin"
    tokens: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_choice("score", LOGIT_SCORES)
        self._check_least("tokens", 1)

    @property
    def _column(self) -> int:
        return LOGIT_SCORES.index(self.score)

    def _make_reader(self, **options: Any) -> PromptReader:
        return _LogitReader(tokens=self.tokens, **options)


# ---------------------------------------------------------------- semantic entropy

def answer_clusters(answers: Sequence[str], alike: float = ALIKE) -> list[int]:
    """Sizes of the groups of answers that mean the same: an answer joins the first group whose first answer it
    resembles (SequenceMatcher ratio above `alike`), as in CoBench. Two empty answers are alike."""
    leaders: list[str] = []
    sizes: list[int] = []
    for answer in answers:
        text = answer.strip()
        match = next((i for i, leader in enumerate(leaders)
                      if leader == text or SequenceMatcher(None, leader, text).ratio() > alike), None)
        if match is None:
            leaders.append(text)
            sizes.append(1)
        else:
            sizes[match] += 1
    return sizes


def agreement(answers: Sequence[str], alike: float = ALIKE) -> float:
    """exp(-entropy of the clusters): 1 when all answers agree, 1 / n when no two do."""
    share = np.array(answer_clusters(answers, alike)) / len(answers)
    return float(np.exp((share * np.log(share)).sum()))


class _AgreementReader(_AnswerReader):
    """(N, 3): the score, input tokens, output tokens, over all samples."""

    what = "agreement"

    def __init__(self, base: str, *, samples: int, temperature: float, max_new_tokens: int, **options: Any) -> None:
        self.samples, self.temperature, self.max_new_tokens = samples, temperature, max_new_tokens
        super().__init__(base, **options)

    def _more(self) -> tuple[Any, ...]:
        return _READING, self.samples, self.temperature, self.max_new_tokens, ALIKE

    def _compute(self, model: Any, tokenizer: Any, texts: list[str], rows: list[list[int]]) -> np.ndarray:
        sampling = Sampling(temperature=self.temperature, max_new_tokens=self.max_new_tokens)
        drawn = [self._ask(model, tokenizer, texts, sampling, sample) for sample in range(1, self.samples + 1)]
        found = []
        for answers in zip(*drawn, strict=True):
            score = 0.0 if answers[0].error else agreement([answer.response for answer in answers])
            found.append((score, sum(a.token_usage.input for a in answers), sum(a.token_usage.output for a in answers)))
        return np.array(found, float)


@dataclass(kw_only=True)
class SemanticEntropyRouter(ScoreRouter):
    """How far the cheap model's own answers disagree: `samples` answers are drawn at `temperature`, grouped by what
    they say, and the score is exp(-entropy of the groups).

    The answers are drawn when a prompt is scored, also in replay: a router decides before anything is answered, so
    the cache's recorded samples are not its to read. A prompt beyond the base model's context scores 0, for it will
    not be answered at all.
    """

    kind: ClassVar[str] = "semantic_entropy"

    samples: int = 5
    temperature: float = 0.7
    max_new_tokens: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_least("samples", 2)
        self._check_least("max_new_tokens", 1)
        self._check_least("temperature", 0.01)
        self._check_asked_as_ever()

    def _make_reader(self, **options: Any) -> PromptReader:
        return _AgreementReader(samples=self.samples, temperature=self.temperature,
                                max_new_tokens=self.max_new_tokens, **options)

    def _usages(self, prompts: Sequence[Prompt]) -> list[TokenUsage] | None:
        return _usages(self._read(prompts)[:, 1:])


