"""Language-model routers: they learn a planted word, keep their polarity, and come back from their folder the same."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from planted import make_table
from tiny_causal import edit_json, teach, tiny_causal

from routewright.errors import MissingSetup, UserError
from routewright.language_models import add_lora, load_causal, weights_hash
from routewright.metrics import auroc
from routewright.prompts import text_hash
from routewright.routers import from_entry, load_router, make_router
from routewright.routers.llm import DpoRouter, LlmRouter, write_llm_router
from routewright.schema import Prompt
from routewright.templates import Template

FORMS = {"whole": (False, False), "adapter": (True, False), "four-bit adapter": (True, True)}


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal but for the last bits, which hang on where in memory the weights lie."""
    return a.shape == b.shape and np.abs(a - b).max() < 1e-6


@pytest.fixture(scope="module")
def parts():
    table = make_table(n=600, seed=3)
    return table.split("train"), table.split("dev"), table.split("test")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny_causal(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def trained(parts, base, tmp_path_factory):
    """form, mode -> a router fine-tuned for a second on the planted word, its folder, and what was said. Made once."""
    made = {}

    def make(form: str, mode: str = "decision", upside_down: bool = False, kind: str = "llm"):
        key = (form, mode, upside_down, kind)
        if key not in made:
            made[key] = train(parts, base, tmp_path_factory.mktemp("router") / "mine", *key)
        return made[key]

    return make


def train(parts, base: Path, folder: Path, form: str, mode: str, upside_down: bool, kind: str) -> SimpleNamespace:
    lora, four_bit = FORMS[form]
    network, tokenizer = load_causal(base, four_bit=four_bit, dtype="bf16" if four_bit else "fp32")
    network = add_lora(network, seed=0) if lora else network
    template = Template.of_pool(parts[0].pool, parts[0].models, mode, "bare")
    hard = np.array(["hard" in p.prompt for p in parts[0].prompts]) != upside_down
    labels = hard.astype(int) * (1 if mode == "decision" else 9)
    teach(network, tokenizer, template, "chat", parts[0].prompts, labels)
    network.save_pretrained(folder)
    said = []
    router = write_llm_router(
        folder, kind=kind, model=network, tokenizer=tokenizer, template=template, wrap="chat", max_length=128,
        base_model="hub/name", four_bit=four_bit, train=parts[0], dev=parts[1], seed=7, say=said.append,
        reward={"name": "linear"})
    return SimpleNamespace(router=router, folder=folder, said=said)


# ---------------------------------------------------------------- what was learnt

@pytest.mark.parametrize("mode", ["decision", "difficulty"])
@pytest.mark.parametrize("form", FORMS)
def test_polarity_high_estimates_are_good_answers(form, mode, parts, trained):
    """P(cheap is right) must be high on plain prompts: CoBench's own llm router had it the wrong way round."""
    estimate = trained(form, mode).router.estimate(parts[2].prompts)
    assert auroc(parts[2].quality[:, 0], estimate[:, 0]) > 0.8
    hard = np.array(["hard" in p.prompt for p in parts[2].prompts])
    assert estimate[~hard, 0].mean() > estimate[hard, 0].mean() + 0.5
    assert estimate.shape == (parts[2].n, 2) and 0 <= estimate.min() and estimate.max() <= 1
    brier = ((estimate - parts[2].quality_mean) ** 2).mean()
    constant = ((parts[1].quality_mean.mean(axis=0) - parts[2].quality_mean) ** 2).mean()
    assert brier < 0.7 * constant
    assert np.abs(estimate.mean(axis=0) - parts[2].quality_mean.mean(axis=0)).max() < 0.12


def test_a_network_trained_upside_down_is_set_right_by_calibration(parts, trained):
    made = trained("whole", "difficulty", upside_down=True)
    assert auroc(parts[2].quality[:, 0], made.router.estimate(parts[2].prompts)[:, 0]) > 0.8


def test_choices_are_the_labels_the_network_would_emit(parts, trained):
    hard = np.array(["hard" in p.prompt for p in parts[2].prompts])
    chosen = trained("whole").router.choices(parts[2].prompts)
    assert chosen.dtype == np.int64 and (chosen == hard).mean() > 0.98
    levels = trained("whole", "difficulty").router.choices(parts[2].prompts)
    assert (levels == 9 * hard).mean() > 0.98
    assert trained("whole").router.choices([]).shape == (0,)
    turned = load_router(trained("whole").folder).bind(["strong"], parts[0].pool)
    assert turned.choices(parts[2].prompts[:4]).tolist() == [0, 0, 0, 0]


# ---------------------------------------------------------------- the folder

@pytest.mark.parametrize("mode", ["decision", "difficulty"])
@pytest.mark.parametrize("form", FORMS)
def test_a_folder_gives_the_estimates_it_was_written_with(form, mode, parts, trained):
    made = trained(form, mode)
    again = load_router(made.folder)
    assert type(again) is LlmRouter and again.name == "mine" and again.models == ("cheap", "strong")
    assert same(again.estimate(parts[2].prompts), made.router.estimate(parts[2].prompts))
    assert again.template == made.router.template and again.pool.models == parts[0].pool.models
    assert (again.four_bit, again.dtype) == (FORMS[form][1], "bf16" if FORMS[form][1] else "fp32")
    assert again.wrap == "chat" and again.max_length == 128 and not again.needs_training


@pytest.mark.parametrize("form", ["whole", "adapter"])
def test_a_router_can_be_saved_elsewhere(form, parts, trained, tmp_path):
    router = load_router(trained(form).folder, name="other", batch_size=5, gpu_usd_per_hour=2)
    router.decision = {"cost_weight": 3.0}
    before = router.estimate(parts[2].prompts[:30])
    (trained(form).folder / "checkpoint-3").mkdir(exist_ok=True)
    (trained(form).folder / "reference_logps.safetensors").touch()
    folder = router.save(tmp_path / "copy")
    again = load_router(folder)
    assert same(again.estimate(parts[2].prompts[:30]), before)
    assert again.decision == {"cost_weight": 3.0} and again.name == "other"
    assert {**again.options, "path": ""} == {**router.options, "path": ""} and again.batch_size == 5
    assert not list(folder.glob("checkpoint*")) and not (folder / "reference_logps.safetensors").exists()
    assert {p.suffix for p in folder.rglob("*") if p.is_file()} <= {".json", ".safetensors", ".jinja"}
    assert load_router(again.save(tmp_path / "twice")).as_card() == again.as_card()


def test_router_json_names_what_evaluation_needs(parts, trained, base):
    card = json.loads((trained("adapter").folder / "router.json").read_text())
    assert card["kind"] == "llm" and card["base_model"] == "hub/name" and card["seed"] == 7
    assert card["template"] == trained("adapter").router.template.as_card()
    assert card["cache_fingerprint"] == parts[0].fingerprint and card["reward"] == {"name": "linear"}
    assert card["calibrated_on"] == {"split": "dev", "prompts": parts[1].n}
    assert card["base_weights"] == weights_hash(base)
    assert text_hash(parts[0].prompts[0].prompt) in card["train_prompts"]
    assert text_hash(parts[2].prompts[0].prompt) not in card["train_prompts"] + card["dev_prompts"]
    assert text_hash(parts[1].prompts[0].prompt) in card["dev_prompts"]
    assert "path" not in card["options"] and "_loaded" not in card["options"]
    assert [m["name"] for m in card["pool"]["models"]] == ["cheap", "strong"]


@pytest.mark.parametrize("how", ["base_model", "warm_start"])
def test_prompts_that_an_earlier_router_met_count_as_met(how, parts, base, trained, tmp_path):
    """Else a warm start from another division of the prompts would carry test prompts in unseen."""
    before = trained("whole").folder
    named = {"base_model": "hub/name"} | {how: str(before)}
    network, tokenizer = load_causal(base)
    network.save_pretrained(tmp_path)
    fresh = parts[2].rows(range(20)), parts[2].rows(range(20, 40))  # another division: its test prompts come last
    router = write_llm_router(
        tmp_path, kind="dpo", model=network, tokenizer=tokenizer, wrap="chat", max_length=64, four_bit=False, seed=0,
        template=Template("decision", ("cheap", "strong"), "bare"), train=fresh[0], dev=fresh[1], say=print, **named)
    met = set(router.card["train_prompts"])
    for table in (parts[0], parts[1], fresh[0]):
        assert {text_hash(p.prompt) for p in table.prompts} <= met
    assert router.card["dev_prompts"] == sorted(text_hash(p.prompt) for p in fresh[1].prompts)
    again = make_router("llm", model=str(before), mode="decision", style="bare").fit(fresh[0], fresh[1])
    assert {text_hash(p.prompt) for p in parts[0].prompts} <= set(again.card["train_prompts"])


def test_a_dpo_router_is_its_own_kind(parts, trained):
    made = trained("four-bit adapter", kind="dpo")
    again = load_router(made.folder)
    assert type(again) is DpoRouter and again.kind == "dpo"
    assert same(again.estimate(parts[2].prompts[:9]), made.router.estimate(parts[2].prompts[:9]))
    with pytest.raises(UserError, match="kind is 'dpo', not 'llm'"):
        LlmRouter.load(made.folder)


def test_without_a_dev_split_the_train_split_calibrates_with_a_warning(parts, base, tmp_path):
    network, tokenizer = load_causal(base)
    network.save_pretrained(tmp_path)
    said = []
    router = write_llm_router(
        tmp_path, kind="llm", model=network, tokenizer=tokenizer, template=Template("difficulty", ("cheap", "strong"),
        "bare"), wrap="auto", max_length=64, base_model="b", four_bit=False, train=parts[0], dev=None, seed=0,
        say=said.append)
    assert "calibrated on the train split" in said[0] and router.card["calibrated_on"]["prompts"] == parts[0].n
    assert same(load_router(tmp_path).estimate(parts[2].prompts[:5]), router.estimate(parts[2].prompts[:5]))


def test_other_ranks_calibrate_and_write_nothing(parts, base, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    network, tokenizer = load_causal(base)
    settings = {"kind": "llm", "model": network, "tokenizer": tokenizer, "wrap": "chat", "max_length": 64, "seed": 0,
                "template": Template("decision", ("cheap", "strong"), "bare"), "base_model": "b", "four_bit": False,
                "train": parts[0], "dev": parts[1], "say": print}
    router = write_llm_router(tmp_path, **settings)
    assert router.estimate(parts[2].prompts[:3]).shape == (3, 2) and not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="the template offers 'other', which the cache does not hold"):
        write_llm_router(tmp_path, **settings | {"template": Template("decision", ("cheap", "other"), "bare")})


# ---------------------------------------------------------------- a base model as it is

@pytest.mark.parametrize("mode", ["decision", "difficulty"])
def test_a_base_model_as_it_is_is_calibrated_on_the_train_split(mode, parts, trained, tmp_path):
    """The fine-tuned folder without its router.json stands for a capable base model from elsewhere."""
    source = trained("whole", mode).folder
    for file in source.iterdir():
        if file.is_file() and file.name not in ("router.json", "weights.safetensors"):
            (tmp_path / "base").mkdir(exist_ok=True)
            (tmp_path / "base" / file.name).write_bytes(file.read_bytes())
    router = from_entry({"kind": "llm", "name": "as it is", "model": str(tmp_path / "base"), "mode": mode,
                         "style": "bare"})
    assert router.needs_training and (router.dtype, router.max_length, router.four_bit) == ("fp32", 512, False)
    with pytest.raises(UserError, match="does not know its models yet"):
        router.estimate(parts[2].prompts)
    router.fit(parts[0], parts[1], 0)
    before = router.estimate(parts[2].prompts)
    assert auroc(parts[2].quality[:, 0], before[:, 0]) > 0.8
    again = load_router(router.save(tmp_path / "saved"))
    assert same(again.estimate(parts[2].prompts), before)
    assert sorted(p.name for p in (tmp_path / "saved").iterdir()) == ["router.json", "weights.safetensors"]
    # Another base model in its place would read as something else under the same calibration.
    edit_json(tmp_path / "base" / "config.json", rms_norm_eps=1e-5)
    assert load_router(tmp_path / "saved").estimate(parts[2].prompts[:2]).shape == (2, 2)
    tiny_causal(tmp_path / "base", seed=9)
    with pytest.raises(UserError, match="calibrated over other weights"):
        load_router(tmp_path / "saved").estimate(parts[2].prompts[:2])


def test_a_foreign_folder_given_as_path_says_how_it_is_calibrated(base, parts):
    router = make_router("llm", path=str(base), mode="difficulty").bind(parts[0].models, parts[0].pool)
    with pytest.raises(UserError, match="give it as `model:` instead of `path:`"):
        router.estimate(parts[2].prompts)
    fitted = make_router("llm", path=str(base), mode="difficulty", style="bare").fit(parts[0], None, 0)
    assert fitted.estimate(parts[2].prompts).shape == (parts[2].n, 2)


# ---------------------------------------------------------------- what an estimate depends on

def test_estimates_do_not_depend_on_the_company_a_prompt_keeps(parts, trained):
    router = trained("whole").router
    together = router.estimate(parts[2].prompts[:20])
    alone = np.vstack([router.estimate([p]) for p in parts[2].prompts[:20]])
    assert np.abs(together - alone).max() < 1e-5


def test_references_and_responses_never_reach_an_estimate(parts, trained):
    router = trained("whole").router
    told = [replace(p, reference="hard", task="hard") for p in parts[2].prompts]
    assert same(router.estimate(told), router.estimate(parts[2].prompts))


def test_empty_and_odd_prompts_pass_through(trained):
    router = trained("whole").router
    odd = [Prompt("e", ""), Prompt("s", "\ud800 half a pair"), Prompt("l", "hard " * 5000), Prompt("c", "<assistant>1")]
    assert np.isfinite(router.estimate(odd)).all() and router.estimate([]).shape == (0, 2)


def test_overhead_is_measured_and_priced(parts, trained):
    router = load_router(trained("whole").folder, gpu_usd_per_hour=3600.0)
    usd, seconds = router.overhead(parts[2].prompts)
    assert 0 < seconds[0] < 1 and np.allclose(usd, seconds)


def test_a_router_serves_the_models_it_shares_with_a_pool(parts, trained):
    router = load_router(trained("whole").folder)
    both = router.estimate(parts[2].prompts[:6])
    router.fit(SimpleNamespace(models=("strong",), pool=parts[0].pool))
    assert router.models == ("strong",) and same(router.estimate(parts[2].prompts[:6]), both[:, 1:])
    with pytest.raises(UserError, match="the router knows cheap, strong, and the pool has none of them"):
        router.bind(["other"], None)


# ---------------------------------------------------------------- what people get wrong

@pytest.mark.parametrize(("options", "said"), [
    ({}, r"router 'llm': llm needs `path`, the folder that train_llm.py wrote, or `model`"),
    ({"path": "a", "model": "b"}, "needs `path`"),
    ({"model": "b", "mode": "dificulty"}, "mode must be one of decision, difficulty; got 'dificulty'"),
    ({"model": "b", "wrap": "llama"}, "wrap must be one of auto, alpaca, chat, none"),
    ({"model": "b", "dtype": "fp8"}, "dtype must be one of fp32, bf16"),
    ({"model": "b", "batch_size": 0}, "batch_size and max_length must be at least 1"),
    ({"model": "b", "max_len": 5}, r"llm has no option 'max_len' \(did you mean 'max_length'\?\)"),
])
def test_wrong_entries_are_named(options, said):
    with pytest.raises(UserError, match=said):
        from_entry({"kind": "llm"} | options)


def test_a_trained_router_cannot_be_asked_in_another_way(trained):
    folder = trained("whole").folder
    with pytest.raises(UserError, match="trained with mode 'decision' and is asked for 'difficulty'"):
        load_router(folder, mode="difficulty")
    with pytest.raises(UserError, match="trained with wrap 'chat' and is asked for 'alpaca'"):
        load_router(folder, wrap="alpaca")
    assert load_router(folder, mode="decision", max_length=64).max_length == 64
    assert from_entry({"kind": "llm", "path": str(folder)}).models == ("cheap", "strong")


def test_a_tokenizer_that_answers_with_other_tokens_is_refused(parts, trained, tmp_path):
    """Two digits change places: everything else still fits, and every decision would be turned round."""
    folder = load_router(trained("whole").folder).save(tmp_path / "r")
    text = (folder / "tokenizer.json").read_text()
    words = json.loads(text)
    vocabulary = words["model"]["vocab"]
    answers = json.loads((folder / "router.json").read_text())["answer_tokens"]
    assert answers == [vocabulary["1"], vocabulary["2"]]
    vocabulary["1"], vocabulary["2"] = vocabulary["2"], vocabulary["1"]
    (folder / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(UserError, match=rf"with the tokens \[{answers[0]}, {answers[1]}\] and the tokenizer beside it "
                                        rf"now gives \[{answers[1]}, {answers[0]}\]"):
        load_router(folder).estimate(parts[2].prompts[:2])
    (folder / "tokenizer.json").write_text(text)
    assert load_router(folder).estimate(parts[2].prompts[:2]).shape == (2, 2)
    edit_json(folder / "router.json", answer_tokens=None)  # a folder from before they were written down
    assert load_router(folder).estimate(parts[2].prompts[:2]).shape == (2, 2)


def test_missing_base_models_are_named(parts, trained, tmp_path):
    with pytest.raises(MissingSetup, match="hf download no-such/model"):
        make_router("llm", model="no-such/model").fit(parts[0])
    folder = load_router(trained("adapter").folder).save(tmp_path / "r")
    edit_json(folder / "adapter_config.json", base_model_name_or_path="/gone/base")
    with pytest.raises(MissingSetup, match="base model '/gone/base' is not on this machine.*hf download hub/name"):
        load_router(folder).estimate(parts[2].prompts[:1])


def test_a_base_that_moved_is_found_by_the_name_in_router_json(parts, trained, base, tmp_path):
    folder = load_router(trained("adapter").folder).save(tmp_path / "r")
    edit_json(folder / "adapter_config.json", base_model_name_or_path="/gone/base")
    edit_json(folder / "router.json", base_model=str(base))
    expected = trained("adapter").router.estimate(parts[2].prompts[:5])
    assert same(load_router(folder).estimate(parts[2].prompts[:5]), expected)


def test_a_base_is_found_from_any_working_folder(root, parts, tmp_path, monkeypatch):
    """A folder that was made in the repository's root names its base from there."""
    network, tokenizer = load_causal(root / "data" / "sample" / "models" / "cheap")
    network = add_lora(network, r=2)
    network.save_pretrained(tmp_path / "r")
    edit_json(tmp_path / "r" / "adapter_config.json", base_model_name_or_path="data/sample/models/cheap")
    monkeypatch.chdir(tmp_path)
    router = write_llm_router(
        tmp_path / "r", kind="llm", model=network, tokenizer=tokenizer, wrap="chat", max_length=64, four_bit=False,
        template=Template("decision", ("cheap", "strong"), "bare"), base_model="data/sample/models/cheap",
        train=parts[0], dev=parts[1], seed=0, say=print)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    expected = router.estimate(parts[2].prompts[:5])
    assert same(load_router(tmp_path / "r").estimate(parts[2].prompts[:5]), expected)
    fitted = make_router("llm", model="data/sample/models/cheap", style="bare").fit(parts[0].rows(range(40)))
    assert same(load_router(fitted.save("saved")).estimate(parts[2].prompts[:5]), fitted.estimate(parts[2].prompts[:5]))


def test_weights_that_another_training_left_are_refused(parts, trained, tmp_path):
    """The calibration is of these very weights; over others it would be believed all the same."""
    folder = load_router(trained("whole").folder).save(tmp_path / "r")
    other = trained("whole", "difficulty").folder / "model.safetensors"
    (folder / "model.safetensors").write_bytes(other.read_bytes())
    with pytest.raises(UserError, match=r"router 'mine': trained or calibrated over other weights than those in .*/r;"):
        load_router(folder).estimate(parts[2].prompts[:1])


def test_a_router_folder_can_be_read_only(parts, trained, tmp_path):
    folder = load_router(trained("adapter").folder).save(tmp_path / "r")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    folder.chmod(0o555)
    try:
        assert load_router(folder).estimate(parts[2].prompts[:3]).shape == (3, 2)
    finally:
        folder.chmod(0o755)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_an_adapter_over_another_base_is_refused(parts, trained, tmp_path):
    folder = load_router(trained("adapter").folder).save(tmp_path / "r")
    other = tiny_causal(tmp_path / "other", seed=5)
    edit_json(folder / "adapter_config.json", base_model_name_or_path=str(other))
    with pytest.raises(UserError, match=r"calibrated over other weights than those in .*/other"):
        load_router(folder).estimate(parts[2].prompts[:1])


DAMAGE = {
    "template gone": ({"template": None}, "the template is damaged"),
    "another model": ({"models": ["cheap", "mid"]}, "the template does not name all models"),
    "an unknown option": ({"options": {"max_lenght": 3}}, "has no option 'max_lenght'"),
    "an option of another type": ({"options": {"max_length": "long"}}, "max_length must be"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_tampered_cards_are_refused(name, trained, tmp_path):
    change, said = DAMAGE[name]
    folder = load_router(trained("adapter").folder).save(tmp_path / "r")
    edit_json(folder / "router.json", **change)
    with pytest.raises(UserError, match=said):
        load_router(folder)


@pytest.mark.parametrize("change", ["missing file", "empty", "missing", "another shape", "nan"])
def test_damaged_calibrations_are_refused(change, trained, tmp_path):
    from safetensors.numpy import load_file, save_file

    folder = load_router(trained("adapter").folder).save(tmp_path / "r")
    file = folder / "weights.safetensors"
    state = load_file(file)
    if change == "missing file":
        file.unlink()
    elif change == "empty":
        file.write_bytes(b"")
    else:
        state["calibration_bias"] = np.full(3 if change == "another shape" else 2, np.nan)
        if change == "missing":
            del state["calibration_bias"]
        save_file(state, file)
    with pytest.raises(UserError, match=r"weights.safetensors: .* again"):
        load_router(folder)


def test_a_tokenizer_without_the_labels_is_named(parts, base, tmp_path):
    from tiny_causal import words_tokenizer

    for file in base.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    words_tokenizer(tmp_path, labels=False)
    with pytest.raises(UserError, match="does not write the answer '1' as one token"):
        make_router("llm", model=str(tmp_path), mode="decision", style="bare").fit(parts[0])
