"""Exploration of one prompt in SPaR: requests to the refiner, and a record of every sample.

Samples are recorded in the order in which they were requested. A judgment's and a refinement's
context_ids are the conversation that the refiner continued; training rows take them from there, so
that the refiner is trained on exactly the text that it continued.

Synchronization: all requests of one call are made concurrently and awaited together.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from rayhf.algorithms.context import ExplorationContext
from rayhf.algorithms.conversation import instruction_text
from rayhf.algorithms.spar_config import SPaRConfig
from rayhf.algorithms.spar_dialogue import RefinerDialogue
from rayhf.search.refine import (
    Draft,
    RefineNode,
    RefineTree,
    RefineVerdict,
    refine_search,
    root_node,
)
from rayhf.types import Completion, Message, Prompt, Sample, Sampling, token_array


class PromptExploration:
    """Judgments and refinements of one prompt's completions, recorded as samples."""

    def __init__(
        self,
        config: SPaRConfig,
        dialogue: RefinerDialogue,
        prompt: Prompt,
        context: ExplorationContext,
    ) -> None:
        self.samples: list[Sample] = []
        self._config = config
        self._dialogue = dialogue
        self._prompt = prompt
        self._context = context
        self._instruction = instruction_text(prompt.messages)
        self._refiner = "policy" if config.refiner.shared else "refiner"
        self._max_tokens = config.refiner.max_tokens or context.sampling.max_tokens
        self._votes = 0
        self._unparsable = 0
        self._too_long = 0

    def add(self, sample: Sample) -> int:
        """Record a sample and return its index."""
        self.samples.append(sample)
        return len(self.samples) - 1

    def add_stats(self, index: int, **stats: float) -> None:
        """Add statistics to a recorded sample."""
        sample = self.samples[index]
        self.samples[index] = replace(sample, stats={**sample.stats, **stats})

    def add_verdict(self, index: int, verdict: RefineVerdict) -> None:
        """Add a verdict's statistics to the sample that it is about.

        value: share of yes among parsable votes; critique: index of the judgment that represents
        the majority.
        """
        total = verdict.yes + verdict.no + verdict.unparsable
        self.add_stats(index, votes_yes=verdict.yes, votes_no=verdict.no, votes_total=total)
        if verdict.value is not None:
            self.add_stats(index, value=verdict.value)
        if verdict.source is not None:
            self.add_stats(index, critique=verdict.source)

    def metrics(self) -> dict[str, float]:
        """Return the metrics of this exploration."""
        metrics = {"spar/too_long": float(self._too_long)}
        if self._votes:
            metrics["spar/judge_unparsable"] = self._unparsable / self._votes
        return metrics

    async def judge(self, drafts: Sequence[Draft]) -> list[RefineVerdict]:
        """Return a verdict on each text; one that is too long to be judged gets no votes."""
        votes = self._config.judge_votes
        generated = await self._generate(
            [
                (self._dialogue.judge(self._instruction, draft.text or ""), votes)
                for draft in drafts
            ],
            self._config.judge_temperature,
        )
        return [
            self._verdict(draft, context, judgments)
            for draft, (context, judgments) in zip(drafts, generated, strict=True)
        ]

    def _verdict(
        self, draft: Draft, context: tuple[int, ...], judgments: Sequence[Completion]
    ) -> RefineVerdict:
        votes = [self._dialogue.verdict(judgment) for judgment in judgments]
        yes = votes.count(True)
        no = votes.count(False)
        unparsable = votes.count(None)
        self._votes += len(votes)
        self._unparsable += unparsable
        indices = [
            self.add(
                Sample(
                    completion=judgment,
                    outcome=None,
                    kind="judgement",
                    context_ids=token_array(context),
                    parent=draft.source,
                    stats={"verdict": -1.0 if vote is None else float(vote)},
                )
            )
            for judgment, vote in zip(judgments, votes, strict=True)
        ]
        if yes == no:
            return RefineVerdict(yes=yes, no=no, unparsable=unparsable)
        first = votes.index(yes > no)
        self.add_stats(indices[first], kept=1.0)
        return RefineVerdict(
            yes=yes,
            no=no,
            unparsable=unparsable,
            critique=judgments[first].text,
            source=indices[first],
        )

    async def refine(self, requests: Sequence[tuple[RefineNode, int]]) -> list[list[Draft]]:
        """Return n refinements of each node; one that is too long to be refined gets none."""
        generated = await self._generate(
            [
                (self._dialogue.refine(self._instruction, node.text, node.verdict.critique), n)
                for node, n in requests
            ],
            self._config.refine_temperature,
        )
        return [
            [self._draft(node, context, refinement) for refinement in refinements]
            for (node, _), (context, refinements) in zip(requests, generated, strict=True)
        ]

    def _draft(self, node: RefineNode, context: tuple[int, ...], refinement: Completion) -> Draft:
        text = self._dialogue.refined(refinement)
        sample = Sample(
            completion=refinement,
            outcome=None,
            kind="refinement",
            context_ids=token_array(context),
            parent=node.source,
            stats={} if text is not None else {"malformed": 1.0},
        )
        return Draft(text=text, source=self.add(sample))

    async def _generate(
        self, requests: Sequence[tuple[list[Message], int]], temperature: float
    ) -> list[tuple[tuple[int, ...], tuple[Completion, ...]]]:
        """Return (context, n completions by the refiner) of each (conversation, n)."""
        sampling = Sampling(max_tokens=self._max_tokens, temperature=temperature)
        contexts = [self._context.render(messages) for messages, _ in requests]
        fitting = [i for i, context in enumerate(contexts) if self._context.room(context) > 0]
        self._too_long += len(contexts) - len(fitting)
        generated = await asyncio.gather(
            *(
                self._context.sample(
                    requests[i][1], context=contexts[i], sampling=sampling, policy=self._refiner
                )
                for i in fitting
            )
        )
        completions = dict(zip(fitting, generated, strict=True))
        return [(context, completions.get(i, ())) for i, context in enumerate(contexts)]

    async def search(self, root: Draft, known: Mapping[str, RefineVerdict]) -> RefineTree:
        """Refine the failing completion `root` by tree search.

        Where that succeeds, its stat "refined" is the index of the refined completion.
        """
        text = root.text or ""
        tree = await refine_search(
            root_node(text, known[text], root.source),
            refine=self.refine,
            judge=self.judge,
            settings=self._config,
            known=known,
        )
        self.add_stats(root.source, root=1.0)
        for node in tree.nodes[1:]:
            self.add_verdict(node.source, node.verdict)
            self.add_stats(node.source, node=node.id, depth=node.depth)
        final = tree.nodes[tree.final]
        self.add_stats(final.source, final=1.0)
        if tree.passed:
            self._add_refined(root.source, final)
        return tree

    def _add_refined(self, root: int, final: RefineNode) -> None:
        """Record the refined completion of `root`.

        It is the refiner's own sample where the whole text is the refined completion; otherwise the
        part of it is encoded as a sample of its own.
        """
        refined = final.source
        if not self._dialogue.whole_text_is_refined and final.parent is not None:
            token_ids = self._context.encode(final.text)
            if self._context.room((*self._prompt.token_ids, *token_ids)) < 0:
                self._too_long += 1
                return
            completion = replace(
                self.samples[final.source].completion,
                text=final.text,
                token_ids=token_array(token_ids),
                logprobs=np.full(len(token_ids), np.nan, dtype=np.float32),
            )
            refined = self.add(
                Sample(
                    completion=completion,
                    outcome=None,
                    kind="refined",
                    parent=final.source,
                    stats={"value": final.value},
                )
            )
        self.add_stats(root, refined=refined)


def search_metrics(tree: RefineTree) -> dict[str, float]:
    """Return the metrics of one search; their means are over the prompts that had one."""
    return {
        "spar/refined": float(tree.passed and tree.final != 0),
        "spar/nodes": float(tree.tried),
        "spar/malformed": float(tree.malformed),
        "spar/dropped": float(tree.dropped),
        "spar/value_gain": tree.nodes[tree.final].value - tree.nodes[0].value,
    }
