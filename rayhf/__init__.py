"""Online RLHF on Ray: vLLM generates, scorers judge, DeepSpeed trains, and every run resumes.

The Python API: what is listed in `__all__` below, each imported when it is first used, so that
`import rayhf` needs no ray, torch, vllm or deepspeed.

    config = rayhf.load_config("configs/tiny/online_dpo_arithmetic.yaml", ["run.iterations=3"])
    result = rayhf.run(config)
    print(result.metrics[-1]["scorer/reward_mean"], result.policy)

A campaign's own algorithm, loss, scorer, environment, prompt source, tracker or evaluation is a
class with a `Config`; the config's `type` names it as `package.module:Class` (docs/extending.md).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from launch.api import RunResult as RunResult
    from launch.api import run as run
    from rayhf.algorithms.base import Algorithm as Algorithm
    from rayhf.algorithms.base import AlgorithmBase as AlgorithmBase
    from rayhf.algorithms.base import Selection as Selection
    from rayhf.algorithms.base import SelectionContext as SelectionContext
    from rayhf.algorithms.base import sample_and_compare as sample_and_compare
    from rayhf.algorithms.base import sample_and_score as sample_and_score
    from rayhf.algorithms.base import scored as scored
    from rayhf.algorithms.context import ExplorationContext as ExplorationContext
    from rayhf.config.algorithms import AlgorithmConfig as AlgorithmConfig
    from rayhf.config.algorithms import EmaReference as EmaReference
    from rayhf.config.algorithms import InitialReference as InitialReference
    from rayhf.config.algorithms import PopulationConfig as PopulationConfig
    from rayhf.config.algorithms import PreviousReference as PreviousReference
    from rayhf.config.base import PluginConfig as PluginConfig
    from rayhf.config.base import Section as Section
    from rayhf.config.environments import EnvironmentConfig as EnvironmentConfig
    from rayhf.config.evaluations import EvaluationConfig as EvaluationConfig
    from rayhf.config.load import load_config as load_config
    from rayhf.config.models import ModelName as ModelName
    from rayhf.config.schema import CampaignConfig as CampaignConfig
    from rayhf.config.scorers import PairwiseEntryConfig as PairwiseEntryConfig
    from rayhf.config.scorers import PointwiseEntryConfig as PointwiseEntryConfig
    from rayhf.config.sources import SourceConfig as SourceConfig
    from rayhf.config.trackers import TrackerConfig as TrackerConfig
    from rayhf.data.readers import Source as Source
    from rayhf.episodes import Episode as Episode
    from rayhf.episodes import StepResult as StepResult
    from rayhf.episodes import Turn as Turn
    from rayhf.evaluation.base import Evaluation as Evaluation
    from rayhf.evaluation.base import EvaluationContext as EvaluationContext
    from rayhf.evaluation.base import EvaluationSetup as EvaluationSetup
    from rayhf.exploration.environment import Environment as Environment
    from rayhf.losses.base import Loss as Loss
    from rayhf.losses.base import LossOutput as LossOutput
    from rayhf.losses.base import MicroBatch as MicroBatch
    from rayhf.losses.pairs import PairLogps as PairLogps
    from rayhf.losses.pairs import PairLoss as PairLoss
    from rayhf.losses.pairs import PairLossConfig as PairLossConfig
    from rayhf.models.hub import local_directory as local_directory
    from rayhf.monitoring.tracking import TrackedRun as TrackedRun
    from rayhf.monitoring.tracking import Tracker as Tracker
    from rayhf.roles import Learner as Learner
    from rayhf.roles import Reference as Reference
    from rayhf.roles import Rollout as Rollout
    from rayhf.roles import Scorer as Scorer
    from rayhf.scorer.protocol import PairwiseScorer as PairwiseScorer
    from rayhf.scorer.protocol import PointwiseScorer as PointwiseScorer
    from rayhf.scorer.protocol import ScorerSetup as ScorerSetup
    from rayhf.types import Compared as Compared
    from rayhf.types import Completion as Completion
    from rayhf.types import Example as Example
    from rayhf.types import Failed as Failed
    from rayhf.types import GenerateRequest as GenerateRequest
    from rayhf.types import Group as Group
    from rayhf.types import Invalid as Invalid
    from rayhf.types import JudgeReply as JudgeReply
    from rayhf.types import Outcome as Outcome
    from rayhf.types import Prompt as Prompt
    from rayhf.types import Row as Row
    from rayhf.types import Sample as Sample
    from rayhf.types import Sampling as Sampling
    from rayhf.types import Scored as Scored
    from rayhf.types import ScoreRequest as ScoreRequest
    from rayhf.types import Skipped as Skipped
    from rayhf.types import given_row as given_row
    from rayhf.types import make_row as make_row

_HOMES = {
    "launch.api": ("RunResult", "run"),
    "rayhf.algorithms.base": (
        "Algorithm",
        "AlgorithmBase",
        "Selection",
        "SelectionContext",
        "sample_and_compare",
        "sample_and_score",
        "scored",
    ),
    "rayhf.algorithms.context": ("ExplorationContext",),
    "rayhf.config.algorithms": (
        "AlgorithmConfig",
        "EmaReference",
        "InitialReference",
        "PopulationConfig",
        "PreviousReference",
    ),
    "rayhf.config.base": ("PluginConfig", "Section"),
    "rayhf.config.environments": ("EnvironmentConfig",),
    "rayhf.config.evaluations": ("EvaluationConfig",),
    "rayhf.config.load": ("load_config",),
    "rayhf.config.models": ("ModelName",),
    "rayhf.config.schema": ("CampaignConfig",),
    "rayhf.config.scorers": ("PairwiseEntryConfig", "PointwiseEntryConfig"),
    "rayhf.config.sources": ("SourceConfig",),
    "rayhf.config.trackers": ("TrackerConfig",),
    "rayhf.data.readers": ("Source",),
    "rayhf.exploration.environment": ("Environment",),
    "rayhf.episodes": ("Episode", "StepResult", "Turn"),
    "rayhf.evaluation.base": ("Evaluation", "EvaluationContext", "EvaluationSetup"),
    "rayhf.losses.base": ("Loss", "LossOutput", "MicroBatch"),
    "rayhf.losses.pairs": ("PairLogps", "PairLoss", "PairLossConfig"),
    "rayhf.models.hub": ("local_directory",),
    "rayhf.monitoring.tracking": ("TrackedRun", "Tracker"),
    "rayhf.roles": ("Learner", "Reference", "Rollout", "Scorer"),
    "rayhf.scorer.protocol": ("PairwiseScorer", "PointwiseScorer", "ScorerSetup"),
    "rayhf.types": (
        "Compared",
        "Completion",
        "Example",
        "Failed",
        "GenerateRequest",
        "Group",
        "Invalid",
        "JudgeReply",
        "Outcome",
        "Prompt",
        "Row",
        "Sample",
        "Sampling",
        "ScoreRequest",
        "Scored",
        "Skipped",
        "given_row",
        "make_row",
    ),
}
# By name and not by import statement: this file stands above all rooms, and every room imports it.
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
__all__ = ["__version__", *sorted(_HOME_OF)]


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'rayhf' has no attribute {name!r}")
    value: object = getattr(importlib.import_module(_HOME_OF[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
