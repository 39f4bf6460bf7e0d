"""The Monte Carlo tree search of MCTS-DPO for one prompt.

rayhf/search/mcts.py grows the tree and calls, for each node,

expand      samples its steps. A step is a continuation up to a stop string. With `rollouts`,
            generation goes on after the step to the end of the completion, and that text is the
            step's first rollout: one request gives both.
evaluate    R = outcome + confidence (Xie et al. 2024, section 2.1). The outcome of a finished
            completion is its score, that of an unfinished one the mean score of its rollouts. The
            confidence is the policy's judgment of its own steps, where self-evaluation is on.

Synchronization: outcome and confidence of a node are requested concurrently.
"""

from __future__ import annotations

import asyncio
import bisect
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from rayhf.algorithms.context import ExplorationContext
from rayhf.algorithms.conversation import instruction_text
from rayhf.algorithms.mcts_dpo_config import OutcomeConfig, SelfEvaluationConfig, TreeSearchConfig
from rayhf.algorithms.mcts_samples import tree_samples
from rayhf.data.jinja_sandbox import SandboxedTemplate
from rayhf.errors import ConfigError
from rayhf.search.mcts import End, Step, Tree, TreeNode
from rayhf.search.siblings import join
from rayhf.types import Completion, Group, Outcome, Prompt, Sampling, Scored, token_array

_VERDICT = re.compile(r"\W*(yes|no)\b", re.IGNORECASE)


def outcome_value(outcome: Outcome | None, config: OutcomeConfig) -> float | None:
    """Return the outcome part of R; None for a completion that could not be scored.

    Such a completion is not a wrong one.
    """
    if not isinstance(outcome, Scored):
        return None
    if config.threshold is None:
        return outcome.value
    return config.correct if outcome.value >= config.threshold else config.wrong


def parse_verdict(text: str) -> bool | None:
    """Return whether a critic's text begins with yes or no; None for anything else."""
    match = _VERDICT.match(text)
    return None if match is None else match[1].lower() == "yes"


def critic_template(config: SelfEvaluationConfig) -> SandboxedTemplate:
    """Return the critic's template, sandboxed because it renders generated text."""
    return SandboxedTemplate(config.template, key="algorithm.self_evaluation.template")


class PromptSearch:
    """Model and scorer calls of one prompt's search, with counts for the metrics."""

    def __init__(
        self,
        config: TreeSearchConfig,
        template: SandboxedTemplate | None,
        prompt: Prompt,
        context: ExplorationContext,
    ) -> None:
        self.config = config
        self.template = template
        self.prompt = prompt
        self.context = context
        self.rollouts: dict[int, list[tuple[Completion, Outcome]]] = {}
        """Scored rollouts by node id."""
        self.cut_steps = 0
        self.unscored = 0
        self.unparsable_votes = 0
        self.gold = self._gold_steps() if config.inject_gold else []
        """Text and tokens of the reference answer's steps."""

    async def expand(self, tree: Tree, node: TreeNode, width: int) -> list[Step]:
        """Return `width` sampled steps, after the reference answer's step where it is injected.

        Where steps have rollouts, each step is sampled together with its first one. That has the
        same distribution as sampling the step and then its rollout, with half the requests.
        """
        written = tree.token_ids(node)
        sampling = replace(self.context.sampling, max_tokens=self._remaining(written))
        if not self.config.rollouts:
            sampling = replace(
                sampling,
                max_tokens=min(self.config.step_tokens, sampling.max_tokens),
                stop=(*self.config.step_stop, *sampling.stop),
            )
        completions = await self.context.sample(width, prefix=written, sampling=sampling)
        steps = [self._first_step(completion, written) for completion in completions]
        self.cut_steps += sum(
            step.end is None and step.completion.finish_reason == "length" for step in steps
        )
        return [*self._gold_step(node, written, completions[0].policy_version), *steps]

    def _first_step(self, whole: Completion, written: Sequence[int]) -> Step:
        """Return the first step of a completion; the text after it is the step's rollout.

        The step ends with the token that completes a stop string, at most after step_tokens.
        """

        def stopped(count: int) -> bool:
            return self._has_step_stop(self.context.decode(whole.token_ids[:count]))

        size = min(len(whole.token_ids), self.config.step_tokens)
        if self._has_step_stop(whole.text):
            size = 1 + bisect.bisect_left(range(1, size), True, key=stopped)
        if size == len(whole.token_ids):
            return Step(completion=whole, end=self._end(whole, written))
        text = self.context.decode(whole.token_ids[:size])
        if whole.text.startswith(text):
            rest = whole.text[len(text) :]
        else:
            # The cut splits a character: it is missing from both texts.
            rest = self.context.decode(whole.token_ids[size:])
        step = replace(
            whole.part(0, size), text=text, finish_reason="stop" if stopped(size) else "length"
        )
        rollout = replace(whole.part(size), text=rest)
        return Step(completion=step, end=self._end(step, written), rollout=rollout)

    async def evaluate(self, tree: Tree, node: TreeNode) -> float | None:
        """Return R = outcome + confidence; None, which is counted, where either is missing."""
        steps = [each.step.completion for each in tree.path(node) if each.step is not None]
        outcome, confidence = await asyncio.gather(
            self._outcome(node, steps), self._confidence(steps)
        )
        if outcome is None or confidence is None:
            self.unscored += 1
            return None
        return outcome + confidence

    async def _outcome(self, node: TreeNode, steps: list[Completion]) -> float | None:
        """Return the outcome of a finished completion, or the mean over its rollouts.

        Rollouts that could not be scored do not count; None where no score is left.
        """
        if node.terminal:
            assert node.step is not None
            whole = self._whole(steps, "stop" if node.step.end == "answer" else "length")
            (node.outcome,) = await self.context.score([whole])
            return outcome_value(node.outcome, self.config.outcome)
        if not self.config.rollouts:
            return 0.0
        rollouts = list(node.rollouts)
        missing = self.config.rollouts - len(rollouts)
        if missing > 0:
            rollouts += await self._more_rollouts(missing, steps)
        outcomes = await self.context.score(
            [self._whole([*steps, rollout], rollout.finish_reason) for rollout in rollouts]
        )
        self.rollouts[node.id] = list(zip(rollouts, outcomes, strict=True))
        optional = [outcome_value(outcome, self.config.outcome) for outcome in outcomes]
        values = [value for value in optional if value is not None]
        return math.fsum(values) / len(values) if values else None

    async def _more_rollouts(self, n: int, steps: Sequence[Completion]) -> Sequence[Completion]:
        """Complete the steps n times."""
        written = tuple(token for step in steps for token in step.token_ids.tolist())
        sampling = replace(self.context.sampling, max_tokens=self._remaining(written))
        return await self.context.sample(n, prefix=written, sampling=sampling)

    def _whole(
        self, steps: Sequence[Completion], finish_reason: Literal["stop", "length"]
    ) -> Completion:
        """Return consecutive parts of a completion as one, its text decoded from all tokens."""
        whole = join(steps, finish_reason)
        return replace(whole, text=self.context.decode(whole.token_ids))

    async def _confidence(self, steps: list[Completion]) -> float | None:
        """Return the weighted share of yes among the critic's verdicts.

        0 without a critic, None where no verdict could be parsed.
        """
        critic = self.config.self_evaluation
        if critic is None or self.template is None:
            return 0.0
        content = self.template.render(self._critic_variables(critic, steps))
        context = self.context.render([{"role": "user", "content": content}])
        if self.context.room(context) < 1:
            self.unparsable_votes += critic.votes
            return None
        votes = await self.context.sample(
            critic.votes, context=context, sampling=Sampling(max_tokens=critic.max_tokens)
        )
        optional = [parse_verdict(vote.text) for vote in votes]
        verdicts = [verdict for verdict in optional if verdict is not None]
        self.unparsable_votes += len(votes) - len(verdicts)
        return critic.weight * sum(verdicts) / len(verdicts) if verdicts else None

    def _critic_variables(
        self, critic: SelfEvaluationConfig, steps: list[Completion]
    ) -> dict[str, str]:
        """Return the variables of the critic's template."""
        variables = {
            "question": instruction_text(self.prompt.messages),
            "work": self._whole(steps, "stop").text if steps else "",
        }
        if critic.gold_conditioned_critic:
            if self.prompt.reference_answer is None:
                raise ConfigError(
                    f"prompts: prompt {self.prompt.prompt_id} has no reference answer, which "
                    "algorithm.self_evaluation.gold_conditioned_critic needs; "
                    "expected an answer with every prompt"
                )
            variables["answer"] = self.prompt.reference_answer
        return variables

    def _has_step_stop(self, text: str) -> bool:
        return any(stop in text for stop in self.config.step_stop)

    def _remaining(self, written: Sequence[int]) -> int:
        """Return how many tokens fit after `written`: into rollout.max_tokens and the model."""
        room = self.context.room((*self.prompt.token_ids, *written))
        return min(self.context.sampling.max_tokens - len(written), room)

    def _end(self, completion: Completion, written: Sequence[int]) -> End | None:
        """Return why a completion ends here; None where another step follows.

        The engine says "stop" for a stop string and for the end of the turn alike. Only a stop
        string is in the text, not always at its very end: its last token may contain more.
        """
        text = completion.text
        own_stop = any(stop in text for stop in self.context.sampling.stop)
        if completion.finish_reason == "stop" and (own_stop or not self._has_step_stop(text)):
            return "answer"
        return "limit" if self._remaining((*written, *completion.token_ids)) < 1 else None

    def _gold_steps(self) -> list[tuple[str, tuple[int, ...]]]:
        """Return text and tokens of each step of the reference answer.

        Empty where it has no steps, or where a token spans two of them.
        """
        answer = self.prompt.reference_answer or ""
        stops = "|".join(map(re.escape, sorted(self.config.step_stop, key=len, reverse=True)))
        cuts = [match.end() for match in re.finditer(stops, answer)]
        if not cuts:
            return []
        whole = self.context.encode(answer)
        closing = len(self.context.encode(""))
        steps: list[tuple[str, tuple[int, ...]]] = []
        text_start = 0
        token_start = 0
        for cut in cuts:
            tokens = self.context.encode(answer[:cut])
            token_end = len(tokens) - closing
            if whole[:token_end] != tokens[:token_end] or token_end <= token_start:
                return []
            steps.append((answer[text_start:cut], whole[token_start:token_end]))
            text_start = cut
            token_start = token_end
        return [*steps, (answer[text_start:], whole[token_start:])]

    def _gold_step(self, node: TreeNode, written: Sequence[int], version: int) -> list[Step]:
        """Return the reference answer's next step below `node`.

        Empty where the path to the node is not the beginning of the reference answer, or where the
        step does not fit.
        """
        follows = node.parent is None or (node.step is not None and node.step.gold)
        if not follows or node.depth >= len(self.gold):
            return []
        text, tokens = self.gold[node.depth]
        remaining = self._remaining((*written, *tokens))
        if remaining < 0:
            return []
        completion = Completion(
            prompt_id=self.prompt.prompt_id,
            index=0,
            seed=0,
            text=text,
            token_ids=token_array(tokens),
            logprobs=np.full(len(tokens), np.nan, dtype=np.float32),
            finish_reason="stop",
            policy_version=version,
        )
        end: End | None = "limit" if remaining < 1 else None
        if node.depth == len(self.gold) - 1:
            end = "answer"
        return [Step(completion=completion, end=end, gold=True)]

    def group(self, tree: Tree) -> Group:
        """Return the tree as the prompt's group, with its metrics."""
        return Group(
            prompt=self.prompt,
            samples=tree_samples(self.prompt, tree, self.rollouts),
            metrics=self._metrics(tree),
        )

    def _metrics(self, tree: Tree) -> dict[str, float]:
        steps = [(node, node.step) for node in tree.nodes if node.step is not None]
        finished = [node for node, step in steps if step.end == "answer"]
        metrics = {
            "mcts/nodes": len(tree.nodes) - 1,
            "mcts/depth": max(node.depth for node in tree.nodes),
            "mcts/no_answer": not finished,
            "mcts/duplicates": tree.duplicates,
            "mcts/unscored": self.unscored,
            "mcts/mute_votes": self.unparsable_votes,
            "mcts/cut_steps": self.cut_steps,
            "mcts/rollouts": sum(map(len, self.rollouts.values())),
            "mcts/gold_steps": sum(step.gold for _, step in steps),
        }
        threshold = self.config.outcome.threshold
        if threshold is not None:
            correct = [
                node
                for node in finished
                if isinstance(node.outcome, Scored) and node.outcome.value >= threshold
            ]
            metrics["mcts/solved"] = bool(correct)
            metrics["mcts/path_correct"] = any(node.chosen for node in correct)
        return {name: float(value) for name, value in metrics.items()}
