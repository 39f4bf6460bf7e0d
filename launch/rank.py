"""`rayhf rank`: several policies by their answers, as a Bradley-Terry ranking with intervals."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from launch.eval_scores import check_judge, compare_all
from launch.models import pin_models
from launch.sanitize import plain, print_plain
from rayhf.config.base import Section
from rayhf.config.load import load_section
from rayhf.config.scorers import ScorerEntries
from rayhf.data.prompts import prompt_id
from rayhf.errors import ConfigError
from rayhf.evaluation.answers import Answered, read_answers
from rayhf.evaluation.duels import Contest
from rayhf.evaluation.win_rates import bradley_terry
from rayhf.run_dir.files import write_atomic
from rayhf.types import Prompt


class RankConfig(Section):
    """The config of `rayhf rank`."""

    judge: ScorerEntries
    """Scorers that compare answers, pairwise or not."""
    device: Literal["cpu", "gpu"] = "cpu"
    """Device of their models."""


def rank(files: Sequence[Path], judge: Path, out: Path | None, console: Console) -> None:
    """Print the ranking of the policies that wrote the files, and write it to `out` as JSON.

    Raises ConfigError for files without common prompts.
    """
    config, _ = pin_models(load_section(judge, (), RankConfig), Path.cwd(), console)
    if len(files) < 2:
        raise ConfigError("expected at least two files of answers")
    names = _names(files)
    check_judge(config.judge, "judge")
    answers = [read_answers(file, key=str(file)) for file in files]
    contests, prompts = _contests(answers)
    if not contests:
        raise ConfigError("the files have no prompt in common; expected answers to one suite")
    wins = compare_all(config.judge, contests, device=config.device)
    wins_PMM = np.zeros((prompts, len(files), len(files)))
    places: dict[str, int] = {}
    for contest, win in zip(contests, wins, strict=True):
        place = places.setdefault(contest.prompt.prompt_id, len(places))
        if win is not None:
            wins_PMM[place] += np.where(np.isfinite(win), win, 0.0) * (1 - np.eye(len(files)))
    try:
        ranked = bradley_terry(wins_PMM, names)
    except ValueError as error:
        raise ConfigError(f"judge: {error}") from None
    table = Table("policy", "rating", "strength, log-odds", "95 % interval")
    table.title = f"{prompts} prompts, {len(contests)} answers each"
    for each in ranked:
        strength = each.strength
        cells = (escape(plain(each.name)), f"{each.rating:.0f}", f"{strength.value:+.3f}")
        table.add_row(*cells, strength.interval)
    console.print(table)
    wins_MM = wins_PMM.sum(0)
    console.print(_win_table(names, wins_MM))
    if out is not None:
        content: dict[str, Any] = {
            "ranking": [
                {"name": r.name, "rating": r.rating, "strength": r.strength.to_json()}
                for r in ranked
            ],
            "names": names,
            "wins": wins_MM.tolist(),
            "prompts": prompts,
        }
        write_atomic(out, json.dumps(content, indent=2).encode())
        print_plain(console, f"results: {out}")


def _contests(answers: Sequence[dict[str, Answered]]) -> tuple[list[Contest], int]:
    """Return one contest per common prompt and number of an answer, and the number of prompts."""
    common = [key for key in answers[0] if all(key in each for each in answers)]
    contests = []
    for key in common:
        own = [each[key] for each in answers]
        prompt = Prompt(
            prompt_id=prompt_id(own[0].messages, None),
            messages=own[0].messages,
            token_ids=(),
            reference_answer=next((each.answer for each in own if each.answer is not None), None),
            row=next((each.row for each in own if each.row), {}),
        )
        texts = [each.texts for each in own]
        for number in range(min(map(len, texts))):
            contests.append(Contest(prompt=prompt, texts=tuple(each[number] for each in texts)))
    return contests, len(common)


def _names(files: Sequence[Path]) -> list[str]:
    names = [file.name.removesuffix(".jsonl").removesuffix(".answers") for file in files]
    return names if len(set(names)) == len(names) else [str(file) for file in files]


def _win_table(names: Sequence[str], wins_MM: np.ndarray[Any, Any]) -> Table:
    """Return how often each policy beat each other one: counts, where a tie is one half."""
    table = Table("wins of \\ against", *(escape(plain(name)) for name in names))
    for i, name in enumerate(names):
        cells = ["" if i == j else f"{wins_MM[i, j]:g}" for j in range(len(names))]
        table.add_row(escape(plain(name)), *cells)
    return table
