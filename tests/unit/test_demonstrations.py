"""Demonstrations: which tokens of a conversation are trained on, and which rows are refused."""

import json

import pytest

from rayhf.data.chat import Chat
from rayhf.data.demonstrations import encode_demonstration
from rayhf.data.examples import fits, load_examples
from rayhf.data.files import FileSource, FileSourceConfig
from rayhf.data.preferences import encode_labeled, encode_pair
from rayhf.errors import ConfigError
from rayhf.tiny.tokenizer import POLICY_FORMAT, train_tokenizer

TURN = "{{ '<|user|>' if m.role != 'assistant' else '<|assistant|>' }}\n"
LINES = (
    "{% for m in messages %}" + TURN + "{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
"""White space after the end of a turn, as in ChatML."""
MARKED = LINES.replace(
    "{{ m.content }}<|end|>",
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}<|end|>"
    "{% else %}{{ m.content }}<|end|>{% endif %}",
)
STRIPS = LINES.replace(
    "{{ m.content }}",
    "{{ m.content if loop.last or m.role != 'assistant' else m.content.split('#')[-1] }}",
)
"""Earlier thinking (before '#') is left out."""
TALK = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "one\n"},
    {"role": "assistant", "content": "hm#two"},
    {"role": "user", "content": "three"},
    {"role": "assistant", "content": " four"},
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(
        ["one two three four be kind hm"] * 4, POLICY_FORMAT, max_vocab=300, max_length=64
    )


def chat_of(tokenizer, template=None, max_length=64):
    tokenizer.chat_template = template or POLICY_FORMAT.template
    return Chat(tokenizer, max_length=max_length)


def trained(chat, row, **settings):
    """The texts of the consecutive trained parts, and the whole text."""
    encoded = encode_demonstration(row, "row 1", chat, **{"last_only": False, **settings})
    (ids,) = encoded.rows
    decode = chat._tokenizer.decode
    parts = [[]]
    for token, kept in zip(ids.response_ids.tolist(), ids.mask.tolist(), strict=True):
        parts[-1].append(token) if kept else parts.append([])
    whole = decode([*ids.prompt_ids.tolist(), *ids.response_ids.tolist()])
    assert encoded.scalars == {"trained_tokens": ids.mask.sum()}
    return [decode(part) for part in parts if part], whole


@pytest.mark.parametrize("template", [None, LINES, MARKED])
def test_every_assistant_turn_with_its_end_and_nothing_else(tokenizer, template):
    chat = chat_of(tokenizer, template)
    parts, whole = trained(chat, {"messages": TALK})
    assert parts == ["hm#two<|end|>", " four<|end|>"]
    # Nothing is doubled or left out, and nothing follows the last trained token.
    assert chat.template(TALK).removesuffix("\n") == whole


@pytest.mark.parametrize("template", [None, LINES, MARKED])
def test_last_turn_only(tokenizer, template):
    chat = chat_of(tokenizer, template)
    assert trained(chat, {"messages": TALK}, last_only=True)[0] == [" four<|end|>"]
    row = {"prompt": TALK[:4], "completion": [TALK[4]]}
    assert trained(chat, row)[0] == [" four<|end|>"]


def test_prompt_tokens_are_those_of_a_prompt(tokenizer):
    chat = chat_of(tokenizer, LINES)
    row = {"prompt": "one", "response": "two"}
    encoded = encode_demonstration(row, "r", chat, last_only=False).rows[0]
    assert tuple(encoded.prompt_ids) == chat.render([{"role": "user", "content": "one"}])
    assert tuple(encoded.response_ids) == chat.encode_response(TALK[:1], "two")


def test_an_end_token_in_the_data_is_not_doubled(tokenizer):
    parts, whole = trained(chat_of(tokenizer), {"prompt": "one", "completion": "two<|end|>"})
    assert parts == ["two<|end|>"] and whole.count("<|end|>") == 2


def test_turns_after_the_last_assistant_turn_are_left_out(tokenizer):
    more = [*TALK, {"role": "user", "content": "three"}]
    assert trained(chat_of(tokenizer), {"messages": more}) == trained(
        chat_of(tokenizer), {"messages": TALK}
    )


def test_template_that_strips_thinking(tokenizer):
    chat = chat_of(tokenizer, STRIPS)
    with pytest.raises(ConfigError, match=r"row 1: .* message 3 as .*last_only"):
        trained(chat, {"messages": TALK})
    parts, whole = trained(chat, {"messages": TALK}, last_only=True)
    assert parts == [" four<|end|>"] and "hm" not in whole


def test_template_whose_generation_prompt_is_not_how_the_turn_begins(tokenizer):
    chat = chat_of(tokenizer, LINES.replace("<|assistant|>\n{% endif", "<|assistant|>\nhm{% endif"))
    with pytest.raises(ConfigError, match=r"message 5 as .*expected a template with"):
        trained(chat, {"messages": TALK}, last_only=True)


def test_tools_are_rendered(tokenizer):
    chat = chat_of(tokenizer, "{{ tools | length if tools else 0 }}" + LINES)
    tools = json.dumps([{"name": "add"}, {"name": "sub"}])
    assert trained(chat, {"messages": TALK, "tools": tools})[1].startswith("2")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": "a"}, "expected `messages`, or `prompt` with `completion`, got keys text"),
        ({"messages": TALK[:2]}, "no assistant turn"),
        ({"messages": TALK[2:]}, "begins with the assistant"),
        ({"messages": "a"}, "`messages` must be a non-empty list"),
        ({"messages": [{"content": "a"}]}, "must have"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "image"),
        ({"prompt": "a", "completion": [TALK[1]]}, "must end with an assistant"),
        ({"completion": "a"}, "expected a `prompt`"),
        ({"prompt": "one", "completion": TALK[:3]}, "are not those of the prompt"),
    ],
)
def test_refused_rows(tokenizer, row, expected):
    with pytest.raises(ConfigError, match=expected) as error:
        trained(chat_of(tokenizer), row)
    assert str(error.value).startswith("row 1: ")


PAIRS = [
    {"prompt": "one", "chosen": "two", "rejected": "three"},
    {"prompt": [{"role": "user", "content": "one"}], "chosen": "two", "rejected": "three"},
    {
        "prompt": "one",
        "chosen": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}],
        "rejected": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "three"}],
    },
    {
        "chosen": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}],
        "rejected": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "three"}],
    },
    {
        "prompt": [{"role": "user", "content": "one"}],
        "chosen": [{"role": "assistant", "content": "two"}],
        "rejected": [{"role": "assistant", "content": "three"}],
    },
]


@pytest.mark.parametrize("row", PAIRS)
def test_all_forms_of_a_pair_are_the_same_pair(tokenizer, row):
    chat = chat_of(tokenizer)
    first, other = (encode_pair(r, "row 1", chat) for r in (PAIRS[0], row))
    assert first.prompt_id == other.prompt_id
    assert str(first.example()) == str(other.example())
    assert encode_pair({**row, "rejected": row["chosen"]}, "row 1", chat) is None


def test_pairs_and_labels_of_responses(tokenizer):
    chat = chat_of(tokenizer)
    up, down = encode_labeled(PAIRS[2], "row 1", chat)
    assert [up.scalars, down.scalars] == [{"desirable": 1.0}, {"desirable": 0.0}]
    row = {"prompt": "one", "completion": "two", "label": True}
    (same,) = encode_labeled(row, "row 1", chat)
    assert same.prompt_id == up.prompt_id != down.prompt_id
    for label in (None, "yes", 2):
        with pytest.raises(ConfigError, match=r"row 1: expected .* `label`"):
            encode_labeled({**row, "label": label}, "row 1", chat)
    with pytest.raises(ConfigError, match="differ before their last turns"):
        encode_pair({**PAIRS[3], "chosen": TALK[:3]}, "row 1", chat)


def test_rows_that_are_too_long_name_the_row(tokenizer, tmp_path):
    file = tmp_path / "d.jsonl"
    rows = [{"prompt": "one", "completion": "two"}, {"prompt": "one", "completion": "two" * 30}]
    file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]))
    config = FileSourceConfig(path=file)
    sources = [("d", FileSource(config, base=tmp_path), config)]
    chat = chat_of(tokenizer, max_length=16)

    def encode(row, where, chat, *, drop):
        example = encode_demonstration(row, where, chat, last_only=False)
        return (example,) if fits(example.rows, chat, where, drop=drop) else ()

    with pytest.raises(ConfigError, match=r"prompts.train: .*d\.jsonl row 2: \d+ tokens, but the"):
        load_examples(sources, lambda *a: encode(*a, drop=False), chat, key="prompts.train")
    prompts, examples = load_examples(sources, lambda *a: encode(*a, drop=True), chat, key="k")
    assert len(examples) == 1 and prompts.duplicates == 1
    assert prompts.prompts[0].prompt_id == examples[0].prompt_id
