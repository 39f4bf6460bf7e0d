"""Combined scorers against numbers by hand, and what is refused before anything starts."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from rayhf.config.scorers import (
    CombineConfig,
    LogSigmoid,
    PairwiseEntryConfig,
    PointwiseEntryConfig,
    ScorerConfig,
    ScorerEntryConfig,
)
from rayhf.errors import CheckpointError, ConfigError
from rayhf.scorer.build import build_scorer, check_entries, check_heldout
from rayhf.scorer.combine import Combined
from rayhf.scorer.judge_config import JudgeConfig
from rayhf.scorer.outcomes import EXPECTED
from rayhf.scorer.parts import Part
from rayhf.scorer.protocol import ScorerEngine, ScorerSetup
from rayhf.scorer.reward_model import RewardModelConfig
from rayhf.scorer.rule_config import PairwiseRuleConfig, RuleConfig
from rayhf.types import (
    Compared,
    Comparison,
    Completion,
    Failed,
    Invalid,
    Outcome,
    Prompt,
    Scored,
    ScoreRequest,
    Skipped,
    float_array,
    token_array,
)


def request(text: str, answer: str) -> ScoreRequest:
    """Two completions: the text, and its last character."""
    prompt = Prompt(
        prompt_id="p",
        messages=({"role": "user", "content": "?"},),
        token_ids=(1,),
        reference_answer=answer,
    )
    return ScoreRequest(
        prompt=prompt,
        completions=tuple(
            Completion(
                prompt_id="p", index=index, seed=index, text=text,
                token_ids=token_array((1,)), logprobs=float_array((0.0,)), finish_reason="stop",
                policy_version=0,
            )
            for index, text in enumerate((text, text[-1]))
        ),
    )  # fmt: skip


class Fixed:
    """A scorer that returns one outcome for everything."""

    def __init__(self, outcome: Outcome) -> None:
        self.outcome, self.closed = outcome, False

    def score(self, requests: Sequence[ScoreRequest]) -> list[tuple[Outcome, ...]]:
        return [(self.outcome,) * len(request.completions) for request in requests]

    def compare(self, requests: Sequence[ScoreRequest]) -> list[Comparison]:
        raise AssertionError("a pointwise part is compared by its scores")

    def close(self) -> None:
        self.closed = True


class Listed:
    """A scorer with a list of scores, one per completion, over all requests."""

    def __init__(self, *scores: float) -> None:
        self.scores = list(scores)

    def score(self, requests: Sequence[ScoreRequest]) -> list[tuple[Outcome, ...]]:
        return [
            tuple(Scored(value=self.scores.pop(0)) for _ in request.completions)
            for request in requests
        ]

    def compare(self, requests: Sequence[ScoreRequest]) -> list[Comparison]:
        raise AssertionError("a pointwise part is compared by its scores")

    def close(self) -> None: ...


class Pairwise:
    """A scorer with one response to every comparison."""

    def __init__(self, response: Comparison | list[list[float]]) -> None:
        self.response = (
            response
            if not isinstance(response, list)
            else Compared(win=np.array(response), source="pairwise")
        )

    def score(self, requests: Sequence[ScoreRequest]) -> list[tuple[Outcome, ...]]:
        return [(Scored(value=0.25), Scored(value=0.75)) for _ in requests]

    def compare(self, requests: Sequence[ScoreRequest]) -> list[Comparison]:
        return [self.response] * len(requests)

    def close(self) -> None: ...


def part(engine: ScorerEngine, name: str = "m", weight: float = 1.0, **settings: Any) -> Part:
    return Part(PointwiseEntryConfig(name=name, weight=weight, **settings), engine)


def pairwise_part(engine: ScorerEngine, name: str = "game", weight: float = 1.0) -> Part:
    return Part(PairwiseEntryConfig(name=name, weight=weight), engine)


def combined(first: Outcome, second: Outcome) -> Outcome:
    engine = Combined([part(Fixed(first), "a", 2.0), part(Fixed(second), "b", -0.5)])
    [(outcome, same)] = engine.score([request("text", "4")])
    assert outcome == same
    return outcome


def test_weighted_sum_with_its_parts() -> None:
    assert combined(Scored(value=3.0), Scored(value=4.0)) == Scored(
        value=4.0, parts={"a": 3.0, "b": 4.0}
    )


HUGE = Scored(value=1e308)
LARGE = Scored(value=-9e5)


@pytest.mark.parametrize(
    ("first", "second", "wanted"),
    [
        (Scored(value=1.0), Invalid(reason="nan"), Invalid(reason="b: nan")),
        (Failed(reason="died"), Scored(value=1.0), Failed(reason="a: died")),
        (Invalid(reason="nan"), Failed(reason="died"), Failed(reason="a: nan; b: died")),
        (HUGE, Scored(value=0.0), Invalid(reason=f"a: the score is 1e+308; {EXPECTED}")),
        (LARGE, LARGE, Invalid(reason=f"the weighted sum is -1.35e+06; {EXPECTED}")),
    ],
)
def test_missing_part_is_never_zero(first: Outcome, second: Outcome, wanted: Outcome) -> None:
    assert combined(first, second) == wanted


def values_of(rows: list[tuple[Outcome, ...]]) -> list[float]:
    assert all(isinstance(outcome, Scored) for row in rows for outcome in row), rows
    return [outcome.value for row in rows for outcome in row if isinstance(outcome, Scored)]


def ensemble(combine: dict[str, Any], *weights: float) -> list[float]:
    """Three scorers that give the first completion 1, 2, 6 and the second 3, 3, 3."""
    columns = ((1.0, 3.0), (2.0, 3.0), (6.0, 3.0))
    parts = [
        part(Listed(*column), f"m{i}", weight)
        for i, (weight, column) in enumerate(zip(weights, columns, strict=True))
    ]
    return values_of(Combined(parts, CombineConfig(**combine)).score([request("text", "4")]))


@pytest.mark.parametrize(
    ("combine", "weights", "wanted"),
    [
        ({}, (1, 1, 1), [9.0, 9.0]),
        ({"type": "weighted_sum"}, (1, -1, 0.5), [2.0, 1.5]),
        ({"type": "mean"}, (1, 1, 1), [3.0, 3.0]),
        ({"type": "mean"}, (2, 1, 1), [2.5, 3.0]),
        ({"type": "worst"}, (1, 1, 1), [1.0, 3.0]),
        # variance (4 + 1 + 9) / 3 around the mean 3
        ({"type": "uncertainty"}, (1, 1, 1), [3 - 0.1 * 14 / 3, 3.0]),
        ({"type": "uncertainty", "coef": 0.5}, (1, 1, 1), [3 - 0.5 * 14 / 3, 3.0]),
        ({"type": "uncertainty", "coef": 0.0}, (1, 1, 1), [3.0, 3.0]),
        # (2 * 1.5**2 + 0.5**2 + 3.5**2) / 4 around 2.5
        ({"type": "uncertainty", "coef": 1.0}, (2, 1, 1), [2.5 - 4.25, 3.0]),
    ],
)
def test_ensembles_examples(
    combine: dict[str, Any], weights: tuple[float, ...], wanted: list[float]
) -> None:
    assert ensemble(combine, *weights) == pytest.approx(wanted)


@given(
    st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=5),
    st.sampled_from(["weighted_sum", "mean", "worst", "uncertainty"]),
    st.randoms(),
)
def test_order_of_an_ensemble_does_not_matter(scores: list[float], kind: Any, random: Any) -> None:
    def total(listed: list[tuple[int, float]]) -> float:
        parts = [part(Listed(score, score), f"m{i}") for i, score in listed]
        return values_of(Combined(parts, CombineConfig(type=kind)).score([request("text", "4")]))[0]

    shuffled = list(enumerate(scores))
    random.shuffle(shuffled)
    assert total(shuffled) == pytest.approx(total(list(enumerate(scores))), abs=1e-6)


@pytest.mark.parametrize("score", [-800.0, -3.0, 0.0, 1.5, 4.0, 800.0])
def test_log_sigmoid_transform(score: float) -> None:
    engine = Combined([part(Listed(score, 1.5), weight=2.0, transform=LogSigmoid(reference=1.5))])
    [first, at_reference] = values_of(engine.score([request("text", "4")]))
    margin = score - 1.5
    wanted = -math.log(1 + math.exp(-margin)) if abs(margin) < 30 else min(margin, 0.0)
    assert first == pytest.approx(2 * wanted, abs=1e-12)
    assert at_reference == pytest.approx(2 * math.log(0.5))


def test_parts_are_raw_and_nested_ones_are_named_by_scorer() -> None:
    fixed = Fixed(Scored(value=2.0, parts={"votes": 5.0}))
    engine = Combined([part(fixed, "judge", transform=LogSigmoid(reference=2.0))])
    [(outcome, _)] = engine.score([request("text", "4")])
    assert outcome == Scored(
        value=pytest.approx(math.log(0.5)), parts={"judge": 2.0, "judge/votes": 5.0}
    )


def test_call_counts_before_it_is_normalized_and_resumes() -> None:
    def engine(*scores: float) -> Combined:
        return Combined([part(Listed(*scores), weight=3.0, normalize=True)])

    whole = engine(1.0, 3.0, 2.0, 6.0)
    requests = [request("text", "4")]
    first, second = values_of(whole.score(requests)), values_of(whole.score(requests))
    assert first == pytest.approx([-3.0, 3.0])  # mean 2, std 1
    seen = [1.0, 3.0, 2.0, 6.0]
    assert second == pytest.approx(
        [3 * (score - np.mean(seen)) / np.std(seen) for score in (2.0, 6.0)]
    )
    before, after = engine(1.0, 3.0), engine(2.0, 6.0)
    before.score(requests)
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert values_of(after.score(requests)) == second
    assert after.state_dict() == whole.state_dict()


def test_all_requests_of_a_call_are_normalized_together() -> None:
    """All completions of a call are on one scale."""
    together = Combined([part(Listed(1.0, 3.0, 2.0, 6.0), normalize=True)])
    rows = together.score([request("text", "4"), request("text", "4")])
    assert values_of(rows) == pytest.approx(
        [(score - 3) / math.sqrt(3.5) for score in (1.0, 3.0, 2.0, 6.0)]
    )


def test_transform_precedes_the_normalizer() -> None:
    class Half(Listed):
        def score(self, requests: Sequence[ScoreRequest]) -> list[tuple[Outcome, ...]]:
            return [(Scored(value=1.0), Invalid(reason="?"))]

    engine = Combined([part(Half(), transform=LogSigmoid(reference=1.0), normalize=True)])
    [(good, bad)] = engine.score([request("text", "4")])
    assert (good, bad) == (Scored(value=0.0, parts={"m": 1.0}), Invalid(reason="m: ?"))
    assert engine.state_dict() == {
        "normalizers": {"m": {"count": 1, "mean": math.log(0.5), "squares": 0.0}},
        "curricula": {},
    }


def test_state_of_other_scorers_is_refused() -> None:
    engine = Combined([part(Listed(), normalize=True)])
    with pytest.raises(
        CheckpointError, match=r"statistics of the scorers \['n'\], the config normalizes \['m'\]"
    ):
        engine.load_state_dict({"normalizers": {"n": {"count": 0, "mean": 0.0, "squares": 0.0}}})
    with pytest.raises(CheckpointError, match="statistics of the scorers none"):
        engine.load_state_dict({})
    Combined([part(Listed())]).load_state_dict({})


def test_comparison_is_the_sigmoid_of_combined_differences() -> None:
    engine = Combined([part(Listed(1.0, 0.0), "a", 2.0), part(Listed(0.5, 0.0), "b", -1.0)])
    [compared] = engine.compare([request("text", "4")])
    assert isinstance(compared, Compared) and compared.source == "pointwise"
    assert compared.win[0, 1] == pytest.approx(1 / (1 + math.exp(-1.5)))


def test_matrices_are_averaged_by_weight() -> None:
    parts = [
        pairwise_part(Pairwise([[0.5, 0.9], [0.1, 0.5]]), weight=3.0),
        part(Listed(0.0, 2.0), "model", transform=LogSigmoid(reference=1.0)),
    ]
    [compared] = Combined(parts).compare([request("text", "4")])
    assert isinstance(compared, Compared) and compared.source == "pairwise"
    # The difference of log sigmoid(-1) and log sigmoid(1).
    gap = math.log(1 / (1 + math.e)) - math.log(1 / (1 + math.exp(-1)))
    assert compared.win[0, 1] == pytest.approx((3 * 0.9 + 1 / (1 + math.exp(-gap))) / 4)
    assert (compared.win + compared.win.T == 1.0).all()


@pytest.mark.parametrize(
    ("response", "wanted"),
    [
        (Invalid(reason="no verdict"), Invalid(reason="game: no verdict")),
        (Failed(reason="died"), Failed(reason="game: died")),
        (
            [[0.5, 0.9]],
            Failed(reason="game: the scorer's matrix has shape (1, 2), expected (2, 2)"),
        ),
        (
            [[0.5, math.nan], [math.nan, 0.5]],
            Invalid(reason="game: the scorer compared no two completions"),
        ),
    ],
)
def test_part_without_a_matrix_is_never_one_half(response: Any, wanted: Comparison) -> None:
    parts = [pairwise_part(Pairwise(response)), part(Listed(0.0, 2.0), "model")]
    assert Combined(parts).compare([request("text", "4")]) == [wanted]


@pytest.mark.parametrize(
    ("rows", "wanted"),
    [
        ([(Scored(value=math.nan),) * 2], Invalid(reason=f"m: the score is nan; {EXPECTED}")),
        (
            [(Scored(value=1.0),)],
            Failed(reason="m: the scorer returned 1 scores for 2 completions"),
        ),
        ([], Failed(reason="m: the scorer returned 0 results for 1 requests")),
    ],
)
def test_scorer_with_a_wrong_result_is_failed(
    rows: list[tuple[Outcome, ...]], wanted: Outcome
) -> None:
    class Wrong(Listed):
        def score(self, requests: Sequence[ScoreRequest]) -> list[tuple[Outcome, ...]]:
            return rows

    engine = Combined([part(Wrong(), normalize=True)])
    assert engine.score([request("text", "4")]) == [(wanted, wanted)]
    assert engine.compare([request("text", "4")]) == [wanted]
    assert engine.state_dict()["normalizers"]["m"]["count"] == 0


@pytest.mark.parametrize(
    ("entries", "combine", "message"),
    [
        (
            [PairwiseRuleConfig(function="m:f")],
            {"type": "worst"},
            "combine.type worst is for scores",
        ),
        (
            [PairwiseRuleConfig(function="m:f", weight=-1.0)],
            {},
            "weights are -1; with a pairwise scorer they are shares",
        ),
        ([RuleConfig(function="m:f", weight=2.0)], {"type": "worst"}, "expected no weights, got 2"),
        (
            [RuleConfig(function="m:f", weight=0.0)],
            {"type": "mean"},
            "weights are 0; with combine.type mean they are shares",
        ),
    ],
)
def test_invalid_weights_are_refused(
    entries: list[ScorerEntryConfig], combine: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        ScorerConfig(train=tuple(entries), combine=CombineConfig(**combine))


def test_scorers_unfit_for_held_out_completions_are_refused() -> None:
    fine = RuleConfig(function="m:f", transform=LogSigmoid(reference=0.5))
    check_heldout([fine, JudgeConfig(model=Path("j"))], where="scorer.evaluate")
    with pytest.raises(
        ConfigError,
        match=r"^scorer\.train\[1\]: judge compares completions, and a held-out prompt",
    ):
        check_heldout([fine, JudgeConfig(model=Path("j"), mode="pairwise")], where="scorer.train")
    with pytest.raises(
        ConfigError, match=r"^scorer\.train\[0\]: f is normalized by earlier scores"
    ):
        check_heldout([RuleConfig(function="m:f", normalize=True)], where="scorer.train")


def test_names_are_unique() -> None:
    rule = RuleConfig(function="m:f", name="a")
    with pytest.raises(ValidationError, match="entries 0 and 1 are both named 'a'"):
        ScorerConfig(train=(rule, rule))
    with pytest.raises(ValidationError, match="entries 0 and 1 are both named 'reward_model'"):
        ScorerConfig(train=(rule,), evaluate=(RewardModelConfig(model=Path("m")),) * 2)
    with pytest.raises(ValidationError, match="at least 1 item"):
        ScorerConfig(train=())


def test_every_part_is_closed() -> None:
    fixed = Fixed(Scored(value=1.0))
    Combined([part(fixed)]).close()
    assert fixed.closed


def test_rules_of_a_config_are_built_and_summed(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def length(completion, **context): return len(completion)\n")
    entries = [
        RuleConfig(function="mine:length", weight=0.5),
        RuleConfig(function="rayhf.scorer.rules:final_number", name="right"),
    ]
    check_entries(entries, tmp_path)
    engine = build_scorer(entries, ScorerSetup(base=tmp_path))
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
    config = {
        "architectures": ["LlamaForSequenceClassification"],
        "id2label": {"0": "LABEL_0"},
    } | changes
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": "x"}))
    return directory


def test_reward_model_files_are_checked_without_loading(tmp_path: Path) -> None:
    good = RewardModelConfig(model=model_directory(tmp_path / "good").relative_to(tmp_path))
    check_entries([good], tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "architectures is LlamaForCausalLM"),
        ({"architectures": None}, "architectures is none"),
        ({"id2label": {"0": "a", "1": "b"}}, "it has 2 outputs"),
    ],
)
def test_wrong_reward_model_is_refused(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    entry = RewardModelConfig(model=model_directory(tmp_path / "model", **changes))
    with pytest.raises(ConfigError, match=rf"^scorer\.train\[0\]: reward model .*{message}"):
        check_entries([entry], tmp_path)


def test_missing_reward_model_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json"):
        check_entries([RewardModelConfig(model=Path("absent"))], tmp_path)
    model = model_directory(tmp_path / "model")
    (model / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="no chat template"):
        check_entries([RewardModelConfig(model=model)], tmp_path)
    (model / "tokenizer_config.json").unlink()
    with pytest.raises(ConfigError, match=r"no tokenizer_config\.json"):
        check_entries([RewardModelConfig(model=model)], tmp_path)


def test_part_that_skips_or_is_not_named_is_left_out() -> None:
    two = Scored(value=2.0)
    skipped = Skipped(reason="None")
    other = part(Fixed(Scored(value=3.0)), "b", 0.5)

    def score(first: Outcome, scorers: tuple[str, ...] | None, kind: str) -> Outcome:
        engine = Combined([part(Fixed(first), "a"), other], CombineConfig(type=kind))
        made = request("text", "4")
        [outcomes] = engine.score([replace(made, prompt=replace(made.prompt, scorers=scorers))])
        return outcomes[0]

    for kind, alone, both in (("weighted_sum", 1.5, 3.5), ("mean", 3.0, 3.5 / 1.5)):
        assert score(skipped, None, kind) == Scored(value=alone, parts={"b": 3.0})
        assert score(two, ("b",), kind) == Scored(value=alone, parts={"b": 3.0})
        assert score(two, ("b", "a"), kind) == Scored(
            value=pytest.approx(both), parts={"a": 2.0, "b": 3.0}
        )
    assert score(Failed(reason="?"), ("b",), "mean") == Scored(value=3.0, parts={"b": 3.0})
    assert score(two, ("c",), "mean") == Invalid(
        reason="no scorer judges it: its prompt names c, not a, b"
    )
    assert isinstance(score(skipped, ("a",), "mean"), Skipped)


def test_pairwise_part_that_is_not_named_is_left_out() -> None:
    game = pairwise_part(Pairwise([[0.5, 0.9], [0.1, 0.5]]))
    engine = Combined([game, part(Listed(0.0, 2.0), "model")])
    made = request("text", "4")
    [compared] = engine.compare([replace(made, prompt=replace(made.prompt, scorers=("model",)))])
    assert isinstance(compared, Compared)
    assert compared.win[0, 1] == pytest.approx(1 / (1 + math.exp(2.0)))


def test_parts_run_side_by_side_where_they_may() -> None:
    """Each waits for the other; a third one, which is not concurrent, has one caller at a time."""
    both = threading.Barrier(2)

    class Meets(Fixed):
        def score(self, requests: Sequence[ScoreRequest]) -> list[tuple[Outcome, ...]]:
            both.wait(timeout=10)
            return super().score(requests)

    class Concurrent(PointwiseEntryConfig):
        @property
        def is_concurrent(self) -> bool:
            return True

    class Alone(Fixed):
        inside = 0

        def score(self, requests: Sequence[ScoreRequest]) -> list[tuple[Outcome, ...]]:
            self.inside += 1
            time.sleep(0.02)
            assert self.inside == 1
            self.inside -= 1
            return super().score(requests)

    one = Scored(value=1.0)
    engine = Combined(
        [
            Part(Concurrent(name="a"), Meets(one)),
            Part(Concurrent(name="b"), Meets(one)),
            part(Alone(one), "c"),
        ]
    )
    with ThreadPoolExecutor(4) as pool:
        rows = list(pool.map(engine.score, [[request("text", "4")]] * 4))
    assert all(values_of(row) == [3.0, 3.0] for row in rows)


def test_names_fit_metrics() -> None:
    with pytest.raises(ValidationError, match="at most 64 letters, digits"):
        RuleConfig(function="rayhf.scorer.rules:exact_match", name="a/b c")
    with pytest.raises(ValidationError, match="entry 0 is named 'größe'; letters, digits"):
        ScorerConfig(train=(RuleConfig(function="mine:größe"),))
