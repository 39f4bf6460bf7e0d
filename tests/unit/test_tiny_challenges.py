"""The tiny task whose questions are generated: its rule and its demonstrations."""

from __future__ import annotations

from itertools import islice

import pytest

from rayhf.tiny import challenges
from rayhf.tiny.arithmetic import Chain


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("What is 3+8-5?", (3, 8, -5)),
        ("What is 1-9?", (1, -9)),
        ("What is 3?", None),
        ("What is 0+3?", None),
        ("What is 3+12?", None),
        ("What is 3+8-5? ", None),
        ("Ask about 3+8", None),
    ],
)
def test_a_question_is_recognized(text: str, terms: tuple[int, ...] | None) -> None:
    assert challenges.parse(text) == (None if terms is None else Chain(terms))


def test_answers_are_verified_and_other_texts_skipped() -> None:
    prompts = ["What is 3+8?", "What is 3+8?", "What is 3+8?", "What is love?"]
    completions = ["3+8=11\nAnswer: 11", "3+8=12\nAnswer: 12", "11", "Answer: 1"]
    assert challenges.verified(prompts, completions) == [1.0, 0.0, 0.0, None]


def test_demonstrations_are_questions_on_their_topic_and_worked_answers() -> None:
    for prompt, question in challenges.ask_demonstrations(0, 300):
        assert question.startswith("What is " + prompt.removeprefix("Ask about "))
        chain = challenges.parse(question)
        assert chain is not None and len(chain.terms) <= challenges.MOST_STEPS + 1
    heldout = list(islice(challenges.heldout_chains(0), 100))
    solved = challenges.solve_demonstrations(0, 300, rate=0.0, without=heldout)
    questions, answers = zip(*solved, strict=True)
    assert challenges.verified(questions, answers) == [1.0] * 300
    assert not set(questions) & {chain.prompt for chain in heldout}
    assert solved == challenges.solve_demonstrations(0, 300, rate=0.0, without=heldout)


def test_topics_are_different_and_never_negative() -> None:
    prompts = [challenges.topic_prompt(topic) for topic in challenges.topics()]
    assert len(set(prompts)) == len(prompts) == 126
    assert all(sum(topic) >= 0 for topic in challenges.topics())
