"""RLOO, GRPO and DPO beside TRL's trainers: an update of 8 responses, and a step of 4 pairs.

    python benchmarks/methods.py --json methods.json

kogpt2's shape with random weights, LoRA of rank 16 on all linear layers, float32 on the CPU, no gradient checkpointing,
prompts of lengths as in KoChatGPT's file, answers of 64 tokens. Each contender runs in a process of its own; its memory
is the peak above what importing takes. The first update warms up, and the median of the others counts.

- `rloo`, `grpo`: an update of 2 prompts with 4 responses each, scored by a GPT-2 classifier, and then 1 step or 4. The
  KL costs what TRL's default is: 0.05 in RLOO, nothing in GRPO. `ours` has policy, reference and reward on one
  backbone. `trl` is given a LoRA policy, whose reference is its copy on the same backbone, and a reward model.
- `dpo`: `ours` and `ours_int8` have policy and reference on one backbone. `trl` is TRL's plain use, a policy that is
  trained whole and a reference model; `trl_lora` has a LoRA policy and a reference model. The steps are TRL's in all.
"""

import argparse
import json
import statistics
import tempfile
from itertools import pairwise, product
from typing import Any

from kochat_trl.models.loading import add_lora, load_causal_lm
from kochat_trl.ppo.roles import one_backbone
from kochat_trl.ppo.trainer import PPOTrainer
from kochat_trl.preference.trainer import PairTrainer, load_policy_and_reference
from kochat_trl.settings.keys import ModelArguments
from kochat_trl.settings.ppo import PPOConfig
from kochat_trl.settings.preference import DPOConfig

import torch
from common import KOGPT2, machine, memory, run_alone, write_json
from datasets import Dataset
from ppo import LORA, SMALL, Clock, make_prompts, make_tokenizer, reward_model, settings, write_stages
from tokenizers import Regex, Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast
from trl import DPOTrainer, GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

CONTENDERS = {"rloo": ("ours", "trl"), "grpo": ("ours", "trl"), "dpo": ("ours", "ours_int8", "trl", "trl_lora")}
STEPS = {"rloo": (1, 4), "grpo": (1, 4), "dpo": (1,)}  # an update
KL = {"rloo": 0.05, "grpo": 0.0}
LENGTH, GROUP, RESPONSES = 64, 4, 8
LOADING = {
    "ours": ModelArguments(use_peft=True, dtype="float32"),
    "ours_int8": ModelArguments(use_peft=True, dtype="float32", load_in_8bit=True, llm_int8_threshold=0.0),
}


def letters(words: int) -> PreTrainedTokenizerFast:
    """A character a token, since TRL hands texts to its reward model: what is decoded is encoded as it was."""
    tokens = Tokenizer(WordLevel({chr(0x10000 + i): i for i in range(words)}))
    tokens.pre_tokenizer, tokens.decoder = Split(Regex("."), "isolated"), decoders.Fuse()
    special = {"eos_token": chr(0x10001), "pad_token": chr(0x10003)}
    return PreTrainedTokenizerFast(tokenizer_object=tokens, padding_side="left", **special)


def shared_settings(folder: str, length: int) -> dict[str, Any]:
    """Those of benchmarks/ppo.py that every trainer has."""
    of_ppo = ("total_episodes", "response_length", "num_ppo_epochs", "num_mini_batches", "num_sample_generations")
    own = (*of_ppo, "local_rollout_forward_batch_size", "temperature")
    return {key: value for key, value in settings(folder, 1, length).items() if key not in own}


def build_group(method: str, steps: int, who: str, folder: str, updates: int, words: int) -> Any:
    prompts = make_prompts(RESPONSES // GROUP * updates)
    if who == "ours":
        backbone = load_causal_lm(f"{folder}/base", LOADING[who], make_tokenizer())
        roles = one_backbone(backbone, f"{folder}/sft", f"{folder}/reward", None)
        values = settings(folder, updates, LENGTH) | {"num_ppo_epochs": steps, "kl_coef": KL[method]}
        values |= {"advantages": method, "num_generations": GROUP}
        return PPOTrainer(PPOConfig(**values), make_tokenizer(), roles, None, None, prompts)
    tokenizer = letters(words)
    trainer, config = (RLOOTrainer, RLOOConfig) if method == "rloo" else (GRPOTrainer, GRPOConfig)
    return trainer(
        model=add_lora(GPT2LMHeadModel.from_pretrained(f"{folder}/base"), LORA),
        reward_funcs=reward_model(folder),
        args=config(
            **shared_settings(folder, LENGTH),
            max_steps=steps * updates,
            num_generations=GROUP,
            steps_per_generation=1,
            num_iterations=steps,
            max_completion_length=LENGTH,
            beta=KL[method],
            disable_dropout=True,
        ),
        train_dataset=Dataset.from_dict({"prompt": [tokenizer.decode(ids) for ids in prompts["input_ids"]]}),
        processing_class=tokenizer,
        reward_processing_classes=letters(words),
    )


class TokenizedDPOTrainer(DPOTrainer):
    """TRL's, given rows that are tokenized already."""

    def _prepare_dataset(self, dataset: Any, *unused: Any) -> Any:
        return dataset


def build_dpo(who: str, folder: str, updates: int) -> Any:
    generator, pairs = torch.Generator().manual_seed(1), RESPONSES // 2 * updates
    chosen, rejected = torch.randint(6, SMALL["vocab_size"], (2, pairs, LENGTH), generator=generator).tolist()
    rows = {"prompt_ids": make_prompts(pairs)["input_ids"], "chosen_ids": chosen, "rejected_ids": rejected}
    values = shared_settings(folder, LENGTH) | {"per_device_train_batch_size": RESPONSES // 2, "max_steps": updates}
    config = DPOConfig(**values)
    if who.startswith("ours"):
        models = load_policy_and_reference(f"{folder}/sft", LOADING[who], make_tokenizer())
        trainer: type[DPOTrainer] = PairTrainer
    else:
        policy, reference = (GPT2LMHeadModel.from_pretrained(f"{folder}/base") for _ in range(2))
        models = (add_lora(policy, LORA) if who == "trl_lora" else policy), reference
        trainer = TokenizedDPOTrainer
    return trainer(*models, config, train_dataset=Dataset.from_dict(rows), processing_class=make_tokenizer())


def run_contender(method: str, steps: int, who: str, folder: str, updates: int, words: int) -> dict[str, Any]:
    baseline, clock = memory(), Clock()
    dpo = method == "dpo"
    trainer = build_dpo(who, folder, updates) if dpo else build_group(method, steps, who, folder, updates, words)
    trainer.add_callback(clock)
    trainer.train()
    # Our trainer tells when an update ended, TRL's when a step did.
    ends = clock.times if who == "ours" else clock.times[::steps]
    seconds = [end - start for start, end in pairwise(ends)][1:]
    return {"seconds": statistics.median(seconds), "all_seconds": seconds, "peak_bytes": memory() - baseline}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    parser.add_argument("--updates", type=int, default=4, help="the first warms up (default: 4)")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=[*CONTENDERS], metavar="METHOD")
    parser.add_argument("--small", action="store_true", help="a small model, to see that all of it runs")
    parser.add_argument("--run", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    shape = SMALL if arguments.small else {}
    if arguments.run:
        method, steps, who, folder = arguments.run
        words = (KOGPT2 | shape)["vocab_size"]
        print(json.dumps(run_contender(method, int(steps), who, folder, arguments.updates, words)))
        return

    figures: dict[str, Any] = {"machine": machine(), "ratios": {}}
    flags = ["--updates", arguments.updates, *["--small"] * arguments.small]
    with tempfile.TemporaryDirectory() as folder:
        write_stages(folder, **shape)
        for method in arguments.only:
            for steps, who in product(STEPS[method], CONTENDERS[method]):
                name = f"{method} {steps} {who}"
                row = figures[name] = run_alone(__file__, "--run", method, steps, who, folder, *flags)
                print(f"{name:17} {row['seconds']:6.2f} s  {row['peak_bytes'] / 2**30:5.2f} GiB", flush=True)
            for steps, who in product(STEPS[method], CONTENDERS[method]):
                ours, theirs = (figures[f"{method} {steps} {name}"] for name in (who, "trl"))
                if who != "trl":
                    figures["ratios"][f"{method} {steps} {who}"] = {
                        "speed": theirs["seconds"] / ours["seconds"],
                        "memory": ours["peak_bytes"] / theirs["peak_bytes"],
                    }
    for name, ratio in figures["ratios"].items():
        print(f"{name:17} {ratio['speed']:.2f} times as fast as trl, {ratio['memory']:.0%} of its memory")
    write_json(figures, arguments.json)


if __name__ == "__main__":
    main()
