"""Log-probs of the reference, streamed during the exploration and not: the same values."""

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
from rayhf.data.prompts import PromptSet
from rayhf.errors import ConfigError
from rayhf.planning.preflight import check_settings
from rayhf.types import FloatArray, Row

INITIAL = {"type": "initial"}


class Batched(FakeReference):
    """A reference whose log-probs depend on everything in a request."""

    def __init__(self, rollout: FakeRollout) -> None:
        super().__init__()
        self._rollout = rollout
        self.requests: list[tuple[bool, int]] = []
        """(whether completions were being generated, rows) of each request."""

    async def logprobs(self, rows: Sequence[Row], *, temperature: float) -> list[FloatArray]:
        self.requests.append((self._rollout.running > 0, len(rows)))
        content = b"".join(row.response_ids.tobytes() for row in rows)
        value = np.float32(sum(content) + 0.01 * len(content) + 1000 * len(self.updates))
        return [np.full(len(row.response_ids), -value) for row in rows]


def run(
    directory: Path, stream: str, algorithm: dict[str, Any], **run_keys: Any
) -> tuple[list[Any], Batched, list[dict[str, float]]]:
    """Return the rows of each optimizer step, the reference, and the metrics."""
    config = make_config(
        directory,
        algorithm=algorithm,
        run={"iterations": 3, "eval_every": 0, **run_keys},
        prompts={"train": "t", "batch": 8, "task": "toy"},
        rollout={"max_tokens": 4},
        # Two prompts with four completions in each request.
        reference={"stream": stream, "token_budget": 32},
    )
    rollout = FakeRollout(delay=0.02)
    reference = Batched(rollout)
    roles = run_campaign(
        config,
        rollout=rollout,
        reference=reference,
        prompts=PromptSet(prompts=tuple(make_prompts(24)), duplicates=0, label="test"),
        heldout=(),
    )
    learner = roles.learners["policy"]
    assert isinstance(learner, FakeLearner)
    rows = [
        (row.prompt_id, row.sample, row.tokens["ref_logp"].tolist())
        for batch in learner.batches
        for example in batch.examples
        for row in example.rows
    ]
    return rows, reference, metrics_of(config)[1:]


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
    expected, after, plain = run(tmp_path / "off", "off", algorithm, **run_keys)
    rows, during, metrics = run(tmp_path / "on", "on", algorithm, **run_keys)
    assert rows == expected and len({values[0] for _, _, values in rows}) > 6
    assert len(during.requests) == len(after.requests) == 3 * 4
    assert [line.pop("reference/streamed") for line in metrics] == [1.0] * 3 and metrics == plain
    if run_keys == {"deterministic": False}:
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
    expected, _, _ = run(tmp_path / "off", "off", algorithm, deterministic=False)
    rows, reference, metrics = run(tmp_path / "on", "on", algorithm, deterministic=False)
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
    with pytest.raises(ConfigError, match=r"reference\.replicas is 2, but sft has no reference"):
        check_settings(make_config(tmp_path, reference={"replicas": 2}, algorithm={"type": "sft"}))
