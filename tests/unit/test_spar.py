"""SPaR with a scripted actor and refiner: requests, samples, training data."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from scripted_spar import (
    END,
    MOSTLY_NO,
    MOSTLY_YES,
    NO,
    SHORT,
    TWO_STEPS,
    YES,
    ScriptedContext,
    explore,
    ids,
    make_completion,
    make_prompt,
    scripted,
    select,
    spar,
)

from rayhf.algorithms.base import SelectionContext
from rayhf.algorithms.spar import SPaR
from rayhf.algorithms.spar_config import RefinerDataConfig, SPaRConfig
from rayhf.algorithms.spar_data import judge_accuracy, refiner_examples
from rayhf.algorithms.spar_dialogue import RefinerDialogue
from rayhf.config.schema import LearnerConfig
from rayhf.learner.micro_batch import build_micro_batch
from rayhf.learner.schedule import lr_factor
from rayhf.losses.base import Totals
from rayhf.types import Failed, Sampling, Scored, derive_seed


def test_one_exploration_by_hand():
    algorithm, explorer = spar(), ScriptedContext(TWO_STEPS)
    group = explore(algorithm, explorer)
    actor, refiner, metrics = select(algorithm, group)

    (pair,) = actor
    chosen, rejected = pair.rows
    assert tuple(chosen.prompt_ids) == tuple(rejected.prompt_ids) == group.prompt.token_ids
    # The original answer is rejected, not the refinement's parent "y"; the refiner's own tokens are
    # chosen, end included.
    assert tuple(chosen.response_ids) == (*ids("fine"), END)
    assert tuple(rejected.response_ids) == (*ids("bad"), END)
    assert (
        np.isnan(chosen.tokens["behavior_logp"]).all()
        and rejected.tokens["behavior_logp"].tolist() == [-1.0] * 4
    )
    assert pair.scalars["margin"] == pytest.approx(1 / 3)
    assert (
        group.samples[chosen.sample].completion.text == "fine"
        and group.samples[rejected.sample].completion.text == "bad"
    )

    rows = {
        ("".join(map(chr, e.rows[0].prompt_ids)), "".join(map(chr, e.rows[0].response_ids[:-1])))
        for e in refiner
    }
    assert rows == {
        ("<user>R do it|y|b no<assistant>", "fine"),
        ("<user>J do it|fine<assistant>", "b yes"),
        ("<user>J do it|y<assistant>", "b no"),
        ("<user>J do it|bad<assistant>", "b no"),
    }
    counts = {kind: metrics[f"spar/refiner_{kind}"] for kind in RefinerDataConfig.model_fields}
    assert counts == {
        "refinements": 1,
        "tree_yes": 1,
        "tree_no": 1,
        "answers_yes": 0,
        "answers_no": 1,
    }
    assert (metrics["pairs/kept"], metrics["spar/searches"], metrics["spar/identical"]) == (1, 1, 0)
    expected = {
        "failing": 1 / 3,
        "ties": 0,
        "refined": 1,
        "nodes": 9,
        "judge_unparsable": 0,
        "too_long": 0,
        "value_gain": 1 / 3,
    }
    assert {name: group.metrics[f"spar/{name}"] for name in expected} == pytest.approx(expected)


def test_samples_contain_the_tree():
    group = explore(spar(), ScriptedContext(TWO_STEPS))
    samples = group.samples
    assert [s.completion.text for s in samples if s.kind == "answer"] == ["good", "bad", "good"]
    # Equal answers are judged once, and every vote points to what it judges.
    judged = [samples[s.parent].completion.text for s in samples if s.kind == "judgement"]
    assert judged[:6] == ["good"] * 3 + ["bad"] * 3 and judged.count("w") == 3
    root = next(s for s in samples if "root" in s.stats)
    assert (
        root.completion.text == "bad"
        and root.context_ids is None
        and root.outcome == Scored(value=0.0)
    )
    assert (root.stats["votes_yes"], root.stats["votes_no"], root.stats["votes_total"]) == (1, 2, 3)
    assert samples[int(root.stats["critique"])].completion.text == "b no"
    final = samples[int(root.stats["refined"])]
    assert (final.completion.text, final.kind, final.stats["depth"], final.stats["final"]) == (
        "fine",
        "refinement",
        2,
        1,
    )
    assert (
        samples[final.parent].completion.text == "y"
        and samples[samples[final.parent].parent] is root
    )
    nodes = sorted(s.stats["node"] for s in samples if s.kind == "refinement")
    assert nodes == list(range(1, 10))
    assert all(s.outcome is None for s in samples if s.kind != "answer")


def test_trained_texts_follow_the_refiners_context():
    for changes in ({}, {"refine_template": SPaRConfig().refine_template}):
        algorithm, explorer = spar(**changes), ScriptedContext(_random_refiner)
        groups = [explore(algorithm, explorer, make_prompt(f"task {i}")) for i in range(20)]
        _, refiner, _ = select(algorithm, *groups)
        read = {context for _, context, _, _ in explorer.sampled}
        assert len(refiner) > 20 and all(
            "".join(map(chr, e.rows[0].prompt_ids)) in read for e in refiner
        )


def _random_refiner(policy, context, draw):
    rng = random.Random(f"{context} {draw}")
    if not context or "R " in context or "[[start]]" in context:
        return rng.choice("abcdefgh") + rng.choice("xyz")
    return rng.choice(["so yes", "so no", "so no", "hm"])


def test_default_dialogue_has_three_turns_and_extracts_answer():
    def say(policy, context, draw):
        if not context:
            return "bad"
        if context.endswith("[[end]]<assistant>"):
            return ["Reflection: [[start]]", "x [[start]] better [[end]]", "nothing"][draw % 3]
        return f"All is well.\nFinal Judgement (met?): {'Yes' if 'better' in context else 'No'}"

    algorithm = SPaR(SPaRConfig(samples=1, refine_retries=0))
    explorer = ScriptedContext(say)
    group = explore(algorithm, explorer)
    ((pair,), refiner, metrics) = select(algorithm, group)
    judge = next(context for _, context, _, _ in explorer.sampled if "bad" in context).removesuffix(
        "<assistant>"
    )
    refine = next(context for _, context, _, _ in explorer.sampled if "[[start]]" in context)
    assert refine.startswith(
        f"{judge}<assistant>All is well.\nFinal Judgement (met?): No<user>Going by your judgement"
    )
    assert (
        tuple(pair.rows[0].response_ids) == (*ids("better"), END)
        and tuple(pair.rows[0].prompt_ids) == group.prompt.token_ids
    )
    kept = group.samples[pair.rows[0].sample]
    assert kept.kind == "refined" and group.samples[kept.parent].kind == "refinement"
    (example,) = refiner  # the whole refinement is trained on, as it was written
    assert tuple(example.rows[0].response_ids) == (*ids("x [[start]] better [[end]]"), END)
    assert "".join(map(chr, example.rows[0].prompt_ids)) == refine
    assert group.metrics["spar/malformed"] == 2
    assert metrics["spar/refiner_answers_no"] == 0  # unanimous votes give no examples


def test_requests_have_the_settings_of_their_policy():
    explorer = ScriptedContext(TWO_STEPS)
    explore(
        spar(judge_temperature=0.4, refine_temperature=0.6, refiner={"max_tokens": 5}), explorer
    )
    assert explorer.sampled[0][0] == "policy" and explorer.sampled[0][3] is None
    seen = {
        (policy, context[6], sampling.temperature, sampling.max_tokens)
        for policy, context, _, sampling in explorer.sampled[1:]
    }
    assert seen == {("refiner", "J", 0.4, 5), ("refiner", "R", 0.6, 5)}
    shared = spar(refiner={"shared": True})
    explorer = ScriptedContext(lambda policy, context, draw: TWO_STEPS("policy", context, draw))
    explore(shared, explorer)
    assert {policy for policy, *_ in explorer.sampled} == {"policy"}


def test_policies_objectives_and_losses():
    separate, shared = spar(), spar(refiner={"shared": True})
    assert (
        separate.policies,
        separate.trained_policy("policy"),
        separate.trained_policy("refiner"),
    ) == (
        ("policy", "refiner"),
        "policy",
        "refiner",
    )
    assert (shared.policies, shared.trained_policy("policy"), shared.trained_policy("refiner")) == (
        ("policy",),
        "policy",
        "policy",
    )
    loss = separate.loss()
    assert (loss.config.type, loss.config.beta, loss.nll_coef) == ("sigmoid", 0.1, 0.1)
    assert (
        separate.train_schedule("refiner").epochs,
        separate.train_schedule("refiner").examples_per_step,
    ) == (
        5,
        64,
    )
    assert separate.other_policy("refiner").lr == 2e-6
    warming = spar(refiner={"warmup_steps": 4}).other_policy("refiner")
    settings, steps = warming.learner_settings(LearnerConfig(schedule="linear", warmup=0.1))
    rates = [
        lr_factor(
            step,
            total_steps=steps,
            warmup=settings.warmup,
            kind=settings.schedule,
            min_lr=settings.min_lr,
        )
        for step in (0, 1, 2, 3, 4, 2234)
    ]
    assert rates == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    for call in (separate.train_schedule, separate.other_policy, separate.loss):
        with pytest.raises(KeyError):
            call("critic")


def test_both_objectives_give_finite_losses():
    algorithm = spar()
    actor, refiner, _ = select(algorithm, explore(algorithm, ScriptedContext(TWO_STEPS)))
    for name, examples in (("policy", actor), ("refiner", refiner)):
        rows = [row for e in examples for row in e.rows]
        annotated = [
            replace(
                e,
                rows=tuple(
                    r.with_tokens(ref_logp=np.full(len(r.response_ids), -2, np.float32))
                    for r in e.rows
                ),
            )
            for e in examples
        ]
        tokens = sum(len(row.response_ids) for row in rows)
        micro = build_micro_batch(
            annotated, Totals(tokens=tokens, rows=len(rows), examples=len(examples)), "cpu"
        )
        out = algorithm.loss(name)(torch.full((tokens,), -2.0, requires_grad=True), micro)
        # At the reference: log 2 for the pair, plus 0.1 times the chosen answer's 2 nats per token.
        expected = math.log(2) + 0.1 * 2 if name == "policy" else 2.0
        assert out.loss.item() == pytest.approx(expected, rel=1e-6)
        assert all(math.isfinite(value.item()) for value in out.metrics.values())


def test_unparsable_judge_trains_nothing():
    algorithm = spar()
    group = explore(
        algorithm, ScriptedContext(scripted(["a", "b", "c"], {text: ["hm"] for text in "abc"}, {}))
    )
    actor, refiner, metrics = select(algorithm, group)
    assert actor == refiner == [] and metrics["spar/searches"] == 0
    assert (
        group.metrics["spar/ties"],
        group.metrics["spar/judge_unparsable"],
        group.metrics["spar/failing"],
    ) == (1, 1, 0)
    assert "spar/refined" not in group.metrics and not any(
        s.kind == "refinement" for s in group.samples
    )


def test_tied_votes_discard_and_passing_answers_are_not_refined():
    group = explore(
        spar(judge_votes=2),
        ScriptedContext(
            scripted(["a", "b", "b"], {"a": ["x yes", "x no"], "b": ["yes", "yes"]}, {})
        ),
    )
    assert (group.metrics["spar/ties"], group.metrics["spar/failing"]) == (1 / 3, 0)
    assert "critique" not in group.samples[0].stats and group.samples[0].stats["value"] == 0.5
    assert not any("root" in s.stats for s in group.samples)


def test_root_is_drawn_by_seed_among_failing_answers():
    roots = set()
    for i in range(12):
        explorer = ScriptedContext(
            scripted(
                ["a", "b", "good"], {"a": NO, "b": NO, "good": YES}, {"a": ["good"], "b": ["good"]}
            )
        )
        explorer.derive_seed = lambda *parts, i=i: derive_seed(i, *parts)
        group = explore(spar(), explorer)
        (root,) = [s.completion.text for s in group.samples if "root" in s.stats]
        roots.add(root)
    assert roots == {"a", "b"}
    # "good" was judged among the answers: as a refinement it needs no further votes.
    assert sum(s.kind == "judgement" for s in group.samples) == 9


def test_search_without_refinement_is_dropped_and_counted():
    algorithm = spar(gate=0.2)
    group = explore(algorithm, ScriptedContext(scripted(["bad"] * 3, {"bad": MOSTLY_NO}, {})))
    actor, refiner, metrics = select(algorithm, group)
    assert actor == [] and (metrics["spar/identical"], metrics["spar/searches"]) == (1, 1)
    assert (
        group.metrics["spar/refined"] == 0
        and metrics["spar/refiner_refinements"] == 0
        and len(refiner) == 1
    )


def test_failed_search_trains_only_the_refiner():
    algorithm = spar(depth=1)
    actor, refiner, metrics = select(algorithm, explore(algorithm, ScriptedContext(TWO_STEPS)))
    assert (
        actor == []
        and metrics["spar/refiner_refinements"] == 0
        and metrics["spar/refiner_tree_no"] == 1
    )
    assert [e.objective for e in refiner] == ["refiner"] * 2


def test_without_search_one_refinement_is_judged_once():
    even = scripted(["bad"] * 3, {"bad": NO, "x": ["hm"], "y": YES}, {"bad": ["x", "y"]})
    explorer = ScriptedContext(even)
    group = explore(spar(search="none"), explorer)
    assert [(context[6], n) for _, context, n, _ in explorer.sampled[1:]] == [
        ("J", 3),
        ("R", 1),
        ("J", 3),
    ]
    assert group.metrics["spar/refined"] == 0 and group.metrics["spar/dropped"] == 1
    fine = explore(
        spar(search="none"),
        ScriptedContext(scripted(["bad"] * 3, {"bad": NO, "y": MOSTLY_YES}, {"bad": ["y"]})),
    )
    assert fine.metrics["spar/refined"] == 1


def test_depth_first_search_has_another_order():
    explorer = ScriptedContext(TWO_STEPS)
    explore(spar(search="dfs"), explorer)
    refined = [
        context.split("|")[1] for _, context, _, _ in explorer.sampled if "R do it" in context
    ]
    assert refined == ["bad", "y"]


def test_truncated_texts_have_no_verdict_and_no_answer():
    words = scripted(
        ["bad"] * 3, {"bad": ["no", "no", "yes"], "x": YES}, {"bad": ["x...", "x", "   "]}
    )
    group = explore(spar(refine_retries=0), ScriptedContext(words))
    assert group.metrics["spar/malformed"] == 2 and group.metrics["spar/nodes"] == 1
    dialogue = RefinerDialogue(SPaRConfig.model_validate(SHORT))
    cut = make_completion("it is yes...")
    assert dialogue.verdict(replace(cut, text="it is yes")) is None
    assert dialogue.verdict(replace(cut, text="it is yes", finish_reason="stop")) is True


def test_too_long_contexts_are_skipped_and_counted():
    algorithm = spar()
    explorer = ScriptedContext(
        scripted(["a", "b" * 30, "c"], {"a": YES, "c": NO}, {}),
        limit=len("<user>R do it|c|a no<assistant>"),
    )
    group = explore(algorithm, explorer)
    actor, _, _ = select(algorithm, group)
    assert (
        actor == []
        and group.metrics["spar/too_long"] >= 2
        and group.metrics["spar/ties"] == pytest.approx(1 / 3)
    )
    assert all(len(context) < explorer.limit for _, context, _, _ in explorer.sampled)


def test_scorer_does_not_affect_training():
    algorithm = spar()
    plain = explore(algorithm, ScriptedContext(TWO_STEPS))
    failed = explore(
        algorithm,
        ScriptedContext(
            TWO_STEPS, outcomes={"good": Failed(reason="down"), "bad": Scored(value=0.0)}
        ),
    )
    assert [
        e.rows[0].response_ids.tolist()
        for e in algorithm.select(
            [plain], SelectionContext(iteration=1, seed=1, sampling=Sampling(max_tokens=8))
        ).examples
    ] == [
        e.rows[0].response_ids.tolist()
        for e in algorithm.select(
            [failed], SelectionContext(iteration=1, seed=1, sampling=Sampling(max_tokens=8))
        ).examples
    ]
    truth = explore(
        algorithm,
        ScriptedContext(TWO_STEPS, outcomes={"good": Scored(value=0.0), "bad": Scored(value=0.0)}),
    )
    assert judge_accuracy([truth]) == {"spar/judge_accuracy": pytest.approx(1 / 3)}
    graded = explore(
        algorithm,
        ScriptedContext(
            TWO_STEPS, outcomes={"good": Scored(value=0.7), "bad": Failed(reason="down")}
        ),
    )
    assert judge_accuracy([graded]) == {}


def test_arrival_order_does_not_matter():
    algorithm = spar()
    groups = [
        explore(algorithm, ScriptedContext(_random_refiner, delay=i > 0), make_prompt("task 3"))
        for i in range(5)
    ]
    assert len(groups[0].samples) > 20 and all(group == groups[0] for group in groups)


def test_caps_draw_by_seed_and_repeats_are_counted():
    algorithm = spar()
    groups = [
        explore(algorithm, ScriptedContext(_random_refiner), make_prompt(f"task {i}"))
        for i in range(60)
    ]
    everything = RefinerDataConfig()
    whole, metrics = refiner_examples(groups, everything, seed=1)
    counts = {kind: metrics[f"spar/refiner_{kind}"] for kind in RefinerDataConfig.model_fields}
    assert (
        min(counts.values()) > 3
        and metrics["spar/refiner_capped"] == 0
        and sum(counts.values()) == len(whole)
    )
    contexts = [e.rows[0].prompt_ids.tobytes() for e in whole]
    assert len(contexts) == len(set(contexts))

    caps = RefinerDataConfig(refinements=3, tree_yes=2, tree_no=0, answers_yes=1, answers_no=3)
    drawn, capped = refiner_examples(groups, caps, seed=1)
    assert {kind: capped[f"spar/refiner_{kind}"] for kind in counts} == caps.model_dump()
    assert capped["spar/refiner_capped"] == len(whole) - len(drawn) == len(whole) - 9
    assert (
        refiner_examples(groups, caps, seed=1)[0][0].rows[0].prompt_ids.tolist()
        == drawn[0].rows[0].prompt_ids.tolist()
    )
    others = {
        tuple(e.rows[0].prompt_ids.tobytes() for e in refiner_examples(groups, caps, seed=seed)[0])
        for seed in range(5)
    }
    assert len(others) > 1

    twice, again = refiner_examples([*groups, *groups], everything, seed=1)
    assert len(twice) == len(whole) and again["spar/refiner_repeats"] == 2 * metrics[
        "spar/refiner_repeats"
    ] + len(whole)


def test_tree_gives_one_judgement_of_each_verdict():
    divided = ["a yes", "b no", "c no"]
    votes = {"bad": NO, "x": divided, "y": divided, "z": divided}
    words = scripted(["bad"] * 3, votes, {text: ["x", "y", "z"] for text in ("bad", "x", "y")})
    _, refiner, metrics = select(spar(), explore(spar(), ScriptedContext(words)))
    assert metrics["spar/refiner_tree_no"] == len(refiner) == 1
    assert "".join(map(chr, refiner[0].rows[0].prompt_ids)) == "<user>J do it|x<assistant>"
