"""MCTS-DPO: a tree of steps per prompt, and DPO on pairs of sibling steps.

Xie et al. 2024 (2405.00451).

explore   grow a tree by Monte Carlo search (mcts_search.py) and store it as the group's samples
          (mcts_samples.py)
select    pair siblings by Q (rayhf/search/siblings.py); reads the samples only, so a stored tree
          gives the same pairs again
loss      DPO over the tokens in which two siblings differ, with soft labels from their visits
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rayhf.algorithms.base import AlgorithmBase, Selection, SelectionContext, tie_share
from rayhf.algorithms.context import ExplorationContext
from rayhf.algorithms.mcts_dpo_config import MCTSDPOConfig
from rayhf.algorithms.mcts_samples import tree_from_group
from rayhf.algorithms.mcts_search import critic_template
from rayhf.algorithms.mcts_turns import explore_tree
from rayhf.config.algorithms import ReferenceSchedule
from rayhf.config.registry import LOSSES
from rayhf.losses.base import Loss
from rayhf.losses.pairs import PairLoss, PairLossConfig
from rayhf.search.siblings import pair_rows, step_pairs
from rayhf.types import Example, Group, Prompt, derive_seed


class MCTSDPO(AlgorithmBase):
    """MCTS-DPO: preferences between sibling steps of a Monte Carlo tree (Xie et al. 2024)."""

    Config = MCTSDPOConfig

    def __init__(self, config: MCTSDPOConfig) -> None:
        self.config = config
        self.samples = config.iterations * max(config.width) * max(1, config.rollouts)
        """Scored completions of one full search. A campaign with several searches per prompt scores
        more, one with short completions fewer."""
        self._template = (
            critic_template(config.self_evaluation) if config.self_evaluation is not None else None
        )
        self._loss: PairLoss[PairLossConfig] = LOSSES.build(
            config.loss, importance_cap=config.importance.cap
        )
        self.reference: ReferenceSchedule | None = config.reference

    async def explore(self, prompt: Prompt, context: ExplorationContext) -> Group:
        """Grow the prompt's tree."""
        return await explore_tree(self.config, self._template, prompt, context)

    def select(self, groups: Sequence[Group], context: SelectionContext) -> Selection:
        """Pair the siblings of each tree."""
        config = self.config
        examples: list[Example] = []
        ties = 0
        unvisited = 0
        for group in groups:
            tree = tree_from_group(group)
            seed = derive_seed(context.seed, group.prompt.prompt_id, "siblings")
            siblings = step_pairs(tree, np.random.default_rng(seed), config)
            ties += siblings.ties
            unvisited += siblings.unvisited
            for pair in siblings.pairs:
                scalars = {"margin": pair.margin}
                if config.labels == "soft":
                    scalars["label_smoothing"] = pair.label_smoothing
                rows = pair_rows(group.prompt, tree, pair, merge_chains=config.merge_chains)
                examples.append(Example(rows=rows, scalars=scalars))
        metrics = {
            "pairs/kept": float(len(examples)),
            "pairs/ties": float(ties),
            "mcts/unvisited_pairs": float(unvisited),
        }
        if examples:
            margins = [example.scalars["margin"] for example in examples]
            smoothing = [example.scalars.get("label_smoothing", 0.0) for example in examples]
            metrics["pairs/margin_mean"] = float(np.mean(margins))
            metrics["mcts/label_smoothing"] = float(np.mean(smoothing))
        no_signal = tie_share(len(examples), ties)
        return Selection(examples=tuple(examples), metrics=metrics, no_signal=no_signal)

    def loss(self, objective: str = "policy") -> Loss:
        """Return the configured preference loss."""
        return self._loss
