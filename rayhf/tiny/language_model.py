"""A small Llama policy: supervised training on demonstrations, and batched sampling.

In: (prompt, response) texts and a tokenizer. Out: a model that generates such responses. Building
the tiny world needs no inference engine: `sample` uses torch and transformers only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

MAX_LENGTH = 512
"""max_position_embeddings of every model here, in tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSize:
    """Size of a Llama model.

    For Llama, transformers loads a tokenizer as it was saved; for Qwen2 it substitutes a class of
    its own, with one token more than the model has. The head size is 32, the smallest that vLLM's
    CPU attention supports.
    """

    hidden: int = 128
    layers: int = 4
    intermediate: int = 384

    def config(self, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
        """Return the model's config, with the vocabulary of `tokenizer`."""
        heads = self.hidden // 32
        return LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=MAX_LENGTH,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            dtype="float32",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A phase of supervised training.

    `steps` batches of `batch` demonstrations, with a learning rate from `lr` to `lr_end`.
    """

    steps: int
    batch: int
    lr: float
    lr_end: float


def new_model(size: ModelSize, tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """Return a model with random weights from the seed; torch's random state is unchanged."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(size.config(tokenizer)).float()


def encode_prompts(prompts: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    """Return the token ids of each user message, generation prompt included."""
    chats = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
        for prompt in prompts
    ]
    return [list(ids) for ids in tokenizer(chats, add_special_tokens=False)["input_ids"]]


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    demonstrations: Sequence[tuple[str, str]],
    phase: Phase,
    *,
    seed: int,
    progress: Callable[[float], None],
) -> float:
    """Maximize the likelihood of the responses.

    Returns the mean loss of the last tenth of the steps, in nats per token.
    """
    prompts = encode_prompts([prompt for prompt, _ in demonstrations], tokenizer)
    answers = tokenizer([response for _, response in demonstrations], add_special_tokens=False)[
        "input_ids"
    ]
    rows = [
        (prompt, [*answer, tokenizer.eos_token_id])
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=phase.lr, betas=(0.9, 0.98), weight_decay=0.01
    )
    warmup = min(20, phase.steps // 4)
    losses: list[float] = []
    model.train()
    for step in range(phase.steps):
        for group in optimizer.param_groups:
            decay = phase.lr_end + (phase.lr - phase.lr_end) * (1 - step / phase.steps)
            group["lr"] = decay * min(1.0, (step + 1) / max(1, warmup))
        batch = torch.randint(len(rows), (phase.batch,), generator=generator).tolist()
        inputs, labels = _pad_right([rows[index] for index in batch], pad=tokenizer.pad_token_id)
        # Padding is on the right and has no label, and attention is causal: no token that counts
        # attends to it.
        logits = model(input_ids=inputs, use_cache=False).logits[:, :-1]
        loss = cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        progress((step + 1) / phase.steps)
    model.eval()
    tail = losses[-max(1, phase.steps // 10) :]
    return sum(tail) / len(tail)


def _pad_right(rows: Sequence[tuple[list[int], list[int]]], *, pad: int) -> tuple[Tensor, Tensor]:
    """Return (inputs, labels) of shape (rows, longest); -100 labels prompts and padding."""
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    inputs = torch.full((len(rows), width), pad)
    labels = torch.full((len(rows), width), -100)
    for index, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        inputs[index, :end] = torch.tensor(prompt + answer)
        labels[index, len(prompt) : end] = torch.tensor(answer)
    return inputs, labels


@torch.inference_mode()
def sample(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    *,
    max_tokens: int,
    temperature: float,
    seed: int,
    batch: int = 256,
) -> list[tuple[str, str]]:
    """Return one (text, finish reason) per prompt; "length" if `max_tokens` was reached.

    Temperature 0 is greedy.
    """
    generator = torch.Generator().manual_seed(seed)
    completions: list[tuple[str, str]] = []
    encoded = encode_prompts(prompts, tokenizer)
    for start in range(0, len(prompts), batch):
        tokens = _sample_batch(
            model, tokenizer, encoded[start : start + batch], max_tokens, temperature, generator
        )
        for row in tokens.tolist():
            stopped = tokenizer.eos_token_id in row
            kept = row[: row.index(tokenizer.eos_token_id)] if stopped else row
            completions.append(
                (tokenizer.decode(kept, skip_special_tokens=True), "stop" if stopped else "length")
            )
    return completions


def _sample_batch(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    temperature: float,
    generator: torch.Generator,
) -> Tensor:
    """Return response tokens of shape (prompts, at most max_tokens).

    Tokens after an end-of-turn token are arbitrary.
    """
    width = max(map(len, prompts))
    inputs = torch.tensor(
        [[tokenizer.pad_token_id] * (width - len(ids)) + list(ids) for ids in prompts]
    )
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts])
    finished = torch.zeros(len(prompts), dtype=torch.bool)
    cache = None
    columns = []
    for _ in range(max_tokens):
        positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, -inputs.shape[1] :]
        result = model(
            input_ids=inputs,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = result.past_key_values
        logits = result.logits[:, -1].float()
        if temperature == 0:
            token = logits.argmax(-1)
        else:
            token = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[
                :, 0
            ]
        columns.append(token)
        finished |= token == tokenizer.eos_token_id
        if bool(finished.all()):
            break
        inputs = token[:, None]
        mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
    return torch.stack(columns, dim=1)
