"""Quality of a reward model on preference pairs: accuracy, calibration, length and format bias.

In: for each pair the probability that the chosen completion wins, and the texts. Out: figures with
bootstrap intervals over pairs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rayhf.evaluation.statistics import Array, Estimate, Indices, bootstrap, mean_estimate

BINS = 10
_MARKUP = re.compile(
    r"^\s{0,3}#{1,6} |^\s*[-*•] |^\s*\d{1,3}[.)] |\*\*[^*\n]+\*\*|^\s*```|^\s*\|.*\|\s*$",
    re.MULTILINE,
)
"""Markdown that a reader sees: headings, list items, bold text, code fences, table rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedPair:
    """A pair of completions of one prompt and the reward model's opinion."""

    win: float
    """P(chosen beats rejected): for scores the sigmoid of their difference. NaN: no verdict."""
    chosen: str
    rejected: str
    category: str = ""
    agreement: float | None = None
    """Share of several annotators who agree with the label "chosen"; None where there is one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bin:
    """A row of the reliability table."""

    low: float
    high: float
    count: int
    confidence: float
    """Mean predicted probability of the preferred completion."""
    accuracy: Estimate
    """Share of these pairs whose preferred completion is the chosen one."""


def accuracy(pairs: Sequence[JudgedPair]) -> Estimate:
    """Return the share of pairs whose chosen completion has the larger score; a tie is wrong."""
    return mean_estimate([float(pair.win > 0.5) for pair in pairs])


def by_category(pairs: Sequence[JudgedPair]) -> dict[str, Estimate]:
    """Return the accuracy of each category, in the order of their first pairs."""
    names = dict.fromkeys(pair.category for pair in pairs)
    return {name: accuracy([pair for pair in pairs if pair.category == name]) for name in names}


def section_scores(
    pairs: Sequence[JudgedPair],
    sections: Mapping[str, Sequence[str]],
    counts: Mapping[str, int],
) -> dict[str, Estimate]:
    """Return each section's mean accuracy over its categories, weighted by `counts`, and "score".

    The score is the mean of the sections. Only categories with pairs count, as in RewardBench
    (Lambert et al. 2024, 2403.13787). Pairs are resampled within all of them.
    """
    correct = np.array([float(pair.win > 0.5) for pair in pairs])
    category = np.array([pair.category for pair in pairs])
    present = {
        section: [name for name in names if (category == name).any()]
        for section, names in sections.items()
    }
    present = {section: names for section, names in present.items() if names}

    def figure(section: str, chosen: Indices) -> float:
        total = 0.0
        weight = 0
        for name in present[section]:
            own = chosen[category[chosen] == name]
            if len(own):
                total += counts[name] * correct[own].mean()
                weight += counts[name]
        return total / weight if weight else float("nan")

    estimates = {
        section: bootstrap(lambda chosen, s=section: figure(s, chosen), len(pairs))  # type: ignore[misc]
        for section in present
    }
    if present:
        estimates["score"] = bootstrap(
            lambda chosen: float(np.nanmean([figure(s, chosen) for s in present])), len(pairs)
        )
    return estimates


def ideal_accuracy(pairs: Sequence[JudgedPair]) -> Estimate | None:
    """Return the accuracy of the best predictor against one annotator drawn at random.

    Mean of max(a, 1 - a) over the pairs with several annotators, a being the share who agree with
    the label: no reward model can agree with single annotators more often. None without such pairs.
    """
    shares = [pair.agreement for pair in pairs if pair.agreement is not None]
    return mean_estimate([max(a, 1.0 - a) for a in shares]) if shares else None


def annotator_accuracy(pairs: Sequence[JudgedPair]) -> Estimate | None:
    """Return how often the reward model agrees with one annotator drawn at random.

    It is to be compared with `ideal_accuracy`. None without pairs that several people annotated.
    """
    values = [
        pair.agreement if pair.win > 0.5 else 1.0 - pair.agreement if pair.win < 0.5 else 0.5
        for pair in pairs
        if pair.agreement is not None
    ]
    return mean_estimate(values) if values else None


def reliability(pairs: Sequence[JudgedPair], bins: int = BINS) -> list[Bin]:
    """Return the reliability table: bins of equal width on [1/2, 1], empty ones left out.

    The prediction is the completion with the larger probability, so that it does not matter which
    one a file calls chosen; at exactly 1/2 it is right half the time.
    """
    confidence, right = _predictions(pairs)
    place = np.minimum(((confidence - 0.5) * 2 * bins).astype(np.int64), bins - 1)
    table = []
    for index in range(bins):
        own = place == index
        if own.any():
            table.append(
                Bin(
                    low=0.5 + index / (2 * bins),
                    high=0.5 + (index + 1) / (2 * bins),
                    count=int(own.sum()),
                    confidence=float(confidence[own].mean()),
                    accuracy=mean_estimate(right[own]),
                )
            )
    return table


def calibration_error(pairs: Sequence[JudgedPair], bins: int = BINS) -> Estimate:
    """Return the expected calibration error: sum over bins of |B| / N |accuracy - confidence|.

    Guo et al. 2017 (1706.04599), eq. 3, with the bins of `reliability`. It is at least 0, and
    biased upwards with few pairs, as is its interval.
    """
    confidence, right = _predictions(pairs)
    place = np.minimum(((confidence - 0.5) * 2 * bins).astype(np.int64), bins - 1)
    gap = confidence - right

    def error(chosen: Indices) -> float:
        sums = np.bincount(place[chosen], weights=gap[chosen], minlength=bins)
        return float(np.abs(sums).sum() / len(chosen))

    return bootstrap(error, len(pairs))


def _predictions(pairs: Sequence[JudgedPair]) -> tuple[Array, Array]:
    win = np.array([pair.win for pair in pairs])
    right = np.where(win > 0.5, 1.0, np.where(win < 0.5, 0.0, 0.5))
    return np.maximum(win, 1.0 - win), right


def length_bias(pairs: Sequence[JudgedPair]) -> dict[str, Estimate]:
    """Return how far length decides, in characters; see `_bias`."""
    return _bias(pairs, [len(p.chosen) - len(p.rejected) for p in pairs], "longer")


def format_bias(pairs: Sequence[JudgedPair]) -> dict[str, Estimate]:
    """Return how far Markdown decides: headings, list items, bold text, code, tables."""
    gaps = [markup_count(p.chosen) - markup_count(p.rejected) for p in pairs]
    return _bias(pairs, gaps, "more_markup")


def markup_count(text: str) -> int:
    """Return the number of Markdown elements in a text."""
    return sum(1 for _ in _MARKUP.finditer(text))


def _bias(pairs: Sequence[JudgedPair], gaps: Sequence[int], name: str) -> dict[str, Estimate]:
    """Return figures of the pairs that differ; none where no pair does.

    prefers_<name>: share in which the model prefers the completion that has more;
    labels_prefer_<name>: the same of the labels, for comparison; excess_<name>: the difference;
    accuracy_chosen_<name> and accuracy_rejected_<name>: accuracy where the chosen or the rejected
    completion has more.
    """
    rows = [(pair.win, gap) for pair, gap in zip(pairs, gaps, strict=True) if gap]
    if not rows:
        return {}
    model = np.array([_right(win) if gap > 0 else 1.0 - _right(win) for win, gap in rows])
    labels = np.array([float(gap > 0) for _, gap in rows])
    figures = {
        f"prefers_{name}": mean_estimate(model),
        f"labels_prefer_{name}": mean_estimate(labels),
        f"excess_{name}": mean_estimate(model - labels),
    }
    for which, sign in (("chosen", 1), ("rejected", -1)):
        own = [float(win > 0.5) for win, gap in rows if gap * sign > 0]
        if own:
            figures[f"accuracy_{which}_{name}"] = mean_estimate(own)
    return figures


def _right(win: float) -> float:
    return 1.0 if win > 0.5 else 0.0 if win < 0.5 else 0.5
