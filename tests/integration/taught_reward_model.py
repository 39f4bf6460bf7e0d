"""A small reward model that tells kind replies from unkind ones, and pairs of such replies."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from transformers import LlamaForSequenceClassification

from rayhf.tiny.language_model import ModelSize, Phase
from rayhf.tiny.reward_model import PreferencePair, train_on_pairs
from rayhf.tiny.tokenizer import REWARD_FORMAT, train_tokenizer

KIND = ("gladly", "thanks", "welcome", "friend")
UNKIND = ("never", "go", "away", "silly")


def draw_pairs(count: int, seed: int) -> list[PreferencePair]:
    """Return pairs of replies with one to five words each, to different questions."""
    rng = random.Random(seed)

    def reply(vocabulary: tuple[str, ...]) -> str:
        return " ".join(rng.choices(vocabulary, k=rng.randint(1, 5)))

    return [
        PreferencePair(f"What about number {index}?", reply(KIND), reply(UNKIND))
        for index in range(count)
    ]


def make_reward_model(directory: Path) -> tuple[Path, Path]:
    """Train a model; write reward_model/ and pairs_test.jsonl, 100 pairs; return both paths."""
    pairs = draw_pairs(400, 0)
    texts = [f"{pair.prompt}\n{pair.chosen}\n{pair.rejected}" for pair in pairs]
    tokenizer = train_tokenizer(texts, REWARD_FORMAT, max_vocab=400, max_length=512)
    config = ModelSize(hidden=64, layers=2, intermediate=128).config(tokenizer)
    config.num_labels = 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForSequenceClassification(config).float()
    learning = Phase(steps=40, batch=16, lr=3e-3, lr_end=3e-4)
    train_on_pairs(model, tokenizer, pairs, learning, seed=0, progress=lambda done: None)
    model.save_pretrained(directory / "reward_model")
    tokenizer.save_pretrained(directory / "reward_model")
    test = directory / "pairs_test.jsonl"
    rows = [
        {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
        for pair in draw_pairs(100, 1)
    ]
    test.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory / "reward_model", test
