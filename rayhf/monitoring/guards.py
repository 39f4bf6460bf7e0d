"""Check a campaign's metrics against the thresholds of config/guards.py.

In: the lines of metrics.jsonl so far, and nothing else, so that a resumed campaign is checked like
one that never stopped. Out: alarms about the last line. A guard applies only to an iteration whose
line has its metric. It warns by that value alone. It pauses when that value and the median of the
metric's last 3 values are beyond the threshold: one outlier never pauses, two of three iterations
do, and a run that has recovered does not. (reward_gap and no_signal have their own rules, over more
values.) "First iterations" means the median of the metric's first 3 values. Cost: the lines of the
window and of the beginning, however long the history is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, islice, pairwise
from statistics import median
from typing import Literal

from rayhf.config.guards import EntropyGuard, GuardsConfig, LengthGuard, RewardGapGuard

Level = Literal["warn", "pause"]
Line = Mapping[str, float]
History = Sequence[Line]
Verdict = tuple[Level, str] | None
"""Level and message of an alarm; None: no alarm."""

FEW = 3
"""Values in a median."""
GAIN_ITERATIONS = 20
"""Iterations within which a policy that loses entropy must not lose the reward it has gained."""
BEGINNING = 1000
"""Lines that are searched for a metric's first values."""


@dataclass(frozen=True)
class Alarm:
    """A metric beyond its threshold."""

    guard: str
    """The key under `guards` in the config."""
    level: Level
    iteration: int
    message: str
    """One line: metric, value, threshold, and what to do next."""


def check_guards(
    history: History, config: GuardsConfig, *, muted: Collection[str] = ()
) -> list[Alarm]:
    """Return the alarms about the last line: for each guard at most one, the worst.

    Args:
        history: one line per iteration, as in metrics.jsonl.
        config: the thresholds.
        muted: guards that do not apply, by their keys in the config.
    """
    if not history:
        return []
    iteration = int(history[-1].get("iteration", len(history) - 1))
    verdicts = {
        "kl": _kl(history, config),
        "entropy": _entropy(history, config.entropy),
        "truncated": _truncated(history, config),
        "length": _length(history, config.length),
        "reward_gap": _reward_gap(history, config.reward_gap),
        "mismatch": _mismatch(history, config),
        "no_signal": _no_signal(history, config),
        "drift": _drift(history, config),
    }
    advice = {"warn": "", "pause": ", or accept it with `rayhf unpause RUN`"}
    return [
        Alarm(guard, verdict[0], iteration, verdict[1] + advice[verdict[0]])
        for guard, verdict in verdicts.items()
        if verdict and guard not in muted
    ]


# ---------------------------------------------------------------- reading the history


def _value(line: Line, name: str) -> float | None:
    value = line.get(name)
    return value if value is not None and math.isfinite(value) else None


def _present(lines: Iterable[Line], read: Callable[[Line], float | None]) -> Iterable[float]:
    return (value for line in lines if (value := read(line)) is not None)


def _last(history: History, read: Callable[[Line], float | None], count: int) -> list[float]:
    """Return the newest `count` values, oldest first; none where the last line has none."""
    if read(history[-1]) is None:
        return []
    return list(islice(_present(reversed(history), read), count))[::-1]


def _first(history: History, read: Callable[[Line], float | None]) -> float | None:
    values = list(islice(_present(islice(history, BEGINNING), read), FEW))
    return median(values) if len(values) == FEW else None


def _reader(name: str) -> Callable[[Line], float | None]:
    return lambda line: _value(line, name)


def _level(
    values: Sequence[float], warn: float | None, pause: float | None, *, beyond: int = 2
) -> Level | None:
    """Return the level of `values`, newest last.

    A pause needs the last value above it, and `beyond` of the last max(FEW, beyond) values.
    """
    size = max(FEW, beyond)
    if pause is not None and len(values) >= size and values[-1] > pause:
        above = sum(value > pause for value in values[-size:])
        if above >= beyond:
            return "pause"
    return "warn" if warn is not None and values and values[-1] > warn else None


def _at_least(floor: float, limit: float | None) -> float | None:
    return None if limit is None else max(floor, limit)


def _negative(value: float | None) -> float | None:
    return None if value is None else -value


def _worst(verdicts: Iterable[Verdict]) -> Verdict:
    return max((v for v in verdicts if v), key=lambda v: v[0] == "pause", default=None)


# ---------------------------------------------------------------- guards


def _kl(history: History, config: GuardsConfig) -> Verdict:
    limits = config.kl
    names = [
        n
        for n in history[-1]
        if n == "reference/kl" or (n.startswith("eval/") and n.endswith("/reference_kl"))
    ]

    # Over responses that the policy did not sample itself the estimate may be negative: a large
    # negative one says as much as a positive one that policy and reference are far apart.
    def verdict(name: str) -> Verdict:
        length = (
            "rollout/length_mean"
            if name == "reference/kl"
            else name.removesuffix("reference_kl") + "length"
        )

        def scaled(line: Line) -> float | None:
            """Return the size of the KL of responses of `tokens` tokens at the same per token."""
            kl = _value(line, name)
            tokens = _value(line, length) or 0.0
            return kl if kl is None else abs(kl) / max(1.0, tokens / limits.tokens)

        values = _last(history, scaled, FEW)
        level = _level(values, limits.warn, limits.pause)
        if level is None:
            return None
        kl = history[-1][name]
        limit = getattr(limits, level) * abs(kl) / values[-1]
        return level, (
            f"{name} is {kl:.4g} nats per response, beyond guards.kl.{level} = {limit:.4g} at this "
            "length: lower learner.lr, or raise algorithm.loss.beta or algorithm.kl.coef"
        )

    return _worst(verdict(name) for name in sorted(names, reverse=True))


def _drift(history: History, config: GuardsConfig) -> Verdict:
    limits = config.drift
    values = _last(history, _reader("policy/drift_kl"), FEW)
    level = _level(values, limits.warn, limits.pause)
    return level and (
        level,
        f"policy/drift_kl is {values[-1]:.4g} nats per response, above "
        f"guards.drift.{level} = {getattr(limits, level):g}: the policy is far from the one that "
        "the campaign started with; look at the samples, and lower learner.lr, raise "
        "algorithm.loss.beta, or refresh the reference less often",
    )


def _entropy(history: History, limits: EntropyGuard) -> Verdict:
    read = _reader("policy/entropy")
    values = _last(history, read, FEW)
    start = _first(history, read)
    if start is None or start <= 0:
        return None
    level = _level([-v / start for v in values], _negative(limits.warn), _negative(limits.pause))
    if level == "pause" and _reward_gained(history, limits.unless_gain):
        level = "warn" if limits.warn is not None else None
    return level and (
        level,
        f"policy/entropy is {values[-1]:.4g} nats per token, "
        f"{values[-1] / start:.0%} of the first iterations' {start:.4g}, "
        f"below guards.entropy.{level} = {getattr(limits, level):g}: lower learner.lr, "
        "raise rollout.temperature, or raise algorithm.loss.beta or algorithm.loss.entropy_coef",
    )


def _reward_gained(history: History, gain: float | None) -> bool:
    """Whether the training reward is above the first iterations' and is not falling back."""
    read = _reader("scorer/reward_mean")
    start = _first(history, read)
    spread = _first(history, _reader("scorer/reward_std"))
    values = _last(history, read, GAIN_ITERATIONS + FEW - 1)
    if gain is None or start is None or not values:
        return False
    now = median(values[-FEW:])
    before = median(values[:FEW])
    margin = gain * (spread or 0.0)
    return now > start + margin and now >= before - margin


def _truncated(history: History, config: GuardsConfig) -> Verdict:
    limits = config.truncated
    read = _reader("rollout/truncated")
    values = _last(history, read, FEW)
    start = _first(history, read)
    level: Level | None = None
    if start is not None:
        level = _level(
            values, _at_least(2 * start, limits.warn), _at_least(2 * start, limits.pause)
        )
    if limits.warn is not None and values and values[-1] >= 1:
        return level or "warn", _never_ends(history[-1])
    return level and (
        level,
        f"rollout/truncated is {values[-1]:.0%} of the completions, "
        f"above guards.truncated.{level} = {getattr(limits, level):g} "
        f"and twice the first iterations' {start:.0%}: raise rollout.max_tokens, "
        "or penalize length in the reward",
    )


def _never_ends(line: Line) -> str:
    """Explain why every completion of an iteration was truncated."""
    text = "rollout/truncated is 100%: "
    if line.get("rollout/thinking_unfinished", 0) >= 1:
        return text + (
            "no completion ended its thinking: raise rollout.max_tokens, or set "
            "rollout.thinking.end to the text with which this model ends it"
        )
    return text + (
        "no completion contains a stop token: raise rollout.max_tokens, or name the token that "
        "ends this model's turn in rollout.stop; `rayhf check` prints the stop tokens"
    )


def _length(history: History, limits: LengthGuard) -> Verdict:
    values = _last(history, _reader("rollout/length_mean"), limits.iterations + FEW - 1)
    if len(values) <= FEW or (before := median(values[:FEW])) <= 0:
        return None
    ratios = [v / before for v in values[-FEW:]]
    grown = _level(ratios, limits.warn, limits.pause)
    shrunk = _level(
        [-r for r in ratios], _negative(limits.warn_shrunk), _negative(limits.pause_shrunk)
    )
    level = grown or shrunk
    if level is None:
        return None
    key = level if grown else f"{level}_shrunk"
    return level, (
        f"rollout/length_mean is {values[-1]:.4g} tokens, {ratios[-1]:.2f} times that of up to "
        f"{limits.iterations} iterations before, {'above' if grown else 'below'} "
        f"guards.length.{key} = {getattr(limits, key):g}: look at the samples for padding or empty "
        "completions, and penalize it in the reward"
    )


def _reward_gap(history: History, limits: RewardGapGuard) -> Verdict:
    tasks = sorted(
        n.removesuffix("/sampled")
        for n in history[-1]
        if n.startswith("eval/") and n.endswith("/sampled")
    )
    levels: tuple[tuple[Level, int | None], ...] = (("pause", limits.pause), ("warn", limits.warn))
    return _worst(
        (
            level,
            f"{task}/sampled falls over the last guards.reward_gap.{level} = {count} evaluations, "
            f"to {history[-1][f'{task}/sampled']:.4g}, while the training reward rises: "
            "the policy exploits the scorer; look at the samples, return to an earlier checkpoint, "
            "and lower learner.lr or raise algorithm.loss.beta or algorithm.kl.coef",
        )
        for level, count in levels
        for task in tasks
        if count is not None and _gap(history, task, count, limits.noise)
    )


def _gap(history: History, task: str, count: int, noise: float) -> bool:
    """Whether the last `count` evaluations fall while the training reward rises."""
    read = _reader(f"{task}/sampled")
    if read(history[-1]) is None:
        return False
    newest_first = (
        (index, value)
        for index in range(len(history) - 1, -1, -1)
        if (value := read(history[index])) is not None
    )
    evaluations = list(islice(newest_first, 2 * count))
    if len(evaluations) < count:
        return False
    oldest, _ = evaluations[count - 1]
    if not _rises(history[oldest:], f"{task}/reward"):
        return False
    scores = [value for _, value in evaluations[:count]][::-1]
    earlier = [value for _, value in evaluations[count:]][::-1]
    pairs = list(combinations(scores, 2))
    if sum(new >= old for old, new in pairs) > len(pairs) / 10:
        return False
    steps = [new - old for old, new in pairwise(earlier)]
    usual = median(abs(step - median(steps)) for step in steps) if len(steps) > 1 else 0.0
    return median(scores[: count // 2]) - median(scores[-(count // 2) :]) > noise * usual


def _rises(window: Sequence[Line], name: str) -> bool:
    """Whether the newer half's median training reward is above the older half's upper quartile.

    All iterations count, not only those with an evaluation: one iteration's mean over its own
    prompts is noisy.
    """
    values = list(_present(window, _reader(name))) or list(
        _present(window, _reader("scorer/reward_mean"))
    )
    half = len(values) // 2
    return half > 0 and median(values[-half:]) > sorted(values[:half])[3 * half // 4]


def _mismatch(history: History, config: GuardsConfig) -> Verdict:
    limits = config.mismatch
    line = history[-1]

    def read(line: Line) -> float | None:
        # Over chosen and rejected responses the estimate may be negative.
        value = _value(line, "rollout/mismatch_kl")
        return None if value is None else abs(value)

    values = _last(history, read, FEW)
    floor = 0.0
    if line.get("staleness/max", 0) > 0 or line.get("pairs/earlier", 0) > 0:
        start = _first(history, read)
        if start is None:
            return None
        floor = limits.drift * start
    level = _level(values, _at_least(floor, limits.warn), _at_least(floor, limits.pause))
    raised = (
        f" and {limits.drift:g} times the first iterations' {floor / limits.drift:.2g}"
        if floor
        else ""
    )
    return level and (
        level,
        f"rollout/mismatch_kl is {line['rollout/mismatch_kl']:.4g} nats per token, beyond "
        f"guards.mismatch.{level} = {getattr(limits, level):g}{raised}: see sync/update_lost; set "
        "policy.dtype and learner.dtype alike or learner.sync_rounding=stochastic; where "
        "samples of earlier weights are trained on, lower learner.lr",
    )


def _no_signal(history: History, config: GuardsConfig) -> Verdict:
    limits = config.no_signal
    values = _last(history, _reader("selection/no_signal"), max(FEW, limits.iterations))
    level = _level(values, limits.warn, limits.pause, beyond=limits.iterations)
    return level and (
        level,
        f"{values[-1]:.0%} of the groups or pairs have no signal (all completions score alike), "
        f"above guards.no_signal.{level} = {getattr(limits, level):g}: raise rollout.temperature "
        "or algorithm.samples; use harder prompts where scores are high already, easier ones where "
        "they are low",
    )
