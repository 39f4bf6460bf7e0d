"""KTO on given responses with a thumb up or down.

Ethayarajh et al. 2024 (2402.01306). The estimate z of KL(policy || reference) is the mean
log-ratio of each response under the next example's prompt, at least 0. It is computed with the
weights before the iteration's first optimizer step and shared by its steps: with one step per
iteration (the default) it is the current policy's, as in the paper. Metrics to watch: kto/margin
and kto/kl.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import numpy as np

from rayhf.algorithms.base import Selection, SelectionContext
from rayhf.algorithms.given_rows import GivenRowsAlgorithm, GivenRowsConfig
from rayhf.config.algorithms import InitialReference, ReferenceSchedule
from rayhf.config.registry import LOSSES
from rayhf.data.chat import Chat
from rayhf.data.examples import EncodedExample, fits
from rayhf.data.preferences import encode_labeled
from rayhf.data.readers import Row
from rayhf.errors import ConfigError
from rayhf.losses.base import Loss
from rayhf.losses.kto import KTOLossConfig
from rayhf.types import Example, Group, given_row
from rayhf.types import Row as TrainingRow

if TYPE_CHECKING:
    from rayhf.config.schema import CampaignConfig


class KTOConfig(GivenRowsConfig):
    """Kahneman-Tversky optimization (Ethayarajh et al. 2024)."""

    type: str = "kto"
    loss: Annotated[KTOLossConfig, LOSSES.defaulting("kto")] = KTOLossConfig()
    """The loss and its weights."""
    reference: ReferenceSchedule = InitialReference()
    """Schedule of the reference."""

    def check_campaign(self, campaign: CampaignConfig) -> None:
        """Refuse a batch in which no response has another prompt."""
        super().check_campaign(campaign)
        if campaign.prompts.batch < 2:
            raise ConfigError(
                "prompts.batch is 1, but kto estimates the KL from responses under other prompts "
                "of the batch; expected at least 2"
            )


class KTO(GivenRowsAlgorithm):
    """KTO: responses with a thumb up or down, without pairs (Ethayarajh et al. 2024)."""

    Config = KTOConfig
    needs_old_logp = True

    def __init__(self, config: KTOConfig) -> None:
        super().__init__()
        self.config = config
        self.reference: ReferenceSchedule | None = config.reference
        self._max_length = 0
        self._loss: Loss = LOSSES.build(config.loss)

    def encode(self, row: Row, where: str, chat: Chat) -> Sequence[EncodedExample]:
        """Return the labeled response of a row, or the two of a pair."""
        self._max_length = chat.max_length
        drop = self.config.too_long == "drop"
        examples = encode_labeled(row, where, chat)
        return [example for example in examples if fits(example.rows, chat, where, drop=drop)]

    def select(self, groups: Sequence[Group], context: SelectionContext) -> Selection:
        """Select the examples of the iteration, each with a second row for the KL estimate.

        That row is the next example's response, with another prompt where the batch has one, under
        this example's prompt.
        """
        examples = self.examples_of(groups)
        selected = [
            replace(example, rows=(example.rows[0], self._mismatched(examples, number)))
            for number, example in enumerate(examples)
        ]
        desirable = [example.scalars["desirable"] for example in examples]
        return Selection(
            examples=tuple(selected), metrics={"kto/desirable": float(np.mean(desirable))}
        )

    def _mismatched(self, examples: Sequence[Example], number: int) -> TrainingRow:
        own = examples[number].rows[0]
        count = len(examples)
        following = (examples[(number + step) % count].rows[0] for step in range(1, count))
        other = next(
            (row for row in following if not np.array_equal(row.prompt_ids, own.prompt_ids)),
            examples[(number + 1) % count].rows[0],
        )
        room = self._max_length - len(own.prompt_ids)
        return given_row(own.prompt_id, own.prompt_ids, other.response_ids[:room])

    def credit(self, examples: Sequence[Example]) -> tuple[list[Example], dict[str, float]]:
        """Replace the second rows by the KL estimate, an example's scalar `kl`."""
        ratios = []
        for example in examples:
            tokens = example.rows[1].tokens
            ratios.append(float((tokens["old_logp"] - tokens["ref_logp"]).sum()))
        kl = max(0.0, float(np.mean(ratios)))
        return [
            replace(example, rows=example.rows[:1], scalars={**example.scalars, "kl": kl})
            for example in examples
        ], {}

    def loss(self, objective: str = "policy") -> Loss:
        """Return KTO's loss."""
        return self._loss
