"""Whether rounding hides a campaign's updates from its engines, before anything starts.

In: a config and the model's weights. Out: a warning that says what to set. Adam moves a weight by
about learner.lr per optimizer step at most; a change of less than half the distance to the next
number of policy.dtype rounds to no change.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rayhf.config.schema import CampaignConfig
from rayhf.errors import ConfigError
from rayhf.models.hub import local_directory
from rayhf.planning.preflight import Derived

if TYPE_CHECKING:
    from torch import Tensor

_TENSORS = 16
"""Matrices that are read, and values of each."""
_VALUES = 1 << 15
_HIDDEN = 0.8
"""Share of the weights above which the warning is given."""


def precision_warning(config: CampaignConfig, derived: Derived, base: Path) -> str | None:
    """Return a warning where one iteration's update is too small for most of the weights.

    None where it is not, and where nothing is rounded to nearest or no weights are there to read.
    """
    policy = config.policy
    learner = config.learner
    if policy.lora is not None or learner.sync_rounding == "stochastic":
        return None
    rounded = "bfloat16" if learner.dtype == "bfloat16" else policy.dtype
    if rounded == "float32":
        return None
    update = learner.lr * derived.steps_per_iteration
    hidden = hidden_share(local_directory(policy.model, base), update=update, dtype=rounded)
    if hidden is None or hidden < _HIDDEN:
        return None
    effect = (
        f"an iteration moves a weight by about {update:.1g} at most (learner.lr, "
        f"{derived.steps_per_iteration} step(s)), less than half of {rounded}'s step for "
        f"{hidden:.0%} of the model's weights"
    )
    if learner.dtype == "bfloat16":
        return (
            f"{effect}: its float32 masters add updates up, but learner and engines compute with "
            "weights that change late (sync/changed_fraction); set learner.dtype=float32 with "
            "policy.dtype=float32 or float16, or policy.lora"
        )
    return (
        f"{effect}: rounding to nearest hides it, and the engines lag behind the learner "
        "(sync/update_lost, rollout/mismatch_kl); set policy.dtype=float32"
        + (" or float16" if rounded == "bfloat16" else "")
        + ", learner.sync_rounding=stochastic, or policy.lora"
    )


def hidden_share(model: Path, *, update: float, dtype: str) -> float | None:
    """Return the share of a model's weights that a change by `update` leaves unrounded.

    Of a sample of the directory's matrices; None where it has none.
    """
    import torch

    info = torch.finfo(getattr(torch, dtype))
    sample = [values.float().abs() for values in _sample(model)]
    if not sample:
        return None
    weights = torch.cat(sample)
    exponent = torch.frexp(weights).exponent - 1
    step = torch.ldexp(torch.full_like(weights, info.eps), exponent)
    return float((step / 2 > update).float().mean())


def _sample(model: Path) -> list[Tensor]:
    from safetensors import SafetensorError, safe_open

    sample: list[Tensor] = []
    for file in sorted(model.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as handle:
                names = sorted(handle.keys())
                for name in names[:: max(1, len(names) // _TENSORS)]:
                    rows = handle.get_slice(name)
                    shape = rows.get_shape()
                    if len(shape) == 2:
                        count = max(1, _VALUES // shape[1])
                        sample.append(rows[:count].reshape(-1))
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"policy.model: {file} cannot be read ({error})") from None
    return sample
