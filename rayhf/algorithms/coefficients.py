"""Coefficients that follow a target: of the KL penalty and of the entropy bonus."""

from __future__ import annotations

import numpy as np

from rayhf.algorithms.advantages import finite
from rayhf.errors import ConfigError
from rayhf.types import JsonObject


class AdaptiveEntropy:
    """Coefficient of the entropy bonus that keeps the entropy from falling below a target.

    After every iteration the coefficient grows by `step` where the policy's entropy was below
    `target`, and falls by `step` where it was above, within [0, largest]; it is applied only after
    an iteration whose entropy was at most the target (He et al. 2025, Skywork-OR1, "Adaptive
    Entropy Control", which applies it by the entropy of the batch itself).
    """

    def __init__(self, *, target: float, step: float, largest: float) -> None:
        """Start at 0; `target` and the entropies of `update` are nats per token."""
        self.target = target
        self.step = step
        self.largest = largest
        self.coef = 0.0
        self.is_low = False
        """Whether the last iteration's entropy was at most the target."""

    @property
    def applied(self) -> float:
        """Coefficient of the next iteration."""
        return self.coef if self.is_low else 0.0

    def update(self, entropy: float) -> None:
        """Move the coefficient by the iteration's entropy."""
        if entropy != self.target:
            change = self.step if entropy < self.target else -self.step
            self.coef = min(max(self.coef + change, 0.0), self.largest)
        self.is_low = entropy <= self.target

    def state_dict(self) -> JsonObject:
        """Return what changes; the settings belong to the config."""
        return {"coef": self.coef, "is_low": self.is_low}

    def load_state_dict(self, state: JsonObject) -> None:
        """Restore what `state_dict` returned."""
        self.coef = float(finite([float(str(state["coef"]))], "coef")[0])
        self.is_low = bool(state["is_low"])


class AdaptiveKL:
    """Proportional controller of the KL coefficient (Ziegler et al. 2019).

    `target` and the KL that `update` receives are the same statistic: nats per RESPONSE (the sum
    over its tokens, averaged over responses), never per token.
    """

    def __init__(self, coef: float, target: float, horizon: float) -> None:
        for name, value in (("coef", coef), ("target", target), ("horizon", horizon)):
            if not (np.isfinite(value) and value > 0):
                raise ConfigError(
                    f"algorithm.kl.{name}: {value} must be finite and above 0 "
                    "for the adaptive controller"
                )
        self.coef = float(coef)
        self.target = float(target)
        self.horizon = float(horizon)

    def update(self, kl_per_response: float, responses: int) -> float:
        """Multiply coef by 1 + clip(kl / target - 1, -0.2, 0.2) * responses / horizon; return it.

        An iteration larger than the horizon counts as one horizon: otherwise a single step could
        take the coefficient to 0 or below.
        """
        observed = finite([kl_per_response], "kl_per_response")[0]
        error = min(max(observed / self.target - 1.0, -0.2), 0.2)
        self.coef *= 1.0 + error * min(responses / self.horizon, 1.0)
        return self.coef

    def state_dict(self) -> JsonObject:
        """Return the coefficient; target and horizon belong to the config."""
        return {"coef": self.coef}

    def load_state_dict(self, state: JsonObject) -> None:
        """Restore what `state_dict` returned."""
        self.coef = float(finite([float(str(state["coef"]))], "coef")[0])
