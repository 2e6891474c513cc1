"""RLOO and GRPO in the trainer: several responses to a prompt, and no value function anywhere."""

from kochat_trl.errors import UserError
from kochat_trl.ppo import trainer as trainer_module
from kochat_trl.ppo.rollout import draw_prompts
from tests.ppo.helpers import (
    ADAPTER,
    LENGTH,
    ROWS,
    adapters_apart,
    assert_same_change,
    assert_same_logs,
    change,
    logs,
    on_one_backbone,
    output_of,
    prompts,
    saved_change,
    whole_models,
)

import pytest
import torch
from safetensors.torch import load_file

GROUP = 4
RLOO = {"advantages": "rloo", "num_generations": GROUP}
GRPO = {"advantages": "grpo", "num_generations": GROUP, "kl_estimator": "k3"}
methods = pytest.mark.parametrize("method", [RLOO, GRPO], ids=["rloo", "grpo"])


@methods
def test_one_backbone_learns_as_separate_models_do(build, folders, method):
    apart = build(adapters_apart, output="apart", **method)
    together = build(on_one_backbone, output="together", **method)
    for trainer in (apart, together):
        trainer.train()
        assert logs(trainer)[0]["objective/kl"] == pytest.approx(0, abs=1e-5)
        assert logs(trainer)[2]["objective/kl"] != pytest.approx(0, abs=1e-4)
    assert_same_logs(together, apart)
    moved = saved_change(together, folders)
    assert_same_change(moved, saved_change(apart, folders))
    assert {name.split("/")[0] for name in moved} == {ADAPTER}


@methods
@pytest.mark.parametrize("models", [on_one_backbone, adapters_apart, whole_models])
def test_there_is_no_value_function(build, models, method):
    trainer = build(models, save_strategy="steps", save_steps=3, gradient_checkpointing=True, **method)
    assert trainer.roles.value is None
    assert trainer.value_model is None
    names = {part for name, _ in trainer.roles.named_parameters() for part in name.split(".")}
    assert not names & {"value", "value_head"}
    trainer.train()
    trainer.save_model()
    assert not (output_of(trainer) / "value").exists()
    assert not any("value" in name for name in load_file(output_of(trainer) / "checkpoint-3/weights.safetensors"))
    assert len(logs(trainer)) == 3
    assert not {"loss/value_avg", "val/clipfrac_avg"} & logs(trainer)[0].keys()
    assert {"loss/policy_avg", "val/ratio"} <= logs(trainer)[0].keys()
    trained = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
    assert trained == {id(parameter) for parameter in trainer._policy_parameters() if parameter.requires_grad}


def test_a_value_model_is_refused(build, folders):
    given = whole_models(folders)
    with pytest.raises(UserError, match="`value_model` is given, and advantages: rloo has no use for one"):
        build(given, **RLOO)
    with pytest.raises(UserError, match="the roles have a value function, and advantages is rloo"):
        build(on_one_backbone(folders), **RLOO)
    with pytest.raises(UserError, match="the roles have no value function, and advantages is gae"):
        build(on_one_backbone(folders, None))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"scale_rewards": True}, "scale_rewards: found 'True', expected group or none"),
        ({"loss_type": "bnpo"}, "loss_type: found 'bnpo', expected grpo, dapo or dr_grpo"),
        ({"advantages": "reinforce"}, "advantages: found 'reinforce', expected gae, rloo or grpo"),
        ({"kl_estimator": "k4"}, "kl_estimator: found 'k4', expected k1, k2 or k3"),
    ],
)
def test_what_a_script_may_set_and_is_not_known(build, settings, words):
    with pytest.raises(UserError, match=words):
        build(whole_models, **GRPO | settings)


@pytest.mark.parametrize("advantages", ["gae", "rloo"])
def test_each_prompt_is_answered_several_times(build, monkeypatch, advantages):
    asked = []
    sample = trainer_module.sample_responses

    def recorded(policy, prompts, seeds, *rest):
        asked.append((prompts, seeds, sample(policy, prompts, seeds, *rest)))
        return asked[-1][2]

    monkeypatch.setattr(trainer_module, "sample_responses", recorded)
    build(**{"gae": {"num_generations": GROUP}, "rloo": RLOO}[advantages]).train()
    data, seen = prompts(), set()
    for update, (texts, seeds, responses) in enumerate(asked):
        drawn = draw_prompts(len(data), ROWS // GROUP, 42, update)
        assert texts == [data[i]["input_ids"] for i in drawn for _ in range(GROUP)]
        seen |= set(seeds)
        assert all(len({tuple(x) for x in responses[i : i + GROUP]}) > 1 for i in range(0, ROWS, GROUP))
    assert len(asked) == 3
    assert len(seen) == 3 * ROWS


def test_passes_are_counted_in_responses(build):
    trainer = build(**RLOO | {"total_episodes": None, "num_train_epochs": 0.5})
    assert trainer.args.total_episodes == GROUP * len(prompts()) // 2
    trainer.train()
    assert trainer.state.global_step == GROUP
    assert trainer.state.epoch == trainer.state.num_train_epochs == 0.5
    with pytest.raises(UserError, match="1 prompts are fewer than one rollout of 2"):
        build(**RLOO, train_dataset=prompts(1))
    assert build(**RLOO, train_dataset=prompts(2)).args.num_total_batches == 3


@pytest.mark.parametrize("method", [RLOO, *(GRPO | {"loss_type": kind} for kind in ("grpo", "dapo", "dr_grpo"))])
def test_micro_batches_make_no_difference(build, method):
    whole = build(whole_models, output="whole", **method)
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": ROWS // 2}
    parts = build(whole_models, output="parts", **method, **settings)
    expected, moved = change(whole), change(parts)
    assert {log["objective/response_tokens"] for log in logs(whole)} != {LENGTH}  # ragged
    assert_same_change(moved, expected, 1e-6)
    assert_same_logs(parts, whole, 1e-6)


@methods
def test_an_adaptive_coefficient_is_in_force(build, method):
    """In the reward or in the loss, it is the one that follows kl_target."""
    runs = [build(whole_models, output=str(n), **method, **more) for n, more in enumerate(({}, {"kl_target": 0.1}))]
    fixed, adaptive = (change(trainer) for trainer in runs)
    assert logs(runs[0])[0]["loss/policy_avg"] == logs(runs[1])[0]["loss/policy_avg"]
    assert logs(runs[1])[1]["objective/kl_coef"] > logs(runs[1])[0]["objective/kl_coef"]
    assert any(not torch.equal(fixed[name], adaptive[name]) for name in fixed)
