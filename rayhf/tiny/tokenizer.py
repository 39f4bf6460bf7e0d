"""The tokenizer recipe of the tiny world: byte-level BPE, which decodes to exactly the same text.

In: texts and the special tokens of the chat roles. Out: a fast tokenizer with a chat template, an
end-of-turn token that is also the end-of-sequence token, and a padding token that is neither.
Digits are never merged.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """Special tokens of a family of models.

    Different formats give different token ids for the same text.
    """

    pad: str
    end: str
    system: str
    user: str
    assistant: str
    reserved: tuple[str, ...] = ()
    """Unused first tokens, which shift every other id."""

    @property
    def tokens(self) -> list[str]:
        """All special tokens in the order of their ids."""
        return [*self.reserved, self.pad, self.end, self.system, self.user, self.assistant]

    @property
    def template(self) -> str:
        """Chat template (Jinja2) for the roles system, user and assistant."""
        roles = (
            f"{{'system': '{self.system}', 'user': '{self.user}', 'assistant': '{self.assistant}'}}"
        )
        return (
            f"{{%- set roles = {roles} -%}}"
            "{%- for message in messages -%}"
            "{%- if message['role'] not in roles -%}"
            "{{- raise_exception("
            "'Roles are system, user and assistant; got ' ~ message['role']) -}}"
            "{%- endif -%}"
            f"{{{{- roles[message['role']] ~ message['content'] ~ '{self.end}' -}}}}"
            "{%- endfor -%}"
            f"{{%- if add_generation_prompt -%}}{{{{- '{self.assistant}' -}}}}{{%- endif -%}}"
        )


POLICY_FORMAT = ChatFormat(
    pad="<|pad|>", end="<|end|>", system="<|system|>", user="<|user|>", assistant="<|assistant|>"
)
REWARD_FORMAT = ChatFormat(
    pad="[PAD]",
    end="[END]",
    system="[SYSTEM]",
    user="[QUESTION]",
    assistant="[REPLY]",
    reserved=("[RESERVED-0]", "[RESERVED-1]", "[RESERVED-2]"),
)


def train_tokenizer(
    texts: Iterable[str], chat: ChatFormat, *, max_vocab: int, max_length: int
) -> PreTrainedTokenizerFast:
    """Train a tokenizer on `texts`.

    Merging stops when every frequent word is one token or the vocabulary has `max_vocab` entries.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=max_vocab,
        min_frequency=2,
        special_tokens=chat.tokens,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=chat.pad,
        eos_token=chat.end,
        additional_special_tokens=[*chat.reserved, chat.system, chat.user, chat.assistant],
        chat_template=chat.template,
        clean_up_tokenization_spaces=False,
        model_max_length=max_length,
        padding_side="left",
    )
