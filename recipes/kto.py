"""KTO, in place of reward model and PPO: from answers that are good or bad, each by itself.

    accelerate launch recipes/kto.py                                      # configs/kogpt2/kto.yaml
    accelerate launch recipes/kto.py --config configs/tiny/kto.yaml --desirable_weight 1

Needs the output of SFT (`sft_model_path`). Of a ranking the best answers are good and the others bad.
docs/preference.md has the loss, and the keys.
"""

from kochat_trl.errors import run
from kochat_trl.models.tokenizer import load_tokenizer
from kochat_trl.preference.trainer import LabelTrainer, load_policy_and_reference
from kochat_trl.rows.rows import build_datasets
from kochat_trl.runs.outputs import finish_run, start_run, train


def main() -> None:
    args = start_run("kto")
    sft_path = args.training.sft_model_path

    # 1. The policy goes on with SFT's adapter, and the reference is that adapter, frozen, on the same backbone.
    tokenizer = load_tokenizer(sft_path, args.model.model_revision)
    policy, reference = load_policy_and_reference(sft_path, args.model, tokenizer)

    # 2. Labelled answers → tokens, through the template of SFT.
    train_dataset, eval_dataset, data_report = build_datasets("kto", args, tokenizer)

    # 3. Train. 1 − σ(β·(log-ratio − KL)) of a good answer, 1 − σ(β·(KL − log-ratio)) of a bad one.
    data = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
    trainer = LabelTrainer(policy, reference, args.training, processing_class=tokenizer, **data)
    metrics = train(trainer, args)

    # 4. Save the policy.
    next_step = f"kochat chat {args.training.output_dir}"
    finish_run(trainer, policy, tokenizer, args, metrics, data_report, next_step)


if __name__ == "__main__":
    run(main)
