"""Refills: further prompts in place of those whose groups teach nothing.

After an iteration's prompts are explored, the algorithm says which groups have a signal; as many
further prompts as are missing are explored, and so on, until prompts.batch groups have one or the
budget is used. All that decides this follows from the groups and the seed: a resumed iteration asks
for the same prompts again, and there is no position in the data to save.
"""

from __future__ import annotations

from collections.abc import Sequence

from rayhf.algorithms.base import Algorithm, RefillsPrompts, most_prompts
from rayhf.config.schema import CampaignConfig
from rayhf.data.prompts import PromptSet
from rayhf.errors import ConfigError
from rayhf.types import Group, Prompt, derive_seed


class Refill:
    """The further prompts of one iteration; none for an algorithm that does not want any."""

    def __init__(
        self, config: CampaignConfig, algorithm: Algorithm, prompts: PromptSet, iteration: int
    ) -> None:
        self._batch = config.prompts.batch
        self._limit = most_prompts(algorithm, self._batch)
        self._algorithm = algorithm
        self._prompts = prompts
        self._seed = derive_seed(config.seed, "refill")
        self._iteration = iteration

    def further(self, groups: Sequence[Group]) -> list[Prompt]:
        """Return the prompts to explore next; none where the batch is full or the budget used."""
        wanted = min(self._missing(groups), self._limit - len(groups))
        if wanted <= 0:
            return []
        explored = {group.prompt.prompt_id for group in groups}
        stream = self._stream()
        return [prompt for prompt in stream if prompt.prompt_id not in explored][:wanted]

    def metrics(self, groups: Sequence[Group]) -> dict[str, float]:
        """Return how many prompts were added, and how many groups with a signal are missing."""
        if self._limit <= self._batch:
            return {}
        return {
            "rollout/refilled": float(len(groups) - self._batch),
            "rollout/refill_missing": float(self._missing(groups)),
        }

    def _missing(self, groups: Sequence[Group]) -> int:
        if not isinstance(self._algorithm, RefillsPrompts):
            return 0
        useful = sum(self._algorithm.has_signal(group) for group in groups)
        return self._batch - useful

    def _stream(self) -> list[Prompt]:
        """Return the iteration's prompts in a second order of the data, by the sources' weights.

        A second order, because then the iterations' own prompts are the same with and without
        refills. There are as many as the budget allows, and at most prompts.batch of them are the
        iteration's own, so that enough are left.
        """
        return self._prompts.batch(batch=self._limit, iteration=self._iteration, seed=self._seed)


def check_refill(config: CampaignConfig, algorithm: Algorithm, prompts: PromptSet) -> None:
    """Raise ConfigError where there are fewer prompts than an iteration may explore."""
    batch = config.prompts.batch
    most = most_prompts(algorithm, batch)
    if most <= batch:
        return
    try:
        prompts.check_batches(batch=most, iterations=config.run.iterations, key="prompts.train")
    except ConfigError as error:
        raise ConfigError(
            f"with refills an iteration may explore {most} prompts, and prompts.train has "
            f"{len(prompts.prompts)} ({error}); expected a smaller budget of refills, a smaller "
            "prompts.batch, or more prompts"
        ) from None
