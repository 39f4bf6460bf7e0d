"""Campaigns with fake roles: their config, one run of the controller, the metrics that are left."""

import asyncio
import json

from fakes import (
    FakeChat,
    FakeLearner,
    FakeReference,
    FakeRollout,
    FakeScorer,
    SilentObserver,
    make_prompts,
)

from rayhf.algorithms import build_algorithm
from rayhf.algorithms.base import needs_frozen_reference
from rayhf.campaign.controller import CampaignData, Controller
from rayhf.config.load import validate
from rayhf.data.preferences import encode_pairs, load_pairs
from rayhf.data.prompts import PromptSet
from rayhf.roles import Roles
from rayhf.run_dir.store import RunDir


def make_config(tmp_path, *, algorithm=None, run=None, learner=None, **more):
    return validate(
        {
            "seed": 7,
            "run": {
                "dir": str(tmp_path / "run"),
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
            **more,
        },
        source="test",
    )


def play(
    config, *, rollout=None, scorer=None, learner=None, critic=None, reference=None, pairs=None
):
    algorithm = build_algorithm(config.algorithm, max_tokens=8)
    if pairs is not None:
        algorithm.give(encode_pairs(load_pairs(pairs, key="pairs").pairs, FakeChat(), key="pairs"))
    roles = Roles(
        rollouts={"policy": rollout or FakeRollout()},
        scorer=scorer or FakeScorer(),
        evaluator=None,
        learners={"policy": learner or FakeLearner()},
        critic=critic,
        reference=reference or (FakeReference() if needs_frozen_reference(algorithm) else None),
    )
    store = RunDir(config)
    try:
        controller = Controller(
            config,
            algorithm=algorithm,
            roles=roles,
            data=CampaignData(
                chat=FakeChat(),
                prompts=PromptSet(prompts=tuple(make_prompts(12)), duplicates=0),
                heldout=tuple(make_prompts(3)),
            ),
            store=store,
            observer=SilentObserver(),
        )
        asyncio.run(controller.run())
    finally:
        store.close()
    return roles


def metrics_of(config):
    lines = [
        json.loads(line) for line in (config.run.dir / "metrics.jsonl").read_text().splitlines()
    ]
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]
