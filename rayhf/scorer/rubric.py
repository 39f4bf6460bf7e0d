"""Rubrics: weighted criteria that a judge holds a completion to, one by one.

In: criteria of the config, or of a column of the prompt's row. Out: the text and the JSON schema of
the question; and, from the judge's reply, one answer from 0 to 1 per criterion and their weighted
mean.

With answers a_i and weights w_i, the score is the mean of q_i with weights |w_i|, where q_i = a_i
for a merit (w_i > 0) and q_i = 1 - a_i for a fault (w_i < 0). It is the weighted sum of answers,
scaled to 0..1 over the rubric's range instead of being cut off there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Annotated

from pydantic import BeforeValidator, Field, JsonValue, ValidationError, model_validator

from rayhf.config.base import Name, Section
from rayhf.config.scorers import CurriculumConfig
from rayhf.scorer.judge_text import verdict_schema
from rayhf.types import Prompt

_TEXT_KEYS = ("criterion", "description", "text")
_WEIGHT_KEYS = ("weight", "points")
"""What data sets call a criterion's text and weight; their other keys are ignored."""
# The answer follows its colon at once and ends its line: in "Criterion 1 (no commas): yes" or
# "Criterion 1: no commas, so yes" another word would be taken for it.
_ANSWER = re.compile(
    r"""\bcriterion[ _]?(\d+)["'*\s]*[:=]["'*\s]*(yes|no|\d+(?:\.\d+)?)(?:/\d+)?\b"""
    r"""(?=["'*.)\s]*(?:$|\n|,\s*"|\}))""",
    re.IGNORECASE,
)


class Criterion(Section):
    """One criterion."""

    criterion: Annotated[str, Field(min_length=1)]
    """What the judge checks. A string in a list of criteria is short for {criterion: string}."""
    name: Name | None = None
    """Name of its answers in samples and metrics. Default: its number, from 1."""
    weight: float = 1.0
    """Not 0. Below 0 it is a fault: what counts is that the answer is no, or low."""
    scale: Annotated[int, Field(ge=2, le=100)] | None = None
    """Answered by a whole number from 1 to this. Default: by yes or no."""

    @model_validator(mode="after")
    def _check_weight(self) -> Criterion:
        if self.weight == 0:
            raise ValueError("weight is 0; expected another number")
        return self

    @property
    def answers(self) -> tuple[str | int, ...]:
        """What the judge may answer."""
        return ("yes", "no") if self.scale is None else tuple(range(1, self.scale + 1))

    def value(self, word: str) -> float | None:
        """Return an answer from 0 to 1; None where it is not one of this criterion."""
        if self.scale is None:
            return {"yes": 1.0, "no": 0.0}.get(word.casefold())
        try:
            number = float(word)
        except ValueError:
            return None
        return (number - 1.0) / (self.scale - 1.0) if 1.0 <= number <= self.scale else None


class RubricConfig(Section):
    """Criteria for all prompts, or the column that has each prompt's own."""

    criteria: tuple[
        Annotated[
            Criterion,
            BeforeValidator(lambda value: _expand(value), json_schema_input_type=str | Criterion),
        ],
        ...,
    ] = ()
    column: str | None = None
    """Column of the row with a list of criteria (or its JSON): strings, or mappings with
    `criterion` (or `description`, `text`), and optionally `weight` (or `points`), `scale`,
    `name`."""
    curriculum: CurriculumConfig | None = None
    """Change the weights of the criteria as the policy learns them. With `criteria` only; p is how
    often a completion meets a criterion. Default: the weights stay."""

    @model_validator(mode="after")
    def _check_one(self) -> RubricConfig:
        if bool(self.criteria) == bool(self.column):
            raise ValueError("expected a list of criteria, or {column: NAME}")
        if self.column and self.curriculum:
            raise ValueError(
                "curriculum follows criteria that all prompts share, and those of a column are "
                "each prompt's own; expected a list of criteria, or no curriculum"
            )
        _check_names(self.criteria)
        return self

    def of(self, prompt: Prompt) -> tuple[Criterion, ...]:
        """Return the criteria of a prompt. Raises ValueError where its row has none."""
        if self.column is None:
            return self.criteria
        value = prompt.row.get(self.column)
        if value is None:
            raise ValueError(f"the row has no rubric in column {self.column!r}")
        return parse_criteria(value)


Rubric = Annotated[
    RubricConfig,
    BeforeValidator(
        lambda value: {"criteria": value} if isinstance(value, list | tuple) else value,
        json_schema_input_type=RubricConfig | tuple[str | Criterion, ...],
    ),
]
"""A list is short for {criteria: list}."""


def _expand(value: object) -> object:
    return {"criterion": value} if isinstance(value, str) else value


def _check_names(criteria: Sequence[Criterion]) -> None:
    names = part_names(criteria)
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two criteria are named {name!r}")


def part_names(criteria: Sequence[Criterion]) -> list[str]:
    """Return the names of the criteria in samples and metrics."""
    return [criterion.name or str(number) for number, criterion in enumerate(criteria, 1)]


def parse_criteria(value: object) -> tuple[Criterion, ...]:
    """Return the criteria in a column's value. Raises ValueError with the reason."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise ValueError(f"the rubric is no JSON: {value!r:.60}") from None
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise ValueError(f"the rubric is {value!r:.60}, expected a list of criteria")
    criteria = tuple(_parse(entry, number) for number, entry in enumerate(value, 1))
    _check_names(criteria)
    return criteria


def _parse(entry: object, number: int) -> Criterion:
    if isinstance(entry, str):
        entry = {"criterion": entry}
    if not isinstance(entry, Mapping):
        raise ValueError(f"criterion {number} is {entry!r:.60}, expected a string or a mapping")
    fields = {
        "criterion": _first(entry, _TEXT_KEYS),
        "weight": _first(entry, _WEIGHT_KEYS),
        "scale": entry.get("scale"),
        "name": entry.get("name"),
    }
    try:
        return Criterion.model_validate({k: v for k, v in fields.items() if v is not None})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "it"
        message = first["msg"].removeprefix("Value error, ")
        raise ValueError(
            f"criterion {number} of the rubric: {where}: {message[:1].lower()}{message[1:]}"
        ) from None


def _first(entry: Mapping[str, object], keys: Sequence[str]) -> object:
    return next((entry[key] for key in keys if entry.get(key) is not None), None)


def criteria_text(criteria: Sequence[Criterion]) -> str:
    """Return the criteria as the question shows them, one line each."""
    return "\n".join(
        f"Criterion {number}: {' '.join(criterion.criterion.split())} "
        + ("(yes or no)" if criterion.scale is None else f"(1 to {criterion.scale})")
        for number, criterion in enumerate(criteria, 1)
    )


def rubric_schema(criteria: Sequence[Criterion]) -> dict[str, JsonValue]:
    """Return the JSON schema of a reply."""
    return verdict_schema(
        {f"criterion_{number}": one.answers for number, one in enumerate(criteria, 1)}
    )


def read_answers(text: str, criteria: Sequence[Criterion]) -> tuple[float, ...] | None:
    """Return each criterion's answer, the last in the text; None unless all can be read."""
    words = {int(match[1]): match[2] for match in _ANSWER.finditer(text)}
    values = [
        criterion.value(words.get(number, "")) for number, criterion in enumerate(criteria, 1)
    ]
    read = tuple(value for value in values if value is not None)
    return read if len(read) == len(criteria) else None


def weighted_score(criteria: Sequence[Criterion], answers: Sequence[float]) -> float:
    """Return the score from 0 to 1, see the module's docstring."""
    return weighted_mean([criterion.weight for criterion in criteria], answers)


def weighted_mean(weights: Sequence[float], answers: Sequence[float]) -> float:
    """Return the mean of answers from 0 to 1; of 1 - answer where the weight is below 0."""
    total = sum(
        abs(weight) * (answer if weight > 0 else 1.0 - answer)
        for weight, answer in zip(weights, answers, strict=True)
    )
    return total / sum(map(abs, weights))
