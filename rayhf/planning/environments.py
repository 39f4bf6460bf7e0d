"""Checks of a campaign's environments before anything starts.

In: the config, the policy's chat template. Out: the functions that prompts are rendered with, and
notes for `rayhf check`; or ConfigError.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rayhf.algorithms.base import Algorithm, generates
from rayhf.config.environments import EnvironmentConfig
from rayhf.config.schema import CampaignConfig
from rayhf.config.sources import source_names
from rayhf.data.chat import Chat
from rayhf.data.replies import check_replies
from rayhf.environments.process import EnvironmentChild
from rayhf.errors import ConfigError, nearest

Tools = Sequence[Mapping[str, Any]]


def check_environments(config: CampaignConfig, algorithm: Algorithm) -> None:
    """Check what needs neither files nor processes. Raises ConfigError."""
    if not config.environment:
        return
    kind = config.algorithm.type
    if not (config.algorithm.plays_episodes and generates(algorithm)):
        reason = "trains on given rows" if not generates(algorithm) else "samples parts of answers"
        raise ConfigError(
            f"environment: {kind} {reason}, and an episode needs whole answers of the policy; "
            "expected an algorithm that samples them, for example grpo, ppo or online_dpo"
        )
    for task, evaluation in config.evaluations.items():
        if evaluation.generates and not evaluation.plays_episodes:
            raise ConfigError(
                f"evaluations.{task}: type {evaluation.type} does not play episodes, and the "
                "campaign has an environment; expected type scored"
            )
    names = _sources(config)
    for number, environment in enumerate(config.environment):
        where = f"environment[{number}]" if len(config.environment) > 1 else "environment"
        for source in environment.sources or ():
            if source not in names:
                raise ConfigError(
                    f"{where}.sources: {source!r} is not the name of a source of prompts"
                    f"{nearest(source, names)}"
                )


def _sources(config: CampaignConfig) -> list[str]:
    """Return the names of all sources of prompts."""
    names = [*source_names(config.prompts.train)]
    if config.prompts.heldout is not None:
        names += source_names(config.prompts.heldout)
    return names


def rewards_all(config: CampaignConfig) -> bool:
    """Whether environments' rewards alone score every training prompt."""
    if not config.environment or not all(each.rewards for each in config.environment):
        return False
    served = {source for each in config.environment for source in each.sources or ()}
    everything = any(each.sources is None for each in config.environment)
    return everything or set(source_names(config.prompts.train)) <= served


def check_lengths(config: CampaignConfig, length: int) -> None:
    """Refuse episodes that do not fit into `length` tokens. Raises ConfigError."""
    replies = config.reply_tokens
    if config.environment and config.rollout.max_tokens + replies >= length:
        raise ConfigError(
            f"environment: rollout.max_tokens {config.rollout.max_tokens} and reply_tokens "
            f"{replies} together leave no room for a prompt in {length} tokens; "
            "lower one of them"
        )


def open_environments(
    config: CampaignConfig, chat: Chat, base: Path
) -> tuple[dict[str, Tools], list[str]]:
    """Start each environment once, and try the chat template with its replies.

    Returns the functions of each environment that has some, by its name, and notes. Raises
    ConfigError.
    """
    tools: dict[str, Tools] = {}
    notes = []
    for environment in config.environment:
        check_replies(chat, environment.reply_roles)
        child = EnvironmentChild(environment, base=base, describe=True)
        try:
            if child.tools:
                check_replies(chat, ("tool",))
                tools[environment.resolved_name] = child.tools
            notes.append(_note(environment, child))
        finally:
            child.kill()
    return tools, notes


def _note(environment: EnvironmentConfig, child: EnvironmentChild) -> str:
    names = ", ".join(str(tool.get("function", {}).get("name")) for tool in child.tools)
    served = ", ".join(environment.sources) if environment.sources else "all prompts"
    note = f"environment {environment.resolved_name} serves {served}"
    note += f", with the tools {names}" if names else ""
    return f"{note}; {child.unprotected}" if child.unprotected else note
