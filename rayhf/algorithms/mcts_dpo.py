"""MCTS-DPO: a tree of steps per prompt; the better sibling over the worse one. Xie et al. 2024
(2405.00451), ALGORITHMS.md A5.

explore   rayhf/search/mcts.py grows the tree; a step is a continuation up to a stop string, an
          answer is judged by the scorer, an unfinished step by completions to the end. The first of
          them costs no request: whoever writes a step is let go on, and what comes after the step
          values it. The tree comes back as the group's samples: one of kind "step" per node, with
          its parent, its context and what the search learned of it, then those of kind "rollout"
          that only valued a step.
select    reads nothing but those samples (`tree_from_group`), so a stored tree gives the same pairs
          again (rayhf/search/siblings.py).
loss      DPO over the tokens in which two siblings differ, with a soft label from their visits.
"""

from __future__ import annotations

import asyncio
import bisect
import math
import re
from collections.abc import Sequence
from dataclasses import replace

import jinja2
import jinja2.sandbox
import numpy as np

from rayhf.algorithms.base import AlgorithmBase, Selection, SelectionContext, tie_share
from rayhf.algorithms.context import ExplorationContext
from rayhf.algorithms.mcts_dpo_config import (
    MCTSDPOConfig,
    OutcomeConfig,
    SelfEvaluationConfig,
)
from rayhf.config.algorithms import ReferenceSchedule
from rayhf.config.registry import LOSSES
from rayhf.errors import ConfigError
from rayhf.losses.base import Loss
from rayhf.losses.pairs import PairLoss, PairLossConfig
from rayhf.search.mcts import (
    End,
    Step,
    Tree,
    TreeNode,
    grow,
    known_children,
    mean_value,
)
from rayhf.search.siblings import join, pair_rows, step_pairs
from rayhf.types import (
    Completion,
    Example,
    Group,
    Outcome,
    Prompt,
    Sample,
    Sampling,
    Scored,
    derive_seed,
)

_VERDICT = re.compile(r"\W*(yes|no)\b", re.IGNORECASE)


# --- one prompt's search ---------------------------------------------------------------------------------------------


def worth(outcome: Outcome | None, config: OutcomeConfig) -> float | None:
    """The outcome part of R; None for an answer that could not be scored, which is no wrong
    answer."""
    if not isinstance(outcome, Scored):
        return None
    if config.threshold is None:
        return outcome.value
    return config.correct if outcome.value >= config.threshold else config.wrong


def verdict(text: str) -> bool | None:
    """Whether a critic's words begin with yes or no; None for anything else."""
    match = _VERDICT.match(text)
    return None if match is None else match[1].lower() == "yes"


def critic_template(config: SelfEvaluationConfig) -> jinja2.Template:
    """Return the critic's template. Sandboxed, because it meets text that a model wrote."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined)
    return environment.from_string(config.template)


class _Exploration:
    """What the search of one prompt asks of the model and of the scorer, counted."""

    def __init__(
        self,
        config: MCTSDPOConfig,
        template: jinja2.Template | None,
        prompt: Prompt,
        context: ExplorationContext,
    ) -> None:
        self.config, self.template, self.prompt, self.context = config, template, prompt, context
        self.rollouts: dict[int, list[tuple[Completion, Outcome]]] = {}
        self.cut = self.unscored = self.mute = 0
        self.gold = self._gold_steps() if config.inject_gold else []

    async def expand(self, tree: Tree, node: TreeNode, width: int) -> list[Step]:
        """`width` sampled steps, after the reference answer's own where it is injected.

        Where steps are valued by completions, each is written together with its first one: the same
        distribution as asking for the step and then for what follows, with half the requests and
        with the context read once.
        """
        written, plain = tree.token_ids(node), self.context.sampling
        sampling = replace(plain, max_tokens=self._left(written))
        if not self.config.rollouts:
            stop = (*self.config.step_stop, *plain.stop)
            sampling = replace(
                sampling, max_tokens=min(self.config.step_tokens, sampling.max_tokens), stop=stop
            )
        completions = await self.context.sample(width, prefix=written, sampling=sampling)
        steps = [self._first_step(each, written) for each in completions]
        self.cut += sum(
            step.end is None and step.completion.finish_reason == "length" for step in steps
        )
        return [*self._gold_step(node, written, completions[0].policy_version), *steps]

    def _first_step(self, whole: Completion, written: Sequence[int]) -> Step:
        """Up to the token that completes a stop string, at most step_tokens; and what was written
        after it."""

        def stepped(count: int) -> bool:
            text = self.context.decode(whole.token_ids[:count])
            return any(stop in text for stop in self.config.step_stop)

        size = min(len(whole.token_ids), self.config.step_tokens)
        if any(stop in whole.text for stop in self.config.step_stop):
            size = 1 + bisect.bisect_left(range(1, size), True, key=stepped)
        if size == len(whole.token_ids):
            return Step(completion=whole, end=self._end(whole, written))
        text = self.context.decode(whole.token_ids[:size])
        step = replace(
            whole,
            text=text,
            token_ids=whole.token_ids[:size],
            logprobs=whole.logprobs[:size],
            finish_reason="stop" if stepped(size) else "length",
        )
        rollout = replace(
            whole,
            # Where a cut takes a character apart, neither half has it.
            text=whole.text[len(text) :]
            if whole.text.startswith(text)
            else self.context.decode(whole.token_ids[size:]),
            token_ids=whole.token_ids[size:],
            logprobs=whole.logprobs[size:],
        )
        return Step(completion=step, end=self._end(step, written), rollout=rollout)

    async def evaluate(self, tree: Tree, node: TreeNode) -> float | None:
        """R = outcome + confidence (paper, section 2.1). None, and counted, where one of the two is
        missing."""
        parts = [each.step.completion for each in tree.path(node) if each.step is not None]
        outcome, confidence = await asyncio.gather(
            self._outcome(node, parts), self._confidence(parts)
        )
        if outcome is None or confidence is None:
            self.unscored += 1
            return None
        return outcome + confidence

    async def _outcome(self, node: TreeNode, parts: list[Completion]) -> float | None:
        """Of a whole answer what the scorer says; of an unfinished one the mean over completions
        that could be scored."""
        if node.terminal:
            assert node.step is not None
            whole = join(parts, "stop" if node.step.end == "answer" else "length")
            (node.outcome,) = await self.context.score([whole])
            return worth(node.outcome, self.config.outcome)
        if not self.config.rollouts:
            return 0.0
        written = tuple(token for part in parts for token in part.token_ids)
        sampling = replace(self.context.sampling, max_tokens=self._left(written))
        ends = list(node.rollouts)
        if (missing := self.config.rollouts - len(ends)) > 0:
            ends += await self.context.sample(missing, prefix=written, sampling=sampling)
        outcomes = await self.context.score(
            [join([*parts, end], end.finish_reason) for end in ends]
        )
        self.rollouts[node.id] = list(zip(ends, outcomes, strict=True))
        values = [
            value
            for outcome in outcomes
            if (value := worth(outcome, self.config.outcome)) is not None
        ]
        return math.fsum(values) / len(values) if values else None

    async def _confidence(self, parts: list[Completion]) -> float | None:
        """The share of yes among the critic's verdicts; 0 without a critic, None where no verdict
        could be read."""
        settings = self.config.self_evaluation
        if settings is None or self.template is None:
            return 0.0
        asked = [
            message["content"] for message in self.prompt.messages if message["role"] == "user"
        ]
        names = {
            "question": asked[-1] if asked else "",
            "work": "".join(part.text for part in parts),
        }
        if settings.gold_conditioned_critic:
            if self.prompt.answer is None:
                raise ConfigError(
                    f"prompts: prompt {self.prompt.prompt_id} has no answer, which "
                    "algorithm.self_evaluation.gold_conditioned_critic needs; expected an answer with every prompt"
                )
            names["answer"] = self.prompt.answer
        context = self.context.render([{"role": "user", "content": self.template.render(names)}])
        if self.context.room(context) < 1:
            self.mute += settings.votes
            return None
        said = await self.context.sample(
            settings.votes, context=context, sampling=Sampling(max_tokens=settings.max_tokens)
        )
        verdicts = [vote for each in said if (vote := verdict(each.text)) is not None]
        self.mute += len(said) - len(verdicts)
        return settings.weight * sum(verdicts) / len(verdicts) if verdicts else None

    def _left(self, written: Sequence[int]) -> int:
        """Tokens that the answer may still grow by: of rollout.max_tokens, and of the model's
        length."""
        room = self.context.room((*self.prompt.token_ids, *written))
        return min(self.context.sampling.max_tokens - len(written), room)

    def _end(self, completion: Completion, written: Sequence[int]) -> End | None:
        """The engine says "stop" for a stop string and for the end of the context alike; only the
        first leaves its string in the text (not always at its very end: a token may go on behind
        it)."""
        text = completion.text
        stepped = any(stop in text for stop in self.config.step_stop)
        if completion.finish_reason == "stop" and (
            not stepped or any(stop in text for stop in self.context.sampling.stop)
        ):
            return "answer"
        return "limit" if self._left((*written, *completion.token_ids)) < 1 else None

    def _gold_steps(self) -> list[tuple[str, tuple[int, ...]]]:
        """Text and tokens of the reference answer's steps; none where it has no steps, or a token
        spans two of them."""
        answer = self.prompt.answer or ""
        stops = "|".join(map(re.escape, sorted(self.config.step_stop, key=len, reverse=True)))
        cuts = [match.end() for match in re.finditer(stops, answer)]
        if not cuts:
            return []
        whole, closing = self.context.encode(answer), len(self.context.encode(""))
        steps, start, done = [], 0, 0
        for cut in cuts:
            tokens = self.context.encode(answer[:cut])
            end = len(tokens) - closing
            if whole[:end] != tokens[:end] or end <= done:
                return []
            steps.append((answer[start:cut], whole[done:end]))
            start, done = cut, end
        return [*steps, (answer[start:], whole[done:])]

    def _gold_step(self, node: TreeNode, written: Sequence[int], version: int) -> list[Step]:
        """The next step of the reference answer below a node that is the reference answer so far,
        where it fits."""
        follows = node.parent is None or (node.step is not None and node.step.gold)
        if not follows or node.depth >= len(self.gold):
            return []
        text, tokens = self.gold[node.depth]
        if self._left((*written, *tokens)) < 0:
            return []
        last = node.depth == len(self.gold) - 1
        completion = Completion(
            prompt_id=self.prompt.prompt_id,
            index=0,
            seed=0,
            text=text,
            token_ids=tokens,
            logprobs=(math.nan,) * len(tokens),
            finish_reason="stop",
            policy_version=version,
        )
        end: End | None = (
            "answer" if last else "limit" if self._left((*written, *tokens)) < 1 else None
        )
        return [Step(completion=completion, end=end, gold=True)]

    def group(self, tree: Tree) -> Group:
        nodes = tree.nodes[1:]
        samples = [_node_sample(self.prompt, tree, node) for node in nodes]
        for node in nodes:
            context = (*self.prompt.token_ids, *tree.token_ids(node))
            samples += [
                Sample(
                    completion=end,
                    outcome=outcome,
                    kind="rollout",
                    context_ids=context,
                    parent=node.id - 1,
                )
                for end, outcome in self.rollouts.get(node.id, ())
            ]
        return Group(prompt=self.prompt, samples=tuple(samples), metrics=self._metrics(tree))

    def _metrics(self, tree: Tree) -> dict[str, float]:
        answers = [
            node for node in tree.nodes if node.step is not None and node.step.end == "answer"
        ]
        metrics = {
            "mcts/nodes": len(tree.nodes) - 1,
            "mcts/depth": max(node.depth for node in tree.nodes),
            "mcts/no_answer": not answers,
            "mcts/duplicates": tree.duplicates,
            "mcts/unscored": self.unscored,
            "mcts/mute_votes": self.mute,
            "mcts/cut_steps": self.cut,
            "mcts/rollouts": sum(map(len, self.rollouts.values())),
            "mcts/gold_steps": sum(node.step is not None and node.step.gold for node in tree.nodes),
        }
        threshold = self.config.outcome.threshold
        if threshold is not None:
            right = [
                n for n in answers if isinstance(n.outcome, Scored) and n.outcome.value >= threshold
            ]
            metrics["mcts/solved"] = bool(right)
            metrics["mcts/path_correct"] = any(node.chosen for node in right)
        return {name: float(value) for name, value in metrics.items()}


# --- the tree as samples, and back -----------------------------------------------------------------------------------


def _node_sample(prompt: Prompt, tree: Tree, node: TreeNode) -> Sample:
    """TreeNode i is sample i - 1: the root is the prompt and has no sample."""
    assert node.step is not None and node.parent is not None
    stats: dict[str, float] = {
        "depth": node.depth,
        "visits": node.visits,
        "q": node.q,
        "value": node.value,
        "reward": node.reward,
        "prior": node.prior,
        "terminal": node.terminal,
        "answered": node.step.end == "answer",
        "chosen": node.chosen,
        "gold": node.step.gold,
    }
    if node.estimate is not None:
        stats["estimate"] = node.estimate
    return Sample(
        completion=node.step.completion,
        outcome=node.outcome,
        kind="step",
        context_ids=(*prompt.token_ids, *tree.token_ids(tree.nodes[node.parent])),
        parent=node.parent - 1 if node.parent else None,
        stats={name: float(value) for name, value in stats.items()},
    )


def tree_from_group(group: Group) -> Tree:
    """The tree that `explore` put into a group's samples; only the count of duplicates is not in
    them.

    Raises ValueError where steps do not come first, each after its parent.
    """
    tree = Tree()
    for index, sample in enumerate(group.samples):
        if sample.kind != "step":
            continue
        if index != len(tree.nodes) - 1 or (
            sample.parent is not None and not 0 <= sample.parent < index
        ):
            raise ValueError(
                f"sample {index} of prompt {group.prompt.prompt_id} is a step out of order"
            )
        stats = sample.stats
        parent = tree.nodes[0 if sample.parent is None else sample.parent + 1]
        end: End | None = "answer" if stats["answered"] else "limit" if stats["terminal"] else None
        node = TreeNode(
            id=index + 1,
            parent=parent.id,
            step=Step(completion=sample.completion, end=end, gold=bool(stats["gold"])),
            depth=int(stats["depth"]),
            prior=stats["prior"],
            estimate=stats.get("estimate"),
            outcome=sample.outcome,
            visits=int(stats["visits"]),
            reward=stats["reward"],
            value=stats["value"],
            q=stats["q"],
            chosen=bool(stats["chosen"]),
        )
        tree.nodes.append(node)
        parent.children.append(node.id)
        parent.expanded = True
    tree.root.value = mean_value(known_children(tree, tree.root))
    return tree


# --- the algorithm ---------------------------------------------------------------------------------------------------


class MCTSDPO(AlgorithmBase):
    """MCTS-DPO: preferences between sibling steps of a Monte Carlo tree (Xie et al. 2024)."""

    Config = MCTSDPOConfig

    def __init__(self, config: MCTSDPOConfig) -> None:
        self.config = config
        self.samples = config.iterations * max(config.width) * max(1, config.rollouts)
        """Judged answers of one full search; a campaign that re-roots judges more, one with short
        answers fewer."""
        self._template = (
            critic_template(config.self_evaluation) if config.self_evaluation is not None else None
        )
        self._loss: PairLoss[PairLossConfig] = LOSSES.build(
            config.loss, importance_cap=config.importance.cap
        )
        self.reference: ReferenceSchedule | None = config.reference

    async def explore(self, prompt: Prompt, context: ExplorationContext) -> Group:
        work = _Exploration(self.config, self._template, prompt, context)
        return work.group(await grow(self.config, work.expand, work.evaluate))

    def select(self, groups: Sequence[Group], context: SelectionContext) -> Selection:
        config = self.config
        examples: list[Example] = []
        ties = unvisited = 0
        for group in groups:
            tree = tree_from_group(group)
            rng = np.random.default_rng(
                derive_seed(context.seed, group.prompt.prompt_id, "siblings")
            )
            found = step_pairs(tree, rng, config)
            ties, unvisited = ties + found.ties, unvisited + found.unvisited
            for pair in found.pairs:
                scalars = {"margin": pair.margin}
                if config.labels == "soft":
                    scalars["label_smoothing"] = pair.label_smoothing
                rows = pair_rows(group.prompt, tree, pair, merge_chains=config.merge_chains)
                examples.append(Example(rows=rows, scalars=scalars))
        metrics = {
            "pairs/kept": float(len(examples)),
            "pairs/ties": float(ties),
            "mcts/unvisited_pairs": float(unvisited),
        }
        if examples:
            metrics["pairs/margin_mean"] = float(
                np.mean([example.scalars["margin"] for example in examples])
            )
            smoothing = [example.scalars.get("label_smoothing", 0.0) for example in examples]
            metrics["mcts/label_smoothing"] = float(np.mean(smoothing))
        no_signal = tie_share(len(examples), ties)
        return Selection(examples=tuple(examples), metrics=metrics, no_signal=no_signal)

    def loss(self, objective: str = "policy") -> Loss:
        return self._loss
