"""Held-out evaluation by scorers: one completion per prompt at temperature 1 and one greedy.

Used for prompts.heldout (`evaluate`) and for further evaluations of type scored.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import ClassVar

import numpy as np

from rayhf.config.base import Name
from rayhf.config.evaluations import EvaluationConfig
from rayhf.config.scorers import ScorerEntries, ScorerEntryConfig
from rayhf.config.sources import PromptSources
from rayhf.data.thinking import thinking_metrics
from rayhf.errors import ScorerError
from rayhf.evaluation.base import EvaluationContext, EvaluationSetup
from rayhf.evaluation.values import PromptValues, prompt_values
from rayhf.roles import Reference, Rollout, Scorer
from rayhf.types import (
    Completion,
    GenerateRequest,
    Group,
    Outcome,
    Prompt,
    Sample,
    Sampling,
    Scored,
    ScoreRequest,
    derive_seed,
    make_row,
)


class ScoredEvaluationConfig(EvaluationConfig):
    """Further held-out prompts and their scorers."""

    plays_episodes: ClassVar[bool] = True

    type: str = "scored"
    prompts: PromptSources
    """Evaluation prompts, like prompts.train."""
    scorer: ScorerEntries
    """Scorers of the completions; the metric is the weighted sum of their scores."""
    policy: Name = "policy"
    """Policy to evaluate, for algorithms that train several; otherwise the only one."""

    @property
    def scorers(self) -> tuple[ScorerEntryConfig, ...]:
        """Its own scorers, for which the launcher starts another scorer actor."""
        return self.scorer


class ScoredEvaluation:
    """Mean score on held-out prompts: eval/<task>/sampled, greedy, length, truncated."""

    Config = ScoredEvaluationConfig
    muted_guards: frozenset[str] = frozenset()

    def __init__(self, config: ScoredEvaluationConfig, setup: EvaluationSetup) -> None:
        self._config = config
        self._task = setup.task
        self._prompts = setup.load_prompts(config.prompts, f"evaluations.{setup.task}.prompts")

    async def measure(self, context: EvaluationContext) -> dict[str, float]:
        """Return `evaluate`'s metrics under the task's name."""
        # Where one model is trained for all objectives, it is evaluated in place of each policy.
        policy = self._config.policy if self._config.policy in context.versions else "policy"
        assert context.scorer is not None  # its config names scorers
        return await evaluate(
            self._prompts,
            complete=partial(context.complete, policy=policy),
            scorer=context.scorer,
            reward=None,
            reference=None,
            sampling=context.sampling,
            task=self._task,
            record=context.record,
        )


async def evaluate(
    prompts: Sequence[Prompt],
    *,
    complete: Callable[[Sequence[Prompt], Sampling], Awaitable[list[Completion]]],
    scorer: Scorer,
    reward: Scorer | None,
    reference: Reference | None,
    sampling: Sampling,
    task: str,
    record: Callable[[PromptValues], None],
    improve: Callable[[Sequence[Completion]], Awaitable[list[Completion]]] | None = None,
    record_answers: Callable[[Sequence[Group]], None] | None = None,
) -> dict[str, float]:
    """Return the metrics of one held-out task.

    eval/<task>/{sampled,greedy} from `scorer`; eval/<task>/reward from the training scorer where it
    is another one; of the samples eval/<task>/unscored, the share without a score, which the means
    leave out, eval/<task>/length in tokens, eval/<task>/truncated as a share, and
    eval/<task>/reference_kl in nats per response; eval/<task>/refined is the score of the
    samples after `improve`; of a thinking model the metrics of thinking_metrics. Where the prompts
    are of several sources, the same for each source: eval/<task>/<source>/... `record` gets the
    figures by prompt, `record_answers` a group per prompt, with samples of the kinds sampled,
    greedy and refined.

    Prompts and seeds are the same every time, so that evaluations differ by the policy only. Raises
    ScorerError when no held-out completion could be scored.
    """
    plain = replace(sampling, temperature=1.0, top_p=1.0, top_k=0)
    sampled = await complete(prompts, plain)
    greedy = await complete(prompts, replace(plain, temperature=0.0))
    answers = {"sampled": sampled, "greedy": greedy}
    if improve is not None:
        answers["refined"] = await improve(sampled)
    outcomes = {
        kind: await _outcomes(prompts, completions, scorer) for kind, completions in answers.items()
    }
    if record_answers is not None:
        record_answers(_answer_groups(prompts, answers, outcomes))
    columns: dict[str, Sequence[float | None]] = {
        **{kind: _values(each) for kind, each in outcomes.items()},
        "unscored": [float(not isinstance(outcome, Scored)) for outcome in outcomes["sampled"]],
        "length": [float(len(c.token_ids)) for c in sampled],
        "truncated": [float(c.finish_reason == "length") for c in sampled],
    }
    if reward is not None:
        columns["reward"] = _values(await _outcomes(prompts, sampled, reward))
    if reference is not None:
        columns["reference_kl"] = await _log_ratios(prompts, sampled, reference)
    metrics: dict[str, float] = {}
    for group, members in _groups(prompts).items():
        prefix = f"eval/{task}/{group}"
        ids = [prompts[i].prompt_id for i in members]
        for name, column in columns.items():
            values = [column[i] for i in members]
            known = [value for value in values if value is not None]
            # None, a completion without a score, is left out and not counted as 0.
            if known:
                metrics[prefix + name] = float(np.mean(known))
                record(prompt_values(prefix + name, ids, values))
        thinking = thinking_metrics([sampled[i] for i in members])
        metrics |= {prefix + name: value for name, value in thinking.items()}
    return metrics


def _groups(prompts: Sequence[Prompt]) -> dict[str, Sequence[int]]:
    """Return all prompts, and where they are of several sources those of each: name -> indices."""
    groups: dict[str, Sequence[int]] = {"": range(len(prompts))}
    sources = dict.fromkeys(prompt.source for prompt in prompts)
    if len(sources) > 1:
        for source in sources:
            groups[f"{source}/"] = [i for i, p in enumerate(prompts) if p.source == source]
    return groups


async def complete_once(
    prompts: Sequence[Prompt], rollout: Rollout, version: int, sampling: Sampling, seed: int
) -> list[Completion]:
    """Return one completion of each prompt, of a single turn."""
    requests = [
        GenerateRequest(
            prompt_id=p.prompt_id,
            number=0,
            token_ids=p.token_ids,
            sampling=sampling,
            seeds=(derive_seed(seed, "evaluate", p.prompt_id),),
        )
        for p in prompts
    ]
    return [completions[0] for completions in await rollout.generate(requests, version=version)]


def _answer_groups(
    prompts: Sequence[Prompt],
    answers: Mapping[str, Sequence[Completion]],
    outcomes: Mapping[str, Sequence[Outcome]],
) -> list[Group]:
    return [
        Group(
            prompt=prompt,
            samples=tuple(
                Sample(completion=answers[kind][i], outcome=outcomes[kind][i], kind=kind)
                for kind in answers
            ),
        )
        for i, prompt in enumerate(prompts)
    ]


async def _outcomes(
    prompts: Sequence[Prompt], completions: Sequence[Completion], scorer: Scorer
) -> list[Outcome]:
    """Return each completion's outcome; of an episode that failed, the reason.

    Raises ScorerError where none could be scored.
    """
    requests = [
        ScoreRequest(prompt=p, completions=(c,)) for p, c in zip(prompts, completions, strict=True)
    ]
    scores = [outcome for response in await scorer.score(requests) for outcome in response]
    outcomes: list[Outcome] = [
        (c.episode.problem if c.episode is not None else None) or outcome
        for c, outcome in zip(completions, scores, strict=True)
    ]
    if not any(isinstance(outcome, Scored) for outcome in outcomes):
        reason = next(
            (o.reason for o in outcomes if not isinstance(o, Scored)), "no held-out prompts"
        )
        raise ScorerError(
            f"evaluation: none of {len(outcomes)} held-out completions could be scored; "
            f"the first: {reason}"
        )
    return outcomes


def _values(outcomes: Sequence[Outcome]) -> list[float | None]:
    """Return each score; None for a completion that could not be scored."""
    return [outcome.value if isinstance(outcome, Scored) else None for outcome in outcomes]


async def _log_ratios(
    prompts: Sequence[Prompt], completions: Sequence[Completion], reference: Reference
) -> list[float | None]:
    """Return log p_policy - log p_reference of each completion.

    Their mean is an unbiased estimate of the sequence KL, because the policy sampled them.
    """
    rows = [
        make_row(
            Group(prompt=p, samples=(Sample(completion=c, outcome=Scored(value=0.0)),)),
            0,
            score=0.0,
        )
        for p, c in zip(prompts, completions, strict=True)
    ]
    written = [row for row in rows if len(row.response_ids)]  # an episode may fail at its start
    frozen = iter(await reference.logprobs(written, temperature=1.0))
    return [
        float(row.tokens["behavior_logp"].sum() - next(frozen).sum())
        if len(row.response_ids)
        else None
        for row in rows
    ]
