"""SPaR: self-play with tree-search refinement (Cheng et al. 2024, arXiv 2412.11605; ALGORITHMS.md
A4).

Two policies, the actor ("policy") and the refiner ("refiner", or the actor itself where they are
shared). For each prompt the actor answers; the refiner judges every answer by votes; one failing
answer is refined by tree search until the refiner accepts the result. The actor learns to prefer
the refinement to the answer it came from (DPO + NLL); the refiner learns from its own refinements
and from its judgements where votes disagreed (`spar_data.py`).

Everything is in the group's samples: "answer", "judgement" (parent: what it judges), "refinement"
(parent: what it refines) and, where the refined answer is a part of the refinement's text,
"refined" (that part as an answer to the prompt, in tokens). A judgement's and a refinement's
context_ids are what the refiner read; training rows take them from there, so the refiner is trained
on exactly the text it writes after.

The campaign's scorer sees the answers too, for metrics only: it decides nothing here and trains
nothing.
"""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from jinja2 import StrictUndefined, Template
from jinja2.sandbox import ImmutableSandboxedEnvironment

from rayhf.algorithms.base import (
    AlgorithmBase,
    OtherPolicy,
    Selection,
    SelectionContext,
    TrainSchedule,
)
from rayhf.algorithms.context import ExplorationContext
from rayhf.algorithms.spar_config import SPaRConfig, TurnTemplate
from rayhf.algorithms.spar_data import actor_examples, judge_accuracy, refiner_examples
from rayhf.config.algorithms import ReferenceSchedule
from rayhf.config.registry import LOSSES
from rayhf.losses.base import Loss
from rayhf.losses.sft import SFTLoss
from rayhf.search.refine import (
    Draft,
    RefineNode,
    RefineTree,
    RefineVerdict,
    refine_search,
    root_node,
)
from rayhf.types import Completion, Group, Message, Prompt, Sample, Sampling


class SPaR(AlgorithmBase):
    """SPaR: an actor answers, a refiner judges and rewrites by tree search, both learn."""

    Config = SPaRConfig

    def __init__(self, config: SPaRConfig) -> None:
        self.config = config
        self.samples = config.samples
        self.reference: ReferenceSchedule | None = config.reference
        self.policies = ("policy",) if config.refiner.shared else ("policy", "refiner")
        self._dialogue = Dialogue(config)
        self.at_test_time = config.test_time_refine
        self._losses: Mapping[str, Loss] = {
            "policy": LOSSES.build(config.loss, importance_cap=None, nll_coef=config.nll_coef),
            "refiner": SFTLoss(),
        }

    async def explore(self, prompt: Prompt, context: ExplorationContext) -> Group:
        play = _Play(self.config, self._dialogue, prompt, context)
        answers = await context.sample(self.config.samples)
        drafts = [
            Draft(text=c.text, source=play.add(Sample(completion=c, outcome=None))) for c in answers
        ]
        # Equal answers are one text, judged once; votes that disagree with themselves would only be
        # noise.
        distinct: dict[str | None, Draft] = {}
        for draft in drafts:
            distinct.setdefault(draft.text, draft)
        outcomes, verdicts = await asyncio.gather(
            context.score(answers), play.judge(list(distinct.values()))
        )
        verdict_of = dict(zip(distinct, verdicts, strict=True))
        for draft, outcome in zip(drafts, outcomes, strict=True):
            play.samples[draft.source] = replace(play.samples[draft.source], outcome=outcome)
            play.note_verdict(draft.source, verdict_of[draft.text])
        failing = [
            draft for draft in drafts if verdict_of[draft.text].no > verdict_of[draft.text].yes
        ]
        ties = sum(not verdict_of[draft.text].settled for draft in drafts)
        metrics = {"spar/failing": len(failing) / len(drafts), "spar/ties": ties / len(drafts)}
        if failing:
            root = failing[context.derive_seed("root") % len(failing)]
            known = {
                text: verdict
                for text, verdict in verdict_of.items()
                if text is not None and verdict.settled
            }
            metrics |= _search_metrics(await play.search(root, known))
        return Group(prompt=prompt, samples=tuple(play.samples), metrics=metrics | play.metrics())

    async def improve(
        self, prompt: Prompt, completion: Completion, context: ExplorationContext
    ) -> Completion:
        """Test-time refinement: the completion where the refiner does not reject it or its search
        does not pass, else the refined answer.
        """
        play = _Play(self.config, self._dialogue, prompt, context)
        draft = Draft(
            text=completion.text, source=play.add(Sample(completion=completion, outcome=None))
        )
        (verdict,) = await play.judge([draft])
        if verdict.yes >= verdict.no:
            return completion
        await play.search(draft, {completion.text: verdict})
        refined = play.samples[draft.source].stats.get("refined")
        return completion if refined is None else play.samples[int(refined)].completion

    def select(self, groups: Sequence[Group], context: SelectionContext) -> Selection:
        actor, kept = actor_examples(groups)
        refiner, learned = refiner_examples(groups, self.config.refiner_data, seed=context.seed)
        return Selection(
            examples=(*actor, *refiner), metrics={**kept, **learned, **judge_accuracy(groups)}
        )

    def loss(self, objective: str = "policy") -> Loss:
        return self._losses[objective]

    def trained_policy(self, objective: str) -> str:
        """Return the refiner for its own objective, where it is a policy of its own."""
        return objective if objective in self.policies else "policy"

    def train_schedule(self, objective: str) -> TrainSchedule:
        """Return the refiner's schedule. Raises KeyError for any other objective."""
        if objective != "refiner":
            raise KeyError(f"SPaR has no further objective {objective!r}")
        return TrainSchedule(
            epochs=self.config.refiner.epochs,
            examples_per_step=self.config.refiner.examples_per_step,
        )

    def other_policy(self, name: str) -> OtherPolicy:
        """Return the refiner's start. Raises KeyError for any other policy."""
        if name not in self.policies[1:]:
            raise KeyError(f"SPaR has no further policy {name!r}")
        return OtherPolicy(model=self.config.refiner.model, lr=self.config.refiner.lr)


class Dialogue:
    """The refiner's language: conversations for it to continue, and what its texts say."""

    def __init__(self, config: SPaRConfig) -> None:
        self._judge, self._refine = _turns(config.judge_template), _turns(config.refine_template)
        self._verdict = re.compile(config.verdict_pattern)
        self._words = {config.verdict_yes.casefold(): True, config.verdict_no.casefold(): False}
        self._refined = (
            None if config.refined_pattern is None else re.compile(config.refined_pattern)
        )

    @property
    def whole(self) -> bool:
        """Whether all of a refinement is the refined answer."""
        return self._refined is None

    def judge(self, instruction: str, response: str) -> list[Message]:
        return [
            {"role": role, "content": turn.render(instruction=instruction, response=response)}
            for role, turn in self._judge
        ]

    def refine(self, instruction: str, response: str, judgement: str) -> list[Message]:
        values = {
            "instruction": instruction,
            "response": response,
            "judgement": judgement,
            "judge_prompt": self.judge(instruction, response)[-1]["content"],
        }
        return [{"role": role, "content": turn.render(values)} for role, turn in self._refine]

    def verdict(self, judgement: Completion) -> bool | None:
        """What a judgement says at last; None where it was cut off or says neither yes nor no."""
        said = _last_group(self._verdict, judgement.text)
        return (
            None
            if said is None or judgement.finish_reason == "length"
            else self._words.get(said.casefold())
        )

    def refined(self, refinement: Completion) -> str | None:
        """The refined answer; None where the refinement was cut off, has not the form, or has
        nothing in it."""
        text = (
            refinement.text
            if self._refined is None
            else (_last_group(self._refined, refinement.text) or "").strip()
        )
        return text if text.strip() and refinement.finish_reason == "stop" else None


def _turns(conversation: Sequence[TurnTemplate]) -> list[tuple[str, Template]]:
    # A template is the user's own; sandboxed all the same, because it meets text that a model
    # wrote.
    environment = ImmutableSandboxedEnvironment(
        undefined=StrictUndefined, keep_trailing_newline=True
    )
    return [(turn.role, environment.from_string(turn.content)) for turn in conversation]


def _last_group(pattern: re.Pattern[str], text: str) -> str | None:
    """Group 1 of the last match: a text may quote the form before it uses it."""
    groups = [match[1] for match in pattern.finditer(text)]
    return groups[-1] if groups else None


def instruction_text(messages: Sequence[Message]) -> str:
    """What the actor was asked, as one text: a lone turn as it stands, several with their roles."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(
        f"{message['role'].capitalize()}: {message['content']}" for message in messages
    )


class _Play:
    """One prompt's exploration under way: asks the refiner, and records every sample in the order
    of asking."""

    def __init__(
        self, config: SPaRConfig, dialogue: Dialogue, prompt: Prompt, context: ExplorationContext
    ) -> None:
        self.samples: list[Sample] = []
        self._config, self._dialogue, self._prompt, self._context = (
            config,
            dialogue,
            prompt,
            context,
        )
        self._instruction = instruction_text(prompt.messages)
        self._refiner = "policy" if config.refiner.shared else "refiner"
        self._max_tokens = config.refiner.max_tokens or context.sampling.max_tokens
        self._votes = self._unparsable = self._too_long = 0

    def add(self, sample: Sample) -> int:
        self.samples.append(sample)
        return len(self.samples) - 1

    def note(self, index: int, **stats: float) -> None:
        self.samples[index] = replace(
            self.samples[index], stats={**self.samples[index].stats, **stats}
        )

    def note_verdict(self, index: int, verdict: RefineVerdict) -> None:
        """value: share of yes among parsable votes; critique: index of the judgement that stands
        for the majority."""
        total = verdict.yes + verdict.no + verdict.unparsable
        self.note(index, votes_yes=verdict.yes, votes_no=verdict.no, votes_total=total)
        if verdict.value is not None:
            self.note(index, value=verdict.value)
        if verdict.source is not None:
            self.note(index, critique=verdict.source)

    def metrics(self) -> dict[str, float]:
        unparsable = (
            {"spar/judge_unparsable": self._unparsable / self._votes} if self._votes else {}
        )
        return {"spar/too_long": float(self._too_long), **unparsable}

    async def judge(self, drafts: Sequence[Draft]) -> list[RefineVerdict]:
        """One round of votes on each text. What is too long to be judged gets no vote."""
        conversations = [
            self._dialogue.judge(self._instruction, draft.text or "") for draft in drafts
        ]
        written = await self._ask(
            [(messages, self._config.judge_votes) for messages in conversations],
            self._config.judge_temperature,
        )
        return [
            self._verdict(draft, *answer) for draft, answer in zip(drafts, written, strict=True)
        ]

    def _verdict(
        self, draft: Draft, context: tuple[int, ...], judgements: Sequence[Completion]
    ) -> RefineVerdict:
        said = [self._dialogue.verdict(completion) for completion in judgements]
        yes, no, unparsable = (said.count(word) for word in (True, False, None))
        self._votes, self._unparsable = self._votes + len(said), self._unparsable + unparsable
        indices = [
            self.add(
                Sample(
                    completion=completion,
                    outcome=None,
                    kind="judgement",
                    context_ids=context,
                    parent=draft.source,
                    stats={"verdict": -1.0 if word is None else float(word)},
                )
            )
            for completion, word in zip(judgements, said, strict=True)
        ]
        if yes == no:
            return RefineVerdict(yes=yes, no=no, unparsable=unparsable)
        kept = said.index(yes > no)
        self.note(indices[kept], kept=1.0)
        return RefineVerdict(
            yes=yes,
            no=no,
            unparsable=unparsable,
            critique=judgements[kept].text,
            source=indices[kept],
        )

    async def refine(self, wanted: Sequence[tuple[RefineNode, int]]) -> list[list[Draft]]:
        """n refinements of each node. What is too long to be refined gets none."""
        written = await self._ask(
            [
                (self._dialogue.refine(self._instruction, node.text, node.verdict.critique), n)
                for node, n in wanted
            ],
            self._config.refine_temperature,
        )
        return [
            [self._draft(node, context, completion) for completion in completions]
            for (node, _), (context, completions) in zip(wanted, written, strict=True)
        ]

    def _draft(self, node: RefineNode, context: tuple[int, ...], completion: Completion) -> Draft:
        text = self._dialogue.refined(completion)
        sample = Sample(
            completion=completion,
            outcome=None,
            kind="refinement",
            context_ids=context,
            parent=node.source,
            stats={} if text is not None else {"malformed": 1.0},
        )
        return Draft(text=text, source=self.add(sample))

    async def _ask(
        self, wanted: Sequence[tuple[list[Message], int]], temperature: float
    ) -> list[tuple[tuple[int, ...], tuple[Completion, ...]]]:
        """(context, completions by the refiner) for each conversation, all asked for at once."""
        sampling = Sampling(max_tokens=self._max_tokens, temperature=temperature)
        contexts = [self._context.render(messages) for messages, _ in wanted]
        fits = [i for i, context in enumerate(contexts) if self._context.room(context) > 0]
        self._too_long += len(contexts) - len(fits)
        answers = await asyncio.gather(
            *(
                self._context.sample(
                    wanted[i][1], context=contexts[i], sampling=sampling, policy=self._refiner
                )
                for i in fits
            )
        )
        completions = dict(zip(fits, answers, strict=True))
        return [(context, completions.get(i, ())) for i, context in enumerate(contexts)]

    async def search(self, root: Draft, known: Mapping[str, RefineVerdict]) -> RefineTree:
        """Refine the failing answer `root`; where that succeeds, its stat "refined" is the index of
        what the actor should have said.
        """
        text = root.text or ""
        start = root_node(text, known[text], root.source)
        tree = await refine_search(
            start,
            refine=self.refine,
            judge=self.judge,
            settings=self._config,
            known=known,
        )
        self.note(root.source, root=1.0)
        for node in tree.nodes[1:]:
            self.note_verdict(node.source, node.verdict)
            self.note(node.source, node=node.id, depth=node.depth)
        final = tree.nodes[tree.final]
        self.note(final.source, final=1.0)
        if tree.passed:
            self._keep(root.source, final)
        return tree

    def _keep(self, root: int, final: RefineNode) -> None:
        """Note what the actor should have said: the refiner's own tokens where they are all answer,
        else its part, encoded."""
        kept = final.source
        if not self._dialogue.whole and final.parent is not None:
            token_ids = self._context.encode(final.text)
            if self._context.room((*self._prompt.token_ids, *token_ids)) < 0:
                self._too_long += 1
                return
            whole = self.samples[final.source].completion
            answer = replace(
                whole, text=final.text, token_ids=token_ids, logprobs=(math.nan,) * len(token_ids)
            )
            stats = {"value": final.value}
            kept = self.add(
                Sample(
                    completion=answer,
                    outcome=None,
                    kind="refined",
                    parent=final.source,
                    stats=stats,
                )
            )
        self.note(root, refined=kept)


def _search_metrics(tree: RefineTree) -> dict[str, float]:
    """Of one search; the round's means are over the prompts that had one."""
    return {
        "spar/refined": float(tree.passed and tree.final != 0),
        "spar/nodes": float(tree.tried),
        "spar/malformed": float(tree.malformed),
        "spar/dropped": float(tree.dropped),
        "spar/value_gain": tree.nodes[tree.final].value - tree.nodes[0].value,
    }
