"""Checks of a user's function before anything starts.

In: settings and prompts. Out: nothing, or ConfigError that names the function and what it lacks: a
module, a value for a parameter, or reference answers that it can use, with their prompts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from rayhf.errors import ConfigError
from rayhf.scorer.rule_config import FunctionEntryConfig
from rayhf.scorer.rule_process import Child
from rayhf.scorer.rule_reply import LostError
from rayhf.types import Prompt, Scored, quoted

ANSWERS = 10_000
"""Reference answers that are checked, evenly spread over the prompts."""
NAMED = 3
"""Unusable ones that are named."""
ENDLESS = 3
"""Reference answers whose check may hang before the rest is left unchecked."""


def check_rule(
    config: FunctionEntryConfig, style: str, base: Path, prompts: Sequence[Prompt]
) -> str:
    """Check a function against prompts; return how it is called. Raises ConfigError."""
    child = Child(config, style, base=base)
    try:
        how = "coroutine function" if child.parameters.is_async else "function"
        note = f"rule {config.function} is a {how} of style {child.parameters.style}"
        if missing_rights := child.unprotected:
            note += f"; {missing_rights}"
        for prompt in prompts:
            missing = child.parameters.missing(prompt.row)
            if missing is not None:
                raise ConfigError(f"rule {config.function}: {missing}, for {quoted(prompt)}")
        if not (prompts and child.checks_answers):
            return note
        checked = list(prompts[:: max(1, len(prompts) // ANSWERS)])
        unusable: list[tuple[Prompt, str]] = []
        endless = 0
        rest = checked
        while rest and endless < ENDLESS:
            done = 0
            try:
                for reason in _answers(child, rest):
                    unusable += [(rest[done], reason)] if reason else []
                    done += 1
            except LostError as lost:
                unusable.append((rest[done], str(lost)))
                endless += 1
                done += 1
                child.kill()
                child = Child(config, style, base=base)
            rest = rest[done:]
    finally:
        child.kill()
    if unusable:
        named = "; ".join(
            f"{prompt.reference_answer!r:.60} of {quoted(prompt)} ({reason})"
            for prompt, reason in unusable[:NAMED]
        )
        raise ConfigError(
            f"rule {config.function} cannot use {len(unusable)} of {len(checked)} reference "
            f"answers: {named}"
        )
    return note


def _answers(child: Child, prompts: Sequence[Prompt]) -> Iterator[str]:
    """Yield why each reference answer cannot be used; "" where it can."""
    payloads = [(0, json.dumps(prompt.reference_answer).encode()) for prompt in prompts]
    for _, [(_, outcome)] in child.call(payloads):
        yield "" if isinstance(outcome, Scored) else outcome.reason
