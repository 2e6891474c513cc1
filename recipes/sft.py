"""Stage 1, supervised fine-tuning.

    accelerate launch recipes/sft.py                                      # configs/kogpt2/sft.yaml
    accelerate launch recipes/sft.py --config configs/tiny/sft.yaml --learning_rate 1e-4

Every key of the config is also a flag: `python recipes/sft.py --help`.
"""

from kochat_trl.errors import run
from kochat_trl.models.loading import add_lora, cast_trainable_to_float32, load_causal_lm
from kochat_trl.models.tokenizer import load_tokenizer
from kochat_trl.rows.rows import build_datasets
from kochat_trl.runs.outputs import finish_run, start_run, train

from trl import SFTTrainer


def main() -> None:
    args = start_run("sft")

    # 1. The base, quantized if asked for, under a new LoRA adapter, or one to go on with.
    tokenizer = load_tokenizer(args.model.model_name_or_path, args.model.model_revision)
    model = load_causal_lm(args.model.model_name_or_path, args.model, tokenizer)
    model = add_lora(model, args.model)

    # 2. Text → tokens. Labels are the assistant's turns, with the token that ends each; everything else is −100.
    train_dataset, eval_dataset, data_report = build_datasets("sft", args, tokenizer)

    # 3. Train. Cross-entropy on the labels.
    data = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
    trainer = SFTTrainer(model, args.training, processing_class=tokenizer, **data)
    cast_trainable_to_float32(trainer.model)
    metrics = train(trainer, args)

    # 4. Save.
    finish_run(trainer, model, tokenizer, args, metrics, data_report, "accelerate launch recipes/reward.py")


if __name__ == "__main__":
    run(main)
