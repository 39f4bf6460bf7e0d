"""SPaR with a scripted actor, judge and refiner; token ids are characters."""

from __future__ import annotations

import asyncio
import random

from rayhf.algorithms.base import SelectionContext
from rayhf.algorithms.spar import SPaR
from rayhf.config.spar import SPaRConfig
from rayhf.types import Completion, Prompt, Sampling, Scored, derive_seed

END = 0
"""The end-of-turn token."""


SHORT = {
    "judge_template": "J {{ instruction }}|{{ response }}",
    "refine_template": "R {{ instruction }}|{{ response }}|{{ judgement }}",
    "verdict_pattern": "(yes|no)$",
    "refined_pattern": None,
}


def spar(**changes):
    return SPaR(SPaRConfig.model_validate({**SHORT, "samples": 3, "judge_votes": 3, **changes}))


def ids(text):
    return tuple(map(ord, text))


def make_prompt(text="do it"):
    return Prompt(
        prompt_id=text,
        messages=({"role": "user", "content": text},),
        token_ids=ids(f"<user>{text}<assistant>"),
    )


class FakeExplorer:
    """`say(policy, context, draw)` writes the text of draw 0, 1, ... of all draws after that
    context by that policy."""

    def __init__(self, say, *, outcomes=None, limit=10_000, delay=False):
        self.say, self.outcomes, self.limit, self.delay = say, outcomes or {}, limit, delay
        self.sampling = Sampling(max_tokens=99)
        self.asked, self.draws, self.requests = [], {}, 0

    def derive_seed(self, *parts):
        return derive_seed("fake", *parts)

    def render(self, messages):
        return ids("".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>")

    def encode(self, text):
        return (*ids(text), END)

    def room(self, context):
        return self.limit - len(context)

    async def sample(self, n, *, context=None, prefix=(), sampling=None, policy="policy"):
        number, self.requests = self.requests, self.requests + 1
        text = "" if context is None else "".join(map(chr, context))
        self.asked.append((policy, text, n, sampling))
        first = self.draws.get((policy, text), 0)
        self.draws[policy, text] = first + n
        written = [self.say(policy, text, draw) for draw in range(first, first + n)]
        for _ in range(random.randrange(20) if self.delay else 1):
            await asyncio.sleep(0)
        return tuple(self._completion(number, i, text) for i, text in enumerate(written))

    def _completion(self, number, index, text):
        cut = text.endswith("...")
        return Completion(
            prompt_id="p",
            index=index,
            seed=100 * number + index,
            text=text,
            token_ids=ids(text) if cut else (*ids(text), END),
            logprobs=(-1.0,) * (len(text) + (not cut)),
            finish_reason="length" if cut else "stop",
            policy_version=0,
        )

    async def score(self, completions):
        await asyncio.sleep(0)
        return tuple(self.outcomes.get(c.text, Scored(value=0.0)) for c in completions)


def scripted(answers, votes, refinements):
    """Texts by draw: of the actor, of the judge per judged text (in turn), of the refiner per
    refined text."""

    def say(policy, context, draw):
        if not context:
            assert policy == "policy"
            return answers[draw]
        kind, *parts = context.removeprefix("<user>").removesuffix("<assistant>").split("|")
        table = votes if kind.startswith("J ") else refinements
        return table[parts[0]][draw % len(table[parts[0]])]

    return say


def explore(algorithm, explorer, prompt=None):
    return asyncio.run(algorithm.explore(prompt or make_prompt(), explorer))


def select(algorithm, *groups, seed=1):
    selection = algorithm.select(groups, SelectionContext(iteration=1, seed=seed))
    parts = {
        name: [e for e in selection.examples if e.objective == name]
        for name in ("policy", "refiner")
    }
    return parts["policy"], parts["refiner"], selection.metrics


YES, NO = ["a yes", "b yes", "c yes"], ["a no", "b no", "c no"]


MOSTLY_NO, MOSTLY_YES = ["a yes", "b no", "c no"], ["a no", "b yes", "c yes"]


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
