"""Episodes over real vLLM: the tokens are the engine's, and their log-probs those of the whole."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from engines import END, TURN, logprobs_of

from rayhf.algorithms.base import sample_and_score
from rayhf.algorithms.mcts_dpo import MCTSDPO
from rayhf.algorithms.mcts_dpo_config import MCTSDPOConfig
from rayhf.data.chat import Chat
from rayhf.environments.process import EnvironmentHost
from rayhf.environments.scorer import EpisodeScorer
from rayhf.exploration.build import build_scheduler
from rayhf.exploration.scheduler import Explore
from rayhf.models.source import load_tokenizer
from rayhf.scorer.none import NoScorer
from rayhf.tiny.second_try import SecondTryConfig
from rayhf.types import (
    Completion,
    GenerateRequest,
    Group,
    Probe,
    Prompt,
    Sampling,
    Scored,
    WeightSnapshot,
    make_row,
)

if TYPE_CHECKING:
    from transformers import Qwen2ForCausalLM

    from rayhf.rollout.engine import RolloutEngine

TEMPLATE = (
    "{% for m in messages %}{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<turn>{% endif %}"
)
"""<turn> also ends a turn of this model: then the reply begins with <end>."""


class Direct:
    """One engine as the rollout role; keeps what it generated."""

    def __init__(self, engine: RolloutEngine) -> None:
        self.engine = engine
        self.generated: dict[tuple[int, ...], list[list[int]]] = {}

    async def generate(
        self, requests: Sequence[GenerateRequest], *, version: int
    ) -> list[tuple[Completion, ...]]:
        responses = self.engine.generate(list(requests), version=version)
        for request, completions in zip(requests, responses, strict=True):
            own = self.generated.setdefault(request.token_ids, [])
            own += [c.token_ids.tolist() for c in completions]
        return responses

    async def verify(self, probe: Probe) -> None: ...

    async def update(self, snapshot: WeightSnapshot) -> None: ...


def play(rollout: Direct, directory: Path, explore: Explore, *, deterministic: bool) -> list[Group]:
    """Explore two prompts that the environment serves."""
    from engines import save_tokenizer

    save_tokenizer(directory)
    chat = Chat(load_tokenizer(directory, key="model", template=TEMPLATE), max_length=256)
    config = SecondTryConfig(tries=3)

    async def go() -> list[Group]:
        host = EnvironmentHost([config], base=directory)
        scheduler = build_scheduler(
            {"policy": rollout},
            EpisodeScorer(NoScorer(), [config], is_pairwise=False),
            chat=chat,
            versions={"policy": 0},
            deterministic=deterministic,
            environments=host,
            environment_configs=(config,),
        )
        prompts = [
            Prompt(
                prompt_id=f"p{i}",
                messages=(),
                token_ids=(3 + i, TURN),
                row={"prompt": str(i), "answer": "x"},
            )
            for i in range(2)
        ]
        try:
            return await scheduler.run(
                prompts,
                explore,
                sampling=Sampling(max_tokens=150),
                seed=3,
                done=lambda group: None,
            )
        finally:
            host.close()

    return asyncio.run(go())


@pytest.mark.parametrize("deterministic", [True, False])
def test_tokens_are_the_engines_and_logprobs_those_of_the_whole(
    shared: tuple[RolloutEngine, Qwen2ForCausalLM],
    tmp_path: Path,
    deterministic: bool,
) -> None:
    engine, model = shared
    rollout = Direct(engine)
    groups = play(
        rollout,
        tmp_path,
        lambda prompt, context: sample_and_score(prompt, context, 4),
        deterministic=deterministic,
    )
    ends = set()
    for group in groups:
        for index, sample in enumerate(group.samples):
            assert isinstance(sample.outcome, Scored)
            row = make_row(group, index, score=0.0)
            episode = sample.completion.episode
            assert episode is not None
            # Each turn is, token by token, what the engine wrote after all that was before.
            written = [turn.tokens for turn in episode.turns if turn.role == "assistant"]
            own = np.split(row.response_ids, np.cumsum(written)[:-1])
            places = np.split(row.predicted_at + 1, np.cumsum(written)[:-1])
            whole = (*row.fed_ids.tolist(), int(row.response_ids[-1]))
            for turn, place in zip(own, places, strict=True):
                before = whole[: place[0]]
                assert turn.tolist() in rollout.generated[before]
                ends.add(int(turn[-1]))
            # And what the learner computes on the whole is what the engine reported.
            logp = logprobs_of(model, whole).gather(1, torch.tensor(whole[1:])[:, None])[:, 0]
            gap = logp.numpy()[row.predicted_at] - sample.completion.logprobs
            assert np.abs(gap).mean() < 1e-4
    turns = [len(s.completion.episode.turns) for g in groups for s in g.samples]  # type: ignore[union-attr]
    assert max(turns) > 1
    assert ends >= {END, TURN}


def test_turns_of_a_tree_have_the_logprobs_of_what_they_follow(
    shared: tuple[RolloutEngine, Qwen2ForCausalLM], tmp_path: Path
) -> None:
    engine, model = shared
    algorithm = MCTSDPO(MCTSDPOConfig(iterations=3, depth=3, width=(3, 2)))
    rollout = Direct(engine)
    groups = play(rollout, tmp_path, algorithm.explore, deterministic=True)
    depths = set()
    for group in groups:
        for index, sample in enumerate(group.samples):
            if sample.kind != "step":
                continue
            assert "estimate" in sample.stats
            depths.add(sample.stats["depth"])
            context = tuple(group.context_ids(index).tolist())
            own = sample.completion.token_ids.tolist()
            assert any(whole[: len(own)] == own for whole in rollout.generated[context])
            whole = (*context, *own)
            logp = logprobs_of(model, whole).gather(1, torch.tensor(whole[1:])[:, None])[:, 0]
            gap = logp.numpy()[len(context) - 1 :] - sample.completion.logprobs
            assert np.abs(gap).mean() < 1e-4
    assert max(depths) > 1
