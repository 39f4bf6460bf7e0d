"""From the scores of several samples per prompt to figures per prompt: mean@k, pass@k, maj@k."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rayhf.evaluation.statistics import Array, majority_at_k, pass_at_k


def prompt_figures(
    scores_PN: Array,
    answers_PN: Sequence[Sequence[str | None]] | None,
    sizes: Sequence[int],
) -> dict[str, Array]:
    """Return figures of each prompt by name, (P,) each; NaN where a prompt has too few scores.

    Args:
        scores_PN: scores; NaN for a completion that could not be scored, which is left out.
        answers_PN: answers that vote for maj@k; None leaves it out.
        sizes: values of k.

    mean is the mean over all samples. pass@k and maj@k are there for N > 1 only, pass@k where
    all scores are 0 or 1.
    """
    samples = scores_PN.shape[1]
    known = np.isfinite(scores_PN)
    counts = known.sum(1)
    totals = np.where(known, scores_PN, 0.0).sum(1)
    means = np.divide(totals, counts, out=np.full(len(counts), np.nan), where=counts > 0)
    figures = {"mean": means}
    if samples == 1:
        return figures
    if np.isin(scores_PN[known], (0.0, 1.0)).all():
        for k in sizes:
            figures[f"pass@{k}"] = np.array(
                [
                    pass_at_k(int(n), int(total), k) if n >= k else np.nan
                    for n, total in zip(counts, totals, strict=True)
                ]
            )
    if answers_PN is not None:
        for k in sizes:
            figures[f"maj@{k}"] = np.array(
                [
                    _majority(scores, answers, k)
                    for scores, answers in zip(scores_PN, answers_PN, strict=True)
                ]
            )
    return figures


def _majority(scores_N: Array, answers_N: Sequence[str | None], k: int) -> float:
    rows = [(a, float(s)) for a, s in zip(answers_N, scores_N, strict=True) if np.isfinite(s)]
    if len(rows) < k:
        return float("nan")
    return majority_at_k([answer for answer, _ in rows], [score for _, score in rows], k)
