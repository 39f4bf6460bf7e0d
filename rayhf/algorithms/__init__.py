"""The algorithms, by the `type` of their config. A new one is a file here, a config class, a preset
and its tests."""

from __future__ import annotations

from rayhf.algorithms.base import Algorithm
from rayhf.config.algorithms import (
    HyPOConfig,
    INPOConfig,
    IterativeDPOConfig,
    OnlineDPOConfig,
    PPOConfig,
    SPPOConfig,
)
from rayhf.config.mcts_dpo import MCTSDPOConfig
from rayhf.config.schema import AlgorithmConfig
from rayhf.config.spar import SPaRConfig


def build_algorithm(config: AlgorithmConfig, *, max_tokens: int) -> Algorithm:
    """Raises ConfigError for settings that contradict each other."""
    from rayhf.algorithms.hypo import HyPO
    from rayhf.algorithms.inpo import INPO
    from rayhf.algorithms.iterative_dpo import IterativeDPO
    from rayhf.algorithms.mcts_dpo import MCTSDPO
    from rayhf.algorithms.online_dpo import OnlineDPO
    from rayhf.algorithms.ppo import PPO
    from rayhf.algorithms.spar import SPaR
    from rayhf.algorithms.sppo import SPPO

    match config:
        case PPOConfig():
            return PPO(config, max_tokens=max_tokens)
        case IterativeDPOConfig():
            return IterativeDPO(config)
        case OnlineDPOConfig():
            return OnlineDPO(config)
        case SPPOConfig():
            return SPPO(config)
        case INPOConfig():
            return INPO(config)
        case HyPOConfig():
            return HyPO(config)
        case MCTSDPOConfig():
            return MCTSDPO(config, max_tokens=max_tokens)
        case SPaRConfig():
            return SPaR(config)
