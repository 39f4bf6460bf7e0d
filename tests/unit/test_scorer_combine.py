"""The weighted sum, and what is refused before anything starts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from rayhf.config.schema import RewardModelScorer, RuleScorer
from rayhf.errors import ConfigError
from rayhf.experience import Completion, Failed, Invalid, Outcome, Prompt, Scored, ScoreRequest
from rayhf.scorer.build import build_scorer, check_entries
from rayhf.scorer.combine import Combined, Part
from rayhf.scorer.reward_model import pack


def request(text: str, answer: str) -> ScoreRequest:
    """Two completions: the text, and its last character."""
    prompt = Prompt(prompt_id="p", messages=({"role": "user", "content": "?"},), token_ids=(1,), answer=answer)
    return ScoreRequest(
        prompt=prompt,
        completions=tuple(
            Completion(
                prompt_id="p", index=index, seed=index, text=text, token_ids=(1,), logprobs=(0.0,),
                finish_reason="stop", policy_version=0,
            )
            for index, text in enumerate((text, text[-1]))
        ),
    )  # fmt: skip


class Fixed:
    """An engine that says what it was told."""

    def __init__(self, outcome: Outcome) -> None:
        self.outcome, self.closed = outcome, False

    def score(self, requests: Sequence[ScoreRequest]) -> list[tuple[Outcome, ...]]:
        return [(self.outcome,) * len(request.completions) for request in requests]

    def close(self) -> None:
        self.closed = True


def combined(first: Outcome, second: Outcome) -> Outcome:
    engine = Combined(
        [
            Part(name="a", weight=2.0, engine=Fixed(first)),
            Part(name="b", weight=-0.5, engine=Fixed(second)),
        ]
    )
    [(outcome, same)] = engine.score([request("text", "4")])
    assert outcome == same
    return outcome


def test_weighted_sum_with_its_parts() -> None:
    assert combined(Scored(value=3.0), Scored(value=4.0)) == Scored(value=4.0, parts={"a": 3.0, "b": 4.0})


@pytest.mark.parametrize(
    ("first", "second", "wanted"),
    [
        (Scored(value=1.0), Invalid(reason="nan"), Invalid(reason="b: nan")),
        (Failed(reason="died"), Scored(value=1.0), Failed(reason="a: died")),
        (Invalid(reason="nan"), Failed(reason="died"), Failed(reason="a: nan; b: died")),
        (Scored(value=1e308), Scored(value=0.0), Invalid(reason="the weighted sum is inf")),
    ],
)
def test_a_missing_part_is_never_zero(first: Outcome, second: Outcome, wanted: Outcome) -> None:
    assert combined(first, second) == wanted


def test_names_are_unique_and_everything_is_closed() -> None:
    fixed = Fixed(Scored(value=1.0))
    with pytest.raises(ConfigError, match="entries 0 and 1 are both named 'a'"):
        Combined([Part(name="a", weight=1.0, engine=fixed)] * 2)
    with pytest.raises(ConfigError, match="at least one"):
        Combined([])
    Combined([Part(name="a", weight=1.0, engine=fixed)]).close()
    assert fixed.closed


def test_rules_of_a_config_are_built_and_summed(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def length(completion, **context): return len(completion)\n")
    entries = [
        RuleScorer(function="mine:length", weight=0.5),
        RuleScorer(function="rayhf.scorer.rules:final_number", name="right"),
    ]
    check_entries(entries, tmp_path)
    engine = build_scorer(entries, device="cpu", threads=None, base=tmp_path)
    outcomes = engine.score([request("it is 4", "4")])
    engine.close()
    assert outcomes == [
        (
            Scored(value=4.5, parts={"length": 7.0, "right": 1.0}),
            Scored(value=1.5, parts={"length": 1.0, "right": 1.0}),
        )
    ]


def model_directory(directory: Path, **changes: object) -> Path:
    directory.mkdir()
    config = {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "LABEL_0"}} | changes
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": "x"}))
    return directory


def test_reward_model_files_are_checked_without_loading(tmp_path: Path) -> None:
    good = RewardModelScorer(model=model_directory(tmp_path / "good").relative_to(tmp_path))
    check_entries([good], tmp_path)
    with pytest.raises(ConfigError, match=r"scorer\.evaluate: entries 0 and 1 are both named 'reward_model'"):
        check_entries([good, good], tmp_path, where="scorer.evaluate")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "architectures is LlamaForCausalLM"),
        ({"architectures": None}, "architectures is none"),
        ({"id2label": {"0": "a", "1": "b"}}, "it has 2 outputs"),
    ],
)
def test_wrong_reward_model_is_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    entry = RewardModelScorer(model=model_directory(tmp_path / "model", **changes))
    with pytest.raises(ConfigError, match=rf"^scorer\.train\[0\]: reward model .*{message}"):
        check_entries([entry], tmp_path)


def test_missing_reward_model_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json"):
        check_entries([RewardModelScorer(model=Path("absent"))], tmp_path)
    model = model_directory(tmp_path / "model")
    (model / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="no chat template"):
        check_entries([RewardModelScorer(model=model)], tmp_path)
    (model / "tokenizer_config.json").unlink()
    with pytest.raises(ConfigError, match=r"no tokenizer_config\.json"):
        check_entries([RewardModelScorer(model=model)], tmp_path)


def test_names_fit_metrics(tmp_path: Path) -> None:
    entry = RuleScorer(function="rayhf.scorer.rules:exact_match", name="a/b c")
    with pytest.raises(ConfigError, match=r"scorer\.train\[0\]\.name is 'a/b c'"):
        check_entries([entry], tmp_path)


def test_pack_covers_every_row_once_within_the_budget() -> None:
    lengths = [5, 9, 1, 40, 5, 5, 2, 17]
    batches = list(pack(lengths, 20))
    assert sorted(index for batch in batches for index in batch) == list(range(8))
    assert [3] in batches  # longer than the budget: alone
    assert all(len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= 20 for batch in batches)
    assert batches == list(pack(list(lengths), 20))
