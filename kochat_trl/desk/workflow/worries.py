"""What a careful reader would doubt in the figures of a run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


class Rule(NamedTuple):
    """`sign` and `advice` are format strings of what `worries` has seen, by the names that `holds` takes."""

    holds: Callable[..., bool]
    sign: str
    advice: str


RULES = (
    Rule(
        lambda win, kl, limit, **_: kl["high"] < 0.1 or (win["low"] <= 0.5 <= win["high"] and kl["mean"] <= limit),
        "{method} can't be told from SFT: it wins {win[share]:.0%} [{win[low]:.0%}, {win[high]:.0%}] of {win[n]} "
        "prompts, KL {kl[mean]:.2f} nats.",
        "Train for longer, raise learning_rate, or lower {hold}; look at the curves.",
    ),
    Rule(
        lambda win, **_: win["high"] < 0.5,
        "{method}'s answers score worse than SFT's: it wins {win[share]:.0%}.",
        "Lower learning_rate; look at KL.",
    ),
    Rule(
        lambda kl, limit, **_: kl["mean"] > limit,
        "The policy is {kl[mean]:.1f} nats a response from SFT (over {limit:g}).",
        "It may have left the language: read the answers; raise {hold}, or train for less.",
    ),
    Rule(
        lambda sft, ppo, **_: "judge" in ppo and ppo["judge_high"] < sft["judge_low"] and ppo["score"] > sft["score"],
        "The reward went up ({sft[score]:.2f} → {ppo[score]:.2f}) and the judge down ({sft[judge]:.2f} → "
        "{ppo[judge]:.2f}).",
        "Reward hacking: raise {hold}, stop earlier, or train the reward model on more kinds of answers.",
    ),
    Rule(  # the gain is sure; a fall of the right answers need not be, for that they rose is what is claimed
        lambda sft, ppo, win, **_: "right" in ppo and win["gain_low"] > 0 and ppo["right"] < sft["right"],
        "The reward went up ({sft[score]:.2f} → {ppo[score]:.2f}) and the share of right answers didn't follow "
        "({sft[right]:.0%} [{sft[right_low]:.0%}, {sft[right_high]:.0%}] → "
        "{ppo[right]:.0%} [{ppo[right_low]:.0%}, {ppo[right_high]:.0%}]).",
        "The reward model may pay for form: train it on pairs of one form as well, one answer right and one wrong.",
    ),
    Rule(
        lambda sft, ppo, **_: ppo["tokens"] > 1.5 * sft["tokens"],
        "Answers grew from {sft[tokens]:.0f} to {ppo[tokens]:.0f} tokens.",
        "The reward model may pay for length: `kochat reward eval` compares it with 'the longer answer wins'.",
    ),
    Rule(
        lambda sft, ppo, **_: ppo["distinct_2"] < 0.7 * sft["distinct_2"],
        "{method} repeats itself: distinct-2 fell from {sft[distinct_2]:.2f} to {ppo[distinct_2]:.2f}.",
        "One answer for everything is what a narrow reward model asks for: read the answers side by side.",
    ),
    Rule(
        lambda sft, ppo, **_: ppo["ended"] < 0.8 * sft["ended"],
        "Answers that end fell from {sft[ended]:.0%} to {ppo[ended]:.0%}.",
        "Set missing_eos_penalty, or raise response_length.",
    ),
    Rule(
        lambda sft, ppo, **_: ppo["hangul"] < 0.9 * sft["hangul"],
        "The share of Hangul fell to {ppo[hangul]:.0%}.",
        "Read the answers; raise {hold}.",
    ),
    Rule(
        lambda baselines, reward, **_: reward and baselines is None,
        "Nobody has looked at how far the reward model can be trusted.",
        "kochat reward eval {reward} FILE, with rankings that it was not trained on.",
    ),
)


def worries(report: dict[str, Any], name: str, settings: dict[str, Any]) -> list[dict[str, str]]:
    """What to doubt of the run `name`, which was made with `settings`.

    Each has the `run`, the `sign` that was seen, and `advice`.
    """
    evaluation = Path(settings["reward_model_path"] or "") / "evaluation" / "evaluation.json"
    method = report["methods"][name]
    baselines = json.loads(evaluation.read_text(encoding="utf-8"))["baselines"] if evaluation.is_file() else None
    seen = {
        "sft": report["metrics"]["sft"],
        "ppo": report["metrics"][name],
        "win": report["wins"][f"{name} over sft"],
        "kl": report["kl"][name],
        "limit": 2 * settings["kl_target"] if settings.get("kl_target") else 20.0,
        "reward": settings["reward_model_path"],
        "method": method.upper(),
        "hold": "kl_coef" if method == "ppo" else "beta",
        "baselines": baselines,
    }
    found = [(rule.sign.format(**seen), rule.advice.format(**seen)) for rule in RULES if rule.holds(**seen)]
    for rule, against in (baselines or {}).items():
        if not against["beaten"]:
            sign = f"The reward model is no better than the rule '{rule}'."
            found.append((sign, "PPO will learn the rule: docs/reward.md."))
    return [{"run": name, "sign": sign, "advice": advice} for sign, advice in found]
