"""The task for acting, judging and refining: a line of animals under rule-checked constraints.

In: a seed. Out: instructions with two to four constraints, demonstrations of the three skills with
slips, and `satisfied` and `verdict_correct`, the rules that score a response and a judgement.
`owl fox dog !` is a correct response to `Write 3 animals, owl first, cat nowhere, ! ends`. A
judgement repeats the response with a note beside each word that the instruction names, states for
each constraint whether it holds, and ends with a verdict. The judgement of `owl cat dog`:

    > owl first cat nowhere dog
    3 animals ok
    first ok
    nowhere no
    ends no
    Verdict: no

The first line makes the others easy to generate: each note is copied from beside its word in the
instruction. A refiner reads the instruction, the response and the judgement, and writes a better
response. A policy trained on demonstrations with slips decodes better greedily than it samples, in
all three skills. Nothing here imports torch.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import jinja2

from rayhf.errors import ConfigError

# fmt: off
ANIMALS = (
    "ant", "ape", "bat", "bee", "cat", "cow", "dog", "elk",
    "fox", "gnu", "hen", "jay", "owl", "pig", "ram", "yak",
)
# fmt: on
COUNTS = (3, 4, 5)
MARKS = ("!", "?", ";")

JUDGE_TEMPLATE = "Judge: {{ instruction }}\n> {{ response }}"
"""Jinja2, the content of one user message."""
REFINE_TEMPLATE = "Refine: {{ instruction }}\n> {{ response }}\n{{ judgement }}"
"""Jinja2, the content of one user message."""
_JUDGE = jinja2.Template(JUDGE_TEMPLATE, undefined=jinja2.StrictUndefined)
_REFINE = jinja2.Template(REFINE_TEMPLATE, undefined=jinja2.StrictUndefined)
VERDICT = r"Verdict: (yes|no)$"
"""Pattern of a judgement's verdict; group 1 is "yes" if it states that all constraints hold."""

ACT_SLIP = 0.19
"""Probability that a demonstrated response breaks a constraint, for each constraint."""
REFINE_SLIP = 0.08
"""The same for a demonstrated refinement."""
SHOWN_SLIP = 0.25
"""The same for the responses that demonstrations judge and refine. It is higher than ACT_SLIP
because a sampled policy makes errors of its own on top of the slips that it was trained on."""
JUDGE_SLIP = 0.15
"""Probability that a demonstrated judgement swaps ok and no, for each constraint; the verdict
follows from the swapped lines."""

_PHRASES = {
    "count": "{} animals",
    "first": "{} first",
    "last": "{} last",
    "with": "{} somewhere",
    "without": "{} nowhere",
    "mark": "{} ends",
}
"""Phrase of each kind of constraint, in the order of instructions and judgements."""
_VALUES = {
    "count": tuple(map(str, COUNTS)),
    "first": ANIMALS,
    "last": ANIMALS,
    "with": ANIMALS,
    "without": ANIMALS,
    "mark": MARKS,
}
_NAMES = ("first", "last", "with", "without")
_KNOWN = frozenset(ANIMALS)


@dataclass(frozen=True, slots=True)
class Instruction:
    """Constraints on a response."""

    constraints: tuple[tuple[str, str], ...]
    """(kind, value) of each constraint: at most one of a kind, the count first, no animal twice."""

    @property
    def prompt(self) -> str:
        """Text of the instruction."""
        return "Write " + ", ".join(
            _PHRASES[kind].format(value) for kind, value in self.constraints
        )

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of its constraints."""
        return tuple(kind for kind, _ in self.constraints)


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """Result of one constraint on a response."""

    kind: str
    name: str
    """Name in a judgement: `first` or `ends` as in the instruction, and `2 animals` for a response
    with two."""
    holds: bool


def parse(prompt: str) -> Instruction:
    """Return the instruction of a prompt. Raises ConfigError for a text that is not one."""
    head, *parts = prompt.removeprefix("Write ").split(", ")
    constraints: list[tuple[str, str]] = []
    kinds = iter(_PHRASES)
    for part in (head, *parts):
        # One pass over the kinds: parts that are out of order or repeated do not match.
        constraint = next(
            (
                (kind, value)
                for kind in kinds
                for value in _VALUES[kind]
                if _PHRASES[kind].format(value) == part
            ),
            None,
        )
        if constraint is None:
            break
        constraints.append(constraint)
    instruction = Instruction(tuple(constraints))
    if not constraints or constraints[0][0] != "count" or instruction.prompt != prompt:
        raise ConfigError(
            f"prompts: {prompt!r} is no instruction, "
            "expected one like 'Write 3 animals, owl first, ! ends'"
        )
    return instruction


def instructions(seed: int) -> Iterator[Instruction]:
    """Yield different instructions of two to four constraints without end; the seed fixes them."""
    rng = random.Random(f"instructions {seed}")
    seen: set[Instruction] = set()
    while True:
        chosen = {"count", *rng.sample(list(_PHRASES)[1:], rng.choice((1, 2, 2, 3, 3)))}
        names = iter(rng.sample(ANIMALS, len(_NAMES)))
        constraints = [
            (kind, next(names) if kind in _NAMES else rng.choice(_VALUES[kind]))
            for kind in _PHRASES
            if kind in chosen
        ]
        instruction = Instruction(tuple(constraints))
        if instruction not in seen:
            seen.add(instruction)
            yield instruction


def check(instruction: Instruction, response: str) -> tuple[Check, ...]:
    """Return one Check per constraint, in order.

    Unknown words break the count: a response is known animals and at most one mark at its end.
    """
    *words, end = response.split(" ")
    if end not in MARKS:
        words.append(end)
    animals = [word for word in words if word in _KNOWN]
    checks = []
    for kind, value in instruction.constraints:
        name = _PHRASES[kind].format("").strip()
        if kind == "count":
            name = f"{len(animals)} animals"
            holds = len(animals) == len(words) == int(value)
        elif kind == "first":
            holds = animals[:1] == [value]
        elif kind == "last":
            holds = animals[-1:] == [value]
        elif kind == "mark":
            holds = end == value
        else:
            holds = (value in animals) == (kind == "with")
        checks.append(Check(kind=kind, name=name, holds=holds))
    return tuple(checks)


def judge_truth(instruction: Instruction, response: str) -> str:
    """Return the correct verdict: "yes" if every constraint holds, else "no"."""
    return "yes" if all(each.holds for each in check(instruction, response)) else "no"


def judgement(
    instruction: Instruction, response: str, slips: AbstractSet[str] = frozenset()
) -> str:
    """Return a judgement: the annotated response, a line per constraint, and the verdict.

    The lines of the constraints whose kinds are in `slips` are wrong; the verdict follows from the
    lines.
    """
    notes = {
        value: _PHRASES[kind].format(value)
        for kind, value in instruction.constraints
        if kind != "count"
    }
    checks = [(c.name, c.holds != (c.kind in slips)) for c in check(instruction, response)]
    return "\n".join(
        [
            "> " + " ".join(notes.get(word, word) for word in response.split(" ")),
            *(f"{name} {'ok' if holds else 'no'}" for name, holds in checks),
            f"Verdict: {'yes' if all(holds for _, holds in checks) else 'no'}",
        ]
    )


def compose(
    instruction: Instruction, slips: AbstractSet[str], rng: random.Random, *, draft: str = ""
) -> str:
    """Return a response that breaks exactly the constraints whose kinds are in `slips`.

    It keeps the other animals of `draft` where possible.
    """
    constraints = dict(instruction.constraints)
    named = {constraints[kind] for kind in _NAMES if kind in constraints}
    slots = [
        kind for kind in _NAMES if kind in constraints and (kind != "with" or kind not in slips)
    ]
    if "without" in constraints and "without" not in slips:
        slots.remove("without")
    count = int(constraints["count"])
    if "count" in slips:
        count += rng.choice((-1, 1)) if count > len(slots) else 1

    before = [word for word in draft.split(" ") if word in _KNOWN]
    kept = [word for word in dict.fromkeys(before) if word not in named]
    new = [
        word for word in rng.sample(ANIMALS, len(ANIMALS)) if word not in named and word not in kept
    ]
    others = kept[:count] + new
    inner = list(range(int("first" in constraints), count - int("last" in constraints)))
    words = [""] * count
    for kind, place in (("first", 0), ("last", count - 1)):
        if kind in constraints and kind not in slips:
            words[place] = constraints[kind]
    for kind in ("with", "without"):
        if kind in slots:
            index = before.index(constraints[kind]) if constraints[kind] in before else -1
            place = index if index in inner else rng.choice(inner)
            inner.remove(place)
            words[place] = constraints[kind]
    fill = iter(others)
    line = [word or next(fill) for word in words]
    if "mark" in constraints:
        wrong = [[mark] if mark else [] for mark in (*MARKS, "") if mark != constraints["mark"]]
        line += rng.choice(wrong) if "mark" in slips else [constraints["mark"]]
    return " ".join(line)


def draw_slips(instruction: Instruction, rng: random.Random, *, rate: float) -> frozenset[str]:
    """Return each of the instruction's kinds with probability `rate`."""
    return frozenset(kind for kind in instruction.kinds if rng.random() < rate)


def judge_prompt(instruction: Instruction, response: str) -> str:
    """Render JUDGE_TEMPLATE."""
    return str(_JUDGE.render(instruction=instruction.prompt, response=response))


def refine_prompt(instruction: Instruction, response: str, judged: str) -> str:
    """Render REFINE_TEMPLATE."""
    return str(_REFINE.render(instruction=instruction.prompt, response=response, judgement=judged))


def demonstrations(
    tasks: Sequence[Instruction], seed: int, *, slipping: bool
) -> dict[str, list[tuple[str, str]]]:
    """Return pairs (prompt, response) by skill, one of each skill for each instruction.

    The skills are "act", "judge" and "refine". Without `slipping` every demonstration is correct,
    and the responses to judge fail more often than a policy's samples do, so that both outcomes of
    each constraint are frequent.
    """
    rng = random.Random(f"instructions demonstrations {seed} {slipping}")
    act_rate = ACT_SLIP if slipping else 0.0
    judge_rate = JUDGE_SLIP if slipping else 0.0
    refine_rate = REFINE_SLIP if slipping else 0.0
    shown_rate = SHOWN_SLIP if slipping else 0.4
    rows: dict[str, list[tuple[str, str]]] = {"act": [], "judge": [], "refine": []}
    for instruction in tasks:
        acted = compose(instruction, draw_slips(instruction, rng, rate=act_rate), rng)
        rows["act"].append((instruction.prompt, acted))
        shown = compose(instruction, draw_slips(instruction, rng, rate=shown_rate), rng)
        judged = judgement(instruction, shown, draw_slips(instruction, rng, rate=judge_rate))
        rows["judge"].append((judge_prompt(instruction, shown), judged))
        failed = failing_response(instruction, rng)
        judged = judgement(instruction, failed, draw_slips(instruction, rng, rate=judge_rate))
        if judged.endswith("yes"):  # only a response that was judged to fail is refined
            judged = judgement(instruction, failed)
        slips = draw_slips(instruction, rng, rate=refine_rate)
        refined = compose(instruction, slips, rng, draft=failed)
        rows["refine"].append((refine_prompt(instruction, failed, judged), refined))
    return rows


def failing_response(instruction: Instruction, rng: random.Random) -> str:
    """Return a response with at least one slip, each constraint broken at SHOWN_SLIP."""
    while not (slips := draw_slips(instruction, rng, rate=SHOWN_SLIP)):
        pass
    return compose(instruction, slips, rng)


def judgement_rows(tasks: Sequence[Instruction], seed: int) -> list[dict[str, str]]:
    """Return rows {"prompt", "answer"}: judge prompts with the correct verdict.

    The responses are correct and failing in turn.
    """
    rng = random.Random(f"instructions judgements {seed}")
    rows = []
    for index, instruction in enumerate(tasks):
        response = (
            failing_response(instruction, rng)
            if index % 2
            else compose(instruction, frozenset(), rng)
        )
        rows.append(
            {
                "prompt": judge_prompt(instruction, response),
                "answer": judge_truth(instruction, response),
            }
        )
    return rows


def satisfied(
    completion: str, *, prompt: str, reference_answer: str | None, finish_reason: str
) -> float:
    """Return 1.0 if every constraint holds and the completion is not truncated, else 0.0.

    Raises ConfigError for a prompt that is not an instruction.
    """
    del reference_answer
    return float(judge_truth(parse(prompt), completion) == "yes" and finish_reason != "length")


def verdict_of(completion: str, finish_reason: str) -> str | None:
    """Return the verdict at the end of a judgement; None if it is truncated or has none."""
    match = re.search(VERDICT, completion)
    return None if match is None or finish_reason == "length" else match[1]


def verdict_correct(
    completion: str, *, prompt: str, reference_answer: str | None, finish_reason: str
) -> float:
    """Return 1.0 if the judgement's verdict equals the reference answer, else 0.0.

    Raises ConfigError for a row whose reference answer is not "yes" or "no".
    """
    if reference_answer not in ("yes", "no"):
        raise ConfigError(
            f"prompts: a judgement's answer is yes or no, and {prompt!r} has {reference_answer!r}"
        )
    return float(verdict_of(completion, finish_reason) == reference_answer)
