"""DNO: contrastive learning on pairs whose win rates differ by a margin, in large iterations.

Rosset et al. 2024 (2404.03715), the practical variant DNO-Prct: iterative DPO on a preference
oracle. A prompt's completions, and a teacher's answer where the prompts have one, are compared with
each other; P(y wins) estimates the win rate against the current policy, which is DNO's reward; all
pairs whose win rates differ by more than `min_margin` are trained on, with the policy before the
iteration as the reference, and with pairs of earlier iterations.

What differs from the paper: its judge gives six points per answer, and its margins are in those
points; a teacher's answer may be rejected here, where it loses by the margin.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, NonNegativeFloat

from rayhf.algorithms.base import compare_all
from rayhf.algorithms.context import ExplorationContext
from rayhf.algorithms.iterative_dpo import IterativeDPO, IterativeDPOConfig
from rayhf.config.schema import CampaignConfig
from rayhf.errors import ConfigError
from rayhf.types import Completion, Group, Prompt, quoted, token_array

Share = Annotated[float, Field(ge=0, le=1)]


class DNOConfig(IterativeDPOConfig):
    """Direct Nash optimization (Rosset et al. 2024, DNO-Prct); the reference is the policy before.

    Iterations are `run.iterations` (3 there), each with prompts of its own.
    """

    type: str = "dno"
    samples: Annotated[int, Field(ge=2)] = 5
    """Completions per prompt, each compared with every other."""
    pairs: Literal["best_worst", "best_random", "best_second", "all_pairs"] = "all_pairs"
    """Pairing rule, over win rates."""
    min_margin: NonNegativeFloat = 0.3
    """Difference of win rates up to which a pair is a tie (ours; the paper asks for two of six
    points)."""
    teacher: str | None = None
    """Column of prompts.train with a teacher's answer, which is compared with the policy's own."""
    earlier: tuple[Share, ...] = (0.3, 0.15)
    """Pairs of iterations t-1, t-2, ... to mix in, as shares of this iteration's pairs."""

    def check_prompts(self, campaign: CampaignConfig, prompts: Sequence[Prompt]) -> None:
        """Refuse prompts without a teacher's answer where one is named. Raises ConfigError."""
        super().check_prompts(campaign, prompts)
        lacking = [prompt for prompt in prompts if teacher_answer(prompt, self.teacher) == ""]
        if lacking:
            raise ConfigError(
                f"algorithm.teacher: {len(lacking)} of {len(prompts)} rows of prompts.train have "
                f"no text in the column {self.teacher!r}, first {quoted(lacking[0])}; expected one "
                f"of its columns: {', '.join(lacking[0].row) or 'none'}"
            )


class DNO(IterativeDPO):
    """DNO: iterative DPO on pairs whose win rates differ by a margin (Rosset et al. 2024)."""

    Config = DNOConfig

    def __init__(self, config: DNOConfig) -> None:
        super().__init__(config)
        self.teacher = config.teacher

    async def explore(self, prompt: Prompt, context: ExplorationContext) -> Group:
        """Draw `samples` completions; compare them and the teacher's answer with each other."""
        completions = await context.sample(self.samples)
        answers = [("answer", completion) for completion in completions]
        text = teacher_answer(prompt, self.teacher)
        too_long = False
        if text:
            token_ids = context.encode(text)
            too_long = context.room((*prompt.token_ids, *token_ids)) < 0
            if not too_long:
                answers.append(("teacher", _given(completions[0], text, token_ids)))
        group = await compare_all(prompt, context, answers)
        if self.teacher is None:
            return group
        return replace(group, metrics={**group.metrics, "dno/too_long": float(too_long)})


def teacher_answer(prompt: Prompt, column: str | None) -> str | None:
    """Return the text in a column of the prompt's row, "" where it has none; None without one."""
    if column is None:
        return None
    text = prompt.row.get(column)
    return text if isinstance(text, str) else ""


def _given(sampled: Completion, text: str, token_ids: tuple[int, ...]) -> Completion:
    """Return a completion that was given, not sampled: its log-probs are unknown (NaN)."""
    return replace(
        sampled,
        text=text,
        token_ids=token_array(token_ids),
        logprobs=np.full(len(token_ids), np.nan, dtype=np.float32),
        finish_reason="stop",
        thinking=None,
        thinking_tokens=0,
        token_versions=None,
    )
