"""Estimates of host memory on machines with GPUs: states that sleep there, and offloaded ones.

Not compared with measurements: no machine with GPUs was available.
"""

from __future__ import annotations

from collections.abc import Sequence

from rayhf.config.schema import CampaignConfig
from rayhf.errors import PlacementError
from rayhf.planning import memory as estimate
from rayhf.planning.memory import GIB
from rayhf.planning.placement import NodeResources, bundles, pack, role_of
from rayhf.planning.plan import Need, Plan, has_average
from rayhf.planning.preflight import transport_of
from rayhf.planning.shape import BYTES

_TIGHT = 0.9
"""Share of a node above which an estimate is too inaccurate to be sure."""
_OPTIMIZER = 16.0
"""Bytes of an offloaded parameter: float32 master, two moments, and gradient."""


def host_bytes(plan: Plan, need: Need) -> float:
    """Return the host memory of one actor with a GPU.

    colocate: all of a learner's tensors while engines generate (18 bytes for each of its parameters
    in bfloat16, and its buckets); an engine's weights while learners train, unless the object store
    has them; the moving average of a reference.
    """
    config = plan.config
    role = role_of(need.spec.role)
    sleeps = config.cluster.placement == "colocate"
    memory = need.memory
    total = estimate.FRAMEWORK["cpu"].get(role, estimate.FRAMEWORK["cpu"]["scorer"])
    if role == "rollout" and sleeps and transport_of(config) == "cuda_ipc":
        total += memory.weights
    if role == "reference" and plan.averages and has_average(config, need.spec):
        parameters = memory.weights / BYTES[config.policy.dtype] * config.reference.ranks
        total += 4.0 * parameters
    if role in ("learner", "critic"):
        if sleeps:
            total += memory.weights + memory.gradients + memory.optimizer + memory.buffers
        if config.learner.offload:
            total += _OPTIMIZER * plan.trained(need.spec) / config.learner.ranks
    return total


def check_hosts(plan: Plan, needs: Sequence[Need], nodes: Sequence[NodeResources]) -> list[str]:
    """Return a sentence about each node whose memory is nearly used up.

    Actors are placed on nodes as Ray probably will. Raises PlacementError where an estimate is more
    than a node has.
    """
    homes = pack(bundles([need.spec for need in needs]), nodes)
    tight = []
    for node in nodes:
        limit = node.total.get("memory", 0.0) + node.total.get("object_store_memory", 0.0)
        here = [need for need in needs if homes[need.spec.bundle] == node.name]
        if not here or not limit:
            continue
        total = sum(host_bytes(plan, need) for need in here) + _stored(plan)
        text = (
            f"{node.name} needs about {total / GIB:,.0f} GiB of host memory for {len(here)} "
            f"actors, and has {limit / GIB:,.0f}"
        )
        if total > limit:
            raise PlacementError(f"memory: {text}; expected {_advice(plan.config)}")
        if total > _TIGHT * limit:
            tight.append(text)
    return tight


def _stored(plan: Plan) -> float:
    """Return the bytes of weights in a node's object store."""
    stores = transport_of(plan.config) == "object_store" or plan.moves
    return plan.weights(whole=plan.moves) if stores else 0.0


def _advice(config: CampaignConfig) -> str:
    if config.cluster.placement == "colocate":
        return (
            "placement separate, policy.lora, zero_stage 3 over more learner.ranks, or more memory"
        )
    return "learner.offload=false, more learner.ranks, or more memory"
