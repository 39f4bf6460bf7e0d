"""The nouns, one frozen dataclass per stage of a prompt's journey.

Prompt -> GenerateRequest -> Completion -> Sample (a completion and its Outcome) -> Group (what one
prompt's exploration brought back) -> Example (rows that must be trained together: one row, a pair,
...) -> Batch (one optimizer step). Nothing is filled in later by somebody else: a stage that adds
something returns a new object.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import JsonValue

FloatArray = npt.NDArray[np.float32]
JsonObject = dict[str, JsonValue]
"""A JSON object as Python values: what checkpoints and service messages store."""
Message = Mapping[str, str]
"""{"role": ..., "content": ...}, as chat templates expect it."""
TransportName = Literal["object_store", "broadcast", "cuda_ipc"]
"""How weights get from the learner to the engines: through Ray's object store; from device to
device through a process group; by copying out of a neighbor's memory on the same GPU."""


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from its parts (campaign seed, iteration, prompt id, ...), never from arrival
    order or a stream."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A question, rendered for the policy."""

    prompt_id: str
    """Stable hash of messages and answer; the key of everything that happens to this prompt."""
    messages: tuple[Message, ...]
    """What the user asked, before any chat template; scorers with another tokenizer start from
    here."""
    token_ids: tuple[int, ...]
    """Under the policy's tokenizer and chat template, generation prompt included."""
    answer: str | None = None
    """Reference answer for verifiers; never shown to the policy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the rollout role draws tokens."""

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
    """Continue one token prefix, once per seed."""

    prompt_id: str
    number: int
    """Counts the requests of one prompt's exploration: (prompt_id, number) orders requests, never
    arrival."""
    token_ids: tuple[int, ...]
    """Prompt plus any prefix already written."""
    policy: str = "policy"
    """Which of the campaign's policies writes."""
    sampling: Sampling
    seeds: tuple[int, ...]
    """One completion per seed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What the rollout role returns for one seed of one request."""

    prompt_id: str
    index: int
    """Position of its seed in the request."""
    seed: int
    text: str
    """Decoded response without special tokens."""
    token_ids: tuple[int, ...]
    """The response, end-of-turn token included where the model wrote one."""
    logprobs: tuple[float, ...]
    """Under the sampling policy (temperature applied), one per token, in nats."""
    finish_reason: Literal["stop", "length"]
    """From the engine; "length" means truncated."""
    policy_version: int
    """Weights that wrote it; staleness is computed, never assumed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """A finite score and, for a weighted sum, the parts it was made of."""

    value: float
    parts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Invalid:
    """The scorer answered, but not with a score (NaN, None, wrong type, unparsable verdict)."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """The scorer did not answer (it raised, it timed out, it died)."""

    reason: str
    transient: bool = False
    """It may answer when it is asked again: it, or a service behind it, could not be reached."""


Outcome = Scored | Invalid | Failed


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """What a scorer said of every pair among one prompt's K answers."""

    win: npt.NDArray[np.float64]
    """(K, K): win[i, j] is the probability that answer i beats answer j, as it was given: cycles
    are kept, nothing is rebuilt from scalars. The diagonal is 1/2 and win[i, j] + win[j, i] = 1.
    NaN where the scorer had no verdict on a pair."""
    source: Literal["pairwise", "pointwise"]
    """pointwise: sigmoids of score differences, transitive by construction."""


Comparison = Compared | Invalid | Failed


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRequest:
    """Completions of one prompt, to be judged as text: a scorer has its own tokenizer and chat
    template."""

    prompt: Prompt
    completions: tuple[Completion, ...]
    number: int = 0
    """Counts the judgements of one prompt's exploration, as GenerateRequest.number counts its
    generations."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A completion and what its scorer said. A search's samples point to their parents: they are
    its tree."""

    completion: Completion
    outcome: Outcome | None
    """None: no scorer was asked (a step inside a tree, a judgement)."""
    kind: str = "answer"
    """answer, or what the algorithm calls it: step, judgement, refinement ..."""
    context_ids: tuple[int, ...] | None = None
    """The tokens it continues, where that is not the prompt alone."""
    parent: int | None = None
    """Index in its group of the sample it grew from."""
    stats: Mapping[str, float] = field(default_factory=dict)
    """What the search learned of it: visits, q, depth, votes ..."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """What one prompt's exploration brought back."""

    prompt: Prompt
    samples: tuple[Sample, ...]
    compared: Compared | None = None
    """Over the samples, where a pairwise scorer was asked and answered."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Of this exploration, under the algorithm's name; the round reports means over prompts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One token sequence to train on. Only response tokens carry loss; there is no padding here."""

    prompt_id: str
    sample: int
    """Index into its group's samples: the lineage of the row."""
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    tokens: Mapping[str, FloatArray] = field(default_factory=dict)
    """Named values per response token, each of shape (len(response_ids),): behavior_logp,
    ref_logp, old_logp, value, advantage, return ..."""
    scalars: Mapping[str, float] = field(default_factory=dict)
    """Named values per row: score, truncated (0 or 1) ..."""

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)

    def with_tokens(self, **named: FloatArray) -> Row:
        for name, values in named.items():
            if values.shape != (len(self.response_ids),):
                raise ValueError(
                    f"{name} has shape {values.shape}, the response has {len(self.response_ids)} tokens"
                )
        return Row(  # `replace` takes three times as long, and a round may have millions of rows
            prompt_id=self.prompt_id,
            sample=self.sample,
            prompt_ids=self.prompt_ids,
            response_ids=self.response_ids,
            tokens={**self.tokens, **named},
            scalars=self.scalars,
        )


GIVEN = -1
"""`Row.sample` of a row whose response is not one of its group's samples."""


def make_row(group: Group, index: int, *, score: float) -> Row:
    """Return the training row of one sample, with its behavior log-probs."""
    sample = group.samples[index]
    completion = sample.completion
    return Row(
        prompt_id=group.prompt.prompt_id,
        sample=index,
        prompt_ids=group.prompt.token_ids if sample.context_ids is None else sample.context_ids,
        response_ids=completion.token_ids,
        tokens={"behavior_logp": np.asarray(completion.logprobs, dtype=np.float32)},
        scalars={"score": score, "truncated": float(completion.finish_reason == "length")},
    )


def given_row(
    prompt_id: str,
    prompt_ids: Sequence[int],
    response_ids: Sequence[int],
    *,
    score: float = math.nan,
) -> Row:
    """Return the training row of a response that no policy of this campaign sampled.

    Its behavior log-probs are unknown: NaN.
    """
    return Row(
        prompt_id=prompt_id,
        sample=GIVEN,
        prompt_ids=tuple(prompt_ids),
        response_ids=tuple(response_ids),
        tokens={"behavior_logp": np.full(len(response_ids), np.nan, dtype=np.float32)},
        scalars={"score": score, "truncated": 0.0},
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """Rows that one loss term needs together: one row for policy gradients, (chosen, rejected) for
    a pair."""

    rows: tuple[Row, ...]
    scalars: Mapping[str, float] = field(default_factory=dict)
    """Named values per example: margin ... Every example of a batch has the same names."""
    objective: str = "policy"
    """Which of the algorithm's objectives it serves: examples of one objective share a loss, a
    learner and batches."""
    iterations_back: int = 0
    """How many iterations ago its samples were drawn: 0 is this one."""

    def __len__(self) -> int:
        """Tokens to compute."""
        return sum(len(row) for row in self.rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What one optimizer step sees."""

    examples: tuple[Example, ...]
    temperature: float = 1.0
    """Logits are divided by it before log-softmax, so that the learner scores the policy that
    sampled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """Where one parameter lies in a bucket."""

    name: str
    """Hugging Face parameter name."""
    dtype: str
    """torch dtype name, for example "float32"."""
    shape: tuple[int, ...]
    offset: int
    """Bytes from the bucket's start, a multiple of 16."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightBucket:
    """Many parameters in one flat uint8 buffer."""

    tensors: tuple[TensorSpec, ...]
    payload: Any
    """numpy uint8 array, or a transport's handle to the bytes: a Ray ObjectRef, CUDA IPC handles by
    learner rank; None where the bytes come by broadcast."""
    checksum: str
    """Of the payload's bytes; empty where they come by broadcast and bring it along."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """A fixed token sequence and its log-probs under the learner: an engine that got the weights
    must agree."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """log p(token_ids[i+1] | token_ids[:i+1]) in nats, temperature 1: one fewer than token_ids."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightSnapshot:
    """One version of the policy's weights on its way to the engines that need it."""

    version: int
    buckets: tuple[WeightBucket, ...]
    """Whole parameters under their Hugging Face names; with LoRA what is trained
    (rayhf/weights/lora.py)."""
    checksum: str
    """Over the bucket checksums, in order."""
    probe: Probe
    transport: TransportName = "object_store"
