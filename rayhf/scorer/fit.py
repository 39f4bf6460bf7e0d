"""What `rayhf fit-scorer` trains on and how it is measured; launch/fit.py drives the learner in
between.

pairs file -> TextPairs (equal answers dropped) -> Examples: rows of a score head
(learner.forward.scored_row), two per pair loss_of(objective) -> what the learner minimizes the
learner's outputs on held-out pairs -> P(chosen beats rejected) -> Figures: accuracy, calibration,
likelihood mark(directory) -> what makes an exported model serve as a scorer

Texts are rendered as they are served: RewardModel's way for one answer,
preference_model.Reader.pair for two.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from rayhf.config.fit import (
    BradleyTerryMarginObjective,
    BradleyTerryObjective,
    BradleyTerryScaledObjective,
    FitConfig,
    GeneralPreferenceObjective,
    Objective,
    PairwiseObjective,
    RegressionBradleyTerryObjective,
    RegressionObjective,
)
from rayhf.data.preferences import TextPair, load_pairs
from rayhf.data.prompts import read_rows
from rayhf.errors import ConfigError, NumericalError
from rayhf.models.source import AS_DATA, load_tokenizer, read_model_config
from rayhf.scorer.classifier import length_limit
from rayhf.scorer.preference_model import SCORER_FILE, Kind, Problem, Reader, Row, sigmoid
from rayhf.types import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rayhf.losses.base import Loss

BINS = 15
"""Of the calibration error; Guo et al. 2017."""
Wins = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class FitSet:
    """Pairs as a score head reads them."""

    examples: tuple[Example, ...]
    equal: int
    """Pairs left out because both answers are the same."""
    too_long: int
    """Pairs left out because a text has more tokens than the model takes: never truncated."""
    last_tokens: frozenset[int]
    """Ids that end a text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FitPlan:
    """A fit that may start."""

    train: FitSet
    test: FitSet
    steps: int
    """Optimizer steps in all."""
    pad_id: int
    """An id that ends no text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """How a fitted scorer does on held-out pairs."""

    accuracy: float
    """Share of pairs with P(chosen beats rejected) above 1/2; exactly 1/2 counts one half."""
    calibration_error: float
    likelihood_loss: float
    """Mean of -log P(chosen beats rejected), in nats: comparable between objectives."""


# ------------------------------------------------------------------------------------------------ objectives


def loss_of(objective: Objective) -> Loss:
    from rayhf.losses.reward import (
        BradleyTerryLoss,
        GeneralPreferenceLoss,
        PairwiseLoss,
        RegressionLoss,
    )

    match objective:
        case BradleyTerryObjective():
            return BradleyTerryLoss(centering=objective.centering)
        case BradleyTerryMarginObjective():
            return BradleyTerryLoss(kind="margin", centering=objective.centering)
        case BradleyTerryScaledObjective():
            return BradleyTerryLoss(kind="scaled", centering=objective.centering)
        case RegressionObjective():
            return RegressionLoss()
        case RegressionBradleyTerryObjective():
            return RegressionLoss(mix=objective.mix)
        case PairwiseObjective():
            return PairwiseLoss()
        case GeneralPreferenceObjective():
            return GeneralPreferenceLoss(
                temperature=objective.temperature, centering=objective.centering
            )


def role_of(objective: Objective) -> Kind:
    match objective:
        case PairwiseObjective():
            return "pairwise"
        case GeneralPreferenceObjective():
            return "general_preference"
        case _:
            return "pointwise"


def outputs_of(objective: Objective) -> int:
    """Outputs of the score head."""
    return 2 * objective.blocks if isinstance(objective, GeneralPreferenceObjective) else 1


def needed_numbers(objective: Objective) -> tuple[str, ...]:
    """What every training row must have besides its texts."""
    if isinstance(objective, BradleyTerryMarginObjective | BradleyTerryScaledObjective):
        return ("margin",)
    if isinstance(objective, RegressionObjective | RegressionBradleyTerryObjective):
        return ("score_chosen", "score_rejected")
    return ()


# ----------------------------------------------------------------------------------------------------- pairs


def prepare_fit(config: FitConfig, *, base: Path) -> FitPlan:
    """Read and check everything that can be checked before a learner starts. Raises ConfigError in
    one line."""
    path = base / config.model
    read_model_config(path, key="model")
    tokenizer = load_tokenizer(path, key="model")
    limit = _model_limit(path, tokenizer)
    reader = Reader(tokenizer)
    train = fit_set(base / config.train, reader, config, key="train", limit=limit)
    test = fit_set(base / config.test, reader, config, key="test", limit=limit)
    steps = config.epochs * math.ceil(len(train.examples) / config.batch)
    return FitPlan(
        train=train,
        test=test,
        steps=steps,
        pad_id=pad_id(tokenizer, train.last_tokens | test.last_tokens),
    )


def _model_limit(path: Path, tokenizer: PreTrainedTokenizerBase) -> int:
    from transformers import AutoConfig

    return length_limit(
        AutoConfig.from_pretrained(str(path), **AS_DATA).get_text_config(), tokenizer
    )


def fit_set(path: Path, reader: Reader, config: FitConfig, *, key: str, limit: int) -> FitSet:
    """The pairs of one file as examples. `limit`: tokens that the model takes.

    Raises ConfigError for a row without what the objective needs, for a text the chat template
    refuses, and where nothing is left to use.
    """
    pairs = load_pairs(path, key=key)
    places = [where for where, row in read_rows(path, key=key) if row["chosen"] != row["rejected"]]
    wanted = needed_numbers(config.objective) if key == "train" else ()
    examples: list[Example] = []
    last: set[int] = set()
    for where, pair in zip(places, pairs.pairs, strict=True):
        where = f"{key}: {where}"
        for name in wanted:
            if getattr(pair, name) is None:
                raise ConfigError(
                    f"{where}: `{name}` is missing; {config.objective.type} needs a number in every training row"
                )
        texts = _texts(pair, reader, config.objective, where)
        if max(map(len, texts)) > limit:
            continue
        examples.append(_example(pair, texts, where, wanted))
        last |= {ids[-1] for ids in texts}
        need = len(texts) * max(map(len, examples[-1].rows))
        if need > config.learner.token_budget:
            raise ConfigError(
                f"learner.token_budget is {config.learner.token_budget}, but {where} needs {need} padded tokens"
            )
    if not examples:
        raise ConfigError(
            f"{key}: {path}: all {len(places)} pairs have more than the {limit} tokens that the model takes"
        )
    return FitSet(
        examples=tuple(examples),
        equal=pairs.identical,
        too_long=len(places) - len(examples),
        last_tokens=frozenset(last),
    )


def _texts(pair: TextPair, reader: Reader, objective: Objective, where: str) -> tuple[Row, Row]:
    """(chosen, rejected), or for a cross-encoder (chosen first, rejected first)."""
    first: Row | Problem
    second: Row | Problem
    if isinstance(objective, PairwiseObjective):
        first = reader.pair(pair.messages, pair.chosen, pair.rejected)
        second = reader.pair(pair.messages, pair.rejected, pair.chosen)
    else:
        first = reader.conversation(pair.messages, pair.chosen)
        second = reader.conversation(pair.messages, pair.rejected)
    return _readable(first, where), _readable(second, where)


def _readable(row: Row | Problem, where: str) -> Row:
    if not isinstance(row, tuple):
        raise ConfigError(f"{where}: {row.reason}")
    return row


def _example(pair: TextPair, texts: tuple[Row, Row], where: str, wanted: Sequence[str]) -> Example:
    from rayhf.models.forward import scored_row

    ratings = [pair.score_chosen, pair.score_rejected] if "score_chosen" in wanted else [None, None]
    rows = [
        scored_row(
            text,
            prompt_id=where,
            sample=sample,
            scalars={} if rating is None else {"rating": rating},
        )
        for sample, (text, rating) in enumerate(zip(texts, ratings, strict=True))
    ]
    margin = pair.margin if "margin" in wanted else None
    return Example(rows=tuple(rows), scalars={} if margin is None else {"margin": margin})


def pad_id(tokenizer: PreTrainedTokenizerBase, last_tokens: frozenset[int]) -> int:
    """A padding id that ends no text: transformers reads a score at the last token that is not
    padding.

    The tokenizer's own where it can be; often it is the end-of-turn token, which ends every text.
    Then another special token.
    """
    own = tokenizer.pad_token_id
    candidates = [
        *([own] if own is not None else []),
        *sorted(tokenizer.all_special_ids),
        *range(len(last_tokens) + 1),
    ]
    return int(next(candidate for candidate in candidates if candidate not in last_tokens))


# -------------------------------------------------------------------------------------------------- measuring


def win_probability(objective: Objective, outputs: Sequence[npt.NDArray[np.float32]]) -> Wins:
    """P(chosen beats rejected) of each pair as it is served: (P,). `outputs`: (1, d) per row, rows
    two by two.

    Regression: sigmoid of the difference of predicted ratings, whatever their scale, as a pointwise
    scorer answers compare.
    """
    rows = np.concatenate(outputs).astype(np.float64)
    first, second = rows[0::2], rows[1::2]
    match objective:
        case PairwiseObjective():
            return 0.5 * (sigmoid(first[:, 0]) + sigmoid(-second[:, 0]))
        case GeneralPreferenceObjective():
            import torch

            from rayhf.losses.reward import general_preference_score

            score = general_preference_score(
                torch.from_numpy(first), torch.from_numpy(second)
            ).numpy()
            return sigmoid(score / objective.temperature)
        case _:
            return sigmoid(first[:, 0] - second[:, 0])


def calibration_error(win_P: Wins, bins: int = BINS) -> float:
    """Expected calibration error of P(first beats second), sum over bins of |B| / N * |mean P -
    share of wins|: from 0 to 1.

    Guo et al. 2017, eq. 3, with equal bins on [0, 1]. A file of pairs has the chosen answer first
    every time, so every pair is counted in both orders, as P with a win and 1 - P with a loss: no
    order is preferred, and no coin is needed.
    """
    chance = np.concatenate([win_P, 1.0 - win_P])
    won = np.concatenate([np.ones_like(win_P), np.zeros_like(win_P)])
    place = np.minimum((chance * bins).astype(np.int64), bins - 1)
    gap = np.bincount(place, weights=chance - won, minlength=bins)
    return float(np.abs(gap).sum() / len(chance))


def measure(win_P: Wins) -> Figures:
    """Raises NumericalError where a probability is not finite."""
    if not np.isfinite(win_P).all():
        bad = int((~np.isfinite(win_P)).sum())
        raise NumericalError(
            f"{bad} of {len(win_P)} held-out pairs got an output that is not finite"
        )
    likelihood = np.log(np.maximum(win_P, np.finfo(np.float64).tiny))
    return Figures(
        accuracy=float((np.sign(win_P - 0.5) * 0.5 + 0.5).mean()),
        calibration_error=calibration_error(win_P),
        likelihood_loss=float(-likelihood.mean()),
    )


def mark(directory: Path, config: FitConfig, *, pad_token_id: int) -> None:
    """Complete an exported model: the padding id in config.json, and rayhf_scorer.json, by which it
    is served."""
    file = directory / "config.json"
    model_config = json.loads(file.read_text(encoding="utf-8"))
    model_config["pad_token_id"] = pad_token_id
    file.write_text(json.dumps(model_config, indent=2), encoding="utf-8")
    objective = config.objective
    facts: dict[str, Any] = {
        "kind": role_of(objective),
        "objective": objective.type,
        "outputs": outputs_of(objective),
        "temperature": objective.temperature
        if isinstance(objective, GeneralPreferenceObjective)
        else 1.0,
    }
    (directory / SCORER_FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
