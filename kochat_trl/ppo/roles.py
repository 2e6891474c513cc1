"""The four models of PPO: policy, reference, reward and value; group methods have no value.

They may be models of their own, as in TRL, or four LoRA adapters on one backbone, which is loaded and held once. The
trainer sees the same thing in both: a `Role` has a backbone, a head that reads its hidden states, and an adapter.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

from kochat_trl.errors import UserError
from kochat_trl.models.fused import fuse_lora
from kochat_trl.models.heads import SCORE, has_score_head, inner_model, linear_head, lm_head, score_head
from kochat_trl.models.loading import (
    ADAPTER_HEAD,
    ADAPTER_WEIGHTS,
    add_lora,
    base_of_adapter,
    has_conv1d,
    is_adapter,
    load_causal_lm,
    load_reward_model,
    put_lora_weights,
    read_lora_config,
    refuse_other_lora,
)
from kochat_trl.settings.keys import ModelArguments
from kochat_trl.settings.ppo import PPOConfig

import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import CausalLMOutput


class Role:
    """One part that a model plays: `hidden` states of its backbone under its adapter, read by its `head`.

    `adapter` is the name of the adapter that is on while the role is `active`; None is the bare backbone.
    """

    def __init__(self, model: Any, head: Any, adapter: str | None):
        inner = inner_model(model)
        self.backbone: PreTrainedModel = getattr(inner, inner.base_model_prefix)
        self.head = head
        self.adapter = adapter
        # The backbone's layers, and a head that PEFT trains whole.
        self.layers: list[Any] = [m for m in model.modules() if isinstance(m, BaseTunerLayer | ModulesToSaveWrapper)]

    @contextmanager
    def active(self) -> Iterator[None]:
        """Switch to the role's adapter; `requires_grad` of all weights stays as it is.

        PEFT's own set_adapter switches gradients too. A backward pass belongs inside: gradient checkpointing computes
        the forward pass again, and it must be under the same adapter.
        """
        before = [layer._active_adapter for layer in self.layers]
        for layer in self.layers:
            layer._active_adapter = [self.adapter] if self.adapter else []
        try:
            yield
        finally:
            for layer, adapter in zip(self.layers, before, strict=True):
                layer._active_adapter = adapter

    def hidden(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The last hidden states, (rows, length, hidden_size), of rows that are padded on the right."""
        return self.backbone(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state


class Roles(nn.Module):
    """Policy, reference, reward and value, and the models that they live in."""

    def __init__(
        self, models: dict[str, nn.Module], policy: Role, reference: Role, reward: Role | None, value: Role | None
    ):
        super().__init__()
        self.models = nn.ModuleDict(models)
        fuse_lora(self.models)
        self.policy, self.reference, self.reward, self.value = policy, reference, reward, value
        self.config = policy.backbone.config

    @property
    def value_reads_policy(self) -> bool:
        """Whether the value head reads the policy's own hidden states."""
        value, policy = self.value, self.policy
        return value is not None and value.backbone is policy.backbone and value.adapter == policy.adapter

    def as_models(self) -> tuple[nn.Module, nn.Module, nn.Module | None, nn.Module | None]:
        """Policy, reference, reward and value as scripts for TRL's trainer have them; None of what there isn't.

        A role with a model of its own is that very model; one that shares a backbone is a `RoleModel`.
        """
        roles = {"policy": self.policy, "reference": self.reference, "reward": self.reward, "value": self.value}
        found: Any = {name: role and RoleModel(role) for name, role in roles.items() if name not in self.models}
        policy, reference, reward, value = (found[name] if name in found else self.models[name] for name in roles)
        return policy, reference, reward, value

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the policy, as an adapter or a model, and the value function, if there is one, into `value` in it.

        The value function is written as a reward model is, adapter and head or a classifier. A head on the hidden
        states of a policy that is no adapter is written alone.
        """
        models: Any = self.models
        _save(models["policy"], self.policy.adapter, folder)
        if self.value is None:
            return
        value_folder = Path(folder) / "value"
        if "value" in models:
            _save(models["value"], self.value.adapter, value_folder, _plain_head(self.value.head))
        elif self.value.adapter is not None:
            _save(models["policy"], self.value.adapter, value_folder, self.value.head)
        else:
            value_folder.mkdir(parents=True, exist_ok=True)
            weight: Any = self.value.head.weight
            save_file({f"{SCORE}.weight": weight.detach()}, str(value_folder / "head.safetensors"))


class RoleModel(nn.Module):
    """A role on a backbone that it shares, as a model of its own: its forward pass is under its adapter."""

    def __init__(self, role: Role):
        super().__init__()
        self.backbone, self.head, self.config = role.backbone, role.head, role.backbone.config
        self._role = role

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **unused: Any) -> CausalLMOutput:
        """The head's outputs, (rows, length, outputs), of rows that are padded on the right."""
        with self._role.active():
            return CausalLMOutput(logits=self.head(self._role.hidden(input_ids, attention_mask)))

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Of the base, the head and the role's own adapter: not of the adapters of other roles."""
        adapters = {name for layer in self._role.layers for name in getattr(layer, "scaling", ())}
        others = {
            id(parameter)
            for name in adapters - {self._role.adapter}
            for parameter in adapter_parameters(self.backbone, name)
        }
        yield from (pair for pair in super().named_parameters(*args, **kwargs) if id(pair[1]) not in others)


def roles_of(
    args: PPOConfig, model: Any, ref_model: Any, reward_model: Any, value_model: Any, peft_config: PeftConfig | None
) -> Roles:
    """The roles of models that are given one by one. Raises `UserError` for what makes no sense together."""
    if ref_model is model:
        raise UserError("`model` and `ref_model` are one object; give a copy, or None")
    if value_model is not None and value_model is reward_model:
        raise UserError("`value_model` and `reward_model` are one object: one is trained, the other isn't")
    if args.value_function is None and value_model is not None:
        raise UserError(f"`value_model` is given, and advantages: {args.advantages} has no use for one; leave it out")
    if args.value_function is not None and (value_model is None) != (args.value_model == "shared"):
        raise UserError("give `value_model`, or set `value_model: shared` in the config, and not both")
    if peft_config is not None and isinstance(model, PeftModel):
        raise UserError("`model` has an adapter already, and `peft_config` asks for another; remove one")
    if peft_config is not None:
        model = get_peft_model(model, peft_config)
    adapters = args.model_adapter_name, args.ref_adapter_name
    return separate_models(model, ref_model, reward_model, value_model, *adapters, args.value_function is not None)


def separate_models(
    model: Any,
    ref_model: Any,
    reward_model: Any,
    value_model: Any,
    policy_adapter: str | None = None,
    ref_adapter: str | None = None,
    has_value: bool = True,
) -> Roles:
    """Roles of models of their own.

    Without `ref_model` the reference is `model` under `ref_adapter`, or with its adapter off, or a copy where it has
    none. Without `value_model` the value is a new head, zero at first, on the policy's hidden states, or with
    `has_value=False` there is none. Without `reward_model` there is no reward. Raises `UserError` for a model without
    the head that its part needs.
    """
    models = {"policy": model}
    if ref_model is None and not isinstance(model, PeftModel):
        ref_model = deepcopy(model)
    policy = Role(model, lm_head(model), policy_adapter or _active_adapter(model))
    if ref_model is None:
        reference = Role(model, policy.head, ref_adapter)
        for parameter in adapter_parameters(model, ref_adapter or ""):
            parameter.requires_grad_(False)
    else:
        models["reference"] = ref_model.requires_grad_(False)
        reference = Role(ref_model, lm_head(ref_model), _active_adapter(ref_model))
    reward = value = None
    if reward_model is not None:
        models["reward"] = reward_model.requires_grad_(False)
        reward = Role(reward_model, score_head(reward_model), _active_adapter(reward_model))
    if value_model is not None:
        models["value"] = value_model
        value = Role(value_model, score_head(value_model), _active_adapter(value_model))
    elif has_value:
        models["value_head"] = _new_value_head(policy.head)
        value = Role(model, models["value_head"], policy.adapter)
    return Roles(models, policy, reference, reward, value)


def one_backbone(backbone: Any, sft_adapter: str, reward_adapter: str, value_model: str | None = "adapter") -> Roles:
    """Roles on one causal LM, float or quantized.

    The adapter in the folder `sft_adapter` is the policy, trained, and the reference, frozen. The one in
    `reward_adapter`, with its head, is the reward model, frozen, and with `value_model="adapter"` also where the value
    function starts, trained. With `"shared"` the value is a new head on the policy's hidden states, zero at first, and
    with None there is none.

    The adapters may differ in rank and in the layers that they adapt. Raises `UserError` if a folder's weights don't
    fit the backbone, or hold no head.
    """
    if not has_score_head(reward_adapter):
        raise UserError(f"{reward_adapter}: no score head there, so it is no reward model")
    model, _ = _add_adapter(backbone, "policy", sft_adapter)
    _add_adapter(model, "reference", sft_adapter)
    reward_head = _add_adapter(model, "reward", reward_adapter)[1]
    value_head = None
    if value_model == "adapter":
        value_head = _add_adapter(model, "value", reward_adapter)[1]
    elif value_model == "shared":
        value_head = _new_value_head(lm_head(model))
    return adapters_of(model, reward_head, value_head)


def adapters_of(model: PeftModel, reward_head: nn.Module, value_head: nn.Module | None) -> Roles:
    """Roles of a model that has the adapters `policy`, `reference`, `reward` and maybe `value`: without that one
    `value_head` reads the policy's hidden states, and without `value_head` there is no value."""
    models: dict[str, Any] = {"policy": model, "reward_head": reward_head}
    head = lm_head(model)
    policy, reference = Role(model, head, "policy"), Role(model, head, "reference")
    value = None
    if value_head is not None:
        models["value_head"] = value_head
        value = Role(model, value_head, "value" if "value" in model.peft_config else "policy")
    reward_head.requires_grad_(False)
    _train_only(model, "policy", "value")
    return Roles(models, policy, reference, Role(model, reward_head, "reward"), value)


def load_roles(
    sft_path: str,
    reward_path: str | None,
    model_args: ModelArguments,
    tokenizer: PreTrainedTokenizerBase,
    value_model: str | None = "adapter",
    share: bool = True,
) -> Roles:
    """The roles of a run: one backbone with `share` where both paths hold adapters of one base, else separate models.

    An SFT adapter is trained on; a whole SFT model gets a new adapter, or is trained whole if LoRA is off. Without
    `reward_path` there is no reward. Raises `UserError` for LoRA keys that an SFT adapter has settled already.
    """
    if is_adapter(sft_path):
        refuse_other_lora(model_args, sft_path)
        backbone = load_causal_lm(sft_path, model_args, tokenizer)
        if share and reward_path and is_adapter(reward_path) and _same_base(sft_path, reward_path):
            return one_backbone(backbone, sft_path, reward_path, value_model)
        policy, _ = _add_adapter(backbone, "policy", sft_path)
        _add_adapter(policy, "reference", sft_path)
        _train_only(policy, "policy")
        names: tuple[Any, Any] = ("policy", "reference")
    else:
        policy = add_lora(load_causal_lm(sft_path, model_args, tokenizer), model_args)
        names = (None, None)
    reward = own = None
    if reward_path:
        reward = load_reward_model(reward_path, model_args, tokenizer)
    if reward_path and value_model == "adapter":
        own = load_reward_model(reward_path, model_args, tokenizer, trainable=True)
    return separate_models(policy, None, reward, own, *names, has_value=value_model is not None)


def _same_base(*adapters: str) -> bool:
    return len({(os.path.realpath(base), revision) for base, revision in map(base_of_adapter, adapters)}) == 1


def adapter_parameters(model: nn.Module, name: str) -> Iterator[nn.Parameter]:
    """The weights of one adapter."""
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            for part in dict.fromkeys(layer.adapter_layer_names):  # DoRA names one twice
                weights: Any = getattr(layer, part)
                if name in weights:
                    found = weights[name]
                    yield from ([found] if isinstance(found, nn.Parameter) else found.parameters())


def _train_only(model: nn.Module, *adapters: str) -> None:
    model.requires_grad_(False)
    for name in adapters:
        for parameter in adapter_parameters(model, name):
            parameter.requires_grad_(True)


def switch_dropout_off(module: nn.Module) -> None:
    """Dropout layers, and the rates that some models keep as numbers (OPT, Llama's attention)."""
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        for name, value in vars(part).items():
            if isinstance(value, float) and any(word in name for word in ("dropout", "pdrop", "layerdrop")):
                setattr(part, name, 0.0)


def _add_adapter(model: Any, name: str, folder: str) -> tuple[Any, Any]:
    """Put the adapter in `folder` on `model` as `name`; returns the model, wrapped, and the score head in the file."""
    config = read_lora_config(folder)
    config.fan_in_fan_out = has_conv1d(model)
    if isinstance(model, PeftModel):
        model.add_adapter(name, config)
    else:
        model = get_peft_model(model, config, adapter_name=name)
    for parameter in adapter_parameters(model, name):
        parameter.data = parameter.data.float()
    head = put_lora_weights(model, name, folder)
    return model, None if head is None else linear_head(head)


def _save(model: Any, name: str | None, folder: str | Path, head: Any = None) -> None:
    """Write the adapter `name` of a model, with a score head if there is one, or else the whole model."""
    if name is None:
        model.save_pretrained(folder)
        return
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    config: Any = deepcopy(model.peft_config[name])
    config.inference_mode = True
    config.base_model_name_or_path = model.get_base_model().config._name_or_path
    if head is not None:
        weights[ADAPTER_HEAD] = head.weight
        config.task_type, config.modules_to_save = "SEQ_CLS", ["classifier", SCORE]
    save_file({key: value.detach().cpu().contiguous() for key, value in weights.items()}, str(folder / ADAPTER_WEIGHTS))
    config.save_pretrained(str(folder))


def _active_adapter(model: Any) -> str | None:
    if not isinstance(model, PeftModel):
        return None
    if model.active_peft_config.is_prompt_learning:
        raise UserError("PPO works with LoRA and its kin, not with adapters that add tokens to the prompt")
    return str(model.active_adapter)


def _plain_head(head: Any) -> Any:
    return head.modules_to_save[head.active_adapters[0]] if isinstance(head, ModulesToSaveWrapper) else head


def _new_value_head(head: Any) -> nn.Linear:
    width = head.linear.weight.shape[1]
    return linear_head(torch.zeros(1, int(width)))
