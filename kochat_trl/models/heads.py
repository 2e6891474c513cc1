"""Heads: over the vocabulary, and the one that gives a score; and where a score is read.

A reward or value model is a causal LM whose vocabulary head has made way for a score head, for every architecture in
the same way. Its weights have the names of transformers' sequence classifiers, which load them where there are any.
"""

from functools import cache
from pathlib import Path
from typing import Any

from kochat_trl.errors import UserError
from kochat_trl.models.linear import linear

import torch
from peft import PeftModel
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.modeling_outputs import SequenceClassifierOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as CLASSIFIER_NAMES

SCORE = "score"  # the name that transformers gives to the head of a sequence classifier
NO_HEAD = (
    "no score head there, so it is no reward model; give the output of recipes/reward.py, or the same merged by "
    "scripts/merge_lora.py"
)
# What models do to their head's scores, by the names in their configs: a factor, or a divisor.
FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier")  # Cohere, Falcon-H1, Muse
DIVISOR = "logits_scaling"  # Granite; a factor in HyperCLOVA X
CAP = "final_logit_softcapping"  # Gemma 2 and later


def has_score_head(path: str) -> bool:
    """Whether the weights in the local folder `path`, of an adapter or a model, hold a reward model's head."""
    for file in Path(path).glob("*.safetensors"):
        with safe_open(file, framework="pt") as weights:
            if any(SCORE in name.split(".") for name in weights.keys()):  # noqa: SIM118 (not a dict)
                return True
    return False


def inner_model(model: Any) -> Any:
    """The model that an adapter is put on."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


# --- Over the vocabulary ------------------------------------------------------------------------


class LMHead(nn.Module):
    """hidden states → logits as the model means them: z = cap·tanh(factor·s / cap), or factor·s without a cap.

    s are the scores of `linear`, the model's own head over the vocabulary. Logits are float32, or float64 for a float64
    head.
    """

    def __init__(self, linear: nn.Module, factor: float = 1.0, cap: float | None = None):
        super().__init__()
        self.linear, self.factor, self.cap = linear, factor, cap

    def forward(self, hidden: Tensor) -> Tensor:
        """(…, hidden_size) → (…, vocabulary)."""
        plain = type(self.linear) is nn.Linear and not torch.is_grad_enabled()
        weights: Any = self.linear
        scores = linear(hidden, weights.weight, weights.bias) if plain else self.linear(hidden)
        logits = scores if scores.dtype == torch.float64 else scores.float()
        if self.factor != 1:
            logits = logits * self.factor
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap


def lm_head(model: Any) -> LMHead:
    """The head over the vocabulary; `UserError` if there is none."""
    inner = inner_model(model)
    head = inner.get_output_embeddings()
    if head is None:
        raise UserError(f"{type(model).__name__} has no head over the vocabulary, so it is no policy")
    config = inner.config.get_text_config()
    factor = 1.0
    for name in FACTORS:
        factor *= getattr(config, name, None) or 1.0
    if divisor := getattr(config, DIVISOR, None):
        factor *= divisor if config.model_type.startswith("hyperclovax") else 1 / divisor
    return LMHead(head, factor, getattr(config, CAP, None))


# --- For a score ----------------------------------------------------------------------------------


@cache
def reward_class(causal_lm: Any) -> Any:
    """The class of reward models on an architecture, from that of its causal LMs; named as transformers names it."""
    name = CLASSIFIER_NAMES.get(causal_lm.config_class.model_type, f"{causal_lm.__name__}WithScore")
    ignored = {*(causal_lm._keys_to_ignore_on_load_unexpected or ()), r"lm_head\.", r"embed_out\."}
    own: Any = {"_keys_to_ignore_on_load_unexpected": ignored, "_tied_weights_keys": {}, "_auto_class": None}
    return type(name, (_Scorer, causal_lm), own | {"causal_lm": causal_lm})


class _Scorer:
    """A causal LM with a score head, (hidden_size, 1) without bias, in place of its head over the vocabulary."""

    def __init__(self: Any, config: PretrainedConfig, *args: Any, **kwargs: Any):
        config.num_labels = 1
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        head = super().get_output_embeddings()  # type: ignore[misc]
        parent, _, name = next(n for n, module in self.named_modules() if module is head).rpartition(".")
        delattr(self.get_submodule(parent), name)
        self.score = nn.Linear(head.weight.shape[1], 1, bias=False)

    def get_output_embeddings(self) -> None:
        return None

    def forward(
        self: Any, input_ids: Tensor, attention_mask: Tensor | None = None, **unused: Any
    ) -> SequenceClassifierOutputWithPast:
        """The score of each row as `logits`, (rows, 1), read at its last token."""
        backbone = getattr(self, self.base_model_prefix)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        hidden = backbone(input_ids=input_ids, attention_mask=mask, use_cache=False).last_hidden_state
        return SequenceClassifierOutputWithPast(logits=end_states(self.score(hidden), mask))


def end_states(states: Tensor, attention_mask: Tensor) -> Tensor:
    """The states, (rows, width), that every score is read from, or the scores: at the last token of each row, by mask.

    `states` is (rows, length, width), and `attention_mask` is 1 on tokens. That token ends the answer
    (`template.answer_shape`). transformers' own classifiers look for it by the pad id, and so miss the end where a
    tokenizer pads with it.
    """
    places = torch.arange(states.shape[1], device=states.device)
    return states[torch.arange(len(states), device=states.device), (attention_mask * places).argmax(1)]


def score_head(model: Any) -> nn.Module:
    """The head of a reward or value model, which gives one number; `UserError` if there is none."""
    inner = inner_model(model)
    if not hasattr(inner, SCORE):
        raise UserError(f"{type(inner).__name__} has no `{SCORE}` head; load an AutoModelForSequenceClassification")
    head = getattr(inner, SCORE)
    if (outputs := next(head.parameters()).shape[0]) != 1:
        raise UserError(f"{type(inner).__name__}: its `{SCORE}` head has {outputs} outputs, expected 1 (num_labels=1)")
    return head


def linear_head(weight: Tensor) -> nn.Linear:
    """A head without bias, (outputs, hidden_size), in float32."""
    head = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    head.weight.data = weight
    return in_float32(head)


def in_float32(head: Any) -> Any:
    """Keep a head in float32 and hand it float32, also where no autocast does (TRL's PPO rollout)."""
    head.float()
    head.register_forward_pre_hook(lambda module, args: (args[0].to(module.weight.dtype),))
    return head


def is_read_by_transformers(config: PretrainedConfig) -> bool:
    """Whether transformers has a sequence classifier of the architecture, with weights of the same names."""
    return config.model_type in CLASSIFIER_NAMES
