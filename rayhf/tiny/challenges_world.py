"""Recipe of the challenges task: topics, held-out questions, and a policy that asks and solves.

In: an empty directory, a seed and the directory of the arithmetic task, whose policy is trained
further. Out: the files that `rayhf.tiny.world` describes, and measured figures. Both skills are
learned by one model; a campaign makes two of it, or trains both in one.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import islice
from pathlib import Path

from transformers import AutoTokenizer, LlamaForCausalLM

from rayhf.models.source import AS_DATA, WEIGHTS_AS_DATA
from rayhf.tiny import arithmetic, challenges
from rayhf.tiny.language_model import Phase, sample, train
from rayhf.tiny.world import write_rows

HELDOUT = 250
DEMONSTRATED = 1500
CLEAN = Phase(steps=110, batch=24, lr=1e-3, lr_end=5e-4)
SLIPPING = Phase(steps=50, batch=24, lr=5e-4, lr_end=1e-4)
MAX_TOKENS = 72
"""Limit on generated tokens; a worked answer of five steps has about 55."""


def make(
    directory: Path, seed: int, progress: Callable[[str, float], None], *, base: Path
) -> tuple[dict[str, int], dict[str, float]]:
    """Build the task into `directory`; return (sizes, measured figures)."""
    heldout = list(islice(challenges.heldout_chains(seed), HELDOUT))
    write_rows(directory / "heldout.jsonl", [{"prompt": chain.prompt} for chain in heldout])
    topics = [{"prompt": challenges.topic_prompt(topic)} for topic in challenges.topics()]
    random.Random(f"challenges topics {seed}").shuffle(topics)
    write_rows(directory / "train.jsonl", topics)

    model = LlamaForCausalLM.from_pretrained(base / "policy", **WEIGHTS_AS_DATA).float()
    tokenizer = AutoTokenizer.from_pretrained(base / "policy", **AS_DATA)
    asking = challenges.ask_demonstrations(seed, DEMONSTRATED)
    loss = 0.0
    for name, phase, rate, offset in (
        ("learn to ask", CLEAN, 0.0, 0),
        ("learn to slip", SLIPPING, arithmetic.SLIP_RATE, 1),
    ):
        solving = challenges.solve_demonstrations(
            seed + offset, 2 * DEMONSTRATED, rate=rate, without=heldout
        )
        loss = train(
            model,
            tokenizer,
            [*asking, *solving],
            phase,
            seed=seed + offset,
            progress=lambda done, name=name: progress(name, done),  # type: ignore[misc]
        )
    model.save_pretrained(directory / "policy")
    tokenizer.save_pretrained(directory / "policy")

    progress("measure", 0.0)
    measured = {"sft_loss": loss}
    questions = [chain.prompt for chain in heldout]
    for name, temperature in (("sampled", 1.0), ("greedy", 0.0)):
        answers = sample(
            model,
            tokenizer,
            questions,
            max_tokens=MAX_TOKENS,
            temperature=temperature,
            seed=seed,
        )
        scores = challenges.verified(questions, [text for text, _ in answers])
        measured[f"accuracy_{name}"] = sum(score or 0.0 for score in scores) / len(scores)
    asked = sample(
        model,
        tokenizer,
        [row["prompt"] for row in topics],
        max_tokens=MAX_TOKENS,
        temperature=1.0,
        seed=seed,
    )
    chains = [chain for text, _ in asked if (chain := challenges.parse(text)) is not None]
    measured["questions_valid"] = len(chains) / len(asked)
    measured["questions_steps"] = sum(len(chain.terms) - 1 for chain in chains) / len(chains)
    progress("measure", 1.0)
    sizes = {
        "policy_parameters": model.num_parameters(),
        "vocabulary": len(tokenizer),
        "train": len(topics),
        "heldout": HELDOUT,
    }
    return sizes, measured
