"""DNO: pairs by the margin of win rates, the teacher's answers, earlier pairs."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest
from campaigns import make_config, metrics_of, run_campaign
from fakes import FakeChat, make_prompts
from scripted_spar import make_completion

from rayhf.algorithms.base import SelectionContext
from rayhf.algorithms.dno import DNO, DNOConfig
from rayhf.data.prompts import PromptSet
from rayhf.errors import ConfigError
from rayhf.types import Compared, Sampling

ORDER = ["worst", "bad", "good", "gold"]
CONTEXT = SelectionContext(iteration=1, seed=0, sampling=Sampling(max_tokens=9))


class Context:
    """Returns the given texts; the later in ORDER wins."""

    def __init__(self, texts, room=64):
        self.texts = texts
        self._room = room

    def encode(self, text):
        return FakeChat().encode_response((), text)

    def room(self, context):
        return self._room - len(context)

    async def sample(self, n):
        return tuple(make_completion(text, index=i) for i, text in enumerate(self.texts[:n]))

    async def compare(self, completions):
        rank = np.array([ORDER.index(c.text) for c in completions])
        return Compared(win=0.5 + 0.5 * np.sign(rank[:, None] - rank), source="pairwise")


def explored(texts, *, room=64, **settings):
    algorithm = DNO(DNOConfig(samples=len(texts), **settings))
    prompt = replace(make_prompts(1)[0], row={"prompt": "q", "gpt": "gold"})
    return algorithm, asyncio.run(algorithm.explore(prompt, Context(texts, room)))


def pairs(algorithm, group):
    examples = algorithm.select([group], CONTEXT).examples
    texts = [sample.completion.text for sample in group.samples]
    return {tuple(texts[row.sample] for row in example.rows) for example in examples}


def test_pairs_whose_win_rates_differ_by_more_than_the_margin():
    algorithm, group = explored(["bad", "good", "worst"], min_margin=0.0)
    every = {("good", "bad"), ("good", "worst"), ("bad", "worst")}
    assert pairs(algorithm, group) == every
    # Win rates are 1/2, 5/6 and 1/6 (each meets itself too).
    algorithm, group = explored(["bad", "good", "worst"], min_margin=0.4)
    assert pairs(algorithm, group) == {("good", "worst")}


def test_the_teachers_answer_is_compared_and_not_corrected_for():
    algorithm, group = explored(["bad", "good"], teacher="gpt", min_margin=0.5)
    assert [sample.kind for sample in group.samples] == ["answer", "answer", "teacher"]
    assert pairs(algorithm, group) == {("gold", "bad")}
    (example,) = algorithm.select([group], CONTEXT).examples
    gold, own = example.rows
    assert np.isnan(gold.tokens["behavior_logp"]).all() and len(gold.response_ids) == 5
    assert np.isfinite(own.tokens["behavior_logp"]).all()
    assert group.metrics["dno/too_long"] == 0.0
    _, group = explored(["bad", "good"], teacher="gpt", room=3)
    assert len(group.samples) == 2 and group.metrics["dno/too_long"] == 1.0


def test_prompts_without_a_teachers_answer_are_refused(tmp_path):
    config = make_config(tmp_path, algorithm={"type": "dno", "teacher": "gpt"})
    rows = [{"prompt": "q", "gpt": "a"}] * 15 + [{"prompt": "q", "gpd": "a"}]
    prompts = [replace(p, row=row) for p, row in zip(make_prompts(16), rows, strict=True)]
    with pytest.raises(ConfigError, match=r"1 of 16 rows .* 'gpt', first .*columns: prompt, gpd"):
        config.algorithm.check_prompts(config, prompts)
    config.algorithm.check_prompts(config, [replace(p, row={"gpt": "a"}) for p in prompts])


def test_earlier_pairs_are_mixed_in(tmp_path):
    config = make_config(tmp_path, algorithm={"type": "dno", "samples": 4, "min_margin": 0.1})
    prompts = PromptSet(prompts=tuple(make_prompts(16)), duplicates=0, label="test")
    roles = run_campaign(config, prompts=prompts, reference=None)
    lines = metrics_of(config)[1:]
    assert lines[0]["pairs/earlier"] == 0 and lines[1]["pairs/earlier"] > 0
    assert all(line["pairs/kept"] for line in lines)
    rows = [r for b in roles.learners["policy"].batches for e in b.examples for r in e.rows]
    assert all((row.tokens["ref_logp"] == row.tokens["old_logp"]).all() for row in rows)
