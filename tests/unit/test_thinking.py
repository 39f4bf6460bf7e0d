"""Thinking models: the split of a completion, what scorers read, metrics, journal and tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from campaigns import make_config
from chat_tokenizer import make_tokenizer
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from rayhf.config.schema import RolloutConfig, ThinkingConfig
from rayhf.config.scorers import PointwiseEntryConfig
from rayhf.data.thinking import ThinkingParser, thinking_metrics
from rayhf.errors import ConfigError
from rayhf.exploration.codecs import GENERATE, SCORE
from rayhf.exploration.journal import Journal
from rayhf.planning.preflight import check_settings
from rayhf.run_dir.tables import sample_table
from rayhf.scorer.combine import Combined
from rayhf.scorer.parts import Part
from rayhf.types import (
    Completion,
    GenerateRequest,
    Group,
    Outcome,
    Prompt,
    Sample,
    Sampling,
    Scored,
    ScoreRequest,
    float_array,
    token_array,
)

END = 1
"""The token that ends a turn."""


def make(spelled: str) -> PreTrainedTokenizerBase:
    """A tokenizer to which the markers are several tokens, one token, or a special one."""
    tokenizer = make_tokenizer()
    if spelled != "several":
        markers = [AddedToken(m, special=spelled == "special") for m in ("<think>", "</think>")]
        tokenizer.add_tokens(markers, special_tokens=spelled == "special")
    return tokenizer


@pytest.fixture(params=["several", "one", "special"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    return make(request.param)


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def completion(
    token_ids: Sequence[int], text: str, reason: Any = "stop", **more: Any
) -> Completion:
    return Completion(
        prompt_id="p",
        index=0,
        seed=1,
        text=text,
        token_ids=token_array(token_ids),
        logprobs=float_array(-0.5 - i for i in range(len(token_ids))),
        finish_reason=reason,
        policy_version=0,
        **more,
    )


def split(
    tokenizer: PreTrainedTokenizerBase, text: str, *, opened: bool, ended: bool = True
) -> Completion:
    token_ids = encode(tokenizer, text) + ((END,) if ended else ())
    plain = str(tokenizer.decode(list(token_ids), skip_special_tokens=True))
    before = completion(token_ids, plain)
    after = ThinkingParser(ThinkingConfig(), tokenizer).split(before, opened=opened)
    assert (after.token_ids, after.logprobs) == (before.token_ids, before.logprobs)
    return after


@pytest.mark.parametrize("written", ["", "<think>\n"])
def test_text_is_the_answer(tokenizer: PreTrainedTokenizerBase, written: str) -> None:
    """Whether the template or the model opened the thinking."""
    head = written + "two and two, é\n</think>"
    result = split(tokenizer, head + "\n\nIt is 4", opened=not written)
    assert result.text == "It is 4" and result.finish_reason == "stop"
    assert result.thinking == head + "\n\n"
    assert result.thinking_tokens == len(encode(tokenizer, head))


def test_first_end_marker_counts(tokenizer: PreTrainedTokenizerBase) -> None:
    result = split(tokenizer, "a</think>b</think>c", opened=True)
    assert (result.thinking or "") + result.text == "a</think>b" + (
        "</think>c" if "</think>" in result.text else "c"
    )
    assert result.text.startswith("b")


@pytest.mark.parametrize(("text", "opened"), [("still thinking", True), ("<think>still", False)])
def test_unfinished_thinking_is_truncated_without_an_answer(
    tokenizer: PreTrainedTokenizerBase, text: str, opened: bool
) -> None:
    result = split(tokenizer, text, opened=opened)
    assert result.text == "" and result.finish_reason == "length"
    assert result.thinking_tokens == len(result.token_ids) and "still" in (result.thinking or "")


def test_completion_without_thinking_is_unchanged(tokenizer: PreTrainedTokenizerBase) -> None:
    result = split(tokenizer, "It is 4", opened=False)
    assert (result.text, result.thinking, result.thinking_tokens) == ("It is 4", None, 0)
    assert result.finish_reason == "stop"


def test_prompt_opens_the_thinking_at_its_end_only(tokenizer: PreTrainedTokenizerBase) -> None:
    parser = ThinkingParser(ThinkingConfig(), tokenizer)
    prompts = {
        "<|user|>hi<|end|><|assistant|><think>\n": True,
        "<|user|>hi<|end|><|assistant|><think>\n\n</think>\n\n": False,
        "<|user|>what is <think><|end|><|assistant|>": False,
        "<|user|>hi<|end|><|assistant|>": False,
    }
    assert {text: parser.opened_by(encode(tokenizer, text)) for text in prompts} == prompts


def test_other_markers() -> None:
    tokenizer = make("several")
    parser = ThinkingParser(ThinkingConfig(start="[r]", end="[/r]"), tokenizer)
    token_ids = encode(tokenizer, "[r]why[/r]so")
    result = parser.split(completion(token_ids, "[r]why[/r]so"), opened=False)
    assert (result.text, result.thinking) == ("so", "[r]why[/r]")


# ------------------------------------------------------------------------------------- users

THOUGHT = completion((5, 6, 7, END), "4", thinking="2+2</think>", thinking_tokens=2)
UNFINISHED = completion((5, 6), "", "length", thinking="so", thinking_tokens=2)


class Reader:
    """A scorer that keeps what it reads."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def score(self, requests: Sequence[ScoreRequest]) -> list[tuple[Outcome, ...]]:
        self.texts += [c.text for request in requests for c in request.completions]
        return [tuple(Scored(value=1.0) for _ in request.completions) for request in requests]

    def compare(self, requests: Sequence[ScoreRequest]) -> Any: ...

    def close(self) -> None: ...


def score_request() -> ScoreRequest:
    prompt = Prompt(prompt_id="p", messages=(), token_ids=(1,))
    return ScoreRequest(prompt=prompt, completions=(THOUGHT, UNFINISHED))


def test_scorer_reads_the_answer_or_the_whole_text() -> None:
    final, whole = Reader(), Reader()
    entries = [PointwiseEntryConfig(type="a"), PointwiseEntryConfig(type="b", text="whole")]
    parts = [Part(entry, engine) for entry, engine in zip(entries, (final, whole), strict=True)]
    Combined(parts).score([score_request()])
    assert final.texts == ["4", ""] and whole.texts == ["2+2</think>4", "so"]


def test_metrics() -> None:
    plain = completion((5, END), "4")
    assert thinking_metrics([plain, plain]) == {}
    assert thinking_metrics([THOUGHT, UNFINISHED]) == {
        "thinking_tokens": 2.0,
        "answer_tokens": 1.0,
        "thinking_unfinished": 0.5,
    }


def test_journal_and_tables_keep_it(tmp_path: Any) -> None:
    journal = Journal(tmp_path / "j")
    request = GenerateRequest(
        prompt_id="p", number=0, token_ids=(1,), sampling=Sampling(max_tokens=4), seeds=(1,)
    )
    journal.add(GENERATE, [request], [(THOUGHT,)])
    journal.add(SCORE, [score_request()], [(Scored(value=1.0), Scored(value=0.0))])
    journal.close()
    again = Journal(tmp_path / "j")
    assert again.recall(GENERATE, request) == (THOUGHT,)
    other = completion((5, 6), "", "length", thinking="no", thinking_tokens=2)
    prompt = score_request().prompt
    changed = ScoreRequest(prompt=prompt, completions=(THOUGHT, other))
    assert again.recall(SCORE, changed) is None
    assert again.recall(SCORE, score_request()) is not None
    again.close()
    samples = tuple(Sample(completion=c, outcome=None) for c in (THOUGHT, UNFINISHED))
    table = sample_table(1, [Group(prompt=prompt, samples=samples)])
    assert table["thinking"].to_pylist() == ["2+2</think>", "so"]
    assert table["thinking_tokens"].to_pylist() == [2, 2]


@pytest.mark.parametrize("algorithm", ["mcts_dpo", "spar"])
def test_algorithms_that_do_not_take_it(tmp_path: Any, algorithm: str) -> None:
    config = make_config(
        tmp_path, algorithm={"type": algorithm}, rollout={"thinking": {"end": "</t>"}}
    )
    with pytest.raises(ConfigError, match=rf"^rollout\.thinking: {algorithm} does not take"):
        check_settings(config)


def test_empty_strings_are_refused() -> None:
    for settings in ({"stop": [""]}, {"thinking": {"end": ""}}):
        with pytest.raises(ValueError, match="at least 1 character"):
            RolloutConfig.model_validate(settings)
