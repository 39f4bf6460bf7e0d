"""Training data of SPaR, from an iteration's groups: pure functions of samples and a seed.

Out, for the actor (objective "policy"): pairs of a refined completion and the ORIGINAL failing one,
both as completions of the prompt. For the refiner (objective "refiner"): its own texts, each after
the conversation that it continued:

  refinements               refinements that ended a successful search
  tree_yes, tree_no         judgments of a tree's refinements where votes disagreed, at most one of
                            each per tree
  answers_yes, answers_no   judgments of the actor's completions where votes disagreed

A set of votes is represented by the first judgment that agrees with its majority.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from rayhf.algorithms.spar_config import RefinerDataConfig
from rayhf.types import Example, Group, Sample, Scored, derive_seed, given_row, make_row

KINDS = ("refinements", "tree_yes", "tree_no", "answers_yes", "answers_no")

Candidate = tuple[bytes, Group, int, float]
"""(token ids of the judge prompt as bytes, group, index of the sample to train on, value of the
judged text)."""


def actor_examples(groups: Sequence[Group]) -> tuple[list[Example], dict[str, float]]:
    """Return one pair for each successful search, and metrics.

    A pair of equal completions, or with an empty one, is dropped and counted. The refiner generated
    the chosen completion after another context, so its behavior log-probs are unknown: NaN.
    """
    examples = []
    searches = 0
    identical = 0
    empty = 0
    for group in groups:
        root = _root(group)
        searches += root is not None
        if root is None or "refined" not in group.samples[root].stats:
            continue
        refined = int(group.samples[root].stats["refined"])
        chosen = group.samples[refined].completion
        rejected = group.samples[root].completion
        if not (chosen.token_ids.size and rejected.token_ids.size):
            empty += 1
        elif chosen.text == rejected.text or np.array_equal(chosen.token_ids, rejected.token_ids):
            identical += 1
        else:
            better = group.samples[refined].stats["value"]
            worse = group.samples[root].stats["value"]
            given = given_row(
                group.prompt.prompt_id, group.prompt_ids, chosen.token_ids, score=better
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
    """Return the refiner's examples, by kind, and metrics.

    Of several texts after the same judge prompt the first is kept, among refinements and among
    judgments separately. Where a kind has more than its cap, the kept ones are drawn at random.
    """
    candidates: dict[str, list[Candidate]] = {kind: [] for kind in KINDS}
    for group in groups:
        for kind, candidate in _candidates(group):
            candidates[kind].append(candidate)
    limits = {
        "refinements": caps.refinements,
        "tree_yes": caps.tree_yes,
        "tree_no": caps.tree_no,
        "answers_yes": caps.answers_yes,
        "answers_no": caps.answers_no,
    }
    examples: list[Example] = []
    metrics = {"spar/refiner_repeats": 0.0, "spar/refiner_capped": 0.0}
    seen: set[tuple[bool, bytes]] = set()
    for kind in KINDS:
        fresh: list[Candidate] = []
        for candidate in candidates[kind]:
            key = (kind == "refinements", candidate[0])
            if key not in seen:
                seen.add(key)
                fresh.append(candidate)
        kept = _draw(fresh, limits[kind], derive_seed(seed, "refiner", kind))
        metrics["spar/refiner_repeats"] += len(candidates[kind]) - len(fresh)
        metrics["spar/refiner_capped"] += len(fresh) - len(kept)
        metrics[f"spar/refiner_{kind}"] = float(len(kept))
        examples += [
            Example(rows=(make_row(group, index, score=value),), objective="refiner")
            for _, group, index, value in kept
        ]
    return examples, metrics


def judge_accuracy(groups: Sequence[Group]) -> dict[str, float]:
    """Return spar/judge_accuracy: the share of majority verdicts that agree with the scorer.

    Over the actor's completions that have a majority and whose score is exactly 1 or 0; empty where
    there are none.
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
    """Return the index of the completion that was refined, if any."""
    return next(
        (index for index, sample in enumerate(group.samples) if "root" in sample.stats), None
    )


def _candidates(group: Group) -> Iterator[tuple[str, Candidate]]:
    """Yield (kind, candidate) of every text that the refiner could be trained on."""
    samples = group.samples
    root = _root(group)
    tree: set[str] = set()
    for index, sample in enumerate(samples):
        if not sample.completion.token_ids.size:
            continue
        if sample.kind == "answer" and _divided(sample):
            yield _majority("answers", sample), _judgment(group, sample)
        elif sample.kind == "refinement" and "node" in sample.stats:
            kind = _majority("tree", sample)
            if _divided(sample) and kind not in tree:
                tree.add(kind)
                yield kind, _judgment(group, sample)
            passed = root is not None and "refined" in samples[root].stats
            if passed and "final" in sample.stats and sample.parent is not None:
                judge_prompt = _judge_prompt(group, samples[sample.parent])
                yield "refinements", (judge_prompt, group, index, sample.stats["value"])


def _divided(sample: Sample) -> bool:
    """Whether the votes on a sample disagreed and still had a majority."""
    stats = sample.stats
    return "critique" in stats and min(stats["votes_yes"], stats["votes_no"]) > 0


def _majority(where: str, sample: Sample) -> str:
    return f"{where}_yes" if sample.stats["votes_yes"] > sample.stats["votes_no"] else f"{where}_no"


def _judgment(group: Group, sample: Sample) -> Candidate:
    return _judge_prompt(group, sample), group, int(sample.stats["critique"]), sample.stats["value"]


def _judge_prompt(group: Group, sample: Sample) -> bytes:
    """Return the tokens of a judgment's prompt, as bytes."""
    context = group.samples[int(sample.stats["critique"])].context_ids
    if context is None:
        raise ValueError(f"prompt {group.prompt.prompt_id}: a judgment has no context")
    return context.tobytes()


def _draw(candidates: Sequence[Candidate], cap: int, seed: int) -> list[Candidate]:
    """Return at most `cap` candidates, in their order."""
    if len(candidates) <= cap:
        return list(candidates)
    chosen = np.random.default_rng(seed).choice(len(candidates), size=cap, replace=False)
    return [candidates[int(index)] for index in sorted(chosen)]
