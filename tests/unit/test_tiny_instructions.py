"""The instructions task: its rules on hand-made responses, its demonstrations against its rules.

Nothing is trained.
"""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
from collections import Counter
from functools import partial

import jinja2
import pytest

from rayhf.errors import ConfigError
from rayhf.tiny import instructions
from rayhf.tiny.instructions import Instruction, check, compose, judgement, parse

ASKED = list(itertools.islice(instructions.instructions(0), 3000))
FULL = "Write 4 animals, owl first, cow last, cat somewhere, dog nowhere, ! ends"
SHORT = "Write 3 animals, owl first, cat nowhere, ! ends"


def satisfied(completion: str, prompt: str = SHORT, finish_reason: str = "stop") -> float:
    return instructions.satisfied(
        completion, prompt=prompt, reference_answer=None, finish_reason=finish_reason
    )


@pytest.mark.parametrize(
    ("completion", "broken"),
    [
        ("owl cat fox cow !", ""),
        ("owl fox cat cow !", ""),
        ("owl cat cow !", "count"),
        ("owl cat fox hen cow !", "count"),
        ("fox cat owl cow !", "first"),
        ("owl cat cow fox !", "last"),
        ("owl hen fox cow !", "with"),
        ("owl cat dog cow !", "without"),
        ("owl cat fox cow", "mark"),
        ("owl cat fox cow ?", "mark"),
        ("owl cat tree fox cow !", "count"),
        ("owl catfox hen fox cow !", "count with"),
        ("owl, cat, fox, cow !", "count first with"),
        ("owl cat  fox cow !", "count"),
        ("owl cat fox cow ! !", "count"),
        ("owl cat fox cow!", "count last mark"),
        ("owl cat fox cow !\n", "count mark"),
        ("owl cat fox\ncow !", "count last"),
        ("Owl cat fox cow !", "count first"),
        ("cow dog", "count first last with without mark"),
        ("!", "count first last with"),
        ("", "count first last with mark"),
    ],
)
def test_each_constraint_is_checked_on_its_own(completion: str, broken: str) -> None:
    assert [one.kind for one in check(parse(FULL), completion) if not one.holds] == broken.split()
    assert satisfied(completion, FULL) == float(not broken)
    assert instructions.judge_truth(parse(FULL), completion) == ("no" if broken else "yes")


def test_rest_of_a_response_is_free() -> None:
    assert satisfied("owl fox dog", "Write 3 animals") == 1.0
    assert satisfied("owl fox owl ?", "Write 3 animals") == 1.0


def test_truncated_response_scores_zero() -> None:
    assert satisfied("owl fox dog !") == 1.0
    assert satisfied("owl fox dog !", finish_reason="length") == 0.0


def test_judgement_states_what_holds_and_slips_as_requested() -> None:
    one = parse(SHORT)
    notes = "> owl first cat nowhere dog\n3 animals ok\nfirst ok\nnowhere no\nends no\nVerdict: no"
    assert judgement(one, "owl cat dog") == notes
    assert (
        judgement(one, "fox dog !")
        == "> fox dog ! ends\n2 animals no\nfirst no\nnowhere ok\nends ok\nVerdict: no"
    )
    assert judgement(one, "owl fox dog !").endswith("ok\nVerdict: yes")
    wrong = "> owl first fox dog ! ends\n3 animals ok\nfirst no\nnowhere ok\nends ok\nVerdict: no"
    assert judgement(one, "owl fox dog !", {"first"}) == wrong
    assert judgement(one, "owl cat dog", {"without", "mark"}).endswith(
        "first ok\nnowhere ok\nends ok\nVerdict: yes"
    )


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "3 animals",
        "Write 2 animals",
        "Write owl first",
        "Write 3 animals.",
        "Write 3 animals, ! ends, owl first",
        "Write 3 animals, owl first, fox first",
        "Write 3 animals, oak first",
        "Write 3 animals, ",
        "Judge: Write 3 animals",
    ],
)
def test_prompt_that_is_no_instruction_is_refused(prompt: str) -> None:
    with pytest.raises(ConfigError, match="is no instruction, expected one like"):
        satisfied("owl fox dog", prompt)


def test_instructions_differ_and_can_be_parsed() -> None:
    assert len({one.prompt for one in ASKED}) == len(ASKED)
    for one in ASKED:
        assert parse(one.prompt) == one
        assert 2 <= len(one.constraints) <= 4
        animals = [value for _, value in one.constraints if value in instructions.ANIMALS]
        assert len(set(animals)) == len(animals)
    assert {kind for one in ASKED for kind in one.kinds} == {
        "count",
        "first",
        "last",
        "with",
        "without",
        "mark",
    }


def test_everything_follows_from_the_seed() -> None:
    assert list(itertools.islice(instructions.instructions(0), 50)) == ASKED[:50]
    assert list(itertools.islice(instructions.instructions(1), 50)) != ASKED[:50]
    demonstrate = partial(instructions.demonstrations, ASKED[:50], slipping=True)
    assert demonstrate(0) == demonstrate(0) != demonstrate(1)
    judge = partial(instructions.judgement_rows, ASKED[:50])
    assert judge(0) == judge(0) != judge(1)


def test_response_breaks_exactly_the_requested_constraints() -> None:
    rng = random.Random(0)
    for one in [*ASKED[:1000], parse(FULL)]:
        for size in range(len(one.kinds) + 1):
            slips = set(rng.sample(one.kinds, size))
            draft = compose(one, set(rng.sample(one.kinds, 1)), rng) if rng.random() < 0.5 else ""
            response = compose(one, slips, rng, draft=draft)
            assert {found.kind for found in check(one, response) if not found.holds} == slips, (
                one,
                slips,
                response,
            )
            words = response.split(" ")
            assert len(set(words)) == len(words)


def test_refinement_keeps_the_valid_animals() -> None:
    rng = random.Random(0)
    one = parse(SHORT)
    assert compose(one, set(), rng, draft="owl hen yak") == "owl hen yak !"
    assert compose(one, set(), rng, draft="hen yak ?") == "owl hen yak !"
    assert compose(one, set(), rng, draft="owl elk fox yak !") == "owl elk fox !"
    repaired = compose(one, set(), rng, draft="owl cat tree hen !")
    assert repaired.startswith("owl hen ")
    assert satisfied(repaired) == 1.0
    assert compose(
        parse("Write 4 animals, fox somewhere"), set(), rng, draft="yak fox hen"
    ).startswith("yak fox hen ")


def test_demonstrations_have_their_rates_of_slips() -> None:
    rows = instructions.demonstrations(ASKED, 0, slipping=True)
    assert [prompt for prompt, _ in rows["act"]] == [one.prompt for one in ASKED]
    kinds = sum(len(one.kinds) for one in ASKED)
    for skill, rate in (("act", instructions.ACT_SLIP), ("refine", instructions.REFINE_SLIP)):
        broken = sum(
            not held.holds
            for one, (_, text) in zip(ASKED, rows[skill], strict=True)
            for held in check(one, text)
        )
        assert broken / kinds == pytest.approx(rate, abs=0.015)
    flips = 0
    for one, (prompt, judged) in zip(ASKED, rows["judge"], strict=True):
        true = judgement(one, prompt.rpartition("\n> ")[2]).split("\n")
        *lines, verdict = judged.split("\n")
        flips += sum(line != other for line, other in zip(lines, true, strict=False))
        assert lines[0] == true[0]
        assert verdict == (
            "Verdict: no" if any(line.endswith(" no") for line in lines[1:]) else "Verdict: yes"
        )
    assert flips / kinds == pytest.approx(instructions.JUDGE_SLIP, abs=0.015)


def test_clean_demonstrations_are_correct() -> None:
    rows = instructions.demonstrations(ASKED[:500], 0, slipping=False)
    for one, acted, refined in zip(ASKED[:500], rows["act"], rows["refine"], strict=True):
        assert satisfied(acted[1], one.prompt) == satisfied(refined[1], one.prompt) == 1.0
        failed = refined[0].split("\n")[1].removeprefix("> ")
        assert refined[0] == instructions.refine_prompt(one, failed, judgement(one, failed))
        assert instructions.judge_truth(one, failed) == "no"
    verdicts: Counter[str] = Counter()
    for one, (prompt, judged) in zip(ASKED[:500], rows["judge"], strict=True):
        assert judged == judgement(one, prompt.rpartition("\n> ")[2])
        verdicts[judged.rpartition(" ")[2]] += 1
    assert min(verdicts.values()) > 75


def test_prompts_are_the_templates_rendered() -> None:
    one = parse(SHORT)
    response = "owl & <dog> !"
    judged = "3 animals ok\nVerdict: no"
    judge = jinja2.Template(instructions.JUDGE_TEMPLATE).render(
        instruction=one.prompt, response=response
    )
    assert instructions.judge_prompt(one, response) == judge == f"Judge: {SHORT}\n> {response}"
    refine = jinja2.Template(instructions.REFINE_TEMPLATE).render(
        instruction=one.prompt, response=response, judgement=judged
    )
    assert (
        instructions.refine_prompt(one, response, judged)
        == refine
        == f"Refine: {SHORT}\n> {response}\n{judged}"
    )


def test_judgement_rows_are_balanced_and_true() -> None:
    rows = instructions.judgement_rows(ASKED[:200], 0)
    assert Counter(row["answer"] for row in rows) == {"yes": 100, "no": 100}
    for one, row in zip(ASKED, rows, strict=False):
        response = row["prompt"].removeprefix(f"Judge: {one.prompt}\n> ")
        judged = judgement(one, response)
        assert (
            instructions.verdict_correct(
                judged, prompt=row["prompt"], reference_answer=row["answer"], finish_reason="stop"
            )
            == 1.0
        )


@pytest.mark.parametrize(
    ("completion", "finish_reason", "verdict"),
    [
        ("3 animals ok\nVerdict: yes", "stop", "yes"),
        ("Verdict: no", "stop", "no"),
        ("Verdict: no\nfirst owl ok\nVerdict: yes", "stop", "yes"),
        ("Verdict: yes", "length", None),
        ("Verdict: yes\nfirst owl ok", "stop", None),
        ("Verdict: maybe", "stop", None),
        ("verdict: yes", "stop", None),
        ("", "stop", None),
    ],
)
def test_verdict_is_the_last_line(completion: str, finish_reason: str, verdict: str | None) -> None:
    assert instructions.verdict_of(completion, finish_reason) == verdict
    for answer in ("yes", "no"):
        right = instructions.verdict_correct(
            completion, prompt="p", reference_answer=answer, finish_reason=finish_reason
        )
        assert right == float(verdict == answer)


@pytest.mark.parametrize("answer", [None, "", "Yes"])
def test_judgement_without_a_true_verdict_is_refused(answer: str | None) -> None:
    with pytest.raises(ConfigError, match="answer is yes or no"):
        instructions.verdict_correct(
            "Verdict: yes", prompt="p", reference_answer=answer, finish_reason="stop"
        )


def test_rule_module_imports_no_torch() -> None:
    code = (
        "import sys, rayhf.tiny.instructions; "
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_instruction_is_what_its_prompt_says() -> None:
    constraints = (("count", "3"), ("first", "owl"), ("without", "cat"), ("mark", "!"))
    assert Instruction(constraints).prompt == SHORT
    assert parse(SHORT) == Instruction(constraints)
