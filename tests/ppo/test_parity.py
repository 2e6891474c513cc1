"""Our PPOTrainer against TRL 1.12's, on the same models, prompts, responses and shuffles."""

import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from kochat_trl.ppo import objective, rollout, trainer
from kochat_trl.ppo.rollout import seed_of
from kochat_trl.ppo.step import StepStats
from kochat_trl.settings.ppo import PPOConfig

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

stock = pytest.importorskip("trl.experimental.ppo.ppo_trainer", reason="TRL 1.13 and later have no PPOTrainer")

VOCAB, EOS, PAD = 40, 1, 3
LENGTH = 6
ROWS = 8
TEMPERATURE = 0.7
SHAPE = {"vocab_size": VOCAB, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "pad_token_id": PAD}


def tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(VOCAB)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words)), eos_token="w1", pad_token="w3", padding_side="left"
    )


def prompts() -> Dataset:
    rng = np.random.default_rng(0)
    return Dataset.from_dict({"input_ids": [rng.integers(4, VOCAB, 2 + i % 4).tolist() for i in range(2 * ROWS)]})


def response(update: int, prompt: list[int], ragged: bool) -> list[int]:
    """The recorded response to a prompt in an update: of LENGTH tokens, or ended anywhere."""
    rng = np.random.default_rng(seed_of(update, *prompt))
    tokens = rng.integers(4, VOCAB, LENGTH).tolist()
    end = int(rng.integers(0, LENGTH + 1)) if ragged else LENGTH
    return [*tokens[:end], EOS] if end < LENGTH else tokens


def shuffle(count: int) -> list[int]:
    return [(5 * i + 3) % count for i in range(count)]


def models(dtype: torch.dtype) -> dict[str, Any]:
    torch.manual_seed(0)
    config = GPT2Config(**SHAPE, num_labels=1)
    made = {
        "model": GPT2LMHeadModel(config),
        "ref_model": GPT2LMHeadModel(config),
        "reward_model": GPT2ForSequenceClassification(config),
        "value_model": GPT2ForSequenceClassification(config),
    }
    for model in made.values():
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        model.to(dtype)
    return made


@dataclass
class Recorded:
    """What a run computed, update by update, and the change of each weight."""

    updates: list[dict[str, torch.Tensor]] = field(default_factory=list)
    logs: list[dict[str, float]] = field(default_factory=list)
    change: dict[str, torch.Tensor] = field(default_factory=dict)


@pytest.fixture
def run(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Recorded]:
    """Train three updates with `engine`, on recorded responses."""

    def run_engine(engine: str, dtype: torch.dtype, ragged: bool, **settings: Any) -> Recorded:
        made, data, recorded = models(dtype), prompts(), Recorded()
        defaults = {"learning_rate": 1e-2, "num_ppo_epochs": 2, "num_mini_batches": 2, "stop_token": "eos"}
        defaults |= {"per_device_train_batch_size": ROWS, "total_episodes": 3 * ROWS, "response_length": LENGTH}
        defaults |= {"lr_scheduler_type": "constant", "report_to": "none", "save_strategy": "no", "use_cpu": True}
        defaults |= {"bf16": False, "gradient_checkpointing": False, "num_sample_generations": 0, "disable_tqdm": True}
        defaults |= {"temperature": TEMPERATURE, "kl_coef": 0.1, "max_grad_norm": 0.0}
        values = defaults | {"output_dir": str(tmp_path / engine)} | settings
        before = {name: deepcopy(made[name].state_dict()) for name in ("model", "value_model")}
        if engine == "trl":
            ours = _trl(made, data, values, ragged, recorded)
        else:
            ours = _kochat(made, data, values, ragged, recorded)
        ours.train()
        recorded.logs = [log for log in ours.state.log_history if "objective/kl" in log]
        for name, weights in before.items():
            for key, weight in made[name].state_dict().items():
                recorded.change[f"{name}.{key}"] = weight - weights[key]
        return recorded

    def batches(data: Dataset, update: int) -> list[int]:
        start = update * ROWS % len(data)
        return list(range(start, start + ROWS))

    def _trl(made: Any, data: Dataset, values: Any, ragged: bool, recorded: Recorded) -> Any:
        updates = iter(range(100))

        def generate(model: Any, queries: torch.Tensor, size: int, pad: int, config: Any) -> Any:
            update, rows = next(updates), []
            for query in queries:
                answer = response(update, query[query != PAD].tolist(), ragged)
                rows.append(answer + [PAD] * (LENGTH - len(answer)))
            joined = torch.cat((queries, torch.tensor(rows)), 1)
            logits = stock.forward(model, joined, pad).logits[:, queries.shape[1] - 1 : -1]
            return joined, logits / config.temperature

        class Recorder(TrainerCallback):
            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                frame = sys._getframe()
                while frame.f_code.co_name != "train":
                    frame = frame.f_back
                names = ("scores", "rewards", "advantages", "returns", "values")
                found = {name: frame.f_locals[name].clone() for name in names}
                mask = ~frame.f_locals["padding_mask"]
                found["policy_loss"] = frame.f_locals["pg_loss_stats"].flatten().clone()
                found["value_loss"] = frame.f_locals["vf_loss_stats"].flatten().clone()
                recorded.updates.append(found | {"mask": mask})

        monkeypatch.setattr(stock, "batch_generation", generate)
        monkeypatch.setattr(stock.np.random, "permutation", lambda count: np.array(shuffle(count)))
        made_trainer = stock.PPOTrainer(
            args=stock.PPOConfig(**values),
            processing_class=tokenizer(),
            train_dataset=data,
            callbacks=[Recorder()],
            **made,
        )
        pad = tokenizer().pad
        made_trainer.dataloader = [
            pad({"input_ids": [data[i]["input_ids"] for i in batches(data, update)]}, return_tensors="pt")
            for update in range(2)
        ]
        return made_trainer

    def _kochat(made: Any, data: Dataset, values: Any, ragged: bool, recorded: Recorded) -> Any:
        update = iter(range(100))

        def generate(policy: Any, prompts: Any, *unused: Any) -> list[list[int]]:
            now = next(update)
            return [response(now, prompt, ragged) for prompt in prompts]

        class Recording(trainer.PPOTrainer):
            def step(self, *args: Any, **kwargs: Any) -> StepStats:
                stats = super().step(*args, **kwargs)
                for name in ("policy_loss", "value_loss"):
                    recorded.updates[-1].setdefault(name, []).append(getattr(stats, name))
                return stats

        rewards_of, gae, final = objective.token_rewards, objective.gae, objective.final_scores

        def record_scores(*args: Any) -> torch.Tensor:
            recorded.updates.append({"scores": final(*args)})
            return recorded.updates[-1]["scores"]

        def record_gae(rewards: Any, values: Any, mask: Any, *rest: Any) -> Any:
            advantages, returns = gae(rewards, values, mask, *rest)
            recorded.updates[-1] |= {"rewards": rewards, "values": values, "returns": returns}
            return advantages, returns

        assert rewards_of is objective.token_rewards
        monkeypatch.setattr(objective, "final_scores", record_scores)
        monkeypatch.setattr(objective, "gae", record_gae)
        whiten = objective.whiten

        def record_whiten(values: Any, mask: Any, shift_mean: bool = True) -> Any:
            result = whiten(values, mask, shift_mean)
            if shift_mean:
                recorded.updates[-1] |= {"advantages": result, "mask": mask}
            return result

        monkeypatch.setattr(objective, "whiten", record_whiten)
        monkeypatch.setattr(trainer, "sample_responses", generate)
        monkeypatch.setattr(trainer, "draw_prompts", lambda prompts, size, seed, update: batches(data, update))
        monkeypatch.setattr(rollout, "shuffled", lambda count, *what_for: shuffle(count))
        return Recording(args=PPOConfig(**values), processing_class=tokenizer(), train_dataset=data, **made)

    return run_engine


def assert_equal(ours: Recorded, theirs: Recorded, numbers: float, change: float) -> None:
    assert len(ours.updates) == len(theirs.updates) == 3
    for mine, other in zip(ours.updates, theirs.updates, strict=True):
        for name in ("scores", "rewards", "values", "advantages", "returns", "policy_loss", "value_loss"):
            found, expected = torch.as_tensor(mine[name]), other[name]
            if found.ndim == 2 and found.shape[1] < expected.shape[1]:  # trimmed
                assert not expected[:, found.shape[1] :].any()
                expected = expected[:, : found.shape[1]]
            torch.testing.assert_close(
                found.to(expected.dtype), expected, rtol=numbers, atol=numbers, msg=lambda m, n=name: f"{n}: {m}"
            )
    largest = max(float(weight.abs().max()) for weight in theirs.change.values())
    assert largest > 1e-3
    for name, weight in theirs.change.items():
        assert float((ours.change[name] - weight).abs().max()) <= change * largest, name
    for name in ("model.", "value_model."):
        assert max(float(w.abs().max()) for key, w in theirs.change.items() if key.startswith(name)) > 1e-3


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
@pytest.mark.parametrize(("dtype", "numbers", "change"), [(torch.float32, 1e-5, 1e-3), (torch.float64, 1e-6, 1e-7)])
@pytest.mark.parametrize("ragged", [False, True])
def test_our_update_is_trls(run, optim, dtype, numbers, change, ragged):
    settings = {"optim": optim, "weight_decay": 0.1, "missing_eos_penalty": 0.5}
    # The gradient of a key's bias is 0, but for rounding, which Adam's usual epsilon would blow up to a whole step.
    settings |= {"adam_epsilon": 1e-4}
    theirs = run("trl", dtype, ragged, temperature=TEMPERATURE - 1e-7, **settings)  # TRL adds 1e-7
    ours = run("kochat", dtype, ragged, score_after_eos=ragged, **settings)
    assert_equal(ours, theirs, numbers, change)
