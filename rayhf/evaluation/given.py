"""Evaluations on given texts: log-probs under the learner, without generation.

validation_loss    held-out demonstrations: negative log-likelihood of the assistant's tokens
pair_accuracy      held-out pairs: how often the chosen response has the larger implicit reward;
                   equal ones count half
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from rayhf.config.evaluations import EvaluationConfig
from rayhf.config.sources import PromptSources
from rayhf.data.chat import Chat
from rayhf.data.demonstrations import encode_demonstration
from rayhf.data.examples import Encode, EncodedExample, fits, load_examples
from rayhf.data.preferences import encode_pair
from rayhf.data.readers import Row
from rayhf.evaluation.base import EvaluationContext, EvaluationSetup
from rayhf.evaluation.values import prompt_values


class GivenTextConfig(EvaluationConfig):
    """Held-out rows with given responses."""

    generates: ClassVar[bool] = False

    prompts: PromptSources
    """Held-out rows, like prompts.train of the algorithm that trains on such rows."""


class ValidationLossConfig(GivenTextConfig):
    """Held-out demonstrations."""

    type: str = "validation_loss"
    last_only: bool = False
    """Measure the last assistant turn only, as algorithm.last_only of sft."""


class ValidationLoss:
    """Negative log-likelihood of held-out demonstrations, nats per token: eval/<task>/nll."""

    Config = ValidationLossConfig
    muted_guards: frozenset[str] = frozenset()

    def __init__(self, config: ValidationLossConfig, setup: EvaluationSetup) -> None:
        self._task = setup.task

        def encode(row: Row, where: str, chat: Chat) -> Sequence[EncodedExample]:
            example = encode_demonstration(row, where, chat, last_only=config.last_only)
            return (example,) if fits(example.rows, chat, where, drop=False) else ()

        self._examples = _load(config, setup, encode)

    async def measure(self, context: EvaluationContext) -> dict[str, float]:
        """Return the mean over all tokens of the assistant."""
        rows = [example.example().rows[0] for example in self._examples]
        logps = await context.roles.learners["policy"].outputs(rows, temperature=1.0)
        losses = [
            -float((logp * row.tokens["mask"]).sum()) for row, logp in zip(rows, logps, strict=True)
        ]
        tokens = [example.rows[0].trained_tokens for example in self._examples]
        name = f"eval/{self._task}/nll"
        means = np.array(losses) / np.array(tokens)
        context.record(prompt_values(name, [row.prompt_id for row in rows], means, tokens))
        return {name: sum(losses) / sum(tokens)}


class PairAccuracyConfig(GivenTextConfig):
    """Held-out pairs."""

    type: str = "pair_accuracy"


class PairAccuracy:
    """Accuracy of the implicit reward on held-out pairs: eval/<task>/pair_accuracy, pair_margin.

    The implicit reward is the log-ratio to the reference, and the log-prob where the algorithm has
    no reference model.
    """

    Config = PairAccuracyConfig
    muted_guards: frozenset[str] = frozenset()

    def __init__(self, config: PairAccuracyConfig, setup: EvaluationSetup) -> None:
        self._task = setup.task

        def encode(row: Row, where: str, chat: Chat) -> Sequence[EncodedExample]:
            example = encode_pair(row, where, chat)
            return (example,) if example and fits(example.rows, chat, where, drop=False) else ()

        self._examples = _load(config, setup, encode)

    async def measure(self, context: EvaluationContext) -> dict[str, float]:
        """Return the share of pairs with a positive margin, and the mean margin in nats."""
        rows = [row for example in self._examples for row in example.example().rows]
        logps = await context.roles.learners["policy"].outputs(rows, temperature=1.0)
        rewards = np.array([float(logp.sum()) for logp in logps])
        if context.roles.reference is not None:
            frozen = await context.roles.reference.logprobs(rows, temperature=1.0)
            rewards -= np.array([float(logp.sum()) for logp in frozen])
        margins = rewards[0::2] - rewards[1::2]
        figures = {
            f"eval/{self._task}/pair_accuracy": (np.sign(margins) + 1) / 2,
            f"eval/{self._task}/pair_margin": margins,
        }
        for name, values in figures.items():
            context.record(prompt_values(name, [row.prompt_id for row in rows[0::2]], values))
        return {name: float(np.mean(values)) for name, values in figures.items()}


def _load(
    config: GivenTextConfig, setup: EvaluationSetup, encode: Encode
) -> tuple[EncodedExample, ...]:
    key = f"evaluations.{setup.task}.prompts"
    sources = setup.open_sources(config.prompts, key)
    return load_examples(sources, encode, setup.chat, key=key)[1]
