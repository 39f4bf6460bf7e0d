"""A language model as judge: votes, seeds and scores, whatever generates the text.

In: ScoreRequests. Every question is asked `votes` times with seeds that follow from its content, so
that equal texts get equal verdicts whatever else is in the batch, and in any order. Out: Scored
with the votes counted in its parts, or win probabilities. A vote that cannot be read, or was cut
off before its end, is left out; where none is left there is no score but a reason that quotes the
judge. A generator that returns the wrong number of completions fails the whole call.

judge_text.py has the questions and how verdicts are read; judge_model.py the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Protocol

import jinja2
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from rayhf.config.models import ModelName
from rayhf.config.schema import RolloutConfig
from rayhf.config.scorers import Dtype, EngineModel, PointwiseEntryConfig
from rayhf.errors import ConfigError
from rayhf.scorer.comparisons import Pair, Problem, compare_pairs, compare_scores, mean_wins
from rayhf.scorer.judge_text import JudgeMode, QuestionTemplate, VerdictPattern
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


class JudgeConfig(PointwiseEntryConfig):
    """A language model that gives verdicts.

    yes_no: the share of yes among its votes. rating: the mean of its votes from 1 to 10. pairwise:
    the share of votes that a completion wins against another, both shown first in turn. A vote that
    cannot be read does not count, in either direction.
    """

    type: str = "judge"
    model: ModelName
    """Model directory or hub name, with a tokenizer that has a chat template."""
    mode: JudgeMode = "yes_no"
    votes: PositiveInt = 1
    """Votes per question; in pairwise mode per order. SPaR (Cheng et al. 2024) takes 5 at
    temperature 0.7."""
    temperature: NonNegativeFloat = 0.0
    """0 is greedy, with one vote."""
    max_tokens: PositiveInt = 512
    """Limit on a vote, in tokens. A vote that is cut off there does not count."""
    max_length: PositiveInt | None = None
    """Limit on question plus vote, in tokens. Default: the model's own limit."""
    template: str | None = None
    """jinja2 template of the question, with `question`, `reference` (the reference answer, or none)
    and `answer`, or `first` and `second` in pairwise mode. Each comes fenced between lines that
    carry `fence`, a code that none of them contains. Default: rayhf/scorer/judge_text.py."""
    verdict: str | None = None
    """Regular expression of the verdict; its last match in the judge's response counts. One group
    that holds yes or no, a number from 1 to 10, or a, b or tie; or groups named `yes` and `no`,
    `rating`, or `first`, `second` and `tie`."""
    dtype: Dtype = "bfloat16"
    kv_cache_gib: PositiveFloat | None = None
    """KV cache of its engine in GiB. Default: as rollout.kv_cache_gib."""

    @property
    def is_pairwise(self) -> bool:
        """Whether it compares completions by itself, with no score for a single completion."""
        return self.mode == "pairwise"

    @property
    def loads(self) -> EngineModel:
        """The model in its process, for memory estimates."""
        engine = RolloutConfig(max_tokens=self.max_tokens, kv_cache_gib=self.kv_cache_gib)
        return EngineModel(model=self.model, dtype=self.dtype, engine=engine)

    @model_validator(mode="after")
    def _check_votes(self) -> JudgeConfig:
        if self.votes > 1 and self.temperature == 0:
            raise ValueError(
                f"votes is {self.votes} at temperature 0, which would be the same vote each time; "
                "try temperature 0.7"
            )
        if 0 < self.temperature < 0.01:
            raise ValueError(f"temperature is {self.temperature:g}; expected 0 or at least 0.01")
        return self

    @model_validator(mode="after")
    def _check_mode(self) -> JudgeConfig:
        QuestionTemplate(self.mode, self.template)
        VerdictPattern(self.mode, self.verdict)
        if self.mode == "pairwise" and (self.transform is not None or self.normalize):
            raise ValueError(
                "transform and normalize are for scores; a pairwise judge gives probabilities"
            )
        return self


class Generator(Protocol):
    """A language model in this process."""

    @property
    def max_length(self) -> int:
        """Limit on question plus vote, in tokens."""
        ...

    def render(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Return the token ids of the chat template with the generation prompt.

        Raises ConfigError where it refuses the messages.
        """
        ...

    def generate(self, requests: Sequence[GenerateRequest]) -> list[tuple[Completion, ...]]:
        """Return one completion per seed of each request, in order."""
        ...

    def close(self) -> None:
        """Release the memory of the weights."""
        ...


QuestionKey = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Question:
    """A prompt, and the completions in the order in which they are shown."""

    prompt: Prompt
    completions: tuple[str, ...]

    @property
    def key(self) -> QuestionKey:
        return (self.prompt.prompt_id, *self.completions)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Votes:
    """The votes on one question: at least one that could be read."""

    values: tuple[float, ...]
    unparsable: int

    @property
    def mean(self) -> float:
        return sum(self.values) / len(self.values)


_Result = _Votes | Invalid | Failed


class Judge:
    """A judge over any generator, see the module's docstring."""

    def __init__(self, config: JudgeConfig, generator: Generator) -> None:
        self.config = config
        self._generator = generator
        self._sampling = Sampling(max_tokens=config.max_tokens, temperature=config.temperature)
        self._template = QuestionTemplate(config.mode, config.template)
        self._pattern = VerdictPattern(config.mode, config.verdict)

    def score(self, requests: Sequence[ScoreRequest]) -> list[tuple[Outcome, ...]]:
        """Return one outcome per completion.

        yes_no: the share of yes; rating: the mean; pairwise: the mean win probability against the
        request's other completions. Parts (not in pairwise mode): how many votes there were and how
        many of them could not be read.
        """
        if self.config.is_pairwise:
            compared = zip(requests, self.compare(requests), strict=True)
            return [
                mean_wins(comparison, len(request.completions)) for request, comparison in compared
            ]
        questions = [
            _Question(request.prompt, (completion.text,))
            for request in requests
            for completion in request.completions
        ]
        results = self._ask(questions)
        outcomes = iter([self._outcome(results[question.key]) for question in questions])
        return [tuple(next(outcomes) for _ in request.completions) for request in requests]

    def compare(self, requests: Sequence[ScoreRequest]) -> list[Comparison]:
        """Return the win probabilities of each request.

        pairwise: the mean of both orders' votes, a tie counting half for each; equal texts are 1/2
        without a question. A pair is NaN unless both orders have a vote that could be read: one
        order alone would show the judge's bias for a position. Otherwise: sigmoids of score
        differences.
        """
        if not self.config.is_pairwise:
            return [compare_scores(outcomes) for outcomes in self.score(requests)]
        questions = [
            _Question(request.prompt, (first.text, second.text))
            for request in requests
            for one, other in combinations(request.completions, 2)
            for first, second in ((one, other), (other, one))
            if one.text != other.text
        ]
        results = self._ask(questions)
        return [self._matrix(request, results) for request in requests]

    def close(self) -> None:
        """Release the memory of the weights."""
        self._generator.close()

    def _matrix(self, request: ScoreRequest, results: Mapping[QuestionKey, _Result]) -> Comparison:
        verdicts: dict[Pair, float | Problem] = {}
        for i, j in combinations(range(len(request.completions)), 2):
            one = request.completions[i].text
            other = request.completions[j].text
            if one == other:
                verdicts[i, j] = 0.5
                continue
            forward = results[request.prompt.prompt_id, one, other]
            backward = results[request.prompt.prompt_id, other, one]
            if not isinstance(forward, _Votes):
                verdicts[i, j] = forward
            elif not isinstance(backward, _Votes):
                verdicts[i, j] = backward
            else:
                verdicts[i, j] = (forward.mean + 1.0 - backward.mean) / 2.0
        return compare_pairs(len(request.completions), verdicts)

    def _outcome(self, result: _Result) -> Outcome:
        if not isinstance(result, _Votes):
            return result
        parts = {"votes": float(self.config.votes), "unparsable": float(result.unparsable)}
        return Scored(value=result.mean, parts=parts)

    def _ask(self, questions: Sequence[_Question]) -> dict[QuestionKey, _Result]:
        """Ask every different question once."""
        results: dict[QuestionKey, _Result] = {}
        requests: dict[QuestionKey, GenerateRequest] = {}
        for question in questions:
            if question.key in results or question.key in requests:
                continue
            request = self._request(question, number=len(requests))
            if isinstance(request, GenerateRequest):
                requests[question.key] = request
            else:
                results[question.key] = request
        generated = self._generator.generate(list(requests.values())) if requests else []
        counts = [len(completions) for completions in generated]
        if counts != [self.config.votes] * len(requests):
            failed = Failed(
                reason=f"the judge's model returned {sum(counts)} votes on {len(counts)} "
                f"questions, expected {self.config.votes} on each of {len(requests)}"
            )
            return results | dict.fromkeys(requests, failed)
        return results | {
            key: self._count(completions)
            for key, completions in zip(requests, generated, strict=True)
        }

    def _request(self, question: _Question, *, number: int) -> GenerateRequest | Problem:
        contents = [message["content"] for message in question.prompt.messages]
        try:
            "".join([*question.completions, *contents]).encode()
            text = self._template.render(question.prompt, question.completions)
            token_ids = self._generator.render([{"role": "user", "content": text}])
        except UnicodeEncodeError as error:
            return Invalid(reason=f"the text cannot be encoded as UTF-8: {error.reason}")
        except (jinja2.TemplateError, ConfigError) as error:
            reason = " ".join(str(error).split())
            return Failed(reason=f"the question cannot be rendered: {reason}")
        needed = len(token_ids) + self._sampling.max_tokens
        limit = self._generator.max_length
        if needed > limit:
            return Invalid(
                reason=f"too long: {needed} tokens of question and vote, the judge takes {limit}"
            )
        seeds = [derive_seed("judge", *question.key, vote) for vote in range(self.config.votes)]
        return GenerateRequest(
            prompt_id=question.prompt.prompt_id,
            number=number,
            token_ids=token_ids,
            sampling=self._sampling,
            seeds=tuple(seeds),
        )

    def _count(self, completions: Sequence[Completion]) -> _Votes | Invalid:
        # A vote that was cut off may end within a quotation, and with the completion's verdict.
        votes = [
            self._pattern.read(completion.text) if completion.finish_reason == "stop" else None
            for completion in completions
        ]
        values = tuple(vote for vote in votes if vote is not None)
        if not values:
            first = completions[0]
            quoted = first.text
            if len(quoted) > _QUOTED_CHARS:
                quoted = f"... {quoted[-_QUOTED_CHARS:]}"
            cut = " (cut off at max_tokens)" if first.finish_reason == "length" else ""
            return Invalid(
                reason=f"no verdict in any of {len(completions)} votes; "
                f"the first says {quoted!r}{cut}"
            )
        return _Votes(values=values, unparsable=len(completions) - len(values))
