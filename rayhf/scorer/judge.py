"""A language model as judge: votes, seeds and scores, whatever generates the text.

In: ScoreRequests. Every question is asked `votes` times with seeds that follow from its content, so
that equal texts get equal verdicts whatever else is in the batch, and in any order. Out: Scored
with the votes counted in its parts, or win probabilities. A model that returns the wrong number of
votes fails the whole call.

judge_config.py has the settings; judge_text.py and rubric.py the questions and how verdicts are
read; judge_votes.py how votes are counted; judge_model.py and endpoint.py the models.
"""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import combinations

from rayhf.data.jinja_sandbox import TemplateFailedError
from rayhf.scorer.comparisons import Pair, Problem, compare_pairs, compare_scores, mean_wins
from rayhf.scorer.judge_config import JudgeConfig
from rayhf.scorer.judge_text import (
    MODES,
    ONE_WORD,
    QuestionTemplate,
    VerdictPattern,
    verdict_schema,
)
from rayhf.scorer.judge_votes import (
    Item,
    JudgeModel,
    Key,
    Question,
    Reply,
    Result,
    Votes,
    ask,
    seeds_of,
)
from rayhf.scorer.replies import Replies, named, select_replies
from rayhf.scorer.rubric import (
    Criterion,
    criteria_text,
    part_names,
    read_answers,
    rubric_schema,
    weighted_score,
)
from rayhf.types import (
    Comparison,
    Completion,
    Failed,
    Invalid,
    Outcome,
    Prompt,
    Scored,
    ScoreRequest,
)

_FIRST_WORD = re.compile(r"\W*(yes|no)\b", re.IGNORECASE)


class Judge:
    """A judge over any model, see the module's docstring."""

    def __init__(self, config: JudgeConfig, model: JudgeModel) -> None:
        self.config = config
        self._model = model
        template = config.template or (ONE_WORD if config.probability else None)
        self._template = QuestionTemplate(config.mode, template)
        self._pattern = VerdictPattern(config.mode, config.verdict)
        self._schema = (
            verdict_schema({"verdict": MODES[config.mode].answers})
            if config.verdict is None and not config.probability
            else None
        )
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def score(self, requests: Sequence[ScoreRequest]) -> list[tuple[Outcome, ...]]:
        """Return one outcome per completion.

        yes_no: the share of yes, or its probability; rating: the mean; rubric: the weighted mean of
        the answers; pairwise: the mean win probability against the request's other completions.
        Parts (not in pairwise mode): how many votes there were, how many of them could not be read,
        and the answer to each criterion.
        """
        if self.config.compares:
            compared = zip(requests, self.compare(requests), strict=True)
            return [
                mean_wins(comparison, len(request.completions)) for request, comparison in compared
            ]
        if self.config.is_rubric:
            return self._score_rubrics(requests)
        results = self._ask((request.prompt, (c.text,)) for request, c in _each(requests))
        outcomes = iter(
            [self._outcome(results[_key(r.prompt, c.text)]) for r, c in _each(requests)]
        )
        return [tuple(next(outcomes) for _ in request.completions) for request in requests]

    def compare(self, requests: Sequence[ScoreRequest]) -> list[Comparison]:
        """Return the win probabilities of each request.

        pairwise: the mean of both orders' votes, a tie counting half for each; equal texts are 1/2
        without a question. A pair is NaN unless both orders have a vote that could be read: one
        order alone would show the judge's bias for a position. Otherwise: sigmoids of score
        differences.
        """
        if not self.config.compares:
            return [compare_scores(outcomes) for outcomes in self.score(requests)]
        results = self._ask(
            (request.prompt, (first.text, second.text))
            for request in requests
            for one, other in combinations(request.completions, 2)
            for first, second in ((one, other), (other, one))
            if one.text != other.text
        )
        return [self._matrix(request, results) for request in requests]

    def take_counts(self) -> dict[str, float]:
        """Return what was counted since the last call: requests, tokens, pairs."""
        with self._lock:
            pairs = {name: float(count) for name, count in self._counts.items()}
            self._counts.clear()
        return self._model.take_counts() | pairs

    def close(self) -> None:
        """Release the model."""
        self._model.close()

    def _matrix(self, request: ScoreRequest, results: Mapping[Key, Result[float]]) -> Comparison:
        verdicts: dict[Pair, float | Problem] = {}
        replies: list[list[Replies]] = [[] for _ in request.completions]
        for i, j in combinations(range(len(request.completions)), 2):
            one = request.completions[i].text
            other = request.completions[j].text
            if one == other:
                verdicts[i, j] = 0.5
                continue
            forward = results[_key(request.prompt, one, other)]
            backward = results[_key(request.prompt, other, one)]
            for result, shown_first, against in ((forward, i, j), (backward, j, i)):
                if isinstance(result, Votes):
                    replies[shown_first].append(
                        tuple(replace(reply, against=against) for reply in result.replies)
                    )
            if not isinstance(forward, Votes):
                verdicts[i, j] = forward
            elif not isinstance(backward, Votes):
                verdicts[i, j] = backward
            else:
                first = _mean(forward.values)
                second = _mean(backward.values)
                self._count_pair(first, second)
                verdicts[i, j] = (first + 1.0 - second) / 2.0
        kept = tuple(map(self._kept, replies))
        return compare_pairs(len(request.completions), verdicts, kept if any(kept) else ())

    def _kept(self, by_question: Sequence[Replies]) -> Replies:
        """Return the replies about one completion that the run keeps."""
        return select_replies(by_question, self.config.keep_replies)

    def _count_pair(self, first: float, second: float) -> None:
        """Count a pair: how often whichever was shown first won, in its two orders."""
        biased = (first - 0.5) * (second - 0.5) > 0.0
        with self._lock:
            self._counts.update(pairs=1, pairs_order_dependent=int(biased))

    def _outcome(self, result: Result[float]) -> Outcome:
        if not isinstance(result, Votes):
            return result
        return Scored(
            value=_mean(result.values),
            parts=self._vote_parts(result.unparsable),
            replies=self._kept([result.replies]),
        )

    def _vote_parts(self, unparsable: int) -> dict[str, float]:
        return {"votes": float(self.config.votes), "unparsable": float(unparsable)}

    def _ask(self, asked: Iterator[tuple[Prompt, tuple[str, ...]]]) -> dict[Key, Result[float]]:
        """Ask every different question once."""
        items: dict[Key, Item[float] | Problem] = {}
        for prompt, completions in asked:
            key = _key(prompt, *completions)
            if key not in items:
                question = self._question(key, prompt, completions)
                items[key] = (
                    Item(question=question, read=self._read)
                    if isinstance(question, Question)
                    else question
                )
        return ask(self._model, items)

    def _read(self, reply: Reply) -> float | None:
        if self.config.probability:
            return _probability(reply)
        # A vote that was cut off may end within a quotation, and with the completion's verdict.
        return self._pattern.read(reply.text) if reply.is_complete else None

    def _question(
        self,
        key: Key,
        prompt: Prompt,
        completions: Sequence[str],
        criteria: Sequence[Criterion] = (),
    ) -> Question | Problem:
        contents = [message["content"] for message in prompt.messages]
        listed = criteria_text(criteria)
        try:
            "".join([*completions, *contents, listed]).encode()
            text = self._template.render(prompt, completions, criteria=listed)
        except UnicodeEncodeError as error:
            return Invalid(reason=f"the text cannot be encoded as UTF-8: {error.reason}")
        except TemplateFailedError as error:
            return Failed(reason=f"the question cannot be rendered: {error}")
        return Question(
            text=text,
            seeds=seeds_of(key, self.config.votes),
            schema=rubric_schema(criteria) if criteria else self._schema,
            needs_probabilities=self.config.probability,
        )

    # ------------------------------------------------------------------------------- rubrics

    def _score_rubrics(self, requests: Sequence[ScoreRequest]) -> list[tuple[Outcome, ...]]:
        items: dict[Key, Item[tuple[float, ...]] | Problem] = {}
        rubrics: list[tuple[Criterion, ...] | Problem] = []
        for request in requests:
            rubric = self._rubric(request.prompt)
            rubrics.append(rubric)
            if isinstance(rubric, tuple):
                for completion in request.completions:
                    for criteria in self._groups(rubric):
                        key = _rubric_key(request.prompt, completion, criteria)
                        question = self._question(key, request.prompt, (completion.text,), criteria)
                        items[key] = (
                            Item(question=question, read=partial(_read_rubric, criteria=criteria))
                            if isinstance(question, Question)
                            else question
                        )
        results = ask(self._model, items)
        return [
            tuple(
                self._rubric_outcome(request.prompt, completion, rubric, results)
                if isinstance(rubric, tuple)
                else rubric
                for completion in request.completions
            )
            for request, rubric in zip(requests, rubrics, strict=True)
        ]

    def _rubric(self, prompt: Prompt) -> tuple[Criterion, ...] | Problem:
        assert self.config.rubric is not None
        try:
            return self.config.rubric.of(prompt)
        except ValueError as error:
            return Failed(reason=str(error))

    def _groups(self, rubric: tuple[Criterion, ...]) -> list[tuple[Criterion, ...]]:
        """Return the criteria by question."""
        return [(one,) for one in rubric] if self.config.per_criterion else [rubric]

    def _rubric_outcome(
        self,
        prompt: Prompt,
        completion: Completion,
        rubric: tuple[Criterion, ...],
        results: Mapping[Key, Result[tuple[float, ...]]],
    ) -> Outcome:
        votes: list[Votes[tuple[float, ...]]] = []
        for criteria in self._groups(rubric):
            result = results[_rubric_key(prompt, completion, criteria)]
            if not isinstance(result, Votes):
                return result
            votes.append(result)
        answers = [_mean(column) for result in votes for column in zip(*result.values, strict=True)]
        unparsable = sum(result.unparsable for result in votes)
        names = part_names(rubric)
        parts = self._vote_parts(unparsable) | dict(zip(names, answers, strict=True))
        replies = [result.replies for result in votes]
        if self.config.per_criterion:
            replies = [named(each, name) for each, name in zip(replies, names, strict=True)]
        return Scored(
            value=weighted_score(rubric, answers), parts=parts, replies=self._kept(replies)
        )


def _each(requests: Sequence[ScoreRequest]) -> Iterator[tuple[ScoreRequest, Completion]]:
    return ((request, completion) for request in requests for completion in request.completions)


def _key(prompt: Prompt, *completions: str) -> Key:
    return (prompt.prompt_id, *completions)


def _rubric_key(prompt: Prompt, completion: Completion, criteria: Sequence[Criterion]) -> Key:
    # Rows with the same prompt may have other rubrics.
    return (*_key(prompt, completion.text), criteria_text(criteria))


def _read_rubric(reply: Reply, criteria: Sequence[Criterion]) -> tuple[float, ...] | None:
    return read_answers(reply.text, criteria) if reply.is_complete else None


def _probability(reply: Reply) -> float | None:
    """Return P(yes) among yes and no at the first token; 1 or 0 where probabilities are unknown."""
    if reply.probabilities is None:
        word = _FIRST_WORD.match(reply.text)
        return None if word is None else float(word[1].casefold() == "yes")
    yes = reply.probabilities.get("yes", 0.0)
    no = reply.probabilities.get("no", 0.0)
    return yes / (yes + no) if yes + no > 0.0 else None


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
