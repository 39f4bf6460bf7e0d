"""IFEval: instructions whose following a program verifies (Zhou et al. 2023, 2311.07911).

A completion follows an instruction strictly where the verifier accepts it as it is, and loosely
where it accepts one of eight variants: with and without asterisks, and without the first line, the
last line or both. Prompt-level figures count prompts all of whose instructions are followed;
instruction-level ones count instructions. The verifiers are in ifeval_instructions.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any, ClassVar

from rayhf.config.suites import SuiteConfig
from rayhf.errors import ConfigError, nearest
from rayhf.evaluation.suites.base import Suite
from rayhf.evaluation.suites.ifeval_instructions import INSTRUCTIONS, NEEDS_LANGUAGE, follows
from rayhf.types import Prompt, quoted

_HERE = "rayhf.evaluation.suites.ifeval"


class IFEvalConfig(SuiteConfig):
    """Rows with `prompt`, `instruction_id_list` and `kwargs`."""

    type: str = "ifeval"


class IFEval(Suite):
    """Verifiable instructions: strict and loose accuracy of prompts and of instructions."""

    Config = IFEvalConfig
    dataset: ClassVar[Mapping[str, Any] | None] = {
        "type": "hub",
        "dataset": "google/IFEval",
        "split": "train",
    }
    functions: ClassVar[Mapping[str, str]] = {
        "prompt_strict": f"{_HERE}:prompt_strict",
        "instruction_strict": f"{_HERE}:instruction_strict",
        "prompt_loose": f"{_HERE}:prompt_loose",
        "instruction_loose": f"{_HERE}:instruction_loose",
    }

    def check(self, prompts: Sequence[Prompt], key: str) -> None:
        """Refuse unknown instructions, and languages without the library that detects them."""
        for prompt in prompts:
            names = prompt.row.get("instruction_id_list")
            settings = prompt.row.get("kwargs")
            if not isinstance(names, list) or not isinstance(settings, list):
                raise ConfigError(
                    f"{key}: {quoted(prompt)} has no lists `instruction_id_list` and `kwargs`"
                )
            if len(names) != len(settings):
                raise ConfigError(
                    f"{key}: {quoted(prompt)} has {len(names)} instructions and {len(settings)} "
                    "kwargs; expected as many"
                )
            for name in names:
                if name not in INSTRUCTIONS:
                    known = sorted(INSTRUCTIONS)
                    raise ConfigError(
                        f"{key}: {quoted(prompt)} has an unknown instruction {name!r}"
                        f"{nearest(str(name), known)}"
                    )
                if name in NEEDS_LANGUAGE and find_spec("langdetect") is None:
                    raise ConfigError(
                        f"{key}: the instruction {name} needs the package langdetect, which is not "
                        'installed; pip install "rayhf[ifeval]"'
                    )

    def weight(self, metric: str, prompt: Prompt) -> float:
        """Return the number of a prompt's instructions for instruction-level metrics."""
        if not metric.startswith("instruction"):
            return 1.0
        names = prompt.row["instruction_id_list"]
        assert isinstance(names, list)  # `check`
        return float(len(names))


def prompt_strict(completion: str, *, row: dict[str, Any]) -> float:
    """Return 1.0 where every instruction is followed strictly."""
    return float(all(_followed(completion, row, loose=False)))


def prompt_loose(completion: str, *, row: dict[str, Any]) -> float:
    """Return 1.0 where every instruction is followed loosely."""
    return float(all(_followed(completion, row, loose=True)))


def instruction_strict(completion: str, *, row: dict[str, Any]) -> float:
    """Return the share of instructions that are followed strictly."""
    followed = _followed(completion, row, loose=False)
    return sum(followed) / len(followed)


def instruction_loose(completion: str, *, row: dict[str, Any]) -> float:
    """Return the share of instructions that are followed loosely."""
    followed = _followed(completion, row, loose=True)
    return sum(followed) / len(followed)


def _followed(completion: str, row: Mapping[str, Any], *, loose: bool) -> list[bool]:
    texts = _variants(completion) if loose else [completion]
    return [
        any(text.strip() and follows(text, name, settings or {}) for text in texts)
        for name, settings in zip(row["instruction_id_list"], row["kwargs"], strict=True)
    ]


def _variants(text: str) -> list[str]:
    lines = text.split("\n")
    shorter = ["\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1])]
    whole = [text, *shorter]
    return [*whole, *(variant.replace("*", "") for variant in whole)]
