"""TPO: one ranked list per prompt from the branches of its search tree.

Liao et al. 2024 (2410.12854), Tree Preference Optimization: preference list ranking in place of
pairs. explore is MCTS-DPO's search; a branch is the path from the prompt to a leaf, and its value
is the search's estimate of the leaf (1 for a correct completion, -1 for a wrong one, the mean over
rollouts for an unfinished one). The loss is LiPO-lambda's on these values (rayhf/losses/lists.py).

What differs from the paper:
- The adaptive step reward weighs the steps of two branches by how much they differ, by the cosine
  of embeddings. In a search tree the steps that two branches share are known: they cancel in the
  difference of their rewards, which is weight 0, and all others weigh 1. Embeddings are no input of
  a loss here.
- Trees are searched by the policy itself, in every iteration; the paper's are GPT-4's, given.
- The authors' code (loss.py, read and not run) differs from the paper: its pairs have no lambda
  weights, and the sum over pairs goes through another -log S, whose gradient has the other sign.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np
from pydantic import Field, NonNegativeFloat, PositiveFloat

from rayhf.algorithms.base import AlgorithmBase, Selection, SelectionContext, tie_share
from rayhf.algorithms.context import ExplorationContext
from rayhf.algorithms.mcts_dpo_config import TreeSearchConfig
from rayhf.algorithms.mcts_samples import tree_from_group
from rayhf.algorithms.mcts_search import critic_template
from rayhf.algorithms.mcts_turns import explore_tree
from rayhf.config.algorithms import ReferenceSchedule, refuse_staleness
from rayhf.config.schema import CampaignConfig
from rayhf.episodes import replies_between
from rayhf.losses.base import Loss
from rayhf.losses.lists import ListLoss
from rayhf.search.mcts import Tree, TreeNode
from rayhf.search.siblings import join
from rayhf.types import Example, Group, Prompt, Row


class TPOConfig(TreeSearchConfig):
    """Preference lists of the branches of a Monte Carlo tree (Liao et al. 2024).

    The search's settings, and their sources, are MCTS-DPO's.
    """

    type: str = "tpo"
    branches: Annotated[int, Field(ge=2)] = 8
    """Maximum length of a list (ours): of more branches, the best, the worst and some between."""
    min_margin: NonNegativeFloat = 0.0
    """Difference of the best and the worst value up to which a tree has no list: it is a tie."""
    beta: PositiveFloat = 0.1
    """Strength of the pull toward the reference (the authors' code)."""

    def check_campaign(self, campaign: CampaignConfig) -> None:
        """Refuse samples of earlier weights, too. Raises ConfigError."""
        super().check_campaign(campaign)
        refuse_staleness(campaign, "trains on trees of the current policy only")


class TPO(AlgorithmBase):
    """TPO: a ranked list of the branches of a Monte Carlo tree (Liao et al. 2024)."""

    Config = TPOConfig

    def __init__(self, config: TPOConfig) -> None:
        self.config = config
        self.samples = config.iterations * max(config.width) * max(1, config.rollouts)
        """Scored completions of one full search; see MCTS-DPO."""
        self._template = (
            critic_template(config.self_evaluation) if config.self_evaluation is not None else None
        )
        self.reference: ReferenceSchedule | None = config.reference
        self._loss = ListLoss(beta=config.beta)

    async def explore(self, prompt: Prompt, context: ExplorationContext) -> Group:
        """Grow the prompt's tree."""
        return await explore_tree(self.config, self._template, prompt, context)

    def select(self, groups: Sequence[Group], context: SelectionContext) -> Selection:
        """Make one list of each tree."""
        examples: list[Example] = []
        ties = 0
        for group in groups:
            tree = tree_from_group(group)
            leaves = _leaves(tree)
            if len(leaves) < 2 or _value(leaves[0]) - _value(leaves[-1]) <= self.config.min_margin:
                ties += 1
                continue
            # Evenly spaced places of the ranking, both ends among them.
            places = np.linspace(0, len(leaves) - 1, min(self.config.branches, len(leaves)))
            chosen = [leaves[place] for place in np.round(places).astype(int)]
            values = np.array([_value(leaf) for leaf in chosen])
            ordered = int((values[:, None] > values[None, :]).sum())
            rows = tuple(branch_row(group.prompt, tree, leaf) for leaf in chosen)
            examples.append(Example(rows=rows, scalars={"ordered_pairs": float(ordered)}))
        metrics = {"tpo/lists": float(len(examples)), "tpo/ties": float(ties)}
        if examples:
            metrics["tpo/branches"] = float(np.mean([len(e.rows) for e in examples]))
        return Selection(
            examples=tuple(examples), metrics=metrics, no_signal=tie_share(len(examples), ties)
        )

    def loss(self, objective: str = "policy") -> Loss:
        """Return the loss on ranked lists."""
        return self._loss


def _value(leaf: TreeNode) -> float:
    assert leaf.estimate is not None
    return leaf.estimate


def _leaves(tree: Tree) -> list[TreeNode]:
    """Return the leaves whose value is known, from the best to the worst, then by age."""
    leaves = [
        node
        for node in tree.nodes[1:]
        if not node.children and node.estimate is not None and node.token_ids.size
    ]
    return sorted(leaves, key=lambda node: (-_value(node), node.id))


def branch_row(prompt: Prompt, tree: Tree, leaf: TreeNode) -> Row:
    """Return the training row of the path from the prompt to a leaf; `value` is the leaf's."""
    path = tree.path(leaf)
    parts = [node.step.completion for node in path if node.step is not None]
    whole = join(parts, parts[-1].finish_reason)
    contexts = [tree.context_ids(node, prompt.token_ids) for node in path]
    return Row(
        prompt_id=prompt.prompt_id,
        sample=leaf.id - 1,
        prompt_ids=contexts[0],
        response_ids=whole.token_ids,
        tokens={"behavior_logp": whole.logprobs},
        scalars={
            "score": _value(leaf),
            "truncated": float(whole.finish_reason == "length"),
            "value": _value(leaf),
        },
        inserted=replies_between(parts, contexts),
    )
