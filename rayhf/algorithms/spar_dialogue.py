"""The dialogue with SPaR's refiner: conversations that it continues, and parsing of its texts."""

from __future__ import annotations

import re

from rayhf.algorithms.conversation import Dialogue, last_group
from rayhf.algorithms.spar_config import SPaRConfig
from rayhf.types import Completion, Message


class RefinerDialogue:
    """Templates and patterns of the config, compiled."""

    def __init__(self, config: SPaRConfig) -> None:
        self._judge = Dialogue(config.judge_template, "algorithm.judge_template")
        self._refine = Dialogue(config.refine_template, "algorithm.refine_template")
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
        return self._judge.render({"instruction": instruction, "response": response})

    def refine(self, instruction: str, response: str, judgment: str) -> list[Message]:
        """Return the conversation that asks for a refinement of `response`."""
        return self._refine.render(
            {
                "instruction": instruction,
                "response": response,
                "judgement": judgment,
                "judge_prompt": self.judge(instruction, response)[-1]["content"],
            }
        )

    def verdict(self, judgment: Completion) -> bool | None:
        """Return a judgment's last verdict; None where it is truncated or has none."""
        word = last_group(self._verdict, judgment.text)
        if word is None or judgment.finish_reason == "length":
            return None
        return self._words.get(word.casefold())

    def refined(self, refinement: Completion) -> str | None:
        """Return the refined text; None where it is empty, truncated or not of the right form."""
        text = refinement.text
        if self._refined is not None:
            text = (last_group(self._refined, text) or "").strip()
        return text if text.strip() and refinement.finish_reason == "stop" else None
