"""Protocol of the context in which an algorithm explores one prompt.

The request scheduler (rayhf/exploration/scheduler.py) implements it; a test can do so in twenty
lines. A coroutine may wait only for these methods, never for a clock or a socket: its actions must
depend on nothing but the results, so that a resumed iteration repeats them exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from rayhf.types import Comparison, Completion, Message, Outcome, Prompt, Sampling, TokenIds


class ExplorationContext(Protocol):
    """Generation, scoring and randomness for one prompt in one iteration."""

    @property
    def sampling(self) -> Sampling:
        """The campaign's sampling parameters (the config's rollout section)."""
        ...

    def derive_seed(self, *parts: int | str) -> int:
        """Return a seed that depends on campaign seed, iteration, prompt and `parts` only."""
        ...

    def render(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Return the token ids of another conversation, generation prompt included."""
        ...

    def encode(self, text: str) -> tuple[int, ...]:
        """Return the token ids of `text` as a completion, end-of-turn token included."""
        ...

    def decode(self, token_ids: TokenIds) -> str:
        """Return the text of a part of a completion."""
        ...

    def room(self, context: TokenIds) -> int:
        """Return how many tokens fit after `context`; 0 or less: none."""
        ...

    async def sample(
        self,
        n: int,
        *,
        context: TokenIds | None = None,
        prefix: TokenIds = (),
        sampling: Sampling | None = None,
        policy: str = "policy",
    ) -> tuple[Completion, ...]:
        """Draw n continuations of the prompt (or of `context`) followed by `prefix` tokens.

        max_tokens is reduced to what fits into the model. Raises ValueError where nothing fits.
        """
        ...

    @property
    def has_environment(self) -> bool:
        """Whether an environment serves the prompt."""
        ...

    async def play_on(
        self, n: int, path: Sequence[Completion] = ()
    ) -> list[tuple[Completion, ...]]:
        """Play n episodes that begin with the turns of `path`, and return the turns that follow.

        All episodes that are played by this method have one seed: the environment answers equal
        turns equally. Each turn is a completion with its part of the episode; join_turns of
        rayhf/episodes.py makes one completion of several. There is at least one: an episode that
        failed before it has a turn without tokens. Raises ValueError without an environment.
        """
        ...

    async def score(
        self, completions: Sequence[Completion], *, prompt: Prompt | None = None
    ) -> tuple[Outcome, ...]:
        """Return one outcome per completion of the prompt, or of another `prompt`.

        Another one is a task that the exploration made; its id must be its own.
        """
        ...

    async def compare(self, completions: Sequence[Completion]) -> Comparison:
        """Return the win probabilities among the completions."""
        ...
