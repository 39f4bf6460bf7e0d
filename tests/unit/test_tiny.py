"""The tiny world's tasks, tokenizer and cache; no model is trained."""

from __future__ import annotations

import itertools
import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from jinja2.exceptions import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rayhf.errors import ConfigError
from rayhf.tiny import arithmetic, words, world
from rayhf.tiny.language_model import ModelSize
from rayhf.tiny.tokenizer import POLICY_FORMAT, REWARD_FORMAT, ChatFormat, train_tokenizer

CHAINS = list(itertools.islice(arithmetic.chains(0), 6000))
CHAIN = arithmetic.Chain((3, 8, -5))


def correct(completion: str, answer: str | None = "6", finish_reason: str = "stop") -> float:
    return arithmetic.correct(
        completion, prompt="What is 3+8-5?", reference_answer=answer, finish_reason=finish_reason
    )


def preference(
    completion: str, prompt: str = "Words about sea, night and garden.", finish_reason: str = "stop"
) -> float:
    return words.true_preference(
        completion, prompt=prompt, reference_answer=None, finish_reason=finish_reason
    )


def test_chain_is_worked_step_by_step() -> None:
    assert (CHAIN.prompt, CHAIN.answer) == ("What is 3+8-5?", "6")
    assert CHAIN.worked([0, 0]) == "3+8=11\n11-5=6\nAnswer: 6"
    assert CHAIN.worked([-2, 1]) == "3+8=9\n9-5=5\nAnswer: 5"
    assert correct(CHAIN.worked([0, 0])) == 1.0
    assert correct(CHAIN.worked([1, 0])) == 0.0
    # Two slips that cancel each other: only the final number counts.
    assert correct(CHAIN.worked([1, -1])) == 1.0


def test_questions_differ_and_answers_are_correct() -> None:
    assert len({chain.prompt for chain in CHAINS}) == len(CHAINS)
    for chain in CHAINS:
        terms = re.findall(r"[+-]?\d+", chain.prompt)
        assert str(sum(map(int, terms))) == chain.answer
        assert all(sum(chain.terms[: end + 1]) >= 0 for end in range(len(chain.terms)))


def test_questions_follow_from_the_seed() -> None:
    assert list(itertools.islice(arithmetic.chains(0), 50)) == CHAINS[:50]
    assert list(itertools.islice(arithmetic.chains(1), 50)) != CHAINS[:50]


def test_slips_have_their_rate_and_are_carried_on() -> None:
    shown = arithmetic.demonstrations(CHAINS, 0, count=len(CHAINS))
    steps = [
        int(total) + int(term) - int(result)
        for _, text in shown
        for total, term, result in re.findall(r"^(-?\d+)([+-]\d+)=(-?\d+)$", text, re.MULTILINE)
    ]
    slips = [step for step in steps if step != 0]
    assert abs(len(slips) / len(steps) - arithmetic.SLIP_RATE) < 0.02
    assert {abs(slip) for slip in slips} == {1, 2}
    for _, text in shown[:100]:
        *worked, final = text.split("\n")
        assert worked[-1].rpartition("=")[2] == final.removeprefix("Answer: ")
    assert all(
        correct(text, answer=chain.answer) == 1.0
        for chain, (_, text) in zip(
            CHAINS, arithmetic.demonstrations(CHAINS, 0, count=200, rate=0.0), strict=False
        )
    )


@pytest.mark.parametrize(
    "completion",
    [
        "",
        "6",
        "answer: 6",
        "Answer:6",
        "Answer: 6.",
        "Answer: 6\n",
        " Answer: 6",
        "Answer: 06",
        "Answer: +6",
        "Answer: 6.0",
        "Answer: 3+3",
        "Answer: \u0666",
        "Answer: 6 Answer: 5",
        "Answer: 6\nAnswer: 6",
        "Answer: 5\nAnswer: 6",
        "Answer: 6\n3+8=11",
        "3+8=11 so\nAnswer: 6",
        "3+8=11\n\nAnswer: 6",
        "3+8=11\r\nAnswer: 6",
        "__import__('os').abort()\nAnswer: 6",
        "Answer: " + "6" * 10_000,
    ],
)
def test_only_the_exact_format_is_correct(completion: str) -> None:
    assert correct(completion) == 0.0


def test_correct_handles_signs_and_truncation() -> None:
    assert correct("Answer: -3", answer="-3") == 1.0
    assert correct("Answer: 0", answer="0") == 1.0
    assert correct("Answer: -0", answer="0") == 0.0
    assert correct("Answer: 6", finish_reason="length") == 0.0


def test_correct_refuses_a_prompt_without_answer() -> None:
    with pytest.raises(ConfigError, match="needs an answer"):
        correct("Answer: 6", answer=None)


def test_word_prompts_differ_and_follow_from_the_seed() -> None:
    prompts = list(words.prompts(0))
    assert len(set(prompts)) == len(prompts) == 3960
    assert prompts == list(words.prompts(0)) != list(words.prompts(1))
    assert all(len(set(words.topics_of(prompt))) == 3 for prompt in prompts)


def test_no_word_has_two_meanings() -> None:
    nouns = [noun for nouns in words.TOPICS.values() for noun in nouns]
    assert len(set(nouns) | set(words.ADJECTIVES)) == len(nouns) + len(words.ADJECTIVES)


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        ("cold wave", "cold barn"),
        ("cold wave", "calm wave"),
        ("cold wave bright star", "cold bright wave star"),
        ("wave star rose", "wave star star"),
        ("wave star", "wave star xyzzy"),
        ("wave", ""),
        (
            "cold wave dark star wild rose deep tide red",
            "cold wave dark star wild rose deep tide red moon blue bee green",
        ),
    ],
)
def test_true_preference_orders_texts_as_documented(better: str, worse: str) -> None:
    assert preference(better) > preference(worse)


def test_further_topic_words_count_less_and_truncation_costs() -> None:
    one, two, three = (preference(text) for text in ("wave", "wave tide", "wave tide sail"))
    assert one > preference("")
    assert 0 < three - two < two - one
    assert preference("wave", finish_reason="length") == one - 1.0
    with pytest.raises(ConfigError, match="none of the topics"):
        preference("wave", prompt="Words about nothing.")


def test_labels_follow_the_true_preference_with_noise() -> None:
    rng = random.Random(0)
    taken = [words.prefers_first(1.0, 0.0, rng) for _ in range(4000)]
    assert abs(sum(taken) / 4000 - 1 / (1 + 2.718281828**-words.LABEL_SHARPNESS)) < 0.03


def make_tokenizer(chat: ChatFormat) -> PreTrainedTokenizerFast:
    rng = random.Random(0)
    texts = [
        f"{prompt}\n{words.demonstration(prompt, rng)}"
        for prompt in itertools.islice(words.prompts(0), 2000)
    ]
    texts += [
        f"{prompt}\n{text}" for prompt, text in arithmetic.demonstrations(CHAINS, 0, count=500)
    ]
    return train_tokenizer(texts, chat, max_vocab=1000, max_length=512)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(POLICY_FORMAT)


@pytest.mark.parametrize(
    "text",
    [
        "3+8=11\n11-5=6\nAnswer: 6",
        "cold wave  bright star",
        " a\t\u00e9\u4e2d\U0001f600\r\n\n ",
        "it 's , n't !",
        "<|end",
    ],
)
def test_text_survives_a_round_trip(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert (
        tokenizer.decode(
            tokenizer(text, add_special_tokens=False)["input_ids"], skip_special_tokens=True
        )
        == text
    )


def test_tokens_are_digits_and_whole_words(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.tokenize("13+8") == ["1", "3", "+", "8"]
    assert len(tokenizer.tokenize(" cold wave bright star")) == 4
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}) == 3


def test_chat_template_renders_all_roles(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    chat = [
        {"role": role, "content": role.upper()} for role in ("system", "user", "assistant", "user")
    ]
    rendered = (
        "<|system|>SYSTEM<|end|><|user|>USER<|end|><|assistant|>ASSISTANT<|end|><|user|>USER<|end|>"
    )
    for one in (tokenizer, reload(tokenizer, tmp_path)):
        assert one.apply_chat_template(chat, tokenize=False) == rendered
        assert (
            one.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            == rendered + "<|assistant|>"
        )
        assert one(rendered, add_special_tokens=False)["input_ids"].count(one.eos_token_id) == 4
        with pytest.raises(TemplateError, match="got tool"):
            one.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def reload(tokenizer: PreTrainedTokenizerFast, directory: Path) -> PreTrainedTokenizerFast:
    """Save and load as engines do.

    AutoTokenizer also reads the model's config, and for some architectures substitutes a class.
    """
    tokenizer.save_pretrained(directory)
    ModelSize().config(tokenizer).save_pretrained(directory)
    return AutoTokenizer.from_pretrained(directory)


def test_saved_tokenizer_is_loaded_unchanged(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    again = reload(tokenizer, tmp_path)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again.decode(again("e\u0301 a\r\n 's")["input_ids"]) == "e\u0301 a\r\n 's"
    assert (again.pad_token_id, again.eos_token_id) == (
        tokenizer.pad_token_id,
        tokenizer.eos_token_id,
    )


def test_reward_model_has_a_tokenizer_of_its_own(tokenizer: PreTrainedTokenizerFast) -> None:
    other = make_tokenizer(REWARD_FORMAT)
    text = " cold wave"
    assert other.tokenize(text) == tokenizer.tokenize(text)
    assert other(text)["input_ids"] != tokenizer(text)["input_ids"]
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert other.apply_chat_template(chat, tokenize=False) == "[QUESTION]a[END][REPLY]b[END]"


def test_rule_modules_import_no_torch() -> None:
    code = (
        "import sys, rayhf.tiny.arithmetic, rayhf.tiny.words; "
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Replace the recipes, which take minutes; return the list of their calls."""
    calls: list[tuple[str, int]] = []

    def make(
        task: str, directory: Path, seed: int, progress: world.Progress, base: Path | None
    ) -> dict[str, Any]:
        assert base is None or (base / "manifest.json").exists()
        calls.append((task, seed))
        (directory / "train.jsonl").write_text(f"{task} {seed}\n")
        progress(f"{task}: prompts", 1.0)
        return {
            "sizes": {"train": 1},
            "measured": {"accuracy": 0.5},
            "seconds": 1.0,
            "cpu_seconds": 1.0,
        }

    monkeypatch.setattr(world, "_make", make)
    return calls


def test_build_makes_only_missing_tasks(tmp_path: Path, made: list[tuple[str, int]]) -> None:
    stages: list[tuple[str, float]] = []
    first = world.build(
        tmp_path, tasks=["words"], progress=lambda stage, done: stages.append((stage, done))
    )
    assert stages == [("words: prompts", 1.0)]
    assert not first["words"].cached
    both = world.build(tmp_path, tasks=["words", "arithmetic"])
    assert (both["words"].cached, both["arithmetic"].cached) == (True, False)
    assert made == [("words", 0), ("arithmetic", 0)]
    assert both["words"].measured == {"accuracy": 0.5}
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".arithmetic.lock",
        ".words.lock",
        "arithmetic",
        "words",
    ]


def test_task_that_starts_from_another_builds_it_first(
    tmp_path: Path, made: list[tuple[str, int]]
) -> None:
    built = world.build(tmp_path, tasks=["challenges"])
    assert made == [("arithmetic", 0), ("challenges", 0)] and set(built) == {"challenges"}
    world.build(tmp_path, tasks=["arithmetic", "challenges"])
    assert len(made) == 2


def test_build_repeats_a_task_when_anything_differs(
    tmp_path: Path, made: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = tmp_path / "words" / "manifest.json"
    world.build(tmp_path, tasks=["words"])
    world.build(tmp_path, tasks=["words"], seed=1)
    assert (tmp_path / "words" / "train.jsonl").read_text() == "words 1\n"
    (tmp_path / "words" / "train.jsonl").write_text("cut")
    world.build(tmp_path, tasks=["words"], seed=1)
    manifest.write_text(manifest.read_text()[:20])
    world.build(tmp_path, tasks=["words"], seed=1)
    monkeypatch.setattr(world, "recipe_version", lambda task: "another")
    world.build(tmp_path, tasks=["words"], seed=1)
    assert made == [("words", 0)] + [("words", 1)] * 4
    assert json.loads(manifest.read_text())["recipe"] == "another"


def test_build_that_fails_keeps_the_old_task(
    tmp_path: Path, made: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    world.build(tmp_path, tasks=["words"])

    def fail(
        task: str, directory: Path, seed: int, progress: world.Progress, base: Path | None
    ) -> dict[str, Any]:
        (directory / "train.jsonl").write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(world, "_make", fail)
    with pytest.raises(KeyboardInterrupt):
        world.build(tmp_path, tasks=["words"], seed=1)
    assert world.build(tmp_path, tasks=["words"])["words"].cached
    assert sorted(path.name for path in tmp_path.iterdir()) == [".words.lock", "words"]


def test_build_refuses_wrong_settings(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="unknown task 'poems', expected one of arithmetic, words"
    ):
        world.build(tmp_path, tasks=["poems"])
    with pytest.raises(ConfigError, match="seed: got -1"):
        world.build(tmp_path, seed=-1)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot make"):
        world.build(tmp_path / "file" / "deeper")
