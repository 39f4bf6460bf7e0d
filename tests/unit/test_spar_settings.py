"""SPaR's templates, verdicts and settings, and refinement at test time."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError
from scripted_spar import SHORT, TWO_STEPS, ScriptedContext, make_completion, make_prompt, spar

from rayhf.algorithms.conversation import instruction_text
from rayhf.algorithms.spar_config import SPaRConfig
from rayhf.algorithms.spar_dialogue import RefinerDialogue
from rayhf.data.chat import Chat
from rayhf.errors import ConfigError
from rayhf.tiny import instructions


def test_test_time_refinement_replaces_only_failing_answers():
    algorithm, prompt = spar(test_time_refine=True), make_prompt()
    explorer = ScriptedContext(TWO_STEPS)
    good, bad = (make_completion(text) for text in ("good", "bad"))
    assert algorithm.at_test_time is not None
    assert asyncio.run(algorithm.improve(prompt, good, explorer)) is good
    assert asyncio.run(algorithm.improve(prompt, bad, explorer)).text == "fine"
    assert asyncio.run(spar(depth=1).improve(prompt, bad, ScriptedContext(TWO_STEPS))) is bad
    silent = ScriptedContext(lambda policy, context, draw: "hm")
    assert asyncio.run(algorithm.improve(prompt, bad, silent)) is bad


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Step-by-step verification: fine\nFinal Judgement (all met?): Yes", True),
        ("**Final Judgement:** **No**.", False),
        ("Final Judgement: Yes\nOn second thought.\nfinal judgement: no", False),
        ("The answer says 'Final Judgement: Yes', so it cheats. Final Judgement: No", False),
        ("Final Judgement: None of them is met", None),
        ("Final Judgement: Not quite", None),
        ("Yes", None),
        ("", None),
    ],
)
def test_verdicts_in_the_default_format(text, expected):
    dialogue = RefinerDialogue(SPaRConfig())
    assert dialogue.verdict(make_completion(text)) is expected


def test_answers_cannot_inject_template_code():
    (turn,) = RefinerDialogue(SPaRConfig.model_validate(SHORT)).judge("{{ 1 + 1 }}", "{% for %}")
    assert turn == {"role": "user", "content": "J {{ 1 + 1 }}|{% for %}"}


def test_instruction_of_several_turns_is_one_text():
    turns = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"})
    assert (
        instruction_text(turns) == "System: Be brief.\n\nUser: Hi"
        and instruction_text(turns[1:]) == "Hi"
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"judge_template": "{{ instrution }}"},
            "unknown variable instrution; valid: instruction, response",
        ),
        ({"judge_template": "{{ judgement }}"}, "unknown variable judgement"),
        ({"refine_template": "{{ response"}, "not a Jinja2 template"),
        (
            {"refine_template": [{"role": "assistant", "content": "x"}]},
            "the last turn must be the user's",
        ),
        ({"refine_template": [{"role": "usr", "content": "x"}]}, "refine_template.0.role"),
        ({"refine_template": []}, "the last turn must be the user's"),
        ({"verdict_pattern": "yes|no"}, "expected a group"),
        ({"refined_pattern": "(a"}, "not a regular expression"),
        ({"verdict_no": "YES"}, "are both 'yes'"),
        ({"refiner": {"shared": True, "model": "m"}}, "the policy has both roles"),
        ({"gate": 1.0}, "less than 1"),
        ({"refiner_data": {"tree_maybe": 1}}, "Extra inputs"),
    ],
)
def test_invalid_settings_are_refused(changes, expected):
    with pytest.raises(ValidationError, match=expected):
        SPaRConfig.model_validate(changes)


def test_defaults_are_those_of_the_source():
    config = SPaRConfig()
    assert (
        config.samples,
        config.judge_votes,
        config.judge_temperature,
        config.refine_temperature,
    ) == (5, 5, 0.7, 0.7)
    assert (config.search, config.branch, config.beam, config.depth, config.gate) == (
        "bfs",
        3,
        2,
        3,
        0.5,
    )
    assert (config.judge_retries, config.refine_retries, config.max_nodes) == (3, 3, 15)
    assert (config.loss.beta, config.nll_coef, config.reference.type) == (0.1, 0.1, "previous")
    assert (config.refiner.shared, config.refiner.lr, config.refiner.epochs) == (False, 2e-6, 5)
    caps = {
        "refinements": 4000,
        "tree_yes": 1500,
        "tree_no": 1000,
        "answers_yes": 2500,
        "answers_no": 500,
    }
    assert config.refiner_data.model_dump() == caps


def test_tiny_preset_matches_the_tiny_task():
    preset = yaml.safe_load(
        (Path(__file__).parents[2] / "configs/tiny/spar_instructions.yaml").read_text()
    )
    config = SPaRConfig.model_validate(preset["algorithm"])
    assert [turn.content for turn in config.judge_template] == [instructions.JUDGE_TEMPLATE]
    assert [turn.content for turn in config.refine_template] == [instructions.REFINE_TEMPLATE]
    assert config.verdict_pattern == instructions.VERDICT and config.refined_pattern is None
    dialogue, task = RefinerDialogue(config), next(instructions.instructions(0))
    for response in ("", "owl fox dog!"):
        said = instructions.judgement(task, response)
        completion = make_completion(said)
        assert dialogue.judge(task.prompt, response)[0]["content"] == instructions.judge_prompt(
            task, response
        )
        assert dialogue.refine(task.prompt, response, said)[0][
            "content"
        ] == instructions.refine_prompt(task, response, said)
        assert dialogue.verdict(completion) is (instructions.judge_truth(task, response) == "yes")


@pytest.mark.parametrize(
    ("before_prompt", "before_answer", "expected"),
    [
        ("", "", None),
        ("<think>", "<think>", None),  # the prompt ends with it, as the conversation has it
        ("<think>", "", "differently from its prompt"),
        ("", "<think>\n\n</think>\n\n", "renders the answer 'An answer.' as '<think>"),
    ],
)
def test_chat_templates_are_tried_before_the_campaign(before_prompt, before_answer, expected):
    class Templated(Chat):
        def __init__(self):
            pass

        def render(self, messages):
            return (1,)

        def encode_generated(self, messages, text):
            if not before_answer.startswith(before_prompt):
                raise ConfigError("the template renders a response differently from its prompt")
            return tuple(map(ord, before_answer.removeprefix(before_prompt) + text))

        def text(self, token_ids):
            return "".join(map(chr, token_ids))

    algorithm = spar(refined_pattern=r"\[(.*)\]")
    if expected is None:
        algorithm.check_chat(Templated(), make_prompt())
        return
    with pytest.raises(ConfigError, match=expected):
        algorithm.check_chat(Templated(), make_prompt())


def test_judge_template_that_the_chat_template_refuses_is_named():
    class Refuses(Chat):
        def __init__(self):
            pass

        def render(self, messages):
            raise ConfigError("chat template: no system role")

    with pytest.raises(ConfigError, match=r"algorithm\.judge_template: chat template: no system"):
        spar().check_chat(Refuses(), make_prompt())
