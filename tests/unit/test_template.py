"""Chat templates: text, variables, date; what a template must not do; tokens that end a turn."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any, ClassVar

import pytest
from chat_tokenizer import make_model_directory, make_tokenizer
from transformers import PreTrainedTokenizerBase

from rayhf.config.schema import PolicyConfig
from rayhf.data.chat import Chat, end_of_turn, render, render_text, special_token_escaper
from rayhf.data.stop_tokens import special_token_ids, stop_token_ids
from rayhf.data.template import (
    check_embeddings,
    check_vocabulary,
    exported_files,
    policy_tokenizer,
    template_with,
)
from rayhf.errors import ConfigError
from rayhf.types import Prompt

QUESTION = ({"role": "user", "content": "Hello there"},)
TURNS = "{% for m in messages %}{{ '<|' ~ m.role ~ '|>' ~ m.content ~ '<|end|>' }}{% endfor %}"
START = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
THINKING = (
    "{% if enable_thinking is defined and not enable_thinking %}no {% endif %}think {{ level }}"
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_directory(tmp_path_factory.mktemp("chat") / "policy")


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return make_tokenizer()


def with_template(text: str) -> PreTrainedTokenizerBase:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = text
    return tokenizer


def text_of(tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(list(render(tokenizer, QUESTION, where="row 1"))))


def load(directory: Path, **policy: Any) -> PreTrainedTokenizerBase:
    config = PolicyConfig(model=directory, **policy)
    return policy_tokenizer(directory, config, base=directory.parent)


# ---------------------------------------------------------------------------------- the config


def test_template_is_a_file_or_the_text_itself(directory: Path) -> None:
    text = "Q: {{ messages[-1].content }}\nA:"
    (directory.parent / "mine.jinja").write_text(text)
    for given in ("mine.jinja", text):
        assert text_of(load(directory, chat_template=given)) == "Q: Hello there\nA:"
    with pytest.raises(ConfigError, match=r"^policy\.chat_template: .*nowhere\.jinja cannot be"):
        load(directory, chat_template="nowhere.jinja")


def test_variables_and_date_are_part_of_the_template(directory: Path) -> None:
    """Whoever renders gets them, also from an exported policy, and may still override them."""
    template = TURNS + THINKING + " {{ strftime_now('%-d %B %Y, %A') }}" + START
    policy = {
        "chat_template": template,
        "chat_template_kwargs": {"enable_thinking": False, "level": 'the "é" one'},
        "chat_date": date(2026, 3, 1),
    }
    tokenizer = load(directory, **policy)
    rest = 'think the "é" one 1 March 2026, Sunday<|assistant|>'
    assert text_of(tokenizer) == f"<|user|>Hello there<|end|>no {rest}"
    files = exported_files(PolicyConfig(model=directory, **policy), tokenizer)
    assert files == {"chat_template.jinja": tokenizer.chat_template}
    again = with_template(files["chat_template.jinja"])
    assert text_of(again) == text_of(tokenizer)
    overridden = again.apply_chat_template(
        list(QUESTION), add_generation_prompt=True, tokenize=False, enable_thinking=True
    )
    assert overridden == f"<|user|>Hello there<|end|>{rest}"


def test_without_settings_the_directorys_template_is_unchanged(directory: Path) -> None:
    tokenizer = load(directory)
    assert tokenizer.chat_template == make_tokenizer().chat_template
    assert exported_files(PolicyConfig(model=directory), tokenizer) == {}
    assert template_with("\n {{ x }}", {}) == "\n {{ x }}"


@pytest.mark.parametrize("value", [True, 2, 0.5, "a 'b' \\ \U0001f600\n", [1, "x"], {"a": False}])
def test_values_of_variables(value: object) -> None:
    text = "\n  {{ value | tojson }}|{{ messages[-1].content }}"  # white space is kept
    tokenizer = with_template(template_with(text, {"value": value}))  # type: ignore[dict-item]
    assert text_of(tokenizer) == text_of(
        with_template(text.replace("value", json.dumps(value, ensure_ascii=False), 1))
    )


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"enable_thinkin": False}, "enable_thinkin: the chat template does not read"),
        ({"messages": []}, "messages: no variable of this name can be set"),
        ({"a b": 1}, "a b: no variable of this name can be set"),
        ({"level": {"deep": None}}, "level: null is not a value"),
    ],
)
def test_refused_variables(directory: Path, variables: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=f"^policy.chat_template_kwargs.{expected}"):
        load(directory, chat_template=TURNS + THINKING, chat_template_kwargs=variables)


# --------------------------------------------------------------------------------- rendering


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{# nothing #}", "leaves out the content of the last message, it renders ''"),
        ("{{ '<|user|>' }}", "leaves out the content of the last message"),
        ("{{ messages[-1].content + 1 }}", "the chat template fails: TypeError"),
        ("{{ 1 / 0 }}", "the chat template fails: ZeroDivisionError"),
        ("{{ messages[0].tool_calls.x }}", "refuses the messages .*has no attribute 'tool_calls'"),
        ("{% for m in messages %}", "the chat template is not valid Jinja: .*, line 1"),
        ("{{ x | nofilter }}", "the chat template is not valid Jinja"),
        ("{{ raise_exception('no system role') }}", r"refuses the messages \(no system role\)"),
        (
            TURNS + "{{ strftime_now('%H:%M') }}",
            r"prints the date \(strftime_now\('%H:%M'\)\).* set policy.chat_date",
        ),
    ],
)
def test_template_that_cannot_render_names_the_row(template: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=f"^train.jsonl row 7: .*{expected}") as error:
        render(with_template(template), QUESTION, where="train.jsonl row 7")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "no end",
        ),
        ("{{ '0' * 1073741824 }}", "OverflowError"),
        ("{{ 'x' | center(10000000000) }}", "MemoryError"),
        ("{% for i in range(99999) %}{{ 'x' | center(1000) }}{% endfor %}", "4,194,304 characters"),
        ("{{ " + "(" * 100_000 + " }}", "RecursionError|not valid Jinja"),
        ("{{ 1 + 'a' }}", "TypeError"),
    ],
)
def test_template_without_end_costs_its_rendering_only(
    template: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=f"^row 1: the chat template .*({expected})") as error:
        render(with_template(template), QUESTION, where="row 1")
    assert "\n" not in str(error.value)
    assert text_of(with_template(TURNS)) == "<|user|>Hello there<|end|>"


def test_rendering_equals_that_of_transformers() -> None:
    template = (
        "{{ bos_token }}{%- for m in messages %}\n  {% if loop.index0 > 5 %}{% break %}{% endif %}"
        "{% generation %}{{ m | tojson(indent=1) }}{% endgeneration %}\n{% endfor %}"
        "{{ tools | tojson if tools else namespace(a=1).a }}{{ undefined_name }}\n"
    )
    for tokenizer in (make_tokenizer(), with_template(template)):
        for tools in (None, [{"name": "f"}]):
            own = render_text(
                tokenizer, QUESTION, tools=tools, generation_prompt=True, where="row 1"
            )
            assert own == tokenizer.apply_chat_template(
                [dict(m) for m in QUESTION], tools=tools, add_generation_prompt=True, tokenize=False
            )


def test_special_tokens_of_spaces_do_not_make_an_endless_loop() -> None:
    class Hostile:
        all_special_tokens: ClassVar[list[str]] = ["  ", "ab", "aab", "<|end|>"]
        added_tokens_decoder: ClassVar[dict[int, str]] = {}

    escape = special_token_escaper(Hostile())  # type: ignore[arg-type]
    assert escape("x  y aab<|end|>") == "x  y a a b< |end|>"
    assert "ab" not in escape("a" * 1000 + "b" * 1000)
    Hostile.all_special_tokens = ["a b"]
    with pytest.raises(ConfigError, match="which a space in a text does not break up"):
        special_token_escaper(Hostile())  # type: ignore[arg-type]


def test_date_is_asked_only_where_it_is_printed() -> None:
    """Llama 3.2 prints `date_string`, and the date of today only without one."""
    llama = "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}"
    template = llama + "{% endif %}{{ date_string }} " + TURNS
    with pytest.raises(ConfigError, match=r"policy\.chat_date"):
        text_of(with_template(template))
    given = template_with(template, {"date_string": "26 Jul 2024"})
    assert text_of(with_template(given)).startswith("26 Jul 2024 <|user|>")


def test_end_of_turn_is_what_the_template_writes() -> None:
    assert end_of_turn(with_template(TURNS + START)) == "<|end|>"
    assert end_of_turn(with_template(TURNS.replace("<|end|>", "\n<|system|>\n"))) == "<|system|>"
    assert end_of_turn(with_template(TURNS.replace("<|end|>", "\n"))) is None
    assert end_of_turn(with_template("{{ raise_exception('no') }}")) is None


def test_response_ends_with_the_end_of_turn_and_nothing_after_it() -> None:
    tokenizer = with_template(TURNS.replace("<|end|>", "<|system|>\n") + START)
    chat = Chat(tokenizer, max_length=64)
    token_ids = chat.encode_response(QUESTION, "Good")
    assert tokenizer.decode(list(token_ids)) == "Good<|system|>"


# ------------------------------------------------------------------------------------- tokens


def test_stop_tokens_come_from_all_three_places(tmp_path: Path) -> None:
    """The tokenizer's EOS, those of generation_config.json, and the template's end of turn."""
    tokenizer = with_template(TURNS.replace("<|end|>", "<|system|>"))
    ids = special_token_ids(tokenizer)
    assert set(ids) >= {"<|pad|>", "<|end|>", "<|system|>"}
    assert stop_token_ids(tmp_path, tokenizer) == (ids["<|end|>"], ids["<|system|>"])
    for listed in (7, [7, 9]):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": listed}))
        expected = {7, 9} if listed != 7 else {7}
        assert set(stop_token_ids(tmp_path, tokenizer)) == expected | {1, ids["<|system|>"]}
    tokenizer.pad_token = tokenizer.eos_token  # changes nothing: padding is never a token here
    assert set(stop_token_ids(tmp_path, tokenizer)) >= {1, 7, 9}


def test_no_stop_token_at_all_is_refused(tmp_path: Path) -> None:
    tokenizer = with_template("{{ messages[-1].content }}")
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="says nowhere which token ends a completion"):
        stop_token_ids(tmp_path, tokenizer)


def test_tokens_without_an_embedding(tokenizer: PreTrainedTokenizerBase) -> None:
    size = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    check_vocabulary(tokenizer, {"vocab_size": size})  # special, so that no text contains it
    messages = ({"role": "user", "content": "call <|tool|>"},)
    prompt = Prompt(
        prompt_id="p", messages=messages, token_ids=render(tokenizer, messages, where="p")
    )
    check_embeddings([prompt], tokenizer, size + 1, where="prompts.train")
    with pytest.raises(ConfigError, match=rf"'call <\|tool\|>' contains the token .*\({size}\)"):
        check_embeddings([prompt], tokenizer, size, where="prompts.train")
    tokenizer.add_tokens(["ordinary"])
    with pytest.raises(ConfigError, match=rf"'ordinary' \({size + 1}\).* are {size} embeddings"):
        check_vocabulary(tokenizer, {"text_config": {"vocab_size": size}})
    check_vocabulary(tokenizer, {"vocab_size": size + 100})


def test_stop_tokens_that_a_template_of_the_config_adds(tmp_path: Path) -> None:
    tokenizer = with_template("{{ messages[-1].content }}")
    tokenizer.eos_token = None
    assert stop_token_ids(tmp_path, tokenizer, known=[9, 4]) == (4, 9)
