"""Stage 3, PPO: answer prompts, score the answers, and make the better ones likelier.

    accelerate launch recipes/ppo.py                                      # configs/kogpt2/ppo.yaml
    accelerate launch recipes/ppo.py --config configs/tiny/ppo.yaml --kl_coef 0.1

Needs the outputs of stages 1 (`sft_model_path`) and, unless `reward_functions` suffice, 2 (`reward_model_path`). What
PPO computes is in `kochat_trl/ppo/objective.py`; how, in `kochat_trl/ppo/trainer.py`.
"""

from kochat_trl.errors import run
from kochat_trl.models.loading import require_stage_output
from kochat_trl.models.tokenizer import check_same_texts, load_tokenizer
from kochat_trl.ppo import PPOTrainer, stock
from kochat_trl.ppo.roles import load_roles
from kochat_trl.rows.rows import build_datasets
from kochat_trl.runs.outputs import finish_run, start_run, train


def main() -> None:
    args = start_run("ppo")
    training = args.training
    sft_path, reward_path = training.sft_model_path, training.reward_model_path
    require_stage_output(sft_path)
    if reward_path:
        require_stage_output(reward_path)

    # 1. Policy, reference, reward and value: four adapters on one backbone. The policy starts as the SFT adapter, and
    #    the reference stays it; the value starts as the reward model, which stays as it is too. RLOO and GRPO
    #    have none.
    ours = training.engine == "kochat"
    tokenizer = load_tokenizer(sft_path, args.model.model_revision)
    if reward_path:
        check_same_texts(tokenizer, sft_path, load_tokenizer(reward_path), reward_path)
    roles = load_roles(sft_path, reward_path, args.model, tokenizer, training.value_function, share=ours)

    # 2. Prompts → tokens, through the template of SFT, up to where the answer starts.
    train_dataset, eval_dataset, data_report = build_datasets("ppo", args, tokenizer)
    if not ours:
        stock.refuse_unsupported(training, tokenizer, train_dataset)

    # 3. Train.
    if ours:
        trainer = PPOTrainer(training, tokenizer, roles, None, None, train_dataset, eval_dataset=eval_dataset)
    else:
        trainer = stock.build_trainer(args.resolved, tokenizer, roles, train_dataset, eval_dataset)
    metrics = train(trainer, args)

    # 4. Save the policy, and the value function beside it.
    next_step = f"load {training.output_dir} with transformers"
    if roles.policy.adapter:
        next_step = f"python scripts/merge_lora.py --adapter {training.output_dir} --output FOLDER"
    finish_run(trainer, roles, tokenizer, args, metrics, data_report, next_step)


if __name__ == "__main__":
    run(main)
