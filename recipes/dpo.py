"""DPO, in place of reward model and PPO: make the better of two answers likelier, straight from the rankings.

    accelerate launch recipes/dpo.py                                      # configs/kogpt2/dpo.yaml
    accelerate launch recipes/dpo.py --config configs/tiny/dpo.yaml --beta 0.1 --loss_type ipo

Needs the output of SFT (`sft_model_path`). docs/preference.md has the loss, and the keys.
"""

from kochat_trl.errors import run
from kochat_trl.models.tokenizer import load_tokenizer
from kochat_trl.preference.trainer import PairTrainer, load_policy_and_reference
from kochat_trl.rows.rows import build_datasets
from kochat_trl.runs.outputs import finish_run, start_run, train


def main() -> None:
    args = start_run("dpo")
    sft_path = args.training.sft_model_path

    # 1. The policy goes on with SFT's adapter, and the reference is that adapter, frozen, on the same backbone.
    tokenizer = load_tokenizer(sft_path, args.model.model_revision)
    policy, reference = load_policy_and_reference(sft_path, args.model, tokenizer)

    # 2. Rankings → pairs → tokens, through the template of SFT.
    train_dataset, eval_dataset, data_report = build_datasets("dpo", args, tokenizer)

    # 3. Train. −log σ(β·(log-ratio of the chosen − log-ratio of the rejected)) unless `loss_type` says otherwise.
    data = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
    trainer = PairTrainer(policy, reference, args.training, processing_class=tokenizer, **data)
    metrics = train(trainer, args)

    # 4. Save the policy.
    next_step = f"kochat chat {args.training.output_dir}"
    finish_run(trainer, policy, tokenizer, args, metrics, data_report, next_step)


if __name__ == "__main__":
    run(main)
