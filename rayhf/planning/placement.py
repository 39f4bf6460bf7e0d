"""Who lives where: the actors a config asks for, what each needs, and whether nodes have it.

In: a config, and nodes as plain tables. Out: actor_specs (one per actor), the bundles of a placement
group, a map of actors onto nodes, and sentences about what is missing. Knows no Ray:
`actors/placement_group.py` asks the cluster.

separate: every actor is a bundle of its own. colocate: bundle i is GPU i with engine i and learner
rank i in it, and whoever has no share of its own squeezes in. On CPU the numbers are only Ray's
bookkeeping.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rayhf.config.schema import CampaignConfig, Pool
from rayhf.config.scorers import EngineModel, ScorerEntryConfig
from rayhf.errors import ConfigError

Amounts = dict[str, float]
"""By resource, as Ray counts it: CPU, GPU, custom ones."""

_POOLS: dict[str, Pool] = {"critic": "learner", "evaluator": "scorer"}
_UNITS = {"rollout": "engine", "learner": "rank", "critic": "rank"}
_GRAIN = 10_000
"""Ray counts in ten-thousandths."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorSpec:
    """One actor's place."""

    role: str
    index: int
    name: str
    """rollout engine 0, learner rank 1, scorer."""
    cpus: float
    gpus: float
    resources: Mapping[str, float]
    """Custom ones."""
    bundle: int
    """Number of its bundle in the placement group, where there is one."""

    @property
    def needs(self) -> Amounts:
        return {"CPU": self.cpus} | ({"GPU": self.gpus} if self.gpus else {}) | dict(self.resources)


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeResources:
    """A machine of the cluster."""

    name: str
    """Its address."""
    total: Mapping[str, float]
    free: Mapping[str, float]


def actor_specs(
    config: CampaignConfig, *, critic: bool, reference: bool, policies: Sequence[str] = ("policy",)
) -> list[ActorSpec]:
    """Every actor of a campaign. Raises ConfigError for placements that cannot work."""
    _check(config)
    counts = {
        "rollout": config.rollout.engines,
        "learner": config.learner.ranks,
        "critic": config.learner.ranks * critic,
    }
    for other in policies[1:]:  # each further policy has engines and a learner of its own
        counts |= {
            f"rollout {other}": config.rollout.engines,
            f"learner {other}": config.learner.ranks,
        }
    evaluators = len(config.evaluator_scorers)
    counts |= {"reference": int(reference), "scorer": 1, "evaluator": evaluators}
    places = [(role, index) for role, count in counts.items() for index in range(count)]
    gpu = config.cluster.device == "gpu"
    shared = {place: _squeezes_in(config, place[0]) for place in places}
    homes = {
        place: place[1] if shared[place] else place for place in places
    }  # a shared bundle's key is the GPU's number
    numbers = {home: number for number, home in enumerate(dict.fromkeys(homes.values()))}
    wants = {place: _gpus(config, place[0]) if gpu else 0.0 for place in places}
    found: list[ActorSpec] = []
    for role, index in places:
        place = (role, index)
        mates = sum(1 for other in places if homes[other] == homes[place] and wants[other])
        gpus = _GRAIN // mates / _GRAIN if shared[place] and wants[place] else wants[place]
        found.append(
            ActorSpec(
                role=role,
                index=index,
                name=_name(role, index, counts[role]),
                cpus=1.0 if gpu else 0.25,
                gpus=gpus,
                resources=config.cluster.resources.get(pool_of(role), {}),
                bundle=numbers[homes[place]],
            )
        )
    return found


def _check(config: CampaignConfig) -> None:
    cluster, tensor_parallel = config.cluster, config.rollout.tensor_parallel
    if cluster.device == "cpu" and tensor_parallel > 1:
        raise ConfigError(f"rollout.tensor_parallel is {tensor_parallel} on cpu; expected 1")
    if cluster.placement == "colocate":
        if tensor_parallel > 1:
            raise ConfigError(
                f"cluster.placement colocate gives each engine a share of one GPU; rollout.tensor_parallel is "
                f"{tensor_parallel}, expected 1 (or placement separate)"
            )
        if config.run.max_staleness > 0:
            raise ConfigError(
                f"cluster.placement colocate lets engines and learners take turns; run.max_staleness is "
                f"{config.run.max_staleness}, expected 0 (or placement separate)"
            )
    shares = cluster.placement == "colocate" or (cluster.gpus_per_scorer or 1.0) < 1
    for role in ("scorer", "evaluator"):
        judges = [
            entry.loads
            for entry in entries_of(config, role)
            if isinstance(entry.loads, EngineModel) and entry.loads.engine.kv_cache_gib is None
        ]
        if cluster.device == "gpu" and judges and shares:
            raise ConfigError(
                f"the judge {judges[0].model} would take most of a GPU that others use too; "
                "set its kv_cache_gib, for example 4"
            )


def _squeezes_in(config: CampaignConfig, role: str) -> bool:
    """Whether a role's actors sit on the GPUs that engines and learners share."""
    cluster = config.cluster
    if cluster.device == "cpu" or cluster.placement == "separate":
        return False
    own = {"reference": cluster.gpus_per_reference, "scorer": cluster.gpus_per_scorer}
    return own.get(pool_of(role)) is None


def _gpus(config: CampaignConfig, role: str) -> float:
    """GPUs of one actor of a role when it shares none."""
    if pool_of(role) == "rollout":
        return float(config.rollout.tensor_parallel)
    if pool_of(role) == "scorer":
        return (config.cluster.gpus_per_scorer or 1.0) * any(
            entry.uses_gpu for entry in entries_of(config, role)
        )
    return config.cluster.gpus_per_reference or 1.0 if pool_of(role) == "reference" else 1.0


def role_of(role: str) -> str:
    """rollout, learner, critic, ...: the first word; a further policy's name may follow."""
    return role.split()[0]


def pool_of(role: str) -> Pool:
    """Whose custom resources a role's actors need."""
    kind = role_of(role)
    return _POOLS.get(kind, kind)  # type: ignore[arg-type]


def _name(role: str, index: int, of: int) -> str:
    unit = _UNITS.get(role_of(role))
    if unit is None:
        return role if of == 1 else f"{role} {index}"
    return f"{role} {unit} {index}"


def entries_of(config: CampaignConfig, role: str) -> tuple[ScorerEntryConfig, ...]:
    """The scorers that a role's actors hold; none for other roles."""
    if role == "scorer":
        return config.scorer.train
    if role != "evaluator":
        return ()
    return tuple(entry for entries in config.evaluator_scorers.values() for entry in entries)


def members(found: Sequence[ActorSpec]) -> list[list[ActorSpec]]:
    """Who sits in which bundle."""
    return [
        [spec for spec in found if spec.bundle == number]
        for number in range(1 + max(spec.bundle for spec in found))
    ]


def bundles(found: Sequence[ActorSpec]) -> list[Amounts]:
    """The placement group's bundles: what their members need together. Members that share a GPU get
    a whole one."""
    result = []
    for group in members(found):
        bundle: Amounts = {}
        for spec in group:
            for kind, amount in spec.needs.items():
                bundle[kind] = round(bundle.get(kind, 0.0) + amount, 4)
        if sum(1 for spec in group if spec.gpus) > 1:
            bundle["GPU"] = float(math.ceil(bundle["GPU"]))
        result.append(bundle)
    return result


def pack(wanted: Sequence[Amounts], nodes: Sequence[NodeResources]) -> list[str | None]:
    """For each bundle the name of a node that has free room for it, the largest bundles first and
    onto few nodes; None where none has. A picture of what Ray will do, not its decision."""
    free = {node.name: dict(node.free) for node in nodes}
    used: set[str] = set()
    homes: list[str | None] = [None] * len(wanted)
    for number in sorted(
        range(len(wanted)),
        key=lambda n: (-wanted[n].get("GPU", 0.0), -len(wanted[n]), -wanted[n]["CPU"], n),
    ):
        fitting = [name for name, room in free.items() if fits(wanted[number], room)]
        if not fitting:
            continue
        home = min(
            fitting,
            key=lambda name: (
                name not in used,
                free[name].get("GPU", 0.0),
                -free[name].get("CPU", 0.0),
            ),
        )
        for kind, amount in wanted[number].items():
            free[home][kind] = round(free[home][kind] - amount, 4)
        used.add(home)
        homes[number] = home
    return homes


def fits(bundle: Amounts, room: Mapping[str, float]) -> bool:
    return all(amount <= room.get(kind, 0.0) for kind, amount in bundle.items())


def impossible(found: Sequence[ActorSpec], nodes: Sequence[NodeResources]) -> str | None:
    """Why these nodes can never hold the actor_specs, whoever else is using them; None where that cannot
    be said."""
    wanted = bundles(found)
    whole = [NodeResources(name=node.name, total=node.total, free=node.total) for node in nodes]
    for kind, _ in _important(dict.fromkeys((kind for bundle in wanted for kind in bundle), 0.0)):
        asked, there = (
            sum(b.get(kind, 0.0) for b in wanted),
            sum(node.total.get(kind, 0.0) for node in nodes),
        )
        if asked > there:
            return f"{asked:g} {kind} requested ({_by_role(found, kind)}), {there:g} available on {len(nodes)} node(s)"
    for number, bundle in enumerate(wanted):
        if not any(fits(bundle, node.total) for node in nodes):
            return _lonely(members(found)[number], bundle, whole, "has")
    return None


def crowded(found: Sequence[ActorSpec], nodes: Sequence[NodeResources]) -> str:
    """Which bundle has no place among what is free now."""
    wanted = bundles(found)
    homes = pack(wanted, nodes)
    lost = [number for number, home in enumerate(homes) if home is None]
    if not lost:
        return f"{len(wanted)} bundles were not placed, although the nodes seem to have room; look at `ray status`"
    rest = f"; {len(lost)} of {len(wanted)} bundles have no place" if len(wanted) > 1 else ""
    after = [NodeResources(name=n.name, total=n.total, free=_left(n, wanted, homes)) for n in nodes]
    return _lonely(members(found)[lost[0]], wanted[lost[0]], after, "has left") + rest


def _left(node: NodeResources, wanted: Sequence[Amounts], homes: Sequence[str | None]) -> Amounts:
    here = [bundle for bundle, home in zip(wanted, homes, strict=True) if home == node.name]
    return {
        kind: round(amount - sum(b.get(kind, 0.0) for b in here), 4)
        for kind, amount in node.free.items()
    }


def _lonely(
    group: Sequence[ActorSpec], bundle: Amounts, nodes: Sequence[NodeResources], has: str
) -> str:
    who = " with ".join(spec.name for spec in group)
    if not nodes:
        return f"{who} needs {amounts(bundle)}, and there is no node"
    best = max(
        nodes, key=lambda node: [min(1.0, node.free.get(k, 0.0) / v) for k, v in _important(bundle)]
    )
    return f"{who} needs {amounts(bundle)} on one node; the best one, {best.name}, {has} {amounts(best.free, bundle)}"


def _important(bundle: Mapping[str, float]) -> list[tuple[str, float]]:
    """Custom resources say most about where somebody belongs, then GPUs."""
    return sorted(bundle.items(), key=lambda item: (item[0] == "CPU", item[0] == "GPU"))


def amounts(of: Mapping[str, float], kinds: Mapping[str, float] | None = None) -> str:
    """4 GPU and 1 CPU; of all kinds, or of `kinds` even where they are missing."""
    shown = [(kind, of.get(kind, 0.0)) for kind, _ in _important(dict(kinds or of))]
    return " and ".join(f"{amount:g} {kind}" for kind, amount in shown)


def _by_role(found: Sequence[ActorSpec], kind: str) -> str:
    totals: Amounts = {}
    for spec in found:
        totals[spec.role] = totals.get(spec.role, 0.0) + spec.needs.get(kind, 0.0)
    return ", ".join(f"{role} {amount:.4g}" for role, amount in totals.items() if amount)
