"""Shared data types: one frozen dataclass per stage of an iteration.

Prompt -> GenerateRequest -> Completion -> Sample (a completion and its Outcome) -> Group (the
samples of one prompt) -> Example (rows that must be trained together: one row, a pair, ...) ->
Batch (one optimizer step). Objects are immutable: a stage that adds something returns a new one.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import JsonValue

if TYPE_CHECKING:
    from rayhf.episodes import Episode, Inserted

FloatArray = npt.NDArray[np.float32]
TokenArray = npt.NDArray[np.int32]
Scalar = TypeVar("Scalar", bound=np.generic)
TokenIds = Sequence[int] | TokenArray
Message = Mapping[str, Any]
"""{"role": ..., "content": ...}, as chat templates expect it; `content` is always text. Further
keys are the row's: tool_calls, name ..."""
JsonObject = Mapping[str, JsonValue]
"""State of a component, as stored in a checkpoint's JSON."""
TransportName = Literal["object_store", "broadcast", "cuda_ipc"]
"""How weights get from the learner to the engines: through Ray's object store; from device to
device through a process group; or copied from another process's memory on the same GPU."""


def derive_seed(*parts: int | str) -> int:
    """Return a 63-bit seed derived from `parts` (campaign seed, iteration, prompt id, ...).

    Seeds never depend on arrival order or on the state of another generator.
    """
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def token_array(token_ids: Iterable[int]) -> TokenArray:
    """Return token ids as a read-only int32 array: (T,). An int32 array is not copied."""
    return _read_only(token_ids, np.dtype(np.int32))


def float_array(values: Iterable[float]) -> FloatArray:
    """Return numbers as a read-only float32 array: (T,). A float32 array is not copied."""
    return _read_only(values, np.dtype(np.float32))


def _read_only(values: Iterable[float], dtype: np.dtype[Scalar]) -> npt.NDArray[Scalar]:
    if isinstance(values, np.ndarray):
        array = values.astype(dtype, copy=False)
    else:
        array = np.fromiter(values, dtype=dtype)
    array.setflags(write=False)
    return array


class ByValue:
    """Equality of dataclasses with arrays, which are compared by their bytes; there is no hash."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return all(
            _same(getattr(self, each.name), getattr(other, each.name))
            for each in fields(self)  # type: ignore[arg-type]  # subclasses are dataclasses
        )

    __hash__ = None  # type: ignore[assignment]


def _same(first: object, second: object) -> bool:
    if isinstance(first, np.ndarray) and isinstance(second, np.ndarray):
        return first.dtype == second.dtype and first.tobytes() == second.tobytes()
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return first.keys() == second.keys() and all(_same(first[k], second[k]) for k in first)
    return first == second


NO_TOKENS = token_array(())
NO_LOGPROBS = float_array(())


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A prompt, rendered for the policy."""

    prompt_id: str
    """Stable hash of all that the policy and the scorers see; identifies the prompt everywhere."""
    messages: tuple[Message, ...]
    """Messages before any chat template, for scorers with another tokenizer."""
    token_ids: tuple[int, ...]
    """Tokens under the policy's tokenizer and chat template, generation prompt included."""
    reference_answer: str | None = None
    """Reference answer for verifiers; never shown to the policy."""
    row: Mapping[str, object] = field(default_factory=dict)
    """All columns of its row in the source, as JSON values; for scorers and algorithms."""
    source: str = ""
    """Name of the source it comes from."""
    scorers: tuple[str, ...] | None = None
    """Names of the scorers that judge it; None: all."""


def last_question(prompt: Prompt) -> str:
    """Return a prompt's last user message, or else its last message."""
    questions = [m["content"] for m in prompt.messages if m["role"] == "user"]
    return str(questions[-1] if questions else prompt.messages[-1]["content"])


def quoted(prompt: Prompt) -> str:
    """Return the beginning of a prompt's last question, for messages."""
    text = " ".join(last_question(prompt).split())
    return f"the prompt {text[:60] + '...' if len(text) > 60 else text!r}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Sampling parameters of the rollout role."""

    max_tokens: int
    """Limit on generated tokens."""
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 is off."""
    stop: tuple[str, ...] = ()
    """Strings that end a completion; the stop string is part of the text and the tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """Request to continue one token prefix, once per seed."""

    prompt_id: str
    number: int
    """Position among the requests of one prompt's exploration. Requests are ordered by
    (prompt_id, number), never by arrival."""
    token_ids: tuple[int, ...]
    """Prompt plus any prefix already generated."""
    policy: str = "policy"
    """Name of the policy that generates."""
    sampling: Sampling
    seeds: tuple[int, ...]
    """One completion per seed."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Completion(ByValue):
    """Generated text for one seed of one request, or an episode of several turns.

    Its arrays take eight bytes per token, twelve where several versions of the weights wrote it.
    """

    prompt_id: str
    index: int
    """Position of its seed in the request."""
    seed: int
    text: str
    """Decoded tokens without special tokens: what scorers judge. Of a thinking model, what follows
    the end of its thinking; of an episode, the last turn."""
    token_ids: TokenArray
    """Generated tokens, end-of-turn token included where the model generated one; of an episode,
    those of all turns, without the environment's."""
    logprobs: FloatArray
    """Log-prob of each token, in nats, among the whole vocabulary (top_p and top_k do not change
    it) at the campaign's train_temperature."""
    finish_reason: Literal["stop", "length"]
    """The engine's; "length" means truncated, and so does thinking that never ended."""
    thinking: str | None = None
    """What a thinking model wrote before its answer, markers included; None without. Followed by
    `text` it is the whole text."""
    thinking_tokens: int = 0
    """Number of token_ids that belong to the thinking, end marker included."""
    policy_version: int
    """Version of the weights that generated it, of its oldest token where there are several;
    staleness is computed from it, never assumed."""
    token_versions: TokenArray | None = None
    """Version of the weights that generated each token; None where it is policy_version for all."""
    episode: Episode | None = None
    """Of a prompt that an environment serves: its turns, replies and rewards."""

    def part(self, start: int, stop: int | None = None) -> Completion:
        """Return it with the tokens `start` to `stop` only, and with the same text."""
        versions = self.token_versions
        oldest = self.policy_version
        if versions is not None:
            oldest, versions = split_versions(versions[start:stop])
        return replace(
            self,
            token_ids=self.token_ids[start:stop],
            logprobs=self.logprobs[start:stop],
            policy_version=oldest,
            token_versions=versions,
        )


def split_versions(versions: TokenArray) -> tuple[int, TokenArray | None]:
    """Return the oldest of several tokens' versions, and all of them unless they are equal."""
    oldest = int(versions.min())
    return oldest, None if oldest == versions.max() else token_array(versions)


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeReply:
    """What a judge wrote about a completion: its reasons and its verdict."""

    text: str
    part: str = ""
    """Name of the part of the score that it belongs to."""
    against: int | None = None
    """Of a judge that compares: index of the other completion in the request. It was shown second,
    the completion that has this reply first."""
    left_out: bool = False
    """Whether it does not count: no verdict could be read in it, or it was cut off."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """A score, bounded by scorer/outcomes.py, and, for a weighted sum, its parts."""

    value: float
    parts: Mapping[str, float] = field(default_factory=dict)
    replies: tuple[JudgeReply, ...] = ()
    """What judges wrote, bounded by scorer/replies.py."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Invalid:
    """A scorer's reply that is not a score (NaN, None, wrong type, unparsable verdict)."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Skipped(Invalid):
    """A scorer's statement that it does not apply to a completion; others may score it.

    A combination leaves the scorer out for this completion.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """No reply from the scorer: it raised an error, timed out or crashed."""

    reason: str
    transient: bool = False
    """Whether a retry may succeed: the scorer, or a service behind it, could not be reached."""


Outcome = Scored | Invalid | Failed


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """Win probabilities for every pair among one prompt's K completions."""

    win: npt.NDArray[np.float64]
    """(K, K): win[i, j] is the probability that completion i beats completion j, as the scorer
    gave it: cycles are kept, nothing is rebuilt from scalars. The diagonal is 1/2 and
    win[i, j] + win[j, i] = 1. NaN where the scorer had no verdict on a pair. Only where its entry
    sets `comparisons` are pairs that it was not asked about fitted to the others."""
    source: Literal["pairwise", "pointwise"]
    """pointwise: sigmoids of score differences, transitive by construction."""
    replies: tuple[tuple[JudgeReply, ...], ...] = ()
    """What judges wrote: K entries, one per completion, or none."""

    def replies_about(self, index: int) -> tuple[JudgeReply, ...]:
        """Return what judges wrote about a completion, or about a pair that it stood first in."""
        return self.replies[index] if self.replies else ()


Comparison = Compared | Invalid | Failed


def win_rates(win: npt.NDArray[np.float64], *, include_self: bool) -> npt.NDArray[np.float64]:
    """Return each completion's mean win probability over its known opponents: (K, K) -> (K,).

    `include_self` counts a completion among its own opponents, with the 1/2 of the diagonal. Then
    the rate estimates P(completion beats the current policy) with the K completions as the policy's
    sample (SPPO, Wu et al. 2024, section 4), and rates have mean 1/2 where no pair is unknown.
    Without it, the rate is the score that a pairwise scorer gives a completion among the others.

    NaN for a completion that was compared with no other one; a single completion that is included
    in its own opponents has 1/2. Raises ValueError for a matrix that is not square.
    """
    matrix = np.asarray(win, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"the win matrix has shape {matrix.shape}, a square was expected")
    known = np.isfinite(matrix)
    others = known & ~np.eye(len(matrix), dtype=bool)
    opponents = known if include_self else others
    rates: npt.NDArray[np.float64] = np.full(len(matrix), np.nan)
    for i, row in enumerate(matrix):
        if others[i].any() or (include_self and len(matrix) == 1):
            rates[i] = row[opponents[i]].mean()
    return rates


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRequest:
    """Completions of one prompt to be scored.

    They are scored as text: a scorer has its own tokenizer and chat template.
    """

    prompt: Prompt
    completions: tuple[Completion, ...]
    number: int = 0
    """Position among the score requests of one prompt's exploration."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sample(ByValue):
    """A completion and its score.

    The samples of a search refer to their parents: together they are its tree.
    """

    completion: Completion
    outcome: Outcome | None
    """None where it was not scored (a step inside a tree, a judgement)."""
    kind: str = "answer"
    """"answer" for a whole completion of the prompt; otherwise the algorithm's own kind: step,
    judgement, refinement ..."""
    context_ids: TokenArray | None = None
    """The tokens it continues, where that is not the prompt alone."""
    parent: int | None = None
    """Index of its parent in the group."""
    stats: Mapping[str, float] = field(default_factory=dict)
    """The search's statistics: visits, q, depth, votes ..."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """All samples of one prompt."""

    prompt: Prompt
    samples: tuple[Sample, ...]
    compared: Compared | None = None
    """Comparison of the samples, where a pairwise scorer gave one."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Metrics of this exploration, under the algorithm's name; an iteration reports their means
    over prompts."""
    prompt_ids: TokenArray = field(init=False, repr=False, compare=False)
    """The prompt's tokens; all rows of the group share them."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt_ids", token_array(self.prompt.token_ids))

    def context_ids(self, index: int) -> TokenArray:
        """Return the tokens that a sample continues."""
        sample = self.samples[index]
        own = sample.context_ids
        if own is None and sample.completion.episode is not None:
            own = sample.completion.episode.context_ids
        return self.prompt_ids if own is None else own


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TopLogprobs(ByValue):
    """Log-probs of a response under a frozen model, and its k likeliest tokens at each position.

    4 + 8 k bytes per response token; in nats, temperature applied.
    """

    sampled: FloatArray
    """Of the response's own tokens: (T,)."""
    top_ids: TokenArray
    """The likeliest tokens, the likeliest first: (T, k)."""
    top: FloatArray
    """Their log-probs among the whole vocabulary: (T, k)."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Row(ByValue):
    """One unpadded token sequence to train on; only response tokens carry loss."""

    prompt_id: str
    sample: int
    """Index of the sample it was made from in its group, or GIVEN."""
    prompt_ids: TokenArray
    response_ids: TokenArray
    tokens: Mapping[str, FloatArray] = field(default_factory=dict)
    """Named values per response token, each of shape (len(response_ids),): behavior_logp,
    ref_logp, old_logp, value, advantage, return ..."""
    scalars: Mapping[str, float] = field(default_factory=dict)
    """Named values per row: score, truncated (0 or 1) ..."""
    inserted: Inserted | None = None
    """Tokens between those of the response, which carry no loss; all before its last token."""
    reference_top: TopLogprobs | None = None
    """The reference's likeliest tokens, for an algorithm that reads them."""

    def __len__(self) -> int:
        between = 0 if self.inserted is None else len(self.inserted.token_ids)
        return len(self.prompt_ids) + len(self.response_ids) + between

    @property
    def fed_ids(self) -> TokenArray:
        """Tokens that go through the model: all but the last."""
        response = self.response_ids
        if self.inserted is not None:
            response = self.inserted.fill(response)
        return np.concatenate((self.prompt_ids, response[:-1]))

    @property
    def predicted_at(self) -> npt.NDArray[np.int64]:
        """Places in fed_ids that predict the response tokens: (len(response_ids),)."""
        tokens = len(self.response_ids)
        own = np.arange(tokens) if self.inserted is None else self.inserted.positions(tokens)
        return own + (len(self.prompt_ids) - 1)

    def with_tokens(self, top: TopLogprobs | None = None, /, **named: FloatArray) -> Row:
        """Return the row with further token values, or with the reference's likeliest tokens.

        Raises ValueError for a wrong shape.
        """
        for name, values in named.items():
            if values.shape != (len(self.response_ids),):
                raise ValueError(
                    f"{name} has shape {values.shape}, "
                    f"the response has {len(self.response_ids)} tokens"
                )
        # `dataclasses.replace` is three times slower, and an iteration may have millions of rows.
        return Row(
            prompt_id=self.prompt_id,
            sample=self.sample,
            prompt_ids=self.prompt_ids,
            response_ids=self.response_ids,
            tokens={**self.tokens, **named},
            scalars=self.scalars,
            inserted=self.inserted,
            reference_top=top or self.reference_top,
        )


GIVEN = -1
"""`Row.sample` of a row whose response is not one of its group's samples."""


PEOPLE = "people"
"""`Example.objective` of a pair that waits for people's verdicts: it is not trained on."""


def make_row(group: Group, index: int, *, score: float) -> Row:
    """Return the training row of one sample, with its behavior log-probs.

    An episode's has each turn's reward as turn_reward.
    """
    completion = group.samples[index].completion
    tokens = {"behavior_logp": completion.logprobs}
    episode = completion.episode
    if episode is not None:
        tokens["turn_reward"] = episode.token_rewards(len(completion.token_ids))
    return Row(
        prompt_id=group.prompt.prompt_id,
        sample=index,
        prompt_ids=group.context_ids(index),
        response_ids=completion.token_ids,
        tokens=tokens,
        scalars={"score": score, "truncated": float(completion.finish_reason == "length")},
        inserted=None if episode is None else episode.inserted,
    )


def given_row(
    prompt_id: str,
    prompt_ids: Iterable[int],
    response_ids: Iterable[int],
    *,
    score: float = math.nan,
    inserted: Inserted | None = None,
) -> Row:
    """Return the training row of a response that was not sampled in this campaign.

    Its behavior log-probs are unknown: NaN.
    """
    response = token_array(response_ids)
    return Row(
        prompt_id=prompt_id,
        sample=GIVEN,
        prompt_ids=token_array(prompt_ids),
        response_ids=response,
        tokens={"behavior_logp": np.full(len(response), np.nan, dtype=np.float32)},
        scalars={"score": score, "truncated": 0.0},
        inserted=inserted,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """Rows that one loss term needs together: one row, or (chosen, rejected) for a pair."""

    rows: tuple[Row, ...]
    scalars: Mapping[str, float] = field(default_factory=dict)
    """Named values per example: margin ... Every example of a batch has the same names."""
    objective: str = "policy"
    """The training objective it belongs to: examples of one objective share a loss, a learner and
    batches."""
    iterations_back: int = 0
    """How many iterations ago its samples were drawn: 0 is this one."""

    def __len__(self) -> int:
        """Return the number of tokens to compute."""
        return sum(len(row) for row in self.rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The examples of one optimizer step."""

    examples: tuple[Example, ...]
    temperature: float = 1.0
    """The campaign's train_temperature: the learner divides its logits by it before log-softmax."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """Position of one parameter in a bucket."""

    name: str
    """Hugging Face parameter name."""
    dtype: str
    """torch dtype name, for example "float32"."""
    shape: tuple[int, ...]
    offset: int
    """Bytes from the bucket's start, a multiple of 16."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightBucket:
    """Several parameters in one flat uint8 buffer."""

    tensors: tuple[TensorSpec, ...]
    payload: Any
    """numpy uint8 array, or a transport's handle to the bytes: a Ray ObjectRef, or CUDA IPC handles
    by learner rank; None where the bytes are broadcast."""
    checksum: str
    """Checksum of the payload's bytes; empty for broadcast, which sends it with the bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """A fixed token sequence and its log-probs under the learner.

    An engine that loaded the weights must agree with them.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """log p(token_ids[i+1] | token_ids[:i+1]) in nats, temperature 1: one fewer than token_ids."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightSnapshot:
    """One version of the policy's weights, ready to be sent to the engines."""

    version: int
    buckets: tuple[WeightBucket, ...]
    """Whole parameters under their Hugging Face names; with LoRA only the trained ones
    (rayhf/weights/lora.py)."""
    checksum: str
    """Checksum over the bucket checksums, in order."""
    probe: Probe
    transport: TransportName = "object_store"
