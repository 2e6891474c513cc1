"""Heads: over the vocabulary, and the one that gives a score; and where a score is read."""

from pathlib import Path
from typing import Any

from kochat_trl.errors import UserError

import torch
from peft import PeftModel
from safetensors import safe_open
from torch import Tensor, nn

SCORE = "score"  # the name that transformers gives to the head of a sequence classifier
NO_HEAD = (
    "no score head there, so it is no reward model; give the output of recipes/reward.py, or the same merged by "
    "scripts/merge_lora.py"
)


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


def lm_head(model: Any) -> nn.Module:
    """The head over the vocabulary; `UserError` if there is none."""
    head = inner_model(model).get_output_embeddings()
    if head is None:
        raise UserError(f"{type(model).__name__} has no head over the vocabulary, so it is no policy")
    return head


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


# --- Where a score is read ----------------------------------------------------------------------


def read_scores(model: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """The score of each row, (rows,), by a sequence classifier: in the reward model's training and evaluation.

    transformers finds the last token by the pad id: where a tokenizer pads with its end-of-sequence token, that is the
    token before the end.
    """
    return model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits.squeeze(-1)


def end_states(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """The hidden states, (rows, hidden_size), that PPO's reward is read from: at the last token of each row, by mask.

    `hidden` is (rows, length, hidden_size); rows are padded on the right, and `attention_mask` is 1 on tokens.
    """
    return hidden[torch.arange(len(hidden), device=hidden.device), attention_mask.sum(1) - 1]
