"""Settings of a judge."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from rayhf.config.models import ModelName
from rayhf.config.schema import RolloutConfig
from rayhf.config.scorers import CurriculumConfig, Dtype, EngineModel, PointwiseEntryConfig
from rayhf.scorer.endpoint_config import EndpointConfig
from rayhf.scorer.judge_text import JudgeMode, QuestionTemplate, VerdictPattern
from rayhf.scorer.replies import MAX_REPLIES, REPLY_CHARS
from rayhf.scorer.rubric import Rubric, part_names

_TOKEN_BYTES = 4
"""Typical length of a token's text."""


class JudgeConfig(PointwiseEntryConfig):
    """A language model that gives verdicts.

    yes_no: the share of yes among its votes. rating: the mean of its votes from 1 to 10. pairwise:
    the share of votes that a completion wins against another, both shown first in turn. rubric: the
    weighted mean of its answers to criteria, from 0 to 1 (rayhf/scorer/rubric.py). A vote that
    cannot be read does not count, in either direction.

    The model runs in the scorer's process, or behind an `endpoint`.
    """

    type: str = "judge"
    model: ModelName | None = None
    """Model directory or hub name, with a tokenizer that has a chat template: the judge runs in the
    scorer's process. Either this or `endpoint`."""
    endpoint: EndpointConfig | None = None
    """The judge runs behind an OpenAI-compatible server (rayhf/scorer/endpoint_config.py)."""
    mode: JudgeMode = "yes_no"
    rubric: Rubric | None = None
    """Criteria of mode rubric, which it implies: a list, or {column: NAME} of the prompts' rows."""
    per_criterion: bool = False
    """Ask one question per criterion instead of one per completion."""
    probability: bool = False
    """Score by the probability that the model says yes instead of no, as generative verifiers do
    (Zhang et al. 2024, GenRM). Mode yes_no, with an endpoint that returns log-probs; the word
    itself counts where it returns none."""
    votes: PositiveInt = 1
    """Votes per question; in pairwise mode per order. SPaR (Cheng et al. 2024) takes 5 at
    temperature 0.7."""
    temperature: NonNegativeFloat = 0.0
    """0 is greedy, with one vote."""
    max_tokens: PositiveInt = 512
    """Limit on a vote, in tokens. A vote that is cut off there does not count."""
    max_length: PositiveInt | None = None
    """Limit on question plus vote, in tokens. Default: the model's own limit. Not with an endpoint,
    which has its own."""
    template: str | None = None
    """jinja2 template of the question, with `question`, `reference` (the reference answer, or none)
    and `answer`; `first` and `second` in pairwise mode; `criteria` in rubric mode. What others
    wrote comes fenced between lines that carry `fence`, a code that none of it contains. Default:
    rayhf/scorer/judge_text.py."""
    verdict: str | None = None
    """Regular expression of the verdict; its last match in the judge's response counts. One group
    that holds yes or no, a number from 1 to 10, or a, b or tie; or groups named `yes` and `no`,
    `rating`, or `first`, `second` and `tie`."""
    keep_replies: Annotated[int, Field(ge=0, le=MAX_REPLIES)] = 16
    """Largest number of replies about a completion that the run keeps beside its score, each of at
    most 2,000 characters; 0 keeps none. Of several questions (criteria, opponents), the first
    replies to each come first. A reply about a pair belongs to the completion shown first."""
    dtype: Dtype = "bfloat16"
    """Of the engine in the scorer's process."""
    kv_cache_gib: PositiveFloat | None = None
    """KV cache of that engine in GiB. Default: as rollout.kv_cache_gib."""

    @property
    def compares(self) -> bool:
        """Whether it reads two completions at a time."""
        return self.mode == "pairwise"

    @property
    def calls_per_comparison(self) -> int:
        """Calls that one comparison takes: its votes, in both orders."""
        return 2 * self.votes

    @property
    def is_rubric(self) -> bool:
        """Whether it answers criteria."""
        return self.mode == "rubric"

    @property
    def curriculum(self) -> CurriculumConfig | None:
        """How the weights of its criteria follow the policy; None: they do not."""
        return None if self.rubric is None else self.rubric.curriculum

    @property
    def part_weights(self) -> Mapping[str, float]:
        """Weights of its criteria, by name."""
        criteria = () if self.rubric is None else self.rubric.criteria
        return dict(zip(part_names(criteria), (one.weight for one in criteria), strict=True))

    @property
    def is_concurrent(self) -> bool:
        """Whether several calls may run at the same time, in threads."""
        return self.endpoint is not None

    @property
    def reply_bytes(self) -> int:
        """Most that a run keeps of its words about one completion, for the estimate of disk."""
        asks_once = not (self.compares or self.per_criterion)
        replies = min(self.keep_replies, self.votes) if asks_once else self.keep_replies
        return replies * min(REPLY_CHARS, _TOKEN_BYTES * self.max_tokens)

    @property
    def loads(self) -> EngineModel | None:
        """The model in its process, for memory estimates; None behind an endpoint."""
        if self.model is None:
            return None
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

    @model_validator(mode="before")
    @classmethod
    def _imply_mode(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and data.get("rubric") and "mode" not in data:
            return {**data, "mode": "rubric"}
        return data

    @model_validator(mode="after")
    def _check_place(self) -> JudgeConfig:
        if (self.endpoint is None) == (self.model is None):
            raise ValueError("expected either `model` or `endpoint: {url: ..., model: ...}`")
        if self.endpoint is None:
            if self.probability:
                raise ValueError("probability needs an endpoint; without one, use votes")
            return self
        local = {"dtype", "kv_cache_gib", "max_length"} & self.model_fields_set
        if local:
            raise ValueError(
                f"{min(local)} is for a model in the scorer's process, and this one is behind an "
                "endpoint; remove one of them"
            )
        return self

    @model_validator(mode="after")
    def _check_rubric(self) -> JudgeConfig:
        if self.is_rubric != (self.rubric is not None):
            raise ValueError(
                "mode rubric needs a rubric"
                if self.is_rubric
                else f"mode {self.mode} has no rubric; expected mode: rubric"
            )
        if self.is_rubric and self.verdict is not None:
            raise ValueError("verdict does not apply to rubrics, whose answers are read by number")
        if self.per_criterion and not self.is_rubric:
            raise ValueError(f"per_criterion is for mode rubric, and mode is {self.mode}")
        return self

    @model_validator(mode="after")
    def _check_probability(self) -> JudgeConfig:
        if self.probability and (self.mode != "yes_no" or self.temperature or self.votes > 1):
            raise ValueError("probability needs mode yes_no, one vote and temperature 0")
        return self

    @model_validator(mode="after")
    def _check_mode(self) -> JudgeConfig:
        QuestionTemplate(self.mode, self.template)
        VerdictPattern(self.mode, self.verdict)
        structured = self.endpoint is not None and self.endpoint.structured == "json_schema"
        if structured and (self.verdict is not None or self.probability):
            raise ValueError(
                "endpoint.structured json_schema has its own verdicts; it goes with neither "
                "verdict nor probability"
            )
        if self.is_pairwise and (self.transform is not None or self.normalize):
            raise ValueError(
                "transform and normalize are for scores; a pairwise judge gives probabilities"
            )
        return self
