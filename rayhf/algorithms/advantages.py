"""Rewards and advantages from scores, log-probs and values: pure functions on numpy arrays.

In: finite numbers of all rows or groups of an iteration. Out: float64 arrays (cast to float32 when
they are stored in a Row).

Input must be finite: the caller drops samples whose outcome is Invalid or Failed before their group
gets here. NaN or infinity means a bug in the caller: ValueError.

A row is one response. Values per token are in arrays of shape (N,), the rows of the iteration end
to end; `lengths` (R,) has the number of tokens of each row, which may be 0. Log-probs and KL are in
nats.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from rayhf.errors import ConfigError

Array = npt.NDArray[np.float64]
KLEstimator = Literal["k1", "k2", "k3"]

VARIANCE_FLOOR = 1e-8
"""Added to a variance before the square root, so that constant input whitens to 0 instead of
amplified rounding errors."""
MAX_EXPONENT = 20.0
"""Nats, as in losses/ratios.py."""


def finite(values: npt.ArrayLike, name: str, *, dimensions: int = 1) -> Array:
    """Return `values` as a float64 array. Raises ValueError for another shape, NaN or inf."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != dimensions:
        raise ValueError(f"{name} has shape {array.shape}, {dimensions} dimensions were expected")
    bad = np.flatnonzero(~np.isfinite(array))
    if bad.size:
        raise ValueError(
            f"{name}[{bad[0]}] is {array.flat[bad[0]]}; "
            f"drop such samples ({bad.size} of {array.size})"
        )
    return array


def row_ends(values: Array, lengths: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Return where each row ends: (R,). Raises ValueError where the lengths do not add up."""
    ends = np.cumsum(np.asarray(lengths, dtype=np.int64))
    total = int(ends[-1]) if ends.size else 0
    if total != values.size:
        raise ValueError(f"the rows have {total} tokens, there are values for {values.size}")
    return ends


def row_sums(values: npt.ArrayLike, lengths: npt.ArrayLike) -> Array:
    """Return the sum of each row: (N,) -> (R,).

    Each is numpy's sum of that row alone: np.add.reduceat adds in another order, with other last
    bits.
    """
    array = finite(values, "values")
    ends = row_ends(array, lengths).tolist()
    starts = [0, *ends[:-1]] if ends else []
    return np.array([array[i:j].sum() for i, j in zip(starts, ends, strict=True)], dtype=np.float64)


# --- rewards ------------------------------------------------------------------------------------


def kl_penalty(logp: npt.ArrayLike, ref_logp: npt.ArrayLike, estimator: KLEstimator) -> Array:
    """Return the per-token KL(policy || reference) in nats, as a penalty on the reward: (N,).

    Schulman 2020, with g = logp - ref_logp. k1 = g is right here: as a reward its policy gradient
    is exactly that of the KL. k2 = g^2/2 and k3 = exp(-g) - 1 + g are not negative and less noisy,
    but as rewards their policy gradient is biased.
    """
    gap = finite(logp, "logp") - finite(ref_logp, "ref_logp")
    if estimator == "k1":
        return gap
    if estimator == "k2":
        return 0.5 * np.square(gap)
    if estimator == "k3":
        # No gradient is taken here, so a plain bound is enough.
        bounded: Array = np.expm1(np.minimum(-gap, MAX_EXPONENT)) + gap
        return bounded
    raise ConfigError(f"algorithm.kl.estimator: {estimator!r} is not one of k1, k2, k3; try k1")


def token_rewards(
    kl: npt.ArrayLike, coef: float, scores: npt.ArrayLike, lengths: npt.ArrayLike
) -> Array:
    """Return -coef * kl per token, plus a row's score on its last token: (N,).

    Ziegler et al. 2019. `scores` has shape (R,). An empty row has no token to carry its score.
    """
    rewards: Array = -coef * finite(kl, "kl")
    score = finite(scores, "scores")
    ends = row_ends(rewards, lengths)
    filled = np.asarray(lengths) > 0
    rewards[ends[filled] - 1] += score[filled]
    return rewards


def missing_eos_penalty(*, truncated: bool, penalty: float) -> float:
    """Return the penalty on a truncated response's score (finish_reason "length"), else 0.0.

    The finish reason decides, not a search for the end token: where the padding token is the end
    token, a search always finds one.
    """
    return penalty if truncated else 0.0


def overlong_penalty(length: int, *, max_tokens: int, buffer: int, penalty: float) -> float:
    """Return the penalty on a long response's score (DAPO's soft overlong punishment).

    Yu et al. 2025: 0 up to max_tokens - buffer, `penalty` at max_tokens, linear in between.
    `buffer` 0 is off. All lengths in tokens.
    """
    if not 0 <= buffer <= max_tokens:
        raise ConfigError(
            f"algorithm.overlong_buffer: {buffer} must be from 0 to rollout.max_tokens; "
            f"try {max_tokens}"
        )
    if buffer == 0:
        return 0.0
    return penalty * min(max(length - (max_tokens - buffer), 0), buffer) / buffer


# --- advantages ---------------------------------------------------------------------------------


def gae(
    rewards: npt.ArrayLike,
    values: npt.ArrayLike,
    lengths: npt.ArrayLike,
    gamma: float,
    lam: float,
) -> tuple[Array, Array]:
    """Return advantages and returns, both (N,).

    Generalized advantage estimation (Schulman et al. 2016):

        delta[t] = r[t] + gamma * v[t+1] - v[t]
        A[t] = delta[t] + gamma * lam * A[t+1]
        return[t] = A[t] + v[t]

    v[t] is the value before token t is generated. The response ends its episode: nothing is
    bootstrapped after the last token, even where it was truncated.
    """
    reward = finite(rewards, "rewards")
    value = finite(values, "values")
    if reward.shape != value.shape:
        raise ValueError(f"rewards has shape {reward.shape}, values {value.shape}")
    after = np.append(value[1:], 0.0)[: value.size]
    ends = row_ends(value, lengths)
    after[ends[np.asarray(lengths) > 0] - 1] = 0.0
    delta = reward + gamma * after - value
    advantage = discounted_sums(delta, lengths, gamma * lam)
    return advantage, advantage + value


def discounted_sums(values: npt.ArrayLike, lengths: npt.ArrayLike, discount: float) -> Array:
    """Return out[t] = sum over the s >= t of a row of discount^(s-t) * values[s]: (N,).

    Of rewards with gamma, this is the reward-to-go. Computed for all rows at once, from their last
    tokens backward.
    """
    array = finite(values, "values")
    ends = row_ends(array, lengths)
    length = np.asarray(lengths, dtype=np.int64)
    longest_first = np.argsort(-length, kind="stable")
    ends = ends[longest_first]
    # Number of rows that are longer than 0, 1, 2 ... tokens.
    remaining = len(length) - np.cumsum(np.bincount(length, minlength=1))
    out = np.empty_like(array)
    running = np.zeros(len(length))
    for back, rows in enumerate(remaining[:-1].tolist(), start=1):
        at = ends[:rows] - back
        running = array[at] + discount * running[:rows]
        out[at] = running
    return out


def centered(scores: npt.ArrayLike) -> Array:
    """Return R - mean within each group of K samples: (G, K). A single sample has 0.

    Liu et al. 2025 (Dr. GRPO): without the group's standard deviation, which would give more weight
    to prompts that are almost always or almost never solved.
    """
    score = finite(scores, "scores", dimensions=2)
    advantage: Array = score - score.mean(axis=1, keepdims=True)
    return advantage


def grpo(scores: npt.ArrayLike, eps: float = 1e-6) -> Array:
    """Return (R - mean) / (std + eps) within each group of K samples: (G, K).

    Shao et al. 2024 (DeepSeekMath), section 4.1.2. std is the sample one (divides by K - 1), as in
    the released implementations (TRL, verl, OpenRLHF); the paper does not specify it. Equal scores,
    and a single sample, carry no signal: 0.
    """
    score = finite(scores, "scores", dimensions=2)
    advantage: Array = np.zeros_like(score)
    if score.shape[1] < 2:
        return advantage
    differ = np.ptp(score, axis=1) != 0.0
    score = score[differ]
    spread = score.std(axis=1, ddof=1, keepdims=True) + eps
    advantage[differ] = (score - score.mean(axis=1, keepdims=True)) / spread
    return advantage


def rloo(scores: npt.ArrayLike) -> Array:
    """Return R_i - mean of the others' R within each group of K samples: (G, K).

    REINFORCE leave-one-out (Ahmadian et al. 2024). A single sample has no baseline: its advantage
    is 0, so that it does not train (R itself would be a signal of another magnitude).
    """
    score = finite(scores, "scores", dimensions=2)
    size = score.shape[1]
    if size < 2:
        return np.zeros_like(score)
    advantage: Array = (score - score.mean(axis=1, keepdims=True)) * (size / (size - 1))
    return advantage


def reinforce_plus_plus(
    rewards: npt.ArrayLike, lengths: npt.ArrayLike, gamma: float = 1.0
) -> Array:
    """Return the whitened reward-to-go of every token of the iteration: (N,).

    Hu et al. 2025 (REINFORCE++, the variant without a group baseline). `rewards` are token_rewards
    with the k1 penalty, so the reward-to-go is score - coef * (KL still to come); it is then
    normalized over all tokens of the iteration together, not per prompt.
    """
    return whiten(discounted_sums(rewards, lengths, gamma))


def whiten(values: npt.ArrayLike, *, keep_mean: bool = False) -> Array:
    """Return (x - mean) / std over all tokens, plus the mean with `keep_mean`: (N,).

    Over the whole iteration, never per rank or micro-batch. std divides by the number of tokens.
    `keep_mean` is the reward whitening of Ziegler et al. 2019's code and TRL's PPO: besides
    rescaling it adds the same constant, mean * (1 - 1/std), to every token's reward, and the sum of
    these over a response grows with its length.
    """
    tokens = finite(values, "values")
    if not tokens.size:
        return tokens
    mean = tokens.mean()
    scale = np.sqrt(tokens.var() + VARIANCE_FLOOR)
    white: Array = (tokens - mean) / scale + (mean if keep_mean else 0.0)
    return white
