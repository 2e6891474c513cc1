"""PPOTrainer on tiny random models: same updates however it is set up, guards, checkpoints, and TRL's interface."""

import dataclasses
import inspect
import json
import math
import os
import random
import re
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from kochat_trl.errors import UserError
from kochat_trl.models.heads import has_score_head
from kochat_trl.ppo import objective
from kochat_trl.ppo import trainer as trainer_module
from kochat_trl.ppo.checkpoint import drop_old_checkpoints
from kochat_trl.ppo.roles import HEAD, one_backbone, switch_dropout_off
from kochat_trl.ppo.step import add_gradients
from kochat_trl.ppo.trainer import PPOTrainer
from kochat_trl.settings.ppo import PPOConfig

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    DataCollatorWithPadding,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

VOCAB, EOS, PAD = 40, 1, 3
ROWS, LENGTH = 8, 6
NEVER = 1000  # the id of a token that no model here has
TRAINER_ARGUMENTS = {*inspect.signature(PPOTrainer).parameters} - {"value_model"}  # which is a setting too
ADAPTER = "adapter_model.safetensors"
VALUE = "value/adapter_model.safetensors"
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}


def tokenizer(pad: str = f"w{PAD}") -> PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(VOCAB)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words)), eos_token=f"w{EOS}", pad_token=pad, padding_side="left"
    )


def prompts(count: int = 2 * ROWS) -> Dataset:
    rng = np.random.default_rng(0)
    return Dataset.from_dict({"input_ids": [rng.integers(4, VOCAB, 2 + i % 4).tolist() for i in range(count)]})


def nudge(model: torch.nn.Module, seed: int, by: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * by)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A base that ends about every tenth token, and an SFT and a reward adapter on it."""
    folder = tmp_path_factory.mktemp("models")
    paths = SimpleNamespace(base=folder / "base", sft=folder / "sft", reward=folder / "reward")
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=32))
    base.config.pad_token_id = PAD
    nudge(base, 0, 0.1)
    with torch.no_grad():
        end = base.lm_head.weight[EOS]
        base.transformer.ln_f.bias.add_(1.3 * end / end.square().sum())
    base.save_pretrained(paths.base)
    tokenizer().save_pretrained(paths.base)
    sft = get_peft_model(GPT2LMHeadModel.from_pretrained(paths.base), LoraConfig(**LORA, task_type="CAUSAL_LM"))
    nudge(sft, 1, 0.1)
    sft.save_pretrained(paths.sft)
    reward = get_peft_model(classifier(paths), LoraConfig(**LORA, task_type="SEQ_CLS"))
    nudge(reward, 2, 0.2)
    reward.save_pretrained(paths.reward)
    return paths


def classifier(folders: SimpleNamespace) -> GPT2ForSequenceClassification:
    model = GPT2ForSequenceClassification.from_pretrained(folders.base, num_labels=1)
    model.score.weight.data = torch.randn(1, 16, generator=torch.Generator().manual_seed(0)) * 0.02
    return model


def adapters_apart(folders: SimpleNamespace, value_model: str = "adapter") -> dict[str, Any]:
    """Four PEFT models, each loaded alone, as arguments of the trainer."""

    def load(model: Any, adapter: Path, trained: bool = False) -> PeftModel:
        return PeftModel.from_pretrained(model, adapter, is_trainable=trained)

    return {
        "model": load(GPT2LMHeadModel.from_pretrained(folders.base), folders.sft, True),
        "ref_model": load(GPT2LMHeadModel.from_pretrained(folders.base), folders.sft),
        "reward_model": load(classifier(folders), folders.reward),
        "value_model": load(classifier(folders), folders.reward, True) if value_model == "adapter" else None,
    }


def on_one_backbone(folders: SimpleNamespace, value_model: str = "adapter") -> dict[str, Any]:
    backbone = GPT2LMHeadModel.from_pretrained(folders.base)
    roles = one_backbone(backbone, str(folders.sft), str(folders.reward), value_model)
    return {"model": roles, "ref_model": None, "reward_model": None}


def whole_models(folders: SimpleNamespace, value_model: str = "adapter") -> dict[str, Any]:
    """Models without adapters, in float64, and a reference that the policy is apart from."""
    made: dict[str, Any] = {"model": GPT2LMHeadModel.from_pretrained(folders.base)}
    made["ref_model"] = GPT2LMHeadModel.from_pretrained(folders.base)
    made |= {name: classifier(folders) for name in ("reward_model", "value_model")}
    for seed, model in enumerate(made.values()):
        nudge(model, seed + 3, 0.05)
        model.double()
    if value_model == "shared":
        made["value_model"] = None
    return made


@pytest.fixture
def build(folders: SimpleNamespace, tmp_path: Path) -> Callable[..., PPOTrainer]:
    """A trainer of `models` (one of the three functions above, or its result) with an output folder of its own."""

    def build_trainer(models: Any = on_one_backbone, output: str = "output", **settings: Any) -> PPOTrainer:
        values: dict[str, Any] = {"learning_rate": 0.1, "optim": "sgd", "lr_scheduler_type": "constant"}
        values |= {"per_device_train_batch_size": ROWS, "num_mini_batches": 2, "num_ppo_epochs": 2}
        values |= {"total_episodes": 3 * ROWS, "response_length": LENGTH, "stop_token": "eos", "temperature": 1.0}
        values |= {"max_grad_norm": 0.0, "bf16": False, "use_cpu": True, "gradient_checkpointing": False}
        values |= {"num_sample_generations": 0, "disable_tqdm": True, "report_to": "none", "save_strategy": "no"}
        extra = {name: settings.pop(name) for name in [*settings] if name in TRAINER_ARGUMENTS}
        values |= settings
        if callable(models):
            models = models(folders, values.get("value_model", "adapter"))
        arguments = {"processing_class": tokenizer(), "train_dataset": prompts()} | models | extra
        return PPOTrainer(args=PPOConfig(output_dir=str(tmp_path / output), **values), **arguments)

    return build_trainer


def output_of(trainer: PPOTrainer) -> Path:
    return Path(trainer.args.output_dir)


def logs(trainer: PPOTrainer) -> list[dict[str, float]]:
    return [{k: v for k, v in log.items() if k != "eps"} for log in trainer.state.log_history]


def samples(trainer: PPOTrainer, update: int) -> list[dict[str, Any]]:
    lines = (output_of(trainer) / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    return [sample for sample in map(json.loads, lines) if sample["update"] == update]


def trained(trainer: PPOTrainer) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in trainer.roles.named_parameters() if p.requires_grad}


def change(trainer: PPOTrainer) -> dict[str, torch.Tensor]:
    """Train, and return how far each weight moved."""
    before = trained(trainer)
    trainer.train()
    return {name: weight - before[name] for name, weight in trained(trainer).items()}


def saved_change(trainer: PPOTrainer, folders: SimpleNamespace) -> dict[str, torch.Tensor]:
    """How far each weight in the files moved from the two adapters that it started as."""
    trainer.save_model()
    moved = {}
    for file, start in {ADAPTER: folders.sft, VALUE: folders.reward}.items():
        before, after = load_file(start / ADAPTER), load_file(output_of(trainer) / file)
        assert before.keys() == after.keys()
        moved |= {f"{file}/{name}": after[name] - before[name] for name in before}
    return moved


def assert_same_change(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float = 1e-4) -> None:
    assert one.keys() == other.keys()
    largest = max(float(weight.abs().max()) for weight in other.values())
    assert largest > 1e-3
    for name in other:
        assert float((one[name] - other[name]).abs().max()) <= tolerance * largest, name


def assert_same_logs(one: PPOTrainer, other: PPOTrainer, tolerance: float = 1e-4) -> None:
    assert len(logs(one)) == len(logs(other)) > 0
    for mine, theirs in zip(logs(one), logs(other), strict=True):
        assert mine == pytest.approx(theirs, rel=tolerance, abs=tolerance)


# The same updates


@pytest.mark.parametrize("value_model", ["adapter", "shared"])
def test_one_backbone_learns_as_separate_models_do(build, folders, value_model):
    apart = build(adapters_apart, output="apart", value_model=value_model)
    together = build(on_one_backbone, output="together", value_model=value_model)
    for trainer in (apart, together):
        trainer.train()
        assert any(not sample["ended"] for update in (1, 2, 3) for sample in samples(trainer, update))
        assert sum(log["val/num_eos_tokens"] for log in logs(trainer)) > 0
        assert logs(trainer)[0]["objective/kl"] == pytest.approx(0, abs=1e-5)
        assert logs(trainer)[2]["objective/kl"] != pytest.approx(0, abs=1e-4)
    assert_same_logs(together, apart)
    moved, expected = saved_change(together, folders), saved_change(apart, folders)
    assert_same_change(moved, expected)
    for file in (ADAPTER, VALUE):
        assert max(float(w.abs().max()) for name, w in moved.items() if name.startswith(file)) > 1e-3


def test_reference_and_reward_stay_as_they_are(build):
    trainer = build()
    frozen = {n: p.detach().clone() for n, p in trainer.roles.named_parameters() if not p.requires_grad}
    assert {"reference", "reward"} <= {part for name in frozen for part in name.split(".")}
    trainer.train()
    for name, parameter in trainer.roles.named_parameters():
        assert name not in frozen or torch.equal(parameter, frozen[name]), name


@pytest.mark.parametrize("size", [4, 2, 1])
@pytest.mark.parametrize("value_model", ["adapter", "shared"])
def test_micro_batches_make_no_difference(build, size, value_model):
    whole = build(whole_models, output="whole", value_model=value_model)
    settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": ROWS // size}
    parts = build(whole_models, output="parts", value_model=value_model, **settings)
    expected, moved = change(whole), change(parts)
    lengths = {log["objective/response_tokens"] for log in logs(whole)}
    assert lengths != {LENGTH}  # ragged
    assert parts.args.micro_batch_size == size
    assert_same_change(moved, expected, 1e-6)
    assert_same_logs(parts, whole, 1e-6)


@pytest.mark.parametrize("models", [on_one_backbone, adapters_apart, whole_models])
@pytest.mark.parametrize("value_model", ["adapter", "shared"])
def test_gradient_checkpointing_makes_no_difference(build, models, value_model):
    calls, moved, trainers = {}, {}, {}
    for on in (False, True):
        trainer = build(models, output=str(on), gradient_checkpointing=on, value_model=value_model, total_episodes=ROWS)
        calls[on] = {name: 0 for name in ("policy", "value")}
        for name in calls[on]:

            def count(*unused, role=name, on=on):
                calls[on][role] += torch.is_grad_enabled()

            getattr(trainer.roles, name).backbone.h[0].attn.register_forward_pre_hook(count)
        moved[on], trainers[on] = change(trainer), trainer
    assert_same_change(moved[True], moved[False], 1e-5)
    assert_same_logs(trainers[True], trainers[False])
    for name, count in calls[False].items():
        assert calls[True][name] > count > 0  # activations were computed again


@pytest.mark.parametrize("models", [on_one_backbone, adapters_apart, whole_models])
def test_shared_value_learns_with_the_policy(build, models):
    trainer = build(models, value_model="shared")
    moved = change(trainer)
    heads = [weight for name, weight in moved.items() if "value_head" in name]
    assert len(heads) == 1
    assert heads[0].abs().max() > 1e-3
    assert max(float(weight.abs().max()) for name, weight in moved.items() if "value_head" not in name) > 1e-3
    trainer.save_model()
    file = "value/head.safetensors" if models is whole_models else VALUE
    name = "score.weight" if models is whole_models else HEAD
    torch.testing.assert_close(load_file(output_of(trainer) / file)[name].to(heads[0].dtype), heads[0])  # from 0


def test_value_learns_to_predict_the_return(build):
    trainer = build(total_episodes=20 * ROWS, learning_rate=0.05, vf_coef=1.0, cliprange_value=10.0)
    trainer.train()
    losses = [log["loss/value_avg"] for log in logs(trainer)]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_policy_learns_what_is_rewarded(build):
    scores = {}
    for rate in (0.01, 0.5):
        trainer = build(output=str(rate), total_episodes=30 * ROWS, learning_rate=rate, kl_coef=0.0, lam=1.0)
        trainer.train()
        scores[rate] = np.mean([log["objective/scores"] for log in logs(trainer)[15:]])
    assert scores[0.5] > scores[0.01] + 0.1


# Guards


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


def test_a_mini_batch_need_not_divide_into_micro_batches(build):
    one = {"total_episodes": ROWS, "num_ppo_epochs": 1, "num_mini_batches": 1}
    whole = change(build(**one))
    ragged = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_mini_batches": 1}
    trainer = build(output="ragged", **one | ragged)
    trainer.args.micro_batch_size = 3  # 3 + 3 + 2 rows
    for name, weight in change(trainer).items():
        torch.testing.assert_close(weight, whole[name], rtol=0, atol=1e-5)


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
    trainer = build(adapters_apart)

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


# Settings


@pytest.mark.parametrize("models", [on_one_backbone, whole_models])
def test_max_grad_norm(build, models):
    step = {"num_ppo_epochs": 1, "num_mini_batches": 1, "total_episodes": ROWS, "learning_rate": 0.5}
    free = change(build(models, output="free", **step))
    clipped = change(build(models, output="clipped", **step, max_grad_norm=0.02))
    norm = torch.cat([weight.flatten() for weight in free.values()]).norm().item()
    assert norm > 2 * 0.5 * 0.02
    for name, weight in free.items():  # learning rate · max_grad_norm is how far one step of SGD goes
        torch.testing.assert_close(clipped[name], weight * (0.5 * 0.02 / norm), rtol=1e-3, atol=1e-7)


def test_kl_target(build):
    trainer = build(kl_coef=0.3, kl_target=0.5, kl_horizon=100, total_episodes=4 * ROWS)
    trainer.train()
    seen = logs(trainer)
    assert seen[0]["objective/kl_coef"] == 0.3
    assert seen[1]["objective/kl_coef"] == pytest.approx(0.3 * (1 - 0.2 * ROWS / 100))  # a KL of 0
    for now, after in pairwise(seen):
        error = min(max(now["objective/kl"] / 0.5 - 1, -0.2), 0.2)
        assert after["objective/kl_coef"] == pytest.approx(now["objective/kl_coef"] * (1 + error * ROWS / 100))
        assert after["objective/non_score_reward"] == pytest.approx(-after["objective/kl_coef"] * after["objective/kl"])
    fixed = build(output="fixed", kl_coef=0.3)
    fixed.train()
    assert {log["objective/kl_coef"] for log in logs(fixed)} == {0.3}


FEW = {"per_device_train_batch_size": 4, "num_mini_batches": 1, "total_episodes": 12}  # samples.jsonl has all scores


def test_scores_as_they_are(build):
    trainer = build(**FEW)
    trainer.train()
    for update in (1, 2, 3):
        log, seen = logs(trainer)[update - 1], samples(trainer, update)
        assert len(seen) == 4
        assert log["objective/scores"] == pytest.approx(np.mean([s["score"] for s in seen]), rel=1e-5)
        assert log["objective/kl"] == pytest.approx(np.mean([s["kl"] for s in seen]), abs=1e-6)
        assert log["val/num_eos_tokens"] == sum(s["ended"] for s in seen)
        assert log["objective/rlhf_reward"] == pytest.approx(
            log["objective/scores"] + log["objective/non_score_reward"]
        )


def test_score_of_a_sample_is_the_reward_models(build, folders):
    """By transformers' own classifier, on the text in samples.jsonl."""
    trainer = build(**FEW, stop_token=None)
    trainer.train()
    reward, checked = adapters_apart(folders)["reward_model"].eval(), 0
    for sample in samples(trainer, 1):
        texts = [sample["prompt"].split(), sample["response"].split()]
        if len(texts[1]) < LENGTH:
            continue  # a special token is not in the text
        ids = torch.tensor([[int(word[1:]) for text in texts for word in text]])
        with torch.no_grad():
            expected = reward(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.item()
        assert sample["score"] == pytest.approx(expected, rel=1e-4)
        checked += 1
    assert checked > 0


def earned(log: dict[str, float]) -> float:
    """The mean of what the policy learns from, without the cost of KL."""
    return log["objective/rlhf_reward"] - log["objective/non_score_reward"]


def test_normalize_scores(build):
    trainer = build(**FEW, normalize_scores=True)
    trainer.train()
    raw = [[sample["score"] for sample in samples(trainer, update)] for update in (1, 2, 3)]
    for i, log in enumerate(logs(trainer)):
        seen = np.concatenate(raw[: i + 1])
        expected = (np.mean(raw[i]) - seen.mean()) / seen.std(ddof=1)
        assert earned(log) == pytest.approx(expected, rel=1e-4, abs=1e-5)
        assert log["objective/scores"] == pytest.approx(np.mean(raw[i]), rel=1e-5)  # where progress is seen
    assert abs(earned(logs(trainer)[2])) > 1e-3


def test_score_clip_and_missing_eos_penalty(build):
    trainer = build(**FEW, score_clip=0.1, missing_eos_penalty=0.7)
    trainer.train()
    clipped = 0
    for log, update in zip(logs(trainer), (1, 2, 3), strict=True):
        seen = samples(trainer, update)
        clipped += sum(abs(sample["score"]) > 0.1 for sample in seen)
        expected = [np.clip(sample["score"], -0.1, 0.1) - 0.7 * (not sample["ended"]) for sample in seen]
        assert earned(log) == pytest.approx(np.mean(expected), rel=1e-4)
        unclipped = [sample["score"] - 0.7 * (not sample["ended"]) for sample in seen]
        assert log["objective/scores"] == pytest.approx(np.mean(unclipped), rel=1e-5)  # TRL's figure
    assert clipped > 0


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What `objective.token_rewards` and `objective.gae` were called with, update by update."""
    found: list[dict[str, Any]] = []
    token_rewards, gae = objective.token_rewards, objective.gae

    def record_rewards(scores, kl, mask, kl_coef, end):
        found.append({"scores": scores, "kl": kl, "mask": mask, "kl_coef": kl_coef, "end": end})
        return token_rewards(scores, kl, mask, kl_coef, end)

    def record_gae(rewards, values, mask, gamma, lam):
        found[-1] |= {"rewards": rewards, "values": values, "value_mask": mask, "gamma": gamma, "lam": lam}
        found[-1]["advantages"], found[-1]["returns"] = gae(rewards, values, mask, gamma, lam)
        return found[-1]["advantages"], found[-1]["returns"]

    monkeypatch.setattr(objective, "token_rewards", record_rewards)
    monkeypatch.setattr(objective, "gae", record_gae)
    return found


@pytest.mark.parametrize("after_eos", [False, True])
def test_reward_of_a_token(build, recorded, after_eos):
    trainer = build(whole_models, kl_coef=0.4, score_after_eos=after_eos, gamma=0.9, lam=0.8)
    trainer.train()
    for update in recorded:
        for row, length in enumerate(update["mask"].sum(1).tolist()):
            last = min(length - 1 + after_eos, update["mask"].shape[1] - 1)
            assert update["end"][row] == last
            expected = -0.4 * torch.where(update["mask"][row], update["kl"][row], 0)
            expected[last] += update["scores"][row]
            torch.testing.assert_close(update["rewards"][row], expected)
            assert update["returns"][row, last] == pytest.approx(update["rewards"][row, last].item())
        assert (update["gamma"], update["lam"]) == (0.9, 0.8)
        assert update["values"][update["value_mask"]].abs().min() > 0


@pytest.mark.parametrize("after_eos", [False, True])
def test_value_loss_is_a_mean_over_states(build, recorded, after_eos):
    one_step = {"num_ppo_epochs": 1, "num_mini_batches": 1, "per_device_train_batch_size": 4}
    trainer = build(whole_models, score_after_eos=after_eos, gradient_accumulation_steps=2, **one_step)
    trainer.train()
    for update, log in zip(recorded, logs(trainer), strict=True):
        errors = (update["values"] - update["returns"])[update["value_mask"]]
        assert log["loss/value_avg"] == pytest.approx(0.5 * errors.square().mean().item(), rel=1e-6)


def test_vf_coef_weighs_the_value_alone(build):
    one_step = {"num_ppo_epochs": 1, "num_mini_batches": 1, "total_episodes": ROWS}
    once, thrice = (change(build(output=str(c), vf_coef=c, **one_step)) for c in (0.1, 0.3))
    assert any("value" in name.split(".") for name in once)
    for name, weight in once.items():
        factor = 3 if {"value", "value_head"} & {*name.split(".")} else 1
        torch.testing.assert_close(thrice[name], factor * weight, rtol=1e-3, atol=1e-6)


def test_each_epoch_has_mini_batches_of_its_own(build, monkeypatch):
    steps, losses = [], objective.policy_losses

    def record(logprobs, old_logprobs, *rest):
        steps.append({round(row.sum().item(), 9) for row in old_logprobs})
        return losses(logprobs, old_logprobs, *rest)

    monkeypatch.setattr(objective, "policy_losses", record)
    build(whole_models, total_episodes=ROWS, num_ppo_epochs=3).train()
    epochs = [frozenset(map(frozenset, steps[i : i + 2])) for i in (0, 2, 4)]
    assert all(len(frozenset.union(*epoch)) == ROWS for epoch in epochs)  # each row once
    assert len(set(epochs)) > 1


@pytest.mark.parametrize("whiten", [False, True])
def test_whiten_rewards(build, recorded, whiten):
    build(whole_models, whiten_rewards=whiten).train()
    for update in recorded:
        mask = update["mask"]
        plain = torch.where(mask, -0.05 * update["kl"], 0)
        plain[torch.arange(len(mask)), update["end"]] += update["scores"]
        plain, found = plain[mask], update["rewards"][mask]
        expected = (plain - plain.mean()) / plain.std() + plain.mean() if whiten else plain
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        assert found.std().item() == pytest.approx(1.0 if whiten else plain.std().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("estimator", "formula"),
    [("k1", lambda d: d), ("k2", lambda d: d.square() / 2), ("k3", lambda d: (-d).exp() - 1 + d)],
)
def test_kl_estimator(build, folders, monkeypatch, estimator, formula):
    """The first update's KL, from log-probabilities computed here, by plain forward passes of whole models."""
    sampled: list[tuple[list[int], list[int]]] = []
    sample = trainer_module.sample_responses

    def record(policy, prompts, *rest):
        responses = sample(policy, prompts, *rest)
        sampled.extend(zip(prompts, responses, strict=True))
        return responses

    monkeypatch.setattr(trainer_module, "sample_responses", record)
    trainer = build(whole_models, kl_estimator=estimator, temperature=0.7, kl_coef=0.2, total_episodes=ROWS)
    trainer.train()
    fresh, per_response, entropy = whole_models(folders), [], []
    for prompt, response in sampled:
        ids = torch.tensor([prompt + response])
        logprobs = {}
        for name in ("model", "ref_model"):
            with torch.no_grad():
                scores = (fresh[name](input_ids=ids).logits[0] / 0.7).log_softmax(-1)[len(prompt) - 1 : -1]
            logprobs[name] = scores.gather(1, torch.tensor(response)[:, None]).flatten()
        per_response.append(formula(logprobs["model"] - logprobs["ref_model"]).sum().item())
        entropy.append(-logprobs["model"].sum().item())
    log = logs(trainer)[0]
    assert len(per_response) == ROWS
    assert log["objective/kl"] == pytest.approx(np.mean(per_response), rel=1e-6)
    assert log["objective/non_score_reward"] == pytest.approx(-0.2 * np.mean(per_response), rel=1e-6)
    assert log["objective/entropy"] == pytest.approx(np.mean(entropy), rel=1e-6)


# Checkpoints


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
    ("models", "value_model"),
    [(on_one_backbone, "adapter"), (on_one_backbone, "shared"), (adapters_apart, "adapter"), (whole_models, "shared")],
)
def test_resume_is_the_unbroken_run_bit_for_bit(build, models, value_model, named):
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    draws, later = Draws(), Draws()
    unbroken = build(models, output="unbroken", value_model=value_model, **ADAPTIVE, callbacks=[draws])
    state = torch.get_rng_state(), np.random.get_state(), random.getstate()
    unbroken.train()
    torch.set_rng_state(state[0])
    np.random.set_state(state[1])
    random.setstate(state[2])
    broken = build(models, value_model=value_model, **ADAPTIVE, callbacks=[Draws(), StopAfter(3)])
    torch.set_rng_state(state[0])
    np.random.set_state(state[1])
    random.setstate(state[2])
    with pytest.raises(Stopped):
        broken.train()
    resumed = build(models, value_model=value_model, **ADAPTIVE, callbacks=[later])
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


# TRL's interface


class Events(TrainerCallback):
    """Writes down what it is told."""

    def __init__(self, stop_at: int | None = None):
        self.events: list[str] = []
        self.logged: list[dict[str, float]] = []
        self.stop_at = stop_at

    def on_train_begin(self, args, state, control, **kwargs):
        assert kwargs["optimizer"] is not None
        assert kwargs["lr_scheduler"] is not None
        self.events.append(f"begin {state.global_step}/{state.max_steps}")

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.events.append(f"log {state.global_step}")
        self.logged.append(dict(logs))

    def on_step_end(self, args, state, control, **kwargs):
        self.events.append(f"step {state.global_step} epoch {state.epoch:g}")
        control.should_training_stop = state.global_step == self.stop_at

    def on_save(self, args, state, control, **kwargs):
        assert (Path(args.output_dir) / f"checkpoint-{state.global_step}/ppo.json").is_file()
        self.events.append(f"save {state.global_step}")

    def on_train_end(self, args, state, control, **kwargs):
        self.events.append(f"end {state.global_step}")


def test_callbacks(build):
    events = Events()
    build(callbacks=[events], save_strategy="steps", save_steps=2).train()
    one, two, three = (["log 1", "step 1 epoch 0.5"], ["log 2", "step 2 epoch 1"], ["log 3", "step 3 epoch 1.5"])
    assert events.events == ["begin 0/3", *one, *two, "save 2", *three, "save 3", "end 3"]


def test_a_callback_stops_the_run(build):
    events = Events(stop_at=2)
    trainer = build(callbacks=[events], total_episodes=10 * ROWS)
    trainer.train()
    assert trainer.state.global_step == 2
    assert events.events[-1] == "end 2"
    assert not list(output_of(trainer).glob("checkpoint-*"))


def test_trls_metrics(build):
    stock = pytest.importorskip("trl.experimental.ppo.ppo_trainer", reason="TRL 1.13 and later have no PPOTrainer")
    names = set(re.findall(r'metrics\["([^"]+)"\]', inspect.getsource(stock.PPOTrainer.train)))
    assert len(names) > 15
    events = Events()
    build(callbacks=[events]).train()
    assert all(names <= set(logged) for logged in events.logged)
    assert [logged["episode"] for logged in events.logged] == [8, 16, 24]
    assert all(logged["eps"] > 0 for logged in events.logged)
    first = events.logged[0]
    assert first["val/ratio"] == pytest.approx(1, abs=0.05)
    assert first["policy/entropy_avg"] > 0
    assert first["policy/approxkl_avg"] >= 0
    assert first["objective/response_tokens"] < LENGTH


def test_trls_fields_and_defaults():
    stock = pytest.importorskip("trl.experimental.ppo", reason="TRL 1.13 and later have no PPOConfig")
    worked_out = {"world_size", "num_total_batches", "micro_batch_size", "local_batch_size", "batch_size"}
    worked_out |= {"local_mini_batch_size", "mini_batch_size"}
    theirs = {field.name: field for field in dataclasses.fields(stock.PPOConfig)}
    ours = {field.name: field for field in dataclasses.fields(PPOConfig)}
    assert theirs.keys() - worked_out <= ours.keys()
    for name in theirs.keys() - worked_out:
        assert ours[name].default == theirs[name].default, name
        assert ours[name].init, name
    one, other = PPOConfig(output_dir="x", use_cpu=True), stock.PPOConfig(output_dir="x", use_cpu=True)
    for name in theirs.keys() - worked_out - {"accelerator_config", "deepspeed_plugin", "distributed_state"}:
        assert getattr(one, name) == getattr(other, name), name
    assert not PPOConfig(output_dir="x", use_cpu=True, fp16=True).bf16


SCRIPT = """
from trl.experimental.ppo import PPOConfig, PPOTrainer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
policy = AutoModelForCausalLM.from_pretrained(base)
ref_policy = AutoModelForCausalLM.from_pretrained(base) if peft_config is None else None
reward_model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
value_model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
config = PPOConfig(
    output_dir=output,
    learning_rate=1e-2,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=2,
    num_mini_batches=2,
    num_ppo_epochs=2,
    total_episodes=16,
    response_length=6,
    stop_token="eos",
    missing_eos_penalty=1.0,
    local_rollout_forward_batch_size=4,
    per_device_eval_batch_size=4,
    num_sample_generations=1,
    report_to="none",
    save_strategy="no",
    use_cpu=True,
    bf16=False,
)
trainer = PPOTrainer(
    args=config,
    processing_class=tokenizer,
    model=policy,
    ref_model=ref_policy,
    reward_model=reward_model,
    value_model=value_model,
    train_dataset=dataset,
    eval_dataset=dataset.select(range(4)),
    peft_config=peft_config,
)
trainer.train()
trainer.save_model(output)
trainer.generate_completions()
"""
IMPORTS = {
    "trl": "from trl.experimental.ppo import PPOConfig, PPOTrainer",
    "kochat": "from kochat_trl.ppo import PPOConfig, PPOTrainer",
}


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("engine", IMPORTS)
def test_a_script_for_trl_runs_with_the_import_changed(folders, tmp_path, monkeypatch, capsys, engine, lora):
    if engine == "trl":
        pytest.importorskip("trl.experimental.ppo", reason="TRL 1.13 and later have no PPOTrainer")
        monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    assert IMPORTS["trl"] in SCRIPT
    monkeypatch.setenv("COLUMNS", "120")
    names: dict[str, Any] = {"base": str(folders.base), "output": str(tmp_path / "out"), "dataset": prompts()}
    names["peft_config"] = LoraConfig(**LORA, task_type="CAUSAL_LM") if lora else None
    exec(SCRIPT.replace(IMPORTS["trl"], IMPORTS[engine]), names)
    assert names["trainer"].state.global_step > 0
    printed = capsys.readouterr().out
    assert "score" in printed
    assert (tmp_path / "out/adapter_config.json").exists() == lora

    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        logits = policy(input_ids=ids).logits
        start = AutoModelForCausalLM.from_pretrained(folders.base)(input_ids=ids).logits
        live = names["policy"].eval()(input_ids=ids).logits
    assert not torch.allclose(logits, start, atol=1e-3)
    torch.testing.assert_close(logits, live, rtol=1e-4, atol=1e-4)
    assert (tmp_path / "out/tokenizer.json").is_file()


def test_generate_completions(build, folders, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    data = prompts(6)
    settings = {"num_sample_generations": 2, "per_device_eval_batch_size": 2, "total_episodes": 4 * ROWS}
    trainer = build(eval_dataset=data, **settings)
    trainer.train()
    assert capsys.readouterr().out.count("prompt ") == 2  # a table after every second update

    temperatures = []

    def answer(policy, prompts, seeds, length, temperature, *unused):
        temperatures.append(temperature)
        return [[7 + row] * (row + 1) for row, _ in enumerate(prompts)]

    monkeypatch.setattr(trainer_module, "sample_responses", answer)
    before = trained(trainer)
    trainer.generate_completions()
    rows = re.findall(r"│ (w[w\d ]*?) *│ (w[w\d ]*?) *│ (-?\d+\.\d\d) *│", capsys.readouterr().out)
    reward = adapters_apart(folders)["reward_model"].eval()
    assert len(rows) == 5
    assert max(temperatures) < 0.1
    for i, (prompt, response, score) in enumerate(rows):
        ids = data[i]["input_ids"]
        assert prompt == " ".join(f"w{token}" for token in ids)
        assert response == " ".join([f"w{7 + i}"] * (i + 1))
        joined = torch.tensor([ids + [7 + i] * (i + 1)])
        with torch.no_grad():
            expected = reward(input_ids=joined, attention_mask=torch.ones_like(joined)).logits.item()
        assert float(score) == pytest.approx(expected, abs=0.0051)
    assert all(torch.equal(weight, before[name]) for name, weight in trained(trainer).items())
    build(output="no table").generate_completions()
    assert capsys.readouterr().out == ""


def test_saved_policy_and_value_load_with_peft(build, folders):
    trainer = build()
    trainer.train()
    trainer.save_model()
    folder = output_of(trainer)
    ids = torch.tensor([[5, 6, 7, 8]])
    mask = torch.ones_like(ids)
    policy = PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained(folders.base), folder).eval()
    value = PeftModel.from_pretrained(classifier(folders), folder / "value").eval()
    assert has_score_head(str(folder / "value"))
    with torch.no_grad(), trainer.roles.policy.active():
        expected = trainer.roles.policy.head(trainer.roles.policy.hidden(ids, mask))
        torch.testing.assert_close(policy(input_ids=ids).logits, expected)
    with torch.no_grad(), trainer.roles.value.active():
        expected = trainer.roles.value.head(trainer.roles.value.hidden(ids, mask))[:, -1]
        torch.testing.assert_close(value(input_ids=ids, attention_mask=mask).logits, expected)


def test_a_collator_and_the_pad_token_make_no_difference(build):
    """Also where the pad token is the end of text: rows are counted by length, not by token."""
    plain = build(output="plain")
    expected = change(plain)
    for name, pad in {"pad": f"w{PAD}", "eos": f"w{EOS}"}.items():
        reader = tokenizer(pad)
        collated = build(output=name, processing_class=reader, data_collator=DataCollatorWithPadding(reader))
        found = change(collated)
        assert logs(collated) == logs(plain)
        assert all(torch.equal(found[key], weight) for key, weight in expected.items())
        assert sum(log["val/num_eos_tokens"] for log in logs(collated)) > 0


def test_a_prompt_may_hold_the_pad_token(build):
    """A collator pads on the left; what is under its mask goes, and nothing else."""
    data = Dataset.from_dict({"input_ids": [[PAD, 5, PAD, 7 + i % 3] if i % 2 else [9, PAD] for i in range(2 * ROWS)]})
    plain = build(output="plain", train_dataset=data)
    collated = build(output="collated", train_dataset=data, data_collator=DataCollatorWithPadding(tokenizer()))
    expected, found = change(plain), change(collated)
    assert logs(collated) == logs(plain)
    assert all(torch.equal(found[key], weight) for key, weight in expected.items())


def test_dropout_is_off(build, folders):
    made = whole_models(folders)
    assert any(m.p > 0 for m in made["model"].modules() if isinstance(m, torch.nn.Dropout))
    trainer = build(made)
    assert {m.p for m in trainer.roles.modules() if isinstance(m, torch.nn.Dropout)} == {0.0}


def test_batch_sizes(build):
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "num_mini_batches": 2}
    args = build(**settings, total_episodes=20).args
    assert (args.local_batch_size, args.batch_size) == (8, 8)
    assert (args.local_mini_batch_size, args.mini_batch_size, args.micro_batch_size) == (4, 4, 2)
    assert args.num_total_batches == 3
    args = build(total_episodes=None, num_train_epochs=2).args
    assert (args.total_episodes, args.num_total_batches) == (2 * 2 * ROWS, 4)


def test_each_pass_sees_each_prompt_once_in_a_new_order(build):
    trainer = build(total_episodes=4 * ROWS, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    trainer.train()
    passes = [[s["prompt"] for u in range(4 * i + 1, 4 * i + 5) for s in samples(trainer, u)] for i in (0, 1)]
    texts = tokenizer().batch_decode(list(prompts()["input_ids"]), skip_special_tokens=True)
    assert sorted(passes[0]) == sorted(passes[1]) == sorted(texts)
    assert passes[0] != passes[1]


def test_another_seed_is_another_run(build):
    runs = [build(output=str(i), seed=seed, total_episodes=ROWS) for i, seed in enumerate((1, 1, 2))]
    for run in runs:
        run.train()
    text = [(output_of(run) / "samples.jsonl").read_bytes() for run in runs]
    assert text[0] == text[1] != text[2]


def capped(folders: SimpleNamespace) -> dict[str, Any]:
    made = adapters_apart(folders)
    made["model"].get_base_model().register_forward_hook(
        lambda module, args, output: setattr(output, "logits", output.logits.tanh())
    )
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
    with pytest.raises(UserError, match="changes its logits after the head"):
        build(capped(folders))


@pytest.mark.parametrize("room", [0, 1])
def test_the_longest_that_fits(build, room):
    """The longest prompt has 5 tokens and the model 32 positions."""
    build(response_length=27 - room, total_episodes=ROWS, stop_token=None).train()


def test_answers_that_look_like_markup_are_printed(build, monkeypatch, capsys):
    trainer = build(eval_dataset=prompts())
    monkeypatch.setattr(trainer.processing_class, "decode", lambda *_, **__: "[/INST]")
    trainer.generate_completions(sampling=True)
    assert "[/INST]" in capsys.readouterr().out


def test_rates_of_dropout_kept_as_numbers_are_switched_off():
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attention_dropout, self.layerdrop, self.resid_pdrop, self.scale = 0.1, 0.2, 0.3, 0.5

    module = torch.nn.Sequential(Layer(), torch.nn.Dropout(0.4))
    switch_dropout_off(module)
    assert [module[0].attention_dropout, module[0].layerdrop, module[0].resid_pdrop, module[1].p] == [0.0] * 4
    assert module[0].scale == 0.5


def test_rotation_never_drops_the_newest(tmp_path):
    """A run resumed at 5 beside a stale checkpoint-10 writes checkpoint-6."""
    for age, step in enumerate((6, 5, 10)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        os.utime(tmp_path / f"checkpoint-{step}", (1000 - age, 1000 - age))
    drop_old_checkpoints(tmp_path / "checkpoint-6", None)
    assert len(list(tmp_path.iterdir())) == 3
    drop_old_checkpoints(tmp_path / "checkpoint-6", 2)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-5", "checkpoint-6"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stop_token": None, "missing_eos_penalty": 1.0}, "no response can end itself without a stop token"),
        ({"save_strategy": "epoch"}, "save_strategy: expected no or steps"),
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
