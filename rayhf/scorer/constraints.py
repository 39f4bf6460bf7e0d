"""Instructions that a program can verify, and the rules that score an answer by them. After IFEval
(Zhou et al. 2023).

In: an answer, and the prompt's `answer` field, a JSON list: [{"kind": "words", "min": 3, "max": 5},
{"kind": "uppercase"}]. Out: `all_constraints`, 1.0 where every one holds, else 0.0;
`share_of_constraints`, the share that holds. A malformed list raises ConfigError, so that the
answer counts as Failed and never as wrong. Time is linear in the answer's length.

Counts take min and max, or exactly:
  words | sentences | lines (not empty) | paragraphs (separated by empty lines) | characters (white
  space at the ends aside) bullets (lines that begin with -, * or a bullet) | numbered (lines that
  begin with 1. or 1)) | placeholders ([such]) capital_words (all letters upper case) | keyword (+
  word) | letter (+ letter; upper and lower case are the same)
Yes or no:
  lowercase | uppercase | include, avoid (+ words: whole words or phrases, in any case) |
  avoid_characters (+ characters) starts_with, ends_with (+ text, in any case) | choice (+ options:
  the whole answer is one of them) | json | quoted title (has <<such>>)
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

_COUNT = ("min", "max", "exactly")


@dataclass(frozen=True, slots=True)
class _Counted:
    """A kind that counts something."""

    count: Callable[[str, Mapping[str, Any]], int]
    needs: tuple[str, ...] = ()

    def holds(self, text: str, spec: Mapping[str, Any]) -> bool:
        found = self.count(text, spec)
        if "exactly" in spec:
            return found == int(spec["exactly"])
        return int(spec.get("min", 0)) <= found <= int(spec.get("max", found))


@dataclass(frozen=True, slots=True)
class _Held:
    """A kind that is so or not."""

    holds: Callable[[str, Mapping[str, Any]], bool]
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


_KINDS: Mapping[str, _Counted | _Held] = {
    "words": _Counted(lambda text, _: _count(_WORD, text)),
    "sentences": _Counted(lambda text, _: _sentences(text)),
    "lines": _Counted(lambda text, _: sum(bool(line.strip()) for line in text.split("\n"))),
    "paragraphs": _Counted(lambda text, _: _paragraphs(text)),
    "characters": _Counted(lambda text, _: len(text.strip())),
    "bullets": _Counted(lambda text, _: _count(_BULLET, text)),
    "numbered": _Counted(lambda text, _: _count(_NUMBERED, text)),
    "placeholders": _Counted(lambda text, _: _count(_PLACEHOLDER, text)),
    "capital_words": _Counted(lambda text, _: sum(map(_is_capital, _WORD.findall(text)))),
    "keyword": _Counted(lambda text, spec: _count(_whole(spec["word"]), text), needs=("word",)),
    "letter": _Counted(
        lambda text, spec: text.casefold().count(spec["letter"].casefold()), needs=("letter",)
    ),
    "lowercase": _Held(lambda text, _: text.islower()),
    "uppercase": _Held(lambda text, _: text.isupper()),
    "include": _Held(
        lambda text, spec: all(_whole(word).search(text) for word in spec["words"]),
        needs=("words",),
    ),
    "avoid": _Held(
        lambda text, spec: not any(_whole(word).search(text) for word in spec["words"]),
        needs=("words",),
    ),
    "avoid_characters": _Held(
        lambda text, spec: not set(spec["characters"]) & set(text), needs=("characters",)
    ),
    "starts_with": _Held(
        lambda text, spec: text.strip().casefold().startswith(spec["text"].casefold()),
        needs=("text",),
    ),
    "ends_with": _Held(
        lambda text, spec: text.strip().casefold().endswith(spec["text"].casefold()),
        needs=("text",),
    ),
    "choice": _Held(lambda text, spec: text.strip() in spec["options"], needs=("options",)),
    "json": _Held(lambda text, _: _is_json(text)),
    "quoted": _Held(lambda text, _: _is_quoted(text)),
    "title": _Held(lambda text, _: bool(_TITLE.search(text))),
}


@dataclass(frozen=True, slots=True)
class Constraint:
    """One checked instruction."""

    kind: str
    spec: Mapping[str, Any]
    """Its parameters, for example {"min": 3}."""

    def holds(self, text: str) -> bool:
        return _KINDS[self.kind].holds(text, self.spec)


def all_constraints(
    completion: str, *, prompt: str, answer: str | None, finish_reason: str
) -> float:
    """1.0 where every constraint holds. Raises ConfigError for a prompt whose answer is no list of
    constraints."""
    return float(all(constraint.holds(completion) for constraint in parse_constraints(answer)))


def share_of_constraints(
    completion: str, *, prompt: str, answer: str | None, finish_reason: str
) -> float:
    """The share of the constraints that hold. Raises ConfigError for a prompt whose answer is no
    list of constraints."""
    constraints = parse_constraints(answer)
    return sum(constraint.holds(completion) for constraint in constraints) / len(constraints)


@lru_cache(maxsize=4096)
def parse_constraints(answer: str | None) -> tuple[Constraint, ...]:
    """The constraints of a prompt's `answer`. Raises ConfigError that says which is wrong, how, and
    what comes nearest."""
    if answer is None:
        raise ConfigError(
            "constraints: the prompt has no answer; expected a JSON list of constraints"
        )
    try:
        listed = json.loads(answer)
    except ValueError as error:
        raise ConfigError(
            f"constraints: the answer is not JSON ({error}): {answer!r:.60}"
        ) from None
    if not isinstance(listed, list) or not listed:
        raise ConfigError(
            f"constraints: expected a JSON list of at least one constraint, got {answer!r:.60}"
        )
    return tuple(_parse(index, entry) for index, entry in enumerate(listed))


def _parse(index: int, entry: Any) -> Constraint:
    where = f"constraints[{index}]"
    kind = entry.get("kind") if isinstance(entry, dict) else None
    if not isinstance(kind, str):
        raise ConfigError(f'{where}: expected an object with a "kind", got {entry!r:.60}')
    if kind not in _KINDS:
        raise ConfigError(f"{where}: unknown kind {kind!r}{nearest(kind, _KINDS)}")
    spec = {key: value for key, value in entry.items() if key != "kind"}
    checked = _KINDS[kind]
    counted = isinstance(checked, _Counted)
    valid = [*checked.needs, *(_COUNT if counted else ())]
    for key in spec:
        if key not in valid:
            hint = nearest(key, valid) or "; valid: none"
            raise ConfigError(f"{where}: {kind} has no parameter {key!r}{hint}")
    for key in checked.needs:
        _check_text(
            f"{where}: {kind}.{key}",
            spec.get(key),
            listed=key in ("words", "options"),
            single=key == "letter",
        )
    if counted:
        _check_count(f"{where}: {kind}", spec)
    return Constraint(kind, spec)


def _check_text(where: str, value: Any, *, listed: bool, single: bool) -> None:
    texts = value if listed and isinstance(value, list) else [value]
    good = (
        bool(texts)
        and all(isinstance(text, str) and text.strip() for text in texts)
        and isinstance(value, list) == listed
    )
    if not good or (single and len(value) != 1):
        wanted = "a list of texts" if listed else "one letter" if single else "a text"
        raise ConfigError(f"{where} must be {wanted}, got {value!r:.60}")


def _check_count(where: str, spec: Mapping[str, Any]) -> None:
    given = [key for key in _COUNT if key in spec]
    for key in given:
        if isinstance(spec[key], bool) or not isinstance(spec[key], int) or spec[key] < 0:
            raise ConfigError(
                f"{where}.{key} must be a whole number of at least 0, got {spec[key]!r:.60}"
            )
    if not given or ("exactly" in given and len(given) > 1):
        raise ConfigError(
            f"{where} must have min, max or both, or exactly; got {', '.join(given) or 'none of them'}"
        )
    if spec.get("min", 0) > spec.get("max", spec.get("min", 0)):
        raise ConfigError(f"{where}: min is {spec['min']}, above max {spec['max']}")
