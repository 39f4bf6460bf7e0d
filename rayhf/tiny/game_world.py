"""Recipe of the game task: prompts, a policy that plays OPENING, the game file, labeled pairs.

In: an empty directory and a seed. Out: the files that `rayhf.tiny.world` describes, game.json, and
measured figures.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

from rayhf.tiny import game
from rayhf.tiny.language_model import MAX_LENGTH, ModelSize, Phase, new_model, sample, train
from rayhf.tiny.tokenizer import POLICY_FORMAT, train_tokenizer
from rayhf.tiny.world import write_rows

HELDOUT = 120
TRAIN = 600
PAIRS_TRAIN = 3000
PAIRS_TEST = 500
SIZE = ModelSize(hidden=64, layers=2, intermediate=192)
OPENING = Phase(steps=150, batch=32, lr=2e-3, lr_end=2e-4)
MAX_TOKENS = 8


def make(
    directory: Path, seed: int, progress: Callable[[str, float], None]
) -> tuple[dict[str, int], dict[str, float]]:
    """Build the task into `directory`; return (sizes, measured figures)."""
    progress("prompts", 0.0)
    prompts = list(game.prompts(seed))
    heldout = prompts[:HELDOUT]
    training = prompts[HELDOUT : HELDOUT + TRAIN]
    write_rows(directory / "heldout.jsonl", [{"prompt": prompt} for prompt in heldout])
    write_rows(directory / "train.jsonl", [{"prompt": prompt} for prompt in training])
    (directory / "game.json").write_text(
        json.dumps({"answers": game.ANSWERS, "preference": game.PREFERENCE}, indent=2) + "\n"
    )
    questions = [training[i % TRAIN] for i in range(PAIRS_TRAIN)]
    write_rows(directory / "pairs_train.jsonl", game.draw_pairs(questions, seed))
    write_rows(
        directory / "pairs_test.jsonl",
        game.draw_pairs([heldout[i % HELDOUT] for i in range(PAIRS_TEST)], seed + 1),
    )
    rng = random.Random(f"game openings {seed}")
    demonstrations = [
        (prompt, rng.choices(game.ANSWERS, game.OPENING)[0])
        for prompt in training
        for _ in range(6)
    ]
    texts = [f"{prompt}\n{answer}" for prompt, answer in demonstrations]
    tokenizer = train_tokenizer(texts, POLICY_FORMAT, max_vocab=512, max_length=MAX_LENGTH)
    progress("prompts", 1.0)

    policy = new_model(SIZE, tokenizer, seed)
    loss = train(
        policy,
        tokenizer,
        demonstrations,
        OPENING,
        seed=seed,
        progress=lambda done: progress("learn to play", done),
    )
    policy.save_pretrained(directory / "policy")
    tokenizer.save_pretrained(directory / "policy")

    progress("measure", 0.0)
    played = [
        text
        for text, _ in sample(
            policy, tokenizer, heldout * 4, max_tokens=MAX_TOKENS, temperature=1.0, seed=seed
        )
    ]
    measured = {"sft_loss": loss} | {
        f"share_{answer}": played.count(answer) / len(played) for answer in game.ANSWERS
    }
    progress("measure", 1.0)
    sizes = {
        "policy_parameters": policy.num_parameters(),
        "vocabulary": len(tokenizer),
        "train": TRAIN,
        "heldout": HELDOUT,
    }
    return sizes | {"pairs_train": PAIRS_TRAIN, "pairs_test": PAIRS_TEST}, measured
