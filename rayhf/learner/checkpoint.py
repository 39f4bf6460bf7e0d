"""A learner's checkpoint, which any number of ranks can continue: masters and moments by name.

learner.json                  the learner's identity, its progress, and every trained parameter's
                              shape and file number; written last
weights-00000.safetensors     float32 master weights, whole, by parameter name
optimizer-00000.safetensors   the same parameters' `NAME.exp_avg` and `NAME.exp_avg_sq`, float32
random-00000.safetensors      rank 0's random generators: `cpu`, and `cuda` where it has a GPU

Saving walks groups of parameters: every rank sends its shards of a group to their owners (parameter
i belongs to rank i % ranks), and each owner writes whole tensors, so no rank ever holds more than
its share of one group. Loading reads only the rank's own shards, from any number of files. Tensors
are copied, never computed with: every bit is preserved.

Synchronization: all ranks save and load together and see the same directory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, TypedDict, cast

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from rayhf.errors import CheckpointError, StorageError
from rayhf.weights.deepspeed_internals import (
    DeepSpeedEngine,
    ParameterShard,
    TrainedParameter,
    trained_parameters,
    update_model,
)

FORMAT = 1
INDEX = "learner.json"
MOMENTS = ("exp_avg", "exp_avg_sq")
SHARE_BYTES = 256 << 20
"""A rank's share of one group of float32 parameters, in bytes: the size of a file, and of each
buffer while saving. Only a single parameter can be larger."""

Identity = Mapping[str, str | bool]
"""What a learner must have in common with the one that wrote a checkpoint."""
Range = tuple[int, int]
"""First element and number of elements."""


class _Place(TypedDict):
    """Where a parameter is in a checkpoint."""

    shape: Sequence[int]
    file: int


class _Index(TypedDict):
    """What learner.json holds besides the learner's identity."""

    format: int
    ranks: int
    zero_stage: int
    dtype: str
    steps: int
    optimizer_steps: int
    schedule_steps: int
    global_steps: int
    skipped_steps: int
    parameters: dict[str, _Place]


# ----------------------------------------------------------------------------------------- saving


@torch.no_grad()
def save(
    engine: DeepSpeedEngine,
    directory: Path,
    identity: Identity,
    *,
    steps: int,
    share_bytes: int = SHARE_BYTES,
) -> None:
    """Write the checkpoint of a DeepSpeed engine that has taken `steps` optimizer steps.

    Raises StorageError where a file cannot be written.
    """
    rank = dist.get_rank()
    world = dist.get_world_size()
    with _storage_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        if rank == 0:
            # Without its index an older checkpoint no longer counts as one.
            (directory / INDEX).unlink(missing_ok=True)
    dist.barrier()
    parameters = trained_parameters(engine)
    ranges = _ranges_by_rank(engine, parameters)
    places: dict[str, _Place] = {}
    groups = _groups([p.numel() for p in parameters], limit=share_bytes * world // 4)
    for number, group in enumerate(groups):
        owned = [i for i in group if i % world == rank]
        file = number * world + rank
        weights = _collect(engine, parameters, ranges, group, owned, None)
        _write(directory / f"weights-{file:05d}.safetensors", weights)
        moments: dict[str, Tensor] = {}
        for key in MOMENTS:
            whole = _collect(engine, parameters, ranges, group, owned, key)
            moments.update({f"{name}.{key}": tensor for name, tensor in whole.items()})
        _write(directory / f"optimizer-{file:05d}.safetensors", moments)
        for i in group:
            places[parameters[i].name] = {
                "shape": parameters[i].shape,
                "file": number * world + i % world,
            }
    _write(directory / f"random-{rank:05d}.safetensors", _random_state(engine.device))
    dist.barrier()
    if rank == 0:
        content = {**identity, **_index(engine, steps=steps, places=places)}
        with _storage_errors(directory / INDEX):
            (directory / INDEX).write_text(json.dumps(content, indent=1), encoding="utf-8")
    dist.barrier()


def _index(engine: DeepSpeedEngine, *, steps: int, places: dict[str, _Place]) -> _Index:
    # One count for all parameters: DeepSpeed steps every trained parameter, with a gradient of
    # zeros where there is none. (On ranks other than the first, an optimizer group may be padding
    # only, of which no state is kept.)
    optimizer_steps = max(
        (int(state["step"]) for state in engine.basic_optimizer.state.values()), default=0
    )
    return {
        "format": FORMAT,
        "ranks": dist.get_world_size(),
        "zero_stage": engine.zero_optimization_stage(),
        "dtype": str(engine.get_data_types()[0]).removeprefix("torch."),
        "steps": steps,
        "optimizer_steps": optimizer_steps,
        "schedule_steps": engine.lr_scheduler.last_epoch,
        "global_steps": engine.global_steps,
        "skipped_steps": engine.skipped_steps,
        "parameters": places,
    }


def _ranges_by_rank(
    engine: DeepSpeedEngine, parameters: Sequence[TrainedParameter]
) -> list[list[Range]]:
    """Return each rank's range of each parameter.

    At stage 0, where every rank holds everything, this rank's ranges only.
    """
    own = [parameter.range() for parameter in parameters]
    by_rank: list[list[Range]] = [own]
    if engine.zero_optimization_stage() > 0:
        by_rank = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(by_rank, own)
    for parameter, parts in zip(parameters, zip(*by_rank, strict=True), strict=True):
        if sum(numel for _, numel in parts) != parameter.numel():
            raise CheckpointError(
                f"DeepSpeed's shards of {parameter.name} are {parts}, which do not make up "
                f"{parameter.shape}"
            )
    return by_rank


def _groups(numels: Sequence[int], *, limit: int) -> Iterator[range]:
    """Yield runs of parameters of at most `limit` elements together, or of one parameter."""
    start = 0
    size = 0
    for i, numel in enumerate(numels):
        if i > start and size + numel > limit:
            yield range(start, i)
            start = i
            size = 0
        size += numel
    yield range(start, len(numels))


def _collect(
    engine: DeepSpeedEngine,
    parameters: Sequence[TrainedParameter],
    ranges: Sequence[Sequence[Range]],
    group: range,
    owned: Sequence[int],
    key: str | None,
) -> dict[str, Tensor]:
    """Return the parameters of the group that this rank owns, or their moments `key`.

    Whole, in host memory, by name. A collective, except at stage 0.
    """
    rank = dist.get_rank()
    world = dist.get_world_size()

    def value(shard: ParameterShard) -> Tensor:
        if key is None:
            return shard.of(shard.flat).to(engine.device)
        moment = engine.basic_optimizer.state.get(shard.flat, {}).get(key)
        if moment is None:  # before Adam's first step
            return torch.zeros(shard.numel, device=engine.device)
        return shard.of(moment).to(engine.device)

    owners: Sequence[int] = range(world) if len(ranges) > 1 else [rank]
    shards = [
        [s for i in group if i % world == owner and (s := parameters[i].shard)] for owner in owners
    ]
    received = torch.cat([torch.empty(0, device=engine.device), *map(value, chain(*shards))])
    if len(ranges) > 1:
        sent = received
        sent_sizes = [sum(shard.numel for shard in owner_shards) for owner_shards in shards]
        received_sizes = [sum(rank_ranges[i][1] for i in owned) for rank_ranges in ranges]
        received = torch.empty(sum(received_sizes), device=engine.device)
        dist.all_to_all_single(received, sent, received_sizes, sent_sizes)
    whole = {i: torch.empty(parameters[i].numel()) for i in owned}
    position = 0
    for rank_ranges in ranges:
        for i in owned:
            first, numel = rank_ranges[i]
            whole[i][first : first + numel] = received[position : position + numel]
            position += numel
    return {parameters[i].name: tensor.view(parameters[i].shape) for i, tensor in whole.items()}


def _random_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    if tensors:  # a group may have fewer parameters than there are ranks
        with _storage_errors(path):
            save_file(tensors, path, {"format": "pt"})


@contextmanager
def _storage_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise StorageError(f"cannot write {path}: {error}") from error


# ---------------------------------------------------------------------------------------- loading


@torch.no_grad()
def load(engine: DeepSpeedEngine, directory: Path, identity: Identity) -> int:
    """Continue from `save` and return the number of optimizer steps taken.

    The checkpoint may come from other numbers of ranks, ZeRO stages and dtypes. Learning rate,
    schedule and betas are the engine's own; the checkpoint has the position in the schedule. A rank
    that did not exist keeps its random state. Raises CheckpointError, before anything changes,
    where there is no checkpoint, where a file is missing or damaged, or where another kind of
    learner or model wrote it.
    """
    index = _read_index(directory, identity)
    parameters = trained_parameters(engine)
    files = _check_files(directory, index, parameters)
    for file, members in files.items():
        _load_file(engine, directory, file, members)
    optimizer = engine.basic_optimizer
    for state in optimizer.state.values():  # a fused AdamW keeps the count beside its moments
        state["step"] = torch.tensor(
            float(index["optimizer_steps"]), device=state["exp_avg"].device
        )
    update_model(engine)
    _set_schedule(engine.lr_scheduler, optimizer, index["schedule_steps"])
    engine.global_steps = index["global_steps"]
    engine.skipped_steps = index["skipped_steps"]
    if dist.get_rank() < index["ranks"]:
        random = load_file(directory / f"random-{dist.get_rank():05d}.safetensors")
        torch.set_rng_state(random["cpu"])
        if "cuda" in random and engine.device.type == "cuda":
            torch.cuda.set_rng_state(random["cuda"], engine.device)
    return int(index["steps"])


def _load_file(
    engine: DeepSpeedEngine, directory: Path, file: int, members: Sequence[TrainedParameter]
) -> None:
    """Copy this rank's shards of the file's parameters into masters and moments."""
    optimizer = engine.basic_optimizer
    with (
        _open(directory, "weights", file) as weights,
        _open(directory, "optimizer", file) as moments,
    ):
        for parameter in members:
            if (shard := parameter.shard) is None:
                continue
            shard.of(shard.flat).copy_(_read_shard(weights, parameter.name, shard))
            state = optimizer.state[shard.flat]
            for key in MOMENTS:
                if key not in state:  # Adam creates its state in its first step
                    state[key] = torch.zeros_like(shard.flat)
                shard.of(state[key]).copy_(_read_shard(moments, f"{parameter.name}.{key}", shard))


def _read_index(directory: Path, identity: Identity) -> _Index:
    try:
        content: Any = json.loads((directory / INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"no learner checkpoint in {directory}: {error}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(
            f"{directory / INDEX} is not of this version's format {FORMAT}; "
            "start from an exported model"
        )
    for key, value in identity.items():
        if content.get(key) != value:
            raise CheckpointError(
                f"{directory} was written with {key}={content.get(key)}, this learner has "
                f"{key}={value}; continue with {content.get(key)}, or start from an exported model"
            )
    return cast(_Index, content)


def _check_files(
    directory: Path, index: _Index, parameters: Sequence[TrainedParameter]
) -> dict[int, list[TrainedParameter]]:
    """Check the files against the index and return the parameters by file number.

    Every rank reads all headers, so that all of them raise or none does.
    """
    saved = {name: tuple(place["shape"]) for name, place in index["parameters"].items()}
    own = {parameter.name: parameter.shape for parameter in parameters}
    for name in sorted(saved.keys() | own.keys()):
        if saved.get(name) != own.get(name):
            raise CheckpointError(
                f"{directory} is of another model: it has {name} with shape {saved.get(name)}, "
                f"this learner {own.get(name)}"
            )
    files: dict[int, list[TrainedParameter]] = {}
    for parameter in parameters:
        files.setdefault(index["parameters"][parameter.name]["file"], []).append(parameter)
    for file, members in files.items():
        moments = {f"{p.name}.{key}": p.shape for p in members for key in MOMENTS}
        _check_header(directory, "weights", file, {p.name: p.shape for p in members})
        _check_header(directory, "optimizer", file, moments)
    for rank in range(index["ranks"]):
        with _open(directory, "random", rank):
            pass
    return files


def _check_header(
    directory: Path, prefix: str, file: int, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    with _open(directory, prefix, file) as opened:
        names = list(opened.keys())
        parts = {name: opened.get_slice(name) for name in names}
        header = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()}
    if header != {name: (shape, "F32") for name, shape in shapes.items()}:
        raise CheckpointError(
            f"{directory}: {prefix}-{file:05d}.safetensors does not hold what {INDEX} says"
        )


def _open(directory: Path, prefix: str, file: int) -> safe_open:
    path = directory / f"{prefix}-{file:05d}.safetensors"
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from None


def _read_shard(file: safe_open, name: str, shard: ParameterShard) -> Tensor:
    """Return the shard's elements, flat; reads only the rows that contain them."""
    part = file.get_slice(name)  # type: ignore[no-untyped-call]
    shape = part.get_shape()
    if not shape:
        scalar = file.get_tensor(name)  # type: ignore[no-untyped-call]
        return torch.as_tensor(scalar).view(1)
    row = math.prod(shape[1:])
    top = shard.first // row
    bottom = -(-(shard.first + shard.numel) // row)
    rows: Tensor = part[top:bottom]
    return rows.reshape(-1).narrow(0, shard.first - top * row, shard.numel)


def _set_schedule(scheduler: LambdaLR, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Set a LambdaLR to its state after `steps` steps."""
    rates = [
        base * factor(steps)
        for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    scheduler.load_state_dict(
        {**scheduler.state_dict(), "last_epoch": steps, "_step_count": steps + 1, "_last_lr": rates}
    )
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
