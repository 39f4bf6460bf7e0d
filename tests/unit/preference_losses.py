"""The preference losses by name, built from one set of numbers."""

from __future__ import annotations

from typing import Any

from rayhf.config.registry import LOSSES
from rayhf.losses.pairs import PairLoss, PairLossConfig

NAMES = sorted(name for name in LOSSES.builtin if issubclass(LOSSES.resolve(name), PairLoss))
REFERENCE_FREE = {"simpo", "cpo", "orpo"}
SMOOTHED = {"sigmoid", "robust", "exo"}
"""The losses with a label_smoothing."""


def build(
    name: str,
    *,
    beta: float = 0.1,
    eps: float = 0.0,
    gamma: float = 1.0,
    tau: float = 0.05,
    nll_coef: float = 0.0,
    importance_cap: float | None = 2.0,
) -> PairLoss[PairLossConfig]:
    """Build a loss from numbers of which each reads its own; exo has no smoothing of 0."""
    settings: dict[str, Any] = {"beta": beta}
    if name in SMOOTHED and not (name == "exo" and eps == 0.0):
        settings["label_smoothing"] = eps
    settings |= {"simpo": {"gamma": gamma}, "discopop": {"tau": tau}}.get(name, {})
    config = LOSSES.config_type(name)(**settings)
    loss: PairLoss[PairLossConfig] = LOSSES.build(
        config, importance_cap=importance_cap, nll_coef=nll_coef
    )
    return loss
