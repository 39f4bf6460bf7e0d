"""Self-play on games of random odds: exploitability of the average and of the last policy.

    python -m tests.bench.games [LOOP ...] [--tuning] [--iterations 100] [--json FILE] [--record]
    python -m tests.bench.games LOOP --engines --games 3 --tiny .tiny --runs DIR

The first form simulates the loops' own code on a tabular policy (tests/bench/tabular.py), in
seconds per game. The second runs the presets with the real engines, in minutes per game. Both take
the settings of configs/tiny/<preset>.yaml with those of LOOPS. The games of GAMES were not used to
choose any setting; --tuning takes those that were.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from rich.console import Console
from rich.table import Table

from rayhf.tiny.exploitability import exploitability
from rayhf.tiny.game import ANSWERS, OPENING
from rayhf.tiny.random_games import odds
from tests.bench.claims import ROOT, last, rayhf
from tests.bench.results import put_section
from tests.bench.tabular import Array, Schedule, play

GAMES = range(2026, 2036)
TUNING = range(6)
DEAD = 1e-3
"""Probability below which a move has died out: a preset samples 256 moves per iteration."""


@dataclass(frozen=True, kw_only=True)
class Loop:
    """A preset with changes of its algorithm's settings."""

    preset: str
    changes: dict[str, Any]


LOOPS = {
    "sppo": Loop(preset="sppo_game", changes={}),
    "sppo_pull": Loop(preset="sppo_game", changes={"pull": 0.1, "reference": {"type": "initial"}}),
    "gpo": Loop(preset="sppo_game", changes={"payoff": "log_odds", "eta": 0.5}),
    "inpo": Loop(preset="inpo_game", changes={}),
    "inpo_small_steps": Loop(preset="inpo_game", changes={"eta": 2.0, "tau": 0.1}),
    "mnpo": Loop(preset="mnpo_game", changes={}),
    "nash_md": Loop(preset="nash_md_game", changes={}),
    "dno": Loop(preset="dno_game", changes={}),
}


def settings_of(loop: Loop) -> dict[str, Any]:
    """Return the algorithm's settings."""
    text = (ROOT / "configs" / "tiny" / f"{loop.preset}.yaml").read_text(encoding="utf-8")
    return {**yaml.safe_load(text)["algorithm"], **loop.changes}


def figures_of(policies: Array, preference: Array) -> dict[str, float]:
    """Return the figures of one game from its policies, (T, K).

    average and last are exploitabilities, last of the mean over the last tenth of the policies;
    rarest is the smallest probability of a move in the last policy.
    """
    recent = policies[-max(1, len(policies) // 10) :]
    return {
        "average": float(exploitability(policies.mean(axis=0), preference)),
        "last": float(exploitability(recent, preference).mean()),
        "rarest": float(policies[-1].min()),
    }


def simulated(loop: Loop, game_seed: int, schedule: Schedule) -> dict[str, float]:
    """Play one game with a tabular policy."""
    preference = np.array(odds(game_seed))
    policies = play(settings_of(loop), preference, OPENING, seed=game_seed, schedule=schedule)
    return figures_of(policies, preference)


def with_engines(
    name: str, loop: Loop, game_seed: int, *, tiny: Path, runs: Path
) -> dict[str, float]:
    """Run the preset on one game with the real engines, unless it is finished."""
    directory = runs / f"{name}_{game_seed}"
    done = directory / "run" / "metrics.jsonl"
    directory.mkdir(parents=True, exist_ok=True)
    content = {"answers": ANSWERS, "preference": odds(game_seed)}
    (directory / "game.json").write_text(json.dumps(content))
    for part in ("train", "heldout"):
        rows = map(json.loads, (tiny / "game" / f"{part}.jsonl").read_text().splitlines())
        texts = [json.dumps({**row, "game_seed": game_seed}) + "\n" for row in rows]
        (directory / f"{part}.jsonl").write_text("".join(texts))
    rule = "{type: pairwise_rule, function: 'rayhf.tiny.random_games:beats'}"
    overrides = {
        "run.dir": directory / "run",
        "policy.model": tiny / "game" / "policy",
        "prompts.train": directory / "train.jsonl",
        "prompts.heldout": directory / "heldout.jsonl",
        "evaluations.game.game": directory / "game.json",
        "scorer.train": f"[{rule}]",
        "algorithm": json.dumps(settings_of(loop)),
    }
    arguments = [f"{key}={value}" for key, value in overrides.items()]
    rayhf(["run", f"configs/tiny/{loop.preset}.yaml", *arguments], log=directory / "log")
    lines = [json.loads(line) for line in done.read_text().splitlines()]
    shares = [last(f"game/share/{answer}")(lines) for answer in ANSWERS]
    recent = [line["game/exploitability"] for line in lines][-max(1, len(lines) // 10) :]
    return {
        "average": last("game/exploitability_average")(lines),
        "last": float(np.mean(recent)),
        "rarest": min(shares),
    }


def summary(results: dict[str, dict[int, dict[str, float]]]) -> list[list[str]]:
    """Return header and one row per loop: mean and worst over the games."""
    head = ["loop", "average: mean", "worst", "at most 0.08", "last: mean", "worst", "died out"]
    rows = [head]
    for name, by_game in results.items():
        average = [figures["average"] for figures in by_game.values()]
        final = [figures["last"] for figures in by_game.values()]
        dead = sum(figures["rarest"] < DEAD for figures in by_game.values())
        held = sum(value <= 0.08 for value in average)
        figures = [np.mean(average), max(average), np.mean(final), max(final)]
        cells = [f"{value:.3f}" for value in figures]
        games = len(by_game)
        rows.append([name, *cells[:2], f"{held}/{games}", *cells[2:], f"{dead}/{games}"])
    return rows


def record(rows: Sequence[Sequence[str]], *, games: int, iterations: int, engines: bool) -> None:
    """Write the table into RESULTS.md."""
    how = "real engines" if engines else "simulated: the loops' own code on a tabular policy"
    body = [
        f"{games} games, {iterations} iterations, {how}. `python -m tests.bench.games`. "
        "Exploitability of the average of all policies, and the mean of the last tenth of them; a "
        f"move has died out where its probability in the last policy is below {DEAD:g}.",
        "",
        *("| " + " | ".join(row) + " |" for row in rows[:1]),
        "|" + "---|" * len(rows[0]),
        *("| " + " | ".join(row) + " |" for row in rows[1:]),
    ]
    put_section("### Self-play on games of random odds", "\n".join(body), under="## Claims")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("loops", nargs="*", metavar="LOOP", help=", ".join(LOOPS))
    parser.add_argument("--tuning", action="store_true", help="take the games for tuning")
    parser.add_argument("--games", type=int, default=len(GAMES))
    parser.add_argument("--iterations", type=int, default=Schedule.iterations)
    parser.add_argument("--steps", type=int, default=Schedule.steps)
    parser.add_argument("--set", default="{}", help="further settings of the algorithm, as YAML")
    parser.add_argument("--engines", action="store_true", help="run the presets, not a simulation")
    parser.add_argument("--tiny", type=Path, default=ROOT / ".tiny")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "games")
    parser.add_argument("--json", type=Path, help="write every game's figures to this file")
    parser.add_argument(
        "--read", type=Path, action="append", default=[], help="figures of an earlier --json"
    )
    parser.add_argument("--record", action="store_true", help="write the table into RESULTS.md")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.loops) - set(LOOPS))
    if unknown:
        parser.error(f"unknown loop {unknown[0]!r}, expected some of {', '.join(LOOPS)}")
    schedule = Schedule(iterations=options.iterations, steps=options.steps)
    games = (TUNING if options.tuning else GAMES)[: options.games]
    torch.set_num_threads(1)
    console = Console(width=100)
    results: dict[str, dict[int, dict[str, float]]] = {}
    for file in options.read:
        results |= json.loads(file.read_text(encoding="utf-8"))
    for name in options.loops or [name for name in LOOPS if name not in results]:
        changes = {**LOOPS[name].changes, **yaml.safe_load(options.set)}
        loop = Loop(preset=LOOPS[name].preset, changes=changes)
        for game in games:
            if options.engines:
                figures = with_engines(name, loop, game, tiny=options.tiny, runs=options.runs)
            else:
                figures = simulated(loop, game, schedule)
            results.setdefault(name, {})[game] = figures
            values = ", ".join(f"{key} {value:.4f}" for key, value in figures.items())
            console.print(f"{name}, game {game}: {values}", markup=False)
    rows = summary({name: results[name] for name in LOOPS if name in results})
    table = Table(*rows[0])
    for row in rows[1:]:
        table.add_row(*row)
    console.print(table)
    if options.record:
        record(rows, games=len(games), iterations=schedule.iterations, engines=options.engines)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
