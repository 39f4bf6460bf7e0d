"""Preference models: fitted scorers that compare completions, and may hold cycles.

In: ScoreRequests. Out of compare: the matrix of win probabilities of each request's completions.
Two kinds, as the directory's rayhf_scorer.json (written by `rayhf fit-scorer`) says:

pairwise            a cross-encoder reads both completions at once and returns the log-odds that the
                    first one wins. Every pair is read in both orders and win[i, j] is the mean of
                    S(l_ij) and 1 - S(l_ji), so that no position is an advantage. K (K - 1) forward
                    passes for K completions.
general_preference  one forward pass per completion returns its embedding v;
                    win[i, j] = S(v_i^T R v_j / temperature), R skew-symmetric
                    (rayhf.losses.reward.general_preference_score). K forward passes.

Rows are packed by padded tokens and padded on the right; equal texts are read once, so that equal
completions tie exactly. The output is read at a text's last token as the learner reads it, whatever
the model's pad token. A text that is too long or cannot be encoded, and an output that is not
finite, leave NaN in the matrix: no verdict, never a made-up one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rayhf.config.scorers import PairwiseEntryConfig, ScorerKind
from rayhf.data.chat import render_text, special_token_escaper, special_tokens
from rayhf.errors import ConfigError, one_line
from rayhf.models.hub import local_directory
from rayhf.models.packing import pack_rows
from rayhf.scorer.classifier import (
    SCORER_FILE,
    ClassifierEntryConfig,
    check_classifier,
    load_classifier,
    read_json,
)
from rayhf.scorer.comparisons import Matrix, Problem, has_verdict, mean_wins
from rayhf.scorer.protocol import PairwiseScorer, ScorerSetup
from rayhf.types import Compared, Comparison, Failed, Invalid, Message, Outcome, ScoreRequest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FIRST = "<<<A>>>"
SECOND = "<<<B>>>"
END = "<<<end>>>"
"""Fences around the two completions that a cross-encoder reads."""

TokenIds = tuple[int, ...]
_TITLE = "preference model"


class PreferenceModelConfig(ClassifierEntryConfig, PairwiseEntryConfig):
    """A preference model that `rayhf fit-scorer` wrote; it need not be transitive."""

    type: str = "preference_model"


@dataclass(frozen=True, slots=True, kw_only=True)
class ScorerFacts:
    """The content of rayhf_scorer.json."""

    kind: ScorerKind
    temperature: float
    """Divisor of log-odds."""
    outputs: int
    """Outputs of the score head."""


def read_facts(directory: Path) -> ScorerFacts:
    """Read rayhf_scorer.json. Raises ConfigError where there is none, or a wrong one."""
    file = directory / SCORER_FILE
    if not file.is_file():
        raise ConfigError(
            f"{_TITLE} {directory}: there is no {SCORER_FILE}; "
            "expected a directory that `rayhf fit-scorer` wrote"
        )
    content = read_json(file)
    kind = content.get("kind")
    temperature = content.get("temperature", 1.0)
    outputs = content.get("outputs", 1)
    if kind not in ("pointwise", "pairwise", "general_preference"):
        raise ConfigError(
            f"{file}: kind is {kind!r}; expected pointwise, pairwise or general_preference"
        )
    if (
        isinstance(temperature, bool)
        or not isinstance(temperature, int | float)
        or not 0.0 < temperature < float("inf")
    ):
        raise ConfigError(
            f"{file}: temperature is {temperature!r}; expected a finite number above 0"
        )
    even = kind == "general_preference"
    if not isinstance(outputs, int) or outputs < 1 or (outputs % 2 if even else outputs != 1):
        raise ConfigError(
            f"{file}: outputs is {outputs!r}; {kind} has {'an even number' if even else '1'}"
        )
    return ScorerFacts(kind=kind, temperature=float(temperature), outputs=outputs)


# --- texts ----------------------------------------------------------------------------------------


class Reader:
    """Conversations as token ids, the same way in training and in serving."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._escape = special_token_escaper(tokenizer)
        self._forbidden = re.compile(
            "|".join([*map(re.escape, special_tokens(tokenizer)), "<(?=<<)"])
        )

    def conversation(self, messages: Sequence[Message], completion: str) -> TokenIds | Problem:
        """Return the messages and one assistant turn, as a reward model reads them.

        Special tokens in the completion are broken up.
        """
        turns = [*map(dict, messages), {"role": "assistant", "content": self._escape(completion)}]
        try:
            text = render_text(
                self._tokenizer, turns, generation_prompt=False, where="preference model"
            )
            text.encode()
        except UnicodeEncodeError as error:
            return Invalid(reason=f"the text cannot be encoded as UTF-8: {error.reason}")
        except ConfigError as error:
            return Failed(reason=one_line(error))
        row = tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        return row or Invalid(reason="the chat template returned an empty text")

    def pair(self, messages: Sequence[Message], first: str, second: str) -> TokenIds | Problem:
        """Return the messages and one assistant turn with both completions between fences."""
        return self.conversation(
            messages, f"{FIRST}\n{self.fenced(first)}\n{SECOND}\n{self.fenced(second)}\n{END}"
        )

    def fenced(self, completion: str) -> str:
        """Return the completion with no fence and no special token in it.

        So it can neither end its place nor its turn, nor begin another. A space after the first
        letter breaks each; every run of three or more "<" is spaced out.
        """
        return self._forbidden.sub(lambda match: f"{match[0][0]} {match[0][1:]}", completion)


# --- verdicts -------------------------------------------------------------------------------------


def sigmoid(logit: Matrix) -> Matrix:
    """Return 1 / (1 + exp(-x)) without overflow; NaN stays NaN."""
    with np.errstate(invalid="ignore"):
        probability: Matrix = np.exp(-np.logaddexp(0.0, -logit))
    return probability


def order_averaged(first_KK: Matrix) -> Matrix:
    """Return win probabilities from log-odds that i wins when it is read first: (K, K).

    NaN where either order is.
    """
    probability_KK = sigmoid(first_KK)
    return _mirrored(0.5 + 0.5 * (probability_KK - probability_KK.T))


def skew_symmetric(embedding_Kd: Matrix, temperature: float) -> Matrix:
    """Return win probabilities of a general preference model: (K, d) -> (K, K)."""
    import torch

    from rayhf.losses.reward import general_preference_score

    v_Kd = torch.from_numpy(embedding_Kd)
    score_KK: Matrix = general_preference_score(v_Kd[:, None], v_Kd[None, :]).numpy()
    return _mirrored(sigmoid(score_KK / temperature))


def _mirrored(win_KK: Matrix) -> Matrix:
    """Keep the greater of win[i, j] and win[j, i], put 1 minus it on the other side, 1/2 between.

    For p >= 1/2, 1 - p has no rounding error: the two add up to 1 exactly, and the order of the
    completions changes no bit.
    """
    mirrored_KK = np.where(win_KK >= win_KK.T, win_KK, 1.0 - win_KK.T)
    np.fill_diagonal(mirrored_KK, 0.5)
    return mirrored_KK


class PreferenceModel(PairwiseScorer[PreferenceModelConfig]):
    """A fitted model that compares completions, and may hold cycles.

    Raises ConfigError as check does, and for weights that do not fit.
    """

    Config = PreferenceModelConfig

    def __init__(self, config: PreferenceModelConfig, setup: ScorerSetup) -> None:
        super().__init__(config, setup)
        self.check(config, setup.base)
        directory = local_directory(config.model, setup.base)
        self.facts = read_facts(directory)
        self._classifier = load_classifier(config, setup, title=_TITLE)
        if not hasattr(self._classifier.model, "score"):
            name = type(self._classifier.model).__name__
            raise ConfigError(f"{_TITLE} {directory}: {name} has no linear score head")
        self._reader = Reader(self._classifier.tokenizer)

    @classmethod
    def check(cls, config: PreferenceModelConfig, base: Path) -> None:
        """Check the small files.

        Raises ConfigError unless `rayhf fit-scorer` wrote the directory with objective pairwise or
        general_preference.
        """
        directory = local_directory(config.model, base)
        facts = read_facts(directory)
        if facts.kind == "pointwise":
            raise ConfigError(
                f"{_TITLE} {directory}: it scores one completion at a time; "
                "use type: reward_model for it"
            )
        outputs = len(check_classifier(directory, title=_TITLE))
        if outputs != facts.outputs:
            raise ConfigError(
                f"{_TITLE} {directory}: config.json has {outputs} outputs, "
                f"{SCORER_FILE} has {facts.outputs}"
            )

    def compare(self, requests: Sequence[ScoreRequest]) -> list[Comparison]:
        """Return the win probabilities of each request, NaN where there is no verdict.

        Invalid or Failed where no pair of a request has one.
        """
        return [
            Compared(win=win_KK, source="pairwise")
            if has_verdict(win_KK)
            else problems[min(problems)]
            for win_KK, problems in self._judge(requests)
        ]

    def score(self, requests: Sequence[ScoreRequest]) -> list[tuple[Outcome, ...]]:
        """Return each completion's mean win probability against the request's others.

        The score is relative to these completions only.
        """
        return [
            mean_wins(Compared(win=win_KK, source="pairwise"), len(win_KK), problems)
            for win_KK, problems in self._judge(requests)
        ]

    def close(self) -> None:
        """Release the memory of the weights."""
        self._classifier.close()

    def _judge(self, requests: Sequence[ScoreRequest]) -> list[tuple[Matrix, dict[int, Problem]]]:
        """Return each request's win probabilities, and the first problem of each completion."""
        encoded = [self._encode(request) for request in requests]
        outputs = self._outputs(
            row for rows in encoded for row in rows.values() if isinstance(row, tuple)
        )
        sizes = [len(request.completions) for request in requests]
        return [
            self._verdicts(size, rows, outputs) for size, rows in zip(sizes, encoded, strict=True)
        ]

    def _encode(self, request: ScoreRequest) -> dict[tuple[int, ...], TokenIds | Problem]:
        """Return the texts to read, by the completions in them: (i,), or (i, j) with i first."""
        messages = request.prompt.messages
        texts = [completion.text for completion in request.completions]
        if self.facts.kind == "general_preference":
            return {
                (i,): self._limited(self._reader.conversation(messages, text))
                for i, text in enumerate(texts)
            }
        places = [(i, j) for i in range(len(texts)) for j in range(len(texts)) if i != j]
        return {
            (i, j): self._limited(self._reader.pair(messages, texts[i], texts[j]))
            for i, j in places
        }

    def _limited(self, row: TokenIds | Problem) -> TokenIds | Problem:
        limit = self._classifier.max_length
        if isinstance(row, tuple) and len(row) > limit:
            return Invalid(
                reason=f"too long: {len(row)} tokens, the preference model reads {limit}"
            )
        return row

    def _verdicts(
        self,
        count: int,
        rows: Mapping[tuple[int, ...], TokenIds | Problem],
        outputs: Mapping[TokenIds, Matrix],
    ) -> tuple[Matrix, dict[int, Problem]]:
        pairwise = self.facts.kind == "pairwise"
        values = np.full((count, count) if pairwise else (count, self.facts.outputs), np.nan)
        problems: dict[int, Problem] = {}
        for place, row in rows.items():
            if isinstance(row, tuple):
                output = outputs[row]
                if np.isfinite(output).all():
                    values[place] = output[0] if pairwise else output
                    continue
                problem: Problem = Invalid(reason="the preference model's output is not finite")
            else:
                problem = row
            for completion in place:
                problems.setdefault(completion, problem)
        if pairwise:
            return order_averaged(values / self.facts.temperature), problems
        return skew_symmetric(values, self.facts.temperature), problems

    def _outputs(self, rows: Iterable[TokenIds]) -> dict[TokenIds, Matrix]:
        """Return the output, shape (d,), of each different row."""
        unique = list(dict.fromkeys(rows))
        outputs: dict[TokenIds, Matrix] = {}
        for batch in pack_rows([len(row) for row in unique], self.config.token_budget):
            picked = [unique[index] for index in batch]
            outputs |= dict(zip(picked, self._forward(picked), strict=True))
        return outputs

    def _forward(self, rows: Sequence[TokenIds]) -> Matrix:
        """Return the outputs at each row's last token, as the learner reads them: (rows, d)."""
        import torch

        from rayhf.models.forward import score_texts

        with torch.inference_mode():
            output_Rd = score_texts(self._classifier.model, rows, self._classifier.device)
        outputs: Matrix = output_Rd.double().cpu().numpy()
        return outputs
