"""The sample pool: word problems of graded difficulty and the small language models that answer them.

A stranger must be able to route between real models a minute after cloning, with no key and no download. So the
project trains its own pool from scratch on problems that it generates: a cheap model that answers at once and is
right on easy problems, and stronger ones that write their working first and are right on most.

Difficulty shows in the text (steps, task, size of the numbers, order of the facts) and not in its length alone:
`lookup` problems are long and easy, `riddle` and reversed `compare` problems are short and hard. The strong model
saw hardly any `clock` problems, which the cheap one knows well, so that the oracle stands above the strong model.

Everything is drawn from `random.Random` seeded with text, whose stream is the same on every machine and version.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from routewright.encoders import quiet_loading
from routewright.errors import PartialRun, UserError
from routewright.schema import Outcome, Prompt
from routewright.textfiles import fsync_folder, write_atomic

LARGEST = 199  # every number in a problem or its working lies in 0..199, one token each
WOMEN = ("Ann", "Eva", "Ida", "Mia", "Zoe", "Lena", "Nora", "Rosa", "Tara", "Vera", "Alma", "Dina")
MEN = ("Ben", "Dan", "Ivo", "Max", "Tom", "Leo", "Noah", "Omar", "Paul", "Rick", "Sami", "Theo")
NAMES = WOMEN + MEN
THINGS = ("apples", "books", "cards", "coins", "cups", "dolls", "eggs", "keys", "lamps", "marbles", "nuts", "pears",
          "pens", "plums", "shells", "shirts", "stamps", "stones", "toys", "tickets")
GOODS = ("bag", "ball", "cake", "chair", "coat", "game", "hat", "kite", "lamp", "map", "meal", "ticket")
EVENTS = ("train leaves", "film starts", "shop opens", "bus comes", "game ends", "cake is ready", "meeting starts")
TASKS = ("count", "money", "transfer", "compare", "lookup", "riddle", "clock")
TRAIN_MIX = {"count": .24, "money": .16, "transfer": .14, "compare": .15, "lookup": .11, "riddle": .08, "clock": .12}
# Few of the two tasks that need to keep apart who has what: models this small hardly learn it, which leaves nothing
# to route.
CACHE_MIX = {"count": .28, "money": .14, "transfer": .05, "compare": .20, "lookup": .05, "riddle": .12, "clock": .16}


@dataclass(frozen=True, slots=True)
class Problem:
    """One word problem. `steps` counts the sums on the way to the answer, `large` says that numbers go beyond 20."""

    task: str
    text: str
    answer: int
    working: tuple[str, ...]
    distractors: int = 0
    large: bool = False

    @property
    def steps(self) -> int:
        return len(self.working)

    def solution(self, worked: bool) -> str:
        """What a model is trained to say: the answer alone, or the working and then the answer."""
        if not worked:
            return f"{self.answer}"
        return (", ".join(self.working) + ". " if self.working else "") + f"Answer: {self.answer}"

    def as_prompt(self, number: int) -> Prompt:
        """The id tells the difficulty, so that a report can be grouped by it: count-s3-d1-small-00042."""
        size = "large" if self.large else "small"
        name = f"{self.task}-s{self.steps}-d{self.distractors}-{size}-{number:05d}"
        return Prompt(name, self.text, task=self.task, group=name, reference=str(self.answer))


def difficulty(prompt_id: str) -> dict[str, Any]:
    """{task, steps, distractors, size} out of a prompt id made by `Problem.as_prompt`."""
    try:
        task, steps, distractors, size, _ = prompt_id.split("-")
        return {"task": task, "steps": int(steps[1:]), "distractors": int(distractors[1:]), "size": size}
    except ValueError:
        raise UserError(f"prompt id {prompt_id!r} was not made by the sample pool; "
                        "expected task-sN-dN-size-number") from None


# Problems ------------------------------------------------------------------------------------------------------------

def make_problem(rng: random.Random, mix: dict[str, float] = TRAIN_MIX) -> Problem:
    """Draw one problem; `mix` holds the weight of each task."""
    task = rng.choices(list(mix), list(mix.values()))[0]
    return _MAKERS[task](rng)


def make_problems(seed: str, n: int, mix: dict[str, float] = TRAIN_MIX, exclude: Collection[str] = ()) -> list[Problem]:
    """`n` problems with different texts, none of them in `exclude`. The same seed gives the same problems."""
    rng = random.Random(seed)
    found: dict[str, Problem] = {}
    for _ in range(50 * n):
        if len(found) == n:
            break
        problem = make_problem(rng, mix)
        if problem.text not in exclude:
            found.setdefault(problem.text, problem)
    else:
        raise UserError(f"only {len(found)} different problems of {n} were found for the mix {mix}; ask for fewer")
    return list(found.values())


def _calculate(rng: random.Random, value: int, steps: int, operands: range) -> Iterator[tuple[str, int, int, int]]:
    """(operation, operand, before, after) per step, all values within 0..LARGEST."""
    for _ in range(steps):
        while True:
            op = rng.choices(("+", "-", "*", "/"), (.4, .4, .1, .1))[0]
            k = 2 if op in "*/" else rng.choice(operands)
            after = {"+": value + k, "-": value - k, "*": value * 2, "/": value // 2}[op]
            if 0 <= after <= LARGEST and (op not in "*/" or (value > 0 and (op == "*" or value % 2 == 0))):
                break
        yield op, k, value, after
        value = after


def _sum(op: str, k: int, before: int, after: int) -> str:
    return f"{before} {op} {k} = {after}"


def _numbers(rng: random.Random, large: bool) -> tuple[int, range]:
    """A starting value and the range of operands."""
    return (rng.randint(20, 99), range(8, 31)) if large else (rng.randint(3, 20), range(1, 10))


def _distract(rng: random.Random, sentences: list[str], n: int, names: Sequence[str]) -> list[str]:
    """Put `n` sentences that do not matter somewhere after the first one."""
    for _ in range(n):
        other = rng.choice([name for name in NAMES if name not in names])
        k = rng.randint(2, 60)
        line = rng.choice((
            f"{other} has {k} {rng.choice(THINGS)}.", f"{other} is {k} years old.", f"It is {k} degrees outside.",
            f"A {rng.choice(GOODS)} costs {k} dollars.", f"{other} likes the {rng.choice(GOODS)}.",
            f"The street is {k} miles long.", "The sky is grey."))
        sentences.insert(rng.randint(1, len(sentences)), line)
    return sentences


def _count(rng: random.Random) -> Problem:
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    who = rng.choice((name, "She" if name in WOMEN else "He"))
    large = rng.random() < .25
    value, operands = _numbers(rng, large)
    lines = [rng.choice((f"{name} has {value} {thing}.", f"There are {value} {thing} in the bag of {name}."))]
    working = []
    for op, k, before, after in _calculate(rng, value, rng.choices(range(1, 7), (6, 6, 5, 4, 3, 2))[0], operands):
        lines.append(rng.choice({
            "+": (f"{who} finds {k} more.", f"{who} buys {k} more {thing}.", f"Then {name} gets {k} {thing}.",
                  f"A friend gives {name} {k} {thing}."),
            "-": (f"{who} loses {k} of them.", f"{who} sells {k} {thing}.", f"Then {name} drops {k} {thing}.",
                  f"{who} gives {k} of the {thing} away."),
            "*": (f"{who} doubles the number of {thing}.", f"Then {name} has twice as many."),
            "/": (f"{who} gives half of them away.", f"Then {name} loses half of the {thing}."),
        }[op]))
        working.append(_sum(op, k, before, after))
        value = after
    noise = rng.choices(range(4), (5, 2, 2, 1))[0]
    lines = _distract(rng, lines, noise, [name])
    lines.append(rng.choice((f"How many {thing} does {name} have now?", f"How many {thing} are left?",
                             f"What is the number of {thing} now?")))
    return Problem("count", " ".join(lines), value, tuple(working), noise, large)


def _money(rng: random.Random) -> Problem:
    name = rng.choice(NAMES)
    who = rng.choice((name, "She" if name in WOMEN else "He"))
    large = rng.random() < .75
    value, operands = _numbers(rng, large)
    lines, working = [f"{name} has {value} dollars."], []
    for op, k, before, after in _calculate(rng, value, rng.choices(range(1, 5), (4, 4, 3, 2))[0], operands):
        lines.append(rng.choice({
            "+": (f"{who} earns {k} dollars.", f"{who} sells a {rng.choice(GOODS)} for {k} dollars.",
                  f"{who} wins {k} dollars."),
            "-": (f"{who} pays {k} dollars for a {rng.choice(GOODS)}.", f"{who} spends {k} dollars.",
                  f"A {rng.choice(GOODS)} costs {name} {k} dollars."),
            "*": (f"{who} doubles the money.",), "/": (f"{who} spends half of the money.",),
        }[op]))
        working.append(_sum(op, k, before, after))
        value = after
    noise = rng.choices(range(3), (6, 3, 1))[0]
    for _ in range(noise):
        other = rng.choice([n for n in NAMES if n != name])
        lines.insert(rng.randint(1, len(lines)), rng.choice((
            f"{other} is {rng.randint(5, 60)} years old.", f"{other} likes the {rng.choice(GOODS)}.",
            f"{other} has {rng.randint(2, 60)} {rng.choice(THINGS)}.")))
    lines.append(rng.choice((f"How many dollars does {name} have now?", f"How much money does {name} have?")))
    return Problem("money", " ".join(lines), value, tuple(working), noise, large)


def _transfer(rng: random.Random) -> Problem:
    people, thing = rng.sample(NAMES, rng.choice((2, 2, 3))), rng.choice(THINGS)
    large = rng.random() < .3
    held = {name: (rng.randint(20, 80) if large else rng.randint(6, 20)) for name in people}
    lines = [f"{name} has {k} {thing}." for name, k in held.items()]
    asked, wanted, working, idle = rng.choice(people), rng.choices(range(1, 5), (4, 4, 3, 2))[0], [], 0
    others = [name for name in people if name != asked]
    while len(working) < wanted:
        giver, taker = rng.sample(people, 2) if idle < 2 else rng.sample([asked, rng.choice(others)], 2)
        k = rng.randint(1, 20 if large else 9)
        if held[giver] < k or held[taker] + k > LARGEST:
            continue
        lines.append(rng.choice((f"{giver} gives {k} to {taker}.", f"{giver} gives {taker} {k} {thing}.",
                                 f"{taker} takes {k} {thing} from {giver}.")))
        for name, op, after in ((giver, "-", held[giver] - k), (taker, "+", held[taker] + k)):
            if name == asked:
                working.append(_sum(op, k, held[name], after))
            held[name] = after
        idle += asked not in (giver, taker)
    lines.append(rng.choice((f"How many {thing} does {asked} have now?", f"How many are with {asked} in the end?")))
    return Problem("transfer", " ".join(lines), held[asked], tuple(working), idle, large)


def _compare(rng: random.Random) -> Problem:
    links = rng.choices(range(1, 5), (3, 4, 3, 2))[0]
    people, thing = rng.sample(NAMES, links + 1), rng.choice(THINGS)
    large = rng.random() < .3
    value, operands = _numbers(rng, large)
    lines, working = [f"{people[0]} has {value} {thing}."], []
    for i, (op, k, before, after) in enumerate(_calculate(rng, value, links, operands)):
        one, base = people[i + 1], people[i]
        lines.append({"+": f"{one} has {k} more than {base}.", "-": f"{one} has {k} fewer than {base}.",
                      "*": f"{one} has twice as many as {base}.", "/": f"{one} has half as many as {base}."}[op])
        working.append(_sum(op, k, before, after))
        value = after
    order = rng.random()
    if order < .35:
        lines.reverse()
    elif order < .6:
        rng.shuffle(lines)
    noise = rng.choices(range(2), (4, 1))[0]
    lines = _distract(rng, lines, noise, people)
    lines.append(f"How many {thing} does {people[-1]} have?")
    return Problem("compare", " ".join(lines), value, tuple(working), noise, large)


def _lookup(rng: random.Random) -> Problem:
    people = rng.sample(NAMES, rng.randint(3, 7))
    things = rng.sample(THINGS, len(people))
    held = [rng.randint(2, 99) for _ in people]
    lines = [rng.choice((f"{n} has {k} {t}.", f"There are {k} {t} in the bag of {n}."))
             for n, k, t in zip(people, held, things, strict=True)]
    i = rng.randrange(len(people))
    lines = _distract(rng, lines, rng.randint(0, 2), people)
    lines.append(f"How many {things[i]} does {people[i]} have?")
    return Problem("lookup", " ".join(lines), held[i], (), len(lines) - 2, max(held) > 20)


def _riddle(rng: random.Random) -> Problem:
    steps = rng.choices(range(1, 4), (3, 4, 3))[0]
    start = rng.randint(2, 30)
    path = list(_calculate(rng, start, steps, range(1, 13)))
    said = [{"+": f"I add {k}", "-": f"I take away {k}", "*": "I double it", "/": "I halve it"}[op]
            for op, k, _, _ in path]
    opening = rng.choice(("I think of a number.", "I have a secret number.", "Take my number."))
    joined = f"{', then '.join(said)}." if rng.random() < .5 else ". ".join(said) + "."
    end = path[-1][3]
    close = rng.choice((f"I get {end}. What was my number?", f"The result is {end}. What was the number?",
                        f"Now it is {end}. Which number was it?"))
    inverse = {"+": "-", "-": "+", "*": "/", "/": "*"}
    working = [_sum(inverse[op], k, after, before) for op, k, before, after in reversed(path)]
    return Problem("riddle", f"{opening} {joined} {close}", start, tuple(working), 0, end > 20)


def _clock(rng: random.Random) -> Problem:
    now, k, event, name = rng.randint(1, 12), rng.randint(1, 11), rng.choice(EVENTS), rng.choice(NAMES)
    if rng.random() < .7:
        text = rng.choice((f"The clock of {name} shows {now}. The {event} in {k} hours. What does the clock show then?",
                           f"{name} looks at the clock. It shows {now}. What does it show after {k} hours?",
                           f"It is {now} o'clock. {name} waits {k} hours until the {event}. Which hour is it then?"))
        working = [_sum("+", k, now, now + k)] + ([_sum("-", 12, now + k, now + k - 12)] if now + k > 12 else [])
        answer = (now + k - 1) % 12 + 1
    else:
        text = rng.choice((f"The clock of {name} shows {now}. What did it show {k} hours ago?",
                           f"The {event} at {now} o'clock. {name} came {k} hours before. Which hour was it then?"))
        lift = now <= k
        working = [_sum("+", 12, now, now + 12)] * lift + [_sum("-", k, now + 12 * lift, now + 12 * lift - k)]
        answer = now + 12 * lift - k
    return Problem("clock", text, answer, tuple(working))


_MAKERS: dict[str, Callable[[random.Random], Problem]] = {
    "count": _count, "money": _money, "transfer": _transfer, "compare": _compare, "lookup": _lookup,
    "riddle": _riddle, "clock": _clock}


# Tokenizer -----------------------------------------------------------------------------------------------------------

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>", "<system>", "<user>", "<assistant>")
# Every turn's text starts with one space, so that a word or number has one token wherever it stands.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<' + message['role'] + '> ' + message['content'] | trim }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}")


def build_tokenizer(texts: Sequence[str]) -> Any:
    """A byte-level BPE tokenizer that knows every word of `texts` and the numbers 0..199 as one token each.

    It is an instance of Qwen2's own class, retrained: AutoTokenizer builds that class beside a qwen2 config whatever
    the folder says, and would split digits. The numbers are added tokens (" 0".." 199"), found before any splitting,
    so that AutoTokenizer and PreTrainedTokenizerFast give the same ids. Any other text falls back to bytes.
    """
    import re

    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import AddedToken, Qwen2Tokenizer

    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    words = sorted({word for text in texts for word in re.findall(r"[^\W\d]+|[^\w\s]", text)})
    learner.train_from_iterator([f" {word}" for word in words for _ in range(2)], trainers.BpeTrainer(
        vocab_size=100_000, min_frequency=2, show_progress=False, special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    learned = json.loads(learner.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=learned["vocab"], merges=[tuple(m) for m in learned["merges"]], pad_token="<pad>", bos_token="<bos>",
        eos_token="<eos>", unk_token="<unk>", additional_special_tokens=list(SPECIAL_TOKENS[4:]), padding_side="left",
        model_max_length=512, clean_up_tokenization_spaces=False)
    tokenizer.add_tokens([AddedToken(f" {n}", normalized=False, special=False) for n in range(LARGEST + 1)])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def chat_text(prompt: str) -> str:
    """What the chat template makes of one user turn, ready for the answer."""
    return f"<bos><user> {prompt.strip()}<assistant>"


# Models and training -------------------------------------------------------------------------------------------------

CLOCK_BLIND = {**TRAIN_MIX, "clock": .004}  # what the stronger models are trained on


@dataclass(frozen=True, slots=True)
class Recipe:
    """One model of the pool and how it is trained. `worked`: it writes its working before the answer.

    `steps` are optimizer steps of `batch_size` fresh problems each; no problem is seen twice on purpose.
    """

    name: str
    hidden: int
    layers: int
    heads: int
    worked: bool
    steps: int
    learning_rate: float
    seed: int
    mix: dict[str, float] = field(default_factory=lambda: dict(TRAIN_MIX))
    batch_size: int = 64
    warmup: int = 60
    weight_decay: float = .01


RECIPES = (
    Recipe("cheap", hidden=64, layers=2, heads=4, worked=False, steps=4000, learning_rate=3e-3, seed=11),
    Recipe("mid", hidden=64, layers=3, heads=4, worked=True, steps=2000, learning_rate=3e-3, seed=12, mix=CLOCK_BLIND),
    Recipe("strong", hidden=96, layers=4, heads=4, worked=True, steps=2600, learning_rate=2.5e-3, seed=13,
           mix=CLOCK_BLIND),
)

QUICK_RECIPES = tuple(
    Recipe(r.name, hidden=32, layers=1 if r.name == "cheap" else 2, heads=2, worked=r.worked, steps=120,
           learning_rate=5e-3, seed=r.seed, mix=r.mix, batch_size=16, warmup=10) for r in RECIPES)

# USD per million tokens. Invented, 1:15 between the ends as is common between a provider's small and large model.
POOL_YAML = """\
# The sample pool: three small models trained by src/make_sample_pool.py. The prices are invented, 1:5:15 per token.
name: sample
prices_dated: 2026-11-20
models:
  - name: cheap
    price_input: 0.10
    price_output: 0.40
    path: models/cheap
    context_window: 512
    max_output_tokens: 80
    tiers: [budget]
    description: 2 layers of 64, answers at once
  - name: mid
    price_input: 0.50
    price_output: 2.00
    path: models/mid
    context_window: 512
    max_output_tokens: 80
    tiers: [standard]
    description: 3 layers of 64, writes its working first
  - name: strong
    price_input: 1.50
    price_output: 6.00
    path: models/strong
    context_window: 512
    max_output_tokens: 80
    tiers: [premium]
    description: 4 layers of 96, writes its working first; saw hardly any clock problems
"""


def as_row(recipe: Recipe) -> dict[str, Any]:
    return asdict(recipe)


def vocabulary_texts() -> list[str]:
    """Texts that hold every word the problems, their workings and simple routing answers use."""
    problems = make_problems("vocabulary", 3000)
    return [f"{p.text} {p.solution(True)}" for p in problems] + ["cheap mid strong yes no true false correct wrong"]


def reserved_problems(seed: int, n: int) -> list[Problem]:
    """The problems that no model is trained on."""
    return make_problems(f"cache/{seed}", n)


def cache_problems(seed: int, n: int, recipes: Sequence[Recipe] = RECIPES) -> list[Problem]:
    """`n` problems for the cache in the shares of CACHE_MIX, none of which any of these models was trained on.

    Reserved problems first; where a task has too few of them, fresh ones that are checked against every text of every
    training block. Regenerating those texts takes about 20 microseconds each, 15 seconds for the shipped recipes.
    """
    reserved = reserved_problems(seed, n)
    held_out = {p.text for p in reserved}
    trained = {text for recipe in recipes for block in range(math.ceil(recipe.steps / 8))
               for text in (p.text for p in _block(recipe, block, held_out))}
    assert not trained & held_out
    chosen: list[Problem] = []
    for task, share in CACHE_MIX.items():
        wanted = round(n * share)
        ours = [p for p in reserved if p.task == task][:wanted]
        if len(ours) < wanted:
            ours += make_problems(f"cache/{seed}/{task}", wanted - len(ours), {task: 1.0}, trained | held_out)
        chosen += ours
    random.Random(f"order/{seed}").shuffle(chosen)
    return chosen


def _block(recipe: Recipe, block: int, held_out: Collection[str]) -> list[Problem]:
    """Eight batches of training problems; a function of the recipe's seed and the number of the block alone."""
    return make_problems(f"train/{recipe.seed}/{block}", 8 * recipe.batch_size, recipe.mix, held_out)


def make_model(recipe: Recipe, tokenizer: Any) -> Any:
    """A freshly initialised Qwen2ForCausalLM (tied embeddings, fp32), the same for the same seed."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(recipe.seed)
    return Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=recipe.hidden, intermediate_size=3 * recipe.hidden,
        num_hidden_layers=recipe.layers, num_attention_heads=recipe.heads, num_key_value_heads=recipe.heads,
        max_position_embeddings=512, rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True, pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, initializer_range=.05))


def batches(recipe: Recipe, tokenizer: Any, first: int, held_out: Collection[str] = ()) -> Iterator[tuple[Any, Any]]:
    """(input_ids, labels), each (batch, length) int64, from step `first` on; labels are -100 before the answer.

    Problems are drawn in blocks of 8 batches and cut by length, so that little is padded. A block depends on its
    number and the recipe's seed alone, so a resumed run sees what the unbroken one would have seen.
    """
    import torch

    block = first // 8
    while True:
        problems = _block(recipe, block, held_out)
        asked = tokenizer([chat_text(p.text) for p in problems], add_special_tokens=False)["input_ids"]
        answers = [f" {p.solution(recipe.worked)}<eos>" for p in problems]
        told = tokenizer(answers, add_special_tokens=False)["input_ids"]
        rows = sorted(zip(asked, told, strict=True), key=lambda pair: len(pair[0]) + len(pair[1]))
        order = list(range(8))
        random.Random(f"order/{recipe.seed}/{block}").shuffle(order)
        for i in order[first % 8 if block == first // 8 else 0:]:
            part = rows[i * recipe.batch_size:(i + 1) * recipe.batch_size]
            width = max(len(a) + len(b) for a, b in part)
            ids = torch.full((len(part), width), tokenizer.pad_token_id)
            labels = torch.full((len(part), width), -100)
            for row, (a, b) in enumerate(part):
                ids[row, :len(a) + len(b)] = torch.tensor(a + b)
                labels[row, len(a):len(a) + len(b)] = torch.tensor(b)
            yield ids, labels
        block += 1


def answer_loss(model: Any, ids: Any, labels: Any) -> Any:
    """Mean cross-entropy of the answer tokens. Padding is on the right, so causal attention needs no mask; the
    vocabulary head runs at answer positions only, which saves most of its work."""
    from torch.nn.functional import cross_entropy

    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    wanted = labels[:, 1:]
    answer = wanted != -100
    return cross_entropy(model.lm_head(hidden[answer]), wanted[answer])


def train(recipe: Recipe, tokenizer: Any, held_out: Collection[str], checkpoint: Path, *, save_every: int = 200,
          say: Callable[[str], None] = print, stop_after: int | None = None) -> tuple[Any, dict[str, Any]]:
    """Train from scratch, or go on from `checkpoint` where it is of this recipe: the model, and what was measured.

    Raises PartialRun when the loss is not finite (nothing is saved then) or `stop_after` steps were done here.
    """
    import torch

    model = make_model(recipe, tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(.9, .98),
                                  weight_decay=recipe.weight_decay)
    done, seconds, losses = _resume(checkpoint, recipe, model, optimizer)
    if done:
        say(f"{recipe.name}: resumed after step {done}")
    model.train()
    began = time.monotonic() - seconds
    source = batches(recipe, tokenizer, done, held_out)
    for step in range(done, recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(recipe, step)
        loss = answer_loss(model, *next(source))
        if not math.isfinite(value := loss.item()):
            raise PartialRun(f"{recipe.name}: the loss is {value} at step {step + 1}; the checkpoint of step "
                             f"{done} is kept, lower its learning_rate ({recipe.learning_rate}) and run again")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses = [*losses[-49:], value]
        if (step + 1) % 50 == 0 or step + 1 == recipe.steps:
            passed = time.monotonic() - began
            left = passed / (step + 1) * (recipe.steps - step - 1)
            say(f"{recipe.name}: step {step + 1}/{recipe.steps} loss {sum(losses) / len(losses):.3f} "
                f"{passed / 60:.1f} min, {left / 60:.1f} min left")
        if (step + 1) % save_every == 0 or step + 1 == recipe.steps:
            _save_checkpoint(checkpoint, recipe, model, optimizer, step + 1, time.monotonic() - began, losses)
        if stop_after is not None and step + 1 - done >= stop_after and step + 1 < recipe.steps:
            raise PartialRun(f"{recipe.name}: stopped after step {step + 1} of {recipe.steps}; "
                             "run the same command to go on")
    return model.eval(), {"minutes": round((time.monotonic() - began) / 60, 2), "steps": recipe.steps,
                          "problems": recipe.steps * recipe.batch_size,
                          "parameters": sum(p.numel() for p in model.parameters()),
                          "final_loss": round(sum(losses) / max(1, len(losses)), 4)}


def _learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up, then a cosine down to a twentieth."""
    if step < recipe.warmup:
        return recipe.learning_rate * (step + 1) / recipe.warmup
    along = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.learning_rate * (.05 + .95 * .5 * (1 + math.cos(math.pi * along)))


def _save_checkpoint(path: Path, recipe: Recipe, model: Any, optimizer: Any, step: int, seconds: float,
                     losses: list[float]) -> None:
    import torch

    state = {"recipe": asdict(recipe), "step": step, "seconds": seconds, "losses": losses, "model": model.state_dict(),
             "optimizer": optimizer.state_dict()}
    write_atomic(path, lambda file: torch.save(state, file))


def _resume(path: Path, recipe: Recipe, model: Any, optimizer: Any) -> tuple[int, float, list[float]]:
    """(steps done, seconds spent, the last losses). A checkpoint of another recipe raises UserError."""
    import torch

    if not path.is_file():
        return 0, 0.0, []
    try:
        state = torch.load(path, weights_only=True)
    except Exception as error:  # torch names no class for a torn file
        raise UserError(f"{path}: not a whole checkpoint ({type(error).__name__}); "
                        f"delete it to train {recipe.name} anew") from None
    if state["recipe"] != asdict(recipe):
        changed = [k for k, v in asdict(recipe).items() if state["recipe"].get(k) != v]
        raise UserError(f"{path}: made by another recipe of {recipe.name} ({', '.join(changed)} changed); "
                        "delete it or undo the change")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"], state["seconds"], state["losses"]


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """Weights in fp16 safetensors beside the tokenizer: what ships is what answers (loaded back into fp32)."""
    import torch

    with quiet_loading():
        model.to(torch.float16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    model.to(torch.float32)
    for path in folder.glob("*.safetensors"):
        path.chmod(0o644)  # the library writes them readable by the owner alone
    fsync_folder(folder)


# What it came to -----------------------------------------------------------------------------------------------------

def readme(outcomes: Sequence[Outcome], folder: Path) -> str:
    """The Markdown that ships beside the cache: what it is, how it was made, accuracies by difficulty, all measured."""
    names = list(dict.fromkeys(o.model_name for o in outcomes))
    right = {(o.prompt_id, o.model_name, o.sample): o.quality or 0.0 for o in outcomes}
    prompts = {o.prompt_id: o for o in outcomes if o.sample == 0}
    known = {i: difficulty(i) for i in prompts}
    samples = sorted({o.sample for o in outcomes})
    made = {name: json.loads((folder / "models" / name / "training.json").read_text(encoding="utf-8"))
            for name in names}

    def share(values: Iterable[float]) -> str:
        values = list(values)
        return f"{sum(values) / len(values):.3f}" if values else "-"

    def by(title: str, label: Callable[[str], Any]) -> list[str]:
        rows = [f"| {title} | prompts | {' | '.join(names)} | oracle |", "|---" * (len(names) + 3) + "|"]
        for value in sorted({label(i) for i in prompts}):
            ids = [i for i in prompts if label(i) == value]
            cells = [share(right[i, name, 0] for i in ids) for name in names]
            best = share(max(right[i, name, 0] for name in names) for i in ids)
            rows.append(f"| {value} | {len(ids)} | {' | '.join(cells)} | {best} |")
        return [*rows, ""]

    def model_row(name: str) -> str:
        recipe, measured = made[name], made[name]["measured"]
        mine = [o for o in outcomes if o.model_name == name]
        tokens = sum(o.token_usage.output for o in mine if o.sample == 0) / len(prompts)
        scores = " | ".join(share(right[i, name, s] for i in prompts) for s in samples)
        return (f"| {name} | {measured['parameters']:,} | {recipe['layers']} x {recipe['hidden']} | "
                f"{'working, then answer' if recipe['worked'] else 'answer at once'} | {recipe['steps']:,} | "
                f"{recipe['seed']} | {measured['minutes']} | {scores} | {tokens:.1f} |")

    splits = Counter(o.split for o in prompts.values())
    ends = names[0], names[-1]
    pairs = [(right[i, ends[0], 0], right[i, ends[1], 0]) for i in prompts]
    lines = [
        "# The sample pool", "",
        "Three small language models of the Qwen2 architecture, trained from scratch by `src/make_sample_pool.py`",
        "on generated word problems, and everything they answered. All of it is made here, and small enough to ship;",
        "the prices in `pool.yaml` are invented (1:5:15 per token). Nothing in it says how large models behave: it is",
        "real data to try the tools on.", "",
        "| file | what it is |", "|---|---|",
        f"| `outcomes.jsonl.gz` | the cache: {len(prompts):,} prompts x {len(names)} models x {len(samples)} samples, "
        "sample 0 greedy, the others drawn at the temperature in `cache.json` |",
        "| `prompts.jsonl.gz` | the prompts; the id tells the difficulty: task, steps, distracting sentences, size of "
        "the numbers |",
        "| `pool.yaml` | models and prices |",
        "| `models/*/` | weights (fp16 safetensors, answered in fp32), tokenizer, `training.json` |", "",
        "Made by, in this order:", "", "```",
        "python src/make_sample_pool.py --output_dir data/sample",
        "python src/build_cache.py --prompts data/sample/prompts.jsonl.gz --pool data/sample/pool.yaml \\",
        "    --output_dir data/sample",
        "python src/make_sample_pool.py --output_dir data/sample --report true", "```", "",
        "The prompts are drawn with seeds `cache/1` and `cache/1/<task>`, the training problems of a model with",
        "`train/<seed>/<block>`; no text of the cache was trained on. Near-duplicates share a group; splits by group:",
        f"train {splits['train']}, dev {splits['dev']}, test {splits['test']}. Minutes were measured on two cores",
        "under a load of about 7; the same machine and versions give the same weights, a stopped run too.", "",
        "## Models", "",
        f"| model | parameters | layers x width | answers | steps of {made[names[0]]['batch_size']} | seed | minutes | "
        + " | ".join(f"right, sample {s}" for s in samples) + " | output tokens |",
        "|---" * (8 + len(samples)) + "|", *[model_row(name) for name in names], "",
        f"Oracle (any model right, greedy): {share(max(right[i, n, 0] for n in names) for i in prompts)}. "
        f"{ends[0]} right where {ends[1]} is wrong: {share(low * (1 - high) for low, high in pairs)}; "
        f"{ends[1]} right where {ends[0]} is wrong: {share(high * (1 - low) for low, high in pairs)}; "
        f"both wrong: {share((1 - low) * (1 - high) for low, high in pairs)}.", "",
        "They are this small because that is enough: one token per number and written working do more than parameters.",
        "The cheap model is weak because it must answer at once. `lookup` and `transfer` need to keep apart who has",
        "what, which none of the three learned; few of them are asked.", "",
        "`clock` is the task that the stronger models hardly saw in training (0.4 % of their problems, "
        f"{TRAIN_MIX['clock']:.0%} of the cheap one's): a dear model is not better at everything.", "",
        "## Right answers by difficulty (greedy)", "",
        *by("task", lambda i: known[i]["task"]), *by("steps", lambda i: known[i]["steps"]),
        *by("distracting sentences", lambda i: known[i]["distractors"]), *by("numbers", lambda i: known[i]["size"]),
        *by("words in the prompt", lambda i: _length_band(prompts[i].prompt)),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _length_band(text: str) -> str:
    words = len(text.split())
    low = next(edge for edge in (50, 40, 30, 20, 0) if words >= edge)
    return f"{low}-{low + 9}" if 0 < low < 50 else "under 20" if low == 0 else "50 or more"


def cobench_rows(outcomes: Sequence[Outcome], models: Sequence[str] = ("cheap", "strong"),
                 n: int = 200) -> list[dict[str, Any]]:
    """CoBench's training rows, {question, llm_id, label}: label 1 where that model's greedy answer was right."""
    return [{"question": text, "llm_id": name, "label": int(known[name])}
            for text, known in _right_by_text(outcomes, n) for name in models]


def _right_by_text(outcomes: Sequence[Outcome], n: int) -> list[tuple[str, dict[str, bool]]]:
    """The first `n` problems of the train split, and which model answered each right (greedy)."""
    right: dict[str, dict[str, bool]] = {}
    for outcome in outcomes:
        if outcome.sample == 0 and outcome.split == "train":
            right.setdefault(outcome.prompt, {})[outcome.model_name] = bool(outcome.is_correct)
    return list(right.items())[:n]
