"""Placement of a campaign's actors: what each needs, and whether the nodes of a cluster have it.

In: a config, and nodes as plain tables. Out: one ActorSpec per actor, the bundles of a placement
group, a mapping of bundles to nodes, and sentences about what is missing. Independent of Ray:
`actors/placement_group.py` talks to the cluster.

separate: every actor is a bundle of its own. colocate: bundle i is GPU i with engine i and learner
rank i, and roles without GPUs of their own share bundle 0, 1, ... On CPU the numbers only matter to
Ray's bookkeeping.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rayhf.config.schema import CampaignConfig, Pool
from rayhf.config.scorers import EngineModel, ScorerEntryConfig
from rayhf.errors import ConfigError

Amounts = dict[str, float]
"""Amount by resource, as Ray counts them: CPU, GPU, custom ones."""

_POOLS: dict[str, Pool] = {"critic": "learner", "evaluator": "scorer"}
_UNITS = {"rollout": "engine", "learner": "rank", "critic": "rank"}
_RESOLUTION = 10_000
"""Ray counts in ten-thousandths."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorSpec:
    """Resources of one actor."""

    role: str
    index: int
    name: str
    """Name for messages: rollout engine 0, learner rank 1, scorer."""
    cpus: float
    gpus: float
    resources: Mapping[str, float]
    """Custom resources."""
    bundle: int
    """Number of its bundle in the placement group, if there is a group."""

    @property
    def needs(self) -> Amounts:
        gpus = {"GPU": self.gpus} if self.gpus else {}
        return {"CPU": self.cpus, **gpus, **self.resources}


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeResources:
    """Resources of one machine of a cluster."""

    name: str
    """Its address."""
    total: Mapping[str, float]
    free: Mapping[str, float]


def actor_specs(
    config: CampaignConfig,
    *,
    critic: bool,
    reference: bool,
    policies: Sequence[str] = ("policy",),
    frozen: Sequence[str] = (),
    generates: bool = True,
) -> list[ActorSpec]:
    """Return the actors of a campaign. Raise ConfigError for a placement that cannot work.

    `policies`: those that are trained. `frozen`: further ones, which only generate.
    `generates`: whether the algorithm trains on completions of the policy.
    """
    _check(config)
    counts = _counts(
        config,
        critic=critic,
        reference=reference,
        policies=policies,
        frozen=frozen,
        generates=generates,
    )
    actors = [(role, index) for role, count in counts.items() for index in range(count)]
    on_gpu = config.cluster.device == "gpu"
    shared = {role: _shares_gpus(config, role) for role in counts}
    # Actors with the same key are in the same bundle; a shared bundle's key is the GPU's number.
    keys = {actor: actor[1] if shared[actor[0]] else actor for actor in actors}
    bundle_of = {key: number for number, key in enumerate(dict.fromkeys(keys.values()))}
    gpus = {role: _gpus(config, role) if on_gpu else 0.0 for role in counts}
    specs: list[ActorSpec] = []
    for actor in actors:
        role, index = actor
        share = gpus[role]
        if shared[role] and share:
            users = sum(1 for other in actors if keys[other] == keys[actor] and gpus[other[0]])
            share = _RESOLUTION // users / _RESOLUTION
        specs.append(
            ActorSpec(
                role=role,
                index=index,
                name=_name(config, role, index, counts[role]),
                cpus=1.0 if on_gpu else 0.25,
                gpus=share,
                resources=config.cluster.resources.get(pool_of(role), {}),
                bundle=bundle_of[keys[actor]],
            )
        )
    return specs


def _counts(
    config: CampaignConfig,
    *,
    critic: bool,
    reference: bool,
    policies: Sequence[str],
    frozen: Sequence[str],
    generates: bool,
) -> dict[str, int]:
    """Return the number of actors of each role."""
    engines = config.rollout.engines * (generates or config.evaluates_completions)
    scores = generates or config.prompts.heldout is not None
    ranks = config.learner.ranks
    counts = {"rollout": engines, "learner": ranks, "critic": ranks * critic}
    for other in policies[1:]:  # each further policy has engines and a learner of its own
        counts[f"rollout {other}"] = engines
        counts[f"learner {other}"] = ranks
    counts |= {f"rollout {name}": engines for name in frozen}
    return {
        **counts,
        "reference": config.reference.replicas * config.reference.ranks * reference,
        "scorer": config.scorer.replicas * (scores and bool(config.scorer.train)),
        "evaluator": len(config.evaluator_scorers),
    }


def _check(config: CampaignConfig) -> None:
    cluster = config.cluster
    tensor_parallel = config.rollout.tensor_parallel
    if cluster.placement == "colocate":
        if tensor_parallel > 1:
            raise ConfigError(
                "cluster.placement colocate gives each engine a share of one GPU; "
                f"rollout.tensor_parallel is {tensor_parallel}, expected 1 (or placement separate)"
            )
        if config.run.max_staleness > 0:
            raise ConfigError(
                "cluster.placement colocate runs engines and learners alternately; "
                f"run.max_staleness is {config.run.max_staleness}, expected 0 (or placement "
                "separate)"
            )
    shared = cluster.placement == "colocate" or (cluster.gpus_per_scorer or 1.0) < 1
    for role in ("scorer", "evaluator"):
        judges = [
            entry.loads
            for entry in entries_of(config, role)
            if isinstance(entry.loads, EngineModel) and entry.loads.engine.kv_cache_gib is None
        ]
        if cluster.device == "gpu" and judges and shared:
            raise ConfigError(
                f"the judge {judges[0].model} would take most of a GPU that it shares; set its "
                "kv_cache_gib, for example 4"
            )


def _shares_gpus(config: CampaignConfig, role: str) -> bool:
    """Return whether a role's actors run on the GPUs that engines and learners share."""
    cluster = config.cluster
    if cluster.device == "cpu" or cluster.placement == "separate":
        return False
    own = {"reference": cluster.gpus_per_reference, "scorer": cluster.gpus_per_scorer}
    return own.get(pool_of(role)) is None


def _gpus(config: CampaignConfig, role: str) -> float:
    """Return the GPUs of one actor of a role that shares none."""
    pool = pool_of(role)
    if pool == "rollout":
        return float(config.rollout.tensor_parallel)
    if pool == "scorer":
        needed = any(entry.uses_gpu for entry in entries_of(config, role))
        return (config.cluster.gpus_per_scorer or 1.0) * needed
    return config.cluster.gpus_per_reference or 1.0 if pool == "reference" else 1.0


def role_of(role: str) -> str:
    """Return the role without the name of a further policy: rollout, learner, critic, ..."""
    return role.split()[0]


def pool_of(role: str) -> Pool:
    """Return the pool whose custom resources a role's actors need."""
    kind = role_of(role)
    return _POOLS.get(kind, kind)  # type: ignore[arg-type]


def _name(config: CampaignConfig, role: str, index: int, count: int) -> str:
    sharded = role == "reference" and config.reference.ranks > 1
    unit = "rank" if sharded else _UNITS.get(role_of(role))
    if unit is None:
        return role if count == 1 else f"{role} {index}"
    return f"{role} {unit} {index}"


def entries_of(config: CampaignConfig, role: str) -> tuple[ScorerEntryConfig, ...]:
    """Return the scorers of all actors of a role; none for roles other than scorer, evaluator."""
    if role == "scorer":
        return config.scorer.train
    if role != "evaluator":
        return ()
    return tuple(entry for entries in config.evaluator_scorers.values() for entry in entries)


def members(specs: Sequence[ActorSpec]) -> list[list[ActorSpec]]:
    """Return the actors of each bundle."""
    return [
        [spec for spec in specs if spec.bundle == number]
        for number in range(1 + max(spec.bundle for spec in specs))
    ]


def bundles(specs: Sequence[ActorSpec]) -> list[Amounts]:
    """Return the placement group's bundles: the sum of what their actors need.

    Actors that share a GPU get a whole one.
    """
    result = []
    for group in members(specs):
        bundle: Amounts = {}
        for spec in group:
            for resource, amount in spec.needs.items():
                bundle[resource] = round(bundle.get(resource, 0.0) + amount, 4)
        if sum(1 for spec in group if spec.gpus) > 1:
            bundle["GPU"] = float(math.ceil(bundle["GPU"]))
        result.append(bundle)
    return result


# ------------------------------------------------------------------------------- bundles on nodes


def pack(requests: Sequence[Amounts], nodes: Sequence[NodeResources]) -> list[str | None]:
    """Return for each bundle the name of a node with room for it, or None.

    Largest bundles first, and onto few nodes: a prediction of Ray's decision, not the decision.
    """
    free = {node.name: dict(node.free) for node in nodes}
    used: set[str] = set()
    homes: list[str | None] = [None] * len(requests)

    def size(number: int) -> tuple[float, ...]:
        bundle = requests[number]
        return (-bundle.get("GPU", 0.0), -len(bundle), -bundle["CPU"], number)

    def preference(name: str) -> tuple[float, ...]:
        return (name not in used, free[name].get("GPU", 0.0), -free[name].get("CPU", 0.0))

    for number in sorted(range(len(requests)), key=size):
        fitting = [name for name, room in free.items() if fits(requests[number], room)]
        if not fitting:
            continue
        home = min(fitting, key=preference)
        for resource, amount in requests[number].items():
            free[home][resource] = round(free[home][resource] - amount, 4)
        used.add(home)
        homes[number] = home
    return homes


def fits(bundle: Amounts, room: Mapping[str, float]) -> bool:
    return all(amount <= room.get(resource, 0.0) for resource, amount in bundle.items())


def cores_per_gpu(nodes: Sequence[NodeResources]) -> int | None:
    """Return the CPU cores that one GPU's actors may use on every node; None without any GPU."""
    shares = [
        node.total.get("CPU", 0.0) / node.total["GPU"] for node in nodes if node.total.get("GPU")
    ]
    return max(1, int(min(shares))) if shares else None


def impossible(specs: Sequence[ActorSpec], nodes: Sequence[NodeResources]) -> str | None:
    """Return why these nodes can never hold the actors, even without other users.

    None where that cannot be said.
    """
    requests = bundles(specs)
    resources = {resource: 0.0 for bundle in requests for resource in bundle}
    for resource, _ in _most_specific(resources):
        requested = sum(bundle.get(resource, 0.0) for bundle in requests)
        available = sum(node.total.get(resource, 0.0) for node in nodes)
        if requested > available:
            return (
                f"{requested:g} {resource} requested ({_by_role(specs, resource)}), "
                f"{available:g} available on {len(nodes)} node(s)"
            )
    for group, bundle in zip(members(specs), requests, strict=True):
        if not any(fits(bundle, node.total) for node in nodes):
            empty = [
                NodeResources(name=node.name, total=node.total, free=node.total) for node in nodes
            ]
            return _no_node(group, bundle, empty, "has")
    return None


def crowded(specs: Sequence[ActorSpec], nodes: Sequence[NodeResources]) -> str:
    """Return which bundle has no room among the free resources."""
    requests = bundles(specs)
    homes = pack(requests, nodes)
    homeless = [number for number, home in enumerate(homes) if home is None]
    if not homeless:
        return (
            f"{len(requests)} bundles were not placed, although the nodes appear to have room; "
            "see `ray status`"
        )
    left = [_without_placed(node, requests, homes) for node in nodes]
    first = homeless[0]
    reason = _no_node(members(specs)[first], requests[first], left, "has left")
    if len(requests) > 1:
        reason += f"; {len(homeless)} of {len(requests)} bundles have no room"
    return reason


def _without_placed(
    node: NodeResources, requests: Sequence[Amounts], homes: Sequence[str | None]
) -> NodeResources:
    """Return a node without what the bundles take that are placed on it."""
    free = dict(node.free)
    for bundle, home in zip(requests, homes, strict=True):
        if home == node.name:
            for resource, amount in bundle.items():
                free[resource] = round(free[resource] - amount, 4)
    return NodeResources(name=node.name, total=node.total, free=free)


def _no_node(
    group: Sequence[ActorSpec], bundle: Amounts, nodes: Sequence[NodeResources], has: str
) -> str:
    """Return a sentence about a bundle that no node can hold, and the best node."""
    actors = " with ".join(spec.name for spec in group)
    if not nodes:
        return f"{actors} needs {amounts(bundle)}, and there is no node"

    def coverage(node: NodeResources) -> list[float]:
        return [
            min(1.0, node.free.get(resource, 0.0) / amount)
            for resource, amount in _most_specific(bundle)
        ]

    best = max(nodes, key=coverage)
    return (
        f"{actors} needs {amounts(bundle)} on one node; the best one, {best.name}, {has} "
        f"{amounts(best.free, bundle)}"
    )


def _most_specific(bundle: Mapping[str, float]) -> list[tuple[str, float]]:
    """Return the resources, first custom ones, which pin an actor most, then GPUs, then CPUs."""
    return sorted(bundle.items(), key=lambda item: (item[0] == "CPU", item[0] == "GPU"))


def amounts(of: Mapping[str, float], resources: Mapping[str, float] | None = None) -> str:
    """Return a text like "4 GPU and 1 CPU": of all resources, or of `resources` even if missing."""
    shown = [(name, of.get(name, 0.0)) for name, _ in _most_specific(resources or of)]
    return " and ".join(f"{amount:g} {name}" for name, amount in shown)


def _by_role(specs: Sequence[ActorSpec], resource: str) -> str:
    totals: Amounts = {}
    for spec in specs:
        totals[spec.role] = totals.get(spec.role, 0.0) + spec.needs.get(resource, 0.0)
    return ", ".join(f"{role} {amount:.4g}" for role, amount in totals.items() if amount)
