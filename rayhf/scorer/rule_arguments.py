"""Arguments of a user's function, by the names of its parameters.

In: what the function's process said about it, and a prompt with the completions of one call. Out:
JSON values by name. There are values of rayhf's own, and every column of the prompt's row; where
both have a name, the own value counts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rayhf.errors import did_you_mean
from rayhf.scorer.rule_call import CALLBACKS
from rayhf.types import Completion, Prompt, last_question

Call = tuple[Prompt, tuple[Completion, ...]]
"""A prompt, and one of its completions, or the two that are compared."""
_CONTEXT = ("prompt", "messages", "reference_answer", "row", "finish_reason", "thinking")
OWN = {
    "rayhf": ("completion", *_CONTEXT, "episode"),
    "pairwise": ("first", "second", "prompt", "messages", "reference_answer", "row"),
    "verl": ("data_source", "solution_str", "ground_truth", "extra_info"),
    "trl": ("prompts", "completions", "completion_ids"),
}
"""By style, the values that are not columns."""
_NOT_COLUMNS = ("prompt", "completion", "completion_ids")
"""Names of columns that TRL's functions do not get, since they get the values in other forms."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """What a function takes, as its process described it."""

    style: str
    names: tuple[str, ...]
    required: tuple[str, ...]
    takes_any: bool
    is_async: bool

    def columns(self, row: Mapping[str, object]) -> list[str]:
        """Return the columns of a row that the function gets."""
        if self.style == "trl" and self.takes_any:
            return [name for name in row if name not in _NOT_COLUMNS]
        return [name for name in self.names if name in row and name not in OWN[self.style]]

    def missing(self, columns: Collection[str]) -> str | None:
        """Return what a row with these columns does not provide, and what it does; None if all."""
        callbacks = CALLBACKS if self.style == "trl" else ()
        own = OWN[self.style]
        for name in self.required:
            if name in own or name in columns or name in callbacks:
                continue
            offered = [*own, *sorted(set(columns) - set(own))]
            return (
                f"nothing provides its parameter {name!r}{did_you_mean(name, offered)}; "
                f"expected names among {', '.join(own)} and the row's columns "
                f"({', '.join(sorted(columns)) or 'none'})"
            )
        return None

    def arguments(self, calls: Sequence[Call], *, conversational: bool | None) -> dict[str, Any]:
        """Return the arguments of one call: lists for several completions in style trl."""
        if self.style == "trl":
            return self._lists(calls, conversational)
        (prompt, completions) = calls[0]
        own = _own(self.style, prompt, completions)
        if not self.takes_any:
            own = {name: value for name, value in own.items() if name in self.names}
        return own | {name: prompt.row[name] for name in self.columns(prompt.row)}

    def _lists(self, calls: Sequence[Call], conversational: bool | None) -> dict[str, Any]:
        """Return what a function of TRL's GRPOTrainer gets."""
        pairs = [(prompt, completion) for prompt, (completion,) in calls]
        forms = [
            _is_conversational(prompt) if conversational is None else conversational
            for prompt, _ in pairs
        ]
        own: dict[str, list[Any]] = {
            "prompts": [
                _messages(prompt) if is_messages else last_question(prompt)
                for (prompt, _), is_messages in zip(pairs, forms, strict=True)
            ],
            "completions": [
                _completion_messages(completion) if is_messages else completion.text
                for (_, completion), is_messages in zip(pairs, forms, strict=True)
            ],
            "completion_ids": [completion.token_ids.tolist() for _, completion in pairs],
        }
        if not self.takes_any:
            own = {name: values for name, values in own.items() if name in self.names}
        names = _union(self.columns(prompt.row) for prompt, _ in pairs)
        return {name: [prompt.row.get(name) for prompt, _ in pairs] for name in names} | own


def _messages(prompt: Prompt) -> list[dict[str, str]]:
    return [dict(message) for message in prompt.messages]


def _completion_messages(completion: Completion) -> list[dict[str, Any]]:
    """Return a completion as messages: one, or those of an episode."""
    if completion.episode is None:
        return [{"role": "assistant", "content": completion.text}]
    return [{"role": turn.role, "content": turn.content} for turn in completion.episode.turns]


def _episode(completion: Completion) -> list[dict[str, Any]] | None:
    """Return the messages of an episode with their rewards; None without an environment."""
    if completion.episode is None:
        return None
    return [
        {"role": turn.role, "content": turn.content, "reward": turn.reward}
        for turn in completion.episode.turns
    ]


def _is_conversational(prompt: Prompt) -> bool:
    return "messages" in prompt.row or isinstance(prompt.row.get("prompt"), list | tuple)


def _own(style: str, prompt: Prompt, completions: Sequence[Completion]) -> dict[str, Any]:
    if style == "verl":
        given = prompt.row.get("reward_model")
        truth = given.get("ground_truth") if isinstance(given, Mapping) else None
        return {
            "data_source": prompt.row.get("data_source", prompt.source),
            "solution_str": completions[0].text,
            "ground_truth": prompt.reference_answer if truth is None else truth,
            "extra_info": prompt.row.get("extra_info"),
        }
    context = {
        "prompt": last_question(prompt),
        "messages": _messages(prompt),
        "reference_answer": prompt.reference_answer,
        "row": dict(prompt.row),
    }
    if style == "pairwise":
        first, second = completions
        return {"first": first.text, "second": second.text, **context}
    (completion,) = completions
    return {
        "completion": completion.text,
        "episode": _episode(completion),
        "finish_reason": completion.finish_reason,
        "thinking": completion.thinking,
        **context,
    }


def _union(lists: Iterable[Sequence[str]]) -> list[str]:
    """Return all names, each once, in the order in which they come."""
    return list(dict.fromkeys(name for names in lists for name in names))
