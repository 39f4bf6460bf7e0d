"""Supervised fine-tuning on demonstrations: the usual first stage.

Only the assistant's tokens carry loss; see rayhf/data/demonstrations.py. Metrics to watch: sft/nll
and, of an evaluation of type validation_loss, eval/<task>/nll.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from rayhf.algorithms.base import Selection, SelectionContext
from rayhf.algorithms.given_rows import GivenRowsAlgorithm, GivenRowsConfig
from rayhf.data.chat import Chat
from rayhf.data.demonstrations import encode_demonstration
from rayhf.data.examples import EncodedExample, fits
from rayhf.data.readers import Row
from rayhf.losses.base import Loss
from rayhf.losses.sft import SFTLoss
from rayhf.types import Group


class SFTConfig(GivenRowsConfig):
    """Supervised fine-tuning."""

    type: str = "sft"
    last_only: bool = False
    """Train on the last assistant turn of a conversation only, not on every one."""
    aggregate: Literal["token_mean", "sequence_mean"] = "token_mean"
    """Mean over all trained tokens of an optimizer step, or mean over conversations of their token
    means."""


class SFT(GivenRowsAlgorithm):
    """Supervised fine-tuning on the assistant's turns of given conversations."""

    Config = SFTConfig

    def __init__(self, config: SFTConfig) -> None:
        super().__init__()
        self.config = config
        self._loss = SFTLoss(aggregate=config.aggregate, entropy="off")

    def encode(self, row: Row, where: str, chat: Chat) -> Sequence[EncodedExample]:
        """Return the conversation of a row."""
        example = encode_demonstration(row, where, chat, last_only=self.config.last_only)
        kept = fits(example.rows, chat, where, drop=self.config.too_long == "drop")
        return (example,) if kept else ()

    def select(self, groups: Sequence[Group], context: SelectionContext) -> Selection:
        """Select the conversations of the iteration, and count their trained tokens."""
        examples = self.examples_of(groups)
        tokens = sum(example.scalars["trained_tokens"] for example in examples)
        return Selection(examples=examples, metrics={"sft/tokens": tokens})

    def loss(self, objective: str = "policy") -> Loss:
        """Return the negative log-likelihood."""
        return self._loss
