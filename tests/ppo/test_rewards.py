"""Rewards beside the reward model: each rule by hand on Korean text, what a bad function says, and runs with them."""

import sys

from kochat_trl.errors import UserError
from kochat_trl.ppo.rewards import RULES, RewardFunctions, checked
from kochat_trl.settings.checks import REWARD_FUNCTIONS
from tests.ppo.helpers import (
    ADAPTER,
    FEW,
    LENGTH,
    adapters_apart,
    assert_same_change,
    change,
    logs,
    output_of,
    samples,
    trained,
)

import pytest
import torch
from trl.rewards import get_soft_overlong_punishment

TEXTS = ["서울입니다.", "서울이에요!", "서울이야", "I see, 네", "", "3월 1일"]
ASKED = {"prompts": ["?"] * 6, "completions": TEXTS, "ended": [True, True, False, True, True, False]}
ASKED |= {"completion_ids": [[5] * 10, [5, 6, 7, 8], [5, 6, 5, 6, 5, 6], [1], [5] * 9, [5, 6, 7, 8, 9, 4, 3, 2]]}
EXPECTED = {
    "hangul": [1, 1, 1, 1 / 5, 0, 1],  # letters: I, s, e, e, 네
    "polite": [1, 1, 0, 0, 0, 0],
    "ended": [1, 1, 0, 1, 1, 0],
    "repetition": [-7 / 8, 0, -2 / 4, 0, -6 / 7, 0],  # of 8 threes one is different; 2 of 4; 1 of 7
    "length": [-2 / 8, -4 / 8, -2 / 8, -7 / 8, -1 / 8, 0],
    "overlong": [-1, 0, 0, 0, -1 / 2, 0],  # of 10 tokens the last two cost
}


def functions(*names, weights=None, **settings):
    settings = {"reward_functions": list(names), "reward_weights": weights, "target_length": None} | settings
    return RewardFunctions(type("Settings", (), {"response_length": 10} | settings))


@pytest.mark.parametrize("name", REWARD_FUNCTIONS)
def test_each_rule_by_hand(name):
    found = functions(name, target_length=8)(**ASKED)
    assert found == {name: pytest.approx(EXPECTED[name])}


def test_the_settings_know_each_rule():
    assert set(RULES) == set(REWARD_FUNCTIONS)


@pytest.mark.parametrize("length", [3, 53])
def test_overlong_is_trls_of_the_last_fifth(length):
    ids = [[1] * n for n in range(1, length + 1)]
    expected = get_soft_overlong_punishment(length, length // 5)(completion_ids=ids)
    asked = {"prompts": [""] * length, "completions": [""] * length, "completion_ids": ids, "ended": [True] * length}
    assert functions("overlong", response_length=length)(**asked)["overlong"] == expected


def test_weights():
    rewards = {"hangul": 0.2, "polite": 1.0}
    assert functions("hangul", "polite", weights=[0.5, -2.0]).total(rewards) == pytest.approx(-1.9)
    assert functions("hangul", "polite").total(rewards) == pytest.approx(1.2)


@pytest.fixture
def own_rules(tmp_path, monkeypatch):
    """A module of the user's own in the folder that a run is started in."""
    (tmp_path / "own_rules.py").write_text(
        "def questions(completions, **kwargs):\n    return [text.count('?') for text in completions]\n\n\n"
        "def seen(prompts, completions, completion_ids, ended, **kwargs):\n"
        "    return [len(p) + 100 * len(c) + 10_000 * len(i) + 1_000_000 * e\n"
        "            for p, c, i, e in zip(prompts, completions, completion_ids, ended)]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    sys.modules.pop("own_rules", None)


def test_a_function_of_the_users_own_is_called_as_trl_calls_it(own_rules):
    found = functions("own_rules:questions", "own_rules:seen")
    asked = {"prompts": ["가?", "나"], "completions": ["뭐? 왜?", "네"], "completion_ids": [[4, 5, 1], [6]]}
    assert found(**asked, ended=[True, False]) == {
        "own_rules:questions": [2, 0],
        "own_rules:seen": [2 + 500 + 30_000 + 1_000_000, 1 + 100 + 10_000],
    }


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere:rule", "'nowhere:rule' can't be imported: ModuleNotFoundError"),
        ("own_rules:nothing", "'own_rules:nothing' can't be imported: AttributeError"),
    ],
)
def test_a_function_that_is_not_there(own_rules, name, message):
    with pytest.raises(UserError, match=message):
        functions(name)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda completions, **_: [1 / len(text) for text in completions], "'', |''.*ZeroDivisionError"),
        (lambda completions, **_: [1.0] * 5, "on the answer '서울입니다.': returned 5 numbers for 6 answers"),
        (lambda completions, **_: [1.0] * 3 + [float("nan")] * 3, "on the answer 'I see, 네': found nan"),
        (lambda completions, **_: [1.0] * 2 + [float("inf")] * 4, "on the answer '서울이야': found inf"),
        (lambda completions, **_: [None] * 6, "on the answer '서울입니다.': found None"),
        (lambda completions, **_: ["1"] * 6, "on the answer '서울입니다.': found '1'"),
        (lambda completions, **_: 1.0, "on the answer '서울입니다.': TypeError: 'float' object is not iterable"),
    ],
)
def test_a_bad_function_stops_with_its_name_and_the_text(function, message):
    with pytest.raises(UserError, match=f"reward function 'mine'.*({message})"):
        checked("mine", function, ASKED)
    assert checked("mine", lambda completions, **_: torch.arange(6.0), ASKED) == [0, 1, 2, 3, 4, 5]


# --- In a run


RULED = {"reward_functions": ["ended", "length"], "reward_weights": [2.0, -0.5], "target_length": 4}


def test_functions_add_to_the_reward_models_scores(build, monkeypatch):
    """By their weights, before anything is done to scores; each is logged alone."""
    plain, ruled = build(output="plain", **FEW), build(output="ruled", **FEW, **RULED)
    lengths, score = [], ruled.score
    monkeypatch.setattr(ruled, "score", lambda r, plan: lengths.append(r.mask.sum(1).tolist()) or score(r, plan))
    plain.train()
    ruled.train()
    log = logs(ruled)[0]  # of the first update: the policies are the same
    rewards = {name: log[f"rewards/{name}/mean"] for name in ("reward_model", "ended", "length")}
    assert rewards["reward_model"] == pytest.approx(logs(plain)[0]["objective/scores"], abs=1e-6)
    assert rewards["ended"] == log["val/num_eos_tokens"] / 4
    assert rewards["length"] == pytest.approx(-sum(abs(length - 4) / 4 for length in lengths[0]) / 4)
    total = rewards["reward_model"] + 2 * rewards["ended"] - 0.5 * rewards["length"]
    assert log["objective/scores"] == pytest.approx(total, abs=1e-6)
    for length, without, with_rules in zip(lengths[0], samples(plain, 1), samples(ruled, 1), strict=True):
        assert with_rules["response"] == without["response"]
        added = 2 * without["ended"] + 0.5 * abs(length - 4) / 4
        assert with_rules["score"] == pytest.approx(without["score"] + added, abs=1e-5)
    assert not any(key.startswith("rewards/") for key in logs(plain)[0])


def test_what_functions_add_is_normalised_and_clipped_with_the_score(build):
    trainer = build(**FEW, **RULED, score_clip=0.5)
    trainer.train()
    log = logs(trainer)[0]
    earned = log["objective/rlhf_reward"] - log["objective/non_score_reward"]
    clipped = [min(max(sample["score"], -0.5), 0.5) for sample in samples(trainer, 1)]
    assert earned == pytest.approx(sum(clipped) / 4, abs=1e-6)
    assert max(sample["score"] for sample in samples(trainer, 1)) > 0.5


def without_reward_model(folders, value_model):
    models = adapters_apart(folders, value_model)
    return models | {"reward_model": None}


def test_rules_alone_train_a_policy(build, folders):
    """As a reward model would that gives the same scores: none is loaded, and the value head starts at zero."""
    rules = {"reward_functions": ["ended"], "value_model": "shared", "reward_model_path": None}
    alone = build(without_reward_model, output="alone", **FEW, **rules)
    assert alone.reward_model is None
    zero = adapters_apart(folders, "shared")
    zero["reward_model"].base_model.model.score.modules_to_save["default"].weight.data.zero_()
    beside = build(zero, output="beside", **FEW, **rules)
    moved = change(alone)
    assert_same_change(moved, change(beside), tolerance=1e-6)
    assert [log["objective/scores"] for log in logs(alone)] == [log["objective/scores"] for log in logs(beside)]
    assert "rewards/reward_model/mean" not in logs(alone)[0]
    alone.save_model()
    assert (output_of(alone) / ADAPTER).is_file()


def test_a_run_by_rules_goes_on_bit_for_bit(build):
    settings = FEW | {"reward_functions": ["ended", "repetition"], "value_model": "shared", "reward_model_path": None}
    saving = {"save_strategy": "steps", "save_steps": 1}
    whole = build(without_reward_model, output="whole", **settings, **saving)
    whole.train()
    again = build(without_reward_model, output="whole", **settings)
    again.train(resume_from_checkpoint=str(output_of(whole) / "checkpoint-1"))
    for name, weight in trained(whole).items():
        assert torch.equal(trained(again)[name], weight), name
    assert logs(again)[1:] == logs(whole)[1:]


def test_nothing_to_learn_from(build):
    with pytest.raises(UserError, match="there is nothing to learn from"):
        build(without_reward_model, **FEW, value_model="shared")


def test_answers_are_printed_with_what_rules_give(build, capsys):
    rules = {"reward_functions": ["length"], "reward_weights": [3.0], "target_length": 100, "value_model": "shared"}
    trainer = build(without_reward_model, **FEW, **rules, reward_model_path=None, eval_dataset=None)
    trainer.eval_dataset = trainer.train_dataset.select(range(2))
    trainer.generate_completions()
    printed = capsys.readouterr().out
    lengths = {f"{3 * (n - 100) / 100:.2f}" for n in range(1, LENGTH + 1)}
    assert sum(any(f" {score} " in line for score in lengths) for line in printed.splitlines()) == 2
