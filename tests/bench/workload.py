"""The workload that all compared systems get: one model, one set of prompts, one reward.

The models are random Qwen2 with a tokenizer of short words. An end-of-sequence logit is set by
hand, so that completions never end by themselves ("fixed": each has the token limit) or end at a
chosen rate ("varying": lengths are geometric). Dimension 0 of the residual stream is a constant
that no layer writes to, and only the end token's row of the head reads it.
"""

from __future__ import annotations

import json
import random
import string
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

PAD, EOS, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"
SPECIAL = (PAD, EOS, USER, ASSISTANT)
TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|' ~ message['role'] ~ '|> ' ~ message['content'] ~ '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
TEMPLATE_TOKENS = 3
NEVER = -1e4
"""A logit that no sampler draws."""

Size = Literal["tiny", "mid", "smollm2"]
SHAPES: dict[Size, dict[str, int]] = {
    "tiny": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
    },
    "mid": {
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 8192,
    },
    "smollm2": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
    },
}


@dataclass(frozen=True, kw_only=True)
class Spec:
    """One case; sent to the compared systems as JSON."""

    algorithm: Literal["grpo", "online_dpo", "mcts_dpo"]
    model: str
    train: str
    prompt_tokens: int
    max_tokens: int
    prompts: int
    """Per step."""
    samples: int
    """Per prompt."""
    micro: int
    """Completions per forward pass; rayhf, which counts tokens, gets `micro` full-length rows."""
    threads: int
    max_staleness: int = 0
    dtype: str = "float32"
    packing: str = "auto"
    """rayhf's learner.packing."""

    @property
    def row_tokens(self) -> int:
        """The longest prompt and completion, in tokens."""
        return self.prompt_tokens + self.max_tokens

    @property
    def completions(self) -> int:
        return self.prompts * self.samples

    def dump(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def load(text: str) -> Spec:
        return Spec(**json.loads(text))


def reward(
    completion: str, *, prompt: str, reference_answer: str | None, finish_reason: str
) -> float:
    """Return the share of vowels: costs nothing, and hardly ever ties."""
    return sum(completion.count(vowel) for vowel in "aeiou") / max(len(completion), 1)


def write_prompts(path: Path, *, tokens: int, count: int = 512, seed: int = 0) -> None:
    """Write different prompts of `tokens` each, the template's included."""
    rng = random.Random(seed)
    words = _words(200)
    lines = [
        json.dumps({"prompt": " ".join(rng.choices(words, k=tokens - TEMPLATE_TOKENS))})
        for _ in range(count)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_model(
    path: Path, size: Size, *, mean_length: int | None, max_tokens: int, dtype: str = "float32"
) -> None:
    """Write a model directory. `mean_length` None: completions never end by themselves."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    shape = SHAPES[size]
    torch.manual_seed(0)
    config = Qwen2Config(
        **shape,
        max_position_embeddings=1024,
        pad_token_id=SPECIAL.index(PAD),
        eos_token_id=SPECIAL.index(EOS),
        bos_token_id=None,
        tie_word_embeddings=False,
        initializer_range=0.05,
    )
    model = Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 1.0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = 0.0
            layer.mlp.down_proj.weight[0] = 0.0
        model.lm_head.weight[:, 0] = 0.0
        model.lm_head.weight[: len(SPECIAL)] = 0.0
        model.lm_head.weight[: len(SPECIAL), 0] = NEVER
        if mean_length is not None:
            model.lm_head.weight[SPECIAL.index(EOS), 0] = _end_weight(
                model, mean_length, max_tokens
            )
    model.to(getattr(torch, dtype)).save_pretrained(path)
    _tokenizer(shape["vocab_size"]).save_pretrained(path)


def _end_weight(model: Any, mean_length: int, max_tokens: int) -> float:
    """Find, by bisection on random text, the weight for a mean length when lengths are cut off at
    `max_tokens`."""
    import torch

    ids = torch.randint(
        len(SPECIAL),
        model.config.vocab_size,
        (16, 16 + max_tokens),
        generator=torch.Generator().manual_seed(1),
    )
    hidden = model.model(ids).last_hidden_state[:, 15:-1]
    rest = torch.logsumexp(model.lm_head(hidden)[..., len(SPECIAL) :], dim=-1)
    low = -100.0
    high = 100.0
    for _ in range(40):
        middle = (low + high) / 2
        end = torch.sigmoid(middle * hidden[..., 0] - rest)
        alive = torch.cumprod(1 - end, dim=1)
        mean = 1 + alive[:, :-1].sum(1).mean()
        if mean > mean_length:
            low = middle
        else:
            high = middle
    return low


def _words(count: int) -> list[str]:
    """Return the first of a ... z, aa ... zz, aaa ...: each longer word is a shorter one plus a
    letter."""
    words: list[str] = []
    longest = [""]
    while len(words) < count:
        longest = [word + letter for word in longest for letter in string.ascii_lowercase]
        words += longest
    return words[:count]


def _tokenizer(vocab: int) -> Any:
    """Build a byte-level BPE in which a word is one token.

    AutoTokenizer replaces the saved pre-tokenizer with Qwen2's.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    space = "\u0120"  # of the byte-level alphabet
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [space + word for word in _words(vocab - len(SPECIAL) - len(alphabet))]
    ids = {token: i for i, token in enumerate([*SPECIAL, *alphabet, *words])}
    tokenizer = Tokenizer(models.BPE(ids, [(word[:-1], word[-1]) for word in words]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
        padding_side="left",
    )
