"""Campaigns with fake roles: config, one run of the controller, and its metrics."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from fakes import (
    FakeChat,
    FakeLearner,
    FakeReference,
    FakeRollout,
    FakeScorer,
    SilentObserver,
    make_prompts,
)

from rayhf.algorithms.base import (
    TakesLabels,
    TakesThumbs,
    frozen_policies,
    needs_frozen_reference,
    policies_of,
    population_of,
)
from rayhf.campaign.controller import Controller
from rayhf.campaign.data import CampaignData
from rayhf.config.load import load_config
from rayhf.config.registry import ALGORITHMS
from rayhf.config.schema import CampaignConfig
from rayhf.data.preferences import encode_pairs, load_pairs
from rayhf.data.prompts import PromptSet
from rayhf.evaluation.base import Evaluation
from rayhf.monitoring.observer import Observer
from rayhf.roles import Environments, Learner, Reference, Roles, Rollout, Scorer
from rayhf.run_dir.store import RunDir
from rayhf.types import Prompt


def make_config(
    directory: Path,
    *,
    algorithm: dict[str, Any] | None = None,
    run: dict[str, Any] | None = None,
    learner: dict[str, Any] | None = None,
    **sections: Any,
) -> CampaignConfig:
    """Four iterations of four prompts in `directory`/run; `sections` replace whole sections."""
    return load_config(
        {
            "seed": 7,
            "run": {
                "dir": str(directory / "run"),
                "iterations": 4,
                "eval_every": 2,
                "checkpoint_every": 2,
                **(run or {}),
            },
            "policy": {"model": "m"},
            "prompts": {"train": "t", "batch": 4, "task": "toy"},
            "algorithm": algorithm or {"type": "online_dpo", "samples": 4},
            "scorer": {"train": [{"type": "rule", "function": "a:b"}]},
            "learner": learner or {},
            **sections,
        }
    )


def run_campaign(
    config: CampaignConfig,
    *,
    rollout: Rollout | None = None,
    scorer: Scorer | None = None,
    learner: Learner | None = None,
    critic: Learner | None = None,
    reference: Reference | None = None,
    pairs: Path | None = None,
    evaluations: Mapping[str, Evaluation] | None = None,
    prompts: PromptSet | None = None,
    heldout: Sequence[Prompt] = tuple(make_prompts(3)),
    inputs: Mapping[str, str] | None = None,
    functions: Mapping[str, str] | None = None,
    exported_files: Mapping[str, str] | None = None,
    observer: Observer | None = None,
    environments: Environments | None = None,
    chat: FakeChat | None = None,
) -> Roles:
    """Run the campaign to its end; return its roles."""
    algorithm = ALGORITHMS.build(config.algorithm)
    if pairs is not None:
        encoded = encode_pairs(load_pairs(pairs, key="pairs").pairs, FakeChat(), key="pairs")
        algorithm.set_pairs(encoded)
    others = policies_of(algorithm)[1:]
    roles = Roles(
        rollouts={"policy": rollout or FakeRollout()}
        | {name: FakeRollout() for name in (*others, *frozen_policies(algorithm))},
        scorer=scorer or FakeScorer(),
        evaluator=None,
        learners={"policy": learner or FakeLearner()} | {name: FakeLearner() for name in others},
        critic=critic,
        reference=reference or (FakeReference() if needs_frozen_reference(algorithm) else None),
        environments=environments,
    )
    store = RunDir(
        config,
        takes_labels=isinstance(algorithm, TakesLabels),
        population=population_of(algorithm),
        takes_thumbs=isinstance(algorithm, TakesThumbs),
    )
    try:
        controller = Controller(
            config,
            algorithm=algorithm,
            roles=roles,
            data=CampaignData(
                chat=chat or FakeChat(),
                prompts=prompts
                or PromptSet(prompts=tuple(make_prompts(12)), duplicates=0, label="test"),
                heldout=tuple(heldout),
                evaluations=evaluations or {},
                inputs=inputs or {},
                functions=functions or {},
                exported_files=exported_files or {},
            ),
            store=store,
            observer=observer or SilentObserver(),
        )
        asyncio.run(controller.run())
    finally:
        store.close()
    return roles


def metrics_of(config: CampaignConfig) -> list[dict[str, float]]:
    """The lines of metrics.jsonl without durations."""
    lines = [
        json.loads(line) for line in (config.run.dir / "metrics.jsonl").read_text().splitlines()
    ]
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]


def check_resumed_run(directory: Path, algorithm: dict[str, Any]) -> list[dict[str, float]]:
    """Check that a run that is killed in its third step and resumed equals an uninterrupted one.

    Returns the metrics of both. Every policy must have been trained for more than two steps.
    """
    configs = []
    for name in ("whole", "broken"):
        (directory / name).mkdir()
        configs.append(make_config(directory / name, algorithm=algorithm))
    whole, broken = configs
    first = run_campaign(whole)
    with pytest.raises(RuntimeError, match="killed"):
        run_campaign(broken, learner=FakeLearner(fail_at=3))
    second = run_campaign(broken)
    metrics = metrics_of(whole)
    assert metrics == metrics_of(broken)
    for policy, learner in first.learners.items():
        resumed = second.learners[policy]
        assert isinstance(learner, FakeLearner) and isinstance(resumed, FakeLearner)
        assert resumed.steps == learner.steps > 2
    for file in sorted((whole.run.dir / "samples").glob("*.parquet")):
        assert file.read_bytes() == (broken.run.dir / "samples" / file.name).read_bytes()
    return metrics
