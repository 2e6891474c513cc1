"""A run that goes on from a checkpoint is the unbroken run, and what is no checkpoint of it is refused."""

import os
import random
import shutil
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from kochat_trl.checkpoints import seal
from kochat_trl.errors import UserError
from kochat_trl.ppo.checkpoint import drop_old_checkpoints
from kochat_trl.ppo.trainer import PPOTrainer
from kochat_trl.settings.ppo import PPOConfig
from tests.ppo.helpers import (
    FEW,
    LORA,
    ROWS,
    adapters_apart,
    logs,
    on_one_backbone,
    output_of,
    prompts,
    samples,
    trained,
    whole_models,
)

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2LMHeadModel, TrainerCallback


class Stopped(Exception):
    """Stands for a kill."""


class StopAfter(TrainerCallback):
    def __init__(self, update: int):
        self.update = update

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.update:
            raise Stopped


class Draws(TrainerCallback):
    """A callback that draws from the global generators of the process."""

    def __init__(self) -> None:
        self.drawn: list[tuple[float, ...]] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.drawn.append((torch.rand(1).item(), float(np.random.rand()), random.random()))


ADAPTIVE = {"optim": "adamw_torch", "learning_rate": 1e-2, "lr_scheduler_type": "linear", "kl_target": 0.5}
ADAPTIVE |= {"kl_horizon": 100, "normalize_scores": True, "weight_decay": 0.1, "total_episodes": 4 * ROWS}
ADAPTIVE |= {"save_strategy": "steps", "save_steps": 2}


def interrupted(build: Callable[..., PPOTrainer], models: Any = on_one_backbone, **settings: Any) -> PPOTrainer:
    """A run that was killed in its third update, after `checkpoint-2`."""
    trainer = build(models, **ADAPTIVE | settings, callbacks=[StopAfter(3)])
    with pytest.raises(Stopped):
        trainer.train()
    assert [path.name for path in output_of(trainer).glob("checkpoint-*")] == ["checkpoint-2"]
    assert samples(trainer, 3)
    return trainer


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize(
    ("models", "settings"),
    [
        (on_one_backbone, {"value_model": "adapter"}),
        (on_one_backbone, {"value_model": "shared"}),
        (adapters_apart, {"value_model": "adapter"}),
        (whole_models, {"value_model": "shared"}),
        (on_one_backbone, {"advantages": "rloo", "num_generations": 4}),
        (adapters_apart, {"advantages": "grpo", "num_generations": 2, "kl_estimator": "k3"}),
    ],
)
def test_resume_is_the_unbroken_run_bit_for_bit(build, models, settings, named):
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    draws, later = Draws(), Draws()
    unbroken = build(models, output="unbroken", **settings, **ADAPTIVE, callbacks=[draws])
    state = torch.get_rng_state(), np.random.get_state(), random.getstate()
    unbroken.train()
    torch.set_rng_state(state[0])
    np.random.set_state(state[1])
    random.setstate(state[2])
    broken = build(models, **settings, **ADAPTIVE, callbacks=[Draws(), StopAfter(3)])
    torch.set_rng_state(state[0])
    np.random.set_state(state[1])
    random.setstate(state[2])
    with pytest.raises(Stopped):
        broken.train()
    resumed = build(models, **settings, **ADAPTIVE, callbacks=[later])
    checkpoint = output_of(resumed) / "checkpoint-2"
    resumed.train(resume_from_checkpoint=str(checkpoint) if named else True)

    assert later.drawn == draws.drawn[2:]
    assert logs(resumed) == logs(unbroken)
    assert len(logs(resumed)) == 4
    assert len({log["lr"] for log in logs(resumed)}) == 4
    mine, theirs = dict(resumed.roles.named_parameters()), dict(unbroken.roles.named_parameters())
    assert all(torch.equal(parameter, theirs[name]) for name, parameter in mine.items())
    assert resumed.kl_coef == unbroken.kl_coef != PPOConfig.kl_coef
    assert resumed.score_moments == unbroken.score_moments
    assert resumed.score_moments.count == 4 * ROWS
    found, expected = resumed.optimizer.state_dict()["state"], unbroken.optimizer.state_dict()["state"]
    assert found.keys() == expected.keys() != set()
    for index, state in expected.items():
        assert all(torch.equal(found[index][name], state[name]) for name in ("step", "exp_avg", "exp_avg_sq"))
    assert resumed.lr_scheduler.state_dict() == unbroken.lr_scheduler.state_dict()
    assert resumed.state.episode == unbroken.state.episode == 4 * ROWS
    text = [(output_of(trainer) / "samples.jsonl").read_bytes() for trainer in (resumed, unbroken)]
    assert text[0] == text[1] != b""


def test_a_checkpoint_holds_the_frozen_adapters_too(build):
    """An SFT or reward model that was trained anew in the meantime changes nothing."""
    interrupted(build)
    resumed = build(**ADAPTIVE)
    frozen = [
        p for n, p in resumed.roles.named_parameters() if {"reference", "reward", "reward_head"} & {*n.split(".")}
    ]
    before = [parameter.detach().clone() for parameter in frozen]
    assert len(frozen) > 3
    for parameter in frozen:
        parameter.data.mul_(2)
    resumed.train(resume_from_checkpoint=True)
    assert all(map(torch.equal, frozen, before))


def test_a_finished_run_has_nothing_left_to_do(build):
    build(**ADAPTIVE).train()
    again = build(**ADAPTIVE)
    text = (output_of(again) / "samples.jsonl").read_bytes()
    moved = trained(again)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4
    assert len(logs(again)) == 4
    assert (output_of(again) / "samples.jsonl").read_bytes() == text
    assert any(not torch.equal(weight, moved[name]) for name, weight in trained(again).items())


def test_the_guard_of_a_still_policy_counts_from_the_checkpoint(build):
    interrupted(build)
    longer = build(**ADAPTIVE | {"total_episodes": 8 * ROWS})
    for group in longer.optimizer.param_groups:
        group["params"].clear()
    checkpoint = output_of(longer) / "checkpoint-2"
    training = torch.load(checkpoint / "optimizer.pt")
    for group in training["optimizer"]["param_groups"]:
        group["params"] = []
    torch.save(training | {"optimizer": training["optimizer"] | {"state": {}}}, checkpoint / "optimizer.pt")
    seal(checkpoint)
    with pytest.raises(UserError, match=r"update 5: no weight of the policy has moved"):
        longer.train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"seed": 43}, "seed: 42 then, 43 now"),
        ({"num_ppo_epochs": 1}, "num_ppo_epochs: 2 then, 1 now"),
        ({"num_mini_batches": 4}, "mini_batch_size: 4 then, 2 now"),
        ({"per_device_train_batch_size": 4}, "batch_size: 8 then, 4 now"),
        ({"response_length": 5}, "response_length: 6 then, 5 now"),
        ({"train_dataset": prompts(ROWS)}, "prompts: 16 then, 8 now"),
        ({"num_generations": 2}, "num_generations: 1 then, 2 now"),
        ({"advantages": "rloo", "num_generations": 2}, "advantages: gae then, rloo now"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_checkpoint_of_another_run_is_refused(build, changed, words):
    interrupted(build)
    with pytest.raises(UserError, match=rf"checkpoint-2: is of another run \(.*{words}"):
        build(**ADAPTIVE | changed).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("models", "value_model"), [(on_one_backbone, "shared"), (adapters_apart, "adapter"), (whole_models, "adapter")]
)
def test_a_checkpoint_of_other_models_is_refused(build, models, value_model):
    interrupted(build)
    other = build(models, value_model=value_model, **ADAPTIVE)
    before = trained(other)
    with pytest.raises(UserError, match=r"checkpoint-2: is of other models; its first odd weight is models\."):
        other.train(resume_from_checkpoint=True)
    assert all(torch.equal(weight, before[name]) for name, weight in trained(other).items())


def test_a_checkpoint_of_other_shapes_is_refused(build, folders, tmp_path):
    interrupted(build)
    wider = get_peft_model(
        GPT2LMHeadModel.from_pretrained(folders.base), LoraConfig(**LORA | {"r": 8}, task_type="CAUSAL_LM")
    )
    wider.save_pretrained(tmp_path / "wider")
    paths = SimpleNamespace(**vars(folders) | {"sft": tmp_path / "wider"})
    with pytest.raises(UserError, match="checkpoint-2"):
        build(on_one_backbone(paths), **ADAPTIVE).train(resume_from_checkpoint=True)


def test_no_checkpoint(build, tmp_path):
    (tmp_path / "empty").mkdir()
    for folder in (True, str(tmp_path / "empty"), str(tmp_path / "nowhere")):
        with pytest.raises(UserError, match="no checkpoint of PPO there"):
            build(**ADAPTIVE).train(resume_from_checkpoint=folder)


@pytest.mark.parametrize("missing", ["ppo.json", "trainer_state.json"])
def test_an_unfinished_checkpoint_is_ignored(build, missing):
    broken = interrupted(build)
    unfinished = output_of(broken) / "checkpoint-4.unfinished"
    shutil.copytree(output_of(broken) / "checkpoint-2", unfinished)
    (unfinished / missing).unlink()
    (unfinished / "stale").touch()
    with pytest.raises(UserError):
        build(**ADAPTIVE).train(resume_from_checkpoint=str(unfinished))
    resumed = build(**ADAPTIVE, save_total_limit=5)
    resumed.train(resume_from_checkpoint=True)
    assert [log["episode"] for log in logs(resumed)] == [8, 16, 24, 32]
    assert {path.name for path in output_of(resumed).glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    assert not (output_of(resumed) / "checkpoint-4/stale").exists()


def test_an_old_checkpoint_is_set_aside(build, tmp_path):
    old = tmp_path / "output/checkpoint-2"
    old.mkdir(parents=True)
    (old / "kept").write_text("as it was")
    trainer = build(**ADAPTIVE)
    trainer.train()
    assert (tmp_path / "output/checkpoint-2-1/kept").read_text() == "as it was"
    assert (old / "weights.safetensors").is_file()
    assert not (old / "kept").exists()


def test_save_total_limit_keeps_the_newest(build):
    settings = {**FEW, "total_episodes": 44, "save_strategy": "steps", "save_steps": 1}
    trainer = build(**settings, save_total_limit=2)
    trainer.train()
    assert {path.name for path in output_of(trainer).glob("checkpoint-*")} == {"checkpoint-10", "checkpoint-11"}
    every = build(output="every", **settings)
    every.train()
    assert len(list(output_of(every).glob("checkpoint-*"))) == 11


def test_rotation_never_drops_the_newest(tmp_path):
    """A run resumed at 5 beside a stale checkpoint-10 writes checkpoint-6."""
    for age, step in enumerate((6, 5, 10)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        os.utime(tmp_path / f"checkpoint-{step}", (1000 - age, 1000 - age))
    drop_old_checkpoints(tmp_path / "checkpoint-6", None)
    assert len(list(tmp_path.iterdir())) == 3
    drop_old_checkpoints(tmp_path / "checkpoint-6", 2)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-5", "checkpoint-6"}
