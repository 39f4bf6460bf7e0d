"""Who lives where: the actors a config asks for, what they need, and whether the cluster has it.

separate: every actor has its own share of a GPU pool. colocate: GPU i holds learner rank i and rollout engine i side by side, and
the small roles squeeze in. On CPU the numbers are only Ray's bookkeeping.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rayhf.config.schema import CampaignConfig
from rayhf.config.scorers import ScorerEntry, has_model
from rayhf.errors import ConfigError, PlacementError

COLOCATED = {"rollout": 0.4, "learner": 0.4, "reference": 0.1, "critic": 0.1, "scorer": 0.1, "evaluator": 0.1}
"""Shares of one GPU. Ray counts them; memory is divided by rollout.memory_fraction."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """One actor's place."""

    role: str
    index: int
    cpus: float
    gpus: float
    bundle: int
    """Which bundle of the placement group; on CPU there is no group."""

    @property
    def name(self) -> str:
        return f"{self.role} {self.index}"


def seats(config: CampaignConfig, *, critic: bool, reference: bool, policies: Sequence[str] = ("policy",)) -> list[Seat]:
    """Every actor of a campaign. Raises ConfigError for placements that cannot work."""
    gpu = config.cluster.device == "gpu"
    colocate = gpu and config.cluster.placement == "colocate"
    if not gpu and config.rollout.tensor_parallel > 1:
        raise ConfigError(f"rollout.tensor_parallel is {config.rollout.tensor_parallel} on cpu; expected 1")
    if colocate and config.rollout.tensor_parallel > 1:
        raise ConfigError(
            f"cluster.placement colocate gives each engine a share of one GPU; rollout.tensor_parallel is "
            f"{config.rollout.tensor_parallel}, expected 1 (or placement separate)"
        )
    counts = {"rollout": config.rollout.engines, "learner": config.learner.ranks, "critic": config.learner.ranks * critic}
    for other in policies[1:]:  # each further policy has engines and a learner of its own
        counts |= {f"rollout {other}": config.rollout.engines, f"learner {other}": config.learner.ranks}
    evaluators = int(config.scorer.evaluate is not None) + len(config.evaluations)
    counts |= {"reference": int(reference), "scorer": 1, "evaluator": evaluators}
    found: list[Seat] = []
    for role, count in counts.items():
        for index in range(count):
            whole = _gpus(config, role) if gpu else 0.0
            share = min(whole, COLOCATED[kind_of(role)] / max(1, len(policies))) if colocate else whole
            bundle = index if colocate else len(found)
            found.append(Seat(role=role, index=index, cpus=1.0 if gpu else 0.25, gpus=share, bundle=bundle))
    return found


def kind_of(role: str) -> str:
    """rollout, learner, critic, ...: the first word; a further policy's name may follow."""
    return role.split()[0]


def entries_of(config: CampaignConfig, role: str) -> tuple[ScorerEntry, ...]:
    """The scorers that a role's actors hold; none for other roles."""
    if role == "scorer":
        return config.scorer.train
    if role != "evaluator":
        return ()
    further = (entry for examination in config.evaluations.values() for entry in examination.scorer)
    return (*(config.scorer.evaluate or ()), *further)


def _gpus(config: CampaignConfig, role: str) -> float:
    """GPUs of one actor of a role when it has them for itself."""
    if kind_of(role) == "rollout":
        return float(config.rollout.tensor_parallel)
    if role in ("scorer", "evaluator"):
        return float(any(map(has_model, entries_of(config, role))))
    return 1.0


def bundles(found: list[Seat]) -> list[dict[str, float]]:
    """The placement group's bundles: a whole GPU (or several) each, and the CPUs of who sits there."""
    result: list[dict[str, float]] = []
    for number in sorted({seat.bundle for seat in found}):
        members = [seat for seat in found if seat.bundle == number]
        gpus = sum(seat.gpus for seat in members)
        bundle = {"CPU": sum(seat.cpus for seat in members)}
        if gpus:
            bundle["GPU"] = float(-(-gpus // 1))
        result.append(bundle)
    return result


def check_available(found: list[Seat], nodes: list[dict[str, Any]]) -> None:
    """Raises PlacementError with requested against available where the nodes cannot hold the bundles.

    `nodes` as ray.nodes() lists them. Counts whole bundles per node, so that a bundle larger than any node is found too.
    """
    alive = [node for node in nodes if node.get("Alive", True)]
    wanted = bundles(found)
    total = {kind: sum(b.get(kind, 0.0) for b in wanted) for kind in ("GPU", "CPU")}
    have = {kind: sum(node["Resources"].get(kind, 0.0) for node in alive) for kind in ("GPU", "CPU")}
    largest = {kind: max((b.get(kind, 0.0) for b in wanted), default=0.0) for kind in ("GPU", "CPU")}
    biggest = {kind: max((node["Resources"].get(kind, 0.0) for node in alive), default=0.0) for kind in ("GPU", "CPU")}
    problems = [
        f"{total[kind]:g} {kind}s requested, {have[kind]:g} available on {len(alive)} node(s)"
        for kind in ("GPU", "CPU")
        if total[kind] > have[kind]
    ]
    problems += [
        f"one bundle needs {largest[kind]:g} {kind}s, the largest node has {biggest[kind]:g}"
        for kind in ("GPU", "CPU")
        if largest[kind] > biggest[kind] and total[kind] <= have[kind]
    ]
    if problems:
        who = ", ".join(f"{role} {gpus:g}" for role, gpus in _by_role(found).items() if gpus)
        raise PlacementError(f"the cluster is too small: {'; '.join(problems)}" + (f" (GPUs by role: {who})" if who else ""))


def _by_role(found: list[Seat]) -> dict[str, float]:
    totals: dict[str, float] = {}
    for seat in found:
        totals[seat.role] = round(totals.get(seat.role, 0.0) + seat.gpus, 3)
    return totals
