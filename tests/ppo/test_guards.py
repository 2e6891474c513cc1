"""What stops a run of PPOTrainer, and what is refused before it starts."""

import math
from types import SimpleNamespace
from typing import Any

from kochat_trl.errors import UserError
from kochat_trl.ppo import trainer as trainer_module
from kochat_trl.ppo.step import add_gradients
from tests.ppo.helpers import (
    EOS,
    LENGTH,
    LORA,
    NEVER,
    ROWS,
    adapters_apart,
    logs,
    on_one_backbone,
    prompts,
    trained,
    whole_models,
)

import pytest
import torch
from peft import LoraConfig


def test_a_broken_reward_model_stops_the_run(build):
    trainer = build()
    trainer.roles.reward.head.weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match=r"update 1: scores of the rollout are not finite.*model on disk is broken"):
        trainer.train()


def test_a_loss_that_is_not_finite_stops_the_run(build):
    with pytest.raises(UserError, match=r"update 1: the loss is not finite.*lower the learning rate"):
        build(learning_rate=1e30).train()


def test_a_gradient_that_is_not_finite_stops_the_run(build):
    """The loss may still be finite; a step would leave NaN in every weight."""
    trainer = build()
    before = trained(trainer)
    trainer.trainable[0].register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(UserError, match="update 1: a gradient is not finite"):
        trainer.train()
    assert all(torch.equal(weight, before[name]) for name, weight in trained(trainer).items())


def test_the_first_steps_distance_is_the_largest_of_its_micro_batches(build, monkeypatch):
    """Each is just inside the tolerance; their sum is not."""
    monkeypatch.setattr(trainer_module, "add_gradients", lambda *args: (add_gradients(*args)[0], torch.tensor(0.9e-5)))
    build(per_device_train_batch_size=2, gradient_accumulation_steps=4, total_episodes=ROWS).train()


def test_kl_limit(build):
    settings = {"kl_estimator": "k3", "total_episodes": 2 * ROWS}  # k3 is never negative
    free = build(output="free", **settings)
    free.train()
    first, second = (log["objective/kl"] for log in logs(free))
    assert first < 1e-6 < second
    build(output="below", kl_limit=1.01 * second, **settings).train()
    words = f"update 2: the KL from the reference is {second:.1f} nats a response, beyond kl_limit"
    with pytest.raises(UserError, match=words):
        build(output="beyond", kl_limit=0.99 * second, **settings).train()


def test_a_policy_that_does_not_move_stops_the_run(build):
    trainer = build(learning_rate=0.0, total_episodes=5 * ROWS)
    with pytest.raises(UserError, match=r"update 3: no weight of the policy has moved in 3 updates"):
        trainer.train()


def test_a_value_that_moves_does_not_hide_a_policy_that_does_not(build):
    trainer = build(total_episodes=5 * ROWS)
    value = {id(p) for name, p in trainer.roles.named_parameters() if "value" in name.split(".")}
    for group in trainer.optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) in value]
    assert any(group["params"] for group in trainer.optimizer.param_groups)
    with pytest.raises(UserError, match=r"update 3: no weight of the policy has moved in 3 updates"):
        trainer.train()


@pytest.mark.parametrize("stop", [{"stop_token": None, "stop_token_id": NEVER}, {"stop_token": None}])
def test_responses_that_never_end(build, stop):
    trainer = build(guard_updates=2, **stop)
    if "stop_token_id" not in stop:  # none is asked for
        trainer.train()
        assert all(log["objective/response_tokens"] == LENGTH for log in logs(trainer))
        return
    with pytest.raises(UserError, match=r"update 2: not one response ended itself in 2 updates"):
        trainer.train()


def test_a_response_that_ends_resets_the_guard(build, monkeypatch):
    updates = iter(range(10))

    def sample(policy, prompts, *unused):
        ends = next(updates) == 1
        return [[7, 8, EOS] if ends and row == 0 else [7 + row] * LENGTH for row, _ in enumerate(prompts)]

    monkeypatch.setattr(trainer_module, "sample_responses", sample)
    with pytest.raises(UserError, match=r"update 4: not one response ended itself in 2 updates"):
        build(guard_updates=2, total_episodes=8 * ROWS).train()


def test_log_probabilities_that_differ_between_rollout_and_step(build):
    # The first step on two passes: of one, it is the pass of the rollout.
    trainer = build(adapters_apart, gradient_accumulation_steps=2, num_mini_batches=1, total_episodes=2 * ROWS)

    def add_noise(module, args, output):
        output.last_hidden_state = output.last_hidden_state + 0.01 * torch.randn_like(output.last_hidden_state)
        return output

    trainer.roles.policy.backbone.register_forward_hook(add_noise)
    before = trained(trainer)
    with pytest.raises(UserError, match=r"update 1: the policy's log-probabilities in the first step and in the"):
        trainer.train()
    assert all(torch.equal(weight, before[name]) for name, weight in trained(trainer).items())  # nothing was learnt


@pytest.mark.parametrize("models", [on_one_backbone, whole_models])
def test_a_reference_that_is_not_the_start(build, folders, models):
    made = models(folders)
    made["ref_model"] = None
    trainer = build(made)
    role = trainer.roles.reference
    weight = next(p for n, p in role.backbone.named_parameters() if role.adapter is None or f"B.{role.adapter}" in n)
    weight.data.mul_(1.5)
    with pytest.raises(UserError, match=r"update 1: log-probabilities of policy and reference differ by up to"):
        trainer.train()


def test_a_reference_of_its_own_may_differ(build):
    trainer = build(whole_models, kl_estimator="k3")
    trainer.train()
    assert logs(trainer)[0]["objective/kl"] > 1e-3


def capped(folders: SimpleNamespace) -> dict[str, Any]:
    made = adapters_apart(folders)
    made["model"].register_forward_hook(lambda module, args, output: setattr(output, "logits", output.logits.tanh()))
    return made


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train_dataset": prompts(ROWS - 1)}, "7 prompts are fewer than one rollout of 8"),
        ({"num_mini_batches": 3}, "a rollout of 8 responses .* doesn't divide into 3 mini-batches"),
        ({"response_length": 28}, "the longest prompt and response_length make 33 tokens, and the model has 32"),
        ({"temperature": 0.0}, "temperature: found 0.0, expected above 0"),
        ({"stop_token_id": 0}, "stop_token and stop_token_id are both set"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("models", [on_one_backbone, adapters_apart])
def test_refused_before_anything_is_written(build, tmp_path, models, changes, words):
    with pytest.raises(UserError, match=words):
        build(models, **changes)
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    ("change_models", "settings", "words"),
    [
        (lambda m: m | {"ref_model": m["model"]}, {}, "`model` and `ref_model` are one object"),
        (lambda m: m | {"value_model": None}, {}, "give `value_model`, or set `value_model: shared`"),
        (lambda m: m, {"value_model": "shared"}, "give `value_model`, or set `value_model: shared` .* not both"),
        (lambda m: m, {"peft_config": LoraConfig(**LORA)}, "`model` has an adapter already"),
        (lambda m: m | {"model": m["reward_model"]}, {}, "no head over the vocabulary"),
        (lambda m: m | {"reward_model": m["ref_model"]}, {}, "no `score` head"),
    ],
)
def test_models_that_are_refused(build, folders, tmp_path, change_models, settings, words):
    with pytest.raises(UserError, match=words):
        build(change_models(adapters_apart(folders)), **settings)
    assert not (tmp_path / "output").exists()


def test_a_policy_that_can_not_be_trained_is_refused(build, folders):
    made = adapters_apart(folders)
    made["model"].requires_grad_(False)
    with pytest.raises(UserError, match="no weight of the policy can be trained"):
        build(made)


def test_logits_that_change_after_the_head_are_refused(build, folders):
    with pytest.raises(UserError, match="does something to its logits that is not known here"):
        build(capped(folders))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stop_token": None, "missing_eos_penalty": 1.0}, "no response can end itself without a stop token"),
        ({"save_strategy": "epoch"}, "save_strategy: found epoch, expected no or steps"),
        ({"kl_estimator": "kl3"}, "kl_estimator: found 'kl3'"),
        ({"kl_target": 0.0}, "kl_target: found 0.0"),
        ({"total_episodes": 0}, "total_episodes: found 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_would_not_be_obeyed_are_refused(build, tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        build(**settings)
    assert not (tmp_path / "output").exists()
