"""A language model as judge. What it is asked and how it is read: judge_text.py. The model that
writes: judge_model.py, or a fake.

In: ScoreRequests. Every question is asked `votes` times with seeds that follow from its content, so
that equal texts get equal verdicts in whatever company and order they come. Out: Scored with the
votes counted in its parts, or win probabilities. A vote that cannot be read, or was cut off before
its end, is left out; where none is left there is no score but a reason that quotes the judge. A
generator that answers with the wrong number of completions costs everything it was asked: Failed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal, Protocol

import jinja2

from rayhf.errors import ConfigError
from rayhf.scorer.comparisons import Pair, compare_pairs, compare_scores, mean_wins
from rayhf.scorer.judge_text import JudgeVerdict, Question
from rayhf.types import (
    Comparison,
    Completion,
    Failed,
    GenerateRequest,
    Invalid,
    Message,
    Outcome,
    Prompt,
    Sampling,
    Scored,
    ScoreRequest,
    derive_seed,
)

_QUOTED_CHARS = 120


class Generator(Protocol):
    """A language model in this process."""

    @property
    def max_length(self) -> int:
        """Question plus vote, in tokens."""
        ...

    def render(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Token ids of the model's chat template with the generation prompt. Raises ConfigError
        where it refuses the messages."""
        ...

    def generate(self, requests: Sequence[GenerateRequest]) -> list[tuple[Completion, ...]]:
        """One completion per seed of each request, in order."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class _Asked:
    """A question before it is put: whose prompt, and the answers in the order in which they are
    shown."""

    prompt: Prompt
    answers: tuple[str, ...]

    @property
    def key(self) -> tuple[str, ...]:
        return (self.prompt.prompt_id, *self.answers)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Votes:
    """What a question brought back: at least one vote that could be read."""

    values: tuple[float, ...]
    unparsable: int

    @property
    def mean(self) -> float:
        return sum(self.values) / len(self.values)


_Answer = _Votes | Invalid | Failed


class Judge:
    """See the module's docstring; the settings are those of JudgeConfig. Raises ConfigError for a
    template or verdict that is none."""

    def __init__(
        self,
        generator: Generator,
        *,
        mode: Literal["yes_no", "rating", "pairwise"],
        votes: int = 1,
        temperature: float = 0.0,
        max_tokens: int = 512,
        template: str | None = None,
        verdict: str | None = None,
    ) -> None:
        self._generator, self._mode, self._votes = generator, mode, votes
        self._sampling = Sampling(max_tokens=max_tokens, temperature=temperature)
        self._question, self._verdict = Question(mode, template), JudgeVerdict(mode, verdict)

    def score(self, requests: Sequence[ScoreRequest]) -> list[tuple[Outcome, ...]]:
        """yes_no: the share of yes; rating: the mean; pairwise: the mean win probability against
        the request's other answers. Parts: how many votes there were and how many of them could not
        be read (not in pairwise mode)."""
        if self._mode == "pairwise":
            compared = zip(requests, self.compare(requests), strict=True)
            return [
                mean_wins(comparison, len(request.completions)) for request, comparison in compared
            ]
        asked = [
            _Asked(request.prompt, (completion.text,))
            for request in requests
            for completion in request.completions
        ]
        answers = self._ask(asked)
        outcomes = iter([self._outcome(answers[question.key]) for question in asked])
        return [tuple(next(outcomes) for _ in request.completions) for request in requests]

    def compare(self, requests: Sequence[ScoreRequest]) -> list[Comparison]:
        """pairwise: the mean of both orders' votes, a tie counting half for each; equal texts are
        1/2 and nobody is asked. A pair is NaN unless both orders brought a vote that could be read:
        one order alone would give out the judge's liking for a place. Otherwise: sigmoids of score
        differences."""
        if self._mode != "pairwise":
            return [compare_scores(outcomes) for outcomes in self.score(requests)]
        asked = [
            _Asked(request.prompt, (first.text, second.text))
            for request in requests
            for one, other in combinations(request.completions, 2)
            for first, second in ((one, other), (other, one))
            if one.text != other.text
        ]
        answers = self._ask(asked)
        return [self._matrix(request, answers) for request in requests]

    def close(self) -> None:
        self._generator.close()

    def _matrix(self, request: ScoreRequest, answers: dict[tuple[str, ...], _Answer]) -> Comparison:
        verdicts: dict[Pair, float | Invalid | Failed] = {}
        for i, j in combinations(range(len(request.completions)), 2):
            one, other = request.completions[i].text, request.completions[j].text
            if one == other:
                verdicts[i, j] = 0.5
                continue
            there, back = (
                answers[request.prompt.prompt_id, *texts] for texts in ((one, other), (other, one))
            )
            if not isinstance(there, _Votes):
                verdicts[i, j] = there
            elif not isinstance(back, _Votes):
                verdicts[i, j] = back
            else:
                verdicts[i, j] = (there.mean + 1.0 - back.mean) / 2.0
        return compare_pairs(len(request.completions), verdicts)

    def _outcome(self, answer: _Answer) -> Outcome:
        if not isinstance(answer, _Votes):
            return answer
        return Scored(
            value=answer.mean,
            parts={"votes": float(self._votes), "unparsable": float(answer.unparsable)},
        )

    def _ask(self, asked: Sequence[_Asked]) -> dict[tuple[str, ...], _Answer]:
        """Put every different question once."""
        answers: dict[tuple[str, ...], _Answer] = {}
        requests: dict[tuple[str, ...], GenerateRequest] = {}
        for question in asked:
            if question.key in answers or question.key in requests:
                continue
            request = self._request(question, number=len(requests))
            if isinstance(request, GenerateRequest):
                requests[question.key] = request
            else:
                answers[question.key] = request
        written = self._generator.generate(list(requests.values())) if requests else []
        counts = [len(completions) for completions in written]
        if counts != [self._votes] * len(requests):
            failed = Failed(
                reason=f"the judge's model gave {sum(counts)} texts to {len(counts)} questions, "
                f"expected {self._votes} to each of {len(requests)}"
            )
            return answers | dict.fromkeys(requests, failed)
        return answers | {
            key: self._count(completions)
            for key, completions in zip(requests, written, strict=True)
        }

    def _request(self, question: _Asked, *, number: int) -> GenerateRequest | Invalid | Failed:
        try:
            "".join(
                (*question.answers, *(message["content"] for message in question.prompt.messages))
            ).encode()
            text = self._question.text(question.prompt, question.answers)
            token_ids = self._generator.render([{"role": "user", "content": text}])
        except UnicodeEncodeError as error:
            return Invalid(reason=f"the text cannot be encoded as UTF-8: {error.reason}")
        except (jinja2.TemplateError, ConfigError) as error:
            return Failed(reason=f"the judge cannot be asked: {' '.join(str(error).split())}")
        needed, limit = len(token_ids) + self._sampling.max_tokens, self._generator.max_length
        if needed > limit:
            return Invalid(
                reason=f"too long: {needed} tokens of question and verdict, the judge takes {limit}"
            )
        seeds = tuple(derive_seed("judge", *question.key, vote) for vote in range(self._votes))
        return GenerateRequest(
            prompt_id=question.prompt.prompt_id,
            number=number,
            token_ids=token_ids,
            sampling=self._sampling,
            seeds=seeds,
        )

    def _count(self, completions: Sequence[Completion]) -> _Votes | Invalid:
        # A vote that was cut off may end in the midst of quoting an answer, and with the answer's
        # verdict.
        read = [
            self._verdict.read(c.text) if c.finish_reason == "stop" else None for c in completions
        ]
        values = tuple(value for value in read if value is not None)
        if not values:
            first = completions[0]
            said = (
                first.text
                if len(first.text) <= _QUOTED_CHARS
                else f"... {first.text[-_QUOTED_CHARS:]}"
            )
            cut = " (cut off at max_tokens)" if first.finish_reason == "length" else ""
            return Invalid(
                reason=f"no verdict in any of {len(completions)} votes; the first says {said!r}{cut}"
            )
        return _Votes(values=values, unparsable=len(completions) - len(values))
