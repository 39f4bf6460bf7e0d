"""Prompts: sources, readers, checks of rows, and the batch of each iteration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from rayhf.config.base import PluginConfig
from rayhf.config.load import dump_config, load_config
from rayhf.data.prompts import PromptSet, iteration_batch, load_prompts, prompt_id
from rayhf.data.readers import FileSource, FileSourceConfig, open_source, read_rows
from rayhf.errors import ConfigError
from rayhf.types import Prompt

CAMPAIGN: dict[str, Any] = {
    "run": {"dir": "r", "iterations": 3},
    "policy": {"model": "m"},
    "prompts": {"train": "data/train.jsonl", "heldout": {"type": "file", "path": "heldout.jsonl"}},
    "algorithm": {"type": "online_dpo"},
    "scorer": {"train": [{"type": "rule", "function": "a:b"}]},
}


def prompts(n: int) -> list[Prompt]:
    return [
        Prompt(
            prompt_id=f"{i:04d}", messages=({"role": "user", "content": str(i)},), token_ids=(i,)
        )
        for i in range(n)
    ]


def batch(items: list[Prompt], size: int, iteration: int, seed: int = 3) -> list[Prompt]:
    return iteration_batch(items, batch=size, iteration=iteration, seed=seed)


def test_every_prompt_once_per_epoch_and_iteration() -> None:
    items = prompts(10)
    batches = [batch(items, 5, iteration) for iteration in range(1, 5)]
    for first in (0, 2):
        assert sorted(p.prompt_id for b in batches[first : first + 2] for p in b) == [
            p.prompt_id for p in items
        ]
    seen = [{p.prompt_id for p in batch(items, 7, iteration)} for iteration in range(1, 40)]
    assert {len(ids) for ids in seen} == {7}
    assert set[str]().union(*seen) == {p.prompt_id for p in items}


def test_batches_depend_on_seed_and_iteration_only() -> None:
    items = prompts(20)
    assert batch(items, 4, 3, seed=1) == batch(items, 4, 3, seed=1)
    assert batch(items, 4, 3, seed=1) != batch(items, 4, 3, seed=2)


def test_prompt_id_depends_on_content() -> None:
    message = ({"role": "user", "content": "x"},)
    assert prompt_id(message, None) == prompt_id(message, None) != prompt_id(message, "1")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"prompt": "a"}\n{"prompt": \n', "row 2: not valid JSON"),
        (b"[1]\n", "row 1: expected an object, got list"),
        (b'{"prompt": "\xff"}\n', "row 1: not valid UTF-8"),
    ],
)
def test_malformed_rows_are_named(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"^prompts\.train: .*p\.jsonl {expected}"):
        list(read_rows(path, key="prompts.train"))


def test_parquet_and_other_endings(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["a", "b"]}), tmp_path / "p.parquet")
    assert [row["prompt"] for _, row in read_rows(tmp_path / "p.parquet", key="k")] == ["a", "b"]
    (tmp_path / "q.parquet").write_bytes(b"no")
    with pytest.raises(ConfigError, match="not a Parquet file"):
        list(read_rows(tmp_path / "q.parquet", key="k"))
    with pytest.raises(ConfigError, match="no such file"):
        list(read_rows(tmp_path / "nothing.jsonl", key="k"))
    (tmp_path / "p.csv").write_text("prompt")
    with pytest.raises(ConfigError, match=r"ending '\.csv'; expected"):
        list(read_rows(tmp_path / "p.csv", key="k"))


class Tokenizer:
    """One token per character, and one for the end of the prompt."""

    def apply_chat_template(self, messages: list[dict[str, str]], **_: object) -> str:
        return "".join(message["content"] for message in messages) + ">"

    def __call__(self, text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [ord(character) for character in text]}


def load(source: Any, limit: int = 8) -> PromptSet:
    return load_prompts(source, Tokenizer(), key="prompts.train", max_prompt_tokens=limit)


class SquaresConfig(PluginConfig):
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


def test_file_source_reads_what_the_file_holds(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n\n{"prompt": "b", "answer": 7}\n' * 2)
    source = FileSource(FileSourceConfig(path=Path("p.jsonl")), base=tmp_path)
    loaded = load(source)
    assert [(p.messages[0]["content"], p.reference_answer) for p in loaded.prompts] == [
        ("a", None),
        ("b", "7"),
    ]
    assert loaded.duplicates == 2 and loaded.label == str(tmp_path / "p.jsonl")
    assert loaded.prompts[0].token_ids == (ord("a"), ord(">"))


def test_source_of_another_package_is_found_by_import_path() -> None:
    config = load_config(CAMPAIGN | {"prompts": {"train": squares(start=4)}})
    assert config.prompts.train == SquaresConfig(type=f"{__name__}:Squares", start=4)
    source = open_source(config.prompts.train, base=Path("here"), key="prompts.train")
    loaded = load(source)
    assert [p.reference_answer for p in loaded.prompts] == ["16", "25", "36"]
    assert loaded.label == "squares in here"


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (({"prompt": "a"}, {"text": "b"}), "squares in here row 2: expected either `prompt`"),
        (("a",), "squares in here row 1: expected a mapping, got str"),
        (({"prompt": "a", "answer": True},), "squares in here row 1: `answer` must be a string"),
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
    assert config.prompts.train == FileSourceConfig(path=Path("data/train.jsonl"))
    assert config.prompts.heldout == FileSourceConfig(path=Path("heldout.jsonl"))
    assert config.evaluations["other"].prompts == FileSourceConfig(path=Path("o.parquet"))
    file = tmp_path / "c.yaml"
    file.write_text(dump_config(config))
    assert load_config(file) == config
    file.write_text(yaml.safe_dump(CAMPAIGN))
    changed = load_config(file, ["prompts.train=x.jsonl", f"prompts.heldout={squares(count=2)}"])
    assert changed.prompts.train == FileSourceConfig(path=Path("x.jsonl"))
    assert changed.prompts.heldout == SquaresConfig(type=f"{__name__}:Squares", count=2)


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        ({"type": "fil", "path": "p"}, "prompts.train.type: 'fil' is not a known prompt source"),
        ({"type": "file"}, "prompts.train.path is missing"),
        ({"type": "file", "pth": "p"}, "unknown key prompts.train.pth; did you mean path?"),
        (squares(cont=2), "unknown key prompts.train.cont; did you mean count?"),
        (3, "prompts.train: expected a mapping with a `type`, for example {type: file}"),
    ],
)
def test_wrong_sources_are_refused_like_other_settings(train: object, expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(CAMPAIGN | {"prompts": {"train": train}})
    assert expected in str(error.value)
