"""What everybody will need, for `rayhf check`: each actor's memory, the run directory's bytes, and
what that cannot be.

In: a config, its specs and the models' config.json files. Out: rows for tables, and PlacementError
or ConfigError.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Literal

from rayhf.algorithms.base import (
    Algorithm,
    TrainsCritic,
    TrainsSeveralPolicies,
    policies_of,
)
from rayhf.config.schema import CampaignConfig
from rayhf.config.scorers import ClassifierModel, EngineModel, ScorerEntryConfig
from rayhf.errors import ConfigError, PlacementError
from rayhf.models.source import model_length
from rayhf.planning import memory as estimate
from rayhf.planning.memory import BYTES, GIB, Disk, Memory, Shape
from rayhf.planning.placement import ActorSpec, members, role_of
from rayhf.planning.preflight import Derived

ShapeOf = Callable[[Path], Shape]
_TIGHT = 0.9
"""Of a GPU. Estimates are not better than that."""
_LESS = {
    "learner": "more learner.ranks, zero_stage 3, offload, activation_checkpointing, policy.lora, or a smaller token_budget",
    "rollout": "a smaller rollout.memory_fraction or kv_cache_gib, or more tensor_parallel",
    "reference": "a smaller reference.token_budget, or a larger cluster.gpus_per_reference",
    "scorer": "a smaller token_budget, or a larger cluster.gpus_per_scorer",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """One actor's memory."""

    spec: ActorSpec
    memory: Memory


class Plan:
    """The estimates of one campaign. Raises ConfigError where a model has no config.json to
    estimate from."""

    def __init__(
        self, config: CampaignConfig, algorithm: Algorithm, derived: Derived, *, base: Path
    ) -> None:
        self.config, self.algorithm, self.derived, self.base = config, algorithm, derived, base
        self._shape: ShapeOf = cache(lambda model: estimate.read_shape(base / model, key="model"))

    @cached_property
    def length(self) -> int:
        """Prompt plus response, in tokens."""
        text = (self.base / self.config.policy.model / "config.json").read_text(encoding="utf-8")
        return (
            self.config.policy.max_length
            or model_length(json.loads(text))
            or self.config.rollout.max_tokens
        )

    def model_of(self, policy: str) -> Path:
        """What a policy starts from."""
        if policy != "policy" and isinstance(self.algorithm, TrainsSeveralPolicies):
            return self.algorithm.other_policy(policy).model or self.config.policy.model
        return self.config.policy.model

    # ------------------------------------------------------------------------------------------------------ memory

    def needs(self, found: Sequence[ActorSpec], gpu_bytes: float | None) -> list[Need]:
        """`gpu_bytes`: of one GPU; None on CPU, and where nobody knows it."""
        return [Need(spec=spec, memory=self._memory(spec, gpu_bytes)) for spec in found]

    def _memory(self, spec: ActorSpec, gpu_bytes: float | None) -> Memory:
        config, kind = self.config, role_of(spec.role)
        device = config.cluster.device
        policy = spec.role.removeprefix(kind).strip() or "policy"
        if kind == "rollout":
            shape = self._shape(self.model_of(policy))
            return estimate.engine_memory(
                shape, config.rollout, dtype=config.policy.dtype, device=device, gpu_bytes=gpu_bytes
            )
        if kind == "reference":
            shape = self._shape(config.reference.model or config.policy.model)
            return estimate.reference_memory(
                shape, config.reference, dtype=config.policy.dtype, device=device
            )
        if kind in ("scorer", "evaluator"):
            return self._scorer_memory(spec, gpu_bytes)
        memory = partial(estimate.learner_memory, config=config.learner, device=device)
        if kind == "critic":
            return memory(
                self._shape(config.learner.critic_model or config.policy.model), critic=True
            )
        entropy = self.algorithm.loss().entropy != "off"
        return memory(self._shape(self.model_of(policy)), lora=config.policy.lora, entropy=entropy)

    def _scorer_memory(self, spec: ActorSpec, gpu_bytes: float | None) -> Memory:
        device = self.config.cluster.device
        parts = [self._entry_memory(entry, gpu_bytes) for entry in self._entries(spec)]
        return Memory(
            weights=sum(part.weights for part in parts),
            activations=max(
                (part.activations for part in parts), default=0.0
            ),  # one after the other
            logits=max((part.logits for part in parts), default=0.0),
            cache=sum(part.cache for part in parts),
            framework=estimate.FRAMEWORK[device]["scorer"] if spec.gpus or device == "cpu" else 0.0,
        )

    def _entries(self, spec: ActorSpec) -> Sequence[ScorerEntryConfig]:
        config = self.config
        if spec.role == "scorer":
            return config.scorer.train
        return list(config.evaluator_scorers.values())[spec.index]

    def _entry_memory(self, entry: ScorerEntryConfig, gpu_bytes: float | None) -> Memory:
        match entry.loads:
            case EngineModel(model=model, dtype=dtype, engine=engine):
                return estimate.engine_memory(
                    self._shape(model),
                    engine,
                    dtype=dtype,
                    device=self.config.cluster.device,
                    gpu_bytes=gpu_bytes,
                )
            case ClassifierModel(model=model, dtype=dtype, token_budget=token_budget):
                return estimate.classifier_memory(self._shape(model), token_budget, dtype=dtype)
        return Memory()

    def weights(self, *, whole: bool = False) -> float:
        """Bytes that travel to every engine in a sync: with LoRA the adapters, unless `whole`."""
        models, lora = (
            [self._shape(self.model_of(policy)) for policy in policies_of(self.algorithm)],
            self.config.policy.lora,
        )
        if lora and not whole:
            return float(
                sum(shape.adapters(lora) for shape in models) * BYTES[self.config.learner.dtype]
            )
        return float(sum(shape.parameters for shape in models) * BYTES[self.config.policy.dtype])

    @property
    def moves(self) -> bool:
        """There is a reference that follows the policy."""
        schedule = self.algorithm.reference
        return schedule is not None and schedule.moves and not schedule.is_learner

    def sequences(self, memory: Memory) -> float:
        """Of the longest length that an engine can hold at once."""
        return estimate.sequences_in_cache(
            self._shape(self.config.policy.model),
            memory.cache,
            dtype=self.config.policy.dtype,
            length=self.length,
            tensor_parallel=self.config.rollout.tensor_parallel,
        )

    # -------------------------------------------------------------------------------------------------------- disk

    def disk(self) -> Disk:
        config, algorithm = self.config, self.algorithm
        policies = [self._shape(self.model_of(policy)) for policy in policies_of(algorithm)]
        lora = config.policy.lora
        trained = [shape.adapters(lora) if lora else shape.parameters for shape in policies]
        if isinstance(algorithm, TrainsCritic):
            trained.append(self._shape(config.learner.critic_model or config.policy.model).body)
        reference = 0.0
        if self.moves:
            assert algorithm.reference is not None
            float32 = algorithm.reference.averages
            reference = policies[0].parameters * (4.0 if float32 else BYTES[config.policy.dtype])
        return estimate.disk(
            config.run,
            trained=trained,
            reference=reference,
            exported=float(
                sum(shape.parameters for shape in policies) * BYTES[config.learner.dtype]
            ),
            responses=self.derived.samples_per_round,
            tokens=config.rollout.max_tokens,
            length=self.length,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Load:
    """What lies on one GPU at one time, or on somebody's share of one; in bytes."""

    who: str
    when: str
    parts: Mapping[str, float]
    limit: float
    advice: str

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    def __str__(self) -> str:
        return f"{self.who} needs about {_gib(self.total)} GiB{self.when}, and there are {_gib(self.limit)}"


def check_gpus(
    needs: Sequence[Need], gpu_bytes: float, *, colocate: bool, published: float = 0.0
) -> list[str]:
    """Who comes close to the limit. Raises PlacementError where an estimate is more than a GPU, or
    a share of one, has.

    `published`: bytes of new weights that lie on a shared GPU until its engine has loaded them
    (transport cuda_ipc).
    """
    by_name = {need.spec.name: need.memory for need in needs}
    groups = [
        [spec for spec in group if spec.gpus] for group in members([need.spec for need in needs])
    ]
    loads: list[_Load] = []
    for group in groups:
        if colocate and len(group) > 1:
            loads += [
                _turn(group, by_name, gpu_bytes, "engines", {"new weights": published}),
                _turn(group, by_name, gpu_bytes, "learners", {}),
            ]
        else:
            loads += [_alone(spec, by_name[spec.name], gpu_bytes) for spec in group]
    for load in loads:
        if load.total > load.limit:
            parts = ", ".join(
                f"{name} {_gib(part)}"
                for name, part in load.parts.items()
                if part > 0.01 * load.total
            )
            raise PlacementError(f"memory: {load} ({parts}); expected {load.advice}")
    return list(dict.fromkeys(str(load) for load in loads if load.total > _TIGHT * load.limit))


def _turn(
    group: Sequence[ActorSpec],
    by_name: Mapping[str, Memory],
    gpu_bytes: float,
    side: Literal["engines", "learners"],
    further: Mapping[str, float],
) -> _Load:
    """A shared GPU while it is one side's turn: of the other side only the framework is left."""
    asleep = ("learner", "critic") if side == "engines" else ("rollout",)
    parts = {
        spec.name: by_name[spec.name].framework
        if role_of(spec.role) in asleep
        else by_name[spec.name].total
        for spec in group
    }
    return _Load(
        who="a shared GPU",
        when=f" while {side} work",
        parts={**parts, **further},
        limit=gpu_bytes,
        advice=("a lower rollout.memory_fraction" if side == "engines" else _LESS["learner"])
        + ", or cluster.gpus_per_reference and gpus_per_scorer, which place the small roles elsewhere",
    )


def _alone(spec: ActorSpec, memory: Memory, gpu_bytes: float) -> _Load:
    kind = {"critic": "learner", "evaluator": "scorer"}.get(role_of(spec.role), role_of(spec.role))
    return _Load(
        who=spec.name,
        when=" on its share of a GPU" if spec.gpus < 1 else " on a GPU",
        parts={field.name: getattr(memory, field.name) for field in fields(memory)},
        limit=gpu_bytes * min(1.0, spec.gpus),
        advice=_LESS[kind],
    )


def check_cache(plan: Plan, needs: Sequence[Need]) -> None:
    """Raises PlacementError where an engine's cache does not hold one sequence."""
    for need in needs:
        if role_of(need.spec.role) == "rollout" and plan.sequences(need.memory) < 1:
            raise PlacementError(
                f"memory: {need.spec.name} has about {_gib(max(0.0, need.memory.cache))} GiB for keys and values, and one "
                f"sequence of {plan.length} tokens needs more; expected a larger rollout.memory_fraction or kv_cache_gib, more "
                "tensor_parallel, or a smaller policy.max_length"
            )


def check_disk(disk: Disk, run: Path) -> str:
    """What is free there, in words. Raises ConfigError where not even one checkpoint fits."""
    place = run.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < disk.checkpoint + disk.policies:
        raise ConfigError(
            f"run.dir {run}: one checkpoint and the exported policy take about {_gib(disk.checkpoint + disk.policies)} GiB, "
            f"{_gib(free)} are free there; expected a run.dir with more room"
        )
    used = (
        sum(file.stat().st_size for file in run.rglob("*") if file.is_file()) if run.exists() else 0
    )
    short = disk.total - used - free
    return f"{_gib(free)} GiB free" + (
        f"; {_gib(short)} GiB short in the end: lower run.keep_every" if short > 0 else ""
    )


def _gib(amount: float) -> str:
    return f"{amount / GIB:.1f}"
