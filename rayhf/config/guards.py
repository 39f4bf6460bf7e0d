"""Thresholds on a campaign's own metrics.

`warn` prints a warning, `pause` stops the campaign until someone has looked, null switches one off.
Beside each threshold stands where it is from: "common" is a value that public training reports and
the defaults of other frameworks agree on; "ours" was calibrated on the tiny presets' runs, so that
none of those that learned comes near a pause.
"""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from rayhf.config.base import Section

Share = Annotated[float, Field(gt=0, lt=1)]
Ratio = Annotated[float, Field(gt=1)]
Evaluations = Annotated[int, Field(ge=2)]


def _ordered(warn: float | None, pause: float | None, *, falling: bool = False) -> None:
    """Raises ValueError where the pause would come before the warning."""
    if warn is not None and pause is not None and (warn < pause if falling else warn > pause):
        raise ValueError(f"a pause at {pause:g} comes before the warning at {warn:g}")


class _Rising(Section):
    """A metric that may not rise above its thresholds; subclasses give types and defaults."""

    warn: float | None = None
    pause: float | None = None

    @model_validator(mode="after")
    def _warn_first(self) -> Self:
        _ordered(self.warn, self.pause)
        return self


class KLGuard(_Rising):
    """reference/kl and eval/<task>/reference_kl: KL(policy || reference), in nats per response.

    Not per token. The thresholds are 2 and 5 times a target of 20 nats, which is ours: the tiny
    presets' runs stay below 6 in evaluations and below 13 in single iterations. Responses of
    thousands of tokens may well be further away: raise both.
    """

    warn: PositiveFloat | None = 40.0
    pause: PositiveFloat | None = 100.0


class EntropyGuard(Section):
    """policy/entropy (mean over tokens, nats) as a share of that of the first iterations (common).

    An evaluation can mute it (type exploitability does).
    """

    warn: Share | None = 0.5
    pause: Share | None = 0.25
    unless_gain: NonNegativeFloat | None = 0.25
    """No pause while the narrowing pays: scorer/reward_mean is this many scorer/reward_std of the
    first iterations above them, and has not lost as much again within 20 iterations. Every policy
    that learns a solvable task narrows; it is a collapse where nothing is gained by it. Ours
    (arithmetic halves its entropy in 8 iterations, by learning); null: always pause."""

    @model_validator(mode="after")
    def _warn_first(self) -> Self:
        _ordered(self.warn, self.pause, falling=True)
        return self


class TruncatedGuard(_Rising):
    """rollout/truncated: share of completions cut at rollout.max_tokens (common).

    Only where it has at least doubled since the first iterations: a task that truncates from the
    start does so by design. Where it grows by design, raise the thresholds.
    """

    warn: Share | None = 0.2
    pause: Share | None = 0.5


class LengthGuard(Section):
    """rollout/length_mean against itself `iterations` ago, as a ratio.

    Growth by 50 % and 100 % within 20 iterations is common.
    """

    warn: Ratio | None = 1.5
    pause: Ratio | None = 2.0
    warn_shrunk: Share | None = 0.5
    """-50 % (common)."""
    pause_shrunk: Share | None = 0.25
    """Half of a half (ours)."""
    iterations: PositiveInt = 20

    @model_validator(mode="after")
    def _warn_first(self) -> Self:
        _ordered(self.warn, self.pause)
        _ordered(self.warn_shrunk, self.pause_shrunk, falling=True)
        return self


class RewardGapGuard(_Rising):
    """Over-optimization: the training reward rises while eval/<task>/sampled falls.

    Over this many evaluations. Rises: the newer half of the iterations has a median above three
    quarters of the older half's; of eval/<task>/reward where it is measured (the training scorer on
    the same completions), else of scorer/reward_mean. Falls: at most a tenth of all pairs of the
    evaluations say otherwise, and by more than `noise`.
    """

    warn: Evaluations | None = 3
    pause: Evaluations | None = 6
    noise: NonNegativeFloat = 2.0
    """Between the medians of the older and the newer half, in units of how much the steps from one
    evaluation to the next varied (median absolute deviation) in as many evaluations before. Ours:
    of 300 simulated healthy campaigns of 300 iterations (30 to 150 evaluations; those of
    tests/unit/test_guards.py, further seeds) 5 are paused, with 0 here 18; more sees slow falls
    later."""


class MismatchGuard(_Rising):
    """|rollout/mismatch_kl|: KL(rollout || learner) in nats per token, the k1 estimate.

    The thresholds are commonly stated for the mean absolute gap, which is not measured in training;
    as KL they are lenient (a Gaussian gap with KL 0.02 is 0.16 nats wide on average). float32 gives
    1e-6; NeMo-RL's recipes ask for less than 0.002, prime-rl's tests for less than 0.01.
    """

    warn: PositiveFloat | None = 0.02
    pause: PositiveFloat | None = 0.1
    drift: NonNegativeFloat = 10.0
    """An iteration of several optimizer steps, or a stale one, adds the policy's own movement to
    this metric. There it must also pass this many times the first iterations' value. Ours:
    sppo_game stands at 0.03 with 6 steps in float32."""


class NoSignalGuard(_Rising):
    """selection/no_signal: share of an iteration's groups or pairs that teach nothing (common).

    There is no guard on scorer/invalid and scorer/failed: scorer.max_failed stops the iteration
    itself.
    """

    warn: Share | None = 0.6
    pause: Share | None = 0.9
    iterations: PositiveInt = 10
    """Consecutive iterations beyond `pause` before it pauses. Ours: self-play that cycles ties for
    up to 4 iterations in a row."""


class GuardsConfig(Section):
    """What is watched; a pause leaves the last checkpoint as it is, `rayhf unpause` continues."""

    kl: KLGuard = KLGuard()
    entropy: EntropyGuard = EntropyGuard()
    truncated: TruncatedGuard = TruncatedGuard()
    length: LengthGuard = LengthGuard()
    reward_gap: RewardGapGuard = RewardGapGuard()
    mismatch: MismatchGuard = MismatchGuard()
    no_signal: NoSignalGuard = NoSignalGuard()
