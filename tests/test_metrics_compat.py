"""The published systems' numbers: golden values on public data, closed forms, and what happens where origins crash."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest

from routewright.errors import UserError
from routewright.metrics import compat

# spec/metrics.md, golden values
GSM8K = {20: 10.507967133495173, 50: 36.513280139906, 80: 66.65646518745223}
GSM8K_AUC, GSM8K_APGR = 76.92523162606857, 0.5986554769191534


@pytest.fixture(scope="module")
def gsm8k(shared_data):
    """(prompts, weak, strong) of RouteLLM's GSM8K responses after its decontamination."""
    folder = shared_data("routellm") / "original" / "gsm8k"
    with open(folder / "contaminated_prompts.jsonl") as lines:
        leaked = {json.loads(line)["eval_prompt"] for line in lines}
    with open(folder / "gsm8k_responses.csv", newline="") as file:
        rows = [row for row in csv.reader(file)][1:]
    rows = [row for row in rows if row[0] not in leaked]
    return ([row[0] for row in rows], np.array([row[1] == "True" for row in rows], float),
            np.array([row[2] == "True" for row in rows], float))


class TestRouteLLM:
    def test_golden_gsm8k(self, gsm8k):
        prompts, weak, strong = gsm8k
        assert len(prompts) == 1307
        found = compat.routellm(np.array([min(len(p), 2000) / 2000 for p in prompts]), weak, strong)
        for percent, value in GSM8K.items():
            assert found.cpt[percent] == pytest.approx(value, abs=1e-9)
        assert found.auc == pytest.approx(GSM8K_AUC, abs=1e-9)
        assert found.apgr == pytest.approx(GSM8K_APGR, abs=1e-9)
        assert (found.weak_accuracy, found.strong_accuracy) == pytest.approx((63.7337413925, 85.7689), abs=1e-4)
        assert compat.routellm_optimal(weak, strong, 1.0) == pytest.approx(0.929610, abs=1e-6)
        assert found.monotone and found.strong_percent[0] == 0 and found.strong_percent[-1] == 100

    def test_thresholds_are_those_of_qcut(self):
        pandas = pytest.importorskip("pandas")
        for n in (501, 1000, 1307):
            score = np.random.default_rng(n).beta(2, 5, n)
            _, edges = pandas.qcut(pandas.Series(score), 10, retbins=True)
            found = compat.routellm(score, np.zeros(n), np.ones(n))
            assert np.array_equal(np.sort(found.thresholds), edges)

    def test_near_constant_score_is_one_sentence(self):
        score = np.array([0.5] * 95 + [0.6] * 5)
        with pytest.raises(UserError, match="only 2 of them differ"):
            compat.routellm(score, np.zeros(100), np.ones(100))

    def test_a_dip_is_reported(self):
        weak = np.array([1.0] * 50 + [0.0] * 50)
        found = compat.routellm(np.linspace(1, 0, 100), weak, 1 - weak + 0.0)
        assert not found.monotone

    def test_optimal_and_random(self):
        weak, strong = np.array([1, 0, 0, 0.0]), np.array([0, 1, 1, 0.0])
        assert compat.routellm_optimal(weak, strong, 0.25) == 0.5
        assert compat.routellm_optimal(weak, strong, 1.0) == 0.75
        low, high = np.repeat([0.0, 1.0], [30, 70]), np.ones(100)
        x, y = compat.routellm_random(low, high)
        assert np.all(np.diff(x) > 0) and (y[0], y[-1]) == (70.0, 100.0)
        assert np.abs(y - (70 + 0.3 * x)).max() < 6

    def test_threshold_for_a_share(self):
        score = np.random.default_rng(0).random(10_000)
        threshold = compat.routellm_threshold(score, 0.3)
        assert abs((score >= threshold).mean() - 0.3) < 0.002
        assert threshold == round(threshold, 5)


class TestRouterArena:
    @pytest.mark.parametrize("cost, accuracy, score",
                             [(0.27, 0.7969, 0.7762), (10.02, 0.7396, 0.6432), (2.06, 0.6721, 0.6387)])
    def test_golden(self, cost, accuracy, score):
        assert compat.routerarena_score(cost, accuracy) == pytest.approx(score, abs=5e-5)

    def test_cost_is_clamped(self):
        assert compat.routerarena_score(500, 0.9) == 0.0
        assert compat.routerarena_score(1e-9, 0.8) == compat.routerarena_score(0.0044, 0.8)
        assert compat.routerarena_score(1.0, 0.0) == 0.0

    def test_failed_generations(self):
        correct, failed = np.array([1, 1, 0, 1.0]), np.array([False, False, False, True])
        assert compat.routerarena_accuracy(correct, failed) == 0.5
        assert compat.routerarena_accuracy(correct, failed, before_pr118=True) == pytest.approx(2 / 3)
        assert compat.routerarena_cost_per_1k([0.001, -1, 0, 0.003]) == pytest.approx(1.0)

    def test_robustness(self):
        assert compat.routerarena_robustness(["a", "b", None, "c"], ["a", "c", "a", "c"]) == pytest.approx(2 / 3)
        assert compat.routerarena_robustness([None], ["a"]) is None

    def test_optimality(self):
        correct = np.array([[1, 1], [0, 1], [0, 0], [1, 1.0]])
        cost = np.array([[1, 10], [1, 10], [1, 10], [1, 10.0]])
        found = compat.routerarena_optimality(correct, cost, [0, 0, 1, 1])
        assert (found.selection, found.accuracy) == (pytest.approx(1 / 3), pytest.approx(2 / 3))
        assert found.cost == pytest.approx(12 / 12)
        former = compat.routerarena_optimality(correct, cost, [0, 0, 1, 1], before_pr97=True)
        assert former.accuracy == 1.0 and former.selection == 0.5  # the trap of issue #95
        nobody = compat.routerarena_optimality(np.zeros((2, 2)), cost[:2], [0, 1])
        assert (nobody.selection, nobody.cost, nobody.accuracy) == (None, None, None)


class TestRouterBench:
    def test_hull_of_a_dent(self):
        x, y = compat.routerbench_ndch([0, 1, 2, 3], [0, 0.1, 0.8, 0.9])
        assert np.allclose(x, [0, 1, 2, 3]) and np.allclose(y, [0, 0.4, 0.8, 0.9])

    def test_last_point_only_if_not_below(self):
        x, y = compat.routerbench_ndch([1, 2, 3], [0.5, 0.9, 0.7])
        assert x.tolist() == [1, 2] and y.tolist() == [0.5, 0.9]

    def test_aiq_depends_on_who_is_compared(self):
        curve = (np.array([1.0, 2.0]), np.array([0.5, 0.7]))
        alone = compat.routerbench_aiq({"a": curve})["a"]
        assert alone == pytest.approx(0.6 / 2)
        beside = compat.routerbench_aiq({"a": curve, "b": (np.array([4.0]), np.array([0.9]))})["a"]
        assert beside == pytest.approx((0.6 + 2 * 0.7) / 4)

    def test_oracle_is_free_where_nobody_is_right(self):
        assert compat.routerbench_oracle_cost([[0, 0], [0, 1]], [[1, 2], [1, 2]]) == 1.0
        assert len(compat.ROUTERBENCH_WTP) == 32 and compat.ROUTERBENCH_WTP[[0, -1]] == pytest.approx([1e-10, 1e9])


class TestLLMRouterBench:
    def test_aggregates(self):
        quality = np.array([[1, 0], [1, 0], [0, 0.2], [0, 0.0]])
        cost = np.array([[1, 2], [3, 2], [1, 5], [1, 5.0]])
        found = compat.llmrouterbench_aggregates(quality, cost, ["a", "a", "b", "b"])
        assert found.by_dataset["a"]["oracle"] == 1.0
        assert found.by_dataset["b"]["oracle"] == 0.5  # 0.2 counts as right: the origin's partial-credit trap
        assert found.sample_mean["oracle_cost"] == pytest.approx((1 + 3 + 5 + 1) / 4)
        assert found.sample_mean["best_single"] == 0.5
        assert found.by_dataset["b"]["max_expert"] == pytest.approx(0.1)
        assert found.dataset_mean["max_expert"] == pytest.approx(0.55)
        again = compat.llmrouterbench_aggregates(quality, cost, ["a", "a", "b", "b"])
        assert again.sample_mean["random"] == found.sample_mean["random"]

    def test_gains(self):
        assert compat.gain([0.6, 0.9], [0.5, 0.6]) == pytest.approx((0.2 + 0.5) / 2)
        assert compat.gap_to_oracle([0.6], [0.8]) == pytest.approx(0.25)
        assert compat.perf_gain(np.array([0.7, 0.88]), 0.8) == pytest.approx(0.1)
        assert compat.cost_save([0.7, 0.8, 0.9], [1, 4, 9], 0.8, 10) == pytest.approx(0.6)
        assert compat.cost_save([0.7], [1], 0.8, 10) is None


class TestRewardsAndOthers:
    def test_router_r1(self):
        recent = np.linspace(0, 1, 101) ** 2
        assert compat.router_r1_reward(0.5, 0.1, recent, 0.9, format_ok=False) == -1
        assert compat.router_r1_reward(0.0, 0.0, recent, 0.9) == 0
        assert compat.router_r1_reward(0.5, 0.1, recent) == 0.5
        assert compat.router_r1_reward(0.5, 0.25, recent, 0.4) == pytest.approx(0.5 * 0.6 + 0.4 * 0.5)
        assert compat.router_r1_reward(0.5, 9.0, recent, 0.4) == pytest.approx(0.3)

    def test_routereval(self):
        quality = np.array([[1, 0], [0, 1], [0, 1.0]])
        found = compat.routereval(quality, np.array([[1, 0], [0.5, 0.5], [0, 1.0]]))
        assert (found.mu, found.v_b, found.e_p) == (pytest.approx(2 / 3), pytest.approx(1.0), pytest.approx(1 / 3))
        assert compat.routereval(np.zeros((2, 2)), np.eye(2)).v_b is None
        assert compat.routereval_mix(quality, 1.0, 3) == 1.0
        assert compat.routereval_mix(quality, 0.5, 2000) == pytest.approx(0.75, abs=0.02)

    def test_frontier_cs(self):
        correct, cost = np.array([[1, 1], [0, 1], [0, 0]]), np.array([[0.0001, 0.001]] * 3)
        assert compat.frontier_cs_score(correct, cost, [0, 1, 1]) == pytest.approx(100)
        score = compat.frontier_cs_score(correct, cost, [1, 1, 1])
        assert score == pytest.approx(100 * (2 - 0.3) / (2 - 0.165))
        assert compat.frontier_cs_score(np.zeros((2, 2)), cost[:2], [0, 1]) is None

    @pytest.mark.parametrize("score, cost, reward", [(1, 0.01, 0.97), (1, 0.2, 0.4), (1, 0.5, 0.2), (0, 0.3, 0)])
    def test_golden_xrouter(self, score, cost, reward):
        assert float(compat.xrouter_reward(np.array(score, float), np.array(cost))) == pytest.approx(reward)


class TestCoBench:
    def test_perfect_ranking(self):
        weak = np.repeat([0.0, 1.0], [40, 60])
        found = compat.cobench(np.linspace(0, 1, 100), weak, np.ones(100), recovery_band=(0.9, 1.0))
        assert found.auroc == 1.0 and found.youden_accuracy == 1.0
        assert found.youden_threshold == pytest.approx(40 / 99)
        assert found.accuracy[40] == 1.0 and found.call_rate[40] == 0.4
        assert found.lpm == pytest.approx(np.mean(0.6 + np.arange(11) / 100))
        # accuracy .96 to 1.0: rates .36 to 1.00
        assert found.hcr == pytest.approx(1 - np.mean(np.arange(36, 101) / 100))
        sent = [int(k / 100 * 100) for k in range(11, 36)]  # int(0.29 * 100) is 28
        assert found.mpm == pytest.approx(np.mean([0.6 + k / 100 for k in sent]))

    def test_empty_bands_are_none_and_never_zero(self):
        weak = np.array([0.0, 1.0])
        found = compat.cobench(np.array([0.1, 0.9]), weak, np.ones(2))
        assert found.hcr is None and found.lpm is not None
        nothing = compat.cobench(np.array([0.1, 0.9]), weak, np.ones(2), low_band=(0.101, 0.102))
        assert nothing.lpm is None and nothing.mpm is None

    def test_one_class_is_none(self):
        found = compat.cobench(np.array([0.1, 0.9]), np.ones(2), np.ones(2))
        assert found.auroc is None and found.youden_threshold is None

    def test_unequal_lengths_stop(self):
        with pytest.raises(UserError, match="got 3, 2 and 2"):
            compat.cobench(np.zeros(3), np.ones(2), np.ones(2))
