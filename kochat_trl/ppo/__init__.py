"""PPO, in place of the trainer that TRL removed: `from kochat_trl.ppo import PPOConfig, PPOTrainer`."""

from typing import Any

from kochat_trl.settings.ppo import PPOConfig

__all__ = ["PPOConfig", "PPOTrainer"]


def __getattr__(name: str) -> Any:
    if name == "PPOTrainer":  # imported when asked for: objective.py, for one, needs nothing of it
        from kochat_trl.ppo.trainer import PPOTrainer

        return PPOTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
