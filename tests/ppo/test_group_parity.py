"""Our RLOO and GRPO against TRL's RLOOTrainer and GRPOTrainer: the same models, responses, rewards and shuffles."""

import inspect
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kochat_trl.ppo import rollout, trainer
from kochat_trl.ppo.rollout import seed_of
from kochat_trl.settings.ppo import PPOConfig
from tests.tiny import gpt2_config, word_tokenizer

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import GPT2ForSequenceClassification, GPT2LMHeadModel

# TRL 1.12's imports `requests`, and doesn't require it.
rloo_trainer = pytest.importorskip("trl.trainer.rloo_trainer", exc_type=ImportError)
grpo_trainer = pytest.importorskip("trl.trainer.grpo_trainer", exc_type=ImportError)

pytestmark = pytest.mark.smoke  # so `make test-newest-trl` runs these too

VOCAB, EOS, PAD = 40, 1, 3
LENGTH, GROUP, ROWS = 6, 4, 8
TEMPERATURE = 0.7
# Prompts are of one length: TRL pads on the left without telling the model the positions.
PROMPTS = [np.random.default_rng(i).integers(4, VOCAB, 3).tolist() for i in range(2 * ROWS // GROUP)]
ORDER = [(5 * row + 3) % ROWS for row in range(ROWS)]
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "rloo": ("rloo", {"kl_coef": 0.1}),
    "grpo": ("grpo", {"kl_coef": 0.0}),
    "grpo, its KL and its mean": ("grpo", {"kl_coef": 0.1, "kl_estimator": "k3", "loss_type": "grpo"}),
    "dr_grpo": ("grpo", {"kl_coef": 0.0, "loss_type": "dr_grpo", "scale_rewards": "none"}),
}


def answers(update: int, prompts: list[list[int]]) -> list[list[int]]:
    """The recorded responses to prompts that are repeated side by side: of LENGTH tokens, or ended anywhere."""
    found = []
    for row, prompt in enumerate(prompts):
        rng = np.random.default_rng(seed_of(update, *prompt, row % GROUP))
        tokens, end = rng.integers(4, VOCAB, LENGTH).tolist(), int(rng.integers(0, 2 * LENGTH))
        found.append([*tokens[:end], EOS] if end < LENGTH else tokens)
    return found


def rewards(responses: list[list[int]], dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor([seed_of(*response) % 1000 / 250 for response in responses], dtype=dtype)


def models(folder: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """A policy, and a reference some way from it in `folder`, from where TRL loads one."""
    torch.manual_seed(0)
    GPT2LMHeadModel(gpt2_config(VOCAB, pad_token_id=PAD, initializer_range=0.1)).save_pretrained(folder)
    policy, reference = (GPT2LMHeadModel.from_pretrained(folder) for _ in range(2))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return policy.to(dtype), reference.to(dtype)


@dataclass
class Recorded:
    """What a run computed: the advantages of each update, the loss of each step, and the change of each weight."""

    advantages: list[torch.Tensor] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    change: dict[str, torch.Tensor] = field(default_factory=dict)
    clipped: float = 0.0


SETTINGS: dict[str, Any] = {"learning_rate": 1e-2, "lr_scheduler_type": "constant", "weight_decay": 0.1}
# The gradient of a key's bias is 0, but for rounding, which Adam's usual epsilon would blow up to a whole step.
SETTINGS |= {"adam_epsilon": 1e-4, "max_grad_norm": 0.0, "bf16": False, "use_cpu": True, "report_to": "none"}
SETTINGS |= {"gradient_checkpointing": False, "save_strategy": "no", "disable_tqdm": True, "temperature": TEMPERATURE}


def train_trl(made: Any, method: str, keys: dict[str, Any], values: dict[str, Any], recorded: Recorded, patch: Any):
    module: Any = {"rloo": rloo_trainer, "grpo": grpo_trainer}[method]
    base, config = (getattr(module, f"{method.upper()}{kind}") for kind in ("Trainer", "Config"))
    dtype = made[0].dtype

    class Recording(base):
        updates = 0

        def _tokenize_prompts(self, prompts):
            return [[int(word) for word in prompt.split()] for prompt in prompts], None, {}

        def _generate_single_turn(self, prompts, *unused, **more):
            self.updates += 1
            responses = answers(self.updates - 1, prompts)
            return responses if method == "rloo" else (responses, None)

        def _calculate_rewards(self, inputs, prompts, completions, responses):
            return rewards(responses, dtype)[:, None]

        def _generate_and_score_completions(self, inputs):
            output = super()._generate_and_score_completions(inputs)
            recorded.advantages.append(output["advantages"])
            return output

        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            recorded.losses.append(loss.item())
            return loss

    class InFloat64(Recording):
        """TRL after 1.12 has a head that computes in float32 whatever the model's precision: here is a plain one."""

        def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *_, **more):
            logits = model(input_ids=input_ids, attention_mask=attention_mask).logits[:, -logits_to_keep - 1 : -1]
            logprobs = (logits / self.temperature).log_softmax(-1)
            chosen = logprobs.gather(-1, input_ids[:, -logits_to_keep:, None]).squeeze(-1)
            return chosen, -(logprobs.exp() * logprobs).sum(-1).detach(), None

    if dtype == torch.float64 and "fused_lm_head" in inspect.getsource(module):
        Recording = InFloat64

    def shuffle(rows):
        return {name: v[ORDER] if isinstance(v, torch.Tensor) and v.ndim else v for name, v in rows.items()}

    patch.setattr(module, "shuffle_sequence_dict", shuffle)
    more = {"beta" if key == "kl_coef" else key: value for key, value in keys.items() if key != "kl_estimator"}
    args = config(
        **values,
        **more,
        per_device_train_batch_size=ROWS // 2,
        steps_per_generation=2,
        num_iterations=2,
        num_generations=GROUP,
        max_completion_length=LENGTH,
        max_steps=8,
        shuffle_dataset=False,
        disable_dropout=True,
    )
    data = Dataset.from_dict({"prompt": [" ".join(map(str, prompt)) for prompt in PROMPTS]})
    made_trainer = Recording(
        made[0], lambda **_: None, args, data, processing_class=word_tokenizer(VOCAB, EOS, PAD), callbacks=[]
    )
    if made_trainer.ref_model is not None:
        made_trainer.ref_model.to(dtype)
    made_trainer.train()


def train_ours(made: Any, method: str, keys: dict[str, Any], values: dict[str, Any], recorded: Recorded, patch: Any):
    class Recording(trainer.PPOTrainer):
        def score(self, sampled, plan):
            trajectory = super().score(sampled, plan)
            trajectory.scores = rewards(sampled.responses, trajectory.scores.dtype)
            return trajectory

        def step(self, update, sampled, mini_batch, trajectory, first):
            if first:
                assert all(torch.equal(column, trajectory.advantages[:, 0]) for column in trajectory.advantages.T)
                recorded.advantages.append(trajectory.advantages[:, 0])
            stats = super().step(update, sampled, mini_batch, trajectory, first)
            recorded.losses.append(stats.policy_loss)
            recorded.clipped += stats.clipfrac
            return stats

    updates = iter(range(100))
    patch.setattr(trainer, "sample_responses", lambda policy, prompts, *unused: answers(next(updates), prompts))
    patch.setattr(
        trainer, "draw_prompts", lambda prompts, size, seed, update: range(update * size, (update + 1) * size)
    )
    patch.setattr(rollout, "shuffled", lambda count, *what_for: ORDER)
    args = PPOConfig(
        **values,
        **keys,
        advantages=method,  # type: ignore[arg-type]
        num_generations=GROUP,
        per_device_train_batch_size=ROWS // 4,  # micro-batches, which mix groups
        gradient_accumulation_steps=4,
        num_mini_batches=2,
        num_ppo_epochs=2,
        total_episodes=2 * ROWS,
        response_length=LENGTH,
        stop_token="eos",
        num_sample_generations=0,
    )
    reward = GPT2ForSequenceClassification(gpt2_config(VOCAB, pad_token_id=PAD, num_labels=1))
    data = Dataset.from_dict({"input_ids": PROMPTS})
    Recording(args, word_tokenizer(VOCAB, EOS, PAD), *made, reward, data).train()


@pytest.mark.parametrize(
    ("dtype", "change", "optim"),
    [(torch.float32, 1e-3, "sgd"), (torch.float64, 1e-7, "sgd"), (torch.float64, 1e-7, "adamw_torch")],
)
@pytest.mark.parametrize("name", METHODS)
def test_our_update_is_trls(name, dtype, change, optim, tmp_path, monkeypatch):
    runs = []
    for train in (train_trl, train_ours):
        made, recorded = models(tmp_path / "start", dtype), Recorded()
        before = {key: weight.clone() for key, weight in made[0].state_dict().items()}
        values = SETTINGS | {"optim": optim, "output_dir": str(tmp_path / train.__name__)}
        train(made, *METHODS[name], values, recorded, monkeypatch)
        recorded.change = {key: weight - before[key] for key, weight in made[0].state_dict().items()}
        runs.append(recorded)
    theirs, ours = runs
    assert len(theirs.advantages) == 2
    assert len(theirs.losses) == 8
    numbers = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(ours.advantages, theirs.advantages, **numbers)
    torch.testing.assert_close(torch.tensor(ours.losses), torch.tensor(theirs.losses), **numbers)
    largest = max(float(weight.abs().max()) for weight in theirs.change.values())
    assert largest > 1e-3
    for key, weight in theirs.change.items():
        assert float((ours.change[key] - weight).abs().max()) <= change * largest, key
    assert ours.clipped > 0 or optim == "sgd"
