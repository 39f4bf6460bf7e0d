"""Guards: thresholds on a campaign's own metrics.

`warn` prints a warning, `pause` stops the campaign until an operator resumes it, null turns a
threshold off. Each threshold states its source: "common" is a value on which public training
reports and the defaults of other frameworks agree; "ours" was calibrated on the runs of the tiny
presets, so that no successful run comes near a pause.
"""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from rayhf.config.base import Section

Share = Annotated[float, Field(gt=0, lt=1)]
Ratio = Annotated[float, Field(gt=1)]
Evaluations = Annotated[int, Field(ge=2)]


def _ordered(warn: float | None, pause: float | None, *, falling: bool = False) -> None:
    """Raise ValueError where the pause would come before the warning."""
    if warn is not None and pause is not None and (warn < pause if falling else warn > pause):
        raise ValueError(f"a pause at {pause:g} comes before the warning at {warn:g}")


class _Rising(Section):
    """Thresholds that a metric may not exceed; subclasses give types and defaults."""

    warn: float | None = None
    pause: float | None = None

    @model_validator(mode="after")
    def _warn_first(self) -> Self:
        _ordered(self.warn, self.pause)
        return self


class KLGuard(_Rising):
    """|reference/kl| and eval/<task>/reference_kl: KL(policy || reference), in nats per response.

    The thresholds are 2 and 5 times a target of 20 nats, which is ours: the tiny presets' runs stay
    below 6 in evaluations and below 13 in single iterations.
    """

    warn: PositiveFloat | None = 40.0
    pause: PositiveFloat | None = 100.0
    tokens: PositiveInt = 400
    """Mean length of responses, in tokens, up to which the thresholds hold; those of longer ones
    grow in proportion, since every token adds to the KL. By default the pause is at 0.25 nats per
    token: ours."""


class DriftGuard(_Rising):
    """policy/drift_kl: KL(initial policy || policy), in nats per response; for moving references.

    Ours, and not calibrated: therefore it does not pause by default.
    """

    warn: PositiveFloat | None = 100.0
    pause: PositiveFloat | None = None


class EntropyGuard(Section):
    """policy/entropy (mean over tokens, nats) as a share of that of the first iterations (common).

    An evaluation can mute it (type exploitability does).
    """

    warn: Share | None = 0.5
    pause: Share | None = 0.25
    unless_gain: NonNegativeFloat | None = 0.25
    """No pause while the reward has risen: scorer/reward_mean is above that of the first iterations
    by this many of their scorer/reward_std, and has not lost as much again within 20 iterations.
    Every policy that learns a solvable task loses entropy; without a gain in reward it is a
    collapse. Ours (arithmetic halves its entropy in 8 iterations while it learns); null: always
    pause."""

    @model_validator(mode="after")
    def _warn_first(self) -> Self:
        _ordered(self.warn, self.pause, falling=True)
        return self


class TruncatedGuard(_Rising):
    """rollout/truncated: share of completions cut at rollout.max_tokens (common).

    Applies only where the share has at least doubled since the first iterations: a task that
    truncates from the start does so by design. Where it grows by design, raise the thresholds.
    """

    warn: Share | None = 0.2
    pause: Share | None = 0.5


class LengthGuard(Section):
    """rollout/length_mean as a ratio to its value `iterations` before.

    Limits of 50 % and 100 % growth within 20 iterations are common.
    """

    warn: Ratio | None = 1.5
    pause: Ratio | None = 2.0
    warn_shrunk: Share | None = 0.5
    """Warning threshold of a falling length (common)."""
    pause_shrunk: Share | None = 0.25
    """Pause threshold of a falling length (ours)."""
    iterations: PositiveInt = 20
    """Distance of the compared values, in iterations."""

    @model_validator(mode="after")
    def _warn_first(self) -> Self:
        _ordered(self.warn, self.pause)
        _ordered(self.warn_shrunk, self.pause_shrunk, falling=True)
        return self


class RewardGapGuard(_Rising):
    """Over-optimization: the training reward rises while eval/<task>/sampled falls.

    The thresholds are numbers of evaluations over which both hold. The reward rises where the
    median of the newer half of the iterations is above the upper quartile of the older half;
    eval/<task>/reward counts where it is measured (the training scorer on the same completions),
    else scorer/reward_mean. The evaluation falls where at most a tenth of all pairs of evaluations
    contradict it, and where it falls by more than `noise`.
    """

    warn: Evaluations | None = 3
    pause: Evaluations | None = 6
    noise: NonNegativeFloat = 2.0
    """Smallest fall from the median of the older half of the evaluations to that of the newer half.
    Unit: median absolute deviation of the steps between consecutive evaluations, in as many
    evaluations before. Higher values detect slow falls later. Ours: of 300 simulated healthy
    campaigns of 300 iterations (30 to 150 evaluations; as in tests/unit/test_guards.py, with other
    seeds) 5 are paused, and 18 with a value of 0."""


class MismatchGuard(_Rising):
    """|rollout/mismatch_kl|: KL(rollout || learner) in nats per token, the k1 estimate.

    The thresholds are commonly stated for the mean absolute gap, which is not measured in training;
    as KL they are lenient (a Gaussian gap with KL 0.02 has a mean absolute value of 0.16 nats).
    float32 gives 1e-6; NeMo-RL's recipes require less than 0.002, prime-rl's tests less than 0.01.
    """

    warn: PositiveFloat | None = 0.02
    pause: PositiveFloat | None = 0.1
    drift: NonNegativeFloat = 10.0
    """Multiple of the first iterations' value that must also be exceeded where samples of earlier
    weights are trained on: the policy's own updates add to the value (ours)."""


class NoSignalGuard(_Rising):
    """selection/no_signal: share of an iteration's groups or pairs without signal (common).

    There is no guard on scorer/invalid and scorer/failed: scorer.max_failed stops the iteration
    itself.
    """

    warn: Share | None = 0.6
    pause: Share | None = 0.9
    iterations: PositiveInt = 10
    """Consecutive iterations above `pause` before the campaign pauses. Ours: cyclic self-play has
    ties for up to 4 iterations in a row."""


class GuardsConfig(Section):
    """Monitored metrics; `rayhf unpause` continues after a pause, and nothing is lost."""

    kl: KLGuard = KLGuard()
    drift: DriftGuard = DriftGuard()
    entropy: EntropyGuard = EntropyGuard()
    truncated: TruncatedGuard = TruncatedGuard()
    length: LengthGuard = LengthGuard()
    reward_gap: RewardGapGuard = RewardGapGuard()
    mismatch: MismatchGuard = MismatchGuard()
    no_signal: NoSignalGuard = NoSignalGuard()
