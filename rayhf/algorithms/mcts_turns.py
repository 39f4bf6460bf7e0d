"""The Monte Carlo tree search over turns: of prompts that an environment serves.

A step of the tree is one turn of the policy and what the environment answered to it. `expand` plays
whole episodes from a node: the first turn is the step, and the rest its first rollout. The outcome
of a finished episode is its score. All episodes of a tree have the environment's seed in common, so
that siblings differ by what the policy wrote, not by chance.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from rayhf.algorithms.context import ExplorationContext
from rayhf.algorithms.mcts_dpo_config import TreeSearchConfig
from rayhf.algorithms.mcts_search import PromptSearch
from rayhf.data.jinja_sandbox import SandboxedTemplate
from rayhf.episodes import join_turns, part_of
from rayhf.search.grow import grow
from rayhf.search.mcts import End, Step, Tree, TreeNode
from rayhf.types import Completion, Group, Prompt


async def explore_tree(
    config: TreeSearchConfig,
    template: SandboxedTemplate | None,
    prompt: Prompt,
    context: ExplorationContext,
) -> Group:
    """Grow a prompt's tree: of turns where an environment serves it, else of steps of a text."""
    search_type = TurnSearch if context.has_environment else PromptSearch
    search = search_type(config, template, prompt, context)
    return search.group(await grow(config, search.expand, search.evaluate))


class TurnSearch(PromptSearch):
    """Model, environment and scorer calls of one prompt's search."""

    async def expand(self, tree: Tree, node: TreeNode, width: int) -> list[Step]:
        """Return `width` turns, each with the rest of its episode as its rollout."""
        path = [each.step.completion for each in tree.path(node) if each.step is not None]
        return [_step(turns) for turns in await self.context.play_on(width, path)]

    async def _more_rollouts(self, n: int, steps: Sequence[Completion]) -> list[Completion]:
        return [join_turns(turns) for turns in await self.context.play_on(n, steps)]

    def _whole(
        self, steps: Sequence[Completion], finish_reason: Literal["stop", "length"]
    ) -> Completion:
        """Return the episode; its last turn knows how it ended."""
        return join_turns(steps)


def _step(turns: Sequence[Completion]) -> Step:
    first, *later = turns
    episode = part_of(first)
    end: End | None = None
    if episode.ended is not None:
        end = "answer" if episode.ended in ("done", "turns") else "limit"
    return Step(
        completion=first,
        end=end,
        context_ids=episode.context_ids,
        rollout=join_turns(later) if later else None,
    )
