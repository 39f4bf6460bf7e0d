"""Unfinished completions: what an engine has generated of them, and the version of each token.

An engine reports what its calls have generated since the last report (`Growth`). The pool keeps the
parts that are known of every call, and an engine that gets a lost engine's call continues them as
prompt plus tokens. Imports no vLLM.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from rayhf.types import FloatArray, TokenArray

Slot = tuple[int, int]
"""Position of a completion in its call: number of the request there, and of the seed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Partial:
    """Consecutive tokens of one completion; twelve bytes per token."""

    token_ids: TokenArray
    logprobs: FloatArray
    """Of each token when it was sampled, in nats."""
    versions: TokenArray
    """Version of the weights that generated each token."""
    finish_reason: Literal["stop", "length"] | None = None
    """None where the completion is not finished."""

    def __len__(self) -> int:
        return len(self.token_ids)

    def after(self, count: int) -> Partial:
        """Return it without its first `count` tokens."""
        return Partial(
            token_ids=self.token_ids[count:],
            logprobs=self.logprobs[count:],
            versions=self.versions[count:],
            finish_reason=self.finish_reason,
        )

    def followed_by(self, rest: Partial) -> Partial:
        """Return both, one after the other."""
        return Partial(
            token_ids=np.concatenate([self.token_ids, rest.token_ids]),
            logprobs=np.concatenate([self.logprobs, rest.logprobs]),
            versions=np.concatenate([self.versions, rest.versions]),
            finish_reason=rest.finish_reason,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Growth:
    """What was added to one completion since the last report."""

    call: int
    """Number of its call, given by the pool."""
    slot: Slot
    start: int
    """Number of tokens before it."""
    added: Partial


class KnownPartials:
    """Parts of the unfinished completions of one engine's calls, as far as they were reported."""

    def __init__(self) -> None:
        self._calls: dict[int, dict[Slot, Partial]] = {}

    def __len__(self) -> int:
        """Return the number of calls."""
        return len(self._calls)

    def open(self, call: int, parts: Mapping[Slot, Partial]) -> None:
        """Begin to keep the parts of a call, which begins with those of another engine."""
        self._calls[call] = dict(parts)

    def close(self, call: int) -> Mapping[Slot, Partial]:
        """Forget a call, and return its parts."""
        return self._calls.pop(call)

    def add(self, grown: Iterable[Growth]) -> None:
        """Add a report.

        Growth that does not continue what is known is dropped: an earlier report was lost, or it
        comes from an engine that has been replaced since. What is known stays a true beginning.
        """
        for each in grown:
            parts = self._calls.get(each.call)
            if parts is None:
                continue
            known = parts.get(each.slot)
            if each.start != (0 if known is None else len(known)):
                continue
            parts[each.slot] = each.added if known is None else known.followed_by(each.added)
