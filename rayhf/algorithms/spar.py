"""SPaR: self-play with tree-search refinement (Cheng et al. 2024, arXiv 2412.11605).

Two policies, the actor ("policy") and the refiner ("refiner", or the actor itself where they are
shared). For each prompt the actor generates completions, and the refiner judges each of them by
votes. One failing completion is refined by tree search until the refiner accepts the result. The
actor is trained to prefer the refined completion to the failing one (DPO + NLL); the refiner is
trained on its own refinements and on its judgments where votes disagreed (spar_data.py).

Everything is stored in the group's samples, by kind: "answer" (a completion of the prompt),
"judgement" (parent: what it judges), "refinement" (parent: what it refines) and, where the refined
completion is a part of the refinement's text, "refined" (that part as a completion of the prompt).

The campaign's scorer scores the actor's completions too, but only for metrics.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace

from rayhf.algorithms.base import (
    AlgorithmBase,
    Selection,
    SelectionContext,
)
from rayhf.algorithms.context import ExplorationContext
from rayhf.algorithms.conversation import instruction_text
from rayhf.algorithms.second_policy import SecondPolicy
from rayhf.algorithms.spar_config import SPaRConfig
from rayhf.algorithms.spar_data import actor_examples, judge_accuracy, refiner_examples
from rayhf.algorithms.spar_dialogue import RefinerDialogue
from rayhf.algorithms.spar_exploration import PromptExploration, search_metrics
from rayhf.config.algorithms import ReferenceSchedule
from rayhf.config.registry import LOSSES
from rayhf.data.chat import Chat
from rayhf.errors import ConfigError
from rayhf.losses.base import Loss
from rayhf.losses.sft import SFTLoss
from rayhf.search.refine import Draft, RefineVerdict
from rayhf.types import Completion, Group, Prompt, Sample


class SPaR(SecondPolicy, AlgorithmBase):
    """SPaR: failing completions against their refinements by tree search (Cheng et al. 2024)."""

    Config = SPaRConfig

    def __init__(self, config: SPaRConfig) -> None:
        self.config = config
        self.samples = config.samples
        self.reference: ReferenceSchedule | None = config.reference
        self.set_role("refiner", config.refiner)
        self.at_test_time = config.test_time_refine
        self._dialogue = RefinerDialogue(config)
        self._losses: Mapping[str, Loss] = {
            "policy": LOSSES.build(config.loss, importance_cap=None, nll_coef=config.nll_coef),
            "refiner": SFTLoss(),
        }

    def check_chat(self, chat: Chat, prompt: Prompt) -> None:
        """Check that the policy's chat template renders what the refiner reads and writes.

        Raises ConfigError.
        """
        answer = "An answer."
        instruction = instruction_text(prompt.messages)
        for key, messages in (
            ("judge_template", self._dialogue.judge(instruction, answer)),
            ("refine_template", self._dialogue.refine(instruction, answer, "A judgment.")),
        ):
            try:
                chat.render(messages)
            except ConfigError as error:
                raise ConfigError(f"algorithm.{key}: {error}") from None
        if self._dialogue.whole_text_is_refined:
            return
        # A refined part is encoded as an answer of the policy, which the policy never writes so
        # where the template puts something before it.
        written = chat.text(chat.encode_generated(prompt.messages, answer))
        if written.strip() != answer:
            raise ConfigError(
                f"policy.model: the chat template renders the answer {answer!r} as {written!r}, "
                "which refined answers would be trained on; expected the answer alone: set "
                "policy.chat_template_kwargs (for example {enable_thinking: false}), or "
                "policy.chat_template"
            )

    async def explore(self, prompt: Prompt, context: ExplorationContext) -> Group:
        """Generate completions, judge them, and refine one that fails."""
        exploration = PromptExploration(self.config, self._dialogue, prompt, context)
        completions = await context.sample(self.config.samples)
        drafts = [
            Draft(text=c.text, source=exploration.add(Sample(completion=c, outcome=None)))
            for c in completions
        ]
        # Equal completions are judged once: two sets of votes on one text could contradict.
        distinct: dict[str | None, Draft] = {}
        for draft in drafts:
            distinct.setdefault(draft.text, draft)
        outcomes, verdicts = await asyncio.gather(
            context.score(completions), exploration.judge(list(distinct.values()))
        )
        verdict_of = dict(zip(distinct, verdicts, strict=True))
        for draft, outcome in zip(drafts, outcomes, strict=True):
            sample = exploration.samples[draft.source]
            exploration.samples[draft.source] = replace(sample, outcome=outcome)
            exploration.add_verdict(draft.source, verdict_of[draft.text])
        failing = [draft for draft in drafts if _fails(verdict_of[draft.text])]
        ties = sum(not verdict_of[draft.text].settled for draft in drafts)
        metrics = {"spar/failing": len(failing) / len(drafts), "spar/ties": ties / len(drafts)}
        if failing:
            root = failing[context.derive_seed("root") % len(failing)]
            known = {
                text: verdict
                for text, verdict in verdict_of.items()
                if text is not None and verdict.settled
            }
            metrics |= search_metrics(await exploration.search(root, known))
        return Group(
            prompt=prompt,
            samples=tuple(exploration.samples),
            metrics=metrics | exploration.metrics(),
        )

    async def improve(
        self, prompt: Prompt, completion: Completion, context: ExplorationContext
    ) -> Completion:
        """Return the refined completion, at test time.

        The completion itself where the refiner does not reject it or its search does not succeed.
        """
        exploration = PromptExploration(self.config, self._dialogue, prompt, context)
        source = exploration.add(Sample(completion=completion, outcome=None))
        draft = Draft(text=completion.text, source=source)
        (verdict,) = await exploration.judge([draft])
        if not _fails(verdict):
            return completion
        await exploration.search(draft, {completion.text: verdict})
        refined = exploration.samples[source].stats.get("refined")
        return completion if refined is None else exploration.samples[int(refined)].completion

    def select(self, groups: Sequence[Group], context: SelectionContext) -> Selection:
        """Make the actor's pairs and the refiner's texts."""
        actor, actor_metrics = actor_examples(groups)
        refiner, refiner_metrics = refiner_examples(
            groups, self.config.refiner_data, seed=context.seed
        )
        return Selection(
            examples=(*actor, *refiner),
            metrics={**actor_metrics, **refiner_metrics, **judge_accuracy(groups)},
        )

    def loss(self, objective: str = "policy") -> Loss:
        """Return the actor's preference loss or the refiner's cross-entropy."""
        return self._losses[objective]


def _fails(verdict: RefineVerdict) -> bool:
    return verdict.no > verdict.yes
