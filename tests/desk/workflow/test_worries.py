"""Each worry of the report: figures that raise it, and figures just short of that."""

import copy
import json

from kochat_trl.desk.workflow.worries import worries

import pytest


@pytest.fixture
def fine():
    """Figures that nothing is wrong with."""
    metrics = {"tokens": 20.0, "distinct_2": 0.8, "ended": 0.9, "hangul": 0.95, "score": 0.0}
    return {
        "methods": {"ppo": "ppo"},
        "metrics": {name: dict(metrics) for name in ("base", "sft", "ppo")},
        "wins": {"ppo over sft": {"share": 0.8, "low": 0.7, "high": 0.87, "n": 100}},
        "kl": {"ppo": {"mean": 4.0, "low": 3.0, "high": 5.0}},
    }


@pytest.fixture
def settings(tmp_path):
    (tmp_path / "evaluation").mkdir()
    rules = {"longer answer wins": {"beaten": True}, "more Hangul wins": {"beaten": True}}
    (tmp_path / "evaluation/evaluation.json").write_text(json.dumps({"baselines": rules}))
    return {"reward_model_path": str(tmp_path), "kl_target": None}


def test_a_run_without_a_reward_model_is_not_told_to_evaluate_it(fine):
    assert worries(fine, "ppo", {"reward_model_path": None}) == []


def test_nothing_to_worry_about(fine, settings):
    assert worries(fine, "ppo", settings) == []


@pytest.mark.parametrize(
    ("change", "sign"),
    [
        ({"wins": {"ppo over sft": {"share": 0.52, "low": 0.42, "high": 0.62, "n": 100}}}, "can't be told from SFT"),
        ({"kl": {"ppo": {"mean": 0.01, "low": -0.02, "high": 0.04}}}, "can't be told from SFT"),
        ({"wins": {"ppo over sft": {"share": 0.2, "low": 0.1, "high": 0.3, "n": 100}}}, "score worse than SFT's"),
        ({"kl": {"ppo": {"mean": 20.1, "low": 15.0, "high": 25.0}}}, "20.1 nats a response from SFT"),
        ({"ppo": {"tokens": 30.1}}, "grew from 20 to 30 tokens"),
        ({"ppo": {"distinct_2": 0.55}}, "repeats itself"),
        ({"ppo": {"ended": 0.7}}, "fell from 90% to 70%"),
        ({"ppo": {"hangul": 0.8}}, "share of Hangul fell to 80%"),
    ],
)
def test_each_worry(fine, settings, change, sign):
    changed = copy.deepcopy(fine)
    if "ppo" in change:
        changed["metrics"]["ppo"] |= change["ppo"]
    else:
        changed |= change
    found = worries(changed, "ppo", settings)
    assert len(found) == 1
    assert sign in found[0]["sign"]
    assert found[0]["advice"]


@pytest.mark.parametrize(
    ("metric", "value"), [("tokens", 30.0), ("distinct_2", 0.57), ("ended", 0.73), ("hangul", 0.86)]
)
def test_just_short_of_a_worry(fine, settings, metric, value):
    fine["metrics"]["ppo"][metric] = value
    assert worries(fine, "ppo", settings) == []


def test_far_from_sft_without_scoring_better_is_not_too_near(fine, settings):
    fine["wins"]["ppo over sft"] = {"share": 0.5, "low": 0.4, "high": 0.6, "n": 100}
    (found,) = worries(fine | {"kl": {"ppo": {"mean": 60.0, "low": 50.0, "high": 70.0}}}, "ppo", settings)
    assert "60.0 nats a response from SFT" in found["sign"]


def test_the_kl_target_is_the_measure(fine, settings):
    assert worries(fine, "ppo", settings | {"kl_target": 2.5}) == []
    assert "over 3.8" in worries(fine, "ppo", settings | {"kl_target": 1.9})[0]["sign"]


def test_a_worry_of_dpo_names_its_own_keys(fine, settings):
    fine["methods"]["ppo"] = "dpo"
    fine["kl"]["ppo"] = {"mean": 0.01, "low": -0.02, "high": 0.04}
    (found,) = worries(fine, "ppo", settings)
    assert found["sign"].startswith("DPO can't be told from SFT")
    assert "lower beta" in found["advice"]


def test_the_reward_up_and_the_judge_down(fine, settings):
    for name, score, judge in (("sft", 0.0, 0.6), ("ppo", 1.0, 0.5)):
        fine["metrics"][name] |= {"score": score, "judge": judge, "judge_low": judge - 0.04, "judge_high": judge + 0.04}
    (found,) = worries(fine, "ppo", settings)
    assert "The reward went up (0.00 → 1.00) and the judge down (0.60 → 0.50)" in found["sign"]
    assert found["run"] == "ppo"
    fine["metrics"]["ppo"]["judge_high"] = 0.57  # not told apart
    assert worries(fine, "ppo", settings) == []
    fine["metrics"]["ppo"] |= {"judge_high": 0.54, "score": -0.1}
    assert worries(fine, "ppo", settings) == []


@pytest.fixture
def form(fine):
    """The demo's figures: 533 answers, which became polite, and no more of them right."""
    for name, score, right in (("sft", 0.93, 0.233), ("ppo", 2.39, 0.220)):
        fine["metrics"][name] |= {"score": score, "right": right, "right_low": right - 0.035}
        fine["metrics"][name] |= {"right_high": right + 0.035, "judge": 0.6, "judge_low": 0.58, "judge_high": 0.62}
    fine["wins"]["ppo over sft"] |= {"gain": 1.46, "gain_low": 1.27, "gain_high": 1.65}
    return fine


def test_the_reward_up_and_the_right_answers_not(form, settings):
    (found,) = worries(form, "ppo", settings)
    assert found["sign"] == (
        "The reward went up (0.93 → 2.39) and the share of right answers didn't follow "
        "(23% [20%, 27%] → 22% [18%, 26%])."
    )
    assert "train it on pairs of one form" in found["advice"]


@pytest.mark.parametrize(
    ("model", "figure", "value"), [("ppo", "right", 0.24), ("ppo", "right", 0.233), ("win", "gain_low", -0.01)]
)
def test_the_right_answers_follow_or_the_reward_is_not_up(form, settings, model, figure, value):
    (form["wins"]["ppo over sft"] if model == "win" else form["metrics"][model])[figure] = value
    assert worries(form, "ppo", settings) == []


def test_a_reward_model_that_nobody_looked_at_or_that_is_a_rule(fine, settings, tmp_path):
    path = tmp_path / "evaluation/evaluation.json"
    rules = json.loads(path.read_text())
    rules["baselines"]["longer answer wins"]["beaten"] = False
    path.write_text(json.dumps(rules))
    (found,) = worries(fine, "ppo", settings)
    assert "no better than the rule 'longer answer wins'" in found["sign"]
    path.unlink()
    (found,) = worries(fine, "ppo", settings)
    assert "kochat reward eval" in found["advice"]
