"""Recipe of the arithmetic task: prompts, a policy trained to work in steps, its accuracy.

In: an empty directory and a seed. Out: the files that `rayhf.tiny.world` describes, and measured
figures. Supervised training has two phases: clean demonstrations first, because noise makes the
facts slow to learn, and then demonstrations with slips, which set how often the policy errs when
sampled. Greedy decoding stays far better.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path

from rayhf.tiny import arithmetic
from rayhf.tiny.language_model import MAX_LENGTH, ModelSize, Phase, new_model, sample, train
from rayhf.tiny.tokenizer import POLICY_FORMAT, train_tokenizer
from rayhf.tiny.world import write_rows

HELDOUT = 500
TRAIN = 4000
DEMONSTRATED = 8000
"""Number of questions in demonstrations: the training prompts and as many others, never a held-out
one."""
SIZE = ModelSize(hidden=160, layers=3, intermediate=448)
CLEAN = Phase(steps=800, batch=32, lr=2.5e-3, lr_end=8e-4)
SLIPPING = Phase(steps=150, batch=32, lr=1e-3, lr_end=1e-4)
MAX_TOKENS = 48


def make(
    directory: Path, seed: int, progress: Callable[[str, float], None]
) -> tuple[dict[str, int], dict[str, float]]:
    """Build the task into `directory`; return (sizes, measured figures)."""
    progress("prompts", 0.0)
    stream = arithmetic.chains(seed)
    heldout = list(islice(stream, HELDOUT))
    questions = list(islice(stream, DEMONSTRATED))
    write_rows(
        directory / "heldout.jsonl",
        [{"prompt": chain.prompt, "answer": chain.answer} for chain in heldout],
    )
    write_rows(
        directory / "train.jsonl",
        [{"prompt": chain.prompt, "answer": chain.answer} for chain in questions[:TRAIN]],
    )
    clean = arithmetic.demonstrations(questions, seed, count=len(questions), rate=0.0)
    slipping = arithmetic.demonstrations(questions, seed, count=2 * len(questions))
    texts = [f"{prompt}\n{response}" for prompt, response in slipping[:4000]]
    tokenizer = train_tokenizer(texts, POLICY_FORMAT, max_vocab=400, max_length=MAX_LENGTH)
    progress("prompts", 1.0)

    model = new_model(SIZE, tokenizer, seed)
    train(
        model,
        tokenizer,
        clean,
        CLEAN,
        seed=seed,
        progress=lambda done: progress("learn the steps", done),
    )
    loss = train(
        model,
        tokenizer,
        slipping,
        SLIPPING,
        seed=seed + 1,
        progress=lambda done: progress("learn to slip", done),
    )
    model.save_pretrained(directory / "policy")
    tokenizer.save_pretrained(directory / "policy")

    measured = {"sft_loss": loss}
    for share, (name, temperature) in enumerate({"sampled": 1.0, "greedy": 0.0}.items()):
        progress("measure", share / 2)
        completions = sample(
            model,
            tokenizer,
            [chain.prompt for chain in heldout],
            max_tokens=MAX_TOKENS,
            temperature=temperature,
            seed=seed,
        )
        scores = [
            arithmetic.correct(
                text, prompt=chain.prompt, reference_answer=chain.answer, finish_reason=reason
            )
            for chain, (text, reason) in zip(heldout, completions, strict=True)
        ]
        measured[f"accuracy_{name}"] = sum(scores) / len(scores)
    progress("measure", 1.0)
    sizes = {
        "policy_parameters": model.num_parameters(),
        "vocabulary": len(tokenizer),
        "train": TRAIN,
        "heldout": HELDOUT,
    }
    return sizes, measured
