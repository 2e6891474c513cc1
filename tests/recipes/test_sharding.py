"""A base divided among two processes, under every method: what is learnt is what one process learns."""

from pathlib import Path

from kochat_trl.models.loading import ADAPTER_WEIGHTS
from tests.processes import in_processes
from tests.tiny import run_script

import pytest
from safetensors.torch import load_file

OF_PPO = {"ppo": [], "rloo": ["--advantages", "rloo"], "grpo": ["--advantages", "grpo"]}
METHODS = ["sft", "reward", "dpo", *OF_PPO]
OPTIMIZERS = {
    "sgd": ["--optim", "sgd", "--learning_rate", "0.01"],
    # Where a gradient is next to nothing, Adam makes a step of a rounding; with a larger epsilon it doesn't.
    "adamw": ["--optim", "adamw_torch", "--learning_rate", "0.001", "--adam_epsilon", "0.001"],
}
VALUES = {
    "load_in_8bit": "false",
    "dtype": "float32",
    "use_cpu": "true",
    "max_grad_norm": 0,
    "lora_dropout": 0,
    "lora_r": 4,
    "lora_alpha": 32,
}
VALUES |= {"lr_scheduler_type": "linear", "warmup_steps": 0, "per_device_train_batch_size": 2}
VALUES |= {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "no"}


@pytest.fixture
def command(kochatgpt_files, tiny_sft, tiny_reward):
    """Three updates of four rows; SFT and the reward model start from an adapter, too."""

    def arguments(method: str, optimizer: str = "adamw") -> list[str]:
        stage = "ppo" if method in OF_PPO else method
        values = VALUES | {"sft_model_path" if stage in ("ppo", "dpo") else "model_name_or_path": tiny_sft}
        if stage == "ppo":
            values |= {"reward_model_path": tiny_reward, "response_length": 6, "total_episodes": 12}
            values |= {"num_mini_batches": 1, "num_ppo_epochs": 2}
            values |= {} if method == "ppo" else {"num_generations": 2, "kl_estimator": "k3"}
        else:
            values |= {"max_steps": 3}
        words = [str(word) for name, value in values.items() for word in (f"--{name}", value)]
        data = kochatgpt_files["reward" if stage == "dpo" else stage]
        config = f"configs/tiny/{stage}.yaml"
        files = ["--config", config, "--train_files", data, data]
        files += [] if stage == "ppo" else ["--eval_files", data]
        return [f"recipes/{stage}.py", *files, *words, *OPTIMIZERS[optimizer], *OF_PPO.get(method, [])]

    return arguments


def run(words: list[str], output: Path, processes: int, *more: object) -> Path:
    """A recipe in so many processes; returns its folder."""
    divided = ["--shard_base", "true"] if processes > 1 else ["--gradient_accumulation_steps", "2"]
    in_processes(processes, output, run_script, *words, "--output_dir", output, *divided, *more)
    return output


def furthest(begun: str, one: Path, other: Path) -> float:
    """How far the furthest weight of two adapters is apart, in parts of the largest change since `begun`."""
    before, here, there = (load_file(Path(folder) / ADAPTER_WEIGHTS) for folder in (begun, one, other))
    largest = max(float((here[name] - before[name]).abs().max()) for name in before)
    assert largest > 5e-4
    return max(float((here[name] - there[name]).abs().max()) for name in here) / largest


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", METHODS)
def test_two_processes_learn_what_one_does(method, optimizer, command, tiny_sft, tmp_path):
    words = command(method, optimizer)
    one, two = run(words, tmp_path / "one", 1), run(words, tmp_path / "two", 2)
    assert furthest(tiny_sft, one, two) <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sft", "ppo"])
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_any_number_of_processes_goes_on_from_a_checkpoint(method, before, after, command, tiny_sft, tmp_path):
    words = command(method)
    whole = run(words, tmp_path / "whole", before)
    moved = run(words, tmp_path / "moved", after, "--resume_from_checkpoint", whole / "checkpoint-1")
    assert furthest(tiny_sft, whole, moved) <= 1e-4


@pytest.mark.slow
def test_processes_with_unlike_work_wait_for_each_other(command, kochatgpt_files, tmp_path):
    """Three held-out prompts on two processes, answered in batches of one, whose answers end where they end."""
    words = command("ppo")
    watched = ["--eval_files", kochatgpt_files["ppo"], "--eval_strategy", "steps", "--eval_steps", 1]
    watched += ["--local_rollout_forward_batch_size", 1, "--per_device_eval_batch_size", 1]
    words += [str(word) for word in watched]
    one, two = run(words, tmp_path / "one", 1), run(words, tmp_path / "two", 2)
    assert (one / "samples.jsonl").read_bytes() == (two / "samples.jsonl").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dpo", "ppo"])
def test_a_base_in_4_bit_is_divided_too(method, command, tiny_sft, tmp_path):
    words = [*command(method), "--load_in_4bit", "true"]
    assert furthest(tiny_sft, run(words, tmp_path / "one", 1), run(words, tmp_path / "two", 2)) <= 1e-4
