"""Scorers of other packages: found by import path, checked, built, scored and compared."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import ValidationError
from score_requests import request, win_of

from rayhf.config.load import load_section
from rayhf.config.serve import ServeScorerConfig
from rayhf.errors import ConfigError
from rayhf.scorer.build import build_scorer, check_entries, check_heldout
from rayhf.scorer.protocol import ScorerSetup
from rayhf.types import Scored

MODULE = """
import numpy as np

import rayhf
from rayhf.errors import ConfigError

class BrevityConfig(rayhf.PointwiseEntryConfig):
    type: str = "foreign_scorers:Brevity"
    limit: int = 100

class Brevity(rayhf.PointwiseScorer[BrevityConfig]):
    \"\"\"Short completions score high.\"\"\"

    Config = BrevityConfig

    def score(self, requests):
        return [tuple(self._one(c.text) for c in r.completions) for r in requests]

    def _one(self, text):
        return rayhf.Scored(value=1.0 - len(text) / self.config.limit)

class LongerConfig(rayhf.PairwiseEntryConfig):
    type: str = "foreign_scorers:Longer"

class Longer(rayhf.PairwiseScorer[LongerConfig]):
    Config = LongerConfig

    @classmethod
    def check(cls, config, base):
        if config.weight == 7:
            raise ConfigError("weight is 7")

    def compare(self, requests):
        return [self._win(r) for r in requests]

    def _win(self, request):
        lengths = np.array([len(c.text) for c in request.completions], dtype=float)
        win = (np.sign(lengths[:, None] - lengths[None, :]) + 1) / 2
        return rayhf.Compared(win=win, source="pairwise")

class Duck:
    Config = BrevityConfig
"""


@pytest.fixture(autouse=True)
def foreign_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "foreign_scorers.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("foreign_scorers", None)


def load(tmp_path: Path, entries: str) -> ServeScorerConfig:
    (tmp_path / "serve.yaml").write_text(f"scorer: {{train: [{entries}]}}\n")
    return load_section(tmp_path / "serve.yaml", (), ServeScorerConfig)


def test_pointwise_scorer_needs_settings_and_score(tmp_path: Path) -> None:
    [entry] = load(tmp_path, '{type: "foreign_scorers:Brevity", limit: 10}').scorer.train
    assert (entry.resolved_name, entry.is_pairwise, entry.uses_gpu) == ("Brevity", False, False)
    check_entries([entry], tmp_path)
    check_heldout([entry], where="scorer.evaluate")
    scorer = build_scorer([pickle.loads(pickle.dumps(entry))], ScorerSetup(base=tmp_path))
    [outcomes] = scorer.score([request("12345", "1")])
    [compared] = scorer.compare([request("12345", "1")])
    scorer.close()
    assert outcomes == (
        Scored(value=0.5, parts={"Brevity": 0.5}),
        Scored(value=0.9, parts={"Brevity": 0.9}),
    )
    assert win_of(compared)[1, 0] > 0.5


def test_pairwise_scorer_needs_settings_and_compare(tmp_path: Path) -> None:
    [entry] = load(tmp_path, '{type: "foreign_scorers:Longer", name: long}').scorer.train
    check_entries([entry], tmp_path)
    scorer = build_scorer([entry], ScorerSetup(base=tmp_path))
    [compared] = scorer.compare([request("aaa", "b")])
    [outcomes] = scorer.score([request("aaa", "b", "cc")])
    scorer.close()
    assert win_of(compared).tolist() == [[0.5, 1.0], [0.0, 0.5]]
    assert [o.value for o in outcomes if isinstance(o, Scored)] == [1.0, 0.0, 0.5]
    with pytest.raises(ConfigError, match="long compares completions"):
        check_heldout([entry], where="scorer.train")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ('{type: "foreign_scorers:Brevity", limt: 10}', "limt; did you mean limit?"),
        ('{type: "foreign_scorers:Brevity", limit: much}', "scorer.train.0.limit: input should be"),
        ('{type: "foreign_scorers:Brevty"}', "has no class 'Brevty'; did you mean Brevity?"),
        ('{type: "no_such_module:Brevity"}', "no module named 'no_such_module'"),
        ('{type: "foreign_scorers:Longer", normalize: true}', "unknown key scorer.train.0.normal"),
        ("{type: rul, function: 'a:b'}", "'rul' is not a known scorer; did you mean rule?"),
        ("{type: rule, function: nowhere}", "'nowhere' is not of the form module:function"),
    ],
)
def test_wrong_entries_are_refused_like_built_in_ones(
    tmp_path: Path, entry: str, message: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        load(tmp_path, entry)
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_own_check_names_the_entry(tmp_path: Path) -> None:
    entries = load(tmp_path, '{type: "foreign_scorers:Longer", weight: 7}').scorer.train
    with pytest.raises(ConfigError, match=r"^scorer\.train\[0\]: weight is 7"):
        check_entries(entries, tmp_path)


def test_class_without_the_base_is_refused(tmp_path: Path) -> None:
    entries = load(tmp_path, '{type: "foreign_scorers:Duck"}').scorer.train
    with pytest.raises(ConfigError, match=r"foreign_scorers:Duck is not a scorer: expected a sub"):
        check_entries(entries, tmp_path)


def test_pairwise_entries_refuse_combinations_of_scores(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"combine\.type worst is for scores"):
        (tmp_path / "serve.yaml").write_text(
            'scorer: {train: [{type: "foreign_scorers:Longer"}], combine: {type: worst}}\n'
        )
        load_section(tmp_path / "serve.yaml", (), ServeScorerConfig)
    with pytest.raises(ValidationError):
        ServeScorerConfig.model_validate({"scorer": {"train": []}})
