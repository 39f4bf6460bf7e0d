"""The open-ended task: a few words about three topics, and a preference that only pairs reveal.

In: a seed. Out: prompts, demonstrations, noisy labels, and `true_preference`, which is for
evaluation only. A response to `Words about sea, night and garden.` is a line such as `cold wave
bright star wild rose`.

The hidden preference rewards nouns of the named topics and vivid adjectives (each further one less)
and alternating nouns and adjectives; it penalizes plain adjectives, repetition, unknown words, and
more than nine words. Ordinary responses are short, so a reward model hardly sees more than nine
words and can be over-optimized. Nothing here imports torch.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterator
from itertools import pairwise

from rayhf.errors import ConfigError

TOPICS: dict[str, tuple[str, ...]] = {
    "sea": ("wave", "tide", "sail", "gull", "reef", "shore"),
    "night": ("star", "moon", "owl", "dream", "lamp", "shadow"),
    "garden": ("rose", "bee", "hedge", "seed", "spade", "vine"),
    "kitchen": ("bread", "kettle", "spoon", "soup", "oven", "salt"),
    "city": ("street", "tram", "tower", "crowd", "bridge", "market"),
    "winter": ("snow", "frost", "sled", "coat", "ice", "storm"),
    "music": ("drum", "song", "flute", "choir", "string", "chord"),
    "forest": ("oak", "fox", "moss", "fern", "trail", "pine"),
    "school": ("book", "chalk", "desk", "pencil", "lesson", "bell"),
    "farm": ("barn", "goat", "wheat", "plough", "hen", "hay"),
    "river": ("boat", "trout", "mill", "ford", "reed", "stone"),
    "space": ("comet", "rocket", "orbit", "planet", "probe", "crater"),
}
"""Nouns of each topic; no noun has two topics."""

# fmt: off
VIVID = (
    "cold", "warm", "bright", "dark", "wild", "deep",
    "bitter", "golden", "silver", "green", "red", "blue",
)
PLAIN = (
    "quiet", "loud", "soft", "hard", "old", "new",
    "calm", "tall", "small", "sweet", "slow", "quick",
)
# fmt: on
ADJECTIVES = VIVID + PLAIN

_TEMPLATES = (
    "Words about {}, {} and {}.",
    "Some words for {}, {} and {}.",
    "Name things of {}, {} and {}.",
)
_TOPIC_OF = {noun: topic for topic, nouns in TOPICS.items() for noun in nouns}
_ADJECTIVE_SET = frozenset(ADJECTIVES)
_NOUNS = tuple(_TOPIC_OF)
LABEL_SHARPNESS = 2.0
"""The labeler prefers a to b with probability sigmoid(LABEL_SHARPNESS * (true(a) - true(b)))."""


def prompts(seed: int) -> Iterator[str]:
    """Return every prompt once (3,960 of them), in an order that depends on the seed."""
    names = list(TOPICS)
    texts = [
        template.format(a, b, c)
        for template in _TEMPLATES
        for a in names
        for b in names
        for c in names
        if len({a, b, c}) == 3
    ]
    random.Random(f"words prompts {seed}").shuffle(texts)
    return iter(texts)


def topics_of(prompt: str) -> list[str]:
    """Return the topics that a prompt names, in order. Raises ConfigError if it names none."""
    topics = [word for word in re.findall("[a-z]+", prompt) if word in TOPICS]
    if not topics:
        raise ConfigError(f"prompts: {prompt!r} names none of the topics {', '.join(TOPICS)}")
    return topics


def demonstration(
    prompt: str, rng: random.Random, *, off_topic: float = 0.35, repeats: float = 0.12
) -> str:
    """Return a response of three to eleven words.

    By default it is mediocre: a third of the nouns comes from any topic, some words are repeated.
    """
    own = [noun for topic in topics_of(prompt) for noun in TOPICS[topic]]
    words: list[str] = []
    for _ in range(min(rng.randint(3, 9), rng.randint(3, 12)) + rng.randint(0, 2)):
        if words and rng.random() < repeats:
            words.append(rng.choice(words))
        elif rng.random() < 0.37:
            words.append(rng.choice(ADJECTIVES))
        else:
            words.append(rng.choice(_NOUNS if rng.random() < off_topic else own))
    return " ".join(words)


def true_preference(
    completion: str, *, prompt: str, reference_answer: str | None, finish_reason: str
) -> float:
    """Return the hidden preference of a completion, for evaluation only.

    Samples of the untrained policy have about 1.5; the best possible is about 5.
    """
    del reference_answer
    topics = set(topics_of(prompt))
    words = completion.split()
    kinds = [
        "adjective" if word in _ADJECTIVE_SET else "noun" if word in _TOPIC_OF else "unknown"
        for word in words
    ]
    own = {word for word in words if _TOPIC_OF.get(word) in topics}
    alternations = [{first, second} == {"adjective", "noun"} for first, second in pairwise(kinds)]
    vivid = {word for word in words if word in VIVID}
    score = 2.0 * (1.0 - math.exp(-len(own) / 2.0)) + 2.5 * (1.0 - math.exp(-len(vivid) / 2.0))
    score += 1.0 * sum(alternations) / max(3, len(alternations))
    score -= 0.4 * sum(word in PLAIN for word in words)
    score -= 0.5 * (len(words) - len(set(words)))
    score -= 0.5 * kinds.count("unknown")
    score -= 0.3 * max(0, len(words) - 9)
    return score - (1.0 if finish_reason == "length" else 0.0)


def prefers_first(first: float, second: float, rng: random.Random) -> bool:
    """Draw a labeler's choice between two true preferences from a Bradley-Terry model."""
    return rng.random() < 1.0 / (1.0 + math.exp(-LABEL_SHARPNESS * (first - second)))
