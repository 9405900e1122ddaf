"""Prompts: reading them, telling duplicates apart, splitting without leaks, and finding leaks between two sets.

A prompt that stands in train and in test makes every score worthless, so near-duplicates share a *group* and a split
is a function of the group. Two prompts are

- exact duplicates when `normalise` maps them to the same text (case, spacing, quotes and sentence punctuation do not
  count; operators, brackets and signs do, because `f(x) = x + 1` and `f(x) = x - 1` are different questions);
- near-duplicates when the Jaccard similarity of their shingles is at least `threshold`. By default a shingle is three
  words in a row and the threshold .8: one changed word in a prompt of about 30 words. Candidates come from
  MinHash-LSH (datasketch) and every candidate pair is checked by its true similarity, so no pair below the threshold
  is joined; a pair at the threshold is missed with probability below 1e-7.

`numbers_matter` (on by default) lets two prompts be near-duplicates only when the sequence of numbers in them is equal.
Generated word problems come from a few templates: without it "Ann has 3 pears and buys 4" and "Ann has 17 pears and
buys 9" would be one group, and a whole data set would land in one split.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from routewright.errors import UserError
from routewright.schema import Prompt
from routewright.textfiles import nearest, read_jsonl

THRESHOLD = 0.8
SHINGLE = 3  # words; use 5 or more with unit="character"
FRACTIONS = {"train": 0.6, "dev": 0.2, "test": 0.2}
_PERMUTATIONS = 128
_SEED = 20240607  # of the MinHash permutations; groups do not depend on it except for the 1e-7 of missed pairs

_NUMBER = re.compile(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?|\d[\d,]*(?:\.\d+)?")
_DASHES = dict.fromkeys(map(ord, "\u2010\u2011\u2012\u2013\u2014\u2015"), " ") | {ord("\u2212"): "-"}
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_QUOTES = re.compile(r"['\"`\u2018\u2019\u201a\u201b\u201c\u201d\u201e\u00b4]")
_COMPOUND = re.compile(r"(?<=[^\W\d])-(?=[^\W\d]{2})|(?<=[^\W\d]{2})-(?=[^\W\d])")  # follow-up, but not x-y
_SENTENCE = re.compile(r"[.](?!\d)|[,;:!?\u00bf\u00a1\u2026_\\#]")  # the point of 3.5 stays
_TOKEN = re.compile(r"\w+(?:\.\d+)*|[^\w\s]")


# ---------------------------------------------------------------- texts and keys

def normalise(text: str) -> str:
    """The text with everything removed that does not change the question: the key of an exact duplicate.

    NFKC, case folded, quotes and sentence punctuation dropped, thousands separators dropped, tokens set apart by one
    blank. Idempotent. A text of nothing but punctuation keeps its characters.
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    plain = _THOUSANDS.sub("", _QUOTES.sub("", folded.translate(_DASHES)))
    plain = _SENTENCE.sub(" ", _COMPOUND.sub(" ", plain))
    return " ".join(_TOKEN.findall(plain)) or " ".join(folded.split())


def full_text(prompt: Prompt) -> str:
    """What is compared: the prompt, and its context where it has one (one question about two passages is two)."""
    return f"{prompt.prompt}\n{prompt.context}" if prompt.context else prompt.prompt


def text_hash(text: str) -> str:
    """12 hexadecimal digits of the normalised text: how router.json names the prompts it was trained on."""
    return hashlib.sha256(normalise(text).encode("utf-8", "surrogatepass")).hexdigest()[:12]


def prompts_hash(prompts: Iterable[Prompt]) -> str:
    """16 hexadecimal digits of a set of prompts; the order and repetitions do not count."""
    keys = sorted({hashlib.sha256(normalise(full_text(p)).encode("utf-8", "surrogatepass")).digest() for p in prompts})
    return hashlib.sha256(b"".join(keys)).hexdigest()[:16]


def numbers_in(text: str) -> tuple[str, ...]:
    """The numbers of a text in order, without thousands separators."""
    return tuple(found.replace(",", "") for found in _NUMBER.findall(text))


# ---------------------------------------------------------------- near-duplicates

def group_near_duplicates(texts: Sequence[str], threshold: float = THRESHOLD, shingle: int = SHINGLE,
                          unit: str = "word", numbers_matter: bool = True) -> list[str]:
    """A group id per text; texts share one exactly when a chain of exact or near-duplicates joins them.

    The id is a hash of a member's text, so it depends neither on the order of `texts` nor on their ids.
    14,042 multiple-choice prompts take 4.5 seconds of one core.
    """
    keys = [normalise(text) for text in texts]
    unique = list(dict.fromkeys(keys))
    at = {key: i for i, key in enumerate(unique)}
    shingles = _Shingles(unique, threshold, shingle, unit, numbers_matter)
    parent = list(range(len(unique)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    different: set[tuple[int, int]] = set()
    for bucket in shingles.buckets():
        # Walk outwards from the first member; whoever is reached leaves the bucket, so that a bucket of one big
        # template costs one comparison per member and not one per pair.
        remaining = set(bucket)
        while remaining:
            reached = [remaining.pop()]
            while reached and remaining:
                i = reached.pop()
                mine = root(i)
                for j in list(remaining):
                    pair = (i, j) if i < j else (j, i)
                    if root(j) != mine:
                        if pair in different:
                            continue
                        if shingles.similarity(i, j) < threshold:
                            different.add(pair)
                            continue
                        parent[root(j)] = mine
                    remaining.discard(j)
                    reached.append(j)

    names: dict[int, str] = {}
    for i, key in enumerate(unique):
        mark = hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        names[root(i)] = min(mark, names.get(root(i), mark))
    return [names[root(at[key])] for key in keys]


def group_prompts(prompts: Sequence[Prompt], threshold: float = THRESHOLD) -> list[str]:
    """A group id per prompt: near-duplicates together, and whatever the source ties by its own `group`."""
    near = group_near_duplicates([full_text(p) for p in prompts], threshold)
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        while parent.setdefault(key, key) != key:
            key = parent[key]
        return key

    for prompt, group in zip(prompts, near, strict=True):
        if prompt.group:
            a, b = root(f"source {prompt.group}"), root(group)
            parent[max(a, b)] = min(a, b)  # hexadecimal ids sort before "source", so the root is always a content hash
    return [root(group) for group in near]


class _Shingles:
    """Shingle sets of normalised texts and their MinHash signatures, hashed for all texts at once.

    Only texts with shingles of the same numbers can meet: with `numbers_matter` the numbers are mixed into every
    signature, so that prompts which differ in a number never become candidates.
    """

    def __init__(self, keys: Sequence[str], threshold: float, shingle: int, unit: str, numbers_matter: bool) -> None:
        if not 0 < threshold <= 1 or shingle < 1 or unit not in ("word", "character"):
            raise UserError(f"near-duplicates need 0 < threshold <= 1, shingle >= 1 and unit word or character; got "
                            f"threshold {threshold}, shingle {shingle}, unit {unit!r}")
        self.bands, self.rows = _bands(threshold)
        known: dict[str, int] = {}
        numbers: list[int] = []
        flat: list[int] = []
        lengths = np.empty(len(keys), np.int64)
        for i, key in enumerate(keys):
            tokens = key.split() if unit == "word" else list(key)
            lengths[i] = len(tokens)
            for token in tokens:
                value = known.get(token)
                if value is None:
                    value = known[token] = _hash64(token)
                flat.append(value)
            numbers.append(_hash64("\0".join(numbers_in(key))) if numbers_matter else 0)
        self.numbers = np.array(numbers, np.uint64)
        self.sets = _windows(np.array(flat, np.uint64), lengths, shingle)

    def similarity(self, i: int, j: int) -> float:
        """True Jaccard similarity; 0 where the numbers differ."""
        if self.numbers[i] != self.numbers[j]:
            return 0.0
        a, b = self.sets[i], self.sets[j]
        both = len(a & b)
        return both / (len(a) + len(b) - both)

    def signatures(self) -> np.ndarray:
        """(N, bands * rows) uint32 MinHash values."""
        sizes = np.array([len(s) for s in self.sets], np.int64)
        values = np.fromiter((v for s in self.sets for v in s), np.uint64, sizes.sum())
        starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        random = np.random.default_rng(_SEED)
        factors = random.integers(0, 2**63, self.bands * self.rows, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
        offsets = random.integers(0, 2**63, self.bands * self.rows, dtype=np.uint64)
        found = np.empty((len(self.sets), len(factors)), np.uint32)
        if not len(self.sets):
            return found
        for k, (factor, offset) in enumerate(zip(factors, offsets, strict=True)):
            # The upper half of factor * value + offset mod 2^64 is a 2-universal hash.
            found[:, k] = np.minimum.reduceat((values * factor + offset) >> np.uint64(32), starts)
        return found ^ (self.numbers >> np.uint64(32)).astype(np.uint32)[:, None]

    def buckets(self) -> Iterable[list[int]]:
        """Lists of two or more texts that one LSH band holds to be alike."""
        from datasketch import MinHash, MinHashLSH

        if len(self.sets) < 2:
            return
        signatures = self.signatures()
        index = MinHashLSH(num_perm=self.bands * self.rows, params=(self.bands, self.rows))
        permutations = MinHash(num_perm=self.bands * self.rows).permutations
        with index.insertion_session() as session:
            for i, row in enumerate(signatures):
                session.insert(i, MinHash(hashvalues=row, permutations=permutations, scheme="affine32"),
                               check_duplication=False)
        seen: set[tuple[int, ...]] = set()
        for table in index.hashtables:
            for name in table.keys():
                members = tuple(sorted(table.get(name)))
                if len(members) > 1 and members not in seen:
                    seen.add(members)
                    yield list(members)


def _bands(threshold: float) -> tuple[int, int]:
    """(bands, rows) of the LSH: the most selective that misses a pair at the threshold less than once in 1e7."""
    best = (_PERMUTATIONS, 1)
    for rows in range(1, 17):
        bands = _PERMUTATIONS // rows
        if (1 - threshold**rows) ** bands < 1e-7:
            best = (bands, rows)
    return best


def _hash64(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def _windows(flat: np.ndarray, lengths: np.ndarray, shingle: int) -> list[frozenset[int]]:
    """The set of hashed windows of `shingle` tokens per text. A shorter text is one window, whole."""
    mixed = np.zeros(max(len(flat) - shingle + 1, 0), np.uint64)
    for step in range(shingle):  # order-sensitive: a polynomial in an odd base, then scrambled
        mixed = mixed * np.uint64(0x9E3779B97F4A7C15) + flat[step:step + len(mixed)]
    mixed ^= mixed >> np.uint64(29)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(32)
    sets, start = [], 0
    for length in lengths.tolist():
        if length >= shingle:
            sets.append(frozenset(mixed[start:start + length - shingle + 1].tolist()))
        else:
            sets.append(frozenset([hash(tuple(flat[start:start + length].tolist())) & (2**64 - 1)]))
        start += length
    return sets


# ---------------------------------------------------------------- splits

def assign_splits(groups: Sequence[str], fractions: Mapping[str, float] | None = None, salt: str = "") -> list[str]:
    """A split per prompt, from sha256(salt + group): a group never straddles, and adding prompts moves none.

    `fractions` maps split -> share (default train .6, dev .2, test .2) and must sum to 1. Raises UserError.
    """
    fractions = dict(FRACTIONS if fractions is None else fractions)
    if not fractions or any(not isinstance(v, (int, float)) or isinstance(v, bool) or not 0 <= v <= 1
                            for v in fractions.values()) or abs(sum(fractions.values()) - 1) > 1e-6:
        raise UserError(f"split fractions must be numbers from 0 to 1 that sum to 1; got {fractions}")
    unknown = [name for name in fractions if name not in FRACTIONS]
    if unknown:
        close = nearest(str(unknown[0]), FRACTIONS)
        raise UserError(f"split {unknown[0]!r} is not one of {', '.join(FRACTIONS)}{close}")
    names = [name for name in FRACTIONS if fractions.get(name, 0) > 0]  # one order, however the mapping was written
    edges = np.cumsum([fractions[name] for name in names])
    chosen: dict[str, str] = {}
    for group in groups:
        if group not in chosen:
            draw = int.from_bytes(hashlib.sha256((salt + group).encode("utf-8", "surrogatepass")).digest()[:8], "big")
            chosen[group] = names[min(int(np.searchsorted(edges, draw / 2**64, side="right")), len(names) - 1)]
    return [chosen[group] for group in groups]


def seed_splits(prompts: Sequence[Prompt], seed: int) -> list[str]:
    """The division of prompts that stands for one seed: train, dev, test 60/20/20 by group.

    Evaluation and trainers share it, so that a router trained with a seed can be judged on that seed's test prompts.
    """
    return assign_splits([p.group or p.prompt_id for p in prompts], salt=f"seed {seed}:")


def check_straddle(groups: Mapping[str, str], splits: Mapping[str, str], what: str, cure: str) -> None:
    """Raise UserError where a group lies in two splits. Both map a prompt's id; `what` and `cure` frame the message."""
    seen: dict[str, str] = {}
    straddling = [key for key, group in groups.items() if splits[seen.setdefault(group, key)] != splits[key]]
    if straddling:
        key = straddling[0]
        other = seen[groups[key]]
        raise UserError(f"{what}: {len(straddling)} prompts have a near-duplicate in another split "
                        f"(first: {key!r} in {splits[key] or 'no split'}, {other!r} in {splits[other] or 'no split'}); "
                        f"{cure}")


# ---------------------------------------------------------------- leaks

@dataclass(frozen=True)
class Overlap:
    """A prompt of one set that another set holds too. `kind` is "exact", "near" or "group" (same group id)."""

    kind: str
    a_id: str
    b_id: str
    similarity: float


def find_overlap(a: Sequence[Prompt], b: Sequence[Prompt], near: bool = True, threshold: float = THRESHOLD,
                 shingle: int = SHINGLE, unit: str = "word", numbers_matter: bool = True) -> list[Overlap]:
    """The prompts of `a` that `b` holds too, each with its best match, in the order of `a`.

    Exact matches come first, then near ones, then a shared group id (which says that whoever assigned the groups held
    the two to be alike). 10,000 against 10,000 prompts take 5 seconds of one core.
    """
    keys_a, keys_b = [normalise(full_text(p)) for p in a], [normalise(full_text(p)) for p in b]
    exact = {key: p.prompt_id for key, p in zip(reversed(keys_b), reversed(list(b)), strict=True)}
    by_group = {p.group: p.prompt_id for p in reversed(list(b)) if p.group and p.group != p.prompt_id}
    close = _nearest_across(keys_a, keys_b, exact, threshold, shingle, unit, numbers_matter) if near else {}
    found = []
    for key, prompt in zip(keys_a, a, strict=True):
        if key in exact:
            found.append(Overlap("exact", prompt.prompt_id, exact[key], 1.0))
        elif key in close:
            found.append(Overlap("near", prompt.prompt_id, *close[key]))
        elif prompt.group != prompt.prompt_id and prompt.group in by_group:
            found.append(Overlap("group", prompt.prompt_id, by_group[prompt.group], 0.0))
    return found


def _nearest_across(keys_a: Sequence[str], keys_b: Sequence[str], exact: Mapping[str, str], threshold: float,
                    shingle: int, unit: str, numbers_matter: bool) -> dict[str, tuple[str, float]]:
    """key of a -> (id of the most alike prompt of b, similarity), for keys with no exact match."""
    only_a = [key for key in dict.fromkeys(keys_a) if key not in exact]
    unique_b = list(dict.fromkeys(keys_b))
    shingles = _Shingles([*only_a, *unique_b], threshold, shingle, unit, numbers_matter)
    best: dict[str, tuple[str, float]] = {}
    done: set[tuple[int, int]] = set()
    for bucket in shingles.buckets():
        left = [i for i in bucket if i < len(only_a)]
        right = [j for j in bucket if j >= len(only_a)]
        for i in left if right else ():
            if best.get(only_a[i], ("", 0.0))[1] == 1.0:
                continue
            for j in right:
                if (i, j) in done:
                    continue
                done.add((i, j))
                alike = shingles.similarity(i, j)
                if alike >= threshold and alike > best.get(only_a[i], ("", 0.0))[1]:
                    best[only_a[i]] = (exact[unique_b[j - len(only_a)]], alike)
    return best


def check_no_overlap(a: Sequence[Prompt], b: Sequence[Prompt], what_a: str, what_b: str, near: bool = True) -> None:
    """Raise UserError that counts and names the prompts which `a` and `b` share; say nothing when there are none."""
    found = find_overlap(a, b, near=near)
    if not found:
        return
    counts = {kind: sum(o.kind == kind for o in found) for kind in ("exact", "near", "group")}
    counted = ", ".join(f"{n} {kind}" for kind, n in counts.items() if n)
    first = "; ".join(f"{o.a_id!r} = {o.b_id!r} ({o.kind}{f' {o.similarity:.2f}' if o.kind == 'near' else ''})"
                      for o in sorted(found, key=lambda o: ("exact", "near", "group").index(o.kind))[:3])
    raise UserError(f"{len(found)} of {len(a)} prompts of {what_a} stand in {what_b} too ({counted}): {first}"
                    f"{'; ...' if len(found) > 3 else ''}; remove them from one side, or split by group "
                    "(import_outcomes.py --splits hash does)")


# ---------------------------------------------------------------- reading

_ALIASES = {"id": "prompt_id", "question": "prompt", "instruction": "prompt", "answer": "reference"}
_FIELDS = ("prompt_id", "prompt", "task", "group", "split", "context", "reference")


def read_prompts(path: str | Path) -> list[Prompt]:
    """Prompts from JSON lines (.jsonl, .jsonl.gz), every row checked.

    Fields: prompt (or question, instruction), prompt_id (or id; default: a hash of the text), reference (or answer),
    task, group, split, context. Raises UserError with the file and line: unknown field, missing or empty prompt,
    a character that cannot be sent, an id that stands twice.
    """
    prompts: list[Prompt] = []
    lines: dict[str, int] = {}
    for number, row in read_jsonl(path):
        prompt = _prompt(row, f"{path}:{number}")
        if prompt.prompt_id in lines:
            raise UserError(f"{path}:{number}: prompt_id {prompt.prompt_id!r} stands on line {lines[prompt.prompt_id]} "
                            "too; ids must be unique")
        lines[prompt.prompt_id] = number
        prompts.append(prompt)
    return prompts


def check_text(value: Any, where: str, name: str = "prompt") -> str:
    """The text, if it can be sent to a model. Raises UserError."""
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: {name} must be a non-empty text; got {value!r}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: {name} holds half of a surrogate pair at character {error.start}, "
                        "which no model can be sent; remove it") from None
    return value


def _prompt(row: Mapping[str, Any], where: str) -> Prompt:
    fields: dict[str, Any] = {}
    for key, value in row.items():
        name = _ALIASES.get(key, key)
        if name not in _FIELDS:
            raise UserError(f"{where}: unknown field {key!r}{nearest(key, [*_FIELDS, *_ALIASES])}; known: "
                            f"{', '.join([*_FIELDS, *_ALIASES])}")
        if name in fields:
            raise UserError(f"{where}: {key!r} and another field both give {name}; keep one")
        fields[name] = value
    if "prompt" not in fields:
        raise UserError(f"{where}: `prompt` is missing (question and instruction are read too)")
    text = check_text(fields["prompt"], where)
    for name in ("prompt_id", "task", "group", "split", "context"):
        value = fields.get(name, "")
        if name == "prompt_id" and isinstance(value, int) and not isinstance(value, bool):
            value = fields[name] = str(value)
        if not isinstance(value, str):
            raise UserError(f"{where}: {name} must be text; got {value!r}")
    if fields.get("split", "") not in ("", *FRACTIONS):
        raise UserError(f"{where}: split must be train, dev, test or empty; got {fields['split']!r}")
    fields["prompt_id"] = fields.get("prompt_id") or text_hash(f"{text}\n{fields.get('context', '')}")
    return Prompt(**fields)
