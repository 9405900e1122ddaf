"""Outside recordings into the outcome cache: three readers, one finish, one writer.

    read_wide      JSON lines, one row a prompt, `outcomes` = {model: {score, ...}}
    read_routellm  the CSV folder RouteLLM publishes (routellm/evals), decontaminated by its own lists
    read_table     any CSV or JSON lines, by a mapping of columns

Each gives plain `Outcome`s; `finish` checks that every model answered every prompt, ties near-duplicates into groups
and assigns splits; `write_cache` leaves outcomes.jsonl.gz, pool.yaml and provenance.json. What nobody recorded is
estimated and marked: tokens = characters / 4 (`pool.estimate_tokens`), and an answer of which not even the length is
known counts one output token.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from routewright.errors import UserError
from routewright.grading import GRADERS, grade
from routewright.outcomes import MOST_TOKENS, SPLITS, fingerprint, read_outcomes, write_outcomes
from routewright.pool import Pool, estimate_tokens
from routewright.prompts import assign_splits, check_straddle, check_text, group_prompts
from routewright.schema import Outcome, TokenUsage
from routewright.textfiles import (
    DAMAGED_GZIP,
    damage,
    nearest,
    need_file,
    open_text,
    read_jsonl,
    write_atomic,
    write_json,
)

CACHE_FILE = "outcomes.jsonl.gz"
LENGTH_OF_UNKNOWN = 1  # output tokens where neither tokens, nor text, nor a length was recorded: one letter


@dataclass
class Notes:
    """What an import did beyond copying; ends up in provenance.json."""

    skip_bad: int = 0  # how many damaged rows may be passed over
    bad_rows: list[str] = field(default_factory=list)
    dropped: list[dict[str, Any]] = field(default_factory=list)
    ignored_fields: Counter = field(default_factory=Counter)
    sources: list[dict[str, Any]] = field(default_factory=list)
    unknown_length: set[tuple[str, str]] = field(default_factory=set)  # (prompt_id, model): not even a length recorded
    prompts_without_text: int = 0

    def bad(self, error: UserError) -> None:
        """Count a damaged row, or raise when there are more than allowed."""
        self.bad_rows.append(str(error))
        if len(self.bad_rows) > self.skip_bad:
            raise UserError(f"{error} (after {self.skip_bad} skipped)" if self.skip_bad else
                            f"{error}; --skip_bad N passes over up to N such rows")

    def drop(self, what: str, count: int, why: str) -> None:
        if count:
            self.dropped.append({"what": what, "count": count, "why": why})

    def add_source(self, path: Path, rows: int) -> None:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        self.sources.append({"path": str(path), "sha256": digest, "rows": rows})


# ---------------------------------------------------------------- rows of a file

def _json_rows(path: Path, notes: Notes) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, object) per row. With skip_bad, lines that are no JSON objects are counted and passed over."""
    return read_jsonl(path, notes.bad if notes.skip_bad else None)


def _csv_rows(path: Path, notes: Notes) -> Iterator[tuple[int, dict[str, Any]]]:
    """(first line, {column: text}) per record. The header must name every column once."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with open_text(path) as lines:
        reader = csv.reader(lines, strict=True, delimiter="\t" if ".tsv" in path.suffixes else ",")
        start = 1
        try:
            header = next(reader, None)
            if not header:
                raise UserError(f"{path}: the file is empty; a header line with column names is needed")
            twice = [name for name, n in Counter(header).items() if n > 1]
            if twice:
                raise UserError(f"{path}:1: column {twice[0]!r} stands twice; rename one")
            start = reader.line_num + 1
            for record in reader:
                line, start = start, reader.line_num + 1
                if not record:
                    continue
                if len(record) != len(header):
                    notes.bad(UserError(f"{path}:{line}: {len(record)} fields where the header has {len(header)}; "
                                        "a comma or a quote is missing"))
                    continue
                yield line, dict(zip(header, record, strict=True))
        except csv.Error as error:
            raise UserError(f"{path}:{start}: not CSV ({error}); the record that starts here is damaged") from None
        except (UnicodeDecodeError, *DAMAGED_GZIP) as error:
            raise damage(error, f"{path}:{start}") from None


def _is_csv(path: Path) -> bool:
    return path.name.removesuffix(".gz").lower().endswith((".csv", ".tsv"))


# ---------------------------------------------------------------- values of a row

def _quality(value: Any, where: str, quality_max: float = 1.0) -> float:
    """A quality in [0, 1] from a number, a bool, or their texts. Raises UserError."""
    if isinstance(value, str):
        value = {"true": 1.0, "false": 0.0}.get(value.strip().lower(), value)
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise UserError(f"{where}: quality must be a number, true or false; got {value!r}") from None
    if not 0 <= number <= quality_max:
        cure = "; --quality_max 100 reads percentages" if 1 < number <= 100 and quality_max == 1 else ""
        raise UserError(f"{where}: quality must be a number from 0 to {quality_max:g}; got {value!r}{cure}")
    return number / quality_max


def _count(value: Any, where: str, name: str) -> int | None:
    """A recorded number of tokens or characters; None where nothing is recorded."""
    number = _amount(value, where, name)
    if number is not None and (number != int(number) or number >= MOST_TOKENS):
        raise UserError(f"{where}: {name} must be a whole number; got {value!r}")
    return None if number is None else int(number)


def _amount(value: Any, where: str, name: str) -> float | None:
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not 0 <= number < math.inf:
        raise UserError(f"{where}: {name} must be a number, 0 or more; got {value!r}")
    return number


def _usage(notes: Notes, key: tuple[str, str], prompt_characters: int, answer_characters: int | None,
           given_input: int | None, given_output: int | None, reasoning: int = 0, cached: int = 0) -> TokenUsage:
    """Recorded tokens where there are any, estimates (marked) where not."""
    estimated = given_input is None or given_output is None
    if given_output is None:
        if answer_characters is None:
            notes.unknown_length.add(key)
        given_output = LENGTH_OF_UNKNOWN if answer_characters is None else estimate_tokens(answer_characters)
    if given_input is None:
        given_input = estimate_tokens(prompt_characters)
    return TokenUsage(given_input, given_output, reasoning, min(cached, given_input), estimated)


def _reference(value: Any) -> Any:
    """GSM8K-style '# 18' loses its mark; other references pass as they are."""
    return value.removeprefix("# ") if isinstance(value, str) else value


# ---------------------------------------------------------------- wide rows

_WIDE = ("id", "source", "task", "subject", "split", "prompt", "question", "options", "reference", "outcomes", "group",
         "para", "context", "context_chars")
_WIDE_OUTCOME = ("score", "cost_usd", "tok_in", "tok_out", "latency_ms", "answer", "pred", "response", "out_chars")


def read_wide(path: str | Path, notes: Notes, quality: str = "score", without_text: str = "error") -> list[Outcome]:
    """One row a prompt: {id, prompt | question [+ options], reference, task, outcomes: {model: {score, ...}}}.

    `quality` names the number of an outcome that becomes its quality (score, or f1 where one is recorded). The prompt
    is the core question where the row has one, else the exact text sent; input tokens are counted on the exact text.
    A row without either is an error, or with without_text="use_id" stands under its id (controls that read no
    text still work on it). `para` or `group` ties rows into one group.
    """
    path = need_file(path)
    found: list[Outcome] = []
    ids: dict[str, int] = {}
    rows, first_without = 0, ""
    for line, row in _json_rows(path, notes):
        rows += 1
        where = f"{path}:{line}"
        try:
            outcomes = _wide_row(row, where, notes, quality)
            if notes.prompts_without_text == 1 and not first_without:
                first_without = where
            if outcomes[0].prompt_id in ids:
                raise UserError(f"{where}: id {row['id']!r} stands on line {ids[outcomes[0].prompt_id]} too; "
                                "ids must be unique")
        except UserError as error:
            notes.bad(error)
            continue
        ids[outcomes[0].prompt_id] = line
        found.extend(outcomes)
    if notes.prompts_without_text and without_text == "error":
        raise UserError(f"{first_without}: neither prompt nor question ({notes.prompts_without_text} of {rows} rows); "
                        "--without_text use_id imports them under their ids "
                        "(no router that reads text will work on them)")
    notes.add_source(path, rows)
    return found


def _wide_row(row: dict[str, Any], where: str, notes: Notes, quality: str) -> list[Outcome]:
    if isinstance(row.get("id"), int) and not isinstance(row["id"], bool):
        row["id"] = str(row["id"])
    if not isinstance(row.get("id"), str) or not row["id"].strip():
        raise UserError(f"{where}: `id` must be a non-empty text; got {row.get('id')!r}{nearest('id', row)}")
    for key in ("task", "subject", "group", "para", "context"):
        if row.get(key) is not None and not isinstance(row[key], (str, int)):
            raise UserError(f"{where}: {key} must be text; got {str(row[key])[:60]!r}")
    answers = row.get("outcomes")
    if not isinstance(answers, dict) or not answers:
        raise UserError(f"{where}: `outcomes` must map each model to its outcome; got {str(answers)[:60]!r}"
                        f"{'' if 'outcomes' in row else nearest('outcomes', row)}")
    notes.ignored_fields.update(key for key in row if key not in _WIDE)
    prompt, characters = _wide_text(row, where, notes)
    task = "/".join(str(row[key]) for key in ("task", "subject") if row.get(key))
    shared = {
        "prompt_id": row["id"], "prompt": prompt, "task": task, "split": _split(row.get("split"), where),
        "group": str(row.get("group") or row.get("para") or ""), "context": str(row.get("context") or ""),
        "reference": _reference(row.get("reference"))}
    characters += _count(row.get("context_chars"), where, "context_chars") or len(shared["context"])
    outcomes = []
    for name, answer in answers.items():
        if not isinstance(answer, dict):
            raise UserError(f"{where}: outcomes[{name!r}] must be an object with a score; got {answer!r}")
        notes.ignored_fields.update(f"outcomes.{key}" for key in answer if key not in (*_WIDE_OUTCOME, quality))
        outcomes.append(_wide_outcome(shared, name, answer, f"{where}: outcomes[{name!r}]", notes, quality, characters))
    return outcomes


def _wide_text(row: Mapping[str, Any], where: str, notes: Notes) -> tuple[str, int]:
    """(what the router sees, characters of what was sent)."""
    sent, question = row.get("prompt"), row.get("question")
    if sent is None and question is None:
        notes.prompts_without_text += 1
        return row["id"], 0
    options = row.get("options")
    text = check_text(sent if question is None else question, where, "prompt" if question is None else "question")
    if question is not None and options:
        if not isinstance(options, list) or len(options) > 26:
            raise UserError(f"{where}: `options` must be a list of up to 26 texts; got {str(options)[:60]!r}")
        text = "\n".join([text, *(f"{chr(65 + i)}. {option}" for i, option in enumerate(options))])
    return text, len(sent) if isinstance(sent, str) else len(text)


def _wide_outcome(shared: dict[str, Any], name: str, answer: dict[str, Any], where: str, notes: Notes, quality: str,
                  characters: int) -> Outcome:
    if quality not in answer:
        raise UserError(f"{where}: no field {quality!r}{nearest(quality, answer)}; it has: {', '.join(answer)}")
    worth = _quality(answer[quality], where)
    response = next((answer[k] for k in ("response", "answer", "pred") if isinstance(answer.get(k), str)), "")
    length = _count(answer.get("out_chars"), where, "out_chars")
    if length is None and response:
        length = len(response)
    latency = _amount(answer.get("latency_ms"), where, "latency_ms")
    return Outcome(
        **shared, model_name=name, response=response, quality=worth, grader="recorded",
        is_correct=_quality(answer.get("score", worth), where) >= 1,
        token_usage=_usage(notes, (shared["prompt_id"], name), characters, length,
                           _count(answer.get("tok_in"), where, "tok_in"),
                           _count(answer.get("tok_out"), where, "tok_out")),
        cost_usd=_amount(answer.get("cost_usd"), where, "cost_usd"),
        latency_s=None if latency is None else latency / 1000)


def _split(value: Any, where: str) -> str:
    if value is None or isinstance(value, str):
        value = {"validation": "dev", "val": "dev", None: ""}.get(value, value)
    if not isinstance(value, str) or value not in ("", *SPLITS):
        raise UserError(f"{where}: split must be train, dev, test or empty; got {value!r}")
    return value


# ---------------------------------------------------------------- RouteLLM

def read_routellm(folder: str | Path, notes: Notes, keep_contaminated: bool = False) -> list[Outcome]:
    """The published folder: gsm8k/gsm8k_responses.csv and mmlu/responses/mmlu_SUBJECT.csv, or one of the two.

    Prompts that stand in a contaminated_prompts.jsonl beside them are dropped, as the origin does, unless
    `keep_contaminated`. GSM8K carries the responses; of MMLU only right or wrong is published, so an answer counts one
    output token. Ids are the source's row numbers, so they are the same with and without contaminated prompts.
    """
    folder = Path(folder)
    files = sorted(folder.rglob("*.csv")) if folder.is_dir() else []
    if not files:
        raise UserError(f"{folder}: no CSV files below it; expected gsm8k/gsm8k_responses.csv or "
                        "mmlu/responses/mmlu_*.csv as in routellm/evals (other layouts: --format table)")
    found: list[Outcome] = []
    for file in files:
        subject = file.stem.removeprefix("mmlu_") if file.stem.startswith("mmlu_") else ""
        task = "mmlu" if subject else file.stem.removesuffix("_responses")
        leaked = set() if keep_contaminated else _contaminated_beside(file, folder)
        rows = dropped = 0
        for line, row in _csv_rows(file, notes):
            rows += 1
            try:
                outcomes = _routellm_row(row, f"{file}:{line}", notes, task, subject, rows - 1)
            except UserError as error:
                notes.bad(error)
                continue
            if row["prompt"] in leaked:
                dropped += 1
                continue
            found.extend(outcomes)
        notes.add_source(file, rows)
        notes.drop(f"prompts of {file.name}", dropped, "listed in contaminated_prompts.jsonl")
    return found


def _contaminated_beside(file: Path, folder: Path) -> set[str]:
    """The texts of the nearest contaminated_prompts.jsonl, looked for up to one folder above `folder`."""
    for parent in file.parents:
        if (parent / "contaminated_prompts.jsonl").is_file():
            return read_contaminated(parent / "contaminated_prompts.jsonl")
        if parent == folder.parent:
            break
    return set()


def read_contaminated(path: str | Path) -> set[str]:
    """Texts of prompts to leave out: JSON lines with `eval_prompt` (as RouteLLM publishes them) or `prompt`."""
    texts = set()
    for line, row in read_jsonl(path):
        text = row.get("eval_prompt", row.get("prompt"))
        if not isinstance(text, str):
            raise UserError(f"{path}:{line}: `eval_prompt` or `prompt` must be the text of a prompt; got {text!r}")
        texts.add(text)
    return texts


def drop_contaminated(outcomes: Sequence[Outcome], path: str | Path, notes: Notes) -> list[Outcome]:
    """The outcomes of prompts that the list does not name. Raises UserError when it names none of them."""
    texts = read_contaminated(path)
    gone = {o.prompt_id for o in outcomes if o.prompt in texts}
    if not gone:
        raise UserError(f"{path}: none of its {len(texts)} prompts is among those imported; "
                        "is it the list of another data set?")
    notes.drop("prompts", len(gone), f"listed in {path}")
    return [o for o in outcomes if o.prompt_id not in gone]


def _routellm_row(row: dict[str, str], where: str, notes: Notes, task: str, subject: str, number: int) -> list[Outcome]:
    if "prompt" not in row:
        raise UserError(f"{where}: no column 'prompt'{nearest('prompt', row)}; the header has: {', '.join(row)}")
    models = [name for name in row if name != "prompt" and not (name.endswith("_response") and name[:-9] in row)]
    if not models:
        raise UserError(f"{where}: no column with a model's name; the header has: {', '.join(row)}")
    prompt = check_text(row["prompt"], where)
    prompt_id = ".".join(filter(None, ("routellm", task, subject, str(number))))
    outcomes = []
    for name in models:
        response = row.get(f"{name}_response")
        worth = _quality(row[name], f"{where}: column {name!r}")
        outcomes.append(Outcome(
            prompt_id=prompt_id, prompt=prompt, model_name=name,
            response=response or "", is_correct=worth >= 1, quality=worth, grader="recorded",
            task="/".join(filter(None, (task, subject))),
            token_usage=_usage(notes, (prompt_id, name), len(prompt), len(response) if response else None, None, None)))
    return outcomes


# ---------------------------------------------------------------- any table

COLUMNS = ("prompt", "model", "quality", "response", "prompt_id", "task", "group", "split", "context", "reference",
           "sample", "input_tokens", "output_tokens", "reasoning_tokens", "cached_tokens", "output_characters",
           "cost_usd", "latency_s")
_PER_PROMPT = ("prompt", "prompt_id", "task", "group", "split", "context", "reference", "sample")


def read_table(path: str | Path, notes: Notes, columns: Mapping[str, str], models: Sequence[str] | None = None,
               quality_max: float = 1.0, grader: str = "", task: str = "") -> list[Outcome]:
    """CSV or JSON lines whose columns are named by `columns`: ours -> theirs, ours being one of COLUMNS.

    Long form, one row a call: {prompt: question, model: llm, quality: score}. Wide form, one row a prompt: `{model}` in
    a column's name stands for each of `models`: {prompt: question, quality: "{model}", response: "{model}_response"}.
    Without a quality column, `grader` grades response against reference. An empty quality cell is an answer that was
    not recorded (see --missing). Raises UserError for a column the file lacks.
    """
    path = need_file(path)
    columns = dict(columns)
    wide = _check_columns(columns, models, grader)
    expected = [name.replace("{model}", model) for name in columns.values()
                for model in ((models or ()) if "{model}" in name else ("",))]
    found: list[Outcome] = []
    rows = 0
    for line, row in (_csv_rows if _is_csv(path) else _json_rows)(path, notes):
        rows += 1
        if rows == 1 or not _is_csv(path):
            absent = [name for name in expected if name not in row]
            # JSON lines may leave out what is empty; only the first row and the prompt must be whole.
            if absent and (rows == 1 or columns["prompt"] in absent):
                where = f"{path}:{1 if _is_csv(path) else line}"
                raise UserError(f"{where}: no column {absent[0]!r}{nearest(absent[0], row)}; "
                                f"it has: {', '.join(row)}")
        where = f"{path}:{line}"
        try:
            for model in (models if wide else [None]):
                outcome = _table_outcome(row, columns, model, where, notes, quality_max, grader, task)
                if outcome is not None:
                    found.append(outcome)
        except UserError as error:
            notes.bad(error)
    notes.add_source(path, rows)
    if not found:
        raise UserError(f"{path}: no row has a quality; nothing to import")
    return found


def _check_columns(columns: Mapping[str, str], models: Sequence[str] | None, grader: str) -> bool:
    """True for the wide form. Raises UserError for a mapping that cannot work."""
    for ours, theirs in columns.items():
        if ours not in COLUMNS:
            raise UserError(f"--columns.{ours}: unknown{nearest(ours, COLUMNS)}; known: {', '.join(COLUMNS)}")
        if not isinstance(theirs, str) or not theirs:
            raise UserError(f"--columns.{ours} must name a column; got {theirs!r}")
        if ours in _PER_PROMPT and "{model}" in theirs:
            raise UserError(f"--columns.{ours} belongs to the prompt, so {{model}} means nothing in {theirs!r}")
    if "prompt" not in columns:
        raise UserError("--columns.prompt is needed: which column holds the prompt?")
    if grader and grader not in GRADERS:
        raise UserError(f"--grader {grader!r} is unknown{nearest(grader, GRADERS)}; known: {', '.join(GRADERS)}")
    if "quality" not in columns and not (grader and "response" in columns and "reference" in columns):
        raise UserError("--columns.quality is needed: which column holds the score? "
                        "(or --grader with --columns.response and --columns.reference)")
    wide = any("{model}" in theirs for theirs in columns.values())
    if wide == ("model" in columns):
        raise UserError("name the models one way: --columns.model COLUMN for one row a call, "
                        "or {model} in the other columns for one row a prompt")
    if wide and not models:
        raise UserError("--models [a, b] is needed when columns contain {model}")
    return wide


def _table_outcome(row: Mapping[str, Any], columns: Mapping[str, str], model: str | None, where: str, notes: Notes,
                   quality_max: float, grader: str, task: str) -> Outcome | None:
    def cell(ours: str) -> Any:
        theirs = columns.get(ours)
        return None if theirs is None else row.get(theirs if model is None else theirs.replace("{model}", model))

    def text(ours: str) -> str:
        value = cell(ours)
        return "" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

    name = text("model") if model is None else model
    if not name.strip():
        raise UserError(f"{where}: column {columns['model']!r} is empty; every call needs its model")
    prompt = check_text(cell("prompt"), where, f"column {columns['prompt']!r}")
    context, response, reference = text("context"), text("response"), cell("reference")
    if "quality" in columns:
        value = cell("quality")
        if value is None or (isinstance(value, str) and not value.strip()):
            return None
        worth = _quality(value, f"{where}: column {columns['quality']!r}", quality_max)
        correct = worth >= 1
    else:
        graded = grade(grader, response, reference)
        worth, correct = graded.quality, graded.correct
    given = {key: _count(cell(key), where, key)
             for key in ("input_tokens", "output_tokens", "reasoning_tokens", "cached_tokens", "output_characters")}
    length = given["output_characters"]
    if length is None and response:
        length = len(response)
    prompt_id = text("prompt_id") or _id_of(prompt, context)
    return Outcome(
        prompt_id=prompt_id, prompt=prompt, model_name=name, response=response,
        is_correct=correct, quality=worth, task=text("task") or task, group=text("group"), context=context,
        split=_split(text("split"), where), reference=reference, sample=_count(cell("sample"), where, "sample") or 0,
        grader=grader if "quality" not in columns else "recorded",
        token_usage=_usage(notes, (prompt_id, name), len(prompt) + len(context), length, given["input_tokens"],
                           given["output_tokens"], given["reasoning_tokens"] or 0, given["cached_tokens"] or 0),
        cost_usd=_amount(cell("cost_usd"), where, "cost_usd"), latency_s=_amount(cell("latency_s"), where, "latency_s"))


def _id_of(prompt: str, context: str) -> str:
    return hashlib.sha256(f"{prompt}\0{context}".encode()).hexdigest()[:12]


# ---------------------------------------------------------------- finish

def finish(outcomes: Sequence[Outcome], pool: Pool, notes: Notes, models: Sequence[str] | None = None,
           missing: str = "error", splits: str = "hash", fractions: Mapping[str, float] | None = None, salt: str = "",
           threshold: float = 0.8) -> list[Outcome]:
    """Complete, grouped, split and ordered outcomes: prompts in source order, models in pool order.

    `models` keeps some of the recorded models. `missing` says what to do where a model lacks a prompt: "error",
    "drop_prompt" or "drop_model". `splits` "hash" assigns them by group, "keep" takes the recorded ones and stops if
    near-duplicates straddle two of them. Raises UserError.
    """
    recorded = list(dict.fromkeys(o.model_name for o in outcomes))
    for name in models or ():
        if name not in recorded:
            raise UserError(f"--models: {name!r} was never recorded{nearest(name, recorded)}; "
                            f"recorded: {', '.join(recorded)}")
    kept = [name for name in recorded if not models or name in models]
    notes.drop("models", len(recorded) - len(kept), "not named by --models")
    for name in kept:
        pool[name]  # raises with the cure where it has no price
    outcomes = _complete([o for o in outcomes if o.model_name in set(kept)], kept, missing, notes)
    order = {name: i for i, name in enumerate(pool.names)}
    first: dict[str, Outcome] = {}
    place: dict[str, int] = {}
    for outcome in outcomes:
        place.setdefault(outcome.prompt_id, len(place))
        other = first.setdefault(outcome.prompt_id, outcome)
        if (other.prompt, other.context) != (outcome.prompt, outcome.context):
            raise UserError(f"prompt_id {outcome.prompt_id!r} stands for two different prompts ({other.prompt[:40]!r} "
                            f"and {outcome.prompt[:40]!r}); ids must be unique")
    asked = [replace(o.as_prompt, group=o.group) for o in first.values()]
    named = dict(zip(first, group_prompts(asked, threshold), strict=True))
    if splits == "hash":
        chosen = dict(zip(first, assign_splits(list(named.values()), fractions, salt), strict=True))
    else:
        chosen = {key: o.split for key, o in first.items()}
        check_straddle(named, chosen, "the recorded splits leak", "--splits hash assigns clean ones")
    done = [replace(o, group=named[o.prompt_id], split=chosen[o.prompt_id]) for o in outcomes]
    return sorted(done, key=lambda o: (place[o.prompt_id], order[o.model_name], o.sample))


def _complete(outcomes: list[Outcome], models: Sequence[str], missing: str, notes: Notes) -> list[Outcome]:
    """Only prompts that every model answered, or an error that counts what is missing."""
    answered: dict[str, set[str]] = defaultdict(set)
    for outcome in outcomes:
        if outcome.sample == 0 and outcome.model_name in answered[outcome.prompt_id]:
            raise UserError(f"model {outcome.model_name!r} answers prompt {outcome.prompt_id!r} twice (sample 0); "
                            "number repeats with --columns.sample, or remove one")
        if outcome.sample == 0:
            answered[outcome.prompt_id].add(outcome.model_name)
    lacking = {name: sum(name not in have for have in answered.values()) for name in models}
    lacking = {name: n for name, n in lacking.items() if n}
    if not lacking:
        return outcomes
    whole = {key for key, have in answered.items() if len(have) == len(models)}
    if missing == "error":
        worst = sorted(lacking.items(), key=lambda item: -item[1])
        raise UserError(f"{len(lacking)} of {len(models)} models lack answers to some of the {len(answered)} prompts ("
                        f"{', '.join(f'{name}: {n}' for name, n in worst[:5])}{', ...' if len(worst) > 5 else ''}); "
                        f"--missing drop_prompt keeps the {len(whole)} prompts all models answered, "
                        f"--missing drop_model keeps the {len(models) - len(lacking)} models that answered all prompts")
    if missing == "drop_prompt":
        notes.drop("prompts", len(answered) - len(whole), "not answered by every model")
        left = [o for o in outcomes if o.prompt_id in whole]
    else:
        notes.drop(f"models {', '.join(lacking)}", len(lacking), "did not answer every prompt")
        left = [o for o in outcomes if o.model_name not in lacking]
    if not left:
        what = "no prompt" if missing == "drop_prompt" else "no model"
        raise UserError(f"--missing {missing} leaves nothing: {what} is complete")
    return left


# ---------------------------------------------------------------- write

def provenance(outcomes: Sequence[Outcome], notes: Notes, **about: Any) -> dict[str, Any]:
    """What stands in provenance.json: where the cache came from and what was done to it. No time stamps."""
    splits = Counter(o.split for o in {o.prompt_id: o for o in outcomes}.values())
    return {
        **about, "sources": notes.sources, "outcomes": len(outcomes), "prompts": sum(splits.values()),
        "models": list(dict.fromkeys(o.model_name for o in outcomes)), "splits": dict(splits),
        "groups": len({o.group for o in outcomes}), "fingerprint": fingerprint(outcomes), "dropped": notes.dropped,
        "bad_rows_skipped": len(notes.bad_rows), "bad_rows": notes.bad_rows[:20],
        "fields_ignored": dict(sorted(notes.ignored_fields.items())),
        "tokens_estimated": any(o.token_usage.estimated for o in outcomes),
        "outcomes_with_estimated_tokens": sum(o.token_usage.estimated for o in outcomes),
        "outcomes_of_unknown_length": sum((o.prompt_id, o.model_name) in notes.unknown_length for o in outcomes),
        "prompts_without_text": notes.prompts_without_text,
    }


def write_cache(folder: str | Path, outcomes: Sequence[Outcome], pool_file: str | Path, about: Mapping[str, Any],
                overwrite: bool = False) -> bool:
    """Write the cache folder; False when it already holds exactly this. Raises UserError where another cache stands."""
    folder = Path(folder)
    file, prices = folder / CACHE_FILE, folder / "pool.yaml"
    pool_bytes = Path(pool_file).read_bytes()
    if file.exists() and not overwrite:
        try:
            same = fingerprint(read_outcomes(file)) == about["fingerprint"] and prices.read_bytes() == pool_bytes
        except (UserError, OSError):
            same = False
        if same:
            write_json(folder / "provenance.json", dict(about))
            return False
        raise UserError(f"{file}: another cache stands here; name another --output_dir, or replace it with --overwrite")
    write_atomic(prices, pool_bytes)
    write_json(folder / "provenance.json", dict(about))
    write_outcomes(file, outcomes)
    return True


def summary(outcomes: Iterable[Outcome], about: Mapping[str, Any]) -> str:
    """What a person wants to see after an import: sizes, splits, accuracy per model, and what was assumed."""
    worth: dict[str, list[float]] = defaultdict(list)
    best: dict[str, float] = defaultdict(float)
    for o in outcomes:
        if o.sample == 0:
            worth[o.model_name].append(o.quality)
            best[o.prompt_id] = max(best[o.prompt_id], o.quality)
    width = max(len(name) for name in worth)
    ordered = sorted(about["splits"].items(), key=lambda item: -item[1])
    lines = [f"{about['prompts']:,} prompts in {about['groups']:,} groups, {len(worth)} models, "
             f"{about['outcomes']:,} outcomes; " + ", ".join(f"{name or 'no split'} {n:,}" for name, n in ordered)]
    lines += [f"  dropped {entry['count']:,} {entry['what']}: {entry['why']}" for entry in about["dropped"]]
    if about["bad_rows_skipped"]:
        lines.append(f"  skipped {about['bad_rows_skipped']} damaged rows, the first: {about['bad_rows'][0]}")
    lines += [f"  {name:<{width}}  mean quality {sum(values) / len(values):.4f}" for name, values in worth.items()]
    lines.append(f"  {'best of all models':<{width}}  mean quality {sum(best.values()) / len(best):.4f}")
    if about["tokens_estimated"]:
        unknown = about["outcomes_of_unknown_length"]
        lines.append(f"  tokens were not recorded for {about['outcomes_with_estimated_tokens']:,} outcomes: "
                     "estimated from characters")
        if unknown:
            lines[-1] += f"; {unknown:,} of them count {LENGTH_OF_UNKNOWN} output token, for want even of a length"
    return "\n".join(lines)
