"""Base models, quantization, LoRA and the reward model's score head.

Trainable weights are float32 whatever the base is loaded in. The base may be float32, bfloat16, float16, int8 or
nf4; bitsandbytes quantizes it while it loads, on a GPU or on a CPU.
"""

import json
from pathlib import Path
from typing import Any, Literal

from kochat_trl.errors import UserError
from kochat_trl.models.heads import NO_HEAD, SCORE, has_score_head, in_float32, reward_class
from kochat_trl.models.remote import remote_code_allowed, why_not
from kochat_trl.models.sharding import shard_blocks
from kochat_trl.models.template import generation_ids
from kochat_trl.models.tokenizer import check_fits
from kochat_trl.settings.keys import LORA_FIELDS, ModelArguments

import torch
from accelerate import PartialState
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    BitsAndBytesConfig,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.activations import GELUTanh, NewGELUActivation
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

Kind = Literal["policy", "reward"]
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ADAPTER_HEAD = f"base_model.model.{SCORE}.weight"  # a score head's name in an adapter's file
HEADS = ["lm_head", "embed_out", SCORE]  # kept in float: GPT-2, Llama and Qwen; GPT-NeoX; any sequence classifier


def empty_model(kind: Kind, config: PretrainedConfig, model_args: ModelArguments) -> PreTrainedModel:
    """A model without values, on the meta device, with the layers and dtypes of one that is loaded by `model_args`."""
    model_class, config = _class_of(kind, config)
    with torch.device("meta"):
        model = model_class._from_config(
            config, dtype=model_args.dtype, attn_implementation=model_args.attn_implementation
        )
    _fuse_gelu(model)
    if quantization := _quantization(model_args):
        replace_with_bnb_linear(model, HEADS, quantization)
        model.is_loaded_in_8bit, model.is_loaded_in_4bit = model_args.load_in_8bit, model_args.load_in_4bit
    if kind == "reward":
        in_float32(model.score)
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


def base_of(path: str, revision: str = "main") -> tuple[str, str]:
    """The base model of an adapter, or the model itself, and its revision."""
    require_stage_output(path)
    return base_of_adapter(path) if is_adapter(path) else (path, revision)


def load_config(path: str, revision: str = "main") -> PretrainedConfig:
    """The config of a model in a local folder or on the Hub, or of an adapter's base; `UserError` if there is none."""
    path, revision = base_of(path, revision)
    try:
        return AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=remote_code_allowed())
    except (OSError, ValueError) as error:
        raise UserError(f"no model at '{path}': {why_not(error)}") from None


def positions_of(config: PretrainedConfig) -> int | None:
    """How many tokens a sequence may have by a model's config, or its text part's; None where there is no limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)  # BLOOM has none


def load_causal_lm(path: str, model_args: ModelArguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Load a causal LM, or an adapter's base, in the dtype or quantization that `model_args` asks for."""
    return _load("policy", path, model_args, tokenizer)[0]


def load_policy(path: str, model_args: ModelArguments, tokenizer: PreTrainedTokenizerBase) -> Any:
    """Load what answers, on the GPU if there is one: a base, a merged model, or an adapter (SFT, PPO) on its base."""
    model: Any = load_causal_lm(path, model_args, tokenizer)
    if is_adapter(path):
        model = load_adapter(model, path)
    return model.to(PartialState().device)


def new_reward_model(path: str, model_args: ModelArguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Load a causal LM's backbone, or that of an adapter's base, under a new score head in float32.

    The head is drawn from torch's global generator: seed it first.
    """
    return _load("reward", path, model_args, tokenizer)[0]


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
        return load_adapter(new_reward_model(path, model_args, tokenizer), path, trainable)
    model, missing = _load("reward", path, model_args, tokenizer)
    if any(name.startswith(f"{SCORE}.") for name in missing):
        raise UserError(f"{path}: {NO_HEAD}")
    return add_lora(model, model_args) if trainable else model.requires_grad_(False)


def load_adapter(model: Any, path: str, trainable: bool = False, name: str = "default") -> Any:
    """Put the adapter in the folder `path` on `model`, whether or not it was trained on a quantized base.

    Where others are on it already, it is beside them under `name`, and off.
    """
    config = PeftConfig.from_pretrained(path)
    config.fan_in_fan_out = has_conv1d(model)
    if isinstance(model, PeftModel):
        model.add_adapter(name, config)
        model.load_adapter(path, name, is_trainable=trainable)
    else:
        model = PeftModel.from_pretrained(model, path, name, config=config, is_trainable=trainable)
    return cast_trainable_to_float32(model)


def add_lora(model: PreTrainedModel, model_args: ModelArguments) -> PreTrainedModel:
    """Wrap `model` in a LoRA adapter, trainable weights in float32; the model as it is if LoRA is off.

    Where `model_name_or_path` is an adapter, the new one has its shape and starts from its weights: so SFT goes on, and
    a reward model starts from SFT (InstructGPT, 2203.02155, section 3.5). Otherwise, without `lora_target_modules`,
    every linear layer of the blocks is adapted. PEFT's own default for GPT-2 is the attention's input projection alone,
    one layer in four. A score head is trained and saved whole.

    Raises `UserError` if LoRA is off and the model is quantized or starts from an adapter, or if nothing is adapted.
    """
    start = str(model_args.model_name_or_path)
    if not model_args.use_peft:
        if model_args.load_in_8bit or model_args.load_in_4bit:
            raise UserError("a quantized base can't be trained whole: set `use_peft: true` or `load_in_8bit: false`")
        if is_adapter(start):
            raise UserError(f"model_name_or_path: {start} is an adapter; set `use_peft: true`, or merge it first")
        return model
    try:
        adapted: Any = get_peft_model(model, lora_config(model, model_args))
    except ValueError as error:
        if "lora_dropout" in str(error):
            raise UserError("lora_dropout: the weights of experts have no dropout; set lora_dropout: 0") from None
        raise UserError(f"lora_target_modules: {error}") from None
    if is_adapter(start):
        put_lora_weights(adapted, "default", start)
    return cast_trainable_to_float32(adapted)


def lora_config(model: nn.Module, model_args: ModelArguments) -> LoraConfig:
    """PEFT's config of the LoRA that `model_args` asks for on `model`, or of the adapter that it starts from."""
    if is_adapter(start := str(model_args.model_name_or_path)):
        if has_score_head(start):
            raise UserError(f"model_name_or_path: {start} is a reward model; start from a base, or from SFT's output")
        config = read_lora_config(start)
        refuse_other_lora(model_args, start)
        config.inference_mode = False
    else:
        targets = model_args.lora_target_modules or "all-linear"
        if isinstance(targets, str) and targets != "all-linear":
            targets = [targets]  # TRL makes a string of a list of one, and PEFT would read it as a regex of the path
        config = LoraConfig(
            r=model_args.lora_r,
            lora_alpha=model_args.lora_alpha,
            target_modules=targets,
            use_rslora=model_args.use_rslora,
            use_dora=model_args.use_dora,
            revision=model_args.model_revision,
        )
    config.task_type = (
        "SEQ_CLS" if hasattr(model, SCORE) else "CAUSAL_LM"
    )  # for SEQ_CLS, PEFT trains and saves the head
    config.lora_dropout = model_args.lora_dropout
    config.fan_in_fan_out = has_conv1d(model)
    return config


def read_lora_config(folder: str) -> LoraConfig:
    """PEFT's config of the LoRA adapter in `folder`; `UserError` if it is another kind of adapter."""
    config = PeftConfig.from_pretrained(folder)
    if not isinstance(config, LoraConfig):
        raise UserError(f"{folder}: a {config.peft_type} adapter; only LoRA adapters can be trained on here")
    return config


def refuse_other_lora(model_args: ModelArguments, adapter: str) -> None:
    """Raise `UserError` for LoRA keys that the adapter, a folder, which the run goes on with has settled otherwise."""
    config, default = read_lora_config(adapter), ModelArguments()
    for key, name in LORA_FIELDS.items():
        given, settled = getattr(model_args, key), getattr(config, name)
        alike = set(given) == set(settled) if isinstance(given, list) else given == settled
        if given != getattr(default, key) and not alike:
            raise UserError(
                f"{key}: has no effect: the run goes on with the adapter in {adapter}, which has {settled}; remove it"
            )


def put_lora_weights(model: Any, name: str, folder: str) -> Tensor | None:
    """Put the LoRA weights in `folder` into the adapter `name` of `model`; returns the score head that is beside them.

    Raises `UserError` if they are of other layers than the adapter has.
    """
    weights = load_file(Path(folder) / ADAPTER_WEIGHTS)
    head = weights.pop(ADAPTER_HEAD, None)
    own = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    if odd := sorted(set(weights) ^ {key for key in own if "lora_" in key}):
        raise UserError(f"{folder}: its weights don't fit the base model, beginning with {odd[0]}")
    rest = {key: weight for key, weight in own.items() if "lora_" not in key}  # a new score head, which PEFT asks for
    set_peft_model_state_dict(model, weights | rest, adapter_name=name)
    return head


def cast_trainable_to_float32(model: Any) -> Any:
    """Cast every trainable weight to float32 in place, and return `model`.

    TRL's trainers cast them to bfloat16 when the base is quantized: small updates are then lost to rounding, and
    RewardTrainer on int8 fails on the dtype. Call this again after building a trainer.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def _class_of(kind: Kind, config: PretrainedConfig, path: str = "", revision: str = "main") -> tuple[Any, Any]:
    """The class of a policy or a reward model with such a config, and the config of that class."""
    remote = getattr(config, "auto_map", {}).get("AutoModelForCausalLM")
    if remote and remote_code_allowed():
        causal_lm: Any = get_class_from_dynamic_module(remote, path, revision=revision)
        causal_lm.register_for_auto_class("AutoModelForCausalLM")  # so that its code is saved with it
    elif type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        causal_lm = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    else:
        raise UserError(f"{path}: transformers has no causal language model of type '{config.model_type}'")
    if causal_lm.config_class is config.sub_configs.get("text_config"):
        config = config.get_text_config()
    return causal_lm if kind == "policy" else reward_class(causal_lm), config


def _load(
    kind: Kind, path: str, model_args: ModelArguments, tokenizer: PreTrainedTokenizerBase
) -> tuple[PreTrainedModel, set[str]]:
    """The model, and the names of its weights that the files don't have."""
    path, revision = base_of(path, model_args.model_revision)
    config = load_config(path, revision)
    check_fits(tokenizer, config.get_text_config().vocab_size, path)
    model_class, config = _class_of(kind, config, path, revision)
    config.pad_token_id = config.get_text_config().pad_token_id = tokenizer.pad_token_id
    quantization = _quantization(model_args)
    verbosity = transformers_logging.get_verbosity()
    if kind == "reward":
        transformers_logging.set_verbosity_error()  # it warns that a head is new, or left, which is meant
    try:
        model, info = model_class.from_pretrained(
            path,
            config=config,
            dtype=model_args.dtype,
            attn_implementation=model_args.attn_implementation,
            quantization_config=quantization,
            # bitsandbytes quantizes onto a GPU wherever there is one, also for a run on the CPU.
            device_map={"": PartialState().device} if quantization else None,
            output_loading_info=True,
            revision=revision,
        )
    finally:
        transformers_logging.set_verbosity(verbosity)
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
    if kind == "reward":
        in_float32(model.score)
    else:
        # Nothing else of a saved one: a repetition penalty, say, would bend the rollouts of PPO.
        model.generation_config = GenerationConfig(**generation_ids(tokenizer))
    if model_args.shard_base:
        shard_blocks(model)
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
            bnb_4bit_quant_storage=model_args.dtype if model_args.shard_base else None,  # only floats can be divided
            llm_int8_skip_modules=HEADS,
        )
    return None


def has_conv1d(model: nn.Module) -> bool:
    """GPT-2's Conv1D keeps its weight transposed; bitsandbytes replaces it by a linear layer that doesn't."""
    return any(isinstance(module, Conv1D) for module in model.modules())
