"""Environments of the real package `verifiers`, in the interpreter of a virtual environment.

It cannot be installed beside vLLM. RAYHF_VERIFIERS_PYTHON is the python of a virtual environment
with verifiers before 0.4; docs/environments.md says how to make one.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from play_episodes import play

from rayhf.environments.process import EnvironmentChild
from rayhf.environments.verifiers import VerifiersConfig
from rayhf.episodes import StepResult
from rayhf.errors import ConfigError
from rayhf.types import Invalid

HERE = Path(__file__).parent
PYTHON = os.environ.get("RAYHF_VERIFIERS_PYTHON")
ROW: dict[str, object] = {
    "prompt": [{"role": "user", "content": "Guess."}],
    "answer": "7",
    "example_id": 3,
}

needs_verifiers = pytest.mark.skipif(
    PYTHON is None,
    reason="RAYHF_VERIFIERS_PYTHON is not set: a python that has verifiers before 0.4",
)


def guess(*, max_turns: int = 8, **args: str) -> VerifiersConfig:
    return VerifiersConfig(
        id="guess-verifiers",
        args=args,
        max_turns=max_turns,
        python=PYTHON,  # type: ignore[arg-type]
        import_timeout_s=300,
    )


def call(name: str, **arguments: int) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


@needs_verifiers
def test_a_rollout_of_verifiers_takes_turns_with_the_policy() -> None:
    long, short, wrong, aborted, left = play(
        guess(max_turns=3), ROW, ["5", "9", "7"], ["7"], ["1", "2", "3"], ["seven"], ["5"]
    )
    assert long[0] == StepResult(messages=(), metrics={})  # the prompt is the row's
    assert [m["content"] for a in long[1:3] for m in a.messages] == ["Higher.", "Lower."]
    assert [a.reward for a in long[:3]] == [0.0] * 3
    assert long[3].done and long[3].reward == 2.0
    assert long[3].metrics == {"right": 1.0, "num_turns": 3.0}
    assert short[1].done and short[1].reward == 2.0
    # Its own limit on turns is the episode's: it is scored there.
    assert wrong[3].done and wrong[3].reward == 0.0
    assert isinstance(aborted[1], Invalid) and "ValueError" in aborted[1].reason
    assert isinstance(left[1], StepResult) and not left[1].done


@needs_verifiers
def test_tools_of_verifiers() -> None:
    config = guess(kind="tools")
    child = EnvironmentChild(config, base=HERE, describe=True)
    child.kill()
    (tool,) = child.tools
    assert tool["function"]["name"] == "add"
    assert set(tool["function"]["parameters"]["properties"]) == {"first", "second"}
    good, bad = play(
        config,
        ROW,
        [f"I add. {call('add', first=3, second=4)}", "It is 7."],
        ["<tool_call>{add}</tool_call>", f"{call('add', first=1)}{call('sub')}", "It is 8."],
    )
    assert good[1] == StepResult(messages=({"role": "tool", "content": "7"},), metrics={})
    assert good[2].done and good[2].reward == 2.0 and good[2].metrics["total_tool_calls"] == 1.0
    assert bad[1].messages[0]["role"] == "tool" and "Expecting value" in str(bad[1].messages)
    assert len(bad[2].messages) == 2 and "missing 1 required" in str(bad[2].messages)
    assert bad[3].done and bad[3].reward == 0.0


@needs_verifiers
def test_tools_with_a_state_have_one_per_episode() -> None:
    config = guess(kind="ledger")
    child = EnvironmentChild(config, base=HERE, describe=True)
    child.kill()
    assert set(child.tools[0]["function"]["parameters"]["properties"]) == {"number"}
    one, two = play(
        config, ROW, [call("put", number=3), call("put", number=4), "7"], [call("put", number=9)]
    )
    assert [a.messages[0]["content"] for a in one[1:3]] == ["3", "7"]
    assert one[3].reward == 2.0
    assert two[1].messages[0]["content"] == "9"


@needs_verifiers
def test_one_turn_and_groups_of_environments() -> None:
    ((_, answer),) = play(guess(kind="single"), ROW, ["7!"])
    assert answer.done and answer.reward == 2.0
    row = {**ROW, "info": {"env_id": "guess"}}
    right, endless = play(guess(kind="group", max_turns=2), row, ["7"], ["1", "2"])
    assert right[1].done and right[1].reward == 2.0
    # A group has no max_turns to set; an episode that has no reward yet is no score.
    assert isinstance(endless[2], Invalid) and "goes on after max_turns" in endless[2].reason


@needs_verifiers
def test_a_rubric_that_fails_is_no_score() -> None:
    ((_, answer),) = play(guess(rewards="raises"), ROW, ["7"])
    assert isinstance(answer, Invalid)
    assert "the rubric failed: Error calling reward function raises" in answer.reason


@needs_verifiers
def test_what_cannot_be_used_is_refused_before_anything_starts() -> None:
    with pytest.raises(ConfigError, match="compares the rollouts of a group"):
        EnvironmentChild(guess(rewards="best"), base=HERE)
    missing = guess().model_copy(update={"id": "no-such"})
    with pytest.raises(ConfigError, match="Could not import 'no-such' environment"):
        EnvironmentChild(missing, base=HERE)


def test_verifiers_that_is_not_installed_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"verifiers is not installed for .*`python` names"):
        EnvironmentChild(VerifiersConfig(id="guess-verifiers"), base=HERE)
