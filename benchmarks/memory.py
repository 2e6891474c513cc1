"""The memory planner against real steps on the CPU: the peak of live bytes, stage by stage.

    python benchmarks/memory.py --json memory.json

Models of three shapes with random weights, in float32, in int8, and in float32 divided among two processes, are loaded
from files and trained by each stage's own trainer, as the recipes do. torch's profiler reports every allocation of the
second step; what was alive before it is added up from the tensors themselves. The planner sees the same configs, and no
weights.
"""

import argparse
import gc
import json
import tempfile
from pathlib import Path
from typing import Any

from kochat_trl.desk.workflow.memory import COMPLETIONS, plan_memory, tokenizer_of_four
from kochat_trl.models.loading import add_lora, cast_trainable_to_float32, load_causal_lm, new_reward_model
from kochat_trl.models.sharding import keep_from_ddp
from kochat_trl.ppo.roles import load_roles
from kochat_trl.ppo.trainer import PPOTrainer
from kochat_trl.reward.trainer import RankingTrainer
from kochat_trl.settings.parse import parse_arguments

import torch
import yaml
from accelerate import PartialState
from common import KOGPT2, run_alone, write_json
from datasets import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback
from trl import SFTTrainer

SHAPES = {
    "tiny": {"vocab_size": 4000, "n_embd": 192, "n_layer": 4, "n_head": 4, "n_positions": 256},
    "mini": {"vocab_size": 51200, "n_embd": 256, "n_layer": 4, "n_head": 4, "n_positions": 1024},
    "kogpt2": KOGPT2,
}
SIZES = {"rows": 4, "length": 128, "prompt": 48, "response": 48, "steps": 2}
PHASES = {"sft": ["SFT"], "reward": ["reward model"], "ppo": ["PPO, update", "PPO, sampling"]}
DIVIDED = "float32, two processes"  # each holds its share of the base


def write_configs(folder: Path, base: Path, sizes: dict[str, int], of_all: dict[str, Any], of_ppo: Any = None) -> None:
    """A set as configs/kogpt2 on another base, of other sizes: SIZES has them."""
    rows, steps = sizes["rows"], sizes["steps"]
    common = {"use_peft": True, "llm_int8_threshold": 0.0, "train_files": ["none"], "per_device_train_batch_size": rows}
    common |= {"gradient_checkpointing": False, "report_to": "none", "save_strategy": "no", "logging_steps": 1}
    common |= of_all
    trained = common | {"model_name_or_path": str(base), "max_length": sizes["length"], "lora_dropout": 0.05}
    trained |= {"lora_r": 16, "lora_alpha": 32, "max_steps": steps}
    ppo = {"sft_model_path": str(folder / "sft"), "reward_model_path": str(folder / "reward")}
    ppo |= {"num_mini_batches": 1, "num_ppo_epochs": 1, "total_episodes": steps * rows, "temperature": 1.0}
    ppo |= {"max_prompt_length": sizes["prompt"], "response_length": sizes["response"]}
    ppo |= {"local_rollout_forward_batch_size": rows} | (of_ppo or {})
    for stage, values in {"sft": trained, "reward": trained, "ppo": common | ppo}.items():
        text = yaml.safe_dump(values | {"output_dir": str(folder / stage)})
        (folder / f"{stage}.yaml").write_text(text, encoding="utf-8")


def build(stage: str, folder: Path) -> Any:
    """A stage's trainer, as its recipe builds it from the configs in the folder, and texts as long as they allow."""
    args = parse_arguments(stage, str(folder), [])  # type: ignore[arg-type]
    tokenizer = tokenizer_of_four()
    if stage == "ppo":
        prompt, count = int(args.max_length or 0), args.training.total_episodes
        data = Dataset.from_dict({"input_ids": [[5 + i % 1000] * prompt for i in range(count)]})
        for name, load in {"sft": load_causal_lm, "reward": new_reward_model}.items():
            before = parse_arguments(name, str(folder), []).model  # type: ignore[arg-type]
            model = add_lora(load(str(before.model_name_or_path), before, tokenizer), before)
            if PartialState().is_main_process:
                model.save_pretrained(folder / name)
        PartialState().wait_for_everyone()
        roles = load_roles(
            str(folder / "sft"), str(folder / "reward"), args.model, tokenizer, args.training.value_function
        )
        return PPOTrainer(args.training, tokenizer, roles, None, None, data)
    base, rows = str(args.model.model_name_or_path), args.training.per_device_train_batch_size * args.training.max_steps
    ids = [5] * int(args.max_length or 0)
    if stage == "reward":
        model = add_lora(new_reward_model(base, args.model, tokenizer), args.model)
        row = {"completion_ids": [ids] * COMPLETIONS, "ranks": [*range(COMPLETIONS)], "length": len(ids)}
        data = Dataset.from_list([row] * rows)
        trainer: Any = RankingTrainer(
            args.recipe, model=model, args=args.training, train_dataset=data, processing_class=tokenizer
        )
    else:
        model = add_lora(load_causal_lm(base, args.model, tokenizer), args.model)
        data = Dataset.from_list([{"input_ids": ids, "labels": ids}] * rows)
        trainer = SFTTrainer(model=model, args=args.training, train_dataset=data, processing_class=tokenizer)
    cast_trainable_to_float32(trainer.model)
    return trainer


class Allocations:
    """The `peak` of live bytes between `start` and `stop`."""

    def __init__(self) -> None:
        self.peak = 0
        self._profile: Any = None

    def start(self) -> None:
        gc.collect()
        storages = {}
        for item in gc.get_objects():
            if isinstance(item, torch.Tensor) and item.device.type == "cpu":
                storages[item.untyped_storage()._cdata] = item.untyped_storage().nbytes()
        self.peak = sum(storages.values())
        self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
        self._profile.__enter__()

    def stop(self) -> None:
        self._profile.__exit__(None, None, None)
        events = [e for e in self._profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        now = self.peak
        for event in sorted(events, key=lambda event: event.start_ns()):
            now += event.nbytes()
            self.peak = max(self.peak, now)


class SecondStep(TrainerCallback):
    """Measures the second step; of PPO its sampling, and what comes after."""

    def __init__(self, stage: str, trainer: Any) -> None:
        self.step, self.sampling = Allocations(), Allocations()
        self.stage = stage
        if stage == "ppo":
            sample = trainer.sample

            def measured(update: int, indices: list[int]) -> Any:
                if update != 1:
                    return sample(update, indices)
                self.sampling.start()
                rollout = sample(update, indices)
                self.sampling.stop()
                self.step.start()
                return rollout

            trainer.sample = measured
        trainer.add_callback(self)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1 and self.stage != "ppo":
            self.step.start()
        elif state.global_step == 2:
            self.step.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        stage, folder = arguments.run
        trainer = build(stage, Path(folder))
        second = SecondStep(stage, trainer)
        keep_from_ddp(trainer.model)
        trainer.train()
        print(json.dumps([second.step.peak, second.sampling.peak]))
        return
    rows = []
    print("| | phase | planned, MiB | measured, MiB | ratio |\n| --- | --- | --- | --- | --- |")
    for shape, sizes in SHAPES.items():
        for precision in ("float32", "int8", DIVIDED):
            processes = 2 if precision == DIVIDED else 1
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                torch.manual_seed(0)
                GPT2LMHeadModel(GPT2Config(**{"pad_token_id": 3} | sizes)).save_pretrained(folder / "base")
                of_all = {"use_cpu": True, "load_in_8bit": precision == "int8", "shard_base": precision == DIVIDED}
                write_configs(folder, folder / "base", SIZES, of_all)
                planned = {footprint.phase: footprint.peak for footprint in plan_memory(folder, processes=processes)}
                for stage, phases in PHASES.items():
                    found = run_alone(__file__, "--run", stage, name, processes=processes)
                    for phase, measured in zip(phases, found, strict=False):
                        row = {"shape": shape, "precision": precision, "phase": phase}
                        rows.append(row | {"planned_bytes": planned[phase], "measured_bytes": measured})
                        figures = (
                            f"{planned[phase] / 2**20:.1f} | {measured / 2**20:.1f} | {planned[phase] / measured:.3f}"
                        )
                        print(f"| {shape}, {precision} | {phase} | {figures} |", flush=True)
    write_json(rows, arguments.json)


if __name__ == "__main__":
    main()
