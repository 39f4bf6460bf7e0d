"""Judge a campaign by its own metrics, as config/guards.py says.

A function of the lines so far and of nothing else, so that a resumed campaign is judged like one
that never stopped. A guard speaks only in an iteration whose line brings its metric. It warns by
that value alone. It pauses when that value and the median of the metric's last 3 are beyond the
threshold: one outlier never pauses, two of three iterations do, and a run that has recovered does
not. (reward_gap and no_signal have rules of their own, over more values.) "First iterations" is the
median of the metric's first 3 values. Cost: the lines of the window and of the beginning, however
long the history is.
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
"""And the message, without the way on."""

FEW = 3
"""Values in a median."""
GAIN_ITERATIONS = 20
"""Within which a policy that narrows must not have lost what it gained."""
BEGINNING = 1000
"""Lines in which the first values are looked for: later ones are not the beginning of anything."""


@dataclass(frozen=True)
class Alarm:
    guard: str
    """The key under `guards` in the config."""
    level: Level
    iteration: int
    message: str
    """One line: metric, value, threshold, and what to do next."""


def check_guards(
    history: History, config: GuardsConfig, *, muted: Collection[str] = ()
) -> list[Alarm]:
    """Return the alarms about the last line, at most one per guard, the worst.

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
    }
    advice = {"warn": "", "pause": ", or `rayhf unpause RUN` to continue"}
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
    """The newest `count` values, oldest first; none where the last line has none."""
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

    A pause needs the last one and `beyond` of them above it, of FEW (or as many as are needed).
    """
    window = values[-max(FEW, beyond) :]
    enough = len(values) >= max(FEW, beyond)
    if (
        pause is not None
        and enough
        and values[-1] > pause
        and sum(v > pause for v in window) >= beyond
    ):
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

    def verdict(name: str) -> Verdict:
        values = _last(history, _reader(name), FEW)
        level = _level(values, limits.warn, limits.pause)
        return level and (
            level,
            f"{name} is {values[-1]:.4g} nats per response, above guards.kl.{level} = {getattr(limits, level):g}: "
            "lower learner.lr, or raise algorithm.loss.beta or algorithm.kl.coef",
        )

    return _worst(verdict(name) for name in sorted(names, reverse=True))


def _entropy(history: History, limits: EntropyGuard) -> Verdict:
    read = _reader("policy/entropy")
    values, start = _last(history, read, FEW), _first(history, read)
    if start is None or start <= 0:
        return None
    level = _level([-v / start for v in values], _negative(limits.warn), _negative(limits.pause))
    if level == "pause" and _pays(history, limits.unless_gain):
        level = "warn" if limits.warn is not None else None
    return level and (
        level,
        f"policy/entropy is {values[-1]:.4g} nats per token, {values[-1] / start:.0%} of the first iterations' {start:.4g}, below "
        f"guards.entropy.{level} = {getattr(limits, level):g}: lower learner.lr, raise rollout.temperature, or raise "
        "algorithm.loss.beta or algorithm.loss.entropy_coef",
    )


def _pays(history: History, gain: float | None) -> bool:
    """Whether the training reward stands above that of the first rounds, and is not being lost."""
    read = _reader("scorer/reward_mean")
    start, spread = _first(history, read), _first(history, _reader("scorer/reward_std"))
    values = _last(history, read, GAIN_ITERATIONS + FEW - 1)
    if gain is None or start is None or not values:
        return False
    now, before, margin = median(values[-FEW:]), median(values[:FEW]), gain * (spread or 0.0)
    return now > start + margin and now >= before - margin


def _truncated(history: History, config: GuardsConfig) -> Verdict:
    limits, read = config.truncated, _reader("rollout/truncated")
    values, start = _last(history, read, FEW), _first(history, read)
    if start is None:
        return None
    level = _level(values, _at_least(2 * start, limits.warn), _at_least(2 * start, limits.pause))
    return level and (
        level,
        f"rollout/truncated is {values[-1]:.0%} of the completions, above guards.truncated.{level} = {getattr(limits, level):g} "
        f"and twice the first iterations' {start:.0%}: raise rollout.max_tokens, or let the reward count against length",
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
        f"rollout/length_mean is {values[-1]:.4g} tokens, {ratios[-1]:.2f} times that of up to {limits.iterations} "
        f"rounds before, {'above' if grown else 'below'} guards.length.{key} = {getattr(limits, key):g}: look at the samples for "
        "padding or empty completions, and let the reward count against it"
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
            f"{task}/sampled falls over the last guards.reward_gap.{level} = {count} evaluations, to "
            f"{history[-1][f'{task}/sampled']:.4g}, while the training reward rises: the scorer is being "
            "gamed; look at the samples, return to an earlier checkpoint, and lower learner.lr or raise algorithm.loss.beta or "
            "algorithm.kl.coef",
        )
        for level, count in levels
        for task in tasks
        if count is not None and _gap(history, task, count, limits.noise)
    )


def _gap(history: History, task: str, count: int, noise: float) -> bool:
    read = _reader(f"{task}/sampled")
    if read(history[-1]) is None:
        return False
    found = list(
        islice(
            (
                (back, v)
                for back, line in enumerate(reversed(history))
                if (v := read(line)) is not None
            ),
            2 * count,
        )
    )
    if len(found) < count or not _rises(
        history[len(history) - 1 - found[count - 1][0] :], f"{task}/reward"
    ):
        return False
    scores, earlier = [v for _, v in found[:count]][::-1], [v for _, v in found[count:]][::-1]
    pairs = list(combinations(scores, 2))
    if sum(new >= old for old, new in pairs) > len(pairs) / 10:
        return False
    steps = [new - old for old, new in pairwise(earlier)]
    usual = median(abs(step - median(steps)) for step in steps) if len(steps) > 1 else 0.0
    return median(scores[: count // 2]) - median(scores[-(count // 2) :]) > noise * usual


def _rises(window: Sequence[Line], name: str) -> bool:
    """Whether the newer half's median training reward is above three quarters of the older half's.
    All rounds count, not only those with an evaluation: a round's mean over other prompts is
    noisy."""
    values = list(_present(window, _reader(name))) or list(
        _present(window, _reader("scorer/reward_mean"))
    )
    half = len(values) // 2
    return half > 0 and median(values[-half:]) > sorted(values[:half])[3 * half // 4]


def _mismatch(history: History, config: GuardsConfig) -> Verdict:
    limits, line = config.mismatch, history[-1]

    def read(of: Line) -> float | None:
        # Signed: over chosen and rejected answers the estimate may be negative.
        value = _value(of, "rollout/mismatch_kl")
        return None if value is None else abs(value)

    values, floor = _last(history, read, FEW), 0.0
    if line.get("learner/steps", 1) > 1 or line.get("staleness/max", 0) > 0:
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
        f"rollout/mismatch_kl is {line['rollout/mismatch_kl']:.4g} nats per token, beyond guards.mismatch.{level} = "
        f"{getattr(limits, level):g}{raised}: check that engines and learner have one dtype (policy.dtype, learner.dtype), "
        "and take fewer optimizer steps a round or a lower learner.lr",
    )


def _no_signal(history: History, config: GuardsConfig) -> Verdict:
    limits = config.no_signal
    values = _last(history, _reader("selection/no_signal"), max(FEW, limits.iterations))
    level = _level(values, limits.warn, limits.pause, beyond=limits.iterations)
    return level and (
        level,
        f"{values[-1]:.0%} of the groups or pairs teach nothing (all completions score alike), above guards.no_signal.{level} = "
        f"{getattr(limits, level):g}: raise rollout.temperature or algorithm.samples, or take harder or easier prompts",
    )
