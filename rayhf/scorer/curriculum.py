"""Weights of a score's parts that follow the policy (CurriculumConfig has the rule and its source).

In: the parts of completions' scores; after each iteration, their means over it. Out: scores with
the current weights. These are fixed while an iteration is scored (with run.max_staleness they
change in it, between prompts): its completions are on one scale, and a resumed iteration has the
same scores. The state is one number per part, in every checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from rayhf.config.scorers import CurriculumConfig
from rayhf.errors import CheckpointError
from rayhf.scorer.rubric import weighted_mean
from rayhf.types import Scored

UNKNOWN = 0.5
"""Rate of a part before the first iteration: its weight is the config's."""


class Curriculum:
    """Rates at which the policy meets the parts of one scorer's score, and the weights they give.

    Args:
        weights: of the parts, by name, as the config has them.
        config: how they change.
    """

    def __init__(self, weights: Mapping[str, float], config: CurriculumConfig) -> None:
        self._weights = weights
        self._config = config
        self._rates = dict.fromkeys(weights, UNKNOWN)

    @property
    def factors(self) -> dict[str, float]:
        """Factor on each part's weight, from `smallest` to 1."""
        return {
            name: max(self._config.smallest, 4.0 * rate * (1.0 - rate))
            for name, rate in self._rates.items()
        }

    def score(self, outcome: Scored) -> float:
        """Return the weighted mean of an outcome's parts."""
        factors = self.factors
        weights = [weight * factors[name] for name, weight in self._weights.items()]
        return weighted_mean(weights, [outcome.parts[name] for name in self._weights])

    def observe(self, means: Mapping[str, float]) -> None:
        """Take the means of an iteration; a part without one keeps its rate."""
        memory = self._config.memory
        for name, rate in self._rates.items():
            if name in means:
                self._rates[name] = memory * rate + (1.0 - memory) * means[name]

    def state_dict(self) -> dict[str, float]:
        """Return the rates by part."""
        return dict(self._rates)

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restore the rates. Raises CheckpointError unless they are of the same parts."""
        rates = {str(name): float(rate) for name, rate in state.items()}
        if rates.keys() != self._rates.keys():
            raise CheckpointError(
                f"the checkpoint has rates of the criteria {sorted(rates)}, the config has "
                f"{sorted(self._rates)}"
            )
        if not all(math.isfinite(rate) and 0.0 <= rate <= 1.0 for rate in rates.values()):
            raise CheckpointError(f"the rates of criteria are {rates}; expected 0 to 1")
        self._rates = {name: rates[name] for name in self._rates}
