"""The journal: an interrupted iteration repeats no request, and ends with the same result."""

import asyncio
import gc
import math
import struct
import zlib

import numpy as np
import pytest
from campaigns import make_config, metrics_of, run_campaign
from fakes import FakeLearner, FakeRollout, FakeScorer

from rayhf.exploration.codecs import COMPARE, GENERATE, SCORE
from rayhf.exploration.journal import Journal
from rayhf.types import (
    Compared,
    Completion,
    Failed,
    GenerateRequest,
    Invalid,
    Prompt,
    Sampling,
    Scored,
    ScoreRequest,
    Skipped,
    float_array,
    token_array,
)


def generation(number=0, seeds=(3, 4), policy="policy", **sampling):
    settings = Sampling(max_tokens=8, **sampling)
    return GenerateRequest(
        prompt_id="p",
        number=number,
        token_ids=(1, 2),
        sampling=settings,
        seeds=seeds,
        policy=policy,
    )


def completions(request, logprob=-0.1):
    return tuple(
        Completion(
            prompt_id="p",
            index=i,
            seed=seed,
            text="é\ud800\n",
            token_ids=token_array((5, 70_000)),
            logprobs=float_array((logprob, -math.pi)),
            finish_reason="length",
            policy_version=7,
        )
        for i, seed in enumerate(request.seeds)
    )


def judgement(number=0):
    prompt = Prompt(prompt_id="p", messages=({"role": "user", "content": "?"},), token_ids=(1,))
    return ScoreRequest(prompt=prompt, completions=completions(generation()), number=number)


def record(journal, *call):
    """Add one call's responses and write them."""
    journal.add(*call)
    journal.flush()


COMPARED = Compared(win=np.array([[0.5, 1 / 3], [2 / 3, 0.5]]), source="pairwise")


def test_responses_are_restored_exactly(tmp_path):
    journal = Journal(tmp_path / "j")
    request = generation()
    record(journal, GENERATE, [request], [completions(request)])
    outcomes = (
        Scored(value=0.1, parts={"a": 1e-300}),
        Invalid(reason="NaN"),
        Skipped(reason="None"),
    )
    record(journal, SCORE, [judgement()], [outcomes], {"seen": 3})
    record(journal, COMPARE, [judgement(1), judgement(2)], [COMPARED, Invalid(reason="no verdict")])
    journal.close()
    again = Journal(tmp_path / "j")
    assert len(again) == 4 and again.scorer_state == {"seen": 3}
    assert again.recall(GENERATE, request) == completions(request)
    assert again.recall(SCORE, judgement()) == outcomes
    compared = again.recall(COMPARE, judgement(1))
    assert np.array_equal(compared.win, COMPARED.win) and compared.source == "pairwise"
    assert again.recall(COMPARE, judgement(2)) == Invalid(reason="no verdict")
    assert again.recall(GENERATE, request) is None  # each response is recalled once


def test_scores_of_functions_that_changed_are_not_recalled(tmp_path):
    journal = Journal(tmp_path / "j", functions_hash="a")
    record(journal, GENERATE, [generation()], [completions(generation())])
    record(journal, SCORE, [judgement()], [(Scored(value=1.0),)], {"seen": 1})
    journal.close()
    same = Journal(tmp_path / "j", functions_hash="a")
    assert same.recall(SCORE, judgement()) == (Scored(value=1.0),)
    assert same.scorer_state == {"seen": 1}
    changed = Journal(tmp_path / "j", functions_hash="b")
    assert changed.recall(SCORE, judgement()) is None and changed.scorer_state is None
    assert changed.recall(GENERATE, generation()) == completions(generation())


def test_added_responses_are_written_together_and_on_close(tmp_path):
    journal = Journal(tmp_path / "j")
    exact = completions(generation(0), logprob=-0.5)
    wide = completions(generation(1))
    journal.add(GENERATE, [generation(0)], [exact])
    journal.add(SCORE, [judgement()], [(Scored(value=1.0),)], {"seen": 1})
    assert (tmp_path / "j").stat().st_size == 0
    journal.flush()
    size = (tmp_path / "j").stat().st_size
    journal.flush()
    assert (tmp_path / "j").stat().st_size == size > 0
    journal.add(GENERATE, [generation(1)], [wide])
    journal.close()
    again = Journal(tmp_path / "j")
    assert again.scorer_state == {"seen": 1}
    assert (
        again.recall(GENERATE, generation(0)) == exact
        and again.recall(GENERATE, generation(1)) == wide
    )
    assert again.recall(SCORE, judgement()) == (Scored(value=1.0),)


@pytest.mark.parametrize("cancelled", [False, True])
def test_records_written_beside_the_event_loop_keep_their_order(tmp_path, cancelled):
    journal = Journal(tmp_path / "j")

    async def work():
        writes = []
        for number in range(20):
            scored = (Scored(value=float(number)),)
            journal.add(SCORE, [judgement(number)], [scored], {"seen": number})
            writes.append(asyncio.create_task(journal.flush_beside()))
            await asyncio.sleep(0)
        if cancelled:
            for write in writes:
                write.cancel()
        await asyncio.gather(*writes, return_exceptions=cancelled)

    asyncio.run(work())
    journal.close()
    again = Journal(tmp_path / "j")
    assert len(again) == 20 and again.scorer_state == {"seen": 19}


def test_journal_of_another_format_is_dropped(tmp_path):
    # The first format.
    body = zlib.compress(b'{"making": "", "keys": ["generate p 0 00"], "answers": [[]]}')
    (tmp_path / "j").write_bytes(struct.pack("<II", len(body), zlib.crc32(body)) + body)
    assert len(Journal(tmp_path / "j")) == 0


@pytest.mark.parametrize(
    "other",
    [
        generation(1),
        generation(seeds=(3, 5)),
        generation(policy="refiner"),
        generation(temperature=0.5),
    ],
)
def test_other_requests_are_not_answered(tmp_path, other):
    journal = Journal(tmp_path / "j")
    record(journal, GENERATE, [generation()], [completions(generation())])
    journal.close()
    assert Journal(tmp_path / "j").recall(GENERATE, other) is None


def test_call_with_a_failure_is_not_recorded(tmp_path):
    journal = Journal(tmp_path / "j")
    record(
        journal,
        SCORE,
        [judgement(0), judgement(1)],
        [(Scored(value=1.0),) * 2, (Scored(value=1.0), Failed(reason="gone"))],
    )
    record(journal, COMPARE, [judgement(2)], [Failed(reason="gone")])
    journal.close()
    assert len(Journal(tmp_path / "j")) == 0


def test_damaged_end_is_truncated_and_appended_to(tmp_path):
    path = tmp_path / "j"
    journal = Journal(path)
    sizes = []
    for number in range(4):
        record(journal, GENERATE, [generation(number)], [completions(generation(number))])
        sizes.append(path.stat().st_size)
    journal.close()
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(200):
        place = int(rng.integers(len(whole)))
        flipped = bytearray(whole)
        flipped[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(flipped)
        before = sum(size <= place for size in sizes)  # records that end before the damage
        damaged = Journal(path)
        assert len(damaged) == before
        record(damaged, GENERATE, [generation(9)], [completions(generation(9))])
        damaged.close()
        again = Journal(path)
        assert len(again) == before + 1 and again.recall(GENERATE, generation(9)) is not None
        again.close()
        path.write_bytes(whole[:place])
        torn = Journal(path)
        assert len(torn) == before
        torn.close()


class Killed(FakeRollout):
    """Is killed at its n-th call."""

    def __init__(self, at, version=0):
        super().__init__()
        self.at = at
        self.version = version

    async def generate(self, requests, *, version):
        if len(self.calls) >= self.at:
            raise KeyboardInterrupt
        return await super().generate(requests, version=version)


@pytest.mark.parametrize("algorithm", ["online_dpo", "tree_search"])
def test_killed_iteration_repeats_no_call(tmp_path, algorithm):
    """Killed at every call in turn, a campaign ends the same and repeats no answered wave."""
    settings = {
        "online_dpo": None,
        "tree_search": {"type": "mcts_dpo", "iterations": 3, "step_tokens": 3, "max_steps": 2},
    }
    whole = make_config(
        tmp_path / "whole",
        algorithm=settings[algorithm],
        run={"iterations": 2, "checkpoint_every": 1, "eval_every": 0},
    )
    every = FakeRollout()
    run_campaign(whole, rollout=every)
    calls = len(every.calls)
    assert calls > 4
    for at in range(1, calls, 2):
        config = make_config(
            tmp_path / str(at),
            algorithm=settings[algorithm],
            run={"iterations": 2, "checkpoint_every": 1, "eval_every": 0},
        )
        first = Killed(at)
        second = FakeRollout()
        with pytest.raises(KeyboardInterrupt):
            run_campaign(config, rollout=first)
        run_campaign(config, rollout=second)
        assert metrics_of(config) == metrics_of(whole)
        sent = first.calls + second.calls
        # Only evaluations are repeated: they are not part of an iteration's exploration.
        explored = [call for call in sent if call in every.calls[1:]]
        assert len(explored) <= calls + 2, (at, len(explored), calls)


def test_killed_iteration_leaves_no_unretrieved_exception(tmp_path, caplog):
    """The garbage collector would report one at a random later point."""
    with pytest.raises(KeyboardInterrupt):
        run_campaign(make_config(tmp_path), rollout=Killed(3))
    gc.collect()
    assert [record.getMessage() for record in caplog.records] == []


def test_scorer_state_is_restored_with_the_journal(tmp_path):
    class Learns(FakeScorer):
        seen = 0

        async def score(self, requests):
            self.seen += len(requests)
            return await super().score(requests)

        async def state_dict(self):
            return {"seen": self.seen}

        async def load_state_dict(self, state):
            self.seen = state["seen"]

    config = make_config(tmp_path, run={"iterations": 1, "eval_every": 0})
    with pytest.raises(RuntimeError, match="killed"):
        run_campaign(config, scorer=Learns(), learner=FakeLearner(fail_at=0))
    scorer = Learns()
    run_campaign(config, scorer=scorer)
    assert scorer.seen == 4  # the iteration's prompts, counted once


def test_journal_of_another_config_is_dropped(tmp_path):
    journal = Journal(tmp_path / "j", config_hash="lr 1e-3")
    record(journal, GENERATE, [generation()], [completions(generation())])
    journal.close()
    assert len(Journal(tmp_path / "j", config_hash="lr 1e-4")) == 0
    config = make_config(tmp_path, run={"eval_every": 0, "checkpoint_every": 0})
    with pytest.raises(RuntimeError, match="killed"):
        run_campaign(config, learner=FakeLearner(fail_at=2))
    same = FakeRollout()
    changed = FakeRollout()
    other = make_config(tmp_path, run={"eval_every": 0, "checkpoint_every": 0}, learner={"lr": 0.5})
    with pytest.raises(RuntimeError, match="killed"):
        run_campaign(config, rollout=same, learner=FakeLearner(fail_at=2))
    with pytest.raises(RuntimeError, match="killed"):
        run_campaign(other, rollout=changed, learner=FakeLearner(fail_at=2))
    assert len(changed.calls) == len(same.calls) + 3  # its iterations are explored again


def test_nothing_is_recorded_after_a_scorer_failure(tmp_path):
    journal = Journal(tmp_path / "j")
    fine = (Scored(value=1.0),) * 2
    record(journal, SCORE, [judgement(0)], [fine], {"seen": 1})
    record(journal, SCORE, [judgement(1)], [(fine[0], Failed(reason="gone"))], {"seen": 2})
    record(journal, SCORE, [judgement(2)], [fine], {"seen": 3})
    journal.close()
    again = Journal(tmp_path / "j")
    assert len(again) == 1 and again.scorer_state == {"seen": 1}
