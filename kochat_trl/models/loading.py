"""Base models, quantization, LoRA and the reward model's score head.

Trainable weights are float32 whatever the base is loaded in. The base may be float32, bfloat16, float16, int8 or
nf4; bitsandbytes quantizes it while it loads, on a GPU or on a CPU.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from kochat_trl.errors import UserError
from kochat_trl.models.heads import NO_HEAD, SCORE, has_score_head, in_float32
from kochat_trl.models.tokenizer import check_fits
from kochat_trl.settings.keys import ModelArguments

import torch
from accelerate import PartialState
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.activations import GELUTanh, NewGELUActivation
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

ADAPTER_CONFIG = "adapter_config.json"
HEADS = ["lm_head", "embed_out", SCORE]  # kept in float: GPT-2, Llama and Qwen; GPT-NeoX; any sequence classifier


def empty_model(auto_class: Any, config: PretrainedConfig, model_args: ModelArguments) -> PreTrainedModel:
    """A model without values, on the meta device, with the layers and dtypes of one that is loaded by `model_args`."""
    with torch.device("meta"):
        model = auto_class.from_config(
            config, dtype=model_args.dtype, attn_implementation=model_args.attn_implementation
        )
    _fuse_gelu(model)
    if quantization := _quantization(model_args):
        replace_with_bnb_linear(model, HEADS, quantization)
        model.is_loaded_in_8bit, model.is_loaded_in_4bit = model_args.load_in_8bit, model_args.load_in_4bit
    if hasattr(model, SCORE):
        in_float32(getattr(model, SCORE))
    return model


def is_adapter(path: str) -> bool:
    """Whether `path` is a local folder with a PEFT adapter (as against a model, or a name on the Hub)."""
    return (Path(path) / ADAPTER_CONFIG).is_file()


def base_of_adapter(path: str) -> tuple[str, str]:
    """The base model that an adapter's own metadata names, and its revision.

    A base inside the adapter's folder is found there too if the folder was moved.
    """
    config = json.loads((Path(path) / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    base = config["base_model_name_or_path"]
    moved = Path(path) / Path(base).name
    if moved.is_dir() and not Path(base).is_dir():
        base = str(moved)
    return base, config.get("revision") or "main"


def require_stage_output(path: str) -> None:
    """Raise `UserError` if `path` reads as a local folder, rather than as a name on the Hub, and isn't there."""
    looks_local = path.startswith(("outputs/", ".", "/", "~")) or path.count("/") > 1
    if looks_local and not Path(path).is_dir():
        raise UserError(
            f"there is no folder {path}. If an earlier stage writes it, run that first: recipes/sft.py, then "
            "recipes/reward.py, then recipes/ppo.py"
        )


def load_config(path: str, revision: str = "main") -> PretrainedConfig:
    """The config of a model in a local folder or on the Hub; `UserError` if there is none."""
    require_stage_output(path)
    try:
        return AutoConfig.from_pretrained(path, revision=revision)
    except (OSError, ValueError) as error:
        raise UserError(f"no model at '{path}': {str(error).splitlines()[0]}") from None


def positions_of(config: PretrainedConfig) -> int | None:
    """How many tokens a sequence may have by a model's config, or its text part's; None where there is no limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)  # BLOOM has none


def load_causal_lm(path: str, model_args: ModelArguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Load a causal LM in the dtype or quantization that `model_args` asks for, padded as `tokenizer` pads."""
    return _load(AutoModelForCausalLM, path, model_args, tokenizer)


def load_policy(path: str, model_args: ModelArguments, tokenizer: PreTrainedTokenizerBase) -> Any:
    """Load what answers, on the GPU if there is one: a base, a merged model, or an adapter (SFT, PPO) on its base."""
    if is_adapter(path):
        base, revision = base_of_adapter(path)
        base_model = load_causal_lm(base, replace(model_args, model_revision=revision), tokenizer)
        model = load_adapter(base_model, path)
    else:
        model = load_causal_lm(path, model_args, tokenizer)
    return model.to(PartialState().device)


def new_reward_model(path: str, model_args: ModelArguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Load a causal LM's backbone under a new score head, (hidden, 1) without bias, in float32.

    The head is drawn from torch's global generator: seed it first.
    """
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # it warns that the head is new, which is meant
    try:
        model = _load(AutoModelForSequenceClassification, path, model_args, tokenizer)
    finally:
        transformers_logging.set_verbosity(verbosity)
    in_float32(getattr(model, SCORE))
    return model


def load_reward_model(
    path: str, model_args: ModelArguments, tokenizer: PreTrainedTokenizerBase, trainable: bool = False
) -> PreTrainedModel:
    """Load a trained reward model: an adapter with its head, or a merged model.

    With `trainable`, the adapter and the head can be trained on, as a value model's are; a merged model gets a new
    adapter for that, or is trained whole if LoRA is off.

    Raises `UserError` if the files hold no score head: a random one would score noise.
    """
    require_stage_output(path)
    if is_adapter(path):
        if not has_score_head(path):
            raise UserError(f"{path}: {NO_HEAD}")
        base, revision = base_of_adapter(path)
        model = new_reward_model(base, replace(model_args, model_revision=revision), tokenizer)
        return load_adapter(model, path, trainable)
    model, missing = _load_and_list_missing(AutoModelForSequenceClassification, path, model_args, tokenizer)
    if any(name.startswith(f"{SCORE}.") for name in missing):
        raise UserError(f"{path}: {NO_HEAD}")
    in_float32(getattr(model, SCORE))
    return add_lora(model, model_args) if trainable else model.requires_grad_(False)


def load_adapter(model: PreTrainedModel, path: str, trainable: bool = False) -> Any:
    """Put the adapter in the folder `path` on `model`, whether or not it was trained on a quantized base."""
    config = PeftConfig.from_pretrained(path)
    config.fan_in_fan_out = has_conv1d(model)
    return cast_trainable_to_float32(PeftModel.from_pretrained(model, path, config=config, is_trainable=trainable))


def add_lora(model: PreTrainedModel, model_args: ModelArguments) -> PreTrainedModel:
    """Wrap `model` in a new LoRA adapter, trainable weights in float32; the model as it is if LoRA is off.

    Without `lora_target_modules` every linear layer of the blocks is adapted. PEFT's own default for GPT-2 is the
    attention's input projection alone, one layer in four. A score head is trained and saved whole.

    Raises `UserError` if the model is quantized and LoRA is off, or if nothing is adapted.
    """
    if not model_args.use_peft:
        if any(getattr(model, f"is_{how}", False) for how in ("quantized", "loaded_in_8bit", "loaded_in_4bit")):
            raise UserError("a quantized base can't be trained whole: set `use_peft: true` or `load_in_8bit: false`")
        return model
    try:
        adapted = get_peft_model(model, lora_config(model, model_args))
    except ValueError as error:
        raise UserError(f"lora_target_modules: {error}") from None
    return cast_trainable_to_float32(adapted)


def lora_config(model: nn.Module, model_args: ModelArguments) -> LoraConfig:
    """PEFT's config of the LoRA that `model_args` asks for on `model`."""
    targets = model_args.lora_target_modules or "all-linear"
    if isinstance(targets, str) and targets != "all-linear":
        targets = [targets]  # TRL makes a string of a list of one, and PEFT would read it as a regex of the whole path
    return LoraConfig(
        task_type="SEQ_CLS" if hasattr(model, SCORE) else "CAUSAL_LM",  # for SEQ_CLS, PEFT trains and saves the head
        r=model_args.lora_r,
        lora_alpha=model_args.lora_alpha,
        lora_dropout=model_args.lora_dropout,
        target_modules=targets,
        fan_in_fan_out=has_conv1d(model),
        use_rslora=model_args.use_rslora,
        use_dora=model_args.use_dora,
        revision=model_args.model_revision,
    )


def cast_trainable_to_float32(model: Any) -> Any:
    """Cast every trainable weight to float32 in place, and return `model`.

    TRL's trainers cast them to bfloat16 when the base is quantized: small updates are then lost to rounding, and
    RewardTrainer on int8 fails on the dtype. Call this again after building a trainer.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def _load(*arguments: Any) -> PreTrainedModel:
    return _load_and_list_missing(*arguments)[0]


def _load_and_list_missing(
    auto_class: Any, path: str, model_args: ModelArguments, tokenizer: PreTrainedTokenizerBase
) -> tuple[PreTrainedModel, set[str]]:
    """The model, and the names of its weights that the files don't have."""
    config = load_config(path, model_args.model_revision)
    check_fits(tokenizer, config.vocab_size, path)
    config.pad_token_id = tokenizer.pad_token_id
    if auto_class is AutoModelForSequenceClassification:
        config.num_labels = 1
    quantization = _quantization(model_args)
    model, info = auto_class.from_pretrained(
        path,
        config=config,
        dtype=model_args.dtype,
        attn_implementation=model_args.attn_implementation,
        quantization_config=quantization,
        # bitsandbytes quantizes onto a GPU wherever there is one, also for a run on the CPU.
        device_map={"": PartialState().device} if quantization else None,
        output_loading_info=True,
        revision=model_args.model_revision,
    )
    _fuse_gelu(model)
    if model_args.load_in_4bit:
        for module in model.modules():
            # On a CPU with AVX512-BF16 bitsandbytes repacks the weights at the first forward pass in eval mode, for a
            # kernel without a backward pass: no gradient would get through the layer any more.
            module.support_avx512bf16_for_cpu = False
    if quantization:
        for parameter in model.parameters():  # what stays a float is a view of the file, and holds all of it in memory
            if parameter.is_floating_point() and parameter.device.type == "cpu":
                parameter.data = parameter.data.clone()
    if auto_class is AutoModelForCausalLM:
        # Nothing else of a saved one: a repetition penalty, say, would bend the rollouts of PPO.
        model.generation_config = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    return model, info["missing_keys"]


def _fuse_gelu(model: nn.Module) -> None:
    """Compute GPT-2's GELU in one kernel in place of eight: the same function, and a fifth of the memory."""
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, GELUTanh())


def _quantization(model_args: ModelArguments) -> BitsAndBytesConfig | None:
    if model_args.load_in_8bit:
        return BitsAndBytesConfig(
            load_in_8bit=True, llm_int8_threshold=model_args.llm_int8_threshold, llm_int8_skip_modules=HEADS
        )
    if model_args.load_in_4bit:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=model_args.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=model_args.use_bnb_nested_quant,
            bnb_4bit_compute_dtype=model_args.dtype,
            llm_int8_skip_modules=HEADS,
        )
    return None


def has_conv1d(model: nn.Module) -> bool:
    """GPT-2's Conv1D keeps its weight transposed; bitsandbytes replaces it by a linear layer that doesn't."""
    return any(isinstance(module, Conv1D) for module in model.modules())
