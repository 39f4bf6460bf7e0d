"""Conversion between a Monte Carlo tree and a group's samples.

Node i of the tree is sample i - 1, of kind "step", with its parent, its context and the search's
statistics; the root is the prompt and has no sample. Samples of kind "rollout" follow: completions
that only valued a step. A stored group therefore gives the same tree, and the same pairs, again.
Of a tree of turns, each sample has its part of the episode; the tokens of a reply are in the
context of what follows it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rayhf.search.mcts import End, Step, Tree, TreeNode, known_children, mean_value
from rayhf.types import Completion, Group, Outcome, Prompt, Sample, token_array


def tree_samples(
    prompt: Prompt, tree: Tree, rollouts: Mapping[int, Sequence[tuple[Completion, Outcome]]]
) -> tuple[Sample, ...]:
    """Return the samples of a tree: its steps, then their rollouts.

    Args:
        prompt: the root of the tree.
        tree: the finished tree.
        rollouts: scored rollouts by node id.
    """
    nodes = tree.nodes[1:]
    samples = [_step_sample(prompt, tree, node) for node in nodes]
    for node in nodes:
        context = token_array((*prompt.token_ids, *tree.token_ids(node)))
        samples += [
            Sample(
                completion=completion,
                outcome=outcome,
                kind="rollout",
                context_ids=context if completion.episode is None else None,
                parent=node.id - 1,
            )
            for completion, outcome in rollouts.get(node.id, ())
        ]
    return tuple(samples)


def _step_sample(prompt: Prompt, tree: Tree, node: TreeNode) -> Sample:
    assert node.step is not None and node.parent is not None
    stats: dict[str, float] = {
        "depth": node.depth,
        "visits": node.visits,
        "q": node.q,
        "value": node.value,
        "reward": node.reward,
        "prior": node.prior,
        "terminal": node.terminal,
        "answered": node.step.end == "answer",
        "chosen": node.chosen,
        "gold": node.step.gold,
    }
    if node.estimate is not None:
        stats["estimate"] = node.estimate
    return Sample(
        completion=node.step.completion,
        outcome=node.outcome,
        kind="step",
        context_ids=tree.context_ids(node, prompt.token_ids),
        parent=node.parent - 1 if node.parent else None,
        stats={name: float(value) for name, value in stats.items()},
    )


def tree_from_group(group: Group) -> Tree:
    """Return the tree that `tree_samples` stored, without its count of duplicates.

    Raises ValueError where steps do not come first, each after its parent.
    """
    tree = Tree()
    for index, sample in enumerate(group.samples):
        if sample.kind != "step":
            continue
        first = index == len(tree.nodes) - 1
        if not first or (sample.parent is not None and not 0 <= sample.parent < index):
            raise ValueError(
                f"sample {index} of prompt {group.prompt.prompt_id} is a step out of order"
            )
        stats = sample.stats
        parent = tree.nodes[0 if sample.parent is None else sample.parent + 1]
        end: End | None = "answer" if stats["answered"] else "limit" if stats["terminal"] else None
        node = TreeNode(
            id=index + 1,
            parent=parent.id,
            step=Step(
                completion=sample.completion,
                end=end,
                context_ids=sample.context_ids,
                gold=bool(stats["gold"]),
            ),
            depth=int(stats["depth"]),
            prior=stats["prior"],
            estimate=stats.get("estimate"),
            outcome=sample.outcome,
            visits=int(stats["visits"]),
            reward=stats["reward"],
            value=stats["value"],
            q=stats["q"],
            chosen=bool(stats["chosen"]),
        )
        tree.nodes.append(node)
        parent.children.append(node.id)
        parent.expanded = True
    tree.root.value = mean_value(known_children(tree, tree.root))
    return tree
