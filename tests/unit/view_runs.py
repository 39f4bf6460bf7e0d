"""Run directories for the tests of pages, written by the run directory's own code."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from campaigns import make_config
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from rayhf.evaluation.values import prompt_values
from rayhf.run_dir.inbox import Submissions
from rayhf.run_dir.state import CheckpointState
from rayhf.run_dir.store import RunDir
from rayhf.types import (
    Compared,
    Completion,
    Example,
    Failed,
    Group,
    Invalid,
    JudgeReply,
    Outcome,
    Prompt,
    Sample,
    Scored,
    float_array,
    make_row,
    token_array,
)

WORDS = [
    "sea",
    "river",
    "stone",
    "cloud",
    "moon",
    "garden",
    "forest",
    "light",
    "bridge",
    "tower",
    "fox",
    "owl",
]
CYCLE = np.array([[0.5, 0.9, 0.2], [0.1, 0.5, 0.8], [0.8, 0.2, 0.5]])
"""0 beats 1, 1 beats 2, 2 beats 0."""
STRUCTURED = JudgeReply(text='{"reasoning": "<b>good</b>\\n", "verdict": "yes"}', part="judge")


def write_run(
    directory: Path,
    *,
    iterations: int = 4,
    prompts: int = 4,
    samples: int = 4,
    words: int = 8,
    texts: Sequence[str] = (),
    **sections: Any,
) -> Path:
    """Write a finished run with trees, win rates, failed scores, labels and faults.

    `texts` are completions of the first prompt of every iteration; the others are random words.
    """
    config = make_config(directory, run={"iterations": iterations}, **sections)
    store = RunDir(config)
    rng = random.Random(0)
    try:
        for iteration in range(iterations + 1):
            asyncio.run(_write_iteration(store, iteration, prompts, samples, words, texts, rng))
        temporary = store.checkpoints.begin()
        (temporary / "learner").mkdir()
        (temporary / "learner" / "weights").write_bytes(b"w" * 1000)
        state = CheckpointState(
            iteration=iterations,
            versions={"policy": iterations},
            algorithm={},
            scorer={},
            prompts="p",
            pairs=None,
            inputs={},
            config={},
            packages={"rayhf": "0.1.0", "torch": "2.13.0"},
        )
        store.commit(temporary, state, campaign_state="done", score=0.5)
        store.event("commit", f"iteration {iterations} is committed")
        store.event("end", "done", code=0)
    finally:
        store.close()
    _write_tokenizer(store.path / "policy")
    label = {"pair_id": f"{iterations}/prompt-{iterations}-0/0/1", "verdict": "second"}
    Submissions(store.path, "labels").submit([label], source="test")
    return store.path


async def _write_iteration(
    store: RunDir,
    iteration: int,
    prompts: int,
    samples: int,
    words: int,
    texts: Sequence[str],
    rng: random.Random,
) -> None:
    rate = iteration / 10
    metrics = {
        "iteration": float(iteration),
        "policy/version": float(iteration),
        "scorer/reward_mean": 0.2 + rate,
        "reference/kl": 0.1 * iteration,
        "rollout/length_mean": float(words),
        "policy/entropy": 2.0 - rate,
        "rollout/tokens": 1000.0,
        "eval/toy/sampled": 0.5 + rate,
        "eval/toy/greedy": 0.5 + rate,
        "eval/pairs/pair_accuracy": 0.025 + rate,
        "eval/wins/win_rate_length_controlled": 0.5 + rate,
        "eval/wins/win_rate_length_controlled_low": 0.4 + rate,
        "eval/wins/win_rate_length_controlled_high": 0.6 + rate,
    }
    phases = ("rollout", "scorer", "reference", "learner", "sync", "evaluate", "explore")
    metrics |= {f"time/{name}_s": 1.0 for name in phases}
    metrics["time/iteration_s"] = 7.5
    heldout = [
        Group(
            prompt=_prompt(f"heldout-{n}", f"held-out question {n}"),
            samples=tuple(
                replace(
                    _sample(_words(rng, words), Scored(value=rate + n % 2, replies=(STRUCTURED,))),
                    kind=kind,
                )
                for kind in ("sampled", "greedy")
            ),
        )
        for n in range(6)
    ]
    store.write_heldout(iteration, heldout)
    ids = [group.prompt.prompt_id for group in heldout]
    figures = {
        f"eval/toy/{kind}": [rate + n % 2 for n in range(6)] for kind in ("sampled", "greedy")
    }
    figures["eval/pairs/pair_accuracy"] = [rate + 0.01 * n for n in range(6)]
    values = [prompt_values(name, ids, figure) for name, figure in figures.items()]
    store.write_evaluations(iteration, values)
    if iteration:
        groups = [
            _group(iteration, n, samples, words, texts if n == 0 else (), rng)
            for n in range(prompts)
        ]
        examples = [_pair(group) for group in groups]
        store.write_samples(iteration, groups)
        store.write_examples(iteration, examples)
        store.write_credit(iteration, examples)
    await store.tables_written()
    for phase in ("explore", "reference", "learn", "sync", "evaluate"):
        store.event("phase", phase, iteration=iteration)
    if iteration == 2:
        store.event("fault", "restarting rollout engine 0: its process was killed")
        store.event("warn", "guard kl: reference/kl is 0.2 <b>nats</b>")
    store.append_metrics(metrics)


def _group(
    iteration: int, n: int, samples: int, words: int, texts: Sequence[str], rng: random.Random
) -> Group:
    prompt = _prompt(f"prompt-{iteration}-{n}", f"Write about {rng.choice(WORDS)}, number {n}.")
    if n % 4 == 2:
        return Group(prompt=prompt, samples=_tree(rng))
    made = [
        _sample(
            text,
            Scored(
                value=float(i),
                parts={"rule": float(i), "style": 0.5},
                replies=() if n % 4 == 1 else (JudgeReply(text=f"Seen: {text}", part="style"),),
            ),
        )
        for i, text in enumerate(texts or [_words(rng, words) for _ in range(samples)])
    ]
    if n % 4 == 1:
        compared = Compared(
            win=CYCLE,
            source="pairwise",
            replies=tuple(
                (JudgeReply(text=f"{i} before {j}", part="judge", against=j, left_out=i == 2),)
                for i, j in ((0, 1), (1, 2), (2, 0))
            ),
        )
        return Group(prompt=prompt, samples=tuple(made[:3]), compared=compared)
    if n % 4 == 0:
        made[-1] = replace(made[-1], outcome=Invalid(reason="the verdict was NaN"))
        made[-2] = replace(made[-2], outcome=Failed(reason="the judge did not answer"))
    return Group(prompt=prompt, samples=tuple(made))


def _tree(rng: random.Random) -> tuple[Sample, ...]:
    """Return two steps below the prompt, of which the first was chosen and has two children."""
    nodes = []
    for i, parent in enumerate((None, None, 0, 0)):
        stats = {"visits": 4.0 - i, "q": 0.5, "value": 0.25 * i, "prior": 0.5, "chosen": 0.0}
        stats["chosen"] = float(i in (0, 2))
        outcome = Scored(value=1.0) if parent == 0 else None
        sample = _sample(f"step {i} {_words(rng, 3)}", outcome)
        nodes.append(replace(sample, kind="step", parent=parent, stats=stats))
    return tuple(nodes)


def _pair(group: Group) -> Example:
    rows = []
    for index, score in ((1, 1.0), (0, 0.0)):
        row = make_row(group, index, score=score)
        logp = row.tokens["behavior_logp"]
        rows.append(
            row.with_tokens(ref_logp=logp - np.float32(0.5), advantage=logp + np.float32(1))
        )
    return Example(rows=tuple(rows), scalars={"margin": 1.0})


def _prompt(prompt_id: str, question: str) -> Prompt:
    messages = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": question})
    return Prompt(
        prompt_id=prompt_id,
        messages=messages,
        token_ids=(1, 2),
        reference_answer=f"about {question}",
        row={"topic": "t", "answer": f"about {question}"},
        source="words",
    )


def _words(rng: random.Random, count: int) -> str:
    return " ".join(rng.choices(WORDS, k=count))


def _sample(text: str, outcome: Outcome | None) -> Sample:
    ids = token_array(text.encode())
    completion = Completion(
        prompt_id="p",
        index=0,
        seed=1,
        text=text,
        token_ids=ids,
        logprobs=float_array(-0.1 * (i % 5) for i in range(len(ids))),
        finish_reason="length" if len(text) % 5 == 0 else "stop",
        policy_version=3,
    )
    return Sample(completion=completion, outcome=outcome)


def _write_tokenizer(directory: Path) -> None:
    """Write a tokenizer whose token ids are the bytes of UTF-8."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable}
    characters |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    assert set(characters.values()) == set(alphabet)
    tokenizer = Tokenizer(models.BPE({text: byte for byte, text in characters.items()}, []))
    tokenizer.decoder = decoders.ByteLevel()
    directory.mkdir(exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
