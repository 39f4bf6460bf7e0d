"""Prompts with verifiable constraints for a real language model: topics times instructions.

In: a seed. Out: rows {"prompt", "answer"} for training and for evaluation, which share no topic.
`answer` is the list of constraints that rayhf.scorer.constraints checks, as JSON.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from rayhf.errors import ConfigError

# fmt: off
TOPICS = (
    "apples", "autumn leaves", "baking bread", "bees", "bicycles", "books", "breakfast", "bridges",
    "butterflies", "camping", "cats", "cheese", "chess", "clouds", "coffee", "cooking pasta",
    "dogs", "dreams", "elephants", "farms", "fireworks", "fishing", "flowers", "football",
    "friendship", "gardening", "glasses", "guitars", "hats", "honey", "horses", "ice cream",
    "islands", "kitchens", "kites", "lakes", "libraries", "maps", "markets", "mirrors",
    "mountains", "museums", "music", "owls", "painting", "pencils", "rain", "rivers",
    "sailing", "school", "shoes", "sleep", "snow", "soup", "stars", "summer",
    "swimming", "tea", "trains", "winter",
)
# fmt: on
HELDOUT_TOPICS = 12
REQUESTS = ("Tell me about {}.", "What do people like about {}?", "Describe {}.")

Constraint = tuple[str, dict[str, Any]]
"""The instruction, and the constraint that checks it."""

CONSTRAINTS: Sequence[Constraint] = (
    ("Use only lowercase letters.", {"kind": "lowercase"}),
    ("Do not use any commas.", {"kind": "avoid_characters", "characters": ","}),
    ("Use at most 12 words.", {"kind": "words", "max": 12}),
    ('Begin with the word "Well".', {"kind": "starts_with", "text": "well"}),
    ('End with the words "that is all."', {"kind": "ends_with", "text": "that is all."}),
)


def make_prompts(seed: int = 0) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Return training and held-out rows: every topic with every pair of constraints, shuffled."""
    rng = random.Random(seed)
    topics = list(TOPICS)
    rng.shuffle(topics)
    heldout, train = (
        [_row(rng, topic, pair) for topic in part for pair in combinations(CONSTRAINTS, 2)]
        for part in (topics[:HELDOUT_TOPICS], topics[HELDOUT_TOPICS:])
    )
    rng.shuffle(train)
    rng.shuffle(heldout)
    return train, heldout


def _row(rng: random.Random, topic: str, constraints: Sequence[Constraint]) -> dict[str, str]:
    request = rng.choice(REQUESTS).format(topic)
    instructions = [instruction for instruction, _ in constraints]
    rng.shuffle(instructions)
    return {
        "prompt": " ".join([request, *instructions]),
        "answer": json.dumps([check for _, check in constraints]),
    }


def write_prompts(directory: Path, seed: int = 0) -> None:
    """Write train.jsonl and heldout.jsonl. Raises ConfigError where that is not possible."""
    for name, rows in zip(("train", "heldout"), make_prompts(seed), strict=True):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        try:
            (directory / f"{name}.jsonl").write_text(text, encoding="utf-8")
        except OSError as error:
            reason = error.strerror or error
            raise ConfigError(f"{directory}: prompts cannot be written ({reason})") from None
