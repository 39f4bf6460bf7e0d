"""Win rate during a campaign: the policy's answers against its start's, or those of a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import numpy as np

from rayhf.config.base import Name
from rayhf.config.evaluations import EvaluationConfig
from rayhf.config.scorers import ScorerEntries, ScorerEntryConfig
from rayhf.config.sources import PromptSources
from rayhf.errors import ConfigError, ScorerError
from rayhf.evaluation.answers import answers_to, read_answers
from rayhf.evaluation.base import EvaluationContext, EvaluationSetup
from rayhf.evaluation.duels import Contest, both_orders, duels_of, merge_orders
from rayhf.evaluation.values import prompt_values
from rayhf.evaluation.win_rates import ties, win_summary
from rayhf.types import GenerateRequest, JsonObject, Prompt, derive_seed


class WinRateConfig(EvaluationConfig):
    """What the policy's answers are compared with, and by which scorers."""

    compares: ClassVar[bool] = True

    type: str = "win_rate"
    scorer: ScorerEntries
    """Scorers that compare two answers: a pairwise judge or model, or scores, whose difference
    decides."""
    prompts: PromptSources | None = None
    """Prompts, like prompts.heldout. Default: prompts.heldout, or else the training prompts."""
    against: Literal["initial"] | Path = "initial"
    """initial: the policy's own answers before training. Otherwise a file of answers to the same
    prompts (rayhf/evaluation/answers.py), for example of another model."""
    policy: Name = "policy"
    """Policy to evaluate, for algorithms that train several."""

    @property
    def scorers(self) -> tuple[ScorerEntryConfig, ...]:
        """Its own scorers, for which the launcher starts another scorer actor."""
        return self.scorer


class WinRateEvaluation:
    """Win rate against the initial policy or a file of answers, raw and length-controlled.

    eval/<task>/win_rate and win_rate_length_controlled, each with _low and _high, its 95 %
    interval; ties; length_gap in characters. The measurement before training has none of them
    where the policy itself is the baseline.
    """

    Config = WinRateConfig
    muted_guards: frozenset[str] = frozenset()

    def __init__(self, config: WinRateConfig, setup: EvaluationSetup) -> None:
        self._config = config
        self._task = setup.task
        key = f"evaluations.{setup.task}"
        self._prompts: Sequence[Prompt] = (
            setup.heldout
            if config.prompts is None
            else setup.load_prompts(config.prompts, f"{key}.prompts")
        )
        if not self._prompts:
            raise ConfigError(f"{key}: there are no held-out prompts; set {key}.prompts")
        self._baseline: Mapping[str, str] | None = None
        """Answer by prompt id; None until the initial policy has answered."""
        if config.against != "initial":
            answers = read_answers(setup.base / config.against, key=f"{key}.against")
            texts = answers_to(self._prompts, answers, key=f"{key}.against")
            self._baseline = {p.prompt_id: t[0] for p, t in zip(self._prompts, texts, strict=True)}

    async def measure(self, context: EvaluationContext) -> dict[str, float]:
        """Return the win rates. Raises ScorerError where nothing could be compared."""
        answers = await self._answer(context)
        if self._baseline is None:
            self._baseline = answers
            return {}
        baseline = self._baseline
        contests = [
            Contest(prompt=p, texts=(answers[p.prompt_id], baseline[p.prompt_id]))
            for p in self._prompts
        ]
        assert context.scorer is not None  # its config names scorers
        wins, reason = merge_orders(await context.scorer.compare(both_orders(contests)))
        duels = duels_of(contests, wins)
        if not duels.prompts:
            raise ScorerError(
                f"evaluations.{self._task}: none of {len(contests)} answers could be compared; "
                f"the first: {reason or 'no verdict'}"
            )
        judged = [
            float(win[0, 1]) if win is not None and np.isfinite(win[0, 1]) else None for win in wins
        ]
        ids = [prompt.prompt_id for prompt in self._prompts]
        gaps = [
            None if win is None else float(len(contest.texts[0]) - len(contest.texts[1]))
            for contest, win in zip(contests, judged, strict=True)
        ]
        # Both together give the paired difference of two length-controlled win rates.
        context.record(prompt_values(f"eval/{self._task}/win_rate", ids, judged))
        context.record(prompt_values(f"eval/{self._task}/length_gap", ids, gaps))
        metrics = {
            f"eval/{self._task}/ties": ties(duels),
            f"eval/{self._task}/length_gap": float(duels.length_gap_D.mean()),
        }
        for name, estimate in win_summary(duels).items():
            metrics[f"eval/{self._task}/{name}"] = estimate.value
            if estimate.count > 1:
                metrics[f"eval/{self._task}/{name}_low"] = estimate.low
                metrics[f"eval/{self._task}/{name}_high"] = estimate.high
        return metrics

    async def _answer(self, context: EvaluationContext) -> dict[str, str]:
        """Return one sampled answer per prompt; prompts and seeds are the same every time."""
        policy = self._config.policy if self._config.policy in context.versions else "policy"
        sampling = replace(context.sampling, temperature=1.0, top_p=1.0, top_k=0)
        requests = [
            GenerateRequest(
                prompt_id=prompt.prompt_id,
                number=0,
                token_ids=prompt.token_ids,
                sampling=sampling,
                seeds=(derive_seed(context.seed, "win rate", prompt.prompt_id),),
            )
            for prompt in self._prompts
        ]
        rollout = context.roles.rollouts[policy]
        generated = await rollout.generate(requests, version=context.versions[policy])
        return {
            prompt.prompt_id: completions[0].text
            for prompt, completions in zip(self._prompts, generated, strict=True)
        }

    def state_dict(self) -> JsonObject:
        """Return the baseline's answers."""
        return cast(JsonObject, {"baseline": self._baseline and dict(self._baseline)})

    def load_state_dict(self, state: JsonObject) -> None:
        """Restore the baseline's answers."""
        self._baseline = cast(Any, state["baseline"])
