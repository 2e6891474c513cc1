"""What the KL term is for: PPO on the demo's models with and without it, watched by a judge that PPO never sees.

    make demo
    python benchmarks/reward_hacking.py --json reward_hacking.json --plot docs/reward_hacking.png

Needs outputs/demo. Both runs start from the same SFT and reward model and take the same prompts; every few updates the
policy answers held-out questions, and the judge, who knows the right answers, counts them.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from kochat_trl.data.records import conversation
from kochat_trl.desk.sample.sample import Judge, make_questions
from kochat_trl.errors import run
from kochat_trl.models.tokenizer import load_tokenizer
from kochat_trl.ppo.roles import load_roles
from kochat_trl.ppo.rollout import sample_responses
from kochat_trl.ppo.trainer import PPOTrainer
from kochat_trl.rows.encode import encode_prompts
from kochat_trl.rows.rows import build_dataset
from kochat_trl.settings.parse import parse_arguments

from transformers import TrainerCallback

KL_COEFS = (0.3, 0.0)
EVERY = 5  # updates between two judgements
QUESTIONS = 200


class Watch(TrainerCallback):
    """Has the policy's answers to held-out questions judged, and keeps the curves."""

    def __init__(self, seed: int) -> None:
        train, held_out = make_questions(seed)
        self.judge, self.prompts = Judge([*train, *held_out]), [q.prompt for q in held_out][:QUESTIONS]
        self.curves: list[dict[str, float]] = []
        self.trainer: Any = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step != 1 and state.global_step % EVERY:
            return
        log = state.log_history[-1]
        row = {"update": state.global_step, "kl": log["objective/kl"], "score": log["objective/scores"]}
        self.curves.append(row | {"right": self.share_right()})

    def share_right(self) -> float:
        trainer, tokenizer = self.trainer, self.trainer.processing_class
        ids = encode_prompts(tokenizer, [conversation(prompt) for prompt in self.prompts])
        responses = sample_responses(
            trainer.roles.policy, ids, range(len(ids)), trainer.args.response_length, 1.0, trainer.stop_ids, 64
        )
        right = []
        for prompt, response in zip(self.prompts, responses, strict=True):
            answer = tokenizer.decode(response, skip_special_tokens=True).strip()
            right.append(self.judge.verdict(prompt, answer, response[-1] in trainer.stop_ids)["correct"])
        return sum(right) / len(right)


def run_ppo(kl_coef: float, updates: int, seed: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        words = ["--output_dir", folder, "--kl_coef", str(kl_coef), "--total_episodes", str(64 * updates)]
        args = parse_arguments("ppo", "configs/tiny/ppo.yaml", [*words, "--seed", str(seed)])
        tokenizer = load_tokenizer(args.training.sft_model_path)
        prompts, _ = build_dataset(args.recipe.train_files, "ppo", tokenizer)
        paths = (args.training.sft_model_path, args.training.reward_model_path)
        roles = load_roles(*paths, args.model, tokenizer)
        watch = Watch(seed)
        watch.trainer = PPOTrainer(args.training, tokenizer, roles, None, None, prompts, callbacks=[watch])
        watch.trainer.train()
        lines = (Path(folder) / "samples.jsonl").read_text(encoding="utf-8").splitlines()
        return {"curves": watch.curves, "last_samples": [json.loads(line)["response"] for line in lines[-4:]]}


def plot(runs: dict[float, Any], file: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(10, 3), layout="constrained")
    titles = {
        "score": "reward model's score",
        "kl": "KL from SFT, nats a response",
        "right": "right answers, held-out questions",
    }
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        for kl_coef, result in runs.items():
            rows = result["curves"]
            axis.plot([row["update"] for row in rows], [row[key] for row in rows], label=f"kl_coef {kl_coef:g}")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("update")
    axes[0].legend(fontsize=8)
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    parser.add_argument("--plot", metavar="FILE", help="draw the curves there")
    parser.add_argument("--updates", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0, help="of the demo (default: 0)")
    arguments = parser.parse_args()
    runs = {kl_coef: run_ppo(kl_coef, arguments.updates, arguments.seed) for kl_coef in KL_COEFS}
    for kl_coef, result in runs.items():
        print(f"kl_coef {kl_coef}")
        for row in result["curves"]:
            print("  update {update:3}  score {score:5.2f}  KL {kl:6.2f}  right {right:.3f}".format(**row))
        print("  last answers:", *result["last_samples"], sep="\n    ")
    if arguments.json:
        text = json.dumps({str(kl_coef): result for kl_coef, result in runs.items()}, ensure_ascii=False, indent=2)
        Path(arguments.json).write_text(text + "\n", encoding="utf-8")
    if arguments.plot:
        plot(runs, arguments.plot)


if __name__ == "__main__":
    run(main)
