"""Plugin registry: from a config's `type` to the class behind it.

A `type` is a built-in name (the tables at the end of this file), a name that an installed package
adds through an entry point, or an import path `package.module:Class`. The class brings its config:
a `PluginConfig` subclass in its attribute `Config`. Classes are imported only when a config names
them, so that reading a config stays cheap.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from rayhf.config.base import PluginConfig
from rayhf.errors import did_you_mean, nearest

PLUGIN_FIELD = "rayhf_plugin"
"""Key in the metadata of a field's core schema: (registry, base class of its configs)."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One row of `rayhf list`."""

    name: str
    target: str
    """package.module:Class."""
    package: str
    """Installed distribution that provides it."""


class Registry:
    """Names of one kind of plugin.

    Args:
        kind: singular noun for messages, for example "algorithm".
        group: entry-point group in which installed packages add names.
        builtin: name -> "package.module:Class".
        default: name used where a config gives no `type`.
    """

    def __init__(
        self, kind: str, group: str, builtin: Mapping[str, str], default: str | None = None
    ) -> None:
        self.kind = kind
        self.group = group
        self.builtin = builtin
        self.default = default

    def defaulting(self, name: str) -> Registry:
        """Return the same registry with `name` as the default `type`."""
        return Registry(self.kind, self.group, self.builtin, default=name)

    def entries(self) -> list[Entry]:
        """Return the built-in entries in their order, then those of installed packages by name."""
        rows = [Entry(name, target, "rayhf") for name, target in self.builtin.items()]
        for name, point in sorted(_installed(self.group).items()):
            if name not in self.builtin:
                rows.append(Entry(name, point.value, point.dist.name if point.dist else "?"))
        return rows

    def resolve(self, name: str) -> type[Any]:
        """Import the class that `name` refers to.

        Raises ValueError for an unknown name (naming the nearest valid one), a module that cannot
        be imported, or a class without a `Config`.
        """
        target = self.builtin.get(name)
        if target is None and name in (installed := _installed(self.group)):
            target = installed[name].value
        if target is None:
            if ":" not in name:
                raise ValueError(self._unknown(name))
            target = name
        return _import_plugin(target, self.kind)

    def config_type(self, name: str) -> type[PluginConfig]:
        """Return the config class of the plugin that `name` refers to. Raises like `resolve`."""
        config: type[PluginConfig] = self.resolve(name).Config
        return config

    def build(self, config: PluginConfig, *args: Any, **kwargs: Any) -> Any:
        """Construct the plugin of `config`: its class is called with the config and `args`."""
        return self.resolve(config.type)(config, *args, **kwargs)

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        """Return the schema of a field annotated with this registry: its plugin's config.

        Usage: `Annotated[PluginConfig, ALGORITHMS]`, or with a subclass of PluginConfig that all
        plugins' configs share.
        """
        return core_schema.no_info_before_validator_function(
            self._parse,
            core_schema.no_info_plain_validator_function(
                partial(self._check_family, source), metadata={PLUGIN_FIELD: (self, source)}
            ),
            serialization=core_schema.plain_serializer_function_ser_schema(
                lambda config, info: config.model_dump(mode=info.mode), info_arg=True
            ),
        )

    def _parse(self, value: object) -> object:
        """Validate a config value as the `Config` of the class that its `type` names.

        A string is short for `{type: string}`. Raises PydanticCustomError for a type that cannot be
        resolved and ValidationError for invalid settings.
        """
        if isinstance(value, PluginConfig):
            return value
        if isinstance(value, str):
            value = {"type": value}
        if not isinstance(value, Mapping):
            raise _refusal(f"expected a mapping with a `type`, for example {self._example()}")
        name = value.get("type", self.default)
        if not isinstance(name, str):
            raise _refusal(f"`type` is missing; valid: {', '.join(self._names())}")
        try:
            config = self.config_type(name)
        except ValueError as error:
            raise _refusal(str(error), key="type") from None
        return config.model_validate(value)

    def _check_family(self, family: type[PluginConfig], config: PluginConfig) -> PluginConfig:
        """Refuse a plugin whose config is not a subclass of the field's annotation."""
        if isinstance(config, family):
            return config
        names = [name for name in self.builtin if issubclass(self.resolve(name).Config, family)]
        raise _refusal(
            f"{config.type!r} is a {self.kind} of another family; valid: {', '.join(names)}",
            key="type",
        )

    def _names(self) -> list[str]:
        return [entry.name for entry in self.entries()]

    def _example(self) -> str:
        return f"{{type: {next(iter(self.builtin), 'package.module:Class')}}}"

    def _unknown(self, name: str) -> str:
        return (
            f"{name!r} is not a known {self.kind}{nearest(name, self._names())} "
            "(or an import path of your own, package.module:Class)"
        )


def _refusal(message: str, key: str = "") -> PydanticCustomError:
    return PydanticCustomError("plugin", "{message}", {"message": message, "key": key})


@cache
def _installed(group: str) -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=group)}


def _import_plugin(target: str, kind: str) -> type[Any]:
    """Import `package.module:Class` and check that it is a plugin. Raises ValueError."""
    module_name, _, class_name = target.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{target}: no module named {error.name!r}; "
            "it must be importable from the directory in which the command runs"
        ) from None
    except Exception as error:  # noqa: BLE001  importing foreign code may raise anything
        raise ValueError(
            f"{target}: importing {module_name} failed ({type(error).__name__}: {error})"
        ) from None
    plugin = getattr(module, class_name, None)
    if plugin is None:
        classes = [name for name, _ in inspect.getmembers(module, inspect.isclass)]
        hint = did_you_mean(class_name, classes)
        raise ValueError(f"{target}: {module_name} has no class {class_name!r}{hint}")
    config = getattr(plugin, "Config", None)
    if not (
        isinstance(plugin, type) and isinstance(config, type) and issubclass(config, PluginConfig)
    ):
        raise ValueError(
            f"{target} is not a {kind}: expected a class whose attribute Config "
            "is a subclass of rayhf.PluginConfig"
        )
    return plugin


def summary(plugin: type[Any]) -> str:
    """Return the first sentence of a plugin's docstring, for `rayhf list`."""
    paragraph = " ".join((inspect.getdoc(plugin) or "").split("\n\n")[0].split())
    # A sentence ends where a capital letter follows: "et al. 2024" does not end one.
    return re.split(r"(?<=\.) (?=[A-Z])", paragraph)[0].rstrip(".") + "."


ALGORITHMS = Registry(
    "algorithm",
    "rayhf.algorithms",
    {
        "ppo": "rayhf.algorithms.ppo:PPO",
        "grpo": "rayhf.algorithms.grpo:GRPO",
        "dapo": "rayhf.algorithms.dapo:DAPO",
        "dr_grpo": "rayhf.algorithms.dr_grpo:DrGRPO",
        "gspo": "rayhf.algorithms.gspo:GSPO",
        "cispo": "rayhf.algorithms.cispo:CISPO",
        "rloo": "rayhf.algorithms.rloo:RLOO",
        "reinforce++": "rayhf.algorithms.reinforce_plus_plus:ReinforcePlusPlus",
        "reinforce++_baseline": (
            "rayhf.algorithms.reinforce_plus_plus_baseline:ReinforcePlusPlusBaseline"
        ),
        "online_dpo": "rayhf.algorithms.online_dpo:OnlineDPO",
        "iterative_dpo": "rayhf.algorithms.iterative_dpo:IterativeDPO",
        "sppo": "rayhf.algorithms.sppo:SPPO",
        "inpo": "rayhf.algorithms.inpo:INPO",
        "mnpo": "rayhf.algorithms.mnpo:MNPO",
        "nash_md": "rayhf.algorithms.nash_md:NashMD",
        "xpo": "rayhf.algorithms.xpo:XPO",
        "dno": "rayhf.algorithms.dno:DNO",
        "hypo": "rayhf.algorithms.hypo:HyPO",
        "mcts_dpo": "rayhf.algorithms.mcts_dpo:MCTSDPO",
        "tpo": "rayhf.algorithms.tpo:TPO",
        "spar": "rayhf.algorithms.spar:SPaR",
        "self_rewarding": "rayhf.algorithms.self_rewarding:SelfRewarding",
        "challenger_solver": "rayhf.algorithms.challenger_solver:ChallengerSolver",
        "sft": "rayhf.algorithms.sft:SFT",
        "dpo": "rayhf.algorithms.dpo:OfflineDPO",
        "kto": "rayhf.algorithms.kto:KTO",
        "online_kto": "rayhf.algorithms.online_kto:OnlineKTO",
        "distill": "rayhf.algorithms.distill:Distill",
    },
)

LOSSES = Registry(
    "loss",
    "rayhf.losses",
    {
        "sigmoid": "rayhf.losses.preference:Sigmoid",
        "ipo": "rayhf.losses.preference:IPO",
        "hinge": "rayhf.losses.preference:Hinge",
        "robust": "rayhf.losses.preference:Robust",
        "simpo": "rayhf.losses.preference:SimPO",
        "cpo": "rayhf.losses.preference:CPO",
        "orpo": "rayhf.losses.preference:ORPO",
        "exo": "rayhf.losses.preference:EXO",
        "nca": "rayhf.losses.preference:NCA",
        "apo_zero": "rayhf.losses.preference:APOZero",
        "apo_down": "rayhf.losses.preference:APODown",
        "sppo_hard": "rayhf.losses.preference:SPPOHard",
        "discopop": "rayhf.losses.preference:DiscoPOP",
        "clipped": "rayhf.losses.policy:ClippedSurrogate",
        "gspo": "rayhf.losses.gspo:GSPOLoss",
        "cispo": "rayhf.losses.cispo:CISPOLoss",
        "kto": "rayhf.losses.kto:KTOLoss",
    },
)

SCORERS = Registry(
    "scorer",
    "rayhf.scorers",
    {
        "rule": "rayhf.scorer.rule:Rule",
        "pairwise_rule": "rayhf.scorer.rule:PairwiseRule",
        "reward_model": "rayhf.scorer.reward_model:RewardModel",
        "pair_encoder": "rayhf.scorer.pair_encoder:PairEncoder",
        "preference_model": "rayhf.scorer.preference_model:PreferenceModel",
        "judge": "rayhf.scorer.judge_model:LanguageModelJudge",
        "grpc": "rayhf.scorer.grpc.client:GrpcScorer",
        "reasoning_gym": "rayhf.scorer.reasoning_gym:GymScorer",
    },
)

SOURCES = Registry(
    "prompt source",
    "rayhf.sources",
    {
        "file": "rayhf.data.files:FileSource",
        "hub": "rayhf.data.hub:HubSource",
        "reasoning_gym": "rayhf.data.reasoning_gym:GymSource",
    },
)

TRACKERS = Registry(
    "tracker",
    "rayhf.trackers",
    {
        "wandb": "rayhf.monitoring.wandb:WandbTracker",
        "tensorboard": "rayhf.monitoring.tensorboard:TensorboardTracker",
        "mlflow": "rayhf.monitoring.mlflow:MlflowTracker",
        "trackio": "rayhf.monitoring.trackio:TrackioTracker",
    },
)

EVALUATIONS = Registry(
    "evaluation",
    "rayhf.evaluations",
    {
        "scored": "rayhf.evaluation.scored:ScoredEvaluation",
        "validation_loss": "rayhf.evaluation.given:ValidationLoss",
        "pair_accuracy": "rayhf.evaluation.given:PairAccuracy",
        "win_rate": "rayhf.evaluation.win_rate:WinRateEvaluation",
        "exploitability": "rayhf.tiny.exploitability:Exploitability",
    },
    default="scored",
)

SUITES = Registry(
    "suite",
    "rayhf.suites",
    {
        "ifeval": "rayhf.evaluation.suites.ifeval:IFEval",
        "gsm8k": "rayhf.evaluation.suites.gsm8k:GSM8K",
        "math": "rayhf.evaluation.suites.math:Math",
        "constraints": "rayhf.evaluation.suites.constraints:Constraints",
        "scored": "rayhf.evaluation.suites.scored:Scored",
        "rewardbench": "rayhf.evaluation.suites.preferences:RewardBench",
        "preferences": "rayhf.evaluation.suites.preferences:Preferences",
    },
)

ENVIRONMENTS = Registry(
    "environment",
    "rayhf.environments",
    {
        "tools": "rayhf.environments.tools:Tools",
        "verifiers": "rayhf.environments.verifiers:Verifiers",
        "openenv": "rayhf.environments.openenv:OpenEnv",
        "second_try": "rayhf.tiny.second_try:SecondTry",
        "rematch": "rayhf.tiny.rematch:Rematch",
    },
)

REGISTRIES: Mapping[str, Registry] = {
    "algorithms": ALGORITHMS,
    "losses": LOSSES,
    "scorers": SCORERS,
    "sources": SOURCES,
    "trackers": TRACKERS,
    "evaluations": EVALUATIONS,
    "suites": SUITES,
    "environments": ENVIRONMENTS,
}
"""Registries by the plural that `rayhf list` takes."""
