"""The plan that `rayhf check` prints: each actor's memory, the run directory's bytes, and refusals.

In: a config, its actor specs and the models' config.json files. Out: numbers for tables, and
PlacementError or ConfigError for what cannot fit.
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
    population_of,
)
from rayhf.config.models import ModelName
from rayhf.config.schema import CampaignConfig
from rayhf.config.scorers import ClassifierModel, EngineModel, ScorerEntryConfig
from rayhf.errors import ConfigError, PlacementError
from rayhf.models.hub import local_directory
from rayhf.models.source import model_length
from rayhf.planning import memory as estimate
from rayhf.planning.disk import Disk, disk
from rayhf.planning.memory import GIB, Memory
from rayhf.planning.placement import ActorSpec, members, role_of
from rayhf.planning.preflight import Derived
from rayhf.planning.shape import BYTES, Shape, read_shape

ShapeOf = Callable[[ModelName], Shape]
_TIGHT = 0.9
"""Share of a GPU above which an estimate is too inaccurate to be sure."""
_ADVICE = {
    "learner": "more learner.ranks, zero_stage 3, offload, activation_checkpointing, policy.lora, "
    "or a smaller token_budget",
    "rollout": "a smaller rollout.memory_fraction or kv_cache_gib, or more tensor_parallel",
    "reference": "a smaller reference.token_budget, a larger cluster.gpus_per_reference, or more "
    "reference.ranks",
    "scorer": "a smaller token_budget, or a larger cluster.gpus_per_scorer",
}
_POOLS = {"critic": "learner", "evaluator": "scorer"}


def has_average(config: CampaignConfig, spec: ActorSpec) -> bool:
    """Whether an actor of the reference holds its moving average: every replica, but one rank."""
    return config.reference.ranks == 1 or spec.index == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """Memory of one actor."""

    spec: ActorSpec
    memory: Memory


class Plan:
    """Estimates for one campaign. Raises ConfigError where a model lacks a config.json."""

    def __init__(
        self, config: CampaignConfig, algorithm: Algorithm, derived: Derived, *, base: Path
    ) -> None:
        self.config = config
        self.algorithm = algorithm
        self.derived = derived
        self.base = base
        self._shape: ShapeOf = cache(
            lambda model: read_shape(local_directory(model, base), key="model")
        )

    @property
    def config_file(self) -> Path:
        """The policy's config.json."""
        return local_directory(self.config.policy.model, self.base) / "config.json"

    @cached_property
    def length(self) -> int:
        """Maximum tokens of a prompt with its completion."""
        text = self.config_file.read_text(encoding="utf-8")
        return (
            self.config.policy.max_length
            or model_length(json.loads(text))
            or self.config.rollout.max_tokens
        )

    def model_of(self, policy: str) -> ModelName:
        """Return the model that a policy starts from."""
        if policy != "policy" and isinstance(self.algorithm, TrainsSeveralPolicies):
            return self.algorithm.other_policy(policy).model or self.config.policy.model
        return self.config.policy.model

    # ------------------------------------------------------------------------------------- memory

    def needs(self, specs: Sequence[ActorSpec], gpu_bytes: float | None) -> list[Need]:
        """Return the memory of each actor.

        `gpu_bytes`: memory of one GPU; None on CPU, and where it is unknown. Raises ConfigError
        where an engine cannot be divided as configured.
        """
        self._check_heads()
        return [Need(spec=spec, memory=self._memory(spec, gpu_bytes)) for spec in specs]

    def _check_heads(self) -> None:
        parts = self.config.rollout.tensor_parallel
        for model in map(self.model_of, policies_of(self.algorithm)):
            heads = self._shape(model).heads
            if heads % parts:
                divisors = [str(n) for n in range(1, heads + 1) if heads % n == 0]
                raise ConfigError(
                    f"rollout.tensor_parallel is {parts}, but {model} has {heads} attention heads; "
                    f"expected a divisor: {', '.join(divisors)}"
                )

    def _memory(self, spec: ActorSpec, gpu_bytes: float | None) -> Memory:
        config = self.config
        device = config.cluster.device
        dtype = config.policy.dtype
        role = role_of(spec.role)
        policy = spec.role.removeprefix(role).strip() or "policy"
        scaled = config.rollout.temperature != 1
        if role == "rollout":
            shape = self._shape(self.model_of(policy))
            return estimate.engine_memory(
                shape, config.rollout, dtype=dtype, device=device, gpu_bytes=gpu_bytes
            )
        if role == "reference":
            shape = self._shape(config.reference.model or config.policy.model)
            return estimate.reference_memory(
                shape,
                config.reference,
                dtype=dtype,
                device=device,
                scaled=scaled,
                averages=self.averages and has_average(config, spec),
                past=population_of(self.algorithm).size > 0,
            )
        if role in ("scorer", "evaluator"):
            return self._scorer_memory(spec, gpu_bytes)
        memory = partial(estimate.learner_memory, config=config.learner, device=device)
        if role == "critic":
            shape = self._shape(config.learner.critic_model or config.policy.model)
            return memory(shape, critic=True)
        return memory(
            self._shape(self.model_of(policy)),
            lora=config.policy.lora,
            entropy=self.algorithm.loss().entropy != "off",
            scaled=scaled,
        )

    def trained(self, spec: ActorSpec) -> int:
        """Return the number of parameters that a learner or a critic trains."""
        if role_of(spec.role) == "critic":
            shape = self._shape(self.config.learner.critic_model or self.config.policy.model)
            return shape.body + shape.hidden
        policy = spec.role.removeprefix("learner").strip() or "policy"
        shape = self._shape(self.model_of(policy))
        lora = self.config.policy.lora
        return shape.adapters(lora) if lora else shape.parameters

    def _scorer_memory(self, spec: ActorSpec, gpu_bytes: float | None) -> Memory:
        device = self.config.cluster.device
        parts = [self._entry_memory(entry, gpu_bytes) for entry in self._entries(spec)]
        return Memory(
            weights=sum(part.weights for part in parts),
            # The models run one after the other.
            activations=max((part.activations for part in parts), default=0.0),
            logits=max((part.logits for part in parts), default=0.0),
            cache=sum(part.cache for part in parts),
            framework=estimate.FRAMEWORK[device]["scorer"] if spec.gpus or device == "cpu" else 0.0,
        )

    def _entries(self, spec: ActorSpec) -> Sequence[ScorerEntryConfig]:
        """Return the scorers of one actor."""
        if spec.role == "scorer":
            return self.config.scorer.train
        return list(self.config.evaluator_scorers.values())[spec.index]

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
        """Return the bytes that every engine gets in a sync.

        With LoRA the adapters, unless `whole`.
        """
        shapes = [self._shape(self.model_of(policy)) for policy in policies_of(self.algorithm)]
        lora = self.config.policy.lora
        if lora and not whole:
            adapters = sum(shape.adapters(lora) for shape in shapes)
            return float(adapters * BYTES[self.config.learner.dtype])
        return float(sum(shape.parameters for shape in shapes) * BYTES[self.config.policy.dtype])

    @property
    def moves(self) -> bool:
        """Whether there is a reference that follows the policy."""
        schedule = self.algorithm.reference
        return schedule is not None and schedule.moves and not schedule.is_learner

    @property
    def averages(self) -> bool:
        """Whether the reference is a moving average."""
        schedule = self.algorithm.reference
        return schedule is not None and schedule.averages

    def sequences(self, memory: Memory) -> float:
        """Return how many sequences of maximum length an engine holds."""
        return estimate.sequences_in_cache(
            self._shape(self.config.policy.model),
            memory.cache,
            dtype=self.config.policy.dtype,
            length=self.length,
            tensor_parallel=self.config.rollout.tensor_parallel,
        )

    # --------------------------------------------------------------------------------------- disk

    def disk(self) -> Disk:
        config = self.config
        algorithm = self.algorithm
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
        exported = sum(shape.parameters for shape in policies) * BYTES[config.learner.dtype]
        population = population_of(algorithm)
        past = policies[0].parameters * BYTES[config.learner.dtype] if population.size else 0
        return disk(
            config.run,
            trained=trained,
            reference=reference,
            exported=float(exported),
            past=float(past * (population.size + 1)),
            samples=max(self.derived.samples_per_iteration, config.prompts.batch),
            tokens=min(config.rollout.max_tokens, self.length),
            length=self.length,
            replies=sum(entry.reply_bytes for entry in config.scorer.train),
        )


# ---------------------------------------------------------------------------------------- refusals


@dataclass(frozen=True, slots=True, kw_only=True)
class _Load:
    """Bytes on one GPU at one time, or on one actor's share of it."""

    user: str
    when: str
    parts: Mapping[str, float]
    limit: float
    advice: str

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    def __str__(self) -> str:
        return (
            f"{self.user} needs about {_gib(self.total)} GiB{self.when}, and there are "
            f"{_gib(self.limit)}"
        )


def check_gpus(
    needs: Sequence[Need], gpu_bytes: float, *, colocate: bool, published: float = 0.0
) -> list[str]:
    """Return a sentence about each actor that comes close to the limit.

    Args:
        needs: the actors' memory.
        gpu_bytes: memory of one GPU.
        colocate: engines and learners run alternately on shared GPUs.
        published: bytes of new weights on a shared GPU until its engine has loaded them (transport
            cuda_ipc).

    Raises PlacementError where an estimate is more than a GPU, or a share of one, has.
    """
    memory = {need.spec.name: need.memory for need in needs}
    loads: list[_Load] = []
    for actors in members([need.spec for need in needs]):
        group = [spec for spec in actors if spec.gpus]
        if colocate and len(group) > 1:
            loads.append(
                _shared_load(group, memory, gpu_bytes, "engines", {"new weights": published})
            )
            loads.append(_shared_load(group, memory, gpu_bytes, "learners", {}))
        else:
            loads += [_single_load(spec, memory[spec.name], gpu_bytes) for spec in group]
    for load in loads:
        if load.total > load.limit:
            parts = ", ".join(
                f"{name} {_gib(part)}"
                for name, part in load.parts.items()
                if part > 0.01 * load.total
            )
            raise PlacementError(f"memory: {load} ({parts}); expected {load.advice}")
    return list(dict.fromkeys(str(load) for load in loads if load.total > _TIGHT * load.limit))


def _shared_load(
    group: Sequence[ActorSpec],
    memory: Mapping[str, Memory],
    gpu_bytes: float,
    side: Literal["engines", "learners"],
    further: Mapping[str, float],
) -> _Load:
    """Return the load of a shared GPU while one side runs.

    Of the other side only the framework is left. `further`: bytes beside the actors' own.
    """
    asleep = ("learner", "critic") if side == "engines" else ("rollout",)
    parts = {
        spec.name: memory[spec.name].framework
        if role_of(spec.role) in asleep
        else memory[spec.name].total
        for spec in group
    }
    less = "a lower rollout.memory_fraction" if side == "engines" else _ADVICE["learner"]
    return _Load(
        user="a shared GPU",
        when=f" while {side} run",
        parts={**parts, **further},
        limit=gpu_bytes,
        advice=f"{less}, or cluster.gpus_per_reference and gpus_per_scorer, which place the small "
        "roles elsewhere",
    )


def _single_load(spec: ActorSpec, memory: Memory, gpu_bytes: float) -> _Load:
    role = role_of(spec.role)
    return _Load(
        user=spec.name,
        when=" on its share of a GPU" if spec.gpus < 1 else " on a GPU",
        parts={field.name: getattr(memory, field.name) for field in fields(memory)},
        limit=gpu_bytes * min(1.0, spec.gpus),
        advice=_ADVICE[_POOLS.get(role, role)],
    )


def check_cache(plan: Plan, needs: Sequence[Need]) -> None:
    """Raise PlacementError where an engine's cache does not hold one sequence."""
    for need in needs:
        if role_of(need.spec.role) == "rollout" and plan.sequences(need.memory) < 1:
            raise PlacementError(
                f"memory: {need.spec.name} has about {_gib(max(0.0, need.memory.cache))} GiB for "
                f"keys and values, and one sequence of {plan.length} tokens needs more; expected a "
                "larger rollout.memory_fraction or kv_cache_gib, more tensor_parallel, or a "
                "smaller policy.max_length"
            )


def check_disk(disk: Disk, run: Path) -> str:
    """Return a text about the free space. Raise ConfigError where not one checkpoint fits."""
    place = run.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < disk.checkpoint + disk.policies:
        raise ConfigError(
            f"run.dir {run}: one checkpoint and the exported policy take about "
            f"{_gib(disk.checkpoint + disk.policies)} GiB, {_gib(free)} are free there; expected a "
            "run.dir with more room"
        )
    files = run.rglob("*") if run.exists() else ()
    used = sum(file.stat().st_size for file in files if file.is_file())
    missing = disk.total - used - free
    text = f"{_gib(free)} GiB free"
    if missing > 0:
        text += f"; {_gib(missing)} GiB too little in the end: lower run.keep_every"
    return text


def _gib(amount: float) -> str:
    return f"{amount / GIB:.1f}"
