"""Stage 3, PPO: answer prompts, score the answers, and make the better ones likelier.

    accelerate launch recipes/ppo.py                                      # configs/kogpt2/ppo.yaml
    accelerate launch recipes/ppo.py --config configs/tiny/ppo.yaml --kl_coef 0.1

Needs the outputs of stages 1 (`sft_model_path`) and 2 (`reward_model_path`).
"""

from pathlib import Path

from kochat_trl.data.convert import build_datasets
from kochat_trl.errors import UserError, run
from kochat_trl.merge import merge_adapter
from kochat_trl.models import (
    add_lora,
    base_of_adapter,
    cast_trainable_to_float32,
    is_adapter,
    load_causal_lm,
    load_config,
    load_reward_model,
    require_stage_output,
)
from kochat_trl.outputs import finish_run, start_run
from kochat_trl.ppo.stock import build_trainer, refuse_unsupported
from kochat_trl.tokenizer import load_tokenizer


def main() -> None:
    args = start_run("ppo", default_config="configs/kogpt2/ppo.yaml")
    training, recipe = args.training, args.recipe
    sft_path, reward_path = training.sft_model_path, training.reward_model_path
    require_stage_output(sft_path)
    require_stage_output(reward_path)

    # 1. Prompts → tokens, through the template of SFT, up to where the answer starts.
    tokenizer = load_tokenizer(sft_path, args.model.model_revision)
    train_dataset, eval_dataset, data_report = build_datasets(
        recipe.train_files,
        recipe.eval_files,
        "ppo",
        tokenizer,
        recipe.max_prompt_length,
        recipe,
    )
    base, revision = base_of_adapter(sft_path) if is_adapter(sft_path) else (sft_path, args.model.model_revision)
    refuse_unsupported(training, tokenizer, train_dataset, load_config(base, revision).max_position_embeddings)
    if load_tokenizer(reward_path).get_vocab() != tokenizer.get_vocab():
        raise UserError(f"{reward_path} reads other tokens than {sft_path}: train both from the same base")

    # 2. The policy: a new adapter on the SFT model. With the adapter switched off it is the reference.
    #    The SFT adapter is merged in float; what is loaded again may be quantized.
    if is_adapter(sft_path):
        sft_base = str(Path(training.output_dir) / "sft_merged")
        merge_adapter(sft_path, sft_base)
    else:
        sft_base = sft_path
    policy = add_lora(load_causal_lm(sft_base, args.model, tokenizer), args.model)

    # 3. The reward model is frozen; the value model starts from it and is trained.
    reward_model = load_reward_model(reward_path, args.model, tokenizer)
    value_model = load_reward_model(reward_path, args.model, tokenizer, trainable=True)

    # 4. Train.
    trainer = build_trainer(training, tokenizer, policy, reward_model, value_model, train_dataset, eval_dataset)
    cast_trainable_to_float32(trainer.model)
    trainer.train()

    # 5. Save the policy's adapter.
    last = trainer.state.log_history[-1]
    finish_run(
        trainer,
        trainer.accelerator.unwrap_model(trainer.model).policy,
        tokenizer,
        args,
        last,
        data_report,
        f"python scripts/merge_lora.py --adapter {training.output_dir} --output FOLDER"
        if args.model.use_peft
        else f"load {training.output_dir} with transformers",
    )


if __name__ == "__main__":
    run(main)
