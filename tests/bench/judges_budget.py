"""Rankings of eight completions by a noisy judge, at equal numbers of its calls: a simulation.

    python -m tests.bench.judges_budget [--prompts 400] [--record]

The judge is a model of noise, and the tournaments are rayhf's own. Completions of a prompt have
true qualities from N(0, 1). In a call the judge

- compares two: it prefers the first where q1 + e1 - q2 - e2 + BIAS > 0, with e from N(0, 1); every
  comparison is two calls, one in each order, and their mean is the verdict;
- or rates one from 1 to 10: 7 + q + e, rounded, with e from N(0, s^2). At s = 1 it perceives a
  single answer as well as one of two; at larger s it is a worse judge of answers by themselves.

Of scores and true qualities, mean over prompts: Kendall's tau-a (a pair with equal scores counts
0), and the correlation, which says how much of an advantage that is centered within the group is
noise. Regret is how much worse the completion with the best score is than the best one, in standard
deviations of quality. Means over seeds, with 95 % intervals by the t distribution.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rayhf.config.scorers import PairwiseEntryConfig
from rayhf.evaluation.duels import given_completion
from rayhf.scorer.protocol import PairwiseScorer, ScorerSetup
from rayhf.scorer.tournament import with_comparisons
from rayhf.types import Compared, Comparison, Prompt, Scored, ScoreRequest, win_rates
from tests.bench.results import put_section

Array = npt.NDArray[np.float64]
COMPLETIONS = 8
SEEDS = (0, 1, 2, 3, 4)
T_QUANTILE = 2.776
"""97.5 % quantile of the t distribution with four degrees of freedom."""
BIAS = 0.5
RATING_NOISE = (1.0, 1.5, 2.0, 3.0)


class NoisyJudge(PairwiseScorer[PairwiseEntryConfig]):
    """Compares texts that are the numbers of their qualities."""

    Config = PairwiseEntryConfig

    def __init__(self, quality_PK: Array, rng: np.random.Generator) -> None:
        super().__init__(PairwiseEntryConfig(name="judge"), ScorerSetup(base=Path()))
        self._quality_PK = quality_PK
        self._rng = rng
        self.calls = 0
        self.asked: set[tuple[str, str, str]] = set()
        """Prompt and both texts of every comparison."""

    def compare(self, requests: Sequence[ScoreRequest]) -> list[Comparison]:
        return [self._compare(request) for request in requests]

    def _compare(self, request: ScoreRequest) -> Comparison:
        quality_P = self._quality_PK[int(request.prompt.prompt_id)]
        quality = np.array([quality_P[int(c.text)] for c in request.completions])
        size = len(quality)
        self.calls += size * (size - 1)
        for first, second in permutations((c.text for c in request.completions), 2):
            self.asked.add((request.prompt.prompt_id, first, second))
        gap = quality[:, None] - quality[None, :]
        noise = self._rng.normal(scale=np.sqrt(2.0), size=(size, size))
        first_won = (gap + BIAS + noise > 0).astype(float)  # [i, j]: i was shown first
        win = (first_won + 1.0 - first_won.T) / 2.0
        return Compared(win=win, source="pairwise")


@dataclass(frozen=True, kw_only=True)
class Row:
    """A method's figures, one per seed."""

    method: str
    calls: float
    """Of the judge, per prompt."""
    tau: list[float]
    correlation: list[float]
    regret: list[float]


def requests_of(quality_PK: Array) -> list[ScoreRequest]:
    """Return one request per prompt; the ninth quality is that of its anchor."""
    requests = []
    for number in range(len(quality_PK)):
        prompt = Prompt(
            prompt_id=str(number), messages=(), token_ids=(), row={"anchors": str(COMPLETIONS)}
        )
        completions = tuple(given_completion(prompt, str(i), i) for i in range(COMPLETIONS))
        requests.append(ScoreRequest(prompt=prompt, completions=completions))
    return requests


def tournament(comparisons: Any, played_only: bool = False) -> Callable[..., tuple[Array, float]]:
    """Return a method: scores by comparisons, and calls of the judge per prompt."""

    def scores(quality_PK: Array, rng: np.random.Generator) -> tuple[Array, float]:
        judge = NoisyJudge(quality_PK, rng)
        config = PairwiseEntryConfig(name="judge", comparisons=comparisons)
        scorer = with_comparisons(config, judge.setup, judge)
        requests = requests_of(quality_PK)
        if played_only:
            rows = [
                _played(judge, request, comparison)
                for request, comparison in zip(requests, scorer.compare(requests), strict=True)
            ]
        else:
            rows = [
                [outcome.value for outcome in outcomes if isinstance(outcome, Scored)]
                for outcomes in scorer.score(requests)
            ]
        return np.array(rows), judge.calls / len(quality_PK)

    return scores


def _played(judge: NoisyJudge, request: ScoreRequest, comparison: Comparison) -> list[float]:
    """Return the mean over the judge's own verdicts."""
    assert isinstance(comparison, Compared)
    texts = [completion.text for completion in request.completions]
    asked = [[(request.prompt.prompt_id, i, j) in judge.asked for j in texts] for i in texts]
    return list(win_rates(np.where(asked, comparison.win, np.nan), include_self=False))


def pointwise(ratings: int, noise: float) -> Callable[..., tuple[Array, float]]:
    """Return a method: the mean of several ratings of each completion."""

    def scores(quality_PK: Array, rng: np.random.Generator) -> tuple[Array, float]:
        size = (*quality_PK[:, :COMPLETIONS].shape, ratings)
        perceived = quality_PK[:, :COMPLETIONS, None] + rng.normal(scale=noise, size=size)
        return np.clip(np.round(7.0 + perceived), 1, 10).mean(-1), float(COMPLETIONS * ratings)

    return scores


def kendall(scores_PK: Array, quality_PK: Array) -> float:
    """Return the mean tau-a over prompts."""
    upper = np.triu_indices(COMPLETIONS, 1)
    one = np.sign(scores_PK[:, :, None] - scores_PK[:, None, :])[:, *upper]
    other = np.sign(quality_PK[:, :, None] - quality_PK[:, None, :])[:, *upper]
    return float((one * other).mean())


def correlation(scores_PK: Array, quality_PK: Array) -> float:
    """Return the mean correlation over prompts; 0 where all scores of a prompt are equal."""
    one = scores_PK - scores_PK.mean(1, keepdims=True)
    other = quality_PK - quality_PK.mean(1, keepdims=True)
    norm = np.sqrt((one**2).sum(1) * (other**2).sum(1))
    return float(((one * other).sum(1) / np.maximum(norm, 1e-12)).mean())


def regret(scores_PK: Array, quality_PK: Array) -> float:
    """Return the mean regret of the best score; several best ones count by their mean."""
    best_PK = scores_PK >= scores_PK.max(1, keepdims=True) - 1e-9
    picked_P = (best_PK * quality_PK).sum(1) / best_PK.sum(1)
    return float((quality_PK.max(1) - picked_P).mean())


def measure(name: str, method: Callable[..., tuple[Array, float]], prompts: int) -> Row:
    """Return a method's figures on every seed; all methods rank the same completions."""
    row = Row(method=name, calls=0.0, tau=[], correlation=[], regret=[])
    for seed in SEEDS:
        all_PK = np.random.default_rng(seed).normal(size=(prompts, COMPLETIONS + 1))
        scores_PK, calls = method(all_PK, np.random.default_rng(seed + 1000))
        quality_PK = all_PK[:, :COMPLETIONS]  # the last one is the anchor's
        row = replace(row, calls=calls)
        row.tau.append(kendall(scores_PK, quality_PK))
        row.correlation.append(correlation(scores_PK, quality_PK))
        row.regret.append(regret(scores_PK, quality_PK))
    return row


def with_interval(values: Sequence[float]) -> str:
    """Return mean and half width of the interval over seeds."""
    half = T_QUANTILE * float(np.std(values, ddof=1)) / np.sqrt(len(values))
    return f"{np.mean(values):.3f} ± {half:.3f}"


def methods() -> list[tuple[str, Callable[..., tuple[Array, float]]]]:
    """Return name and method, those of about equally many calls together."""
    rows: list[tuple[str, Callable[..., tuple[Array, float]]]] = []
    for ratings, tournaments in (
        (2, [("knock-out", "knock_out"), ("one anchor", "anchors")]),
        (3, [("Swiss, 3 rounds", "swiss")]),
        (7, [("round robin", "round_robin")]),
    ):
        rows += [(name, tournament(setting)) for name, setting in tournaments]
        if ratings == 3:
            rows.append(("Swiss, mean over verdicts only", tournament("swiss", played_only=True)))
        rows += [
            (f"{ratings} ratings each, s = {noise:g}", pointwise(ratings, noise))
            for noise in RATING_NOISE
        ]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=400)
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    rows = [measure(name, method, arguments.prompts) for name, method in methods()]
    table = "\n".join(
        [
            f"`python -m tests.bench.judges_budget`, {datetime.now(UTC):%Y-%m-%d}. A simulated "
            f"judge (its noise is described there), {COMPLETIONS} completions, "
            f"{arguments.prompts} prompts, {len(SEEDS)} seeds; ± is the 95 % interval over seeds.",
            "",
            "| calls per prompt | method | Kendall's tau-a | correlation | regret of the best |",
            "|---|---|---|---|---|",
            *(
                f"| {row.calls:.0f} | {row.method} | {with_interval(row.tau)} "
                f"| {with_interval(row.correlation)} | {with_interval(row.regret)} |"
                for row in rows
            ),
        ]
    )
    print(table)
    if arguments.record:
        put_section("## Judge calls: tournaments against ratings", table)


if __name__ == "__main__":
    main()
