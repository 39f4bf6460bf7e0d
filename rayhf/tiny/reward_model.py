"""A reward model: a sequence classifier trained on preference pairs with the Bradley-Terry loss.

In: the policy that generated the pairs, and the pairs as text. Out: a classifier with its own
tokenizer and chat template. It starts from the policy's weights, as reward models usually do;
embeddings are moved to the new ids of their tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from rayhf.tiny.language_model import Phase
from rayhf.tiny.tokenizer import POLICY_FORMAT, REWARD_FORMAT


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """Two responses to one prompt, and which one the labeler chose."""

    prompt: str
    chosen: str
    rejected: str


def from_policy(
    policy: LlamaForCausalLM, old: PreTrainedTokenizerFast, new: PreTrainedTokenizerFast, seed: int
) -> LlamaForSequenceClassification:
    """Return a classifier with the policy's body, the new tokenizer's ids and a new head.

    The head has one output. Both tokenizers must have the same merges.
    """
    config = copy.deepcopy(policy.config)
    config.vocab_size = len(new)
    config.num_labels = 1
    config.pad_token_id = new.pad_token_id
    config.eos_token_id = new.eos_token_id
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForSequenceClassification(config).float()
    body = {
        name: value
        for name, value in policy.model.state_dict().items()
        if name != "embed_tokens.weight"
    }
    model.model.load_state_dict(body, strict=False)
    renamed = dict(
        zip(REWARD_FORMAT.tokens[len(REWARD_FORMAT.reserved) :], POLICY_FORMAT.tokens, strict=True)
    )
    with torch.no_grad():
        for token, index in new.get_vocab().items():
            source = renamed.get(token, token)
            if source in old.get_vocab():
                model.model.embed_tokens.weight[index] = policy.model.embed_tokens.weight[
                    old.get_vocab()[source]
                ]
    return model


def encode(
    prompts: Sequence[str], answers: Sequence[str], tokenizer: PreTrainedTokenizerFast
) -> list[list[int]]:
    """Return the token ids of whole conversations under the tokenizer's chat template."""
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}],
            tokenize=False,
        )
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    return [list(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]


def rewards(model: LlamaForSequenceClassification, rows: Sequence[Sequence[int]]) -> Tensor:
    """Return rewards of shape (rows,), read at the last token that is not padding."""
    width = max(map(len, rows))
    pad = model.config.pad_token_id
    inputs = torch.tensor([list(row) + [pad] * (width - len(row)) for row in rows])
    scores: Tensor = model(
        input_ids=inputs, attention_mask=(inputs != pad).long(), use_cache=False
    ).logits[:, 0]
    return scores


def train_on_pairs(
    model: LlamaForSequenceClassification,
    tokenizer: PreTrainedTokenizerFast,
    pairs: Sequence[PreferencePair],
    phase: Phase,
    *,
    seed: int,
    progress: Callable[[float], None],
) -> None:
    """Minimize -log sigmoid(r(chosen) - r(rejected)), epoch by epoch."""
    prompts = [pair.prompt for pair in pairs]
    chosen = encode(prompts, [pair.chosen for pair in pairs], tokenizer)
    rejected = encode(prompts, [pair.rejected for pair in pairs], tokenizer)
    generator = torch.Generator().manual_seed(seed)
    epochs = -(-phase.steps * phase.batch // len(pairs))
    order = torch.cat(
        [torch.randperm(len(pairs), generator=generator) for _ in range(epochs)]
    ).tolist()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=phase.lr, betas=(0.9, 0.98), weight_decay=0.05
    )
    model.train()
    for step in range(phase.steps):
        for group in optimizer.param_groups:
            group["lr"] = phase.lr_end + (phase.lr - phase.lr_end) * (1 - step / phase.steps)
        batch = order[step * phase.batch : (step + 1) * phase.batch]
        scores = rewards(
            model, [chosen[index] for index in batch] + [rejected[index] for index in batch]
        )
        margin = scores[: len(batch)] - scores[len(batch) :]
        # The second term keeps rewards around zero: pairs do not determine their level.
        loss = -logsigmoid(margin).mean() + 0.001 * scores.square().mean()
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        progress((step + 1) / phase.steps)
    model.eval()


@torch.inference_mode()
def score(
    model: LlamaForSequenceClassification,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    answers: Sequence[str],
    *,
    batch: int = 256,
) -> list[float]:
    """Return the reward of each response."""
    rows = encode(prompts, answers, tokenizer)
    return [
        value
        for start in range(0, len(rows), batch)
        for value in rewards(model, rows[start : start + batch]).tolist()
    ]
