"""Episodes that begin alike: those of a tree whose steps are turns.

In: turns of the policy, as an earlier episode has them. Out: episodes that go on after them. An
environment cannot be copied, so each episode starts it again with the tree's seed and gives it the
turns' messages again: calls of the environment, none of a model. An environment that answers
differently then is named, and the episode has no score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rayhf.episodes import Episode, part_of
from rayhf.exploration.episodes import EpisodePlayer, State
from rayhf.types import Completion, Failed, Invalid


class ReplayPlayer(EpisodePlayer):
    """Plays episodes that begin with the same turns."""

    async def play_on(
        self, n: int, path: Sequence[Completion], *, seed: int
    ) -> list[tuple[Completion, ...]]:
        """Return the turns after `path` of n episodes, at least one of each.

        An episode that failed before another turn has one without tokens, with the reason.
        """
        self._path = path
        states = await self.play_states([seed] * n)
        return self._checked([tuple(state.turns[len(path) :]) for state in states])

    async def _begin(self, state: State, seed: int) -> None:
        """Start an episode, and take the turns of the path again."""
        await super()._begin(state, seed)
        for turn in self._path:
            if state.ended is None:
                await self._answer(state, turn)
        if not self._path:
            return
        problem: Invalid | Failed | None = part_of(state.turns[-1]).problem if state.turns else None
        answers = zip(map(_answer, state.turns), map(_answer, self._path), strict=False)
        if problem is None and any(again != first for again, first in answers):
            problem = self._unrepeatable()
        if problem is not None:
            state.turns = list(self._path)
            self._fail(state, problem)

    def _unrepeatable(self) -> Invalid:
        return self._invalid(
            "it does not repeat itself: with the same row, seed and messages it answered "
            "differently, and a search over turns needs the same answers"
        )

    def _checked(self, episodes: list[tuple[Completion, ...]]) -> list[tuple[Completion, ...]]:
        """Return the episodes, without a score where equal turns were answered differently."""
        contexts = set()
        answers: dict[str, set[object]] = {}
        for first, *_ in episodes:
            if part_of(first).problem is None:
                contexts.add(_context(first))
                if not _is_cut(part_of(first)):
                    answers.setdefault(first.text, set()).add(_answer(first))
        return [
            (self._refused(turns[0]),)
            if part_of(turns[0]).problem is None
            and (len(contexts) > 1 or len(answers.get(turns[0].text, ())) > 1)
            else turns
            for turns in episodes
        ]

    def _refused(self, turn: Completion) -> Completion:
        episode = replace(part_of(turn), ended="failed", problem=self._unrepeatable())
        return replace(turn, episode=episode)


def _answer(turn: Completion) -> object:
    """Return what the environment answered to a turn, and what came before it."""
    episode = part_of(turn)
    messages = [(each.role, each.content, each.reward) for each in episode.turns]
    return _context(turn), tuple(messages), episode.ended == "done"


def _context(turn: Completion) -> bytes:
    context_ids = part_of(turn).context_ids
    assert context_ids is not None
    return context_ids.tobytes()


def _is_cut(episode: Episode) -> bool:
    """Whether the turn was cut, so that the environment was not given it."""
    return episode.ended == "tokens" and len(episode.turns) == 1
