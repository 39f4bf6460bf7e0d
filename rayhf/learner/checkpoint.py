"""A learner's checkpoint that any number of ranks can continue: float32 masters and Adam's moments
by parameter name.

learner.json                  whose it is, how far it is, and every trained parameter's shape and
                              file number; written last
weights-00000.safetensors     float32 master weights, whole, by parameter name
optimizer-00000.safetensors   the same parameters' `NAME.exp_avg` and `NAME.exp_avg_sq`, float32
random-00000.safetensors      rank 0's random generators: `cpu`, and `cuda` where it has a GPU

Saving walks groups of parameters: every rank sends its shards of a group to their owners (parameter
i belongs to rank i % ranks), and each owner writes whole tensors; nobody ever holds more than its
share of one group. Loading reads only the own shards, from whatever files there are. Tensors are
copied, never computed with: every bit survives.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from rayhf.errors import CheckpointError, StorageError
from rayhf.learner.shards import Shard, Trained, trained, update_model

FORMAT = 1
INDEX = "learner.json"
MOMENTS = ("exp_avg", "exp_avg_sq")
COUNTERS = ("global_steps", "skipped_steps")
"""DeepSpeed's own, for its logs."""
SHARE_BYTES = 256 << 20
"""A rank's share of one group of float32 parameters, in bytes: the size of a file, and of each
buffer while saving. Only a single parameter can be larger."""


# ------------------------------------------------------------------------------------------------------- saving


@torch.no_grad()
def save(
    engine: Any,
    directory: Path,
    kind: Mapping[str, Any],
    *,
    steps: int,
    share_bytes: int = SHARE_BYTES,
) -> None:
    """Write the checkpoint of a DeepSpeed engine into `directory`. All ranks take part and see the
    same directory.

    `kind` is what a learner must have in common with this one to continue it; `steps` are its
    optimizer steps. Raises StorageError where a file cannot be written.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    with _writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        if rank == 0:
            (directory / INDEX).unlink(
                missing_ok=True
            )  # no checkpoint any more, until all of the new one is there
    dist.barrier()
    parameters = trained(engine)
    ranges = _everyones_ranges(engine, parameters)
    places: dict[str, dict[str, Any]] = {}
    for number, group in enumerate(
        _groups([p.numel() for p in parameters], limit=share_bytes * world // 4)
    ):
        owned = [i for i in group if i % world == rank]
        file = number * world + rank
        _write(
            directory / f"weights-{file:05d}.safetensors",
            _collect(engine, parameters, ranges, group, owned, None),
        )
        moments: dict[str, Tensor] = {}
        for key in MOMENTS:
            whole = _collect(engine, parameters, ranges, group, owned, key)
            moments.update({f"{name}.{key}": tensor for name, tensor in whole.items()})
        _write(directory / f"optimizer-{file:05d}.safetensors", moments)
        places.update(
            {
                parameters[i].name: {
                    "shape": parameters[i].shape,
                    "file": number * world + i % world,
                }
                for i in group
            }
        )
    _write(directory / f"random-{rank:05d}.safetensors", _random_state(engine.device))
    dist.barrier()
    if rank == 0:
        content = {
            "format": FORMAT,
            **kind,
            "ranks": world,
            "zero_stage": engine.zero_optimization_stage(),
            "dtype": str(engine.get_data_types()[0]).removeprefix("torch."),
            "steps": steps,
            # One count for all: DeepSpeed steps every trained parameter, with a gradient of zeros
            # where there is none. (On other ranks, not on the first, an optimizer group may be
            # padding only, of which nothing is kept.)
            "optimizer_steps": max(
                (int(state["step"]) for state in engine.basic_optimizer.state.values()), default=0
            ),
            "schedule_steps": engine.lr_scheduler.last_epoch,
            **{name: getattr(engine, name) for name in COUNTERS},
            "parameters": places,
        }
        with _writing(directory / INDEX):
            (directory / INDEX).write_text(json.dumps(content, indent=1), encoding="utf-8")
    dist.barrier()


def _everyones_ranges(engine: Any, parameters: Sequence[Trained]) -> list[list[tuple[int, int]]]:
    """For each rank, each parameter's range there; of a single rank (this one) where everyone holds
    everything."""
    mine = [parameter.range() for parameter in parameters]
    everyone: list[list[tuple[int, int]]] = [mine]
    if engine.zero_optimization_stage() > 0:
        everyone = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyone, mine)
    for parameter, parts in zip(parameters, zip(*everyone, strict=True), strict=True):
        if sum(numel for _, numel in parts) != parameter.numel():
            raise CheckpointError(
                f"DeepSpeed's shards of {parameter.name} are {parts}, which do not make up {parameter.shape}"
            )
    return everyone


def _groups(numels: Sequence[int], *, limit: int) -> Iterator[range]:
    """Runs of parameters of at most `limit` elements together, or of one parameter."""
    start, size = 0, 0
    for i, numel in enumerate(numels):
        if i > start and size + numel > limit:
            yield range(start, i)
            start, size = i, 0
        size += numel
    yield range(start, len(numels))


def _collect(
    engine: Any,
    parameters: Sequence[Trained],
    ranges: Sequence[Sequence[tuple[int, int]]],
    group: range,
    owned: Sequence[int],
    key: str | None,
) -> dict[str, Tensor]:
    """Of the group's parameters those that this rank owns, whole and in host memory; or their
    moments `key`.

    A collective, but where everyone holds everything.
    """
    rank, world = dist.get_rank(), dist.get_world_size()

    def value(shard: Shard) -> Tensor:
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
        sent, sizes = received, [sum(shard.numel for shard in theirs) for theirs in shards]
        counts = [sum(theirs[i][1] for i in owned) for theirs in ranges]
        received = torch.empty(sum(counts), device=engine.device)
        dist.all_to_all_single(received, sent, counts, sizes)
    whole = {i: torch.empty(parameters[i].numel()) for i in owned}
    position = 0
    for theirs in ranges:
        for i in owned:
            first, numel = theirs[i]
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
        with _writing(path):
            save_file(tensors, path, {"format": "pt"})


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise StorageError(f"cannot write {path}: {error}") from error


# ------------------------------------------------------------------------------------------------------ loading


@torch.no_grad()
def load(engine: Any, directory: Path, kind: Mapping[str, Any]) -> int:
    """Continue from `save`, whatever numbers of ranks, ZeRO stages and dtypes wrote and read; the
    number of steps taken.

    All ranks take part. Learning rate, schedule and betas are the engine's own; the checkpoint says
    how far the schedule is. A rank that did not exist keeps its random state. Raises
    CheckpointError, before anything changes, where there is no checkpoint, where a file is missing
    or damaged, or where another kind of learner or model wrote it.
    """
    content = _read_index(directory, kind)
    parameters = trained(engine)
    files = _check_files(directory, content, parameters)
    optimizer = engine.basic_optimizer
    for file, members in files.items():
        with (
            _open(directory, "weights", file) as weights,
            _open(directory, "optimizer", file) as moments,
        ):
            for parameter in members:
                if (shard := parameter.shard) is None:
                    continue
                shard.of(shard.flat).copy_(_read(weights, parameter.name, shard))
                state = optimizer.state[shard.flat]
                for key in MOMENTS:
                    if key not in state:  # Adam makes its state in its first step
                        state[key] = torch.zeros_like(shard.flat)
                    shard.of(state[key]).copy_(_read(moments, f"{parameter.name}.{key}", shard))
    for state in optimizer.state.values():  # a fused AdamW keeps the count beside its moments
        state["step"] = torch.tensor(
            float(content["optimizer_steps"]), device=state["exp_avg"].device
        )
    update_model(engine)
    _set_schedule(engine.lr_scheduler, optimizer, content["schedule_steps"])
    for name in COUNTERS:
        setattr(engine, name, content[name])
    if dist.get_rank() < content["ranks"]:
        random = load_file(directory / f"random-{dist.get_rank():05d}.safetensors")
        torch.set_rng_state(random["cpu"])
        if "cuda" in random and engine.device.type == "cuda":
            torch.cuda.set_rng_state(random["cuda"], engine.device)
    return int(content["steps"])


def _read_index(directory: Path, kind: Mapping[str, Any]) -> dict[str, Any]:
    try:
        content = json.loads((directory / INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"no learner checkpoint in {directory}: {error}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(
            f"{directory / INDEX} is not of this version's format {FORMAT}; start from an exported model"
        )
    for key, value in kind.items():
        if content.get(key) != value:
            raise CheckpointError(
                f"{directory} was written with {key}={content.get(key)}, this learner has {key}={value}; "
                f"continue with {content.get(key)}, or start from an exported model"
            )
    return content


def _check_files(
    directory: Path, content: Mapping[str, Any], parameters: Sequence[Trained]
) -> dict[int, list[Trained]]:
    """The parameters by file number. Every rank reads all headers, so that all of them refuse
    together or none does."""
    saved = {name: tuple(place["shape"]) for name, place in content["parameters"].items()}
    here = {parameter.name: parameter.shape for parameter in parameters}
    for name in sorted(saved.keys() | here.keys()):
        if saved.get(name) != here.get(name):
            raise CheckpointError(
                f"{directory} is of another model: it has {name} with shape {saved.get(name)}, this learner {here.get(name)}"
            )
    files: dict[int, list[Trained]] = {}
    for parameter in parameters:
        files.setdefault(content["parameters"][parameter.name]["file"], []).append(parameter)
    for file, members in files.items():
        expected = {p.name: p.shape for p in members}
        moments = {f"{p.name}.{key}": p.shape for p in members for key in MOMENTS}
        for what, tensors in (("weights", expected), ("optimizer", moments)):
            with _open(directory, what, file) as opened:
                parts = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
                found = {
                    name: (tuple(part.get_shape()), part.get_dtype())
                    for name, part in parts.items()
                }
            if found != {name: (shape, "F32") for name, shape in tensors.items()}:
                raise CheckpointError(
                    f"{directory}: {what}-{file:05d}.safetensors does not hold what {INDEX} says"
                )
    for rank in range(content["ranks"]):
        with _open(directory, "random", rank):
            pass
    return files


def _open(directory: Path, what: str, file: int) -> Any:
    path = directory / f"{what}-{file:05d}.safetensors"
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from None


def _read(file: Any, name: str, shard: Shard) -> Tensor:
    """The shard's elements, flat. Reads the rows that have some."""
    part = file.get_slice(name)
    shape = part.get_shape()
    if not shape:
        return torch.as_tensor(file.get_tensor(name)).view(1)
    row = math.prod(shape[1:])
    top, bottom = shard.first // row, -(-(shard.first + shard.numel) // row)
    rows: Tensor = part[top:bottom]
    return rows.reshape(-1).narrow(0, shard.first - top * row, shard.numel)


def _set_schedule(scheduler: Any, optimizer: Any, steps: int) -> None:
    """Put a LambdaLR to where `steps` steps lead."""
    rates = [
        base * factor(steps)
        for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    scheduler.load_state_dict(
        {**scheduler.state_dict(), "last_epoch": steps, "_step_count": steps + 1, "_last_lr": rates}
    )
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
