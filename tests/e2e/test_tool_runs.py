"""A campaign whose policy calls tools: what it trains on, and exact resume within episodes."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from campaign_runs import copy_as_if_killed, metrics, run, samples, start
from transformers import AutoTokenizer, LlamaForCausalLM
from waiting import wait_until
from world import SIZE, make_world, write_config

from rayhf.environments.tool_calls import ToolCall, tool_calls
from rayhf.tiny.language_model import Phase, new_model, train
from rayhf.tiny.tokenizer import POLICY_FORMAT, train_tokenizer

pytestmark = pytest.mark.timeout(1200)
TEMPLATE = (
    "{% for tool in tools or [] %}<|system|>{{ tool.function.name }}<|end|>{% endfor %}"
    "{% for m in messages %}<|{{ 'user' if m.role == 'tool' else m.role }}|>"
    "{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TOOLS = '''
def add(first: int, second: int) -> int:
    """
    Add two numbers.

    Args:
        first: The first number.
        second: The second number.
    """
    return first + second
'''


def teach_to_call(world: Path) -> None:
    """Train the policy to write a call or an answer: no random model writes a call by itself."""
    rng = random.Random(0)
    answers = []
    for _ in range(300):
        arguments = {"first": rng.randint(0, 9), "second": rng.randint(0, 9)}
        call = json.dumps({"name": "add", "arguments": arguments})
        answer = f"It is {rng.randint(0, 18)}."
        answers.append(rng.choice([f"<tool_call>{call}</tool_call>", answer]))
    questions = [f"Say something about {rng.randint(0, 200)}" for _ in answers]
    tokenizer = train_tokenizer(
        [*questions, *answers, "add"], POLICY_FORMAT, max_vocab=400, max_length=512
    )
    tokenizer.chat_template = TEMPLATE
    policy = new_model(SIZE, tokenizer, seed=0)
    train(
        policy,
        tokenizer,
        list(zip(questions, answers, strict=True)),
        Phase(steps=120, batch=16, lr=5e-3, lr_end=1e-3),
        seed=0,
        progress=lambda done: None,
    )
    policy.save_pretrained(world / "policy")
    tokenizer.save_pretrained(world / "policy")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = make_world(tmp_path_factory.mktemp("tools"))
    teach_to_call(directory)
    (directory / "my_tools.py").write_text(TOOLS)
    return directory


SECTIONS: dict[str, Any] = {
    "policy": {"max_length": 512},
    "prompts": {"batch": 8},
    "environment": {
        "type": "tools",
        "tools": ["my_tools:add"],
        "max_turns": 3,
        "reply_tokens": 200,
    },
    "algorithm": {
        "type": "grpo",
        "samples": 4,
        "kl": {"coef": 0.05, "estimator": "k3", "where": "loss"},
        "loss": {"aggregate": "token_mean"},
    },
    "rollout": {"max_tokens": 120},
    "learner": {"prompts_per_step": 8, "lr": 3e-4},
}


def test_calls_are_answered_masked_and_survive_a_kill(world: Path) -> None:
    """Processes are killed when the second iteration has generated some of its turns."""
    process = start(world, write_config(world, "first", **SECTIONS))
    journal = world / "first/journal/iteration-000002.journal"

    def has_generated() -> bool:
        return journal.exists() and journal.stat().st_size > 0

    wait_until(lambda: has_generated() or process.poll() is not None, 400)
    copy_as_if_killed(process, world / "first", world / "second")
    _, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    assert (world / "second" / journal.relative_to(world / "first")).exists()
    assert len(metrics(world, "second")) < 3, "it had finished before it was killed"
    out, _ = run(world, write_config(world, "second", **SECTIONS))
    assert "continue: after iteration" in out
    assert metrics(world, "first") == metrics(world, "second")
    assert samples(world, "first", 2) == samples(world, "second", 2)
    check_calls(world)
    check_masks(world)


def check_calls(world: Path) -> None:
    """Results of calls are the functions' values, read by the turn that follows."""
    tokenizer = AutoTokenizer.from_pretrained(world / "policy")
    right = 0
    for row in samples(world, "first", 2):
        context = tokenizer.decode(row["context_ids"])
        assert "<|system|>add<|end|>" in context  # the template tells the policy of the tool
        turns: Any = row["turns"]
        for turn, reply in pairwise(turns):
            calls = tool_calls(turn["content"]) if turn["role"] == "assistant" else []
            if len(calls) != 1 or not isinstance(calls[0], ToolCall):
                continue
            assert reply["role"] == "tool"
            arguments = calls[0].arguments
            if calls[0].name == "add" and set(arguments) == {"first", "second"}:
                right += 1
                assert reply["content"] == str(arguments["first"] + arguments["second"])
                if reply["tokens"]:
                    assert reply["content"] in tokenizer.decode(row["inserted_ids"])
    last = metrics(world, "first")[-1]
    assert right > 5
    assert last["environment/own/tool_calls"] > last["environment/own/tool_errors"]
    assert last["environment/turns"] > 1


def check_masks(world: Path) -> None:
    """KL and length are those of the policy's tokens, in the context of all."""
    reference = LlamaForCausalLM.from_pretrained(world / "policy").float().eval()
    own: list[float] = []
    tokens = []
    for row in samples(world, "first", 2):
        response = np.array(row["token_ids"])
        inserted: Any = row["inserted_ids"] or []
        before: Any = row["inserted_before"] or []
        whole = [*row["context_ids"], *np.insert(response, before, inserted)]  # type: ignore[misc]
        places = np.delete(
            np.arange(len(whole) - len(row["context_ids"])),  # type: ignore[arg-type]
            np.array(before, dtype=int) + np.arange(len(before)),
        ) + len(row["context_ids"])  # type: ignore[arg-type]
        assert [whole[place] for place in places] == response.tolist()
        with torch.no_grad():
            logp = reference(torch.tensor([whole])).logits[0].log_softmax(-1).numpy()
        gap = np.array(row["logprobs"]) - logp[places - 1, response]
        own += (np.exp(-gap) - 1 + gap).tolist()
        tokens.append(len(response))
    last = metrics(world, "first")[-1]
    assert last["rollout/length_mean"] == pytest.approx(np.mean(tokens))
    assert abs(last["rollout/mismatch_kl"]) < 1e-4
    assert last["ppo/kl_loss"] == pytest.approx(np.mean(own), rel=1e-2)
    assert last["reference/kl_k3"] == pytest.approx(np.sum(own) / len(tokens), rel=1e-2)
    assert np.mean(own) > 1e-4  # the policy has moved
