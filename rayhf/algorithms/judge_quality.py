"""Quality of a judge: agreement of its scores and verdicts with the campaign's scorers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations

import numpy as np

from rayhf.types import Example, Group, Sample, Scored


def judge_quality(
    groups: Sequence[Group],
    pairs: Sequence[Example],
    *,
    pass_verdict: float,
    pass_score: float,
) -> dict[str, float]:
    """Return metrics self_rewarding/...; a mean over nothing is left out.

    Args:
        groups: completions with the judge's score as outcome and the scorers' as stat "gold", and
            judgments with their verdict as stat "verdict".
        pairs: (chosen, rejected) of these groups that the policy is trained on.
        pass_verdict: verdict from which a judgment says that a completion is good.
        pass_score: scorers' score from which it is.
    """
    answers = [sample for group in groups for sample in group.samples if sample.kind == "answer"]
    gold = [sample.stats["gold"] for sample in answers if "gold" in sample.stats]
    judgments = [
        (group, sample)
        for group in groups
        for sample in group.samples
        if sample.kind == "judgement"
    ]
    verdicts = [
        (sample.stats["verdict"] >= pass_verdict) == (truth >= pass_score)
        for group, sample in judgments
        if "verdict" in sample.stats and (truth := _truth(group, sample)) is not None
    ]
    order = [each for group in groups for each in _orders(group)]
    by_id = {group.prompt.prompt_id: group for group in groups}
    means: dict[str, Sequence[float]] = {
        "gold_mean": gold,
        "judge_unparsable": ["verdict" not in sample.stats for _, sample in judgments],
        "judge_accuracy": verdicts,
        "pair_accuracy": [right for right in order if right is not None],
        "pair_ties": [right is None for right in order],
        "gold_margin": list(_margins(by_id, pairs)),
    }
    metrics = {"self_rewarding/gold_missing": float(len(answers) - len(gold))}
    return metrics | {
        f"self_rewarding/{name}": float(np.mean(values)) for name, values in means.items() if values
    }


def _truth(group: Group, judgment: Sample) -> float | None:
    """Return the scorers' score of what a judgment is about."""
    assert judgment.parent is not None
    return group.samples[judgment.parent].stats.get("gold")


def _orders(group: Group) -> Iterator[bool | None]:
    """Yield for each pair that the scorers tell apart whether the judge agrees; None for a tie."""
    known = [
        (sample.outcome.value, sample.stats["gold"])
        for sample in group.samples
        if isinstance(sample.outcome, Scored) and "gold" in sample.stats
    ]
    for (judged, gold), (other_judged, other_gold) in combinations(known, 2):
        if gold != other_gold:
            is_tie = judged == other_judged
            yield None if is_tie else (judged > other_judged) == (gold > other_gold)


def _margins(groups: dict[str, Group], pairs: Sequence[Example]) -> Iterator[float]:
    """Yield the scorers' score of chosen minus rejected, where both have one."""
    for pair in pairs:
        samples = groups[pair.rows[0].prompt_id].samples
        chosen, rejected = (samples[row.sample].stats.get("gold") for row in pair.rows)
        if chosen is not None and rejected is not None:
            yield chosen - rejected
