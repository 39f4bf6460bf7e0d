"""Instructions that a program can verify, and the rules that score a completion by them.

In: a completion, and the prompt's `answer` field, a JSON list: [{"kind": "words", "min": 3,
"max": 5}, {"kind": "uppercase"}]. Out: `all_constraints`, 1.0 where every one holds, else 0.0;
`share_of_constraints`, the share that holds. A malformed list raises ConfigError, so that the
completion counts as Failed and never as wrong. Time is linear in the completion's length. After
IFEval (Zhou et al. 2023).

Counts take min and max, or exactly:
  words | sentences | lines (not empty) | paragraphs (separated by empty lines)
  characters (outer white space aside)
  bullets (lines that begin with -, * or a bullet) | numbered (lines that begin with 1. or 1))
  placeholders ([such]) | capital_words (all letters upper case)
  keyword (+ word) | letter (+ letter; upper and lower case are the same)
Yes or no:
  lowercase | uppercase | json | quoted | title (has <<such>>)
  include, avoid (+ words: whole words or phrases, in any case)
  avoid_characters (+ characters)
  starts_with, ends_with (+ text, in any case)
  choice (+ options: the whole completion is one of them)
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NoReturn

from rayhf.errors import ConfigError, nearest

_WORD = re.compile(r"\w+(?:['’\-]\w+)*")
# A run of marks is looked at once, from its start: "....." would else cost the square of its
# length.
_SENTENCE_END = re.compile(r"(?<![.!?])[.!?]++[\"')\]”’]*+(?=\s|\Z)")
_BULLET = re.compile(r"^[ \t]*[-*•][ \t]+\S", re.MULTILINE)
_NUMBERED = re.compile(r"^[ \t]*\d{1,3}[.)][ \t]+\S", re.MULTILINE)
_PLACEHOLDER = re.compile(r"\[[^\[\]\n]+\]")
_TITLE = re.compile(r"<<[^<>\n]+>>")
_BLANK = re.compile(r"\n[ \t]*\n")

_COUNT_KEYS = ("min", "max", "exactly")

Spec = Mapping[str, Any]
"""A constraint's parameters, for example {"min": 3}."""


@dataclass(frozen=True, slots=True)
class _CountKind:
    """A kind of constraint that counts something."""

    count: Callable[[str, Spec], int]
    needs: tuple[str, ...] = ()

    def holds(self, text: str, spec: Spec) -> bool:
        count = self.count(text, spec)
        if "exactly" in spec:
            return count == int(spec["exactly"])
        return int(spec.get("min", 0)) <= count <= int(spec.get("max", count))


@dataclass(frozen=True, slots=True)
class _TrueFalseKind:
    """A kind of constraint that holds or does not."""

    holds: Callable[[str, Spec], bool]
    needs: tuple[str, ...] = ()


def _sentences(text: str) -> int:
    return sum(bool(_WORD.search(piece)) for piece in _SENTENCE_END.split(text))


def _paragraphs(text: str) -> int:
    return sum(bool(piece.strip()) for piece in _BLANK.split(text))


def _is_capital(word: str) -> bool:
    return word.isupper()


def _whole(word: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w){re.escape(word)}(?!\w)", re.IGNORECASE)


def _count(pattern: re.Pattern[str], text: str) -> int:
    return sum(1 for _ in pattern.finditer(text))


def _is_json(text: str) -> bool:
    body = text.strip()
    if body.startswith("```") and body.endswith("```") and len(body) >= 6:
        body = body[3:-3].removeprefix("json")
    try:
        json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return False
    return True


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _is_quoted(text: str) -> bool:
    body = text.strip()
    return len(body) >= 2 and body[0] == body[-1] == '"'


_KINDS: Mapping[str, _CountKind | _TrueFalseKind] = {
    "words": _CountKind(lambda text, _: _count(_WORD, text)),
    "sentences": _CountKind(lambda text, _: _sentences(text)),
    "lines": _CountKind(lambda text, _: sum(bool(line.strip()) for line in text.split("\n"))),
    "paragraphs": _CountKind(lambda text, _: _paragraphs(text)),
    "characters": _CountKind(lambda text, _: len(text.strip())),
    "bullets": _CountKind(lambda text, _: _count(_BULLET, text)),
    "numbered": _CountKind(lambda text, _: _count(_NUMBERED, text)),
    "placeholders": _CountKind(lambda text, _: _count(_PLACEHOLDER, text)),
    "capital_words": _CountKind(lambda text, _: sum(map(_is_capital, _WORD.findall(text)))),
    "keyword": _CountKind(lambda text, spec: _count(_whole(spec["word"]), text), needs=("word",)),
    "letter": _CountKind(
        lambda text, spec: text.casefold().count(spec["letter"].casefold()), needs=("letter",)
    ),
    "lowercase": _TrueFalseKind(lambda text, _: text.islower()),
    "uppercase": _TrueFalseKind(lambda text, _: text.isupper()),
    "include": _TrueFalseKind(
        lambda text, spec: all(_whole(word).search(text) for word in spec["words"]),
        needs=("words",),
    ),
    "avoid": _TrueFalseKind(
        lambda text, spec: not any(_whole(word).search(text) for word in spec["words"]),
        needs=("words",),
    ),
    "avoid_characters": _TrueFalseKind(
        lambda text, spec: not set(spec["characters"]) & set(text), needs=("characters",)
    ),
    "starts_with": _TrueFalseKind(
        lambda text, spec: text.strip().casefold().startswith(spec["text"].casefold()),
        needs=("text",),
    ),
    "ends_with": _TrueFalseKind(
        lambda text, spec: text.strip().casefold().endswith(spec["text"].casefold()),
        needs=("text",),
    ),
    "choice": _TrueFalseKind(
        lambda text, spec: text.strip() in spec["options"], needs=("options",)
    ),
    "json": _TrueFalseKind(lambda text, _: _is_json(text)),
    "quoted": _TrueFalseKind(lambda text, _: _is_quoted(text)),
    "title": _TrueFalseKind(lambda text, _: bool(_TITLE.search(text))),
}


@dataclass(frozen=True, slots=True)
class Constraint:
    """One instruction, checked."""

    kind: str
    spec: Spec

    def holds(self, text: str) -> bool:
        """Return whether the text follows the instruction."""
        return _KINDS[self.kind].holds(text, self.spec)


def all_constraints(
    completion: str, *, prompt: str, reference_answer: str | None, finish_reason: str
) -> float:
    """Return 1.0 where every constraint holds, else 0.0.

    Raises ConfigError for a prompt whose `answer` is no list of constraints.
    """
    return float(
        all(constraint.holds(completion) for constraint in parse_constraints(reference_answer))
    )


def share_of_constraints(
    completion: str, *, prompt: str, reference_answer: str | None, finish_reason: str
) -> float:
    """Return the share of the constraints that hold.

    Raises ConfigError for a prompt whose `answer` is no list of constraints.
    """
    constraints = parse_constraints(reference_answer)
    return sum(constraint.holds(completion) for constraint in constraints) / len(constraints)


@lru_cache(maxsize=4096)
def parse_constraints(answer: str | None) -> tuple[Constraint, ...]:
    """Return the constraints of a prompt's `answer`.

    Raises ConfigError that names the constraint, what is wrong, and the nearest valid word.
    """
    if answer is None:
        raise ConfigError(
            "constraints: the prompt has no reference answer; expected a JSON list of constraints"
        )
    try:
        listed = json.loads(answer)
    except ValueError as error:
        raise ConfigError(
            f"constraints: the reference answer is not JSON ({error}): {answer!r:.60}"
        ) from None
    if not isinstance(listed, list) or not listed:
        raise ConfigError(
            f"constraints: expected a JSON list of at least one constraint, got {answer!r:.60}"
        )
    return tuple(_parse(index, entry) for index, entry in enumerate(listed))


def _parse(index: int, entry: object) -> Constraint:
    where = f"constraints[{index}]"
    name = entry.get("kind") if isinstance(entry, dict) else None
    if not isinstance(entry, dict) or not isinstance(name, str):
        raise ConfigError(f'{where}: expected an object with a "kind", got {entry!r:.60}')
    kind = _KINDS.get(name)
    if kind is None:
        raise ConfigError(f"{where}: unknown kind {name!r}{nearest(name, _KINDS)}")
    spec = {key: value for key, value in entry.items() if key != "kind"}
    valid = [*kind.needs, *(_COUNT_KEYS if isinstance(kind, _CountKind) else ())]
    for key in spec:
        if key not in valid:
            hint = nearest(key, valid) or "; valid: none"
            raise ConfigError(f"{where}: {name} has no parameter {key!r}{hint}")
    for key in kind.needs:
        _check_text(f"{where}: {name}.{key}", key, spec.get(key))
    if isinstance(kind, _CountKind):
        _check_count(f"{where}: {name}", spec)
    return Constraint(name, spec)


def _check_text(where: str, key: str, value: object) -> None:
    if key in ("words", "options"):
        expected = "a list of texts"
        valid = isinstance(value, list) and bool(value) and all(map(_is_text, value))
    elif key == "letter":
        expected = "one letter"
        valid = _is_text(value) and len(str(value)) == 1
    else:
        expected = "a text"
        valid = _is_text(value)
    if not valid:
        raise ConfigError(f"{where} must be {expected}, got {value!r:.60}")


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _check_count(where: str, spec: Spec) -> None:
    given = [key for key in _COUNT_KEYS if key in spec]
    for key in given:
        if isinstance(spec[key], bool) or not isinstance(spec[key], int) or spec[key] < 0:
            raise ConfigError(
                f"{where}.{key} must be a whole number of at least 0, got {spec[key]!r:.60}"
            )
    if not given or ("exactly" in given and len(given) > 1):
        got = ", ".join(given) or "none of them"
        raise ConfigError(f"{where} must have min, max or both, or exactly; got {got}")
    if spec.get("min", 0) > spec.get("max", spec.get("min", 0)):
        raise ConfigError(f"{where}: min is {spec['min']}, above max {spec['max']}")


# Checked by `rayhf check`, before anything is generated.
all_constraints.check_reference_answer = parse_constraints  # type: ignore[attr-defined]
share_of_constraints.check_reference_answer = parse_constraints  # type: ignore[attr-defined]
