"""Attacks by what a model writes and a rule returns, prints, starts or breaks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pyarrow as pa

from rayhf.exploration.codecs import SCORE
from rayhf.scorer.build import build_scorer
from rayhf.scorer.protocol import ScorerSetup
from rayhf.scorer.rule import Rule
from rayhf.scorer.rule_config import RuleConfig
from rayhf.types import Completion, Outcome, Prompt, Scored, ScoreRequest, float_array, token_array
from tests.chaos.attacks.attack import Attack, Result
from tests.unit.waiting import HOLD, is_held, wait_until

GOOD = Scored(value=0.5, parts={"attack": 0.5})
ROOT = Path(__file__).parents[3]
ATTACK = HOLD + textwrap.dedent("""
    import decimal, fractions, os, signal, subprocess, sys, time
    import numpy as np

    class Unprintable(Exception):
        def __str__(self):
            raise ValueError

    class Odd:
        def __float__(self):
            return 1.0

    VALUES = {
        "float min": lambda: -1.8e308,
        "1e200": lambda: 1e200,
        "infinity": lambda: float("inf"),
        "nan": lambda: float("nan"),
        "float32 infinity": lambda: np.float32("-inf"),
        "big int": lambda: 10**300,
        "huge int": lambda: 10**5000,
        "huge fraction": lambda: fractions.Fraction(10**400, 3),
        "beyond the bound": lambda: 1_000_001,
        "complex": lambda: 1j,
        "numpy complex": lambda: np.complex64(1j),
        "decimal": lambda: decimal.Decimal("1e400"),
        "object": lambda: Odd(),
        "bytes": lambda: b"1.0",
        "huge part": lambda: {"score": 0.5, "part": 1e300},
        "huge int part": lambda: {"score": 0.5, "part": 10**5000},
        "nan part": lambda: {"score": 0.5, "part": float("nan")},
        "part name": lambda: {"score": 0.5, "\\ud800": 1.0},
        "many parts": lambda: {"score": 0.5} | {f"p{n}": 1.0 for n in range(1000)},
        "nested": lambda: {"score": {"score": {"score": 0.5}}},
    }
    TEXTS = {
        "lone surrogate": "x\\ud800\\udfff",
        "escape codes": "\\x1b[31mred\\x1b]0;title\\x07\\x1b[2J",
        "lines": "a\\nrayhf: done\\r\\u2028b\\x0bc",
        "null": "\\x00\\x7f\\x9b31m",
        "right to left": "\\u202egnp.exe",
        "long": "y" * (20 << 20),
    }
    LINES = {
        "short": b'[0,"scored","x"]\\n',
        "brackets": b"[" * 200_000 + b"\\n",
        "closed brackets": b"[" * 100_000 + b"]" * 100_000 + b"\\n",
        "no number": b'[[0],[["scored",1.0,{}]]]\\n',
        "two results": b'[0,[["scored",1.0,{}],["scored",1.0,{}]]]\\n',
        "no result": b"[0,[]]\\n",
        "text for a score": b'[0,[["scored","x",{}]]]\\n',
        "text for a part": b'[0,[["scored",1.0,{"a":"b"}]]]\\n',
        "no parts": b'[0,[["scored",1.0]]]\\n',
        "no reason": b'[0,[["failed",1]]]\\n',
        "unknown status": b'[0,[["passed","x"]]]\\n',
        "another call": b'[7,[["scored",1.0,{}]]]\\n',
        "digits": b"[0," + b"9" * 5000 + b"]\\n",
        "object": b'{"ready": true}\\n',
        "null": b"null\\n",
        "binary": bytes(range(256)) * 8 + b"\\n",
        "no end": b"x" * (2 << 20),
        "empty": b"\\n" * 5000,
    }

    def values(completion, **context):
        return VALUES[completion]() if completion in VALUES else 0.5

    def raises(completion, **context):
        if completion == "unprintable":
            raise Unprintable
        if completion in TEXTS:
            raise ValueError(TEXTS[completion])
        return 0.5

    def pipe(completion, **context):
        if completion in LINES:
            os.write(int(sys.argv[2]), LINES[completion])
            time.sleep(60)
        return 0.5

    def breaks(completion, **context):
        if completion == "real-time signal":
            os.kill(os.getpid(), signal.SIGRTMIN + 3)
        if completion == "parent" and os.getppid() == 1:
            os.kill(1, signal.SIGKILL)  # the first process inside ignores it
        if completion == "closes":
            os.closerange(3, 1000)
        if completion == "all descriptors":
            os.closerange(0, 1000)
        if completion == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        return 0.5

    def hangs(completion, **context):
        while completion == "hang":
            pass
        return 0.5

    def prints(completion, **context):
        for _ in range(64):
            os.write(1, b"\\x1b[2J" * (1 << 16))
            os.write(2, b"x" * (1 << 18))
        return 0.5

    def empty_environment(completion, **context):
        hold()
        subprocess.Popen(["env", "-i", "sleep", "600"], start_new_session=True, close_fds=False)
        return 0.5

    def forks(completion, **context):
        hold()
        if os.fork() == 0:
            os.setsid()
            for number in range(20_000):
                time.sleep(0.001)
                if os.fork():
                    os._exit(0)
        return 0.5

    def session(completion, **context):
        hold()
        if os.fork() == 0:
            os.setsid()
            time.sleep(600)
        time.sleep(600)
""")
VALUES = (
    "float min", "1e200", "infinity", "nan", "float32 infinity", "big int", "huge int",
    "huge fraction", "beyond the bound", "complex", "numpy complex", "decimal", "object", "bytes",
    "huge part", "huge int part", "nan part", "part name", "many parts", "nested",
)  # fmt: skip
TEXTS = ("lone surrogate", "escape codes", "lines", "null", "right to left", "long", "unprintable")
LINES = (
    "short", "brackets", "closed brackets", "no number", "two results", "no result",
    "text for a score", "text for a part", "no parts", "no reason", "unknown status",
    "another call", "digits", "object", "null", "binary", "no end", "empty",
)  # fmt: skip
BREAKS = ("real-time signal", "closes", "all descriptors", "stopped")


def request(*texts: str, prompt_id: str = "p") -> ScoreRequest:
    """Return completions of one prompt."""
    question = {"role": "user", "content": "?"}
    return ScoreRequest(
        prompt=Prompt(prompt_id=prompt_id, messages=(question,), token_ids=(1,)),
        completions=tuple(
            Completion(
                prompt_id=prompt_id,
                index=index,
                seed=index,
                text=text,
                token_ids=token_array((1,)),
                logprobs=float_array((0.0,)),
                finish_reason="stop",
                policy_version=0,
            )
            for index, text in enumerate(texts)
        ),
    )


@contextmanager
def scorer(
    folder: Path, function: str, **settings: object
) -> Iterator[Callable[[Sequence[ScoreRequest]], list[tuple[Outcome, ...]]]]:
    """Yield the scores of a function as a campaign gets them."""
    (folder / "attack.py").write_text(ATTACK)
    config = RuleConfig.model_validate(
        {"function": f"attack:{function}", "name": "attack", "timeout_s": 1.0, **settings}
    )
    combined = build_scorer([config], ScorerSetup(base=folder))
    try:
        yield combined.score
    finally:
        combined.close()


def is_contained(outcome: Outcome) -> bool:
    """Whether a bad completion has no score, and a reason that every later step can store."""
    if isinstance(outcome, Scored):
        return False
    stored = json.dumps(SCORE.encode([(outcome,)])).encode()
    pa.array([outcome.reason], pa.string())
    return bool(stored) and outcome.reason.isprintable() and 0 < len(outcome.reason) <= 600


def one_by_one(function: str, bad: Sequence[str], folder: Path, seed: int) -> Result:
    """Each bad completion is of another prompt, between two good ones."""
    with scorer(folder, function) as score:
        rows = score([request("good", text, "good", prompt_id=text) for text in bad])
    lost = [
        text
        for text, (before, outcome, after) in zip(bad, rows, strict=True)
        if not (before == after == GOOD and is_contained(outcome))
    ]
    figures = f"{2 * len(bad)} others scored" if not lost else f"not held: {', '.join(lost)}"
    return len(bad), len(bad) - len(lost), figures


def hanging(folder: Path, seed: int) -> Result:
    """Four answers that hang at the head of 64, of four prompts, and then all of one prompt."""
    with scorer(folder, "hangs", timeout_s=0.3) as score:
        apart = score([request("hang", *["x"] * 15, prompt_id=str(n)) for n in range(4)])
        together = score(
            [request(*["hang"] * 8, prompt_id="0")]
            + [request(*["x"] * 8, prompt_id=str(n)) for n in range(1, 8)]
        )
    scored = [sum(outcome == GOOD for row in rows for outcome in row) for rows in (apart, together)]
    return 2, (scored[0] == 60) + (scored[1] == 56), f"scored {scored[0]}, {scored[1]} of 64"


def output(folder: Path, seed: int) -> Result:
    """48 MiB on both outputs, of which a little reaches ours, without escape codes."""
    (folder / "attack.py").write_text(ATTACK)
    script = (
        "import sys; from pathlib import Path; from score_requests import make_rule, request\n"
        "rule = make_rule('attack:prints', Path(sys.argv[1]), timeout_s=30.0)\n"
        "print(rule.score([request('a', 'b')])); rule.close()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder)],
        cwd=ROOT,
        env=_test_environment(),
        capture_output=True,
        timeout=120,
    )
    held = done.stdout.count(b"Scored(value=0.5") == 2
    held = held and len(done.stderr) < 1 << 20 and b"\x1b" not in done.stderr
    return 1, int(held), f"{len(done.stderr) >> 10} KiB of 64 MiB passed on"


def started(function: str, folder: Path, seed: int) -> Result:
    """What a rule started ends with it."""
    (folder / "attack.py").write_text(ATTACK)
    rule = Rule(RuleConfig(function=f"attack:{function}"), ScorerSetup(base=folder))
    unprotected = rule.pool.unprotected
    [(outcome,)] = rule.score([request("x")])
    before = is_held(folder / "held")
    rule.close()
    if unprotected:
        return 0, 0, f"not tried: {unprotected}"
    held = outcome == Scored(value=0.5) and before and _is_released(folder / "held")
    return 1, int(held), "all ended"


def scorer_killed(folder: Path, seed: int) -> Result:
    """SIGKILL of the scorer's process, whose rule started a session of its own."""
    (folder / "attack.py").write_text(ATTACK)
    script = (
        "import sys; from pathlib import Path; from score_requests import make_rule, request\n"
        "rule = make_rule('attack:session', Path(sys.argv[1]), timeout_s=600.0)\n"
        "print(rule.pool.unprotected, flush=True); rule.score([request('x')])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(folder)],
        cwd=ROOT,
        env=_test_environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    unprotected = process.stdout.readline().strip()
    file = folder / "held"
    wait_until(lambda: file.exists() and is_held(file))
    process.kill()
    process.communicate()
    if unprotected:
        return 0, 0, f"not tried: {unprotected}"
    return 1, int(_is_released(file)), "all ended"


def _is_released(file: Path) -> bool:
    try:
        wait_until(lambda: not is_held(file), seconds=10.0)
    except AssertionError:
        return False
    return True


def _test_environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests/unit'}"}


ATTACKS: list[Attack] = [
    Attack(
        "values that a rule returns",
        "one of them ended the run, at every start",
        partial(one_by_one, "values", VALUES),
    ),
    Attack(
        "texts of a rule's exceptions",
        "a lone surrogate ended the run, at every start",
        partial(one_by_one, "raises", TEXTS),
    ),
    Attack(
        "lines on a rule's reply pipe",
        "four of them ended the run",
        partial(one_by_one, "pipe", LINES),
    ),
    Attack(
        "a rule that breaks its process",
        "a real-time signal ended the run",
        partial(one_by_one, "breaks", BREAKS),
    ),
    Attack("answers that hang at the head of 64", "0 of 64 scored, exit code 9", hanging),
    Attack("output without end", "past the limit on files, every later call failed", output),
    Attack(
        "a session without an environment",
        "outlived the rule",
        partial(started, "empty_environment"),
    ),
    Attack(
        "a process that forks again every millisecond",
        "outlived the rule",
        partial(started, "forks"),
    ),
    Attack("a session, and the scorer is killed", "outlived the scorer", scorer_killed),
]
