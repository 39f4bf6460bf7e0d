"""Recipe of the words task: prompts, a mediocre policy, pairs of its samples, a reward model.

In: an empty directory and a seed. Out: the files that `rayhf.tiny.world` describes, and measured
figures. Clean demonstrations come first, because the words of a topic are slow to learn from
mediocre ones alone. The true preference is used to draw the labels of the pairs and to measure; no
model is trained on it directly.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

from rayhf.tiny import words
from rayhf.tiny.language_model import MAX_LENGTH, ModelSize, Phase, new_model, sample, train
from rayhf.tiny.reward_model import PreferencePair, from_policy, score, train_on_pairs
from rayhf.tiny.tokenizer import POLICY_FORMAT, REWARD_FORMAT, train_tokenizer
from rayhf.tiny.world import write_rows

HELDOUT = 500
TRAIN = 2500
PAIRS_TRAIN = 5000
PAIRS_TEST = 500
DEMONSTRATIONS = 12000
SIZE = ModelSize(hidden=160, layers=3, intermediate=448)
CLEAN = Phase(steps=400, batch=32, lr=2.5e-3, lr_end=8e-4)
MEDIOCRE = Phase(steps=200, batch=32, lr=1e-3, lr_end=1e-4)
REWARD = Phase(steps=470, batch=32, lr=2e-3, lr_end=2e-4)
MAX_TOKENS = 32


def make(
    directory: Path, seed: int, progress: Callable[[str, float], None]
) -> tuple[dict[str, int], dict[str, float]]:
    """Build the task into `directory`; return (sizes, measured figures)."""
    progress("prompts", 0.0)
    stream = words.prompts(seed)
    heldout = list(islice(stream, HELDOUT))
    training = list(islice(stream, TRAIN))
    write_rows(directory / "heldout.jsonl", [{"prompt": prompt} for prompt in heldout])
    write_rows(directory / "train.jsonl", [{"prompt": prompt} for prompt in training])
    rng = random.Random(f"words demonstrations {seed}")
    demonstrated = [training[index % TRAIN] for index in range(DEMONSTRATIONS)]
    clean = [
        (prompt, words.demonstration(prompt, rng, off_topic=0.0, repeats=0.0))
        for prompt in demonstrated
    ]
    mediocre = [(prompt, words.demonstration(prompt, rng)) for prompt in demonstrated]
    texts = [f"{prompt}\n{response}" for prompt, response in mediocre]
    tokenizer = train_tokenizer(texts, POLICY_FORMAT, max_vocab=1000, max_length=MAX_LENGTH)
    progress("prompts", 1.0)

    policy = new_model(SIZE, tokenizer, seed)
    train(
        policy,
        tokenizer,
        clean,
        CLEAN,
        seed=seed,
        progress=lambda done: progress("learn the topics", done),
    )
    loss = train(
        policy,
        tokenizer,
        mediocre,
        MEDIOCRE,
        seed=seed + 1,
        progress=lambda done: progress("learn to stray", done),
    )
    policy.save_pretrained(directory / "policy")
    tokenizer.save_pretrained(directory / "policy")

    progress("write pairs", 0.0)
    questions = [prompt for prompt in training for _ in range(PAIRS_TRAIN // TRAIN)]
    questions += heldout[:PAIRS_TEST]
    drafts = [
        sample(
            policy,
            tokenizer,
            questions,
            max_tokens=MAX_TOKENS,
            temperature=1.0,
            seed=2 * seed + draw,
            batch=500,
        )
        for draw in range(2)
    ]
    pairs, agreed = label(questions, drafts, random.Random(f"words labels {seed}"))
    for name, part in (("train", pairs[:PAIRS_TRAIN]), ("test", pairs[PAIRS_TRAIN:])):
        rows = [
            {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
            for pair in part
        ]
        write_rows(directory / f"pairs_{name}.jsonl", rows)
    progress("write pairs", 1.0)

    reward_tokenizer = train_tokenizer(texts, REWARD_FORMAT, max_vocab=1000, max_length=MAX_LENGTH)
    reward_model = from_policy(policy, tokenizer, reward_tokenizer, seed)
    train_on_pairs(
        reward_model,
        reward_tokenizer,
        pairs[:PAIRS_TRAIN],
        REWARD,
        seed=seed,
        progress=lambda done: progress("learn to judge", done),
    )
    reward_model.save_pretrained(directory / "reward_model")
    reward_tokenizer.save_pretrained(directory / "reward_model")

    progress("measure", 0.0)
    measured = {"sft_loss": loss, "labels_agree_with_true_preference": sum(agreed) / len(agreed)}
    test = pairs[PAIRS_TRAIN:]
    test_agreed = agreed[PAIRS_TRAIN:]
    prompts = [pair.prompt for pair in test]
    chosen = score(reward_model, reward_tokenizer, prompts, [pair.chosen for pair in test])
    rejected = score(reward_model, reward_tokenizer, prompts, [pair.rejected for pair in test])
    right = [good > bad for good, bad in zip(chosen, rejected, strict=True)]
    measured["reward_accuracy_labels"] = sum(right) / len(right)
    measured["reward_accuracy_true"] = sum(
        hit == true for hit, true in zip(right, test_agreed, strict=True)
    ) / len(right)
    for name, temperature in {"sampled": 1.0, "greedy": 0.0}.items():
        written = sample(
            policy, tokenizer, heldout, max_tokens=MAX_TOKENS, temperature=temperature, seed=seed
        )
        values = [
            words.true_preference(text, prompt=prompt, reference_answer=None, finish_reason=reason)
            for prompt, (text, reason) in zip(heldout, written, strict=True)
        ]
        measured[f"true_preference_{name}"] = sum(values) / len(values)
    progress("measure", 1.0)
    sizes = {
        "policy_parameters": policy.num_parameters(),
        "reward_model_parameters": reward_model.num_parameters(),
        "vocabulary": len(tokenizer),
        "train": TRAIN,
        "heldout": HELDOUT,
        "pairs_train": PAIRS_TRAIN,
        "pairs_test": PAIRS_TEST,
    }
    return sizes, measured


def label(
    prompts: Sequence[str], drafts: Sequence[Sequence[tuple[str, str]]], rng: random.Random
) -> tuple[list[PreferencePair], list[bool]]:
    """Return a labeled pair per prompt, and whether each label agrees with the true preference."""
    pairs = []
    agreed = []
    for prompt, first, second in zip(prompts, *drafts, strict=True):
        values = [
            words.true_preference(text, prompt=prompt, reference_answer=None, finish_reason=reason)
            for text, reason in (first, second)
        ]
        prefers_first = words.prefers_first(values[0], values[1], rng)
        chosen, rejected = (first, second) if prefers_first else (second, first)
        pairs.append(PreferencePair(prompt, chosen[0], rejected[0]))
        agreed.append(prefers_first == (values[0] >= values[1]))
    return pairs, agreed
