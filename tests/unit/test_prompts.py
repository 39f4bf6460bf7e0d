"""Prompts: rows of sources, checked, rendered and named; how a config names sources."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml

from rayhf.config.load import dump_config, load_config
from rayhf.config.sources import SourceConfig, source_names
from rayhf.data.columns import Columns
from rayhf.data.files import FileSourceConfig
from rayhf.data.hub import HubSourceConfig
from rayhf.data.preferences import load_pairs
from rayhf.data.prompts import PromptReader, PromptSet, load_prompts, prompt_id
from rayhf.data.readers import ShapedSource, open_source
from rayhf.errors import ConfigError
from rayhf.types import Prompt

CAMPAIGN: dict[str, Any] = {
    "run": {"dir": "r", "iterations": 3},
    "policy": {"model": "m"},
    "prompts": {"train": "data/train.jsonl", "heldout": {"type": "file", "path": "heldout.jsonl"}},
    "algorithm": {"type": "online_dpo"},
    "scorer": {"train": [{"type": "rule", "function": "a:b"}]},
}


def test_prompt_id_depends_on_content() -> None:
    message = ({"role": "user", "content": "x"},)
    assert prompt_id(message, None) == prompt_id(message, None) != prompt_id(message, "1")


class Tokenizer:
    """One token per character, and one for the end of the prompt."""

    special_tokens_map: ClassVar[dict[str, str]] = {}

    def get_chat_template(self, _name: None, _tools: object) -> str:
        return (
            "{% for tool in tools or [] %}{{ tool.name }}{% endfor %}"
            "{% for message in messages %}{{ message.content }}{% endfor %}"
            "{% for message in messages %}{{ message.tool_calls or '' }}{% endfor %}>"
        )

    def __call__(self, texts: list[str], *, add_special_tokens: bool) -> dict[str, Any]:
        return {"input_ids": [[ord(character) for character in text] for text in texts]}


def load(source: Any, limit: int = 8, config: SourceConfig | None = None) -> PromptSet:
    reader = PromptReader(tokenizer=Tokenizer(), max_prompt_tokens=limit, scorers=("math", "chat"))
    return load_prompts([("own", source, config or SourceConfig())], reader, key="prompts.train")


def from_rows(*rows: dict[str, Any], **settings: Any) -> tuple[Prompt, ...]:
    """The prompts of rows, with the settings of a source."""

    class Given(Rows):
        given = rows

    config = SourceConfig(**settings)
    source = ShapedSource((Given(SquaresConfig(), base=Path("here")), Columns(config)))
    return load(source, limit=10_000, config=config).prompts


class SquaresConfig(SourceConfig):
    """Settings of a source that the repository does not know."""

    count: int = 3
    start: int = 1


class Squares:
    """Questions about squares."""

    Config = SquaresConfig

    def __init__(self, config: SquaresConfig, *, base: Path) -> None:
        if config.start == 0:
            raise KeyError("zero")
        self.config = config
        self.label = f"squares in {base.name}"

    def rows(self) -> Iterator[Mapping[str, object]]:
        for number in range(self.config.start, self.config.start + self.config.count):
            yield {"prompt": f"{number}*{number}", "answer": number * number}


class Rows(Squares):
    """Rows given by a test."""

    given: tuple[object, ...] = ()

    def rows(self) -> Iterator[Any]:
        for row in self.given:
            if isinstance(row, Exception):
                raise row
            yield row


def squares(**settings: object) -> dict[str, object]:
    return {"type": f"{__name__}:Squares", **settings}


def test_source_of_another_package_is_found_by_import_path() -> None:
    config = load_config(CAMPAIGN | {"prompts": {"train": squares(start=4)}})
    assert config.prompts.train == (SquaresConfig(type=f"{__name__}:Squares", start=4),)
    source = open_source(config.prompts.train[0], base=Path("here"), key="prompts.train")
    loaded = load(source)
    assert [p.reference_answer for p in loaded.prompts] == ["16", "25", "36"]
    assert loaded.label == "squares in here"


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (({"prompt": "a"}, {"text": "b"}), "squares in here row 2: expected either `prompt`"),
        (("a",), "squares in here row 1: expected a mapping, got str"),
        (({"prompt": "a", "answer": True},), "squares in here row 1: `answer` must be text"),
        (({"prompt": "a" * 9},), "squares in here row 1: the prompt has 10 tokens"),
        ((OSError("no route"),), "squares in here: OSError: no route"),
        ((ConfigError("row 7 is odd"),), "row 7 is odd"),
        ((), "squares in here is empty"),
    ],
)
def test_errors_name_the_key_the_source_and_the_row(
    monkeypatch: pytest.MonkeyPatch, rows: tuple[object, ...], expected: str
) -> None:
    monkeypatch.setattr(Rows, "given", rows)
    with pytest.raises(ConfigError) as error:
        load(Rows(SquaresConfig(), base=Path("here")))
    assert str(error.value).startswith(f"prompts.train: {expected}")


def test_source_that_cannot_be_built_is_refused() -> None:
    config = SquaresConfig(type=f"{__name__}:Squares", start=0)
    with pytest.raises(ConfigError, match=r"^evaluations\.x\.prompts: \w+:Squares: KeyError"):
        open_source(config, base=Path(), key="evaluations.x.prompts")


def test_path_is_short_for_a_file_source(tmp_path: Path) -> None:
    evaluations = {"other": {"prompts": "o.parquet", "scorer": CAMPAIGN["scorer"]["train"]}}
    config = load_config(CAMPAIGN | {"evaluations": evaluations})
    assert config.prompts.train == (FileSourceConfig(path=Path("data/train.jsonl")),)
    assert config.prompts.heldout == (FileSourceConfig(path=Path("heldout.jsonl")),)
    assert config.evaluations["other"].prompts == (FileSourceConfig(path=Path("o.parquet")),)
    file = tmp_path / "c.yaml"
    file.write_text(dump_config(config))
    assert load_config(file) == config
    file.write_text(yaml.safe_dump(CAMPAIGN))
    changed = load_config(file, ["prompts.train=x.jsonl", f"prompts.heldout={squares(count=2)}"])
    assert changed.prompts.train == (FileSourceConfig(path=Path("x.jsonl")),)
    assert changed.prompts.heldout == (SquaresConfig(type=f"{__name__}:Squares", count=2),)


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        ({"type": "fil", "path": "p"}, "prompts.train.type: 'fil' is not a known prompt source"),
        ({"type": "file"}, "prompts.train.path is missing"),
        ({"type": "file", "pth": "p"}, "unknown key prompts.train.pth; did you mean path?"),
        (squares(cont=2), "unknown key prompts.train.cont; did you mean count?"),
        (3, "prompts.train: expected a mapping with a `type`, for example {type: file}"),
        ([], "prompts.train: value should have at least 1 item"),
        (["a.jsonl", {"type": "file"}], "prompts.train.1.path is missing"),
        ([{"type": "file", "path": "p", "name": "x"}] * 2, "several sources are named 'x'"),
        ({"type": "hub", "dataset": "squad/v2/x"}, "is not the name of a data set"),
        ({"type": "file", "path": "p", "weight": 0}, "prompts.train.weight: input should be"),
        ({"type": "file", "path": "p", "scorers": []}, "prompts.train.scorers"),
    ],
)
def test_wrong_sources_are_refused_like_other_settings(train: object, expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(CAMPAIGN | {"prompts": {"train": train}})
    assert expected in str(error.value)


def test_sources_are_named_by_what_they_read() -> None:
    sources = [
        "data/math.jsonl.gz",
        "other/math.parquet",
        "openai/gsm8k@main",
        {"type": "hub", "dataset": "org/data", "config": "a b"},
        {"type": "reasoning_gym", "task": "chain_sum"},
        squares(),
        {"type": "file", "path": "/x/*.csv"},
        {"type": "file", "path": "y", "name": "math_2"},
    ]
    config = load_config(CAMPAIGN | {"prompts": {"train": sources}})
    assert isinstance(config.prompts.train[2], HubSourceConfig)
    assert source_names(config.prompts.train) == (
        "math",
        "math_3",
        "gsm8k",
        "data_a_b",
        "chain_sum",
        "Squares",
        "source",
        "math_2",
    )


def test_name_of_a_directory_that_exists_is_no_hub_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org/data").mkdir(parents=True)
    config = load_config(CAMPAIGN | {"prompts": {"train": ["org/data", "org/other"]}})
    assert [source.type for source in config.prompts.train] == ["file", "hub"]


def test_rows_keep_their_columns_and_the_id_covers_them() -> None:
    rows = [
        {"prompt": "a", "answer": 1, "level": 3},
        {"prompt": "a", "answer": 1, "level": 4},
        {"prompt": "a", "answer": 1, "level": 3},
    ]
    loaded = from_rows(*rows)
    assert [dict(p.row) for p in loaded] == rows[:2]
    assert loaded[0].prompt_id != loaded[1].prompt_id
    assert {p.source for p in loaded} == {"own"}
    # A row without further columns has the id of its content alone.
    message = ({"role": "user", "content": "a"},)
    assert from_rows({"prompt": "a", "answer": 1})[0].prompt_id == prompt_id(message, "1")


@pytest.mark.parametrize(
    ("answer", "expected"),
    [(42.0, "42"), (float("nan"), None), (0.5, "0.5"), (None, None), ("4.0", "4.0"), (7, "7")],
)
def test_reference_answers(answer: object, expected: str | None) -> None:
    assert from_rows({"prompt": "a", "answer": answer})[0].reference_answer == expected


def test_conversations_of_other_projects() -> None:
    verl = {
        "data_source": "gsm8k",
        "prompt": [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}],
        "reward_model": {"style": "rule", "ground_truth": "7"},
        "extra_info": {"index": 0},
    }
    (prompt,) = from_rows(verl, rename={"reward_model.ground_truth": "answer"})
    assert [m["role"] for m in prompt.messages] == ["system", "user"]
    assert prompt.reference_answer == "7" and prompt.row["reward_model"] == verl["reward_model"]
    parts = [{"type": "text", "text": "Q"}, {"type": "text", "text": "R", "image_url": None}]
    call = {"function": {"name": "add", "arguments": {"a": 1}}}
    tools = {
        "messages": [
            {"role": "user", "content": parts, "tool_calls": None},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "3", "name": "add"},
        ],
        "tools": '[{"name": "add"}]',
    }
    (prompt,) = from_rows(tools)
    assert prompt.messages == (
        {"role": "user", "content": "QR"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "3", "name": "add"},
    )
    text = "".join(map(chr, prompt.token_ids))
    assert text == f"addQR3[{call}]>"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "part of type 'image'"),
        ({"messages": [{"role": "user", "content": 7}]}, "must have `content`"),
        ({"messages": [{"content": "a"}]}, "must have `role` and `content`"),
        ({"messages": []}, "`messages` must be a non-empty list"),
        ({"prompt": " "}, "`prompt` is empty"),
        ({"prompt": "a", "messages": []}, "both `prompt` and `messages` are given"),
        ({"prompt": "a", "tools": "{"}, "`tools` is not valid JSON"),
        ({"prompt": "a", "scorers": ["mth"]}, "`scorers` has 'mth', which is not the name of a"),
        ({"prompt": "a", "scorers": 3}, "`scorers` must be a scorer's name or a list"),
        ({"prompt": [{"role": "assistant", "content": "a"}]}, "ends with an assistant turn"),
    ],
)
def test_rows_that_are_no_prompts_are_named(row: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        from_rows({"prompt": "fine"}, row)
    assert str(error.value).startswith("prompts.train: squares in here row 2: ")
    assert expected in str(error.value)


def test_last_assistant_turn_is_cut_where_the_source_says_so() -> None:
    turns = [("user", "Q"), ("assistant", "A"), ("user", "R"), ("assistant", "B")]
    row = {"messages": [{"role": role, "content": text} for role, text in turns]}
    (prompt,) = from_rows(row, drop_last_assistant=True)
    assert [m["content"] for m in prompt.messages] == ["Q", "A", "R"]


def test_scorers_of_a_row_go_before_those_of_its_source() -> None:
    rows = [{"prompt": "a"}, {"prompt": "b", "scorers": "math"}, {"prompt": "c", "scorers": None}]
    assert [p.scorers for p in from_rows(*rows, scorers="chat")] == [
        ("chat",),
        ("math",),
        ("chat",),
    ]
    assert from_rows({"prompt": "a"})[0].scorers is None


def test_pairs_of_message_lists(tmp_path: Path) -> None:
    def turns(*texts: str) -> list[dict[str, str]]:
        roles = ("user", "assistant") * 2
        return [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]

    ultrafeedback = {
        "prompt": "Q",
        "chosen": turns("Q", "yes"),
        "rejected": turns("Q", "no"),
        "messages": turns("Q", "yes"),
        "score_chosen": 8.0,
    }
    trl = {
        "prompt": turns("Q"),
        "chosen": [{"role": "assistant", "content": "yes"}],
        "rejected": [{"role": "assistant", "content": "no"}],
    }
    text = {"prompt": "Q", "chosen": "yes", "rejected": "no"}
    file = tmp_path / "pairs.jsonl"
    for row in (ultrafeedback, trl, text):
        file.write_text(json.dumps(row) + "\n")
        (pair,) = load_pairs(file, key="k").pairs
        assert pair.messages == ({"role": "user", "content": "Q"},)
        assert (pair.chosen, pair.rejected) == ("yes", "no")
    for row, expected in (
        ({**ultrafeedback, "rejected": turns("R", "no")}, "are not those of the prompt"),
        ({**ultrafeedback, "rejected": turns("Q")}, "`rejected` must end with an assistant turn"),
        ({"prompt": "Q", "chosen": "yes"}, "expected `rejected`"),
    ):
        file.write_text(json.dumps(row) + "\n")
        with pytest.raises(ConfigError, match=rf"^k: .*pairs\.jsonl row 1: .*{expected}"):
            load_pairs(file, key="k")
