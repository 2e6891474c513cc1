"""Rewards beside the reward model: rules over answers, and functions of the user's own, each with a weight.

A reward function is called as TRL's GRPOTrainer calls one, `f(prompts, completions, completion_ids, **kwargs)`, each a
list with an item for each of n answers, and returns n numbers. Beside those it is given `ended`, whether each answer
ended itself. `kochat_trl.settings.checks.REWARD_FUNCTIONS` has the names of the rules.
"""

import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

from kochat_trl.data.text import ends_politely, hangul_share
from kochat_trl.errors import UserError
from kochat_trl.models.template import answer_text
from kochat_trl.ppo.rollout import Rollout

import torch
from torch import Tensor
from trl.rewards import get_repetition_penalty_reward, get_soft_overlong_punishment

RewardFunction = Callable[..., Sequence[float]]


def hangul(completions: Sequence[str], **_: Any) -> list[float]:
    """The share of Hangul in the letters of an answer, 0 to 1."""
    return [hangul_share(text) for text in completions]


def polite(completions: Sequence[str], **_: Any) -> list[float]:
    """1 for an answer that ends in 요 or 니다, else 0."""
    return [float(ends_politely(text)) for text in completions]


def ended(ended: Sequence[bool], **_: Any) -> list[float]:
    """1 for an answer that ended itself, 0 for one that was cut at `response_length`."""
    return [float(each) for each in ended]


def near(target: int) -> RewardFunction:
    """−|n − target| / target of n tokens, the end among them: 0 at the target, −1 at twice as many."""

    def length(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        return [-abs(len(ids) - target) / target for ids in completion_ids]

    return length


# What makes each rule, from the settings. The last fifth of the length is where DAPO's punishment sets in (Yu et al.
# 2025, section 3.4); the repetition penalty is that of Yeo et al. 2025, appendix C.2, on three tokens.
RULES: dict[str, Callable[[Any], RewardFunction]] = {
    "hangul": lambda args: hangul,
    "polite": lambda args: polite,
    "ended": lambda args: ended,
    "repetition": lambda args: get_repetition_penalty_reward(ngram_size=3, max_penalty=-1.0),
    "length": lambda args: near(args.target_length),
    "overlong": lambda args: get_soft_overlong_punishment(args.response_length, args.response_length // 5),
}


class RewardFunctions:
    """The `reward_functions` of a run, and their `reward_weights`.

    Raises `UserError` for a `module:function` that can't be imported; the folder that a run was started in is searched
    after the installed packages.
    """

    def __init__(self, args: Any):
        self.names: list[str] = args.reward_functions or []
        self.functions = [RULES[name](args) if name in RULES else _imported(name) for name in self.names]
        self.weights: list[float] = args.reward_weights or [1.0] * len(self.names)

    def __call__(
        self, prompts: list[str], completions: list[str], completion_ids: list[list[int]], ended: list[bool]
    ) -> dict[str, list[float]]:
        """The numbers of each function, without its weight. Raises `UserError` as `checked` does."""
        asked: dict[str, list[Any]] = {"prompts": prompts, "completions": completions}
        asked |= {"completion_ids": completion_ids, "ended": ended}
        return {name: checked(name, function, asked) for name, function in zip(self.names, self.functions, strict=True)}

    def total(self, rewards: Mapping[str, Any]) -> Any:
        """The weighted sum of what each function gave."""
        return sum(weight * rewards[name] for name, weight in zip(self.names, self.weights, strict=True))

    def of_rollout(self, rollout: Rollout, rows: Sequence[int], tokenizer: Any) -> dict[str, Tensor]:
        """The numbers of each function for `rows` of a rollout, (b,) of each; 0 in the other rows.

        Prompts are as the policy read them, in their template, without special tokens.
        """
        earned = self(
            [tokenizer.decode(rollout.prompts[row], skip_special_tokens=True) for row in rows],
            [answer_text(tokenizer, rollout.responses[row]) for row in rows],
            [rollout.responses[row] for row in rows],
            [bool(rollout.ended[row]) for row in rows],
        )
        found = {name: torch.zeros(len(rollout.prompts), device=rollout.tokens.device) for name in self.names}
        for name, numbers in earned.items():
            found[name][list(rows)] = torch.tensor(numbers, device=found[name].device)
        return found


def checked(name: str, function: RewardFunction, asked: dict[str, list[Any]]) -> list[float]:
    """What a reward function returns for n answers, as n numbers.

    Raises `UserError`, with the name of the function and the text of an answer, if it raises, or returns another count
    or what is no finite number.
    """
    completions = asked["completions"]

    def fault(text: str, what: str) -> UserError:
        return UserError(f"reward function '{name}', on the answer {text!r}: {what}")

    try:
        found = list(function(**asked))
    except Exception as error:
        raise fault(*_culprit(function, asked, error)) from error
    if len(found) != len(completions):
        raise fault(completions[0], f"returned {len(found)} numbers for {len(completions)} answers, this one the first")
    for text, value in zip(completions, found, strict=True):
        try:
            finite = math.isfinite(value)
        except (TypeError, ValueError):
            finite = False
        if not finite:
            raise fault(text, f"found {value!r}, expected a finite number")
    return [float(value) for value in found]


def _culprit(function: RewardFunction, asked: dict[str, list[Any]], error: Exception) -> tuple[str, str]:
    """The answer that a function raises for, and what it says: the first if it is none of them alone."""
    for i, text in enumerate(asked["completions"]):
        try:
            function(**{key: [values[i]] for key, values in asked.items()})
        except Exception as its:
            return text, f"{type(its).__name__}: {its}"
    return asked["completions"][0], f"{type(error).__name__}: {error}"


def _imported(name: str) -> RewardFunction:
    module, _, function = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found: RewardFunction = getattr(import_module(module), function)
    except Exception as error:  # of the module's own, too
        raise UserError(f"reward_functions: '{name}' can't be imported: {type(error).__name__}: {error}") from error
    return found
