"""Self-play loops on a tabular policy: their own code, without engines and without a network.

In: an algorithm's config, a game's win probabilities, a seed. Out: the policy before every
iteration. explore, select, credit and loss are the loop's; the policy is one softmax over the moves
for all prompts, sampled with numpy and trained with Adam.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rayhf.algorithms.base import Algorithm, SelectionContext, population_of
from rayhf.config.registry import ALGORITHMS
from rayhf.learner.micro_batch import build_micro_batch
from rayhf.losses.base import Totals
from rayhf.types import (
    Compared,
    Comparison,
    Completion,
    Example,
    Prompt,
    Sampling,
    derive_seed,
    float_array,
    token_array,
)

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Sizes of a simulated campaign."""

    iterations: int = 100
    batch: int = 32
    """Prompts per iteration."""
    steps: int = 10
    """Optimizer steps per iteration, each on all examples."""
    lr: float = 0.05
    """Adam's rate, in nats per step at most."""


class TabularContext:
    """Exploration context of one prompt: completions are single moves."""

    def __init__(self, logp: Array, preference: Array, rng: np.random.Generator) -> None:
        self._logp = logp
        self._preference = preference
        self._rng = rng

    async def sample(self, n: int) -> tuple[Completion, ...]:
        """Draw n moves."""
        moves = self._rng.choice(len(self._logp), size=n, p=np.exp(self._logp))
        return tuple(
            Completion(
                prompt_id="",
                index=index,
                seed=0,
                text=str(move),
                token_ids=token_array([move]),
                logprobs=float_array([self._logp[move]]),
                finish_reason="stop",
                policy_version=0,
            )
            for index, move in enumerate(moves.tolist())
        )

    async def compare(self, completions: Sequence[Completion]) -> Comparison:
        """Return the game's win probabilities."""
        moves = [int(completion.token_ids[0]) for completion in completions]
        return Compared(win=self._preference[np.ix_(moves, moves)].copy(), source="pairwise")


def play(
    settings: dict[str, Any],
    preference: Array,
    opening: Sequence[float],
    *,
    seed: int,
    schedule: Schedule,
) -> Array:
    """Return the policies before each iteration and after the last: (iterations + 1, K)."""
    config = ALGORITHMS.config_type(settings["type"]).model_validate(settings)
    algorithm: Algorithm = ALGORITHMS.build(config)
    logits = torch.tensor(np.log(opening), dtype=torch.float32, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=schedule.lr)
    initial = _log_probs(logits)
    policies = [np.exp(initial)]
    for iteration in range(1, schedule.iterations + 1):
        logp = _log_probs(logits)
        examples = _explored(algorithm, logp, preference, (seed, iteration), schedule.batch)
        frozen = logp if algorithm.reference and algorithm.reference.is_learner else initial
        columns = {"old_logp": logp, "ref_logp": frozen}
        for number, past in enumerate(population_of(algorithm).read_by(iteration), start=1):
            columns[f"past_logp_{number}"] = np.log(policies[past])
        examples, _ = algorithm.credit([_annotated(e, columns) for e in examples])
        if examples:
            _train(algorithm, logits, optimizer, examples, schedule.steps)
        policies.append(np.exp(_log_probs(logits)))
    return np.array(policies)


def _log_probs(logits: torch.Tensor) -> Array:
    logp: Array = logits.detach().double().log_softmax(-1).numpy()
    return logp


def _explored(
    algorithm: Algorithm, logp: Array, preference: Array, seed: tuple[int, int], batch: int
) -> Sequence[Example]:
    rng = np.random.default_rng(derive_seed("tabular", *seed))
    context: Any = TabularContext(logp, preference, rng)
    prompts = [
        Prompt(prompt_id=str(i), messages=({"role": "user", "content": "?"},), token_ids=(0,))
        for i in range(batch)
    ]

    async def explore() -> list[Any]:
        return [await algorithm.explore(prompt, context) for prompt in prompts]

    selection = SelectionContext(
        iteration=seed[1], seed=derive_seed("select", *seed), sampling=Sampling(max_tokens=1)
    )
    return algorithm.select(asyncio.run(explore()), selection).examples


def _annotated(example: Example, columns: Mapping[str, Array]) -> Example:
    """Return the example with each move's log-prob under several policies, (K,) by column."""
    rows = [
        row.with_tokens(
            **{name: logp[row.response_ids].astype(np.float32) for name, logp in columns.items()}
        )
        for row in example.rows
    ]
    return replace(example, rows=tuple(rows))


def _train(
    algorithm: Algorithm,
    logits: torch.Tensor,
    optimizer: torch.optim.Optimizer,
    examples: Sequence[Example],
    steps: int,
) -> None:
    rows = [row for example in examples for row in example.rows]
    moves = torch.tensor([int(row.response_ids[0]) for row in rows])
    totals = Totals(tokens=len(rows), rows=len(rows), examples=len(examples))
    micro = build_micro_batch(examples, totals, "cpu")
    loss = algorithm.loss()
    for _ in range(steps):
        optimizer.zero_grad()
        loss(logits.log_softmax(-1)[moves], micro).loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
