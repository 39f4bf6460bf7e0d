"""The dialogue with SPaR's refiner: conversations that it continues, and parsing of its texts."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rayhf.algorithms.spar_config import SPaRConfig, TurnTemplate
from rayhf.data.jinja_sandbox import SandboxedTemplate
from rayhf.types import Completion, Message


class Dialogue:
    """Templates and patterns of the config, compiled."""

    def __init__(self, config: SPaRConfig) -> None:
        self._judge = _turns(config.judge_template, "algorithm.judge_template")
        self._refine = _turns(config.refine_template, "algorithm.refine_template")
        self._verdict = re.compile(config.verdict_pattern)
        self._words = {config.verdict_yes.casefold(): True, config.verdict_no.casefold(): False}
        self._refined = (
            None if config.refined_pattern is None else re.compile(config.refined_pattern)
        )

    @property
    def whole_text_is_refined(self) -> bool:
        """Whether the refined completion is the refinement's whole text, not a part of it."""
        return self._refined is None

    def judge(self, instruction: str, response: str) -> list[Message]:
        """Return the conversation that asks for a judgment of `response`."""
        variables = {"instruction": instruction, "response": response}
        return [{"role": role, "content": turn.render(variables)} for role, turn in self._judge]

    def refine(self, instruction: str, response: str, judgment: str) -> list[Message]:
        """Return the conversation that asks for a refinement of `response`."""
        variables = {
            "instruction": instruction,
            "response": response,
            "judgement": judgment,
            "judge_prompt": self.judge(instruction, response)[-1]["content"],
        }
        return [{"role": role, "content": turn.render(variables)} for role, turn in self._refine]

    def verdict(self, judgment: Completion) -> bool | None:
        """Return a judgment's last verdict; None where it is truncated or has none."""
        word = _last_group(self._verdict, judgment.text)
        if word is None or judgment.finish_reason == "length":
            return None
        return self._words.get(word.casefold())

    def refined(self, refinement: Completion) -> str | None:
        """Return the refined text; None where it is empty, truncated or not of the right form."""
        text = refinement.text
        if self._refined is not None:
            text = (_last_group(self._refined, text) or "").strip()
        return text if text.strip() and refinement.finish_reason == "stop" else None


def _turns(conversation: Sequence[TurnTemplate], key: str) -> list[tuple[str, SandboxedTemplate]]:
    # The templates are the user's own, but they render generated text: therefore the sandbox.
    return [
        (turn.role, SandboxedTemplate(turn.content, key=key, keep_trailing_newline=True))
        for turn in conversation
    ]


def _last_group(pattern: re.Pattern[str], text: str) -> str | None:
    """Return group 1 of the last match: a text may quote the form before it uses it."""
    groups = [match[1] for match in pattern.finditer(text)]
    return groups[-1] if groups else None


def instruction_text(messages: Sequence[Message]) -> str:
    """Return the prompt as one text: a single turn as it is, several turns with their roles."""
    if len(messages) == 1:
        return str(messages[0]["content"])
    return "\n\n".join(
        f"{message['role'].capitalize()}: {message['content']}" for message in messages
    )
