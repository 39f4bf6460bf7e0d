"""Preference models: they say of two answers which one is better, and may hold cycles, which no
single score per answer can.

In: ScoreRequests. Out of compare: the matrix of win probabilities of each request's answers. Two
kinds, as the directory's rayhf_scorer.json (written by `rayhf fit-scorer`) says:

pairwise            a cross-encoder reads both answers at once and gives the log-odds that the first
                    one wins. Every pair is read in both orders and win[i, j] is the mean of S(l_ij)
                    and 1 - S(l_ji), so that no place is an advantage. K (K - 1) forward passes for
                    K answers.
general_preference  one forward pass per answer gives its embedding v; win[i, j] = S(v_i^T R v_j /
                    temperature), R skew-symmetric (rayhf.losses.reward.general_preference_score). K
                    forward passes.

Rows are packed by padded tokens and padded on the right; equal texts are read once, so that equal
answers tie exactly. The output is read at a text's last token as the learner reads it, whatever the
model's pad token. A text that is too long or cannot be encoded, and an output that is not finite,
leave NaN in the matrix: no verdict, never a made-up one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jinja2
import numpy as np
import numpy.typing as npt

from rayhf.data.prompts import disarming, special_tokens
from rayhf.errors import ConfigError
from rayhf.models.packing import pack_rows
from rayhf.models.source import refuse_own_code
from rayhf.scorer.classifier import load_classifier, one_line, read_json
from rayhf.types import (
    Compared,
    Comparison,
    Failed,
    Invalid,
    Message,
    Outcome,
    Scored,
    ScoreRequest,
)

SCORER_FILE = "rayhf_scorer.json"
FIRST, SECOND, END = "<<<A>>>", "<<<B>>>", "<<<end>>>"

Kind = Literal["pointwise", "pairwise", "general_preference"]
Matrix = npt.NDArray[np.float64]
Row = tuple[int, ...]
Problem = Invalid | Failed


@dataclass(frozen=True, slots=True, kw_only=True)
class ScorerFacts:
    """What rayhf_scorer.json says of a fitted scorer."""

    kind: Kind
    temperature: float
    """Log-odds are divided by it."""
    outputs: int


def read_facts(directory: Path) -> ScorerFacts:
    """Raises ConfigError where the directory has no rayhf_scorer.json, or a wrong one."""
    file = directory / SCORER_FILE
    if not file.is_file():
        raise ConfigError(
            f"preference model {directory}: there is no {SCORER_FILE}; expected a directory that `rayhf fit-scorer` wrote"
        )
    content = read_json(file)
    kind, temperature, outputs = (
        content.get("kind"),
        content.get("temperature", 1.0),
        content.get("outputs", 1),
    )
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


def check_directory(directory: Path) -> None:
    """What the small files can tell. Raises ConfigError unless `rayhf fit-scorer` made a preference
    model of this directory."""
    facts = read_facts(directory)
    if facts.kind == "pointwise":
        raise ConfigError(
            f"preference model {directory}: it scores one answer at a time; use type: reward_model for it"
        )
    config = read_json(directory / "config.json")
    refuse_own_code(directory, config, key="preference model")
    names = config.get("architectures") or []
    if not any(name.endswith("ForSequenceClassification") for name in names):
        found = ", ".join(names) or "none"
        raise ConfigError(
            f"preference model {directory}: architectures is {found}; a ...ForSequenceClassification is needed"
        )
    outputs = len(
        config.get("id2label", (0, 1))
    )  # transformers leaves id2label out for its default of two labels
    if outputs != facts.outputs:
        raise ConfigError(
            f"preference model {directory}: config.json says {outputs} outputs, {SCORER_FILE} says {facts.outputs}"
        )
    tokenizer_file = directory / "tokenizer_config.json"
    if not tokenizer_file.is_file():
        raise ConfigError(
            f"preference model {directory}: there is no tokenizer_config.json; it needs its own tokenizer"
        )
    templates = [directory / "chat_template.jinja", directory / "chat_template.json"]
    if not any(file.is_file() for file in templates) and not read_json(tokenizer_file).get(
        "chat_template"
    ):
        raise ConfigError(f"preference model {directory}: its tokenizer has no chat template")


# ---------------------------------------------------------------------------------------------------- texts


class Reader:
    """Conversations as token ids, the same way in training and in serving."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self._disarm = tokenizer, disarming(tokenizer)
        self._forbidden = re.compile(
            "|".join([*map(re.escape, special_tokens(tokenizer)), "<(?=<<)"])
        )

    def conversation(self, messages: Sequence[Message], answer: str) -> Row | Problem:
        """The messages and one assistant turn, as a reward model reads them; special tokens in the
        answer are taken apart."""
        turns = [*map(dict, messages), {"role": "assistant", "content": self._disarm(answer)}]
        try:
            text = str(self._tokenizer.apply_chat_template(turns, tokenize=False))
            text.encode()
        except UnicodeEncodeError as error:
            return Invalid(reason=f"the text cannot be encoded as UTF-8: {error.reason}")
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            return Failed(reason=f"the chat template refused the messages: {one_line(error)}")
        row = tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        return row or Invalid(reason="the chat template made an empty text")

    def pair(self, messages: Sequence[Message], first: str, second: str) -> Row | Problem:
        """The messages and one assistant turn that holds both answers between fences."""
        return self.conversation(
            messages, f"{FIRST}\n{self.fenced(first)}\n{SECOND}\n{self.fenced(second)}\n{END}"
        )

    def fenced(self, answer: str) -> str:
        """The answer with no fence and no special token in it: it can neither end its place, nor
        its turn, nor begin another.

        A space after the first letter breaks each; every run of three or more "<" is spaced out.
        """
        return self._forbidden.sub(lambda found: f"{found[0][0]} {found[0][1:]}", answer)


# --------------------------------------------------------------------------------------------------- verdicts


def sigmoid(logit: Matrix) -> Matrix:
    """1 / (1 + exp(-x)) without overflow; NaN stays NaN."""
    with np.errstate(invalid="ignore"):
        chance: Matrix = np.exp(-np.logaddexp(0.0, -logit))
    return chance


def order_averaged(first_KK: Matrix) -> Matrix:
    """Win probabilities from log-odds `first_KK[i, j]` that i wins when it is read first: (K, K).
    NaN where either order is."""
    chance_KK = sigmoid(first_KK)
    return _mirrored(0.5 + 0.5 * (chance_KK - chance_KK.T))


def skew_symmetric(embedding_Kd: Matrix, temperature: float) -> Matrix:
    """Win probabilities of a general preference model: (K, d) -> (K, K)."""
    import torch

    from rayhf.losses.reward import general_preference_score

    v_Kd = torch.from_numpy(embedding_Kd)
    score_KK: Matrix = general_preference_score(v_Kd[:, None], v_Kd[None, :]).numpy()
    return _mirrored(sigmoid(score_KK / temperature))


def _mirrored(win_KK: Matrix) -> Matrix:
    """The greater of win[i, j] and win[j, i] as it is, 1 minus it on the other side, 1/2 between.

    For p >= 1/2, 1 - p has no rounding error: the two add up to 1 exactly, and the order of the
    answers changes no bit.
    """
    mirrored = np.where(win_KK >= win_KK.T, win_KK, 1.0 - win_KK.T)
    np.fill_diagonal(mirrored, 0.5)
    return mirrored


class PreferenceModel:
    """A fitted preference model of either kind, frozen.

    Args:
        directory: what `rayhf fit-scorer` wrote with objective pairwise or general_preference.
        dtype: "float32" or "bfloat16".
        token_budget: padded tokens per forward pass; a single longer row goes alone.
        max_length: tokens of a whole text (for pairwise: with both answers); default: the model's
        own limit. device: torch device, for example "cpu" or "cuda". threads: torch CPU threads of
        this process; unchanged by default.

    Raises ConfigError as check_directory does, and for weights that do not fit.
    """

    def __init__(
        self,
        directory: Path,
        *,
        dtype: str = "float32",
        token_budget: int = 16384,
        max_length: int | None = None,
        device: str = "cpu",
        threads: int | None = None,
    ) -> None:
        check_directory(directory)
        self.facts = read_facts(directory)
        self._classifier = load_classifier(
            directory,
            "preference model",
            dtype=dtype,
            max_length=max_length,
            device=device,
            threads=threads,
        )
        if not hasattr(self._classifier.model, "score"):
            name = type(self._classifier.model).__name__
            raise ConfigError(f"preference model {directory}: {name} has no linear score head")
        self._reader, self._token_budget = Reader(self._classifier.tokenizer), token_budget

    def compare(self, requests: Sequence[ScoreRequest]) -> list[Comparison]:
        """For each request the win probabilities among its completions, NaN where there is no
        verdict.

        Invalid or Failed where no pair of a request could be judged. The diagonal is 1/2, also for
        a single completion.
        """
        results: list[Comparison] = []
        for win, problems in self._judge(requests):
            if len(win) > 1 and np.isnan(win[~np.eye(len(win), dtype=bool)]).all():
                results.append(problems[min(problems)])
            else:
                results.append(Compared(win=win, source="pairwise"))
        return results

    def score(self, requests: Sequence[ScoreRequest]) -> list[tuple[Outcome, ...]]:
        """Each completion's mean win probability against the request's other completions, over
        those with a verdict.

        It says how good an answer is among these answers only. Invalid for an answer that has no
        other to be compared with.
        """
        results: list[tuple[Outcome, ...]] = []
        for win, problems in self._judge(requests):
            others = np.where(np.eye(len(win), dtype=bool), np.nan, win)
            results.append(tuple(_mean_win(others[i], problems.get(i)) for i in range(len(win))))
        return results

    def close(self) -> None:
        """Give the weights' memory back."""
        self._classifier.close()

    def _judge(self, requests: Sequence[ScoreRequest]) -> list[tuple[Matrix, dict[int, Problem]]]:
        """Win probabilities of every request, and for answers that lack a verdict the first
        reason."""
        encoded = [self._encode(request) for request in requests]
        outputs = self._outputs(
            row for rows in encoded for row in rows.values() if isinstance(row, tuple)
        )
        sizes = [len(request.completions) for request in requests]
        return [
            self._verdict(size, rows, outputs) for size, rows in zip(sizes, encoded, strict=True)
        ]

    def _encode(self, request: ScoreRequest) -> dict[tuple[int, ...], Row | Problem]:
        """Texts to read, by the answers in them: (i,) or (i, j), i first."""
        messages, texts = (
            request.prompt.messages,
            [completion.text for completion in request.completions],
        )
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

    def _limited(self, row: Row | Problem) -> Row | Problem:
        if isinstance(row, tuple) and len(row) > self._classifier.max_length:
            return Invalid(
                reason=f"too long: {len(row)} tokens, the preference model reads {self._classifier.max_length}"
            )
        return row

    def _verdict(
        self,
        count: int,
        rows: Mapping[tuple[int, ...], Row | Problem],
        outputs: Mapping[Row, Matrix],
    ) -> tuple[Matrix, dict[int, Problem]]:
        pairwise = self.facts.kind == "pairwise"
        value = np.full((count, count) if pairwise else (count, self.facts.outputs), np.nan)
        problems: dict[int, Problem] = {}
        for place, row in rows.items():
            output = outputs[row] if isinstance(row, tuple) else None
            if output is not None and np.isfinite(output).all():
                value[place] = output[0] if pairwise else output
                continue
            problem = (
                Invalid(reason="the preference model's output is not finite")
                if isinstance(row, tuple)
                else row
            )
            for answer in place:
                problems.setdefault(answer, problem)
        if pairwise:
            return order_averaged(value / self.facts.temperature), problems
        return skew_symmetric(value, self.facts.temperature), problems

    def _outputs(self, rows: Iterable[Row]) -> dict[Row, Matrix]:
        """(d,) for each different row."""
        unique = list(dict.fromkeys(rows))
        outputs: dict[Row, Matrix] = {}
        for batch in pack_rows([len(row) for row in unique], self._token_budget):
            picked = [unique[index] for index in batch]
            outputs |= dict(zip(picked, self._forward(picked), strict=True))
        return outputs

    def _forward(self, rows: Sequence[Row]) -> Matrix:
        """Return the outputs at each row's last token, as the learner reads them: (rows, d)."""
        import torch

        from rayhf.models.forward import score_texts

        with torch.inference_mode():
            output_Rd = score_texts(self._classifier.model, rows, self._classifier.device)
        outputs: Matrix = output_Rd.double().cpu().numpy()
        return outputs


def _mean_win(win: Matrix, problem: Problem | None) -> Outcome:
    known = win[np.isfinite(win)]
    if known.size:
        return Scored(value=float(known.mean()))
    return problem or Invalid(
        reason="there is no other answer to compare with; a preference model needs at least two"
    )
