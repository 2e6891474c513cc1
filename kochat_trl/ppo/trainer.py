"""PPOTrainer: the loop of Ziegler et al. 2019, under the constructor and the names of the trainer that TRL removed."""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kochat_trl.errors import UserError
from kochat_trl.files import set_aside
from kochat_trl.models.loading import positions_of
from kochat_trl.models.sharding import in_step
from kochat_trl.models.template import stop_ids
from kochat_trl.ppo import checkpoint, evaluation, guards, log, objective
from kochat_trl.ppo.rewards import RewardFunctions
from kochat_trl.ppo.roles import Roles, adapter_parameters, roles_of, switch_dropout_off
from kochat_trl.ppo.rollout import MiniBatch, Rollout, Trajectory, draw_prompts, sample_responses, seed_of
from kochat_trl.ppo.step import StepStats, Whole, add_gradients, group_advantages, score_rollout, sum_gradients
from kochat_trl.settings.checks import check_ppo
from kochat_trl.settings.ppo import PPOConfig, divide_batches

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, gather_object
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState, TrainerState

logger = logging.getLogger(__name__)


@dataclass
class OnlineTrainerState(TrainerState):
    """TrainerState, and how many responses were sampled so far."""

    episode: int = 0


class PPOTrainer(Trainer):
    """Proximal policy optimization of a language model against a reward model.

    Takes the arguments of TRL 1.12's PPOTrainer; a script written for that one runs with the import changed. `model`
    may also be `Roles`, four adapters on one backbone, and then the other three models are None.

    `train_dataset` has a column `input_ids` of prompts. Differences from TRL's are listed in docs/ppo.md.

    Raises `UserError` for what can't be trained: DeepSpeed and FSDP, batch sizes that don't divide, too few prompts.
    """

    # What transformers' Trainer allows to be None or of other kinds, and is not so here.
    args: Any  # PPOConfig
    train_dataset: Any
    eval_dataset: Any
    processing_class: Any
    optimizer: Any
    lr_scheduler: Any
    state: Any  # OnlineTrainerState

    def __init__(
        self,
        args: PPOConfig,
        processing_class: PreTrainedTokenizerBase,
        model: Any,
        ref_model: Any,
        reward_model: Any,
        train_dataset: Dataset,
        value_model: Any = None,
        data_collator: Callable[[list[dict[str, Any]]], dict[str, Tensor]] | None = None,
        eval_dataset: Dataset | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        callbacks: list[TrainerCallback] | None = None,
        peft_config: PeftConfig | None = None,
    ):
        check_ppo(args)
        self.a_pass = len(train_dataset) * args.num_generations  # responses
        divide_batches(args, len(train_dataset), PartialState().num_processes)
        if isinstance(model, Roles):
            roles, self.reference_is_start = model, True
        else:
            self.reference_is_start = ref_model is None and not isinstance(model, PeftModel)
            roles = roles_of(args, model, ref_model, reward_model, value_model, peft_config)
        guards.check_value(roles, args)
        guards.check_prompts(positions_of(roles.config), args.response_length, train_dataset, eval_dataset)
        given = [] if args.stop_token_id is None else [args.stop_token_id]
        self.stop_ids = stop_ids(processing_class) if args.stop_token == "eos" else given
        self.reward_functions = RewardFunctions(args) if args.reward_functions else None
        if not roles.reward and not self.reward_functions:
            raise UserError("there is nothing to learn from: give a reward_model, or reward_functions in the config")
        switch_dropout_off(roles)
        super().__init__(
            model=roles,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            optimizers=optimizers,
            callbacks=callbacks,
        )
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise UserError(
                "PPO takes neither DeepSpeed nor accelerate's FSDP: launch it with ddp.yaml, shard_base: true"
            )
        self.roles = roles
        self.policy_model, self.ref_model, self.reward_model, self.value_model = roles.as_models()
        trained: Any = nn.ModuleDict({"policy": self.policy_model})  # TRL's names
        if self.value_model is not None:
            trained["value_model"] = self.value_model
        trained.config, self.model, self.model_wrapped = roles.config, trained, trained
        self._collate = data_collator
        if args.gradient_checkpointing:
            for backbone in {id(role.backbone): role.backbone for role in (roles.policy, roles.value) if role}.values():
                backbone.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs or {"use_reentrant": False})
                backbone.enable_input_require_grads()
        self.trainable = [parameter for parameter in roles.parameters() if parameter.requires_grad]
        if not any(parameter.requires_grad for parameter in self._policy_parameters()):
            raise UserError("no weight of the policy can be trained: load its adapter with is_trainable=True")
        guards.check_shards(roles, args)
        if self.accelerator.num_processes > 1:
            for parameter in self.trainable:  # processes may have drawn new weights of their own
                parameter.data = broadcast(parameter.data)
        self.create_optimizer_and_scheduler(num_training_steps=self.args.num_total_batches)
        self.optimizer = self.accelerator.prepare(self.optimizer)
        self.callback_handler.optimizer, self.callback_handler.lr_scheduler = self.optimizer, self.lr_scheduler
        stateful: Any = [x for x in (*self.callback_handler.callbacks, self.control) if isinstance(x, ExportableState)]
        self.state = OnlineTrainerState(
            is_local_process_zero=self.is_local_process_zero(),
            is_world_process_zero=self.is_world_process_zero(),
            stateful_callbacks=stateful,
        )
        self.kl_coef = args.kl_coef
        self.score_moments = objective.RunningMoments()
        # Of the numbers that PPO reckons with; models may compute in less.
        head, backbone = next(roles.policy.head.parameters()), roles.policy.backbone
        self.dtype = torch.float64 if head.dtype == torch.float64 else torch.float32
        exact = self.dtype == torch.float64 or self.accelerator.mixed_precision == "no"
        self.exact = exact and backbone.dtype in (torch.float32, torch.float64)
        guards.check_head(roles, self.accelerator, self.exact)
        self.samples = Path(str(args.output_dir)) / "samples.jsonl"

    # The loop

    def train(self, resume_from_checkpoint: str | bool | None = None) -> None:  # type: ignore[override]
        """Run all updates, or those that are left after a checkpoint (a folder, or True for the last one).

        Raises `UserError` where a run has gone wrong: numbers that aren't finite, KL beyond `kl_limit`, a policy that
        stays as it was, responses that never end. SIGTERM and Ctrl-C save a checkpoint after the update, and exit.
        With `load_best_model_at_end` the weights are in the end those of the best checkpoint.
        """
        args, state = self.args, self.state
        if resume_from_checkpoint:
            folder = checkpoint.find_checkpoint(args.output_dir, resume_from_checkpoint)
            checkpoint.load_checkpoint(self, folder, OnlineTrainerState)
            state = self.state
        else:
            state.global_step = state.episode = 0
        if self.is_world_process_zero():
            if resume_from_checkpoint:
                log.forget_samples_after(self.samples, state.global_step)
            else:
                set_aside(self.samples)
        state.max_steps, state.num_train_epochs = args.num_total_batches, args.total_episodes / self.a_pass
        state.compute_steps(args, args.num_total_batches)
        self.roles.train()
        self._first_update, self._updates_without_end = state.global_step, 0
        self._weights_before = guards.fingerprint(self._policy_parameters())
        self.control = self.callback_handler.on_train_begin(args, state, self.control)
        if args.eval_on_start and not state.global_step:
            self.evaluate()
        with checkpoint.CaughtSignals() as caught:
            for update in range(state.global_step, args.num_total_batches):
                started = time.perf_counter()
                metrics = self._update(update)
                state.global_step += 1
                state.episode += args.batch_size
                state.epoch = state.episode / self.a_pass
                metrics |= {"episode": state.episode, "lr": self.lr_scheduler.get_last_lr()[0]}
                self.log(metrics | {"eps": args.batch_size / (time.perf_counter() - started)})
                self.lr_scheduler.step()
                self.control = self.callback_handler.on_step_end(args, state, self.control)
                if self.control.should_evaluate:
                    metrics = self.evaluate()
                    if self.control.should_save or not args.load_best_model_at_end:  # else there is none to load
                        self._determine_best_metric(metrics, trial=None)
                stopped = self._on_any_process(caught.number is not None)
                if self.control.should_save or stopped:
                    folder = checkpoint.save_checkpoint(self)
                    self.control = self.callback_handler.on_save(args, state, self.control)
                if stopped:
                    logger.warning("Stopped. To go on: --resume_from_checkpoint %s", folder)
                    caught.obey()
                every = max(1, args.num_total_batches // max(1, args.num_sample_generations))
                if args.num_sample_generations > 0 and update % every == 0:
                    self.generate_completions(sampling=True)
                if self.control.should_training_stop:
                    break
        self.control = self.callback_handler.on_train_end(args, state, self.control)
        if self.control.should_save:
            checkpoint.save_checkpoint(self)
            self.control = self.callback_handler.on_save(args, state, self.control)
        if args.load_best_model_at_end and state.best_model_checkpoint:
            logger.info("Kept: %s, the best by %s", state.best_model_checkpoint, args.metric_for_best_model)
            checkpoint.load_weights(self.roles, Path(state.best_model_checkpoint))

    def _update(self, update: int) -> dict[str, float]:
        """One rollout, and the steps on it; returns its metrics."""
        args = self.args

        # 1. Prompts → responses.
        count = args.batch_size // args.num_generations
        rollout = self.sample(update, draw_prompts(len(self.train_dataset), count, args.seed, update))

        # 2. → log-probabilities under policy and reference, values, and a score for each response.
        plan = rollout.plan(args.mini_batch_size, args.micro_batch_size, args.seed, update, epoch=0)
        trajectory = self.score(rollout, plan)
        scores = trajectory.scores
        if args.normalize_scores:
            self.score_moments.add(scores)
            scores = self.score_moments.normalize(scores)
        scores = objective.final_scores(scores, rollout.ended, args.missing_eos_penalty, args.score_clip)

        # 3. → a reward for each token; GRPO has the KL in its loss instead.
        kl = objective.kl_estimate(trajectory.logprobs, trajectory.ref_logprobs, args.kl_estimator)
        self._guard_rollout(update, rollout, trajectory, kl)
        end = rollout.value_mask.sum(1) - 1  # the last token; with score_after_eos the slot after it
        cost = 0.0 if args.advantages == "grpo" else self.kl_coef
        rewards = objective.token_rewards(scores, kl, rollout.mask, cost, end)
        if args.whiten_rewards:
            rewards = objective.whiten(rewards, rollout.value_mask, shift_mean=False)

        # 4. → advantages and returns; without a value function one advantage for all tokens of a response.
        if args.advantages == "gae":
            advantages, returns = objective.gae(rewards, trajectory.values, rollout.value_mask, args.gamma, args.lam)
            trajectory.advantages, trajectory.returns = objective.whiten(advantages, rollout.mask), returns
        else:
            trajectory.advantages = group_advantages(args, rewards.sum(1))[:, None].expand_as(rewards)

        # 5. → several epochs of steps on them.
        stats: list[StepStats] = []
        for epoch in range(args.num_ppo_epochs):
            if epoch:
                plan = rollout.plan(args.mini_batch_size, args.micro_batch_size, args.seed, update, epoch)
            for mini_batch in plan:
                stats.append(self.step(update, rollout, mini_batch, trajectory, first=not stats))

        # 6. → metrics, and the KL coefficient of the next update.
        has_value = self.roles.value is not None
        metrics = log.update_metrics(
            rollout, trajectory, kl, scores, self.kl_coef, args.missing_eos_penalty, stats, has_value
        )
        if self.is_world_process_zero():
            log.write_samples(self.samples, update, self.processing_class, rollout, trajectory, kl)
        if args.kl_target is not None:
            self.kl_coef = objective.next_kl_coef(
                self.kl_coef, metrics["objective/kl"], args.kl_target, args.kl_horizon, args.batch_size
            )
        if update == self._first_update + guards.MOVES_WITHIN - 1:
            now = guards.fingerprint(self._policy_parameters())
            guards.check_moved(update, self._weights_before, now, args)
        return metrics

    def _guard_rollout(self, update: int, rollout: Rollout, trajectory: Trajectory, kl: Tensor) -> None:
        guards.check_finite(update, trajectory)
        if update == 0 and self.reference_is_start:
            apart = (trajectory.logprobs - trajectory.ref_logprobs).abs().max().item()
            guards.check_equal_at_start("log-probabilities of policy and reference", apart, self.exact)
        guards.check_kl(update, torch.where(rollout.mask, kl, 0).sum(1).mean().item(), self.args.kl_limit)
        self._updates_without_end = 0 if rollout.ended.any() else self._updates_without_end + 1
        if self.stop_ids:
            guards.check_ends(update, self._updates_without_end, self.args)

    def sample(self, update: int, indices: list[int]) -> Rollout:
        """The prompts of an update, each answered num_generations times."""
        args, size = self.args, self.args.num_generations
        prompts = [ids for ids in self.prompt_ids([self.train_dataset[i] for i in indices]) for _ in range(size)]
        seeds = [seed_of(args.seed, "sample", update, i) + number for i in indices for number in range(size)]
        return self.answer(prompts, seeds, args.temperature, args.score_after_eos)

    def answer(
        self, prompts: list[list[int]], seeds: list[int], temperature: float, score_after_eos: bool = False
    ) -> Rollout:
        """Every process answers its share of the prompts, and gets the answers of all."""
        args, accelerator = self.args, self.accelerator
        length, rows = args.response_length, args.local_rollout_forward_batch_size
        mine = range(accelerator.process_index, len(prompts), accelerator.num_processes)
        with accelerator.autocast(), in_step(self.roles.policy.backbone):
            policy, texts, own = self.roles.policy, [prompts[row] for row in mine], [seeds[row] for row in mine]
            responses = sample_responses(policy, texts, own, length, temperature, self.stop_ids, rows)
        everyone = dict(gather_object(list(zip(mine, responses, strict=True))))
        responses = [everyone[row] for row in range(len(prompts))]
        return Rollout.of(prompts, responses, length, self.stop_ids, score_after_eos, accelerator.device)

    def prompt_ids(self, rows: list[Any]) -> list[list[int]]:
        if self._collate is None:
            return [list(row["input_ids"]) for row in rows]
        batch = self._collate(rows)
        ids = batch["input_ids"]
        mask = batch.get("attention_mask", ids != self.processing_class.pad_token_id).bool()
        return [row[keep].tolist() for row, keep in zip(ids, mask, strict=True)]

    def _mine(self, micro_batches: MiniBatch) -> MiniBatch:
        """The share of this process."""
        return micro_batches[self.accelerator.process_index :: self.accelerator.num_processes]

    def score(self, rollout: Rollout, plan: list[MiniBatch]) -> Trajectory:
        """Every process scores its share of the rollout, and gets the numbers of all.

        The first mini-batch comes last: where it is one pass, the first step learns from that very pass.
        """
        batches = [rollout.micro_batch(rows) for mini_batch in plan[::-1] for rows in self._mine(mini_batch)]
        keep = len(self._mine(plan[0])) == 1
        with self.accelerator.autocast():
            own = score_rollout(self.roles, rollout, batches, self.args.temperature, self.dtype, keep)
        parts = (own.logprobs, own.ref_logprobs, own.values, own.scores)
        trajectory = Trajectory(*(self.accelerator.reduce(part, "sum") for part in parts))
        trajectory.kept = own.kept
        if functions := self.reward_functions:
            rows = [row for batch in batches for row in batch.rows.tolist()]
            own_rewards = functions.of_rollout(rollout, rows, self.processing_class)
            trajectory.rewards = {"reward_model": trajectory.scores} if self.roles.reward else {}
            trajectory.rewards |= self.accelerator.reduce(own_rewards, "sum")
            trajectory.scores = trajectory.scores + functions.total(trajectory.rewards)
        return trajectory

    def step(
        self, update: int, rollout: Rollout, mini_batch: MiniBatch, trajectory: Trajectory, first: bool
    ) -> StepStats:
        """One optimizer step on a mini-batch; returns means over its tokens.

        A token weighs the same whatever micro-batch or process it is in: losses are divided by what is in the whole
        mini-batch, and gradients are summed. `first` is for the first step on a rollout.
        """
        args, accelerator = self.args, self.accelerator
        rows = torch.tensor([row for part in mini_batch for row in part], device=rollout.tokens.device)
        whole = Whole(len(rows), rollout.mask[rows].sum(), rollout.value_mask[rows].sum())
        parts, furthest = [], []
        for micro_batch in self._mine(mini_batch):
            batch = rollout.micro_batch(micro_batch)
            part, moved = add_gradients(self.roles, rollout, batch, trajectory, args, accelerator, self.kl_coef, whole)
            parts.append(torch.stack([value.to(self.dtype) for value in part]))
            furthest.append(moved)
        stats = StepStats(*accelerator.reduce(torch.stack(parts).sum(0), "sum").tolist())
        guards.check_step(update, stats)
        if first and update == 0:
            what = "the policy's log-probabilities in the first step and in the rollout"
            apart = accelerator.gather(torch.stack(furthest).max()[None]).max().item()
            guards.check_equal_at_start(what, apart, self.exact)
        sum_gradients(self.trainable, accelerator.num_processes)
        norm = accelerator.clip_grad_norm_(self.trainable, args.max_grad_norm or math.inf)
        if accelerator.scaler is None:  # fp16 skips a step that isn't finite, and scales its loss down
            guards.check_gradient(update, norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return stats

    def _policy_parameters(self) -> list[nn.Parameter]:
        model, adapter = self.roles.models["policy"], self.roles.policy.adapter
        return list(adapter_parameters(model, adapter) if adapter else model.parameters())

    def _on_any_process(self, flag: bool) -> bool:
        count = torch.tensor(float(flag), device=self.accelerator.device)
        return bool(self.accelerator.reduce(count, "sum") > 0)

    # What a run leaves behind

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the policy, and the value function into the folder `value` in it."""
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            self.roles.save_pretrained(folder)
            self.processing_class.save_pretrained(folder)

    def create_model_card(  # type: ignore[override]
        self, model_name: str | None = None, dataset_name: str | None = None, tags: Any = None, **kwargs: Any
    ) -> None:
        """A card with TRL's arguments."""
        dataset = kwargs.pop("dataset", dataset_name)
        super().create_model_card(model_name=model_name, dataset=dataset, tags=tags, **kwargs)

    def evaluate(
        self, eval_dataset: Dataset | None = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Answer all prompts of `eval_dataset` greedily; logs and returns the metrics of `evaluation.evaluate`."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        metrics = evaluation.evaluate(self, dataset, metric_key_prefix)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def generate_completions(self, sampling: bool = False) -> None:
        """Print greedy answers to the first prompts of `eval_dataset`, and their scores."""
        if self.eval_dataset is None:
            return
        count = len(self.eval_dataset)
        count = min(count, self.args.per_device_eval_batch_size) if sampling else count
        rollout, _, scores = evaluation.greedy_answers(self, self.eval_dataset, count)
        if self.is_world_process_zero():
            log.print_answers(self.processing_class, rollout, scores.tolist())
