"""The algorithms, by the `type` of their config. A new one is a file here, a config class, a preset and its tests."""

from __future__ import annotations

from rayhf.algorithms.base import Algorithm
from rayhf.config.algorithms import AlgorithmConfig, OnlineDPOConfig, PPOConfig


def build_algorithm(config: AlgorithmConfig, *, max_tokens: int) -> Algorithm:
    """Raises ConfigError for settings that contradict each other."""
    from rayhf.algorithms.online_dpo import OnlineDPO
    from rayhf.algorithms.ppo import PPO

    match config:
        case PPOConfig():
            return PPO(config, max_tokens=max_tokens)
        case OnlineDPOConfig():
            return OnlineDPO(config, max_tokens=max_tokens)
