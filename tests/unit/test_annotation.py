"""Log-probs and values, streamed during the exploration and not: the same numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from campaigns import make_config, metrics_of, run_campaign
from fakes import FakeLearner, FakeReference, FakeRollout, make_prompts

from rayhf.algorithms.online_dpo import OnlineDPO
from rayhf.algorithms.streaming import streams_values
from rayhf.data.prompts import PromptSet
from rayhf.errors import ConfigError
from rayhf.planning.preflight import check_settings
from rayhf.roles import Progress, no_progress
from rayhf.types import FloatArray, Row

INITIAL = {"type": "initial"}


class Requests:
    """Token values that depend on everything in a request."""

    def __init__(self, rollout: FakeRollout) -> None:
        self._rollout = rollout
        self.requests: list[tuple[bool, int]] = []
        """(whether completions were being generated, rows) of each request."""

    def compute(self, rows: Sequence[Row], version: int) -> list[FloatArray]:
        self.requests.append((self._rollout.running > 0, len(rows)))
        content = b"".join(row.response_ids.tobytes() for row in rows)
        value = np.float32(sum(content) + 0.01 * len(content) + 1000 * version)
        return [np.full(len(row.response_ids), -value) for row in rows]


class Batched(Requests, FakeReference):
    """A reference whose log-probs depend on its updates and a whole request."""

    def __init__(self, rollout: FakeRollout) -> None:
        FakeReference.__init__(self)
        Requests.__init__(self, rollout)

    async def logprobs(self, rows: Sequence[Row], *, temperature: float) -> list[FloatArray]:
        return self.compute(rows, len(self.updates))


class Critic(Requests, FakeLearner):
    """A critic whose values depend on its steps and a whole request."""

    def __init__(self, rollout: FakeRollout) -> None:
        FakeLearner.__init__(self)
        Requests.__init__(self, rollout)

    async def outputs(
        self, rows: Sequence[Row], *, temperature: float, progress: Progress = no_progress
    ) -> list[FloatArray]:
        assert temperature == 1.0
        return self.compute(rows, self.steps)


def run(
    directory: Path, stream: str, algorithm: dict[str, Any], **run_keys: Any
) -> tuple[list[Any], Batched, Critic, list[dict[str, float]]]:
    """Return the rows of each optimizer step, the reference, the critic, and the metrics."""
    config = make_config(
        directory,
        algorithm=algorithm,
        run={"iterations": 3, "eval_every": 0, **run_keys},
        prompts={"train": "t", "batch": 8, "task": "toy"},
        rollout={"max_tokens": 4},
        # Two prompts with four completions in each request.
        reference={"stream": stream, "token_budget": 32},
        # A critic gets one prompt in each request.
        learner={
            "token_budget": 16,
            "stream_values": stream if algorithm["type"] == "ppo" else "off",
        },
    )
    rollout = FakeRollout(delay=0.02)
    reference = Batched(rollout)
    critic = Critic(rollout)
    roles = run_campaign(
        config,
        rollout=rollout,
        reference=reference,
        critic=critic if algorithm["type"] == "ppo" else None,
        prompts=PromptSet(prompts=tuple(make_prompts(24)), duplicates=0, label="test"),
        heldout=(),
    )
    learner = roles.learners["policy"]
    assert isinstance(learner, FakeLearner)
    rows = [
        (
            row.prompt_id,
            row.sample,
            row.tokens["ref_logp"].tolist(),
            row.tokens["value"].tolist() if "value" in row.tokens else None,
        )
        for batch in learner.batches
        for example in batch.examples
        for row in example.rows
    ]
    return rows, reference, critic, metrics_of(config)[1:]


@pytest.mark.parametrize(
    ("algorithm", "run_keys"),
    [
        ({"type": "online_dpo", "reference": INITIAL}, {"deterministic": False}),
        ({"type": "online_dpo", "reference": INITIAL}, {"deterministic": True}),
        (
            {"type": "online_dpo", "reference": {"type": "ema", "alpha": 0.5, "every": 1}},
            {"deterministic": False},
        ),
        ({"type": "grpo", "kl": {"coef": 0.1}}, {"deterministic": False}),
        ({"type": "grpo", "kl": {"coef": 0.1}}, {"max_staleness": 1}),
    ],
)
def test_streamed_log_probs_are_the_others(
    tmp_path: Path, algorithm: dict[str, Any], run_keys: dict[str, Any]
) -> None:
    algorithm = {"samples": 4, **algorithm}
    expected, after, _, plain = run(tmp_path / "off", "off", algorithm, **run_keys)
    rows, during, _, metrics = run(tmp_path / "on", "on", algorithm, **run_keys)
    assert rows == expected and len({logp[0] for _, _, logp, _ in rows}) > 6
    assert len(during.requests) == len(after.requests) == 3 * 4
    assert [line.pop("reference/streamed") for line in metrics] == [1.0] * 3 and metrics == plain
    if run_keys == {"deterministic": False}:
        assert not any(generating for generating, _ in after.requests)
        assert sum(generating for generating, _ in during.requests) >= 3


@pytest.mark.parametrize("deterministic", [False, True])
def test_streamed_values_are_the_others(tmp_path: Path, deterministic: bool) -> None:
    algorithm = {"type": "ppo", "samples": 4}
    keys = {"deterministic": deterministic}
    expected, _, after, plain = run(tmp_path / "off", "off", algorithm, **keys)
    rows, _, during, metrics = run(tmp_path / "on", "on", algorithm, **keys)
    assert rows == expected and len({value[0] for *_, value in rows}) > 6
    assert len(during.requests) == len(after.requests) == 3 * 8
    for role in ("reference", "critic"):
        assert [line.pop(f"{role}/streamed") for line in metrics] == [1.0] * 3
    assert metrics == plain
    if not deterministic:
        assert not any(generating for generating, _ in after.requests)
        assert sum(generating for generating, _ in during.requests) >= 3


def test_rows_that_the_whole_selection_changes_are_requested_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    select = OnlineDPO.select

    def all_but_the_first(self: Any, groups: Any, context: Any) -> Any:
        """Drop an example where the iteration has more than two prompts."""
        selection = select(self, groups, context)
        if len(groups) <= 2:
            return selection
        return replace(selection, examples=selection.examples[1:])

    monkeypatch.setattr(OnlineDPO, "select", all_but_the_first)
    algorithm = {"type": "online_dpo", "samples": 4}
    expected, *_ = run(tmp_path / "off", "off", algorithm, deterministic=False)
    rows, reference, _, metrics = run(tmp_path / "on", "on", algorithm, deterministic=False)
    assert rows == expected and len(reference.requests) > 3 * 4
    assert 0 < min(line["reference/streamed"] for line in metrics) < 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {
                "algorithm": {"type": "online_dpo", "reference": {"type": "ema", "every": 1}},
                "run": {"max_staleness": 1},
            },
            r"reference\.stream is on, but the reference moves while later .*max_staleness 1\)",
        ),
        (
            {"algorithm": {"type": "sppo"}},
            r"reference\.stream is on, but sppo takes the policy before each iteration",
        ),
        (
            {"algorithm": {"type": "dpo"}},
            r"reference\.stream is on, but dpo generates nothing; expected auto or off",
        ),
    ],
)
def test_settings_without_effect_are_refused(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_settings(make_config(tmp_path, reference={"stream": "on"}, **settings))
    for key in ("replicas", "ranks"):
        with pytest.raises(ConfigError, match=rf"reference\.{key} is 2, but sft has no reference"):
            check_settings(make_config(tmp_path, reference={key: 2}, algorithm={"type": "sft"}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "online_dpo has no critic"),
        (
            {"algorithm": {"type": "ppo"}, "run": {"max_staleness": 1}},
            r"the critic is trained while later iterations .*max_staleness 1\)",
        ),
        (
            {"algorithm": {"type": "ppo"}, "cluster": {"placement": "colocate"}},
            r"the critic sleeps while completions are generated \(cluster\.placement colocate\)",
        ),
    ],
)
def test_values_that_cannot_be_streamed_are_refused(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(
        ConfigError, match=rf"learner\.stream_values is on, but {message}; expected auto or off"
    ):
        check_settings(make_config(tmp_path, learner={"stream_values": "on"}, **settings))


@pytest.mark.parametrize(
    ("algorithm", "changes", "streamed"),
    [
        ("ppo", {}, True),
        ("ppo", {"device": "cpu"}, False),
        ("ppo", {"placement": "colocate"}, False),
        ("grpo", {}, False),
    ],
)
def test_values_are_streamed_where_the_critic_has_gpus(
    tmp_path: Path, algorithm: str, changes: dict[str, str], streamed: bool
) -> None:
    cluster = {"device": "gpu", **changes}
    config = make_config(tmp_path, algorithm={"type": algorithm}, cluster=cluster)
    assert streams_values(config, check_settings(config)[0]) is streamed
    ahead = make_config(
        tmp_path,
        algorithm={"type": algorithm},
        cluster={"device": "gpu"},
        run={"max_staleness": 1},
    )
    assert not streams_values(ahead, check_settings(ahead)[0])
