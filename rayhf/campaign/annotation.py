"""Token values that credit and loss read: of the reference, the critic, the learner before a step.

Reference and critic get an iteration's rows in requests of a fixed number of prompts each. With
streaming (`reference.stream`, `learner.stream_values`) a request is sent as soon as its prompts are
explored, for the rows that `select` makes of these prompts alone. Where the selection from the
whole iteration has the same rows of them, its result is taken; else the request is made again.
Log-probs and values therefore do not depend on streaming.

Synchronization: the requests to all roles run concurrently; the roles divide them into chunks. What
is done for every row of an iteration runs in threads, beside the event loop.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rayhf.algorithms.base import Algorithm, SelectionContext, reference_top_k
from rayhf.algorithms.streaming import streams_reference, streams_values
from rayhf.config.schema import CampaignConfig, LearnerConfig, ReferenceConfig
from rayhf.monitoring.observer import Observer
from rayhf.roles import Progress, Roles
from rayhf.types import FloatArray, Group, Prompt, Row, TopLogprobs

Timed = Callable[[str], AbstractAsyncContextManager[None]]
Values = Sequence[FloatArray | TopLogprobs]
"""Token values of each row."""


@dataclass(frozen=True, slots=True)
class _Source:
    """A role that computes token values in requests of its own size."""

    role: str
    column: str
    compute: Callable[[Sequence[Row]], Coroutine[Any, Any, Values]]
    prompts: int
    """Prompts of a request."""
    is_streamed: bool


class Annotator:
    """Computes the token values of an iteration's rows.

    Args:
        config: the campaign's.
        algorithm: says which values it reads.
        roles: compute them.
        observer: receives how many requests and chunks are done.
        context: returns an iteration's selection context.
        past: returns the past policies that an iteration reads, newest first.
        timed: measures a phase.
    """

    def __init__(
        self,
        config: CampaignConfig,
        *,
        algorithm: Algorithm,
        roles: Roles,
        observer: Observer,
        context: Callable[[int], SelectionContext],
        past: Callable[[int], Sequence[Path]],
        timed: Timed,
    ) -> None:
        self._temperature = config.train_temperature
        self._algorithm = algorithm
        self._roles = roles
        self._observer = observer
        self._context = context
        self._past = past
        self._timed = timed
        self._sources = self._sources_of(config)
        self._streams: dict[int, dict[str, _Stream]] = {}
        """By iteration, while it is explored, and by role."""

    def _sources_of(self, config: CampaignConfig) -> list[_Source]:
        completions = max(1, self._algorithm.samples) * config.rollout.max_tokens

        def prompts(settings: ReferenceConfig | LearnerConfig) -> int:
            """Return as many as fit into a forward pass of all ranks at their longest."""
            return max(1, settings.ranks * settings.token_budget // completions)

        sources = []
        compute: Callable[[Sequence[Row]], Coroutine[Any, Any, Values]]
        if (reference := self._roles.reference) is not None:
            compute = partial(reference.logprobs, temperature=self._temperature)
            if top_k := reference_top_k(self._algorithm):
                compute = partial(
                    reference.top_logprobs, temperature=self._temperature, top_k=top_k
                )
            streamed = streams_reference(config, self._algorithm)
            size = prompts(config.reference)
            sources.append(_Source("reference", "ref_logp", compute, size, streamed))
        if (critic := self._roles.critic) is not None:
            compute = partial(critic.outputs, temperature=1.0)
            streamed = streams_values(config, self._algorithm)
            size = prompts(config.learner)
            sources.append(_Source("critic", "value", compute, size, streamed))
        return sources

    def stream(self, iteration: int, prompts: Sequence[Prompt]) -> Callable[[Group], None]:
        """Return what is to be called with each group of an iteration as it is finished."""
        prompt_ids = [prompt.prompt_id for prompt in prompts]
        select = partial(self._select, iteration)
        streams = {
            source.role: _Stream(_places(prompt_ids, (), source.prompts), select, source.compute)
            for source in self._sources
            if source.is_streamed
        }
        self._streams[iteration] = streams

        def add(group: Group) -> None:
            for stream in streams.values():
                stream.add(group)

        return add

    def _select(self, iteration: int, groups: Sequence[Group]) -> list[Row]:
        """Return the rows that the policy is trained on if an iteration has only these groups."""
        own = {group.prompt.prompt_id for group in groups}
        examples = self._algorithm.select(groups, self._context(iteration)).examples
        return [
            row
            for example in examples
            if example.objective == "policy"
            for row in example.rows
            if row.prompt_id in own
        ]

    async def annotate(
        self,
        iteration: int,
        prompt_ids: Sequence[str],
        rows: Sequence[Row],
        *,
        old_logp: bool,
        metrics: dict[str, float],
    ) -> list[Row]:
        """Return the rows with ref_logp, value, old_logp and past_logp_*, as far as needed.

        Args:
            iteration: their iteration.
            prompt_ids: its prompts; rows may have others.
            rows: to annotate.
            old_logp: whether the learner's log-probs are needed besides where it is the reference.
            metrics: gets the shares of the rows that were streamed.
        """
        schedule = self._algorithm.reference
        learner_is_reference = schedule is not None and schedule.is_learner
        report = _Report(self._observer, iteration)
        work: dict[str, Awaitable[Values]] = {
            source.column: self._request(
                source, iteration, prompt_ids, rows, report.of(source.column), metrics
            )
            for source in self._sources
        }
        if learner_is_reference or old_logp:
            work["old_logp"] = self._roles.learners["policy"].outputs(
                rows, temperature=self._temperature, progress=report.of("old_logp")
            )
        if not work:
            return list(rows)
        self._observer.phase(iteration, "reference")
        async with self._timed("reference"):
            columns = await asyncio.gather(*work.values())
            named: dict[str, Values] = dict(zip(work, columns, strict=True))
            named |= await self._past_logp(iteration, rows)
        if learner_is_reference:
            named["ref_logp"] = named["old_logp"]
        return await asyncio.to_thread(_with_columns, rows, named)

    async def _past_logp(self, iteration: int, rows: Sequence[Row]) -> dict[str, Values]:
        """Return the log-probs of the past policies, one after the other: each is loaded once."""
        columns: dict[str, Values] = {}
        for number, model in enumerate(self._past(iteration), start=1):
            assert self._roles.reference is not None  # check_reference
            columns[f"past_logp_{number}"] = await self._roles.reference.logprobs(
                rows, temperature=self._temperature, model=model
            )
        return columns

    async def _request(
        self,
        source: _Source,
        iteration: int,
        prompt_ids: Sequence[str],
        rows: Sequence[Row],
        progress: Progress,
        metrics: dict[str, float],
    ) -> Values:
        """Return the token values of each row."""
        requests = await asyncio.to_thread(_requests, prompt_ids, rows, source.prompts)
        stream = self._streams.get(iteration, {}).pop(source.role, None)
        done = 0
        streamed = 0

        async def request(place: int, indices: Sequence[int]) -> Values:
            nonlocal done, streamed
            chosen = [rows[i] for i in indices]
            sent = stream.take(place, chosen) if stream is not None else None
            streamed += len(chosen) if sent is not None else 0
            values = await (sent or source.compute(chosen))
            done += 1
            progress(done, len(requests))
            return values

        try:
            results = await asyncio.gather(*(request(*each) for each in requests.items()))
        finally:
            if stream is not None:
                await stream.close()
        if stream is not None:
            metrics[f"{source.role}/streamed"] = streamed / max(1, len(rows))
        return await asyncio.to_thread(_by_row, requests.values(), results)

    async def close(self, iteration: int | None = None) -> None:
        """Cancel the requests that no rows of an iteration, or of any, have taken."""
        for number in list(self._streams) if iteration is None else [iteration]:
            for stream in self._streams.pop(number, {}).values():
                await stream.close()


@dataclass(frozen=True, slots=True)
class _Sent:
    """A request that was sent while its iteration was explored."""

    rows: Sequence[Row]
    values: asyncio.Task[Values]


class _Stream:
    """Requests to one role while an iteration is explored."""

    def __init__(
        self,
        places: dict[str, int],
        select: Callable[[Sequence[Group]], list[Row]],
        compute: Callable[[Sequence[Row]], Coroutine[Any, Any, Values]],
    ) -> None:
        self._places = places
        self._order = {prompt_id: number for number, prompt_id in enumerate(places)}
        self._sizes = Counter(places.values())
        """Number of prompts, by request."""
        self._groups: dict[int, list[Group]] = {}
        """Finished groups of requests that are not complete."""
        self._select = select
        self._compute = compute
        self._sent: dict[int, _Sent] = {}
        # Groups are finished on the exploration's own event loop.
        self._loop = asyncio.get_running_loop()

    def add(self, group: Group) -> None:
        """Take a finished group; send the request that it completes.

        Prompts that replace others later (refills) belong to no request yet.
        """
        place = self._places.get(group.prompt.prompt_id)
        if place is None:
            return
        groups = self._groups.setdefault(place, [])
        groups.append(group)
        if len(groups) < self._sizes[place]:
            return
        del self._groups[place]
        groups.sort(key=lambda each: self._order[each.prompt.prompt_id])
        if rows := self._select(groups):
            self._sent[place] = _Sent(rows, self._loop.create_task(self._compute(rows)))

    def take(self, place: int, rows: Sequence[Row]) -> asyncio.Task[Values] | None:
        """Return the request's token values where it was sent for the same rows."""
        sent = self._sent.get(place)
        if sent is None or not _same_rows(sent.rows, rows):
            return None
        del self._sent[place]
        return sent.values

    async def close(self) -> None:
        """Cancel the requests whose token values nobody took."""
        tasks = [sent.values for sent in self._sent.values()]
        self._sent.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _Report:
    """Progress of several calls as that of one phase."""

    def __init__(self, observer: Observer, iteration: int) -> None:
        self._observer = observer
        self._iteration = iteration
        self._counts: dict[str, tuple[int, int]] = {}

    def of(self, name: str) -> Progress:
        """Return the function that receives the progress of one call."""

        def report(done: int, total: int) -> None:
            self._counts[name] = (done, total)
            self._observer.phase(
                self._iteration,
                "reference",
                sum(count for count, _ in self._counts.values()),
                sum(count for _, count in self._counts.values()),
            )

        return report


def _requests(prompt_ids: Sequence[str], rows: Sequence[Row], size: int) -> dict[int, list[int]]:
    """Return the indices of the rows of each request, which is for up to `size` prompts."""
    places = _places(prompt_ids, (row.prompt_id for row in rows), size)
    requests: dict[int, list[int]] = {}
    for index, row in enumerate(rows):
        requests.setdefault(places[row.prompt_id], []).append(index)
    return requests


def _by_row(requests: Iterable[Sequence[int]], results: Iterable[Values]) -> Values:
    """Return the results of requests for rows in the rows' order."""
    by_row = {
        index: value
        for indices, values in zip(requests, results, strict=True)
        for index, value in zip(indices, values, strict=True)
    }
    return [by_row[index] for index in range(len(by_row))]


def _places(prompt_ids: Sequence[str], others: Iterable[str], size: int) -> dict[str, int]:
    """Return the number of each prompt's request: `size` consecutive prompts share one.

    Prompts that are not the iteration's have requests of their own.
    """
    own = {prompt_id: number for number, prompt_id in enumerate(dict.fromkeys(prompt_ids))}
    places = {prompt_id: number // size for prompt_id, number in own.items()}
    further = (prompt_id for prompt_id in dict.fromkeys(others) if prompt_id not in own)
    first = -(-len(own) // size)
    return places | {prompt_id: first + number // size for number, prompt_id in enumerate(further)}


def _with_columns(rows: Sequence[Row], named: Mapping[str, Values]) -> list[Row]:
    """Return the rows with a value each of every column."""
    of_rows = zip(*named.values(), strict=True)
    return [
        _with_values(row, dict(zip(named, values, strict=True)))
        for row, values in zip(rows, of_rows, strict=True)
    ]


def _with_values(row: Row, values: Mapping[str, FloatArray | TopLogprobs]) -> Row:
    """Return the row with token values by name; likeliest tokens are the reference's."""
    arrays: dict[str, FloatArray] = {}
    top: TopLogprobs | None = None
    for name, value in values.items():
        if isinstance(value, TopLogprobs):
            top = value
            arrays[name] = value.sampled
        else:
            arrays[name] = value
    return row.with_tokens(top, **arrays)


def _same_rows(first: Sequence[Row], second: Sequence[Row]) -> bool:
    return len(first) == len(second) and all(
        a.prompt_id == b.prompt_id
        and np.array_equal(a.prompt_ids, b.prompt_ids)
        and np.array_equal(a.response_ids, b.response_ids)
        and a.inserted == b.inserted
        for a, b in zip(first, second, strict=True)
    )
