"""What a language model is asked when it is used as a router, and the one token that it answers with.

Two modes. `decision`: the pool is put as a numbered choice and the answer is the label of one model. `difficulty`: the
answer is a level from 0 (certainly right) to 9 (certainly wrong) for one model. In both the answer is a single token
out of a short list, so a router reads the logits of those tokens in one forward pass and never samples or parses.

    instruction = template.render(prompt)                 # what the Alpaca row holds, with the prompt at its end
    text = wrap("alpaca", instruction)                    # what the network reads, up to where the answer begins
    template.answer(choice)  <->  template.parse(answer)  # the label of a choice and back

`style="bare"` leaves the question away and asks with the prompt alone: for models too small to read instructions.
Everything is plain text and goes both ways: `template.prompt_of(template.render(text)) == text` for any text.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from routewright.errors import UserError
from routewright.pool import Pool

MODES = ("decision", "difficulty")
STYLES = ("full", "bare")
WRAPS = ("alpaca", "chat", "none")  # `chat` is the tokenizer's own template, which only floor 3 knows
LEVELS = tuple("0123456789")  # of difficulty
_DIGITS = "123456789"
_LETTERS = string.ascii_uppercase + string.ascii_lowercase
_ALPACA = ("Below is an instruction that describes a task. Write a response that appropriately completes the request."
           "\n\n### Instruction:\n", "\n\n### Response:\n")
_PROMPT_FOLLOWS = "\n\nPrompt:\n"


@dataclass(frozen=True)
class Template:
    """One way to ask. `listing` holds a line per model, in the order of `models`; empty in the bare style.

    about: the model whose difficulty is meant (difficulty mode); "" for the pool as a whole.
    """

    mode: str
    models: tuple[str, ...]
    style: str = "full"
    listing: tuple[str, ...] = ()
    about: str = ""

    def __post_init__(self) -> None:
        if self.mode not in MODES or self.style not in STYLES:
            raise UserError(f"template mode {self.mode!r}, style {self.style!r}: modes are {', '.join(MODES)}, "
                            f"styles {', '.join(STYLES)}")
        if not self.models:
            raise UserError("a template needs at least one model")
        twice = [name for name in self.models if self.models.count(name) > 1]
        if twice:
            raise UserError(f"a template offers every model once; {twice[0]!r} stands twice")
        if self.mode == "decision" and len(self.models) > len(_LETTERS):
            raise UserError(f"a decision template can offer {len(_LETTERS)} models; this pool has {len(self.models)}: "
                            "choose fewer with --models")
        if self.about and self.about not in self.models:
            raise UserError(f"difficulty for {self.about!r}, which is not among the models {', '.join(self.models)}")
        if self.style == "full" and self.mode == "decision" and len(self.listing) != len(self.models):
            raise UserError("a full decision template lists every model once; build it with Template.of_pool")

    @classmethod
    def of_pool(cls, pool: Pool, models: Sequence[str], mode: str = "decision", style: str = "full",
                about: str = "") -> Template:
        """The template for these models of a pool, in this order, with their prices and descriptions listed."""
        listing = tuple(_describe(pool, name) for name in models) if style == "full" and mode == "decision" else ()
        return cls(mode, tuple(models), style, listing, about)

    # -- the question --

    @property
    def question(self) -> str:
        """What stands before the prompt; the same for every prompt, so that a server can keep it in its cache."""
        if self.style == "bare":
            return ""
        if self.mode == "difficulty":
            who = f"the model {self.about}" if self.about else "these models"
            return (f"How hard is the prompt below for {who}? Answer with one digit, from 0 (certainly answered well) "
                    f"to 9 (certainly answered badly).{_PROMPT_FOLLOWS}")
        lines = "\n".join(f"{label}: {line}" for label, line in zip(self.labels, self.listing, strict=True))
        return ("Which of these models should answer the prompt below? Choose the cheapest one that will answer it "
                f"well.\n{lines}\nAnswer with its {'number' if self.labels[0] == '1' else 'letter'} alone."
                f"{_PROMPT_FOLLOWS}")

    def render(self, prompt: str) -> str:
        """The instruction for one prompt. The prompt stands at the end, unchanged, so that only it is ever cut."""
        return self.question + prompt

    def prompt_of(self, instruction: str) -> str:
        """The prompt inside an instruction made by `render`. Raises UserError for any other text."""
        if not instruction.startswith(self.question):
            raise UserError(f"the instruction {instruction[:60]!r}... was not made by this template "
                            f"({self.mode}, {self.style}, {len(self.models)} models)")
        return instruction[len(self.question):]

    # -- the answer --

    @property
    def labels(self) -> tuple[str, ...]:
        """The allowed answers, one token each: digits for up to nine models, then letters; levels for difficulty."""
        if self.mode == "difficulty":
            return LEVELS
        return tuple((_DIGITS if len(self.models) <= len(_DIGITS) else _LETTERS)[:len(self.models)])

    def answer(self, choice: int) -> str:
        """The label of a model's column (decision) or of a level (difficulty)."""
        return self.labels[choice]

    def parse(self, answer: str) -> int | None:
        """The column or level that an answer names, or None. Nothing but the label, with white space, is an answer."""
        text = answer.strip()
        return self.labels.index(text) if text in self.labels else None

    # -- the card --

    def as_card(self) -> dict[str, Any]:
        return {"mode": self.mode, "models": list(self.models), "style": self.style, "listing": list(self.listing),
                "about": self.about}

    @classmethod
    def from_card(cls, card: Mapping[str, Any], where: str) -> Template:
        """The template a card holds. Raises UserError naming `where` when the card is damaged."""
        why = f"{card!r:.80}"
        known = card if isinstance(card, Mapping) else {}
        texts = [known.get(key) for key in ("mode", "style", "about")]
        lists = [known.get(key) for key in ("models", "listing")]
        if all(isinstance(value, list) for value in lists) and all(isinstance(t, str) for t in sum(lists, texts)):
            try:
                return cls(texts[0], tuple(lists[0]), texts[1], tuple(lists[1]), texts[2])
            except UserError as error:
                why = str(error)
        raise UserError(f"{where}: the template is damaged ({why}); build the set again with build_sets.py")


def _describe(pool: Pool, name: str) -> str:
    model = pool[name]
    words = f"{name}, {model.price_input:g} USD per million tokens in and {model.price_output:g} out"
    return f"{words}, {' '.join(model.description.split())}" if model.description else words


def wrap(name: str, instruction: str) -> str:
    """The instruction as the network reads it, up to where the answer begins: the Alpaca form, or as it is."""
    if name == "none":
        return instruction
    if name == "alpaca":
        return instruction.join(_ALPACA)
    raise UserError(f"wrap {name!r} is not one of {', '.join(WRAPS)}" if name not in WRAPS else
                    "the chat wrap belongs to a tokenizer; language_models.encode_instructions knows it")


def unwrap(name: str, text: str) -> str:
    """The instruction inside a wrapped text; the inverse of `wrap`."""
    if name == "none":
        return text
    head, tail = _ALPACA
    whole = len(text) >= len(head) + len(tail) and text.startswith(head) and text.endswith(tail)
    if name != "alpaca" or not whole:
        raise UserError(f"the text {text[:60]!r}... does not have the {name} form")
    return text[len(head):len(text) - len(tail)]
