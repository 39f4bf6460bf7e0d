"""Self-rewarding: the policy judges its own samples (Yuan et al. 2024, arXiv 2401.10020).

For each prompt the policy generates completions and judges each of them several times; a
completion's score is the mean of the verdicts, and the best one is paired with the worst (DPO).
The campaign's scorers never make a pair. They measure the judge, and with train_judge they are the
truth that its judgments are rewarded by: judge and policy then learn together.

Everything is in the group's samples: "answer" (a completion of the prompt; outcome: the judge's
score, stat "gold": the scorers') and "judgement" (parent: the first completion with the text that
it judges; stat "verdict" where it has one). Nothing else is kept.
"""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from rayhf.algorithms.base import Selection, SelectionContext
from rayhf.algorithms.context import ExplorationContext
from rayhf.algorithms.conversation import Dialogue, instruction_text, last_group
from rayhf.algorithms.group_gradient import gradient_examples
from rayhf.algorithms.judge_quality import judge_quality
from rayhf.algorithms.online_dpo import OnlineDPO
from rayhf.algorithms.second_policy import SecondPolicy
from rayhf.algorithms.self_rewarding_config import SelfRewardingConfig
from rayhf.config.registry import LOSSES
from rayhf.data.chat import Chat
from rayhf.losses.base import Loss
from rayhf.types import (
    Completion,
    Example,
    Group,
    Invalid,
    Outcome,
    Prompt,
    Sample,
    Scored,
    TokenArray,
    token_array,
)


class SelfRewarding(SecondPolicy, OnlineDPO):
    """Self-rewarding: the policy judges its own samples (Yuan et al. 2024)."""

    Config = SelfRewardingConfig
    config: SelfRewardingConfig

    def __init__(self, config: SelfRewardingConfig) -> None:
        super().__init__(config)
        self.samples = config.samples * (1 + config.judgments)
        self.set_role("judge", config.judge)
        self._dialogue = Dialogue(config.judge_template, "algorithm.judge_template")
        self._pattern = re.compile(config.verdict_pattern)
        words = config.verdicts or {}
        self._words = {word.casefold(): score for word, score in words.items()}
        self._judge_loss: Loss = LOSSES.build(config.judge_loss)

    def check_chat(self, chat: Chat, prompt: Prompt) -> None:
        """Check that the policy's chat template renders the judge's prompt. Raises ConfigError."""
        instruction = instruction_text(prompt.messages)
        self._dialogue.check(chat, {"instruction": instruction, "response": "An answer."})

    async def explore(self, prompt: Prompt, context: ExplorationContext) -> Group:
        """Generate completions and let the policy judge them."""
        completions = await context.sample(self.config.samples)
        # Equal completions are judged once: two scores of one text could contradict.
        first: dict[str, int] = {}
        for index, completion in enumerate(completions):
            first.setdefault(completion.text, index)
        gold, judged = await asyncio.gather(
            context.score(completions), self._judge(prompt, list(first), context)
        )
        samples = [
            Sample(
                completion=completion,
                outcome=self._score(judged[completion.text][1]),
                stats={"gold": given.value} if isinstance(given, Scored) else {},
            )
            for completion, given in zip(completions, gold, strict=True)
        ]
        for text, (judge_ids, judgments) in judged.items():
            for judgment in judgments:
                verdict = self.verdict(judgment)
                samples.append(
                    Sample(
                        completion=judgment,
                        outcome=None,
                        kind="judgement",
                        context_ids=judge_ids,
                        parent=first[text],
                        stats={} if verdict is None else {"verdict": verdict},
                    )
                )
        too_long = sum(not judgments for _, judgments in judged.values())
        return Group(
            prompt=prompt,
            samples=tuple(samples),
            metrics={"self_rewarding/too_long": float(too_long)},
        )

    async def _judge(
        self, prompt: Prompt, texts: Sequence[str], context: ExplorationContext
    ) -> dict[str, tuple[TokenArray, tuple[Completion, ...]]]:
        """Return each text's judge prompt and judgments; none where the prompt is too long."""
        instruction = instruction_text(prompt.messages)
        sampling = replace(
            context.sampling,
            max_tokens=self.config.judge.max_tokens or context.sampling.max_tokens,
            temperature=self.config.judge_temperature or context.sampling.temperature,
        )
        judge_ids = {
            text: token_array(
                context.render(
                    self._dialogue.render({"instruction": instruction, "response": text})
                )
            )
            for text in texts
        }
        fitting = [text for text in texts if context.room(judge_ids[text]) > 0]
        judgments = await asyncio.gather(
            *(
                context.sample(
                    self.config.judgments,
                    context=judge_ids[text],
                    sampling=sampling,
                    policy=self.role_policy,
                )
                for text in fitting
            )
        )
        judged = dict(zip(fitting, judgments, strict=True))
        return {text: (judge_ids[text], judged.get(text, ())) for text in texts}

    def verdict(self, judgment: Completion) -> float | None:
        """Return a judgment's last verdict; None where it is truncated or has none."""
        found = last_group(self._pattern, judgment.text)
        if found is None or judgment.finish_reason == "length":
            return None
        if self.config.verdicts is not None:
            return self._words.get(found.casefold())
        try:
            verdict = float(found)
        except ValueError:
            return None
        return verdict if math.isfinite(verdict) else None

    def _score(self, judgments: Sequence[Completion]) -> Outcome:
        """Return the mean verdict of a completion's judgments."""
        verdicts = [v for judgment in judgments if (v := self.verdict(judgment)) is not None]
        if not verdicts:
            return Invalid(reason=f"none of its {len(judgments)} judgments has a verdict")
        return Scored(value=float(np.mean(verdicts)))

    def select(self, groups: Sequence[Group], context: SelectionContext) -> Selection:
        """Pair each prompt's best and worst completion; with train_judge add the judgments."""
        selection = super().select(groups, context)
        judgments = (
            [example for group in groups for example in self._judge_examples(group)]
            if self.config.train_judge
            else []
        )
        quality = judge_quality(
            groups,
            [pair for pair in selection.examples if math.isfinite(pair.scalars["margin"])],
            pass_verdict=self.config.pass_verdict,
            pass_score=self.config.pass_score,
        )
        return replace(
            selection,
            examples=(*selection.examples, *judgments),
            metrics={**selection.metrics, **quality},
        )

    def _judge_examples(self, group: Group) -> list[Example]:
        """Return examples of the judgments of each completion whose truth is known."""
        rewards: dict[int, dict[int, float]] = {}
        for index, sample in enumerate(group.samples):
            if sample.parent is None or "gold" not in group.samples[sample.parent].stats:
                continue
            good = group.samples[sample.parent].stats["gold"] >= self.config.pass_score
            verdict = sample.stats.get("verdict")
            agrees = verdict is not None and (verdict >= self.config.pass_verdict) == good
            rewards.setdefault(sample.parent, {})[index] = float(agrees)
        return [
            example
            for own in rewards.values()
            for example in gradient_examples(group, own, objective="judge")
        ]

    def loss(self, objective: str = "policy") -> Loss:
        """Return the preference loss, or the judge's policy-gradient loss."""
        return self._judge_loss if objective == "judge" else super().loss()
