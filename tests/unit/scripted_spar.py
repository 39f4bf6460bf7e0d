"""SPaR with a scripted actor, judge and refiner; token ids are characters."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping, Sequence

from rayhf.algorithms.base import SelectionContext
from rayhf.algorithms.context import ExplorationContext
from rayhf.algorithms.spar import SPaR
from rayhf.algorithms.spar_config import SPaRConfig
from rayhf.types import (
    Comparison,
    Completion,
    Example,
    Group,
    Message,
    Outcome,
    Prompt,
    Sampling,
    Scored,
    derive_seed,
    float_array,
    token_array,
)

Script = Callable[[str, str, int], str]
"""(policy, context, draw) -> the text of that policy's draw 0, 1, ... after that context."""

END = 0
"""The end-of-turn token."""
SHORT: Mapping[str, object] = {
    "judge_template": "J {{ instruction }}|{{ response }}",
    "refine_template": "R {{ instruction }}|{{ response }}|{{ judgement }}",
    "verdict_pattern": "(yes|no)$",
    "refined_pattern": None,
}


def spar(**changes: object) -> SPaR:
    return SPaR(SPaRConfig.model_validate({**SHORT, "samples": 3, "judge_votes": 3, **changes}))


def ids(text: str) -> tuple[int, ...]:
    return tuple(map(ord, text))


def make_prompt(text: str = "do it") -> Prompt:
    return Prompt(
        prompt_id=text,
        messages=({"role": "user", "content": text},),
        token_ids=ids(f"<user>{text}<assistant>"),
    )


def make_completion(text: str, *, request: int = 0, index: int = 0) -> Completion:
    """A completion that is truncated where its text ends in "..."."""
    truncated = text.endswith("...")
    token_ids = ids(text) if truncated else (*ids(text), END)
    return Completion(
        prompt_id="p",
        index=index,
        seed=100 * request + index,
        text=text,
        token_ids=token_array(token_ids),
        logprobs=float_array((-1.0,) * len(token_ids)),
        finish_reason="length" if truncated else "stop",
        policy_version=0,
    )


class ScriptedContext:
    """An exploration context whose completions come from a script."""

    def __init__(
        self,
        script: Script,
        *,
        outcomes: Mapping[str, Outcome] | None = None,
        limit: int = 10_000,
        delay: bool = False,
    ) -> None:
        self.script = script
        self.outcomes = outcomes or {}
        self.limit = limit
        self.delay = delay
        self.sampling = Sampling(max_tokens=99)
        self.sampled: list[tuple[str, str, int, Sampling | None]] = []
        """(policy, context, n, sampling) of every call of `sample`."""
        self.draws: dict[tuple[str, str], int] = {}
        """Completions so far, by policy and context."""

    def derive_seed(self, *parts: int | str) -> int:
        return derive_seed("fake", *parts)

    def render(self, messages: Sequence[Message]) -> tuple[int, ...]:
        return ids("".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>")

    def encode(self, text: str) -> tuple[int, ...]:
        return (*ids(text), END)

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(map(chr, token_ids))

    def room(self, context: Sequence[int]) -> int:
        return self.limit - len(context)

    has_environment = False

    async def play_on(
        self, n: int, path: Sequence[Completion] = ()
    ) -> list[tuple[Completion, ...]]:
        raise AssertionError("there is no environment")

    async def sample(
        self,
        n: int,
        *,
        context: Sequence[int] | None = None,
        prefix: Sequence[int] = (),
        sampling: Sampling | None = None,
        policy: str = "policy",
    ) -> tuple[Completion, ...]:
        request = len(self.sampled)
        text = "" if context is None else self.decode(context)
        self.sampled.append((policy, text, n, sampling))
        first = self.draws.get((policy, text), 0)
        self.draws[policy, text] = first + n
        texts = [self.script(policy, text, draw) for draw in range(first, first + n)]
        for _ in range(random.randrange(20) if self.delay else 1):
            await asyncio.sleep(0)
        return tuple(make_completion(t, request=request, index=i) for i, t in enumerate(texts))

    async def score(
        self, completions: Sequence[Completion], *, prompt: Prompt | None = None
    ) -> tuple[Outcome, ...]:
        await asyncio.sleep(0)
        return tuple(self.outcomes.get(c.text, Scored(value=0.0)) for c in completions)

    async def compare(self, completions: Sequence[Completion]) -> Comparison:
        raise NotImplementedError("SPaR compares nothing")


def scripted(
    answers: Sequence[str],
    votes: Mapping[str, Sequence[str]],
    refinements: Mapping[str, Sequence[str]],
) -> Script:
    """Return a script: the actor's answers in turn, the judge's votes by judged text, the
    refiner's texts by refined text."""

    def script(policy: str, context: str, draw: int) -> str:
        if not context:
            assert policy == "policy"
            return answers[draw]
        task, *parts = context.removeprefix("<user>").removesuffix("<assistant>").split("|")
        table = votes if task.startswith("J ") else refinements
        return table[parts[0]][draw % len(table[parts[0]])]

    return script


def explore(algorithm: SPaR, context: ExplorationContext, prompt: Prompt | None = None) -> Group:
    return asyncio.run(algorithm.explore(prompt or make_prompt(), context))


def select(
    algorithm: SPaR, *groups: Group, seed: int = 1
) -> tuple[list[Example], list[Example], Mapping[str, float]]:
    """The actor's examples, the refiner's examples, the metrics."""
    context = SelectionContext(iteration=1, seed=seed, sampling=Sampling(max_tokens=8))
    selection = algorithm.select(groups, context)
    actor = [e for e in selection.examples if e.objective == "policy"]
    refiner = [e for e in selection.examples if e.objective == "refiner"]
    return actor, refiner, selection.metrics


YES = ["a yes", "b yes", "c yes"]
NO = ["a no", "b no", "c no"]
MOSTLY_NO = ["a yes", "b no", "c no"]
MOSTLY_YES = ["a no", "b yes", "c yes"]
TWO_STEPS = scripted(
    ["good", "bad", "good"],
    {
        "good": YES,
        "bad": MOSTLY_NO,
        "x": NO,
        "y": MOSTLY_NO,
        "z": NO,
        "fine": MOSTLY_YES,
        "ok": YES,
        "w": NO,
    },
    {"bad": ["x", "y", "z"], "y": ["fine", "w", "w"], "x": ["w"]},
)
"""A failed answer, refined in two steps."""
