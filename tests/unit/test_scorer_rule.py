"""Rules in a real child process: whatever one completion does to it, the others are scored."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
import zlib
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from pydantic import ValidationError
from score_requests import make_rule, request
from waiting import HOLD, is_held, is_running, wait_until

from rayhf.errors import ConfigError
from rayhf.scorer.rule import Rule
from rayhf.scorer.rule_config import RuleConfig
from rayhf.scorer.rule_pool import Losses
from rayhf.types import Failed, Invalid, Outcome, Scored

RULES = """
import os, re, signal, sys, time

def misbehave(completion, *, prompt, reference_answer, finish_reason):
    if completion == "raise": raise ValueError("not\\nthis")
    if completion == "sleep": time.sleep(60)
    if completion == "slow": time.sleep(0.1)
    if completion == "regex": re.match(r"(a+)+$", "a" * 60 + "b")
    if completion == "nan": return float("nan")
    if completion == "infinity": return -float("inf")
    if completion == "overflow": return 10 ** 400
    if completion == "none": return None
    if completion == "text": return "1.0"
    if completion == "bool": return True
    if completion == "dict": return {"reward": 1.0}
    if completion == "part": return {"score": 1.0, "a b": 1.0}
    if completion == "late": raise TimeoutError("too slow")
    if completion == "list": return [1.0]
    if completion == "exit": os._exit(3)
    if completion == "sys.exit": sys.exit(2)
    if completion == "segfault": os.kill(os.getpid(), signal.SIGSEGV)
    if completion == "memory": return len(bytearray(8 << 30))
    if completion == "recursion":
        return misbehave(completion, prompt="", reference_answer="", finish_reason="")
    if completion == "print":
        print('\\n[0, "scored", 9.0]\\n\\ud800', flush=True)
        os.write(1, b'[1, "scored", 9]\\n')
    if completion == "stdin": return len(sys.stdin.read())
    if completion == "close": os.closerange(3, 64)
    if completion == "worse": raise Unprintable()
    return 0.5

class Unprintable(Exception):
    def __str__(self): raise RuntimeError("no")

def context(completion, *, prompt, reference_answer, finish_reason, messages):
    seen = (prompt, reference_answer, finish_reason)
    assert seen == ("second", "4", "length"), seen
    return len(messages)

def everything(completion, **context):
    names = {"prompt", "messages", "reference_answer", "row", "finish_reason", "thinking"}
    assert set(context) == names | {"episode"}, context
    return len(context["messages"])

def digest(completion, *, prompt, reference_answer, finish_reason):
    import zlib
    return zlib.crc32(completion.encode("utf-8", "surrogatepass"))

def constant_time(text): return 1.0

constant = 3
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("campaign")
    (directory / "my_rules.py").write_text(RULES)
    (directory / "broken.py").write_text("import not_installed_anywhere\n")
    (directory / "syntax.py").write_text("def f(:\n")
    (directory / "leaves.py").write_text("raise SystemExit(0)\n")
    return directory


@pytest.fixture(scope="module")
def misbehave(base: Path) -> Iterator[Rule]:
    rule = make_rule("my_rules:misbehave", base, timeout_s=0.8)
    yield rule
    rule.close()


@pytest.mark.parametrize(
    ("bad", "kind", "reason"),
    [
        ("raise", Failed, "ValueError: not this (my_rules.py:5)"),
        ("sleep", Failed, "no response within 0.8 s"),
        ("regex", Failed, "no response within 0.8 s"),
        ("nan", Invalid, "the rule returned nan"),
        ("infinity", Invalid, "the rule returned -inf"),
        ("overflow", Invalid, "the rule returned a number beyond the range of a float"),
        ("none", Invalid, "the rule returned None, not a number"),
        ("text", Invalid, "the rule returned a str, not a number"),
        ("dict", Invalid, "the rule returned a dict without `score`, only reward"),
        ("part", Invalid, "the rule's part 'a b' is 1.0"),
        ("late", Failed, "TimeoutError: too slow"),
        ("list", Invalid, "the rule returned a list, not a number"),
        ("exit", Failed, "the rule's process exited (exit code 3)"),
        ("sys.exit", Failed, "SystemExit: 2"),
        ("segfault", Failed, "the rule's process exited (signal SIGSEGV)"),
        ("memory", Failed, "MemoryError"),
        ("recursion", Failed, "RecursionError"),
        ("close", Failed, "the rule's process exited"),
        ("worse", Failed, "my_rules.Unprintable: <exception str() failed>"),
    ],
)
def test_bad_completion_does_not_affect_others(
    misbehave: Rule, bad: str, kind: type[Outcome], reason: str
) -> None:
    good = Scored(value=0.5)
    (before, outcome, after), (last,) = misbehave.score([request("a", bad, "b"), request("c")])
    assert (before, after, last) == (good, good, good)
    assert isinstance(outcome, kind)
    assert not isinstance(outcome, Scored)
    assert outcome.reason.startswith(reason)


def test_bad_completions_in_a_row_and_at_the_end(misbehave: Rule) -> None:
    [outcomes] = misbehave.score([request("exit", "exit", "a", "segfault", "raise", "exit")])
    assert [type(outcome) for outcome in outcomes] == [
        Failed,
        Failed,
        Scored,
        Failed,
        Failed,
        Failed,
    ]
    assert misbehave.score([request("a")]) == [(Scored(value=0.5),)]


def test_time_limit_is_per_completion(misbehave: Rule) -> None:
    assert misbehave.score([request(*["slow"] * 12)]) == [(Scored(value=0.5),) * 12]


def test_prints_do_not_reach_the_protocol(misbehave: Rule) -> None:
    assert misbehave.score([request(*["print"] * 200)]) == [(Scored(value=0.5),) * 200]


def test_stdin_is_empty(misbehave: Rule) -> None:
    assert misbehave.score([request("stdin")]) == [(Scored(value=0.0),)]


def test_nothing_to_score(misbehave: Rule) -> None:
    assert misbehave.score([]) == []
    assert misbehave.score([request(), request("a")]) == [(), (Scored(value=0.5),)]


def test_context_of_the_completion(base: Path) -> None:
    turns = ("user", "first"), ("assistant", "x"), ("user", "second"), ("assistant", "y")
    messages = tuple({"role": role, "content": content} for role, content in turns)
    for function, value in (("context", 4.0), ("everything", 4.0)):
        rule = make_rule(f"my_rules:{function}", base)
        assert rule.score([request("text", messages=messages, finish_reason="length")]) == [
            (Scored(value=value),)
        ]
        rule.close()


def test_hostile_text_arrives_unchanged(base: Path) -> None:
    texts = [
        "", "\n", "line\r\nline\n\n", "\x00", "\x1b[2J\x1b]0;title\x07", "\ud800",
        "\ud83d\ude00 as two halves", "\u2028\x85", '"]}\n[0, "scored", 1]', "😀é漢",
        "x" * 3_000_000, "\\u0000", "\udcff" * 1000,
    ]  # fmt: skip
    rule = make_rule("my_rules:digest", base)
    [outcomes] = rule.score([request(*texts)])
    rule.close()
    wanted = [float(zlib.crc32(text.encode("utf-8", "surrogatepass"))) for text in texts]
    assert [outcome.value for outcome in outcomes if isinstance(outcome, Scored)] == wanted


STARTS = """
import subprocess
def score(completion, **context):
    hold()
    subprocess.Popen(["sleep", "60"], close_fds=False)
    return 1.0
"""


def pid_of(rule: Rule) -> int:
    child = rule.pool._processes[0].child
    assert child is not None
    return child._process.pid


def test_thousands_of_scores_come_from_one_child_in_order(base: Path) -> None:
    rule = make_rule("my_rules:digest", base)
    child = pid_of(rule)
    texts = [[f"answer {i} of {n}" for n in range(4)] for i in range(1250)]
    batches = [rule.score([request(*four) for four in texts]) for _ in range(2)]
    wanted = [
        tuple(Scored(value=float(zlib.crc32(text.encode()))) for text in four) for four in texts
    ]
    assert batches == [wanted, wanted] and pid_of(rule) == child
    rule.close()


def test_child_that_crashed_between_batches_is_restarted(base: Path) -> None:
    rule = make_rule("my_rules:everything", base)
    os.kill(pid_of(rule), signal.SIGKILL)
    wait_until(lambda: not is_running(pid_of(rule)))
    assert rule.score([request("a")]) == [(Scored(value=1.0),)]
    rule.close()


def test_fresh_child_never_runs_an_edited_rule(tmp_path: Path) -> None:
    file = tmp_path / "edited.py"
    file.write_text(
        "import os\n"
        "def score(completion, **context): return 1 if completion != 'x' else os._exit(1)\n"
    )
    rule = make_rule("edited:score", tmp_path)
    file.write_text("def score(completion, **context): return 2\n")
    [(first, _, third)] = rule.score([request("a", "x", "b")])
    rule.close()
    assert first == Scored(value=1.0)
    assert isinstance(third, Failed)
    assert "edited:score changed since the scorer started" in third.reason


def test_child_dies_with_its_parent(base: Path) -> None:
    """Even when the parent is killed while a regular expression holds the child's GIL."""
    script = textwrap.dedent("""
        import sys
        from pathlib import Path
        from score_requests import make_rule, request
        rule = make_rule("my_rules:misbehave", Path(sys.argv[1]), timeout_s=60)
        print(rule.pool._processes[0].child._process.pid, flush=True)
        rule.score([request("regex")])
    """)
    root = Path(__file__).parents[2]
    parent = subprocess.Popen(
        [sys.executable, "-c", script, str(base)], cwd=root, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": f"{root}:{Path(__file__).parent}"},
    )  # fmt: skip
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    family = [psutil.Process(child), *psutil.Process(child).children(recursive=True)]
    times = family[-1].cpu_times
    before = times().user
    wait_until(lambda: times().user > before + 0.1)  # the regular expression has begun
    parent.kill()
    parent.wait()
    parent.stdout.close()
    wait_until(lambda: not any(is_running(process.pid) for process in family))


def test_close_ends_what_the_rule_started(tmp_path: Path) -> None:
    (tmp_path / "starts.py").write_text(HOLD + STARTS)
    rule = make_rule("starts:score", tmp_path)
    assert rule.score([request("a")]) == [(Scored(value=1.0),)]
    assert is_held(tmp_path / "held")
    rule.close()
    wait_until(lambda: not is_held(tmp_path / "held"))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("my_rules:misbehav", "my_rules.py\\) has no function misbehav; did you mean misbehave?"),
        ("my_rule:misbehave", "did you mean my_rules?"),
        ("my_rules:constant_time", "cannot be called in style rayhf; expected completion, prompt"),
        ("my_rules:constant", "it is a int, not a function"),
        (
            "broken:f",
            "importing broken failed: ModuleNotFoundError: No module named 'not_installed",
        ),
        ("syntax:f", "importing syntax failed: .*SyntaxError"),
        ("leaves:f", "importing leaves failed: SystemExit"),
    ],
)
def test_wrong_function_is_refused_at_the_start(base: Path, function: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        Rule.check(RuleConfig(function=function), base)
    assert function in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("my_rules.misbehave", "is not of the form module:function; did you mean my_rules:misbeh"),
        ("my/rules.py:misbehave", "did you mean my.rules:misbehave?"),
        ("my_rules:", "is not of the form module:function"),
    ],
)
def test_malformed_function_is_refused_by_the_config(function: str, message: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(message)):
        RuleConfig(function=function)


def test_good_function_passes_the_check(base: Path) -> None:
    Rule.check(RuleConfig(function="my_rules:context"), base)
    Rule.check(RuleConfig(function="rayhf.scorer.rules:final_number"), base)


def test_base_must_be_a_directory(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a directory"):
        Rule.check(RuleConfig(function="my_rules:misbehave"), tmp_path / "absent")


def test_no_descriptor_is_left_behind(base: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for function in ("my_rules:context", "my_rules:absent"):
        for _ in range(3):
            try:
                Rule.check(RuleConfig(function=function), base)
            except ConfigError:
                continue
    assert len(os.listdir("/proc/self/fd")) == before


def test_prompt_whose_calls_hang_is_given_up_and_others_are_scored(base: Path) -> None:
    rule = make_rule("my_rules:misbehave", base, timeout_s=0.3)
    requests = [
        request("a", "b", prompt_id="before"),
        request(*["sleep"] * 8, prompt_id="hangs"),
        *(request("a", "b", prompt_id=f"after {number}") for number in range(4)),
    ]
    before, hanging, *after = rule.score(requests)
    rule.close()
    good = (Scored(value=0.5),) * 2
    assert [before, *after] == [good] * 5
    assert [outcome.reason for outcome in hanging if isinstance(outcome, Failed)] == [
        *["no response within 0.3 s"] * 3,
        *["skipped: 3 calls in a row of this prompt were lost: no response within 0.3 s"] * 5,
    ]


def test_prompt_with_responses_between_lost_calls_is_not_given_up(base: Path) -> None:
    rule = make_rule("my_rules:misbehave", base, timeout_s=0.3)
    [outcomes] = rule.score([request(*["sleep", "sleep", "a"] * 3)])
    rule.close()
    lost = Failed(reason="no response within 0.3 s")
    assert list(outcomes) == [lost, lost, Scored(value=0.5)] * 3


def test_rule_that_hangs_on_everything_is_aborted_early(base: Path) -> None:
    rule = make_rule("my_rules:misbehave", base, timeout_s=0.1)
    rows = rule.score([request(*["sleep"] * 50, prompt_id=str(n)) for n in range(20)])
    again = rule.score([request("fine")])
    rule.close()
    assert all(isinstance(outcome, Failed) for row in rows for outcome in row)
    last = rows[-1][-1]
    assert isinstance(last, Failed)
    assert last.reason == ("skipped: all calls of 4 prompts were lost: no response within 0.1 s")
    assert again == [(Scored(value=0.5),)]


def test_lost_calls_have_a_budget_of_time() -> None:
    losses = Losses(limit_s=10.0)
    for number in range(5):
        losses.add(str(number), "hung", 2.0)
        losses.answered({"another"})
    assert losses.skipping("other") == "skipped: lost calls took 10 s: hung"


def test_everything_timing_out_is_an_outage_and_a_few_are_not(base: Path) -> None:
    rule = make_rule("my_rules:misbehave", base)

    def transient(*rows: tuple[str, ...]) -> set[bool]:
        outcomes = rule.score([request(*row, prompt_id=str(n)) for n, row in enumerate(rows)])
        return {o.transient for row in outcomes for o in row if isinstance(o, Failed)}

    assert transient(*[("late", "late")] * 4) == {True}
    assert transient(*[("late", "late")] * 3, ("late", "a")) == {False}
    assert transient(("late",) * 8) == {False}
    rule.close()
