"""What SPaR trains on, from a round's groups: pairs for the actor, texts for the refiner. Pure
functions of samples and a seed.

Actor (objective "policy"): (refined answer, the ORIGINAL failing answer), both after the prompt
itself. ALGORITHMS.md A4.5. Refiner (objective "refiner"), each row after what the refiner read when
it wrote it. A4.6:
  refinements               refinements that ended their search well
  tree_yes, tree_no         judgements of a tree's refinements where votes disagreed, at most one of
                            each per tree
  answers_yes, answers_no   judgements of the actor's answers where votes disagreed
A judgement row is the first judgement that agrees with its majority.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from rayhf.algorithms.spar_config import RefinerDataConfig
from rayhf.types import Example, Group, Sample, Scored, derive_seed, given_row, make_row

KINDS = ("refinements", "tree_yes", "tree_no", "answers_yes", "answers_no")

Candidate = tuple[tuple[int, ...], Group, int, float]
"""(judge prompt as token ids, group, sample to train on, value of what it is about)."""


def actor_examples(groups: Sequence[Group]) -> tuple[list[Example], dict[str, float]]:
    """One pair for each search that passed. A pair whose answers are the same, or one of them
    empty, is dropped and counted.

    The refiner wrote the chosen answer after another context, so its behavior log-probs are
    unknown: NaN.
    """
    examples = []
    searches = identical = empty = 0
    for group in groups:
        root = _root(group)
        searches += root is not None
        if root is None or "refined" not in group.samples[root].stats:
            continue
        refined = int(group.samples[root].stats["refined"])
        chosen, rejected = group.samples[refined], group.samples[root]
        if not (chosen.completion.token_ids and rejected.completion.token_ids):
            empty += 1
        elif (
            chosen.completion.token_ids == rejected.completion.token_ids
            or chosen.completion.text == rejected.completion.text
        ):
            identical += 1
        else:
            better, worse = chosen.stats["value"], rejected.stats["value"]
            given = given_row(
                group.prompt.prompt_id,
                group.prompt.token_ids,
                chosen.completion.token_ids,
                score=better,
            )
            rows = (replace(given, sample=refined), make_row(group, root, score=worse))
            examples.append(Example(rows=rows, scalars={"margin": better - worse}))
    counts = {
        "pairs/kept": len(examples),
        "spar/searches": searches,
        "spar/identical": identical,
        "spar/empty": empty,
    }
    return examples, {name: float(count) for name, count in counts.items()}


def refiner_examples(
    groups: Sequence[Group], caps: RefinerDataConfig, *, seed: int
) -> tuple[list[Example], dict[str, float]]:
    """The round's texts for the refiner, by kind. Of those after one judge prompt the first is kept
    (refinements and judgements apart: they teach different things); of more than a kind's cap a
    seeded draw.
    """
    found: dict[str, list[Candidate]] = {kind: [] for kind in KINDS}
    for group in groups:
        for kind, candidate in _candidates(group):
            found[kind].append(candidate)
    limits = {
        "refinements": caps.refinements,
        "tree_yes": caps.tree_yes,
        "tree_no": caps.tree_no,
        "answers_yes": caps.answers_yes,
        "answers_no": caps.answers_no,
    }
    examples: list[Example] = []
    metrics = {"spar/refiner_repeats": 0.0, "spar/refiner_capped": 0.0}
    seen: set[tuple[bool, tuple[int, ...]]] = set()
    for kind in KINDS:
        fresh: list[Candidate] = []
        for candidate in found[kind]:
            key = (kind == "refinements", candidate[0])
            if key not in seen:
                seen.add(key)
                fresh.append(candidate)
        kept = _draw(fresh, limits[kind], derive_seed(seed, "refiner", kind))
        metrics["spar/refiner_repeats"] += len(found[kind]) - len(fresh)
        metrics["spar/refiner_capped"] += len(fresh) - len(kept)
        metrics[f"spar/refiner_{kind}"] = float(len(kept))
        examples += [
            Example(rows=(make_row(group, index, score=value),), objective="refiner")
            for _, group, index, value in kept
        ]
    return examples, metrics


def judge_accuracy(groups: Sequence[Group]) -> dict[str, float]:
    """spar/judge_accuracy: the share of answers whose majority verdict is the scorer's, over those
    that the scorer calls exactly right (1) or wrong (0) and that have a majority. Empty where there
    are none.
    """
    agree = [
        (sample.stats["value"] > 0.5) == (sample.outcome.value == 1.0)
        for group in groups
        for sample in group.samples
        if sample.kind == "answer" and "critique" in sample.stats
        if isinstance(sample.outcome, Scored) and sample.outcome.value in (0.0, 1.0)
    ]
    return {"spar/judge_accuracy": float(np.mean(agree))} if agree else {}


def _root(group: Group) -> int | None:
    """The answer that was refined."""
    return next(
        (index for index, sample in enumerate(group.samples) if "root" in sample.stats), None
    )


def _candidates(group: Group) -> Iterator[tuple[str, Candidate]]:
    """(kind, candidate) of all that this group could teach the refiner."""
    samples = group.samples
    root = _root(group)
    tree: set[str] = set()
    for index, sample in enumerate(samples):
        if not sample.completion.token_ids:
            continue
        if sample.kind == "answer" and _divided(sample):
            yield _majority("answers", sample), _judgement(group, sample)
        elif sample.kind == "refinement" and "node" in sample.stats:
            kind = _majority("tree", sample)
            if _divided(sample) and kind not in tree:
                tree.add(kind)
                yield kind, _judgement(group, sample)
            accepted = (
                root is not None and "refined" in samples[root].stats and "final" in sample.stats
            )
            if accepted and sample.parent is not None:
                yield (
                    "refinements",
                    (
                        _judge_prompt(group, samples[sample.parent]),
                        group,
                        index,
                        sample.stats["value"],
                    ),
                )


def _divided(sample: Sample) -> bool:
    """Whether its votes disagreed and still had a majority."""
    return (
        "critique" in sample.stats and min(sample.stats["votes_yes"], sample.stats["votes_no"]) > 0
    )


def _majority(where: str, sample: Sample) -> str:
    return f"{where}_yes" if sample.stats["votes_yes"] > sample.stats["votes_no"] else f"{where}_no"


def _judgement(group: Group, sample: Sample) -> Candidate:
    return _judge_prompt(group, sample), group, int(sample.stats["critique"]), sample.stats["value"]


def _judge_prompt(group: Group, sample: Sample) -> tuple[int, ...]:
    context = group.samples[int(sample.stats["critique"])].context_ids
    if context is None:
        raise ValueError(f"prompt {group.prompt.prompt_id}: a judgement has no context")
    return context


def _draw(candidates: Sequence[Candidate], cap: int, seed: int) -> list[Candidate]:
    """At most `cap` of them, in their order."""
    if len(candidates) <= cap:
        return list(candidates)
    chosen = np.random.default_rng(seed).choice(len(candidates), size=cap, replace=False)
    return [candidates[int(index)] for index in sorted(chosen)]
