"""Will it fit? The memory that the stages take, from shapes alone: no weight is loaded, and nothing is computed.

Each stage's own trainer takes a step on fake tensors, which have a shape and a dtype and no values, while a counter
follows the bytes that are alive. So attention, losses and quantized layers are counted as they are, not by a formula.
"""

import copy
import logging
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from kochat_trl.desk.workflow.tracing import LiveBytes, NoValues, bytes_of, materialize, storage_of, tensors_of
from kochat_trl.errors import UserError
from kochat_trl.models.heads import linear_head
from kochat_trl.models.loading import add_lora, cast_trainable_to_float32, empty_model, load_config, lora_config
from kochat_trl.models.remote import allow_remote_code
from kochat_trl.models.sharding import blocks_of
from kochat_trl.ppo.roles import Roles, adapter_parameters, adapters_of, separate_models
from kochat_trl.ppo.rollout import Rollout, Trajectory, draw, new_cache, next_logits, without_checkpointing
from kochat_trl.ppo.trainer import PPOTrainer
from kochat_trl.preference.trainer import LabelTrainer, PairTrainer
from kochat_trl.reward.trainer import RankingTrainer
from kochat_trl.settings.keys import ON_SFT, Stage
from kochat_trl.settings.parse import Arguments, folder_of, parse_arguments, read_config

import torch
from datasets import Dataset, disable_progress_bars, enable_progress_bars
from peft import get_peft_model
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PretrainedConfig, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging
from trl import SFTTrainer

CARDS = (6, 8, 12, 16, 24)  # GB of consumer GPUs
GB = 2**30
# What a GPU takes beside the tensors: the CUDA context, workspaces of cuBLAS, fragments. Assumed, not measured.
GPU_EXTRA = GB
GATHERED = 2  # blocks of a divided base that are there at once: one computes while the next comes


@dataclass(frozen=True)
class Footprint:
    """The bytes at the fullest moment of a phase, with `rows` in a forward pass. `parts` add up to `peak`."""

    phase: str
    rows: int
    parts: dict[str, int]

    @property
    def peak(self) -> int:
        return sum(self.parts.values())


def plan_memory(
    config: str | Path,
    overrides: Sequence[str] = (),
    shape: PretrainedConfig | None = None,
    rows: int | None = None,
    methods: Sequence[Stage] = ("ppo",),
    processes: int = 1,
) -> list[Footprint]:
    """The footprint of each phase of a run: SFT, reward model, PPO's update and its sampling, or of other `methods`.

    `config` is what `kochat run` takes, `overrides` are flags of the recipes. `shape` stands for the base model's own
    config, and `rows` for the rows of a forward pass. All texts are as long as the config allows. A config that
    doesn't set the precision is taken for a GPU's, bfloat16, unless it sets `use_cpu`. With more `processes` than one
    it is the footprint of each, on a base that is divided among them (`shard_base`).

    Raises `UserError` for what the recipes would refuse.
    """
    folder_of(Path(config))
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    found: list[Footprint] = []
    with tempfile.TemporaryDirectory() as folder, quiet():
        stages: dict[Stage, Arguments] = {}
        on_cpu: dict[Stage, bool] = {}
        for stage in ("sft", "reward", *methods):
            given = {key: value for key, (value, _) in read_config(Path(config), stage).items()}
            on_cpu[stage] = bool(given.get("use_cpu"))
            as_it_is = on_cpu[stage] or given.get("bf16") is False
            half = [] if as_it_is else ["--bf16", "true", "--fp16", "false"]  # which are of one size
            half += ["--shard_base", "true"] if processes > 1 else []
            flags = [*half, *overrides, "--use_cpu", "true", "--output_dir", folder, "--report_to", "none"]
            stages[stage] = parse_arguments(stage, str(config), flags)
        _refuse(stages)
        if any(args.training.trust_remote_code for args in stages.values()):
            allow_remote_code("trust_remote_code: true")
        for stage in stages:
            model = stages["sft" if stage in ON_SFT else stage].model
            own = copy.deepcopy(shape or load_config(str(model.model_name_or_path), model.model_revision))
            for name in ("attn_pdrop", "attention_dropout"):
                if hasattr(own, name) and not on_cpu[stage]:
                    setattr(own, name, 0.0)  # a GPU's fused attention keeps no mask for it; the CPU's keeps T² numbers
            found += trace(stage, stages, own, rows, processes)
    return found


def _refuse(stages: dict[Stage, Arguments]) -> None:
    """Raise `UserError` for what is not planned."""
    if "ppo" in stages and stages["ppo"].training.engine == "trl":
        raise UserError("engine: trl: that engine holds four models of their own, which isn't planned here")
    if len({args.model.use_peft for args in stages.values()}) > 1:
        raise UserError("use_peft: planned are runs with LoRA in all stages, or in none")
    for stage, args in stages.items():
        if args.max_length is None:
            key = "max_prompt_length" if stage == "ppo" else "max_length"
            raise UserError(
                f"{key} of {stage} is not set: a {'prompt' if stage == 'ppo' else 'text'} may be of any length"
            )
        if stage in ("dpo", "kto") and not args.model.use_peft:
            raise UserError(f"use_peft: planned is {stage} with LoRA, which holds the base once")


def trace(
    stage: Stage, stages: dict[Stage, Arguments], shape: PretrainedConfig, rows: int | None, processes: int
) -> list[Footprint]:
    """The footprints of one stage's phases; optimizer states are there, as from the second step on."""
    args = stages[stage]
    if rows is not None:
        args.training.per_device_train_batch_size = max(rows, 2) if stage == "kto" else rows  # its least
        if stage == "ppo":  # a rollout of one mini-batch's rows for each of them
            args.training.gradient_accumulation_steps = args.training.num_mini_batches
            args.training.local_rollout_forward_batch_size = rows
    with torch.device("meta"):
        model = _ppo_roles(stages, shape) if stage == "ppo" else _trained_model(stage, stages, shape)
    with FakeTensorMode(allow_non_fake_inputs=True), NoValues():
        materialize(model)
        trainer, phases = _PREPARE[stage](model, args)
        vocab_size = shape.get_text_config().vocab_size
        whole = [_measure(name, count, step, trainer, vocab_size) for name, count, step in phases]
        return whole if processes == 1 else [_divide(footprint, model, processes) for footprint in whole]


def _measure(phase: str, rows: int, step: Callable[[], None], trainer: Any, vocab_size: int) -> Footprint:
    model = getattr(trainer, "roles", trainer.model)
    weights = {storage_of(t): t for t in tensors_of(model)}.values()
    trained = bytes_of(t for t in weights if t.requires_grad)
    for tensor in weights:
        if tensor.requires_grad:
            tensor.grad = torch.zeros_like(tensor)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    states = [t for state in trainer.optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    live = LiveBytes(vocab_size)
    live.add([*weights, *states])
    hooks = [t.register_post_accumulate_grad_hook(live.note_gradient) for t in weights if t.requires_grad]
    with live:
        step()
    for hook in hooks:
        hook.remove()
    parts = Counter[str]()
    for tensor in weights:
        if not tensor.requires_grad:
            parts[f"frozen weights, {str(tensor.dtype).removeprefix('torch.')}"] += tensor.untyped_storage().nbytes()
    parts["trained weights"] = trained
    parts["gradients"] = live.gradients_at_peak
    parts["optimizer"] = bytes_of(states)
    parts["logits"] = live.logits_at_peak
    parts["KV cache and activations" if phase == SAMPLING else "activations"] = live.peak - parts.total()
    return Footprint(phase, rows, {name: size for name, size in parts.items() if size})


def _divide(footprint: Footprint, model: nn.Module, processes: int) -> Footprint:
    """A footprint where the frozen weights of the blocks are divided: a share, and the blocks that are gathered."""
    frozen = [[weight for weight in block.parameters() if not weight.requires_grad] for block in blocks_of(model)]
    sizes = [bytes_of(weights) for weights in frozen]
    largest = max(frozen[0], key=lambda weight: weight.untyped_storage().nbytes())
    name = f"frozen weights, {str(largest.dtype).removeprefix('torch.')}"
    parts = dict(footprint.parts)
    parts[name] -= sum(sizes) - sum(sizes) // processes
    return replace(footprint, parts=parts | {"gathered blocks": GATHERED * max(sizes)})


# --- The stages, without values ------------------------------------------------------------------

SAMPLING = "PPO, sampling"
Phase = tuple[str, int, Callable[[], None]]


def _trained_model(stage: Stage, stages: dict[Stage, Arguments], shape: PretrainedConfig) -> Any:
    shape = copy.deepcopy(shape)
    shape.pad_token_id = shape.get_text_config().pad_token_id = 3
    model = empty_model("reward" if stage == "reward" else "policy", shape, stages[stage].model)
    return cast_trainable_to_float32(add_lora(model, stages["sft" if stage in ON_SFT else stage].model))


def _ppo_roles(stages: dict[Stage, Arguments], shape: PretrainedConfig) -> Roles:
    """What `load_roles` makes of the outputs of SFT and reward model."""
    value_function = stages["ppo"].training.value_function
    own_value, has_value = value_function == "adapter", value_function is not None
    if not (stages["sft"].model.use_peft and stages["reward"].model.use_peft):
        policy, reward, value = (_trained_model(s, stages, shape) for s in ("sft", "reward", "reward"))
        return separate_models(policy, None, reward, value if own_value else None, has_value=has_value)
    backbone = empty_model("policy", shape, stages["ppo"].model)
    roles = {"policy": "sft", "reference": "sft", "reward": "reward", **({"value": "reward"} if own_value else {})}
    model: Any = None
    for name, stage in roles.items():
        config = lora_config(backbone, stages[stage].model)  # type: ignore[index]
        if model is None:
            model = get_peft_model(backbone, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        for parameter in adapter_parameters(model, name):
            parameter.data = parameter.data.float()
    heads = [linear_head(torch.zeros(1, shape.get_text_config().hidden_size)) for _ in range(2)]
    return adapters_of(model, heads[0], heads[1] if has_value else None)


def tokenizer_of_four() -> PreTrainedTokenizerFast:
    """A tokenizer of special tokens alone: the trainers ask for one."""
    words = Tokenizer(WordLevel({"<s>": 0, "</s>": 1, "<usr>": 2, "<pad>": 3}))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="<pad>")


def _prepare_sft(model: Any, args: Arguments) -> tuple[Any, list[Phase]]:
    data = Dataset.from_dict({"input_ids": [[1, 1]], "labels": [[1, 1]]})
    trainer = SFTTrainer(model=model, args=args.training, train_dataset=data, processing_class=tokenizer_of_four())
    ids = torch.zeros(args.training.per_device_train_batch_size, args.training.max_length, dtype=torch.long)
    return _prepare(trainer, "SFT", ids, labels=ids)


def _prepare_reward(model: Any, args: Arguments) -> tuple[Any, list[Phase]]:
    rows = args.training.per_device_train_batch_size
    data = Dataset.from_dict({"completion_ids": [[[1]] * COMPLETIONS], "ranks": [[*range(COMPLETIONS)]], "length": [1]})
    settings = {"model": model, "args": args.training, "processing_class": tokenizer_of_four()}
    trainer = RankingTrainer(args.recipe, train_dataset=data, **settings)
    ids = torch.zeros(rows * COMPLETIONS, args.training.max_length, dtype=torch.long)
    return _prepare(trainer, "reward model", ids, ranks=torch.zeros(rows, COMPLETIONS, dtype=torch.long))


def _prepare_dpo(model: Any, args: Arguments) -> tuple[Any, list[Phase]]:
    data = Dataset.from_dict({"prompt_ids": [[1]], "chosen_ids": [[1]], "rejected_ids": [[1]]})
    trainer = PairTrainer(model, None, args.training, train_dataset=data, processing_class=tokenizer_of_four())
    ids = torch.zeros(2 * args.training.per_device_train_batch_size, args.training.max_length, dtype=torch.long)
    return _prepare(trainer, "DPO", ids, completion_mask=torch.ones_like(ids))


def _prepare_kto(model: Any, args: Arguments) -> tuple[Any, list[Phase]]:
    data = Dataset.from_dict({"prompt_ids": [[1]], "completion_ids": [[1]], "label": [True]})
    trainer = LabelTrainer(model, None, args.training, train_dataset=data, processing_class=tokenizer_of_four())
    ids = torch.zeros(args.training.per_device_train_batch_size, args.training.max_length, dtype=torch.long)
    more = {f"KL_{name}": torch.ones_like(ids) for name in ("input_ids", "attention_mask", "completion_mask")}
    label = torch.ones(len(ids), dtype=torch.bool)
    return _prepare(trainer, "KTO", ids, completion_mask=torch.ones_like(ids), label=label, **more)


def _prepare(trainer: Any, name: str, ids: Tensor, **more: Tensor) -> tuple[Any, list[Phase]]:
    training = trainer.args
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **more}
    cast_trainable_to_float32(trainer.model)
    if training.gradient_checkpointing:
        trainer.model.gradient_checkpointing_enable(training.gradient_checkpointing_kwargs)
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1

    def step() -> None:
        trainer.training_step(trainer.model, dict(batch))
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()

    return trainer, [(name, training.per_device_train_batch_size, step)]


def _prepare_ppo(model: Any, args: Arguments) -> tuple[Any, list[Phase]]:
    training = args.training
    length, count = training.response_length, training.per_device_train_batch_size
    prompts = [[1] * int(args.recipe.max_prompt_length or 0)]
    data = Dataset.from_dict({"input_ids": prompts * count * training.gradient_accumulation_steps})
    training.total_episodes, training.stop_token = len(data), "eos"
    trainer = PPOTrainer(training, tokenizer_of_four(), model, None, None, data)
    rows, size = len(data), training.local_mini_batch_size
    mask, tokens = torch.ones(rows, length, dtype=torch.bool), torch.zeros(rows, length, dtype=torch.long)
    prompts, responses = prompts * rows, [[1] * length] * rows
    rollout = Rollout(prompts, responses, tokens, mask, mask, mask[:, 0])
    micro = training.micro_batch_size
    mini_batch = [list(range(i, i + micro)) for i in range(0, size, micro)]
    targets = Trajectory.zeros((rows, length), "cpu", torch.float32)
    targets.advantages = targets.returns = torch.zeros(rows, length)
    together = min(training.local_rollout_forward_batch_size, rows)

    @torch.no_grad()
    def sample() -> None:
        """The first token of responses, and the last: in between the cache grows, and nothing else."""
        policy, width = trainer.roles.policy, len(prompts[0])
        cache, uniform = new_cache(policy), torch.zeros(together, 1, dtype=torch.float64)
        ids, mask = (torch.ones(together, width + length, dtype=torch.long) for _ in range(2))
        with trainer.accelerator.autocast(), policy.active(), without_checkpointing(policy.backbone):
            draw(next_logits(policy, ids[:, :width], mask[:, :width], cache), uniform, 1.0)
            states: Any
            for layer, states in enumerate(cache.layers):
                more = states.keys[:, :, :1].expand(-1, -1, max(0, length - 2), -1)
                cache.update(more, more, layer)
            draw(next_logits(policy, ids[:, :1], mask[:, : width + max(1, length - 1)], cache), uniform, 1.0)

    def update() -> None:
        targets.kept = trainer.score(rollout, [mini_batch]).kept
        trainer.step(1, rollout, mini_batch, targets, first=False)

    return trainer, [("PPO, update", micro, update), (SAMPLING, together, sample)]


_PREPARE: dict[str, Any] = {"sft": _prepare_sft, "reward": _prepare_reward, "ppo": _prepare_ppo}
_PREPARE |= {"dpo": _prepare_dpo, "kto": _prepare_kto}
COMPLETIONS = 3  # of a ranking, as KoChatGPT's have


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and warnings of the libraries: there is no training here that they could be about."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    disable_progress_bars()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    enable_progress_bars()
    transformers_logging.set_verbosity(level)


# --- What fits a GPU ------------------------------------------------------------------------------


def most_rows(one: Footprint, some: Footprint, many: Footprint, card_gb: float) -> int:
    """How many rows fit a card of so many GB, from the footprints of one phase with one row, with some and with many.

    From some to many the bytes grow with the rows. With one row another moment may be the fullest, such as the
    optimizer's step: where that doesn't fit, nothing does, and the answer is 0.
    """
    room = card_gb * GB - GPU_EXTRA
    a_row = (many.peak - some.peak) / (many.rows - some.rows)
    if one.peak > room:
        return 0
    return max(1, int((room - some.peak) // max(a_row, 1)) + some.rows)


def print_memory(
    config: str | Path, cards: Sequence[float], console: Console, methods: Sequence[Any], processes: int
) -> None:
    """What each phase of a config takes, part by part, and the rows that fit each card (`most_rows`)."""
    plan = partial(plan_memory, config, methods=methods, processes=processes)
    one, planned = plan(rows=1), plan()
    many = plan(rows=2 * max(footprint.rows for footprint in planned))
    table = Table(title="GB at the fullest moment", title_justify="left")
    table.add_column(overflow="fold")
    for footprint in planned:
        table.add_column(f"{footprint.phase}, {footprint.rows} rows", justify="right")
    for name in dict.fromkeys(name for footprint in planned for name in footprint.parts):
        table.add_row(name, *(f"{footprint.parts.get(name, 0) / GB:.3f}" for footprint in planned))
    table.add_section()
    table.add_row("peak", *(f"{footprint.peak / GB:.3f}" for footprint in planned), style="bold")
    console.print(table)

    fits = Table(title="rows that fit a GPU, 1 GB of it left for what is no tensor", title_justify="left")
    fits.add_column("GPU")
    for footprint in planned:
        fits.add_column(footprint.phase, justify="right")
    for card in cards:
        phases = [(most_rows(*three, card), three[1].rows) for three in zip(one, planned, many, strict=True)]
        fits.add_row(f"{card:g} GB", *(f"{rows}{'' if rows >= asked else ' ✗'}" for rows, asked in phases))
    console.print(fits)
    console.print(
        "✗: fewer than the config asks for. Rows are per_device_train_batch_size, which counts rankings for the reward "
        "model, pairs for DPO, and for sampling local_rollout_forward_batch_size. No GPU was measured: these are the "
        "tensors of PyTorch's CPU operations (docs/hardware.md). The reward model's evaluation and the report load the "
        "base in float32, and aren't counted."
    )
