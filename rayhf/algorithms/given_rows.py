"""Base of algorithms that train on the rows of prompts.train and generate nothing.

`prompts.batch` is then the number of examples per iteration; a row may give several. Their order is
a function of (seed, iteration), as that of prompts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from rayhf.algorithms.base import AlgorithmBase, Selection, SelectionContext
from rayhf.algorithms.context import ExplorationContext
from rayhf.config.algorithms import AlgorithmConfig
from rayhf.data.chat import Chat
from rayhf.data.examples import EncodedExample
from rayhf.data.readers import Row
from rayhf.errors import ConfigError
from rayhf.types import Example, Group, Prompt

if TYPE_CHECKING:
    from rayhf.config.schema import CampaignConfig


class GivenRowsConfig(AlgorithmConfig):
    """Settings of algorithms that train on given rows."""

    too_long: Literal["refuse", "drop"] = "refuse"
    """What to do with an example that is longer than policy.max_length: refuse to start, or leave
    it out."""

    def check_campaign(self, campaign: CampaignConfig) -> None:
        """Refuse settings that only make sense where completions are generated."""
        if campaign.rollout.temperature != 1:
            raise ConfigError(
                f"rollout.temperature is {campaign.rollout.temperature:g}, but {self.type} "
                "generates nothing for training (evaluations sample at 1); expected 1"
            )
        if campaign.run.max_staleness:
            raise ConfigError(
                f"run.max_staleness is {campaign.run.max_staleness}, but {self.type} generates "
                "nothing for training; expected 0"
            )


class GivenRowsAlgorithm(AlgorithmBase, ABC):
    """Base of algorithms that train on given rows: the capability TrainsOnRows."""

    samples = 0

    def __init__(self) -> None:
        self._examples: dict[str, EncodedExample] = {}

    @abstractmethod
    def encode(self, row: Row, where: str, chat: Chat) -> Sequence[EncodedExample]:
        """Return the training examples of a row, encoded for the policy."""

    def set_examples(self, examples: Sequence[EncodedExample]) -> None:
        """Receive all examples."""
        self._examples = {example.prompt_id: example for example in examples}

    async def explore(self, prompt: Prompt, context: ExplorationContext) -> Group:
        """Return a group without samples: nothing is generated."""
        return Group(prompt=prompt, samples=())

    def select(self, groups: Sequence[Group], context: SelectionContext) -> Selection:
        """Select the examples of the iteration's prompts."""
        return Selection(examples=self.examples_of(groups))

    def examples_of(self, groups: Sequence[Group]) -> tuple[Example, ...]:
        """Return the examples of the groups' prompts."""
        return tuple(self._examples[group.prompt.prompt_id].example() for group in groups)
