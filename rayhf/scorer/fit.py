"""Fitting of scorers: training examples, held-out figures, and the files of a served scorer.

launch/fit.py drives the learner in between:

pairs file -> examples (equal completions dropped): two rows of a score head per pair
              (models.forward.scored_row)
the learner's outputs on held-out pairs -> win_probability: P(chosen beats rejected)
              -> measure: accuracy, calibration, likelihood
mark(directory) -> what makes an exported model serve as a scorer

Texts are rendered as they are served: RewardModel's way for one completion,
preference_model.Reader.pair for two.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from rayhf.config.fit import FitConfig, Objective
from rayhf.data.preferences import TextPair, load_pairs
from rayhf.errors import ConfigError, NumericalError
from rayhf.models.architectures import check_packing
from rayhf.models.hub import local_directory
from rayhf.models.source import AS_DATA, load_tokenizer, read_model_config
from rayhf.scorer.classifier import SCORER_FILE, length_limit
from rayhf.scorer.comparisons import Problem
from rayhf.scorer.preference_model import Reader, TokenIds, sigmoid
from rayhf.types import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BINS = 15
"""Bins of the calibration error; Guo et al. 2017."""
Wins = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class FitSet:
    """Pairs as a score head reads them."""

    examples: tuple[Example, ...]
    equal: int
    """Pairs left out because both completions are the same."""
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
    """Quality of a fitted scorer on held-out pairs."""

    accuracy: float
    """Share of pairs with P(chosen beats rejected) above 1/2; exactly 1/2 counts one half."""
    calibration_error: float
    likelihood_loss: float
    """Mean of -log P(chosen beats rejected), in nats: comparable between objectives."""


# --- pairs ----------------------------------------------------------------------------------------


def prepare_fit(config: FitConfig, *, base: Path) -> FitPlan:
    """Read and check everything that can be checked before a learner starts.

    Raises ConfigError in one line.
    """
    path = local_directory(config.model, base)
    check_packing(read_model_config(path, key="model"), config.learner, key="model")
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
    """Return the pairs of one file as examples; the model takes texts of at most `limit` tokens.

    Raises ConfigError for a row without what the objective needs, for a text that the chat template
    refuses, and where no pair is left.
    """
    pairs = load_pairs(path, key=key)
    needs = config.objective.needs if key == "train" else ()
    examples: list[Example] = []
    last_tokens: set[int] = set()
    for where, pair in zip(pairs.places, pairs.pairs, strict=True):
        for name in needs:
            if getattr(pair, name) is None:
                raise ConfigError(
                    f"{where}: `{name}` is missing; {config.objective.type} needs a number in "
                    "every training row"
                )
        texts = _texts(pair, reader, config.objective, where)
        if max(map(len, texts)) > limit:
            continue
        example = _example(pair, texts, where, needs)
        examples.append(example)
        last_tokens |= {ids[-1] for ids in texts}
        padded = len(texts) * max(map(len, example.rows))
        if padded > config.learner.token_budget:
            raise ConfigError(
                f"learner.token_budget is {config.learner.token_budget}, "
                f"but {where} needs {padded} padded tokens"
            )
    if not examples:
        raise ConfigError(
            f"{key}: {path}: all {len(pairs.pairs)} pairs have more than the {limit} tokens "
            "that the model takes"
        )
    return FitSet(
        examples=tuple(examples),
        equal=pairs.identical,
        too_long=len(pairs.pairs) - len(examples),
        last_tokens=frozenset(last_tokens),
    )


def _texts(
    pair: TextPair, reader: Reader, objective: Objective, where: str
) -> tuple[TokenIds, TokenIds]:
    """Return (chosen, rejected), or for a cross-encoder (chosen first, rejected first)."""
    first: TokenIds | Problem
    second: TokenIds | Problem
    if objective.kind == "pairwise":
        first = reader.pair(pair.messages, pair.chosen, pair.rejected)
        second = reader.pair(pair.messages, pair.rejected, pair.chosen)
    else:
        first = reader.conversation(pair.messages, pair.chosen)
        second = reader.conversation(pair.messages, pair.rejected)
    return _required(first, where), _required(second, where)


def _required(row: TokenIds | Problem, where: str) -> TokenIds:
    if not isinstance(row, tuple):
        raise ConfigError(f"{where}: {row.reason}")
    return row


def _example(
    pair: TextPair, texts: tuple[TokenIds, TokenIds], where: str, needs: Sequence[str]
) -> Example:
    from rayhf.models.forward import scored_row

    ratings = [pair.score_chosen, pair.score_rejected] if "score_chosen" in needs else [None, None]
    rows = [
        scored_row(
            text,
            prompt_id=where,
            sample=sample,
            scalars={} if rating is None else {"rating": rating},
        )
        for sample, (text, rating) in enumerate(zip(texts, ratings, strict=True))
    ]
    margin = pair.margin if "margin" in needs else None
    return Example(rows=tuple(rows), scalars={} if margin is None else {"margin": margin})


def pad_id(tokenizer: PreTrainedTokenizerBase, last_tokens: frozenset[int]) -> int:
    """Return a padding id that ends no text.

    transformers reads a score at the last token that is not padding. The tokenizer's own padding
    token is taken where it can be; often it is the end-of-turn token, which ends every text. Then
    another special token.
    """
    own = tokenizer.pad_token_id
    candidates = [
        *([own] if own is not None else []),
        *sorted(tokenizer.all_special_ids),
        *range(len(last_tokens) + 1),
    ]
    return int(next(candidate for candidate in candidates if candidate not in last_tokens))


# --- figures --------------------------------------------------------------------------------------


def win_probability(objective: Objective, outputs: Sequence[npt.NDArray[np.float32]]) -> Wins:
    """Return P(chosen beats rejected) of each pair as it is served: (P,).

    `outputs`: (1, d) per row, rows two by two. Regression: sigmoid of the difference of predicted
    ratings, whatever their scale, as a pointwise scorer compares.
    """
    rows_Rd = np.concatenate(outputs).astype(np.float64)
    first_Pd = rows_Rd[0::2]
    second_Pd = rows_Rd[1::2]
    if objective.kind == "pairwise":
        return 0.5 * (sigmoid(first_Pd[:, 0]) + sigmoid(-second_Pd[:, 0]))
    if objective.kind == "general_preference":
        import torch

        from rayhf.losses.reward import general_preference_score

        score_P = general_preference_score(torch.from_numpy(first_Pd), torch.from_numpy(second_Pd))
        return sigmoid(score_P.numpy() / objective.served_temperature)
    return sigmoid(first_Pd[:, 0] - second_Pd[:, 0])


def calibration_error(win_P: Wins, bins: int = BINS) -> float:
    """Return the expected calibration error of P(first beats second), from 0 to 1.

    Sum over bins of |B| / N * |mean P - share of wins|. Guo et al. 2017, eq. 3, with equal bins on
    [0, 1]. A file of pairs has the chosen completion first every time, so every pair is counted in
    both orders, as P with a win and 1 - P with a loss: no order is preferred, and no random order
    is needed.
    """
    probability = np.concatenate([win_P, 1.0 - win_P])
    won = np.concatenate([np.ones_like(win_P), np.zeros_like(win_P)])
    place = np.minimum((probability * bins).astype(np.int64), bins - 1)
    gap = np.bincount(place, weights=probability - won, minlength=bins)
    return float(np.abs(gap).sum() / len(probability))


def measure(win_P: Wins) -> Figures:
    """Return the figures. Raises NumericalError where a probability is not finite."""
    if not np.isfinite(win_P).all():
        bad = int((~np.isfinite(win_P)).sum())
        raise NumericalError(
            f"{bad} of {len(win_P)} held-out pairs have an output that is not finite"
        )
    likelihood = np.log(np.maximum(win_P, np.finfo(np.float64).tiny))
    return Figures(
        accuracy=float((np.sign(win_P - 0.5) * 0.5 + 0.5).mean()),
        calibration_error=calibration_error(win_P),
        likelihood_loss=float(-likelihood.mean()),
    )


def mark(directory: Path, config: FitConfig, *, pad_token_id: int) -> None:
    """Complete an exported model so that it can be served.

    Sets the padding id in config.json and writes rayhf_scorer.json.
    """
    file = directory / "config.json"
    model_config = json.loads(file.read_text(encoding="utf-8"))
    model_config["pad_token_id"] = pad_token_id
    file.write_text(json.dumps(model_config, indent=2), encoding="utf-8")
    objective = config.objective
    facts = {
        "kind": objective.kind,
        "objective": objective.type,
        "outputs": objective.outputs,
        "temperature": objective.served_temperature,
    }
    (directory / SCORER_FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
