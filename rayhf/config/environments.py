"""How a config names environments: the keys that all have, and the short forms."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import AfterValidator, BeforeValidator, PositiveFloat, PositiveInt

from rayhf.config.base import Name, PluginConfig
from rayhf.config.registry import ENVIRONMENTS
from rayhf.config.sources import as_list


class EnvironmentConfig(PluginConfig):
    """Keys that every environment has."""

    rewards: ClassVar[bool] = True
    """Whether its rewards are (part of) the score; False where scorers alone judge the answer."""
    reply_roles: ClassVar[tuple[str, ...]] = ("user",)
    """Roles of the messages that it answers with; the chat template is tried with each of them."""

    name: Name | None = None
    """Name in metrics and samples. Default: derived from `type`."""
    sources: tuple[Name, ...] | None = None
    """Names of the sources (training and held-out) whose prompts it serves. Default: all."""
    max_turns: PositiveInt = 8
    """Maximum number of the policy's turns in an episode."""
    turn_tokens: PositiveInt | None = None
    """Maximum number of tokens of one turn; a turn that is cut ends the episode. Default: what is
    left of rollout.max_tokens, which limits all turns of an episode together."""
    reply_tokens: PositiveInt = 1024
    """Maximum number of tokens of all replies in an episode; a reply beyond it ends the episode.
    Prompt, rollout.max_tokens and reply_tokens together must fit into the model."""
    workers: PositiveInt = 1
    """Processes that run its episodes, on the machine of the controller."""
    timeout_s: PositiveFloat = 30.0
    """Limit on one step, in seconds."""
    import_timeout_s: PositiveFloat = 60.0
    """Limit on importing its module, in seconds."""
    python: Path | None = None
    """Python interpreter of its processes, 3.11 or newer, with pydantic and numpy: of a virtual
    environment with packages that cannot be installed beside rayhf. Its module is imported by rayhf
    as well, so it imports such packages in its methods. Default: rayhf's own interpreter."""
    network: bool = False
    """It calls a service. Otherwise its processes have no network where the kernel allows that."""

    @property
    def resolved_name(self) -> str:
        """`name`, or its default."""
        return self.name or self.type.rpartition(":")[2]


def _check_environments(
    environments: tuple[EnvironmentConfig, ...],
) -> tuple[EnvironmentConfig, ...]:
    names = [environment.resolved_name for environment in environments]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"several environments are named {name!r}; expected different names")
    served = [source for each in environments for source in each.sources or ()]
    if len(environments) > 1 and any(each.sources is None for each in environments):
        raise ValueError("with several environments each needs `sources`, the prompts it serves")
    for source in served:
        if served.count(source) > 1:
            raise ValueError(f"several environments serve the source {source!r}; expected one")
    return environments


Environment = Annotated[EnvironmentConfig, ENVIRONMENTS]
Environments = Annotated[
    tuple[Environment, ...],
    BeforeValidator(as_list, json_schema_input_type=Environment | tuple[Environment, ...]),
    AfterValidator(_check_environments),
]
"""One environment, or a list of them that serve different sources."""


def environment_of(
    environments: tuple[EnvironmentConfig, ...], source: str
) -> EnvironmentConfig | None:
    """Return the environment that serves a source's prompts; None where there is none."""
    for environment in environments:
        if environment.sources is None or source in environment.sources:
            return environment
    return None
