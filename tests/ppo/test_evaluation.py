"""Evaluations of a PPO run: their numbers by hand, what they leave as it was, and the checkpoint that they keep."""

import json
import shutil

from kochat_trl.errors import UserError
from kochat_trl.ppo import evaluation
from tests.ppo.helpers import (
    EOS,
    LENGTH,
    ROWS,
    adapters_apart,
    logs,
    on_one_backbone,
    output_of,
    prompts,
    trained,
    whole_models,
)

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import GPT2LMHeadModel, TrainerCallback

HELD_OUT = Dataset.from_dict({"input_ids": prompts(40)["input_ids"][2 * ROWS + 1 :]})
EVERY = {"eval_dataset": HELD_OUT, "eval_strategy": "steps", "eval_steps": 1}
SAVED = {"save_strategy": "steps", "save_steps": 1, "total_episodes": 4 * ROWS}


class Keep(TrainerCallback):
    """The trained weights after each update."""

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.weights.append({n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad})


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(weight, other[name]) for name, weight in one.items())


@torch.no_grad()
def greedy(model, prompt):
    """LENGTH tokens at most, one forward pass over the whole text for each."""
    text = list(prompt)
    while len(text) < len(prompt) + LENGTH and EOS not in text[len(prompt) :]:
        text.append(int(model(input_ids=torch.tensor([text])).logits[0, -1].argmax()))
    return text[len(prompt) :]


@torch.no_grad()
def by_hand(policy, reward, penalty=0.0):
    """The three means over the held-out prompts, a row at a time, without padding."""
    responses = [greedy(policy, prompt) for prompt in HELD_OUT["input_ids"]]
    scores = []
    for prompt, response in zip(HELD_OUT["input_ids"], responses, strict=True):
        ids = torch.tensor([prompt + response])
        score = reward(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.item()
        scores.append(score - penalty * (response[-1] != EOS))
    ended = [response[-1] == EOS for response in responses]
    values = {"eval_score": scores, "eval_length": [len(response) for response in responses], "eval_ended": ended}
    return {name: sum(each) / len(each) for name, each in values.items()}


def test_numbers_by_hand(build, folders):
    rows = {"per_device_eval_batch_size": 3, "local_rollout_forward_batch_size": 4}
    trainer = build(missing_eos_penalty=1.5, eval_on_start=True, **EVERY, **rows)
    reward = adapters_apart(folders)["reward_model"].eval()
    start = PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained(folders.base), folders.sft).eval()
    trainer.train()
    trainer.save_model()
    end = PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained(folders.base), output_of(trainer)).eval()
    found = [entry for entry in logs(trainer) if "eval_score" in entry]
    assert [entry["step"] for entry in found] == [0, 1, 2, 3]
    for policy, entry in ((start, found[0]), (end, found[-1])):
        expected = by_hand(policy, reward, 1.5)
        assert {name: entry[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert found[0]["eval_score"] != pytest.approx(found[-1]["eval_score"], rel=0.1)
    assert 0 < found[0]["eval_ended"] < 1
    assert len(HELD_OUT) % 12  # batches that aren't full


def test_whole_models_in_float64(build, folders):
    models = whole_models(folders)
    expected = by_hand(models["model"].eval(), models["reward_model"].eval())
    trainer = build(whole_models, **EVERY)
    found = trainer.evaluate()
    assert found["eval_score"] == pytest.approx(expected["eval_score"], rel=1e-12)
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-6)
    other = trainer.evaluate(HELD_OUT.select([0]), metric_key_prefix="one")
    assert other["one_length"] == len(greedy(models["model"], HELD_OUT[0]["input_ids"]))
    with pytest.raises(UserError, match="no prompts to evaluate on"):
        build(whole_models).evaluate()


def test_reward_functions_count_and_are_told_alone(build, folders):
    models = whole_models(folders)
    expected = by_hand(models["model"].eval(), models["reward_model"].eval())
    rules = {"reward_functions": ["ended", "length"], "reward_weights": [2.0, 0.0], "target_length": 3}
    trainer = build(whole_models, **rules, metric_for_best_model="eval_rewards/length/mean", **EVERY)
    found = trainer.evaluate()
    assert found["eval_rewards/reward_model/mean"] == pytest.approx(expected["eval_score"], rel=1e-12)
    assert found["eval_rewards/ended/mean"] == pytest.approx(expected["eval_ended"])
    lengths = [len(greedy(models["model"], prompt)) for prompt in HELD_OUT["input_ids"]]
    assert found["eval_rewards/length/mean"] == pytest.approx(-sum(abs(n - 3) / 3 for n in lengths) / len(lengths))
    assert found["eval_score"] == pytest.approx(expected["eval_score"] + 2 * expected["eval_ended"])
    trainer.roles.reward = None
    alone = trainer.evaluate()
    assert alone["eval_score"] == pytest.approx(2 * expected["eval_ended"])
    assert "eval_rewards/reward_model/mean" not in alone


@pytest.mark.parametrize(
    ("models", "settings"),
    [
        (on_one_backbone, {"value_model": "shared", "gradient_checkpointing": True}),
        (adapters_apart, {"advantages": "grpo", "num_generations": 2}),
    ],
)
def test_a_run_is_the_same_without(build, models, settings):
    settings |= {"normalize_scores": True, "kl_target": 0.5}
    without = build(models, output="without", **settings)
    watched = build(models, **settings, **EVERY, eval_on_start=True)
    random = torch.get_rng_state()
    for trainer in (without, watched):
        torch.set_rng_state(random)
        trainer.train()
    assert len(logs(watched)) == 2 * len(logs(without)) + 1 == 7
    assert [entry for entry in logs(watched) if "eval_score" not in entry] == logs(without)
    assert same(trained(watched), trained(without))
    assert torch.equal(torch.get_rng_state(), random)
    files = [(output_of(trainer) / "samples.jsonl").read_bytes() for trainer in (watched, without)]
    assert files[0] == files[1] != b""


def scripted(monkeypatch, *scores):
    """Evaluations that say so, one after another."""
    left = iter(scores)
    monkeypatch.setattr(evaluation, "evaluate", lambda *_: {"eval_score": next(left), "eval_length": 1.0})


@pytest.mark.parametrize(
    ("settings", "limit", "best", "kept"),
    [
        ({}, 1, 2, {2, 4}),
        ({"greater_is_better": False}, 2, 3, {3, 4}),
        ({"metric_for_best_model": "length"}, 2, 1, {1, 4}),  # the first of equals
    ],
)
def test_the_best_checkpoint_is_kept(build, monkeypatch, settings, limit, best, kept):
    scripted(monkeypatch, 0.1, 0.9, -0.3, 0.2)
    keep = Keep()
    trainer = build(**EVERY, **SAVED, **settings, load_best_model_at_end=True, save_total_limit=limit, callbacks=[keep])
    trainer.train()
    assert same(trained(trainer), keep.weights[best - 1])
    assert not same(trained(trainer), keep.weights[-1])
    assert {int(path.name[11:]) for path in output_of(trainer).glob("checkpoint-*")} == kept
    state = json.loads((output_of(trainer) / "checkpoint-4/trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(output_of(trainer) / f"checkpoint-{best}")
    assert (state["best_global_step"], trainer.state.best_global_step) == (best, best)


def test_only_what_is_saved_can_be_the_best(build, monkeypatch):
    scripted(monkeypatch, 0.9, 0.1, 0.8, 0.0)
    keep = Keep()
    trainer = build(**EVERY, **SAVED | {"save_steps": 2}, load_best_model_at_end=True, callbacks=[keep])
    trainer.train()
    assert (trainer.state.best_global_step, trainer.state.best_metric) == (2, 0.1)
    assert same(trained(trainer), keep.weights[1])


def test_without_it_the_last_policy_stays(build, monkeypatch):
    scripted(monkeypatch, 0.9, 0.5, 0.3, 0.2)
    keep = Keep()
    trainer = build(**EVERY, **SAVED, metric_for_best_model="eval_score", save_total_limit=2, callbacks=[keep])
    trainer.train()
    assert trainer.state.best_global_step == 1
    assert same(trained(trainer), keep.weights[-1])


class Stopped(Exception):
    """Stands for a kill."""


class StopAfter(TrainerCallback):
    def on_evaluate(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise Stopped


def test_resume_is_the_unbroken_run_bit_for_bit(build, tmp_path):
    """In another folder, too, which the best checkpoint was moved to."""
    settings = {**EVERY, **SAVED, "load_best_model_at_end": True, "optim": "adamw_torch", "learning_rate": 1e-2}
    settings |= {"eval_on_start": True, "normalize_scores": True, "save_total_limit": 2}
    unbroken = build(output="unbroken", **settings)
    unbroken.train()
    with pytest.raises(Stopped):
        build(output="broken", **settings, callbacks=[StopAfter()]).train()
    shutil.move(tmp_path / "broken", tmp_path / "moved")
    resumed = build(output="moved", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert logs(resumed) == logs(unbroken)
    assert sum("eval_score" in entry for entry in logs(resumed)) == 5
    assert same(trained(resumed), trained(unbroken))
    for name in ("best_global_step", "best_metric"):
        assert getattr(resumed.state, name) == getattr(unbroken.state, name) is not None


def test_a_best_checkpoint_that_is_gone(build, monkeypatch):
    scripted(monkeypatch, 0.9, 0.1, 0.1)
    settings = {**EVERY, **SAVED, "load_best_model_at_end": True}
    with pytest.raises(Stopped):
        build(**settings, callbacks=[StopAfter()]).train()
    resumed = build(**settings)
    shutil.rmtree(output_of(resumed) / "checkpoint-1")
    with pytest.raises(UserError, match=r"checkpoint-2: checkpoint-1, the best so far, is gone"):
        resumed.train(resume_from_checkpoint=True)
