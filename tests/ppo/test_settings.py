"""Each setting of PPO does what it says, in the numbers of a run."""

from itertools import pairwise
from typing import Any

from kochat_trl.ppo import objective
from kochat_trl.ppo import trainer as trainer_module
from tests.ppo.helpers import FEW, LENGTH, ROWS, adapters_apart, change, logs, on_one_backbone, samples, whole_models

import numpy as np
import pytest
import torch


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


def earned(log):
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


def test_batch_sizes(build):
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "num_mini_batches": 2}
    args = build(**settings, total_episodes=20).args
    assert (args.local_batch_size, args.batch_size) == (8, 8)
    assert (args.local_mini_batch_size, args.mini_batch_size, args.micro_batch_size) == (4, 4, 2)
    assert args.num_total_batches == 3
    args = build(total_episodes=None, num_train_epochs=2).args
    assert (args.total_episodes, args.num_total_batches) == (2 * 2 * ROWS, 4)
