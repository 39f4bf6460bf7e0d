"""What an algorithm may ask for while it explores one prompt.

The request scheduler (rayhf/exploration/scheduler.py) implements this protocol; a test can do so in
twenty lines. A coroutine may only wait for these methods, never for a clock or a socket: what it
does must follow from the responses, so that a resumed iteration repeats it exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from rayhf.types import Comparison, Completion, Message, Outcome, Sampling


class ExplorationContext(Protocol):
    """Generation, scoring and randomness for one prompt in one iteration."""

    @property
    def sampling(self) -> Sampling:
        """How the campaign draws tokens (the config's rollout section)."""
        ...

    def derive_seed(self, *parts: int | str) -> int:
        """Return a seed that depends on campaign seed, iteration, prompt and `parts` only."""
        ...

    def render(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Return the token ids of another conversation, generation prompt included."""
        ...

    def encode(self, text: str) -> tuple[int, ...]:
        """Return the token ids of `text` as an answer, end-of-turn token included."""
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of a part of a completion."""
        ...

    def room(self, context: Sequence[int]) -> int:
        """Return how many tokens the model can take after `context`; 0 or less: none."""
        ...

    async def sample(
        self,
        n: int,
        *,
        context: Sequence[int] | None = None,
        prefix: Sequence[int] = (),
        sampling: Sampling | None = None,
        policy: str = "policy",
    ) -> tuple[Completion, ...]:
        """Draw n continuations of the prompt (or of `context`) followed by `prefix` tokens.

        max_tokens is cut to what the model can still take. Raises ValueError where that is nothing.
        """
        ...

    async def score(self, completions: Sequence[Completion]) -> tuple[Outcome, ...]:
        """Return one outcome per completion."""
        ...

    async def compare(self, completions: Sequence[Completion]) -> Comparison:
        """Return the win probabilities among the completions."""
        ...
