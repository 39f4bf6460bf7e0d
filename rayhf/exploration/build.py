"""The factory of request schedulers."""

from __future__ import annotations

from collections.abc import Mapping

from rayhf.config.environments import EnvironmentConfig
from rayhf.data.chat import Chat
from rayhf.exploration.eager import EagerScheduler
from rayhf.exploration.journal import Journal
from rayhf.exploration.scheduler import IN_FLIGHT, RequestScheduler
from rayhf.exploration.waves import WaveScheduler
from rayhf.roles import Environments, Rollout, Scorer


def build_scheduler(
    rollouts: Mapping[str, Rollout],
    scorer: Scorer,
    *,
    chat: Chat,
    versions: Mapping[str, int],
    deterministic: bool,
    journal: Journal | None = None,
    in_flight: int = IN_FLIGHT,
    score_calls: int = 1,
    environments: Environments | None = None,
    environment_configs: tuple[EnvironmentConfig, ...] = (),
) -> RequestScheduler:
    """Return the scheduler for one iteration; the arguments are those of RequestScheduler."""
    scheduler = WaveScheduler if deterministic else EagerScheduler
    return scheduler(
        rollouts,
        scorer,
        chat=chat,
        versions=versions,
        journal=journal,
        in_flight=in_flight,
        score_calls=score_calls,
        environments=environments,
        environment_configs=environment_configs,
    )
