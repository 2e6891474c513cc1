"""The first step on a rollout learns from the passes that scored it: bit for bit what it learns from others."""

from kochat_trl.ppo import step as step_module
from kochat_trl.ppo.roles import one_backbone
from kochat_trl.ppo.trainer import PPOTrainer
from tests.ppo.helpers import ROWS, adapters_apart, logs, on_one_backbone, whole_models
from tests.ppo.role_helpers import INT8

import pytest
import torch
from transformers import GPT2LMHeadModel

RLOO = {"advantages": "rloo", "num_generations": 4}
GRPO = {"advantages": "grpo", "num_generations": 4, "kl_coef": 0.2}


def on_int8(folders, value_model="adapter"):
    backbone = GPT2LMHeadModel.from_pretrained(folders.base, quantization_config=INT8)
    roles = one_backbone(backbone, str(folders.sft), str(folders.reward), value_model)
    return {"model": roles, "ref_model": None, "reward_model": None}


def nothing_kept(monkeypatch):
    score = PPOTrainer.score

    def forgetful(*arguments):
        trajectory = score(*arguments)
        trajectory.kept = None
        return trajectory

    monkeypatch.setattr(PPOTrainer, "score", forgetful)


@pytest.fixture
def learnt(build, monkeypatch):
    """Of a run that keeps the passes of scoring, and of one that doesn't: trainer, and how often each role ran."""

    def both(models, **settings):
        found = []
        for output in ("kept", "again"):
            passes = []

            def counted(forward, passes=passes):
                return lambda role, *rest: passes.append(role) or forward(role, *rest)

            with monkeypatch.context() as patch:
                for name in ("forward_policy", "forward_value"):
                    patch.setattr(step_module, name, counted(getattr(step_module, name)))
                if output == "again":
                    nothing_kept(patch)
                trainer = build(models, output=output, **settings)
                trainer.train()
            found.append((trainer, passes))
        return found

    return both


@pytest.mark.parametrize(
    ("models", "settings"),
    [
        (on_one_backbone, {}),
        (on_one_backbone, {"value_model": "shared"}),
        (on_one_backbone, {"num_ppo_epochs": 1, "num_mini_batches": 1}),
        (on_one_backbone, {"gradient_checkpointing": True}),
        (on_one_backbone, {"gradient_checkpointing": True, "value_model": "shared", "num_mini_batches": 4}),
        (on_one_backbone, {"bf16": True}),
        (on_one_backbone, {"bf16": True, "value_model": "shared"}),
        (on_one_backbone, {"score_after_eos": True, "num_ppo_epochs": 3}),
        (on_one_backbone, RLOO),
        (on_one_backbone, GRPO),
        (adapters_apart, {}),
        (whole_models, {}),
        (whole_models, {"value_model": "shared", "bf16": True}),
        (on_int8, {}),
        (on_int8, {"value_model": "shared"}),
    ],
    ids=lambda part: getattr(part, "__name__", str(part)),
)
def test_the_first_step_learns_from_the_passes_that_scored(learnt, models, settings):
    (kept, passes), (again, more) = learnt(models, **settings)
    without_time = [
        [{k: v for k, v in log.items() if k != "eps"} for log in logs(trainer)] for trainer in (kept, again)
    ]
    assert without_time[0] == without_time[1]
    assert len(without_time[0]) == 3
    for ours, theirs in zip(kept.trainable, again.trainable, strict=True):
        assert torch.equal(ours, theirs)
    for role, other in zip((kept.roles.policy, kept.roles.value), (again.roles.policy, again.roles.value), strict=True):
        assert role is None or more.count(other) - passes.count(role) == 3  # one an update


@pytest.mark.parametrize("value_model", ["adapter", "shared"])
@pytest.mark.parametrize(("size", "mini_batches", "kept"), [(8, 1, True), (8, 2, True), (4, 1, False), (4, 2, True)])
def test_a_first_mini_batch_of_several_passes_is_not_kept(build, value_model, size, mini_batches, kept):
    """Their graphs would all be held at once."""
    more = {"per_device_train_batch_size": size, "gradient_accumulation_steps": ROWS // size}
    trainer = build(value_model=value_model, num_mini_batches=mini_batches, **more)
    rollout = trainer.sample(0, list(range(trainer.args.batch_size)))
    plan = rollout.plan(trainer.args.mini_batch_size, trainer.args.micro_batch_size, 0, 0, 0)
    trajectory = trainer.score(rollout, plan)
    assert (trajectory.kept is not None) == kept
    if kept:
        assert trajectory.kept.policy.logprobs.equal(trajectory.logprobs[plan[0][0]])
        assert trajectory.kept.values.equal(trajectory.values[plan[0][0]])
        trajectory.advantages = trajectory.returns = torch.zeros(rollout.mask.shape)
        trainer.step(0, rollout, plan[0], trajectory, first=True)
        assert trajectory.kept is None
    assert not trajectory.logprobs.requires_grad
    assert not trajectory.values.requires_grad
