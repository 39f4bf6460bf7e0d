"""Whether token values of an iteration's rows are computed while others are still explored."""

from __future__ import annotations

from rayhf.algorithms.base import Algorithm, TrainsCritic, generates
from rayhf.config.schema import CampaignConfig


def streams_reference(config: CampaignConfig, algorithm: Algorithm) -> bool:
    """Whether the reference gets rows while other prompts are still explored.

    Not where it moves while later iterations are explored: the weights that an iteration needs are
    then not known.
    """
    schedule = algorithm.reference
    if schedule is None or schedule.is_learner or not generates(algorithm):
        return False
    if schedule.moves and config.run.max_staleness:
        return False
    setting = config.reference.stream
    return config.reference_has_gpus if setting == "auto" else setting == "on"


def streams_values(config: CampaignConfig, algorithm: Algorithm) -> bool:
    """Whether the critic gets rows while other prompts are still explored.

    Not where it is trained while later iterations are explored, nor where it cannot run beside the
    engines.
    """
    cluster = config.cluster
    if not isinstance(algorithm, TrainsCritic) or config.run.max_staleness:
        return False
    if cluster.placement == "colocate":
        return False
    setting = config.learner.stream_values
    return cluster.device == "gpu" if setting == "auto" else setting == "on"
