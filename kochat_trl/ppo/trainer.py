"""PPOTrainer: the loop of Ziegler et al. 2019, under the constructor and the names of the trainer that TRL removed."""

import json
import logging
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kochat_trl.errors import UserError
from kochat_trl.files import set_aside
from kochat_trl.ppo import objective
from kochat_trl.ppo.checkpoint import (
    CaughtSignals,
    drop_old_checkpoints,
    find_checkpoint,
    random_state,
    set_random_state,
)
from kochat_trl.ppo.logprobs import token_logprobs
from kochat_trl.ppo.roles import Roles, adapter_parameters, separate_models
from kochat_trl.ppo.rollout import MicroBatch, Rollout, sample_responses, score_rollout, seed_of, spread
from kochat_trl.settings.ppo import PPOConfig

import numpy as np
import torch
import torch.distributed
from accelerate import PartialState
from accelerate.utils import broadcast, gather_object
from datasets import Dataset
from peft import PeftConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.table import Table
from rich.text import Text
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState, TrainerState

SAMPLES = 4  # responses of each update that samples.jsonl keeps
TOLERANCE = 1e-5  # of log-probabilities that must be equal before anything is learnt
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
        self._divide_batches(args, len(train_dataset))
        if isinstance(model, Roles):
            roles, self.reference_is_start = model, True
        else:
            if ref_model is model:
                raise UserError("`model` and `ref_model` are one object; give a copy, or None")
            if value_model is not None and value_model is reward_model:
                raise UserError("`value_model` and `reward_model` are one object: one is trained, the other isn't")
            if (value_model is None) != (args.value_model == "shared"):
                raise UserError("give `value_model`, or set `value_model: shared` in the config, and not both")
            if peft_config is not None and isinstance(model, PeftModel):
                raise UserError("`model` has an adapter already, and `peft_config` asks for another; remove one")
            self.reference_is_start = ref_model is None and not isinstance(model, PeftModel)
            if peft_config is not None:
                model = get_peft_model(model, peft_config)
            adapters = (args.model_adapter_name, args.ref_adapter_name)
            roles = separate_models(model, ref_model, reward_model, value_model, *adapters)
        self._check_lengths(roles.config, args.response_length, train_dataset, eval_dataset)
        if args.stop_token and args.stop_token_id is not None:
            raise UserError("stop_token and stop_token_id are both set; remove one")
        if args.missing_eos_penalty is not None and not args.stop_token and args.stop_token_id is None:
            raise UserError("missing_eos_penalty: no response can end itself without a stop token; set stop_token: eos")
        self._refuse_unread(args)
        self.stop_token_id = processing_class.eos_token_id if args.stop_token == "eos" else args.stop_token_id
        _switch_dropout_off(roles)
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
            raise UserError("PPO runs on one GPU, or on several with a whole model on each; not with DeepSpeed or FSDP")
        self.roles = roles
        self._collate = data_collator
        self._check_heads()
        if args.gradient_checkpointing:
            for backbone in {id(role.backbone): role.backbone for role in (roles.policy, roles.value)}.values():
                backbone.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs or {"use_reentrant": False})
                backbone.enable_input_require_grads()
        self.trainable = [parameter for parameter in roles.parameters() if parameter.requires_grad]
        if not any(parameter.requires_grad for parameter in self._policy_parameters()):
            raise UserError("no weight of the policy can be trained: load its adapter with is_trainable=True")
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
        self.dtype = torch.float64 if next(roles.policy.head.parameters()).dtype == torch.float64 else torch.float32

    @staticmethod
    def _divide_batches(args: PPOConfig, prompts: int) -> None:
        """Work out TRL's batch sizes: rollout, mini-batch, micro-batch; of a process (`local_`) and of all."""
        processes = PartialState().num_processes
        args.local_batch_size = args.per_device_train_batch_size * args.gradient_accumulation_steps
        args.batch_size = args.local_batch_size * processes
        if args.local_batch_size % args.num_mini_batches:
            raise UserError(
                f"a rollout of {args.local_batch_size} responses (per_device_train_batch_size · "
                f"gradient_accumulation_steps) doesn't divide into {args.num_mini_batches} mini-batches "
                "(num_mini_batches)"
            )
        args.mini_batch_size = args.batch_size // args.num_mini_batches
        args.local_mini_batch_size = args.local_batch_size // args.num_mini_batches
        args.micro_batch_size = min(args.per_device_train_batch_size, args.local_mini_batch_size)
        if prompts < args.batch_size:
            raise UserError(
                f"{prompts} prompts are fewer than one rollout of {args.batch_size} (per_device_train_batch_size · "
                "gradient_accumulation_steps · processes)"
            )
        if args.total_episodes is None:
            args.total_episodes = int(args.num_train_epochs * prompts)
        args.num_total_batches = math.ceil(args.total_episodes / args.batch_size)
        if args.temperature <= 0:
            raise UserError(f"temperature: found {args.temperature}, expected above 0: PPO learns from samples")

    @staticmethod
    def _refuse_unread(args: PPOConfig) -> None:
        """Raise `UserError` for settings of transformers' Trainer that this loop would not obey."""
        if args.save_strategy not in ("no", "steps"):
            raise UserError("save_strategy: expected no or steps: PPO has no epochs to save after")
        if args.eval_strategy != "no" or args.load_best_model_at_end:
            raise UserError("eval_strategy, load_best_model_at_end: PPO has no evaluation; set num_sample_generations")
        if args.kl_estimator not in ("k1", "k2", "k3"):
            raise UserError(f"kl_estimator: found '{args.kl_estimator}', expected k1, k2 or k3")
        if args.kl_target is not None and args.kl_target <= 0:
            raise UserError(f"kl_target: found {args.kl_target}, expected nats above 0")
        if args.total_episodes is not None and args.total_episodes < 1:
            raise UserError(f"total_episodes: found {args.total_episodes}, expected 1 or more")

    @staticmethod
    def _check_lengths(config: Any, response_length: int, *datasets: Any) -> None:
        """Raise `UserError` if a prompt and its response may take more positions than the model has."""
        positions = getattr(config, "max_position_embeddings", None)  # BLOOM has no limit
        longest = max(len(ids) for data in datasets if data is not None for ids in data["input_ids"]) + response_length
        if positions is not None and longest > positions:
            raise UserError(
                f"the longest prompt and response_length make {longest} tokens, and the model has {positions} "
                "positions; lower max_prompt_length or response_length"
            )

    @torch.no_grad()
    def _check_heads(self) -> None:
        """Raise `UserError` if the policy's scores are more than its head on its hidden states (a soft cap, say)."""
        policy = self.roles.policy
        causal_lm = self.roles.models["policy"]
        ids = torch.arange(2, device=self.accelerator.device)[None]
        with policy.active(), self.accelerator.autocast():
            ours = policy.head(policy.hidden(ids, torch.ones_like(ids)))
            theirs = causal_lm(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        if not torch.allclose(ours.float(), theirs.float(), rtol=1e-3, atol=1e-3):
            raise UserError(f"{type(causal_lm).__name__} changes its logits after the head; PPO here can't score it")

    # The loop

    def train(self, resume_from_checkpoint: str | bool | None = None) -> None:  # type: ignore[override]
        """Run all updates, or those that are left after a checkpoint (a folder, or True for the last one).

        Raises `UserError` where a run has gone wrong: numbers that aren't finite, KL beyond `kl_limit`, a policy that
        stays as it was, responses that never end. SIGTERM and Ctrl-C save a checkpoint after the update, and exit.
        """
        args, state = self.args, self.state
        if resume_from_checkpoint:
            self._load_checkpoint(resume_from_checkpoint)
            state = self.state
        else:
            state.global_step = state.episode = 0
            if self.is_world_process_zero():
                set_aside(Path(args.output_dir) / "samples.jsonl")
        state.max_steps, state.num_train_epochs = args.num_total_batches, args.total_episodes / len(self.train_dataset)
        state.compute_steps(args, args.num_total_batches)
        self.roles.train()
        self._first_update, self._updates_without_end, self._weights_before = state.global_step, 0, self._fingerprint()
        self.control = self.callback_handler.on_train_begin(args, state, self.control)
        with CaughtSignals() as caught:
            for update in range(state.global_step, args.num_total_batches):
                started = time.perf_counter()
                metrics = self._update(update)
                state.global_step += 1
                state.episode += args.batch_size
                state.epoch = state.episode / len(self.train_dataset)
                metrics |= {"episode": state.episode, "lr": self.lr_scheduler.get_last_lr()[0]}
                self.log(metrics | {"eps": args.batch_size / (time.perf_counter() - started)})
                self.lr_scheduler.step()
                self.control = self.callback_handler.on_step_end(args, state, self.control)
                stopped = self._on_any_process(caught.number is not None)
                if self.control.should_save or stopped:
                    folder = self._save_checkpoint()
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
            self._save_checkpoint()
            self.control = self.callback_handler.on_save(args, state, self.control)

    def _update(self, update: int) -> dict[str, float]:
        """One rollout, and the steps on it; returns its metrics."""
        args = self.args

        # 1. Prompts → responses.
        rollout = self._sample(update, self._draw_prompts(update))

        # 2. → log-probabilities under policy and reference, values, and a score for each response.
        plan = self._plan(update, 0, rollout)
        scored = self._score(rollout, plan)
        logprobs, values = scored["logprobs"], scored["values"]
        scores = scored["scores"]
        if args.normalize_scores:
            self.score_moments.add(scores)
            scores = self.score_moments.normalize(scores)
        scores = objective.final_scores(scores, rollout.ended, args.missing_eos_penalty, args.score_clip)

        # 3. → a reward for each token.
        kl = objective.kl_estimate(logprobs, scored["ref_logprobs"], args.kl_estimator)
        self._guard_rollout(update, rollout, scored, kl)
        end = rollout.value_mask.sum(1) - 1  # the last token; with score_after_eos the slot after it
        rewards = objective.token_rewards(scores, kl, rollout.mask, self.kl_coef, end)
        if args.whiten_rewards:
            rewards = objective.whiten(rewards, rollout.value_mask, shift_mean=False)

        # 4. → advantages and returns.
        advantages, returns = objective.gae(rewards, values, rollout.value_mask, args.gamma, args.lam)
        advantages = objective.whiten(advantages, rollout.mask)

        # 5. → several epochs of steps on them.
        targets = {"logprobs": logprobs, "values": values, "advantages": advantages, "returns": returns}
        stats: list[dict[str, float]] = []
        for epoch in range(args.num_ppo_epochs):
            for mini_batch in plan if epoch == 0 else self._plan(update, epoch, rollout):
                stats.append(self._step(update, rollout, mini_batch, targets, first=not stats))

        # 6. → metrics, and the KL coefficient of the next update.
        metrics = self._metrics(rollout, logprobs, scores, kl, stats)
        self._write_samples(update, rollout, scored["scores"], kl)
        if args.kl_target is not None:
            self.kl_coef = objective.next_kl_coef(
                self.kl_coef, metrics["objective/kl"], args.kl_target, args.kl_horizon, args.batch_size
            )
        self._guard_policy(update)
        return metrics

    def _draw_prompts(self, update: int) -> list[int]:
        """The prompts of an update, by index: each pass over the data has an order of its own, and leaves a rest."""
        updates_a_pass = len(self.train_dataset) // self.args.batch_size
        order = self._shuffled(len(self.train_dataset), "order", update // updates_a_pass)
        start = update % updates_a_pass * self.args.batch_size
        return order[start : start + self.args.batch_size]

    def _sample(self, update: int, indices: list[int]) -> Rollout:
        """Every process answers its share of the prompts, and gets the answers of all."""
        args, accelerator = self.args, self.accelerator
        prompts = self._prompt_ids([self.train_dataset[i] for i in indices])
        mine = range(accelerator.process_index, len(indices), accelerator.num_processes)
        with accelerator.autocast():
            responses = sample_responses(
                self.roles.policy,
                [prompts[row] for row in mine],
                [seed_of(args.seed, "sample", update, indices[row]) for row in mine],
                args.response_length,
                args.temperature,
                self.stop_token_id,
                args.local_rollout_forward_batch_size,
            )
        everyone = dict(gather_object(list(zip(mine, responses, strict=True))))
        return Rollout.of(
            prompts,
            [everyone[row] for row in range(len(indices))],
            args.response_length,
            self.stop_token_id,
            args.score_after_eos,
            accelerator.device,
        )

    def _prompt_ids(self, rows: list[Any]) -> list[list[int]]:
        if self._collate is None:
            return [list(row["input_ids"]) for row in rows]
        batch = self._collate(rows)
        ids = batch["input_ids"]
        mask = batch.get("attention_mask", ids != self.processing_class.pad_token_id).bool()
        return [row[keep].tolist() for row, keep in zip(ids, mask, strict=True)]

    def _plan(self, update: int, epoch: int, rollout: Rollout) -> list[list[list[int]]]:
        """The rows of each micro-batch of each mini-batch of an epoch, for all processes together.

        Rows are shuffled into mini-batches; within one, those of like length go together. The plan of the first epoch
        also serves to score the rollout, so that the first step computes the very numbers that it compares with.
        """
        size, micro = self.args.mini_batch_size, self.args.micro_batch_size
        lengths = [len(text) for text in map(list.__add__, rollout.prompts, rollout.responses)]
        order = self._shuffled(len(lengths), "rows", update, epoch)
        mini_batches = [sorted(order[i : i + size], key=lengths.__getitem__) for i in range(0, len(order), size)]
        return [[rows[i : i + micro] for i in range(0, size, micro)] for rows in mini_batches]

    def _shuffled(self, count: int, *what_for: object) -> list[int]:
        generator = torch.Generator().manual_seed(seed_of(self.args.seed, *what_for))
        return torch.randperm(count, generator=generator).tolist()

    def _mine(self, micro_batches: list[list[int]]) -> list[list[int]]:
        """The share of this process."""
        return micro_batches[self.accelerator.process_index :: self.accelerator.num_processes]

    def _score(self, rollout: Rollout, plan: list[list[list[int]]]) -> dict[str, Tensor]:
        """Every process scores its share of the rollout, and gets the numbers of all."""
        batches = [rollout.micro_batch(rows) for mini_batch in plan for rows in self._mine(mini_batch)]
        with self.accelerator.autocast():
            scored = score_rollout(self.roles, rollout, batches, self.args.temperature, self.dtype)
        return {name: self.accelerator.reduce(tensor, "sum") for name, tensor in scored.items()}

    def _step(
        self, update: int, rollout: Rollout, mini_batch: list[list[int]], targets: dict[str, Tensor], first: bool
    ) -> dict[str, float]:
        """One optimizer step on a mini-batch; returns means over its tokens.

        Each token weighs the same, whatever micro-batch or process it is in: losses are divided by the tokens of the
        whole mini-batch, and gradients are summed.
        """
        rows = torch.tensor([row for part in mini_batch for row in part], device=rollout.tokens.device)
        tokens, states = rollout.mask[rows].sum(), rollout.value_mask[rows].sum()
        sums: dict[str, Tensor] = {}
        furthest = torch.zeros((), dtype=self.dtype, device=rows.device)
        for micro_batch in self._mine(mini_batch):
            part = self._backward(rollout, rollout.micro_batch(micro_batch), targets, tokens, states)
            furthest = torch.maximum(furthest, part.pop("furthest"))
            sums = {name: sums.get(name, 0) + value for name, value in part.items()}
        stats = self.accelerator.reduce(torch.stack(list(sums.values())), "sum")
        result = dict(zip(sums, stats.tolist(), strict=True))
        if not all(math.isfinite(value) for value in result.values()):
            raise UserError(f"update {update + 1}: the loss is not finite ({result}); lower the learning rate")
        if first and update == 0:
            all_furthest = self.accelerator.gather(furthest[None]).max().item()
            self._guard_start("the policy's log-probabilities in the first step and in the rollout", all_furthest)
        if self.accelerator.num_processes > 1:
            for parameter in self.trainable:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                torch.distributed.all_reduce(parameter.grad)
        norm = self.accelerator.clip_grad_norm_(self.trainable, self.args.max_grad_norm or math.inf)
        if self.accelerator.scaler is None and not norm.isfinite():  # fp16 skips such a step, and scales its loss down
            raise UserError(f"update {update + 1}: a gradient is not finite; lower the learning rate")
        self.optimizer.step()
        self.optimizer.zero_grad()
        return result

    def _backward(
        self, rollout: Rollout, batch: MicroBatch, targets: dict[str, Tensor], tokens: Tensor, states: Tensor
    ) -> dict[str, Tensor]:
        """Add a micro-batch's gradients, policy first and then value: no two models' activations are held at once."""
        args, roles, rows = self.args, self.roles, batch.rows
        mask, value_mask = rollout.mask[rows], rollout.value_mask[rows]
        old = {name: tensor[rows] for name, tensor in targets.items()}

        def value_loss(hidden: Tensor) -> tuple[Tensor, Tensor]:
            flat = roles.value.head(batch.states(hidden, value_mask)).squeeze(-1)
            values = spread(flat, value_mask, self.dtype)
            losses, clipped = objective.value_losses(
                values, old["values"], old["returns"], value_mask, args.cliprange_value
            )
            return losses.sum() / states, clipped.sum() / states

        with roles.policy.active():
            with self.accelerator.autocast():
                hidden = batch.hidden(roles.policy)
                flat, entropies = token_logprobs(
                    roles.policy.head, batch.states(hidden, mask), rollout.tokens[rows][mask], args.temperature
                )
                logprobs = spread(flat, mask, self.dtype)
                losses, clipped = objective.policy_losses(
                    logprobs, old["logprobs"], old["advantages"], mask, args.cliprange
                )
                policy_loss = losses.sum() / tokens
                loss = policy_loss
                if roles.value_reads_policy:
                    vf_loss, vf_clipped = value_loss(hidden)
                    loss = loss + args.vf_coef * vf_loss
            self._add_gradients(loss)
        if not roles.value_reads_policy:
            with roles.value.active():
                with self.accelerator.autocast():
                    vf_loss, vf_clipped = value_loss(batch.hidden(roles.value))
                self._add_gradients(args.vf_coef * vf_loss)

        moved = (logprobs - old["logprobs"]).detach()  # 0 under the mask
        return {
            "policy_loss": policy_loss.detach(),
            "value_loss": vf_loss.detach(),
            "clipfrac": clipped.sum() / tokens,
            "value_clipfrac": vf_clipped,
            "approxkl": 0.5 * moved.square().sum() / tokens,
            "entropy": entropies.sum() / tokens,
            "ratio": (moved.exp() * mask).sum() / tokens,
            "furthest": moved.abs().max(),
        }

    def _add_gradients(self, loss: Tensor) -> None:
        scaler = self.accelerator.scaler  # of fp16
        (loss if scaler is None else scaler.scale(loss)).backward()

    def _metrics(
        self, rollout: Rollout, logprobs: Tensor, scores: Tensor, kl: Tensor, stats: list[dict[str, float]]
    ) -> dict[str, float]:
        """TRL's metrics, and the KL coefficient. Sums over a response, means over tokens and steps."""

        def mean(name: str) -> float:
            return float(np.mean([step[name] for step in stats]))

        a_response = torch.where(rollout.mask, kl, 0).sum(1).mean().item()
        return {
            "objective/kl": a_response,
            "objective/kl_coef": self.kl_coef,
            "objective/entropy": -torch.where(rollout.mask, logprobs, 0).sum(1).mean().item(),
            "objective/non_score_reward": -self.kl_coef * a_response,
            "objective/rlhf_reward": scores.mean().item() - self.kl_coef * a_response,
            "objective/scores": scores.mean().item(),
            "objective/response_tokens": rollout.mask.sum(1).float().mean().item(),
            "policy/approxkl_avg": mean("approxkl"),
            "policy/clipfrac_avg": mean("clipfrac"),
            "policy/entropy_avg": mean("entropy"),
            "loss/policy_avg": mean("policy_loss"),
            "loss/value_avg": mean("value_loss"),
            "val/clipfrac_avg": mean("value_clipfrac"),
            "val/ratio": mean("ratio"),
            "val/ratio_var": float(np.var([step["ratio"] for step in stats], ddof=1)) if len(stats) > 1 else 0.0,
            "val/num_eos_tokens": int(rollout.ended.sum()),
        }

    # What stops a run that has gone wrong

    def _guard_start(self, what: str, difference: float) -> None:
        full = self.dtype == torch.float64 or self.accelerator.mixed_precision == "no"
        limit = TOLERANCE if full and self.roles.policy.backbone.dtype in (torch.float32, torch.float64) else 0.05
        if not difference <= limit:
            raise UserError(
                f"update 1: {what} differ by up to {difference:.1e} nats, and must be equal, as nothing is learnt yet. "
                "With load_in_8bit set llm_int8_threshold: 0; else please report this"
            )

    def _guard_rollout(self, update: int, rollout: Rollout, scored: dict[str, Tensor], kl: Tensor) -> None:
        args = self.args
        for name, tensor in scored.items():
            if not tensor.isfinite().all():
                raise UserError(
                    f"update {update + 1}: {name} of the rollout are not finite. Look at the losses before, "
                    "and lower the learning rate; if it is the first update, the model on disk is broken"
                )
        a_response = torch.where(rollout.mask, kl, 0).sum(1).mean().item()
        if update == 0 and self.reference_is_start:
            apart = (scored["logprobs"] - scored["ref_logprobs"]).abs().max().item()
            self._guard_start("log-probabilities of policy and reference", apart)
        if args.kl_limit is not None and a_response > args.kl_limit:
            raise UserError(
                f"update {update + 1}: the KL from the reference is {a_response:.1f} nats a response, beyond kl_limit "
                f"({args.kl_limit}). The policy has left the language it was taught: raise kl_coef, set kl_target, or "
                "lower the learning rate"
            )
        self._updates_without_end = 0 if rollout.ended.any() else self._updates_without_end + 1
        if self.stop_token_id is not None and self._updates_without_end >= args.guard_updates:
            raise UserError(
                f"update {update + 1}: not one response ended itself in {args.guard_updates} updates (guard_updates). "
                f"Raise response_length ({args.response_length}), or train SFT for longer: it teaches the end"
            )

    def _guard_policy(self, update: int) -> None:
        if update == self._first_update + 2 and self._fingerprint() == self._weights_before:
            raise UserError(
                f"update {update + 1}: no weight of the policy has moved in 3 updates. Look at learning_rate "
                f"({self.args.learning_rate}) and lr_scheduler_type ({self.args.lr_scheduler_type})"
            )

    def _policy_parameters(self) -> list[nn.Parameter]:
        model, adapter = self.roles.models["policy"], self.roles.policy.adapter
        return list(adapter_parameters(model, adapter) if adapter else model.parameters())

    @torch.no_grad()
    def _fingerprint(self) -> list[tuple[float, float]]:
        """Two sums of each weight of the policy that can be trained."""
        weights = (p.double() for p in self._policy_parameters() if p.requires_grad)
        return [(weight.sum().item(), weight.square().sum().item()) for weight in weights]

    # What a run leaves behind

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the policy, and the value function into the folder `value` in it."""
        folder = Path(output_dir or self.args.output_dir)
        if self.args.should_save:
            self.roles.save_pretrained(folder)
            self.processing_class.save_pretrained(folder)

    def create_model_card(  # type: ignore[override]
        self, model_name: str | None = None, dataset_name: str | None = None, tags: Any = None, **kwargs: Any
    ) -> None:
        """A card with TRL's arguments."""
        super().create_model_card(
            model_name=model_name, dataset=kwargs.pop("dataset", dataset_name), tags=tags, **kwargs
        )

    def _write_samples(self, update: int, rollout: Rollout, scores: Tensor, kl: Tensor) -> None:
        """Append the first responses of an update to samples.jsonl."""
        if not self.is_world_process_zero():
            return
        decode = self.processing_class.decode
        with open(Path(self.args.output_dir) / "samples.jsonl", "a", encoding="utf-8") as stream:
            for row in range(min(SAMPLES, len(rollout.prompts))):
                sample = {
                    "update": update + 1,
                    "prompt": decode(rollout.prompts[row], skip_special_tokens=True),
                    "response": decode(rollout.responses[row], skip_special_tokens=True),
                    "ended": bool(rollout.ended[row]),
                    "score": scores[row].item(),
                    "kl": kl[row][rollout.mask[row]].sum().item(),
                }
                stream.write(json.dumps(sample, ensure_ascii=False) + "\n")

    def generate_completions(self, sampling: bool = False) -> None:
        """Print answers to the first prompts of `eval_dataset`, nearly greedy, and their scores."""
        if self.eval_dataset is None:
            return
        count = min(
            len(self.eval_dataset), self.args.per_device_eval_batch_size if sampling else len(self.eval_dataset)
        )
        prompts = self._prompt_ids([self.eval_dataset[i] for i in range(count)])
        args, decode = self.args, self.processing_class.decode
        with torch.no_grad(), self.accelerator.autocast():
            seeds, nearly_greedy = [seed_of(args.seed, "completions", i) for i in range(count)], 0.01
            responses = sample_responses(
                self.roles.policy,
                prompts,
                seeds,
                args.response_length,
                nearly_greedy,
                self.stop_token_id,
                args.local_rollout_forward_batch_size,
            )
            rollout = Rollout.of(
                prompts, responses, args.response_length, self.stop_token_id, False, self.accelerator.device
            )
            scores = []
            with self.roles.reward.active():
                for start in range(0, count, args.per_device_eval_batch_size):
                    batch = rollout.micro_batch(range(start, min(count, start + args.per_device_eval_batch_size)))
                    scores += (
                        self.roles.reward.head(batch.end_states(batch.hidden(self.roles.reward))).flatten().tolist()
                    )
        if self.is_world_process_zero():
            table = Table("prompt", "response", "score", show_lines=True)
            for prompt, response, score in list(zip(prompts, responses, scores, strict=True))[:5]:
                texts = (Text(decode(ids, skip_special_tokens=True)) for ids in (prompt, response))
                table.add_row(*texts, f"{score:.2f}")
            Console().print(table)

    def _save_checkpoint(self, *unused: Any) -> Any:
        """Write all that the next update depends on, under another name first: a folder `checkpoint-N` is whole."""
        accelerator = self.accelerator
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        unfinished = folder.with_name(f"{folder.name}.unfinished")
        if accelerator.is_main_process:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            weights = {name: tensor.detach().cpu().contiguous() for name, tensor in self._checkpointed().items()}
            save_file(weights, str(unfinished / "weights.safetensors"))
            scaler = accelerator.scaler
            training = {
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.lr_scheduler.state_dict(),
                "scaler": scaler and scaler.state_dict(),
            }
            torch.save(training, unfinished / "optimizer.pt")
            ppo = {"kl_coef": self.kl_coef, "score_moments": vars(self.score_moments), "run": self._identity()}
            (unfinished / "ppo.json").write_text(json.dumps(ppo), encoding="utf-8")
            for callback in (*self.callback_handler.callbacks, self.control):
                if isinstance(callback, ExportableState):
                    self.state.stateful_callbacks[type(callback).__name__] = callback.state()
            self.state.save_to_json(str(unfinished / "trainer_state.json"))
        accelerator.wait_for_everyone()
        torch.save(random_state(), unfinished / f"random_{accelerator.process_index}.pt")
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            set_aside(folder)
            unfinished.rename(folder)
            drop_old_checkpoints(folder, self.args.save_total_limit)
        accelerator.wait_for_everyone()
        return folder

    def _checkpointed(self) -> dict[str, nn.Parameter]:
        """All weights that are trained, and the adapters and heads of all roles."""
        model = self.roles.models["policy"]
        kept = {id(p) for adapter in getattr(model, "peft_config", ()) for p in adapter_parameters(model, adapter)}
        return {
            name: parameter
            for name, parameter in self.roles.named_parameters()
            if parameter.requires_grad or id(parameter) in kept or name.split(".")[1].endswith("_head")
        }

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a run to go on as if it had never stopped."""
        names = ("seed", "batch_size", "mini_batch_size", "micro_batch_size", "num_ppo_epochs", "response_length")
        return {name: getattr(self.args, name) for name in names} | {"prompts": len(self.train_dataset)}

    def _load_checkpoint(self, checkpoint: str | bool) -> None:
        path = find_checkpoint(self.args.output_dir, checkpoint)
        ppo = json.loads((path / "ppo.json").read_text(encoding="utf-8"))
        now = self._identity()
        if changed := [name for name in now if now[name] != ppo["run"][name]]:
            pairs = ", ".join(f"{name}: {ppo['run'][name]} then, {now[name]} now" for name in changed)
            raise UserError(f"{path}: is of another run ({pairs}); use the config that it was made with")
        weights, parameters = load_file(path / "weights.safetensors"), self._checkpointed()
        here, there = ({name: w.shape for name, w in some.items()} for some in (parameters, weights))
        if odd := sorted(name for name in here | there if here.get(name) != there.get(name)):
            raise UserError(f"{path}: is of other models; its first odd weight is {odd[0]}")
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(weights[name])
        training = torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True)
        self.optimizer.load_state_dict(training["optimizer"])
        self.lr_scheduler.load_state_dict(training["scheduler"])
        if training["scaler"]:
            self.accelerator.scaler.load_state_dict(training["scaler"])
        self.kl_coef, self.score_moments = ppo["kl_coef"], objective.RunningMoments(**ppo["score_moments"])
        saved = OnlineTrainerState.load_from_json(str(path / "trainer_state.json"))
        saved.is_local_process_zero, saved.is_world_process_zero = (
            self.is_local_process_zero(),
            self.is_world_process_zero(),
        )
        self.state = saved
        self._load_callback_state()
        states = path / f"random_{self.accelerator.process_index}.pt"
        if states.is_file():
            set_random_state(torch.load(states, weights_only=True))
        if self.is_world_process_zero():
            self._forget_samples_after(saved.global_step)

    def _forget_samples_after(self, update: int) -> None:
        """Drop the samples of updates that are made again."""
        file = Path(self.args.output_dir) / "samples.jsonl"
        if file.is_file():
            lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["update"] <= update]
            file.write_text("".join(kept), encoding="utf-8")

    def _on_any_process(self, flag: bool) -> bool:
        count = torch.tensor(float(flag), device=self.accelerator.device)
        return bool(self.accelerator.reduce(count, "sum") > 0)


def _switch_dropout_off(module: nn.Module) -> None:
    """Dropout layers, and the rates that some models keep as numbers (OPT, Llama's attention)."""
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        for name, value in vars(part).items():
            if isinstance(value, float) and any(word in name for word in ("dropout", "pdrop", "layerdrop")):
                setattr(part, name, 0.0)
