"""Stage 2, the reward model: which of two answers would a person prefer?

    accelerate launch recipes/reward.py                                   # configs/kogpt2/reward.yaml
    accelerate launch recipes/reward.py --config configs/tiny/reward.yaml --lora_r 32

Each completion of a ranking goes through the model once. `loss:` takes pairs or the whole order from the scores;
`kochat_trl/reward/losses.py` has all three written out.
"""

from kochat_trl.errors import run
from kochat_trl.models.loading import add_lora, cast_trainable_to_float32, new_reward_model
from kochat_trl.models.tokenizer import load_tokenizer
from kochat_trl.reward.trainer import RankingTrainer
from kochat_trl.rows.rows import build_datasets
from kochat_trl.runs.outputs import finish_run, start_run, train


def main() -> None:
    args = start_run("reward")

    # 1. The base, or SFT's, without its LM head, under a score head; LoRA on the blocks, the head trained whole.
    tokenizer = load_tokenizer(args.model.model_name_or_path, args.model.model_revision)
    model = new_reward_model(args.model.model_name_or_path, args.model, tokenizer)
    model = add_lora(model, args.model)

    # 2. Rankings → tokens, through the same template as SFT.
    train_dataset, eval_dataset, data_report = build_datasets("reward", args, tokenizer)

    # 3. Train. −log σ(r_chosen − r_rejected) unless `loss` says otherwise, with r read at an answer's end.
    trainer = RankingTrainer(
        args.recipe,
        model=model,
        args=args.training,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
    )
    cast_trainable_to_float32(trainer.model)
    metrics = train(trainer, args)

    # 4. Save, the head with the adapter.
    finish_run(trainer, model, tokenizer, args, metrics, data_report, "accelerate launch recipes/ppo.py")


if __name__ == "__main__":
    run(main)
