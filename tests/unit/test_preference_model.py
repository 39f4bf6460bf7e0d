"""Preference models: arithmetic, fences, and tiny classifiers with random weights of both kinds."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from transformers import AutoTokenizer, LlamaForSequenceClassification, PreTrainedTokenizerFast

from rayhf.config.fit import FitConfig
from rayhf.errors import ConfigError, NumericalError
from rayhf.scorer.fit import calibration_error, mark, measure, pad_id, win_probability
from rayhf.scorer.preference_model import (
    END,
    FIRST,
    SECOND,
    PreferenceModel,
    PreferenceModelConfig,
    Reader,
    order_averaged,
    sigmoid,
    skew_symmetric,
)
from rayhf.scorer.protocol import ScorerSetup
from rayhf.scorer.reward_model import RewardModel, RewardModelConfig
from rayhf.tiny.language_model import ModelSize
from rayhf.tiny.tokenizer import POLICY_FORMAT, train_tokenizer
from rayhf.types import (
    Compared,
    Completion,
    Failed,
    Invalid,
    Message,
    Prompt,
    Scored,
    ScoreRequest,
    float_array,
    token_array,
)

KINDS = {
    "pairwise": {"type": "pairwise"},
    "general_preference": {"type": "general_preference", "blocks": 2, "temperature": 0.5},
}


def win(x: float) -> float:
    return math.exp(x) / (1.0 + math.exp(x))


# ------------------------------------------------------------------------------- verdict arithmetic

logits = hnp.arrays(
    np.float64, st.integers(0, 5).map(lambda k: (k, k)), elements=st.floats(-800, 800)
)
embeddings = hnp.arrays(
    np.float64, st.integers(0, 5).map(lambda k: (k, 4)), elements=st.floats(-30, 30)
)


def test_order_averaged_by_hand() -> None:
    logit = np.array([[0.0, 1.0, -2.0], [0.5, 0.0, 3.0], [0.2, -1.0, 0.0]])
    found = order_averaged(logit)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert found[i, j] == pytest.approx((win(logit[i, j]) + 1 - win(logit[j, i])) / 2)


def test_skew_symmetric_by_hand() -> None:
    found = skew_symmetric(np.array([[1.0, 2.0], [3.0, 5.0]]), 2.0)
    assert found[0, 1] == pytest.approx(win((2 * 3 - 1 * 5) / 2))


@settings(deadline=None)
@given(logits)
def test_order_averaged_chances_add_up(logit: np.ndarray[Any, Any]) -> None:
    found = order_averaged(logit)
    assert (
        (found + found.T == 1.0).all()
        and (np.diag(found) == 0.5).all()
        and ((found >= 0) & (found <= 1)).all()
    )


@settings(deadline=None)
@given(embeddings, st.floats(0.05, 3))
def test_skew_symmetric_chances_add_up(embedding: np.ndarray[Any, Any], temperature: float) -> None:
    found = skew_symmetric(embedding, temperature)
    assert (
        (found + found.T == 1.0).all()
        and (np.diag(found) == 0.5).all()
        and ((found >= 0) & (found <= 1)).all()
    )


@settings(deadline=None)
@given(embeddings, st.randoms())
def test_order_of_completions_permutes_the_matrix(
    embedding: np.ndarray[Any, Any], rng: Any
) -> None:
    order = list(range(len(embedding)))
    rng.shuffle(order)
    np.testing.assert_array_equal(
        skew_symmetric(embedding[order], 1.0), skew_symmetric(embedding, 1.0)[np.ix_(order, order)]
    )


def test_one_lost_embedding_loses_its_row_and_column_only() -> None:
    embedding = np.random.default_rng(0).normal(size=(4, 2))
    whole = skew_symmetric(embedding, 1.0)
    embedding[2] = np.nan
    found = skew_symmetric(embedding, 1.0)
    lost = np.zeros((4, 4), dtype=bool)
    lost[2], lost[:, 2] = True, True
    lost[2, 2] = False
    assert np.isnan(found[lost]).all() and (found[~lost] == whole[~lost]).all()


def test_sigmoid_at_extreme_values() -> None:
    found = sigmoid(np.array([-800.0, 0.0, 800.0, np.nan]))
    assert found[0] == 0.0 and found[1] == 0.5 and found[2] == 1.0 and math.isnan(found[3])


# ------------------------------------------------------------------------------------------ figures


def test_calibration_by_hand() -> None:
    """0.9 is right twice out of three, in its bin and mirrored: |0.9 - 2/3| in all."""
    assert calibration_error(np.array([0.9, 0.9, 0.1])) == pytest.approx(0.9 - 2 / 3)
    assert calibration_error(np.array([0.5, 0.5])) == 0.0
    assert calibration_error(np.array([1.0])) == 0.0 and calibration_error(np.array([0.0])) == 1.0


@settings(deadline=None)
@given(hnp.arrays(np.float64, st.integers(1, 30), elements=st.floats(0, 1)))
def test_calibration_is_a_share(chances: np.ndarray[Any, Any]) -> None:
    assert 0.0 <= calibration_error(chances) <= 1.0
    assert calibration_error(chances[::-1]) == pytest.approx(calibration_error(chances))


def test_figures() -> None:
    figures = measure(np.array([0.8, 0.4, 0.5, 0.9]))
    assert figures.accuracy == pytest.approx(2.5 / 4)
    assert figures.likelihood_loss == pytest.approx(
        -(math.log(0.8) + math.log(0.4) + math.log(0.5) + math.log(0.9)) / 4
    )
    assert math.isfinite(measure(np.array([0.0])).likelihood_loss)
    with pytest.raises(NumericalError, match="1 of 2 held-out pairs"):
        measure(np.array([0.5, np.nan]))


def fit_config(objective: dict[str, Any]) -> FitConfig:
    return FitConfig.model_validate(
        {"model": "m", "train": "a", "test": "b", "output": "o", "objective": objective}
    )


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        ({"type": "bradley_terry"}, win(1.5 + 0.5)),
        ({"type": "regression"}, win(1.5 + 0.5)),
        ({"type": "pairwise"}, (win(1.5) + 1 - win(-0.5)) / 2),
    ],
)
def test_win_probability(objective: dict[str, Any], expected: float) -> None:
    outputs = [np.array([[1.5]], np.float32), np.array([[-0.5]], np.float32)]
    assert win_probability(fit_config(objective).objective, outputs).tolist() == [
        pytest.approx(expected)
    ]


def test_win_probability_of_embeddings() -> None:
    objective = fit_config(KINDS["general_preference"]).objective
    outputs = [
        np.array([[1.0, 2.0, 0.0, 0.0]], np.float32),
        np.array([[3.0, 5.0, 1.0, 1.0]], np.float32),
    ]
    assert win_probability(objective, outputs).tolist() == [
        pytest.approx(win((2 * 3 - 1 * 5) / 0.5))
    ]


# ------------------------------------------------------------------------------------------- models


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(
        ["which one is good? this one or that one"] * 3,
        POLICY_FORMAT,
        max_vocab=400,
        max_length=200,
    )


def build(directory: Path, tokenizer: PreTrainedTokenizerFast, objective: dict[str, Any]) -> Path:
    config = ModelSize(hidden=32, layers=2, intermediate=64).config(tokenizer)
    config.num_labels, config.initializer_range = 2 * objective.get("blocks", 0) or 1, 0.3
    torch.manual_seed(0)
    LlamaForSequenceClassification(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    mark(
        directory,
        fit_config(objective),
        pad_token_id=pad_id(tokenizer, frozenset({tokenizer.eos_token_id})),
    )
    return directory


@pytest.fixture(scope="module", params=sorted(KINDS))
def directory(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    tokenizer: PreTrainedTokenizerFast,
) -> Path:
    torch.set_num_threads(1)
    return build(tmp_path_factory.mktemp("models") / request.param, tokenizer, KINDS[request.param])


@pytest.fixture(scope="module")
def model(directory: Path) -> PreferenceModel:
    return load(directory)


def load(directory: Path, **settings: Any) -> PreferenceModel:
    config = PreferenceModelConfig(model=directory, **settings)
    return PreferenceModel(config, ScorerSetup(base=Path()))


def check(directory: Path) -> None:
    PreferenceModel.check(PreferenceModelConfig(model=directory), Path())


def ask(
    *texts: str, messages: tuple[Message, ...] = ({"role": "user", "content": "which one?"},)
) -> ScoreRequest:
    completions = tuple(
        Completion(
            prompt_id="p",
            index=i,
            seed=i,
            text=text,
            token_ids=token_array((1,)),
            logprobs=float_array((0.0,)),
            finish_reason="stop",
            policy_version=0,
        )
        for i, text in enumerate(texts)
    )
    return ScoreRequest(
        prompt=Prompt(prompt_id="p", messages=messages, token_ids=(1,)), completions=completions
    )


def matrix(model: PreferenceModel, request: ScoreRequest) -> np.ndarray[Any, Any]:
    compared = model.compare([request])[0]
    assert isinstance(compared, Compared) and compared.source == "pairwise"
    return compared.win


def test_against_transformers_one_text_at_a_time(directory: Path, model: PreferenceModel) -> None:
    """The classifier as transformers runs it, alone and unpadded, and the formulas by hand."""
    reader, network = (
        Reader(AutoTokenizer.from_pretrained(directory)),
        LlamaForSequenceClassification.from_pretrained(directory),
    )
    request = ask("this", "that one is good", "or", "")
    texts, messages = [c.text for c in request.completions], request.prompt.messages

    def output(row: Any) -> list[float]:
        with torch.inference_mode():
            return network(torch.tensor([row])).logits[0].double().tolist()  # type: ignore[no-any-return]

    found = matrix(model, request)
    for i in range(4):
        for j in range(i + 1, 4):
            if model.facts.kind == "pairwise":
                a = output(reader.pair(messages, texts[i], texts[j]))[0]
                b = output(reader.pair(messages, texts[j], texts[i]))[0]
                expected = (win(a) + 1 - win(b)) / 2
            else:
                v, u = (output(reader.conversation(messages, texts[k])) for k in (i, j))
                expected = win((v[1] * u[0] - v[0] * u[1] + v[3] * u[2] - v[2] * u[3]) / 0.5)
            assert found[i, j] == pytest.approx(expected, abs=1e-5)
            assert found[i, j] + found[j, i] == 1.0
    assert len(set(found[np.triu_indices(4, 1)])) == 6, (
        "all pairs alike: the comparison above would prove nothing"
    )


def test_batches_do_not_mix_completions(directory: Path, model: PreferenceModel) -> None:
    requests = [ask("this", "that one is good"), ask("or", "this", "good"), ask("one")]
    together = [one.win for one in model.compare(requests) if isinstance(one, Compared)]
    small = load(directory, token_budget=1)
    for request, found in zip(requests, together, strict=True):
        np.testing.assert_allclose(matrix(small, request), found, atol=1e-5)


def test_equal_completions_tie_exactly(model: PreferenceModel) -> None:
    found = matrix(model, ask("good", "this one", "good"))
    assert found[0, 2] == 0.5 and found[0, 1] == found[2, 1]
    assert (matrix(model, ask("x", "x", "x")) == 0.5).all()


def test_one_completion_and_none(model: PreferenceModel) -> None:
    assert matrix(model, ask("good")).tolist() == [[0.5]]
    assert matrix(model, ask()).shape == (0, 0)
    outcome = model.score([ask("good")])[0][0]
    assert isinstance(outcome, Invalid) and "no other completion" in outcome.reason
    assert model.score([ask()]) == [()]


def test_score_is_the_mean_win_against_the_others(model: PreferenceModel) -> None:
    request = ask("this", "that one is good", "or")
    found, outcomes = matrix(model, request), model.score([request])[0]
    for i, outcome in enumerate(outcomes):
        assert isinstance(outcome, Scored) and outcome.value == pytest.approx(
            (found[i].sum() - 0.5) / 2
        )


def test_too_long_has_no_verdict(model: PreferenceModel) -> None:
    request = ask("this", "long " * 300, "that")
    found, outcomes = matrix(model, request), model.score([request])[0]
    assert (
        np.isnan(found[1, [0, 2]]).all()
        and np.isnan(found[[0, 2], 1]).all()
        and 0 < found[0, 2] < 1
    )
    assert isinstance(outcomes[1], Invalid) and "too long" in outcomes[1].reason
    assert isinstance(outcomes[0], Scored) and outcomes[0].value == pytest.approx(found[0, 2])
    nothing = model.compare([ask("long " * 300, "long " * 301)])[0]
    assert isinstance(nothing, Invalid) and "too long" in nothing.reason


def test_refused_conversation_is_failed_and_a_bad_text_invalid(model: PreferenceModel) -> None:
    refused = model.compare([ask("a", "b", messages=({"role": "tool", "content": "x"},))])[0]
    assert isinstance(refused, Failed) and "chat template" in refused.reason
    found = matrix(model, ask("a", "\ud800", "b"))
    assert np.isnan(found[1, 0]) and np.isfinite(found[0, 2])


def test_output_that_is_not_finite_is_no_verdict(directory: Path) -> None:
    model = load(directory)
    with torch.no_grad():
        model._classifier.model.score.weight.fill_(torch.nan)
    compared, outcomes = model.compare([ask("a", "b")])[0], model.score([ask("a", "b")])[0]
    assert isinstance(compared, Invalid) and "not finite" in compared.reason
    assert all(isinstance(outcome, Invalid) for outcome in outcomes)


# ------------------------------------------------------------------------------------------- fences


@settings(deadline=None)
@given(
    st.lists(
        st.sampled_from(
            ["<", "<<", ">>>", FIRST, SECOND, END, "<|end|>", "<|assistant|>", "a", "\n"]
        ),
        max_size=8,
    )
)
def test_completions_cannot_escape_their_place(
    tokenizer: PreTrainedTokenizerFast, parts: list[str]
) -> None:
    """Whatever the first answer says, the text has each fence once and as many special tokens as
    with a harmless answer."""
    reader, messages = Reader(tokenizer), ({"role": "user", "content": "q"},)
    hostile, harmless = reader.pair(messages, "".join(parts), "x"), reader.pair(messages, "y", "x")
    assert isinstance(hostile, tuple) and isinstance(harmless, tuple)
    text = tokenizer.decode(hostile)
    assert [text.count(fence) for fence in (FIRST, SECOND, END)] == [1, 1, 1]
    special = set(tokenizer.all_special_ids)
    assert [i for i in hostile if i in special] == [i for i in harmless if i in special]


def test_harmless_completions_are_shown_unchanged(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "if a << 2 < b: print('<b>')"
    assert Reader(tokenizer).fenced(text) == text


# -------------------------------------------------------------------------------------- directories


@pytest.fixture
def changed(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Callable[..., Path]:
    """A pairwise directory with other values in one of its small files."""

    def change(file: str, **values: object) -> Path:
        build(tmp_path / "copy", tokenizer, KINDS["pairwise"])
        path = tmp_path / "copy" / file
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
        return tmp_path / "copy"

    return change


@pytest.mark.parametrize(
    ("file", "values", "expected"),
    [
        ("rayhf_scorer.json", {"kind": "pointwise"}, "use type: reward_model"),
        (
            "rayhf_scorer.json",
            {"kind": "best"},
            "kind is 'best'; expected pointwise, pairwise or general_preference",
        ),
        (
            "rayhf_scorer.json",
            {"temperature": 0},
            "temperature is 0; expected a finite number above 0",
        ),
        (
            "rayhf_scorer.json",
            {"kind": "general_preference"},
            "outputs is 1; general_preference has an even number",
        ),
        (
            "rayhf_scorer.json",
            {"kind": "general_preference", "outputs": 4},
            "config.json has 1 outputs, rayhf_scorer.json has 4",
        ),
        (
            "config.json",
            {"architectures": ["LlamaForCausalLM"]},
            "architectures is LlamaForCausalLM",
        ),
    ],
)
def test_wrong_directories_are_refused(
    changed: Callable[..., Path], file: str, values: dict[str, object], expected: str
) -> None:
    with pytest.raises(ConfigError) as error:
        check(changed(file, **values))
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_directory_needs_the_facts(directory: Path, tmp_path: Path) -> None:
    check(directory)
    with pytest.raises(ConfigError, match="expected a directory that `rayhf fit-scorer` wrote"):
        check(tmp_path)


def test_longer_limit_than_the_models_is_refused(directory: Path) -> None:
    with pytest.raises(ConfigError, match="max_length is 201, the model reads at most 200 tokens"):
        load(directory, max_length=201)


def test_padding_id_that_ends_texts_is_not_taken(tokenizer: PreTrainedTokenizerFast) -> None:
    assert pad_id(tokenizer, frozenset({tokenizer.eos_token_id})) == tokenizer.pad_token_id
    other = pad_id(tokenizer, frozenset({tokenizer.eos_token_id, tokenizer.pad_token_id}))
    assert other in tokenizer.all_special_ids and other not in (
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )


def test_pointwise_fit_is_a_reward_model(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    directory = build(tmp_path / "bt", tokenizer, {"type": "bradley_terry"})
    reward_model = RewardModel(RewardModelConfig(model=directory), ScorerSetup(base=tmp_path))
    [outcomes] = reward_model.score([ask("a", "b")])
    assert all(isinstance(outcome, Scored) for outcome in outcomes)
    with pytest.raises(ConfigError, match="use type: reward_model"):
        load(directory)


def test_model_of_pairs_is_no_reward_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        '{"architectures": ["LlamaForSequenceClassification"], "num_labels": 1}'
    )
    (tmp_path / "rayhf_scorer.json").write_text('{"kind": "pairwise"}')
    with pytest.raises(ConfigError, match="it is a pairwise model; use type: preference_model"):
        RewardModel.check(RewardModelConfig(model=tmp_path), tmp_path)
