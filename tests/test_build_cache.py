"""build_cache: every prompt, model and sample once; a kill loses at most a batch; two builders never share a folder."""

from __future__ import annotations

import importlib.util
import json
import os
import sys

import pytest

from routewright import launch
from routewright.backends.base import Backend, outcome_of
from routewright.outcomes import OutcomeTable, read_outcomes
from routewright.schema import TokenUsage


class Echo(Backend):
    """Answers the number of words, counts its calls, and fails or stops where told to."""

    def __init__(self):
        self.calls, self.stop_after, self.fail, self.version = [], None, (), "v1"

    def identity(self, model_name):
        return f"{model_name}-{self.version}"

    def call_many(self, model_name, prompts, sampling, sample=0):
        if self.stop_after is not None and len(self.calls) + len(prompts) > self.stop_after:
            raise KeyboardInterrupt
        self.calls += [(model_name, p.prompt_id, sample, sampling.temperature) for p in prompts]
        return [self.answer(model_name, p, sample) for p in prompts]

    def answer(self, model_name, prompt, sample):
        words, failed = len(prompt.prompt.split()), prompt.prompt_id in self.fail
        return outcome_of(prompt, model_name, sample, response="" if failed else f"Answer: {words}", latency_s=0.01,
                          error="no luck" if failed else "", token_usage=TokenUsage(words, 3), finish_reason="stop")


@pytest.fixture
def script(root, monkeypatch):
    spec = importlib.util.spec_from_file_location("build_cache_script", root / "src" / "build_cache.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.echo = Echo()
    monkeypatch.setattr(module, "backend_for", lambda pool, models, size: [pool[m] for m in models] and module.echo)
    return module


@pytest.fixture
def files(tmp_path):
    texts = ["one", "one two", "one two three", "a b c d", "now five words stand here"]
    rows = [{"prompt_id": f"p{i}", "prompt": text, "reference": len(text.split()) + (i == 4), "task": "words"}
            for i, text in enumerate(texts)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "pool.yaml").write_text("name: p\nmodels:\n  - {name: a, price_input: 1, price_output: 2, path: w}\n"
                                        "  - {name: b, price_input: 15, price_output: 30, path: w}\n")
    (tmp_path / "w").mkdir()
    return tmp_path


def rewrite(files, change):
    path = files / "prompts.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(change(i, row)) + "\n" for i, row in enumerate(rows)))


def run(script, files, *more):
    return launch.run(script.main, ["--prompts", str(files / "prompts.jsonl"), "--pool", str(files / "pool.yaml"),
                                    "--output_dir", str(files / "out"), "--batch_size", "2", *more])


def test_every_prompt_model_and_sample_once(script, files, capsys):
    assert run(script, files) == 0
    assert len(script.echo.calls) == len(set(script.echo.calls)) == 5 * 2 * 3
    assert {(sample, temperature) for _, _, sample, temperature in script.echo.calls} == {(0, 0.0), (1, 0.7), (2, 0.7)}
    outcomes = read_outcomes(files / "out")
    assert [(o.model_name, o.sample, o.prompt_id) for o in outcomes] == \
        [(m, s, f"p{i}") for m in "ab" for s in range(3) for i in range(5)]
    assert all(o.is_correct == (o.prompt_id != "p4") and o.grader == "number" and o.split and o.group for o in outcomes)
    table = OutcomeTable.load(files / "out")  # the pool file lies beside the cache
    assert table.models == ("a", "b") and table.quality.mean() == 0.8
    assert table.pool["a"].path == os.path.join("..", "w")
    made = json.loads((files / "out/cache.json").read_text())
    assert made["fingerprint"] == table.fingerprint and made["models"] == {"a": "a-v1", "b": "b-v1"}
    assert "b sample 2: 5/5 called" in capsys.readouterr().out


def test_a_second_run_calls_nothing_and_writes_the_same_bytes(script, files):
    assert run(script, files) == 0
    first, calls = (files / "out/outcomes.jsonl.gz").read_bytes(), len(script.echo.calls)
    assert run(script, files) == 0
    assert len(script.echo.calls) == calls and (files / "out/outcomes.jsonl.gz").read_bytes() == first


def test_a_stopped_build_goes_on(script, files, tmp_path):
    script.echo.stop_after = 13
    assert run(script, files) == 130
    assert not (files / "out/outcomes.jsonl.gz").exists()
    done = len(script.echo.calls)
    assert done and len((files / "out/journal.jsonl").read_bytes().splitlines()) == done
    script.echo.stop_after = None
    assert run(script, files) == 0
    assert len(script.echo.calls) == len(set(script.echo.calls)) == 30


@pytest.mark.parametrize("cut", [1, 30])
def test_a_torn_last_line_is_cut_and_called_again(script, files, cut):
    run(script, files)
    whole = (files / "out/outcomes.jsonl.gz").read_bytes()
    journal = files / "out/journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-cut])
    script.echo.calls.clear()
    assert run(script, files, "--dry_run", "true") == 0 and not script.echo.calls
    assert run(script, files) == 0
    assert len(script.echo.calls) == 1 and (files / "out/outcomes.jsonl.gz").read_bytes() == whole
    assert all(json.loads(line) for line in journal.read_bytes().splitlines())


def test_a_damaged_line_in_the_middle_stops(script, files, capsys):
    run(script, files)
    journal = files / "out/journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([*lines[:3], b"{]\n", *lines[4:]]))
    assert run(script, files) == 2
    assert "journal.jsonl:4: not a journal line" in capsys.readouterr().err


def test_failed_calls_are_outcomes_and_are_tried_again(script, files):
    script.echo.fail = ("p1",)
    assert run(script, files, "--samples", "1") == 0
    failed = [o for o in read_outcomes(files / "out") if o.error]
    assert len(failed) == 2 and all(o.quality == 0 and o.is_correct is False for o in failed)
    script.echo.fail, script.echo.calls = (), []
    assert run(script, files, "--samples", "1") == 0
    assert [call[1] for call in script.echo.calls] == ["p1", "p1"]
    assert not any(o.error for o in read_outcomes(files / "out"))


@pytest.mark.parametrize("change", [["--seed", "1"], ["--temperature", "0.9"], ["--top_p", "0.5"]])
def test_other_sampling_calls_the_drawn_samples_anew(script, files, change):
    run(script, files)
    script.echo.calls.clear()
    assert run(script, files, *change) == 0
    assert {sample for _, _, sample, _ in script.echo.calls} == {1, 2} and len(script.echo.calls) == 20


def test_new_weights_answer_anew_and_new_references_do_not(script, files):
    run(script, files, "--samples", "1")
    rewrite(files, lambda i, row: {**row, "reference": "7", "prompt_id": f"q{i}"})
    script.echo.calls.clear()
    assert run(script, files, "--samples", "1") == 0 and not script.echo.calls
    assert {(o.prompt_id[0], o.is_correct) for o in read_outcomes(files / "out")} == {("q", False)}
    script.echo.version = "v2"
    assert run(script, files, "--samples", "1") == 0 and len(script.echo.calls) == 10


def test_dry_run_calls_and_writes_nothing(script, files, capsys):
    assert run(script, files, "--dry_run", "true", "--samples", "2") == 0
    said = capsys.readouterr().out
    assert "a: 10 calls, 0 recorded, 10 to make" in said and "b: 10 calls" in said and "USD" in said
    assert not script.echo.calls and not (files / "out").exists()


def test_models_and_limit_choose(script, files):
    assert run(script, files, "--models", "b", "--limit", "2", "--samples", "1") == 0
    assert [(c[0], c[1]) for c in script.echo.calls] == [("b", "p0"), ("b", "p1")]


def test_regrade_calls_nothing(script, files, capsys):
    run(script, files, "--samples", "1")
    script.echo.calls.clear()
    assert run(script, files, "--regrade", "true", "--grader", "exact") == 0
    assert {(o.grader, o.is_correct) for o in read_outcomes(files / "out")} == {("exact", False)}
    assert not script.echo.calls
    assert "8 grades changed" in capsys.readouterr().out
    made = json.loads((files / "out/cache.json").read_text())
    assert made["grader"] == "exact" and made["fingerprint"] == OutcomeTable.load(files / "out").fingerprint


@pytest.mark.parametrize("more", [[], ["--regrade", "true"]])
def test_a_second_builder_stops_and_names_the_first(script, files, capsys, more):
    run(script, files, "--samples", "1")
    with script.locked(files / "out"):
        assert (files / "out/.build.lock").read_text() == str(os.getpid())
        assert run(script, files, *more) == 2
    assert f"process {os.getpid()} is building this cache" in capsys.readouterr().err
    assert run(script, files, *more) == 0  # the lock goes with its holder


@pytest.mark.parametrize("line,message", [
    ('{"prompt": "x", "reference": "1"', "prompts.jsonl:6: not JSON"),
    ('{"prompt": "", "reference": "1"}', "prompts.jsonl:6: prompt must be a non-empty text"),
    ('{"prompt": "x", "referense": "1"}', "prompts.jsonl:6: unknown field 'referense'"),
    ('{"prompt": "x", "prompt_id": "z"}', "prompt 'z': grader 'number' needs a reference"),
    ('{"prompt": "x", "prompt_id": "p0", "reference": "1"}', "prompts.jsonl:6: prompt_id 'p0' stands on line 1"),
    ('{"prompt": "x", "reference": "1", "split": "dev"}', "prompt 'p0' has no split and others have one"),
])
def test_bad_prompts_stop_before_any_call(script, files, capsys, line, message):
    with open(files / "prompts.jsonl", "a") as file:
        file.write(line + "\n")
    assert run(script, files) == 2
    assert message in capsys.readouterr().err and not script.echo.calls and not (files / "out").exists()


@pytest.mark.parametrize("more,message", [
    (["--models", "aa"], "model 'aa' has no price"), (["--samples", "0"], "--samples must be at least 1"),
    (["--grader", "numbr"], "unknown grader 'numbr' (did you mean 'number'?)"), (["--limit", "0"], "--limit"),
    (["--temperature", "-1"], "temperature must be 0"), (["--regrade", "true"], "no such outcome cache"),
    (["--max_new_tokens", "0"], "max_new_tokens must be at least 1"),
])
def test_bad_options_stop_before_any_call(script, files, capsys, more, message):
    assert run(script, files, *more) == 2
    assert message in capsys.readouterr().err and not script.echo.calls


def test_missing_files_are_named(script, files, capsys):
    assert launch.run(script.main, ["--prompts", str(files / "prompts.jsonl")]) == 2
    assert "--pool is missing" in capsys.readouterr().err
    assert launch.run(script.main, ["--prompts", str(files / "promts.jsonl"), "--pool", str(files / "pool.yaml")]) == 2
    assert "did you mean 'prompts.jsonl'" in capsys.readouterr().err
    assert launch.run(script.main, ["--prompts", "x", "--pool", "y", "--batch_size", "0"]) == 2
    assert "--batch_size must be at least 1" in capsys.readouterr().err


def test_prompts_with_splits_keep_them(script, files):
    rewrite(files, lambda i, row: {**row, "split": "test", "group": "g"})
    run(script, files, "--samples", "1")
    assert {(o.split, o.group) for o in read_outcomes(files / "out")} == {("test", "g")}


def test_killed_for_real_inside_the_traversal(root, files, script):
    """SIGKILL between batches and in the middle of a line: the next run ends with the cache of an unbroken one."""
    import signal
    import subprocess
    import time
    run(script, files)
    whole = (files / "out/outcomes.jsonl.gz").read_bytes()
    code = ("import importlib.util, sys, time\n"
            f"sys.path.insert(0, {str(root / 'tests')!r}); sys.path.insert(0, {str(root / 'src')!r})\n"
            "from test_build_cache import Echo\n"
            f"spec = importlib.util.spec_from_file_location('b', {str(root / 'src/build_cache.py')!r})\n"
            "b = importlib.util.module_from_spec(spec); spec.loader.exec_module(b)\n"
            "class Slow(Echo):\n"
            "    def call_many(self, *a):\n"
            "        time.sleep(.05); return super().call_many(*a)\n"
            "b.backend_for = lambda *a: Slow()\n"
            "from routewright.launch import run\n"
            f"sys.exit(run(b.main, ['--prompts', {str(files / 'prompts.jsonl')!r}, "
            f"'--pool', {str(files / 'pool.yaml')!r}, '--output_dir', {str(files / 'killed')!r}, "
            "'--batch_size', '1']))\n")
    journal = files / "killed/journal.jsonl"
    for wanted in (4, 11):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (journal.exists() and journal.read_bytes().count(b"\n") >= wanted):
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        with open(journal, "ab") as file:
            file.write(b'{"key": "half a li')
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0
    assert (files / "killed/outcomes.jsonl.gz").read_bytes() == whole


def test_the_real_backend_records_a_cache(root, tmp_path):
    """End to end with real weights: tiny untrained models, through the script's own backend."""
    spec = importlib.util.spec_from_file_location("backend_fixtures", root / "tests" / "backends" / "conftest.py")
    fixtures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fixtures)
    pool = fixtures.write_pool(tmp_path)
    from routewright import samplepool
    rows = [{"prompt_id": p.prompt_id, "prompt": p.prompt, "reference": p.reference, "task": p.task}
            for p in (q.as_prompt(i) for i, q in enumerate(samplepool.make_problems("record", 12)))]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = importlib.util.spec_from_file_location("build_cache_real", root / "src" / "build_cache.py")
    real = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(real)
    assert launch.run(real.main, ["--prompts", str(tmp_path / "prompts.jsonl"), "--pool", str(pool),
                                  "--output_dir", str(tmp_path / "out"), "--samples", "2"]) == 0
    outcomes = read_outcomes(tmp_path / "out")
    assert len(outcomes) == 12 * 2 * 2 and all(o.latency_s > 0 and o.logprob_min <= o.logprob_mean for o in outcomes)
