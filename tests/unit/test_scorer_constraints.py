"""Each constraint on texts that follow it and texts that break it."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayhf.errors import ConfigError
from rayhf.scorer.constraints import all_constraints, parse_constraints, share_of_constraints


def holds(answered: str, /, **spec: Any) -> bool:
    return bool(
        all_constraints(
            answered, prompt="", reference_answer=json.dumps([spec]), finish_reason="stop"
        )
    )


@pytest.mark.parametrize(
    ("kind", "text", "count"),
    [
        ("words", "", 0),
        ("words", "Don't count well-known words twice - ever.", 6),
        ("words", "eins, zwei; drei\nvier", 4),
        ("sentences", "", 0),
        ("sentences", "One. Two! Three?", 3),
        ("sentences", 'He said "no." And left... Pi is 3.14 here', 3),
        ("sentences", "...", 0),
        ("lines", "a\n\n b \n", 2),
        ("paragraphs", "a\nb\n\nc\n \t\n\nd\n", 3),
        ("characters", "  abc \n", 3),
        ("bullets", "- a\n* b\n  • c\n-d\n--\ntext - e", 3),
        ("numbered", "1. a\n2) b\n3.c\n 10. d", 3),
        ("placeholders", "[name] lives in [city], [] or [[x]", 3),
        ("capital_words", "The NASA and the ESA are not Nasa", 2),
    ],
)
def test_counts(kind: str, text: str, count: int) -> None:
    assert holds(text, kind=kind, exactly=count)
    assert not holds(text, kind=kind, exactly=count + 1)
    assert holds(text, kind=kind, min=count) and not holds(text, kind=kind, min=count + 1)
    assert holds(text, kind=kind, max=count) and (
        count == 0 or not holds(text, kind=kind, max=count - 1)
    )
    assert holds(text, kind=kind, min=max(0, count - 1), max=count + 1)


def test_keyword_and_letter() -> None:
    assert holds("Cat, cat and category", kind="keyword", word="cat", exactly=2)
    assert holds("a big big cat", kind="keyword", word="big cat", exactly=1)
    assert holds("c++ or C++", kind="keyword", word="c++", exactly=2)
    assert holds("Anna has a nap", kind="letter", letter="A", exactly=5)


@pytest.mark.parametrize(
    ("spec", "kept", "broken"),
    [
        ({"kind": "lowercase"}, "all of it 1!", "Not all"),
        ({"kind": "uppercase"}, "ALL OF IT 1!", "NOt"),
        ({"kind": "lowercase"}, "a", "123"),
        (
            {"kind": "include", "words": ["red", "blue sky"]},
            "Red! A blue sky.",
            "a redder blue sky",
        ),
        ({"kind": "avoid", "words": ["red", "blue"]}, "reddish", "so Blue"),
        ({"kind": "avoid_characters", "characters": ",;"}, "no comma.", "one, comma"),
        ({"kind": "starts_with", "text": "Dear"}, " dear me", "my dear"),
        ({"kind": "ends_with", "text": "the end."}, "It is The End.\n", "the end. not"),
        ({"kind": "choice", "options": ["yes", "no"]}, " yes\n", "yes!"),
        ({"kind": "json"}, '```json\n{"a": [1, 2]}\n```', "{'a': 1}"),
        ({"kind": "json"}, " [1]", "[NaN]"),
        ({"kind": "json"}, "3", "[" * 200_000),
        ({"kind": "quoted"}, '"so"', '"'),
        ({"kind": "title"}, "A <<Title>> here", "<< >< >>"),
    ],
)
def test_yes_or_no(spec: dict[str, Any], kept: str, broken: str) -> None:
    assert holds(kept, **spec)
    assert not holds(broken, **spec)


def test_share_and_all() -> None:
    answer = json.dumps(
        [
            {"kind": "lowercase"},
            {"kind": "words", "exactly": 2},
            {"kind": "include", "words": ["b"]},
        ]
    )
    for text, kept in (("a b", 3), ("A b", 2), ("A B C", 1), ("A", 0)):
        assert share_of_constraints(
            text, prompt="", reference_answer=answer, finish_reason="stop"
        ) == pytest.approx(kept / 3)
        assert all_constraints(
            text, prompt="", reference_answer=answer, finish_reason="stop"
        ) == float(kept == 3)


@given(
    st.text(max_size=60),
    st.permutations([{"kind": "lowercase"}, {"kind": "words", "max": 3}, {"kind": "quoted"}]),
)
def test_order_of_constraints_means_nothing(text: str, order: list[dict[str, Any]]) -> None:
    forwards, backwards = (
        share_of_constraints(
            text, prompt="", reference_answer=json.dumps(listed), finish_reason="stop"
        )
        for listed in (order, order[::-1])
    )
    assert forwards == backwards


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (None, "the prompt has no reference answer"),
        ("words", "is not JSON"),
        ("[]", "at least one constraint"),
        ('{"kind": "words", "min": 1}', "expected a JSON list"),
        ("[3]", r'constraints\[0\]: expected an object with a "kind"'),
        (
            '[{"kind": "lowercase"}, {"kind": "word", "min": 1}]',
            r"constraints\[1\]: unknown kind 'word'; did you mean words",
        ),
        ('[{"kind": "words", "minimum": 1}]', "words has no parameter 'minimum'; did you mean min"),
        ('[{"kind": "lowercase", "x": 1}]', "lowercase has no parameter 'x'; valid: none"),
        ('[{"kind": "words"}]', "words must have min, max or both, or exactly; got none of them"),
        ('[{"kind": "words", "exactly": 1, "min": 1}]', "got min, exactly"),
        ('[{"kind": "words", "min": 3, "max": 2}]', "min is 3, above max 2"),
        (
            '[{"kind": "words", "min": -1}]',
            "words.min must be a whole number of at least 0, got -1",
        ),
        ('[{"kind": "words", "min": 1.5}]', "got 1.5"),
        ('[{"kind": "words", "min": true}]', "got True"),
        ('[{"kind": "include"}]', "include.words must be a list of texts, got None"),
        ('[{"kind": "include", "words": "red"}]', "must be a list of texts, got 'red'"),
        ('[{"kind": "include", "words": []}]', "must be a list of texts"),
        ('[{"kind": "include", "words": [1]}]', "must be a list of texts"),
        ('[{"kind": "keyword", "word": " ", "min": 1}]', "keyword.word must be a text"),
        (
            '[{"kind": "letter", "letter": "ab", "min": 1}]',
            "letter.letter must be one letter, got 'ab'",
        ),
    ],
)
def test_malformed_constraints_are_named(answer: str | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        parse_constraints(answer)
    assert "\n" not in str(refused.value)


HOSTILE = [
    ".",
    ". ",
    '."',
    "-",
    "- ",
    "1. ",
    "[",
    "<<",
    "\n",
    " ",
    "\n \t",
    "a'",
    "a-",
    "{",
    '"',
    "```",
    "a",
]


@pytest.mark.parametrize("piece", HOSTILE)
def test_time_is_linear_in_the_length(piece: str) -> None:
    counted = [
        "words",
        "sentences",
        "lines",
        "paragraphs",
        "bullets",
        "numbered",
        "placeholders",
        "capital_words",
    ]
    answer = json.dumps(
        [{"kind": kind, "min": 0} for kind in counted]
        + [
            {"kind": "json"},
            {"kind": "quoted"},
            {"kind": "title"},
            {"kind": "avoid", "words": ["aaab"]},
        ]
        + [{"kind": "keyword", "word": "a-a", "min": 0}]
    )
    text = piece * (600_000 // len(piece)) + "x"
    start = time.process_time()
    share_of_constraints(text, prompt="", reference_answer=answer, finish_reason="stop")
    assert time.process_time() - start < 5.0
