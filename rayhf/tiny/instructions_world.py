"""Recipe of the instructions task: one policy that acts, judges and refines, and its accuracy.

In: an empty directory and a seed. Out: the files that `rayhf.tiny.world` describes,
heldout_judgements.jsonl (judge prompts with the correct verdict as reference answer), and measured
figures.

Supervised training begins with clean judgements. They are deterministic, so the policy soon learns
to find a word of its context again, which the other skills need; mixed with responses that are
partly free, this takes several times as long. All three skills follow, first clean, then with
slips, which set how often the policy errs when sampled. Prompts and demonstrations depend on the
seed only, the policy also on the number of torch threads.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from rayhf.tiny import instructions
from rayhf.tiny.instructions import Instruction
from rayhf.tiny.language_model import MAX_LENGTH, ModelSize, Phase, new_model, sample, train
from rayhf.tiny.tokenizer import POLICY_FORMAT, train_tokenizer
from rayhf.tiny.world import write_rows

HELDOUT = 500
TRAIN = 4000
DEMONSTRATED = 6000
"""Number of instructions in demonstrations: the training prompts and some others, never a held-out
one."""
SIZE = ModelSize(hidden=128, layers=3, intermediate=352)
JUDGING = Phase(steps=350, batch=32, lr=1.5e-3, lr_end=1.2e-3)
CLEAN = Phase(steps=950, batch=24, lr=1.6e-3, lr_end=6e-4)
SLIPPING = Phase(steps=120, batch=32, lr=7e-4, lr_end=1e-4)
Generated = tuple[str, str]
"""(text, finish reason)"""
MAX_TOKENS = 48
"""Limit on generated tokens; a judgement with four checks has about 25."""
VOTES = 5
VOTE_TEMPERATURE = 0.7
"""Of the measured vote and refinement; both as in SPaR's code (arXiv 2412.11605, src/judge.py)."""


def make(
    directory: Path, seed: int, progress: Callable[[str, float], None]
) -> tuple[dict[str, int], dict[str, float]]:
    """Build the task into `directory`; return (sizes, measured figures)."""
    progress("prompts", 0.0)
    tasks = list(islice(instructions.instructions(seed), HELDOUT + DEMONSTRATED))
    # The few short instructions come early in the stream: shuffled, training and held-out prompts
    # both get some.
    random.Random(f"instructions split {seed}").shuffle(tasks)
    heldout = tasks[:HELDOUT]
    demonstrated = tasks[HELDOUT:]
    judgements = instructions.judgement_rows(heldout, seed)
    write_rows(directory / "heldout.jsonl", [{"prompt": task.prompt} for task in heldout])
    training = demonstrated[:TRAIN]
    write_rows(directory / "train.jsonl", [{"prompt": task.prompt} for task in training])
    write_rows(directory / "heldout_judgements.jsonl", judgements)
    clean = instructions.demonstrations(demonstrated, seed, slipping=False)
    slipping = instructions.demonstrations(demonstrated, seed, slipping=True)
    texts = [f"{prompt}\n{response}" for rows in slipping.values() for prompt, response in rows]
    tokenizer = train_tokenizer(texts, POLICY_FORMAT, max_vocab=600, max_length=MAX_LENGTH)
    progress("prompts", 1.0)

    model = new_model(SIZE, tokenizer, seed)
    spread(model)
    for name, rows, phase, offset in (
        ("learn to judge", clean["judge"], JUDGING, 0),
        ("learn the skills", mixed(clean), CLEAN, 1),
        ("learn to slip", mixed(slipping), SLIPPING, 2),
    ):
        loss = train(
            model, tokenizer, rows, phase, seed=seed + offset, progress=partial(progress, name)
        )
    model.save_pretrained(directory / "policy")
    tokenizer.save_pretrained(directory / "policy")

    progress("measure", 0.0)
    measured = {"sft_loss": loss} | measure(model, tokenizer, heldout, judgements, seed)
    progress("measure", 1.0)
    sizes = {
        "policy_parameters": model.num_parameters(),
        "vocabulary": len(tokenizer),
        "train": TRAIN,
        "heldout": HELDOUT,
        "heldout_judgements": len(judgements),
    }
    return sizes, measured


def mixed(rows: Mapping[str, Sequence[tuple[str, str]]]) -> list[tuple[str, str]]:
    """Return demonstrations of all three skills, with half of the judgements.

    Judging is the easiest skill and was trained first.
    """
    return [*rows["act"], *rows["judge"][::2], *rows["refine"]]


@torch.no_grad()
def spread(model: LlamaForCausalLM) -> None:
    """Enlarge the initial weights and set the output embeddings equal to the input embeddings.

    The standard deviation becomes 0.06 instead of 0.02. Measured on texts that repeat their prompt,
    at a learning rate of 2.5e-3: from 0.02 the policy copies nothing after 250 steps (1.6 nats per
    token), from 0.06 it does after 150 (0.4). With equal embeddings, from 0.02, half of the names
    are copied correctly after 400 steps, without them a sixth.
    """
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(3.0)
    model.lm_head.weight.copy_(model.model.embed_tokens.weight)


def measure(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    heldout: Sequence[Instruction],
    judgements: Sequence[dict[str, str]],
    seed: int,
) -> dict[str, float]:
    """Return the policy's accuracy on held-out prompts in acting, judging and refining."""

    def generate(prompts: Sequence[str], temperature: float, offset: int) -> list[Generated]:
        return sample(
            model,
            tokenizer,
            prompts,
            max_tokens=MAX_TOKENS,
            temperature=temperature,
            seed=seed + offset,
        )

    def satisfied(tasks: Sequence[Instruction], responses: Sequence[Generated]) -> list[bool]:
        scores = [
            instructions.satisfied(
                text, prompt=task.prompt, reference_answer=None, finish_reason=reason
            )
            for task, (text, reason) in zip(tasks, responses, strict=True)
        ]
        return [score == 1.0 for score in scores]

    prompts = [task.prompt for task in heldout]
    sampled = generate(prompts, 1.0, 0)
    greedy = generate(prompts, 0.0, 0)
    measured = {
        "satisfied_sampled": _mean(satisfied(heldout, sampled)),
        "satisfied_greedy": _mean(satisfied(heldout, greedy)),
    }

    questions = [row["prompt"] for row in judgements]
    verdicts = [
        [instructions.verdict_of(*judged) for judged in generate(questions, temperature, offset)]
        for offset, temperature in enumerate((1.0, *[VOTE_TEMPERATURE] * VOTES), 1)
    ]
    # A tie, which needs a judgement without a verdict, counts as no.
    voted = [
        "yes" if votes.count("yes") > votes.count("no") else "no"
        for votes in zip(*verdicts[1:], strict=True)
    ]
    for name, given in (("sampled", verdicts[0]), ("voted", voted)):
        measured[f"judge_accuracy_{name}"] = _mean(
            [verdict == row["answer"] for verdict, row in zip(given, judgements, strict=True)]
        )

    failed = [
        (task, text)
        for task, (text, _), passed in zip(
            heldout, sampled, satisfied(heldout, sampled), strict=True
        )
        if not passed
    ]
    judge_prompts = [instructions.judge_prompt(task, text) for task, text in failed]
    judged = generate(judge_prompts, VOTE_TEMPERATURE, 0)
    refine_prompts = [
        instructions.refine_prompt(task, text, judgement)
        for (task, text), (judgement, _) in zip(failed, judged, strict=True)
    ]
    refined = generate(refine_prompts, VOTE_TEMPERATURE, 0)
    measured["refine_success"] = _mean(satisfied([task for task, _ in failed], refined))
    return measured


def _mean(hits: Sequence[bool]) -> float:
    return sum(hits) / len(hits)
