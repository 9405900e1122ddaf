"""Bring recorded answers from outside into the outcome cache.

Reads JSON lines with one row a prompt and `outcomes` per model (--format wide), the CSV folder that RouteLLM publishes
(--format routellm), or any CSV or JSON-lines table by a mapping of its columns (--format table). Near-duplicate prompts
share a group and a group lies in one split. Prices come from the pool file; tokens that nobody recorded are estimated
from characters and marked, so that every report can say so.

    python src/import_outcomes.py --format routellm --source ../shared/data/routellm/original/gsm8k \\
        --pool configs/pools/routellm.yaml --output_dir data/outcomes/gsm8k
    python src/import_outcomes.py --source recorded.jsonl.gz --pool my_pool.yaml --output_dir data/outcomes/mine
    python src/import_outcomes.py --format table --source calls.csv --pool my_pool.yaml \\
        --output_dir data/outcomes/calls --columns.prompt question --columns.model llm --columns.quality score
    python src/import_outcomes.py --format table --source wide.csv --pool my_pool.yaml \\
        --output_dir data/outcomes/wide --models "[gpt-4, mixtral]" --columns.prompt prompt \\
        --columns.quality "{model}" --columns.response "{model}_response"

Writes outcomes.jsonl.gz, pool.yaml (a copy) and provenance.json into --output_dir. Needs no network and no GPU;
14,042 prompts x 2 models take about 8 seconds of one core and under 1 GB.
"""

from typing import Literal

from routewright.errors import UserError
from routewright.importing import (
    Notes,
    drop_contaminated,
    finish,
    provenance,
    read_routellm,
    read_table,
    read_wide,
    summary,
    write_cache,
)
from routewright.launch import launch
from routewright.pool import Pool


def main(
    *,
    # Files
    source: str,  # the file to import; for --format routellm the folder
    pool: str,  # pool file with a price for every recorded model
    output_dir: str,  # cache folder to write, such as data/outcomes/NAME
    format: Literal["wide", "routellm", "table"] = "wide",  # how the source is laid out
    overwrite: bool = False,  # replace a different cache in output_dir
    # Reading
    models: list[str] | None = None,  # keep these models only; with {model} columns: the models to look for
    columns: dict | None = None,  # table: our name -> the file's column, as in --columns.prompt question
    quality: str = "score",  # wide: which number of an outcome is its quality (score, f1)
    quality_max: float = 1.0,  # table: the score that means perfect, 100 for percentages
    grader: str = "",  # table: grade responses with this rule where no quality is recorded (number, choice, ...)
    task: str = "",  # table: task name where no column gives one
    # Cleaning
    keep_contaminated: bool = False,  # routellm: keep the prompts that the contaminated_prompts.jsonl beside it names
    contaminated: str = "",  # JSON lines of prompts to drop (eval_prompt or prompt), for the other formats
    without_text: Literal["error", "use_id"] = "error",  # wide: what to do with rows that publish no prompt text
    missing: Literal["error", "drop_prompt", "drop_model"] = "error",  # what to do where a model lacks an answer
    skip_bad: int = 0,  # damaged rows that may be passed over; they are counted and named in provenance.json
    # Splits
    splits: Literal["hash", "keep"] = "hash",  # assign by group hash, or keep the recorded ones
    fractions: dict | None = None,  # share per split; default train .6, dev .2, test .2
    salt: str = "",  # another text gives another random split
    threshold: float = 0.8,  # Jaccard similarity of word triples from which prompts are near-duplicates
):
    if columns and format != "table":
        raise UserError(f"--columns belongs to --format table, not to {format}")
    if skip_bad < 0:
        raise UserError(f"--skip_bad {skip_bad}: give a number of rows, 0 or more")
    prices = Pool.load(pool)
    notes = Notes(skip_bad=skip_bad)

    if format == "wide":
        outcomes = read_wide(source, notes, quality, without_text)
    elif format == "routellm":
        outcomes = read_routellm(source, notes, keep_contaminated)
    else:
        outcomes = read_table(source, notes, columns or {}, models, quality_max, grader, task)

    if contaminated:
        outcomes = drop_contaminated(outcomes, contaminated, notes)
    outcomes = finish(outcomes, prices, notes, models, missing, splits, fractions, salt, threshold)
    about = provenance(outcomes, notes, format=format, pool=pool, quality=quality if format == "wide" else "",
                       splits_by=splits, fractions=fractions or {}, salt=salt, near_duplicate_threshold=threshold)
    written = write_cache(output_dir, outcomes, pool, about, overwrite)
    print(summary(outcomes, about))
    print(f"{output_dir}: {'written' if written else 'already holds exactly this'} (fingerprint "
          f"{about['fingerprint']})")


if __name__ == "__main__":
    launch(main)
