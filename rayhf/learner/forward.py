"""Rows in, one number per response token out: the forward pass that learner and reference share.

rows -> Inputs (padded token ids, the positions that predict response tokens, the tokens to predict)
     -> PolicyHead (log-probs, entropy) or ValueHead (values), laid end to end without padding:
     shape (T,); -> ScoreHead (d outputs for a whole text): shape (T, d), where every row has one
     response token, see scored_row.

Rows are padded on the right and attention is causal, so no real token ever sees padding: no
attention mask is needed, and position ids are the plain 0, 1, 2 ... The last token of a row
predicts nothing that is trained on, so it is not fed. The language-model head runs only at the
positions that predict response tokens.

Shapes: B rows of a micro-batch, S padded length, T response tokens, H hidden size, V vocabulary, d
outputs of a score head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rayhf.errors import ConfigError
from rayhf.losses.base import MicroBatch, Totals
from rayhf.types import Example, Row

Entropy = Literal["off", "metric", "loss"]

LOGITS_LIMIT = 1 << 27
"""Logits (T x V) that are alive at once, in elements: 512 MiB in float32. Beyond it the head runs
in pieces."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a model needs for one micro-batch."""

    ids_BS: Tensor
    """int64, padded with 0 on the right; the last token of the longest row is not there."""
    predict_T: Tensor
    """int64 index into the flattened (B*S,) positions: where each response token is predicted."""
    target_T: Tensor
    """int64, the response tokens."""


def build_inputs(rows: Sequence[Row], device: torch.device | str) -> Inputs:
    """Pad rows. Without rows: one dummy position, so that an empty micro-batch still runs every
    collective."""
    if not rows:
        zero = torch.zeros(1, dtype=torch.int64, device=device)
        return Inputs(torch.zeros(1, 1, dtype=torch.int64, device=device), zero, zero.clone())
    for row in rows:
        if not row.prompt_ids or not row.response_ids:
            raise ConfigError(
                f"row of prompt {row.prompt_id!r}, sample {row.sample}: {len(row.prompt_ids)} prompt and "
                f"{len(row.response_ids)} response tokens; expected at least one of each"
            )
    length = max(len(row) for row in rows) - 1
    ids_BS = np.zeros((len(rows), length), dtype=np.int64)
    predict: list[np.ndarray[Any, np.dtype[np.int64]]] = []
    for b, row in enumerate(rows):
        ids_BS[b, : len(row) - 1] = (row.prompt_ids + row.response_ids)[:-1]
        first = b * length + len(row.prompt_ids) - 1
        predict.append(np.arange(first, first + len(row.response_ids)))
    target_T = np.concatenate([np.asarray(row.response_ids, dtype=np.int64) for row in rows])
    tensors = [
        torch.from_numpy(array).to(device) for array in (ids_BS, np.concatenate(predict), target_T)
    ]
    return Inputs(*tensors)


def build_micro(
    examples: Sequence[Example], totals: Totals, device: torch.device | str
) -> tuple[Inputs, MicroBatch]:
    """Tensors for the model and for the loss. A named value that only some rows carry is NaN for
    the others."""
    rows = [row for example in examples for row in example.rows]
    lengths = [len(row.response_ids) for row in rows]

    def field(names: set[str], values: Callable[[str], list[Any]]) -> dict[str, Tensor]:
        stack = {
            name: np.concatenate([np.atleast_1d(v) for v in values(name)]) for name in sorted(names)
        }
        return {
            name: torch.from_numpy(v.astype(np.float32, copy=False)).to(device)
            for name, v in stack.items()
        }

    def tokens(name: str) -> list[Any]:
        return [
            row.tokens.get(name, np.full(len(row.response_ids), np.nan, np.float32)) for row in rows
        ]

    token_names = {name for row in rows for name in row.tokens}
    row_names = {name for row in rows for name in row.scalars}
    example_names = {name for example in examples for name in example.scalars}
    number_R = torch.arange(len(rows), device=device)
    length_R = torch.tensor(lengths, dtype=torch.int64, device=device)
    count_E = torch.tensor(
        [len(example.rows) for example in examples], dtype=torch.int64, device=device
    )
    micro = MicroBatch(
        tokens=field(token_names, tokens),
        rows=field(row_names, lambda name: [row.scalars.get(name, np.nan) for row in rows]),
        examples=field(
            example_names, lambda name: [example.scalars.get(name, np.nan) for example in examples]
        ),
        row_T=torch.repeat_interleave(number_R, length_R),
        length_R=length_R.float(),
        example_R=torch.repeat_interleave(torch.arange(len(examples), device=device), count_E),
        totals=totals,
    )
    return build_inputs(rows, device), micro


class SelectLogSoftmax(torch.autograd.Function):
    """(logits_TV, target_T) -> (log p(target)_T, entropy_T), without ever storing a (T, V)
    log-softmax.

    Backward uses d logp_t/d z_v = 1[v = t] - p_v and d H/d z_v = -p_v (log p_v + H). Arithmetic is
    in float32.
    """

    @staticmethod
    def forward(
        ctx: Any, logits_TV: Tensor, target_T: Tensor, entropy: Entropy
    ) -> tuple[Tensor, Tensor | None]:
        z_TV = logits_TV.float()
        lse_T = torch.logsumexp(z_TV, dim=-1)
        logp_T = z_TV.gather(1, target_T[:, None]).squeeze(1) - lse_T
        entropy_T = None
        if entropy != "off":
            entropy_T = lse_T - (torch.exp(z_TV - lse_T[:, None]) * z_TV).sum(-1)
            if entropy == "metric":
                ctx.mark_non_differentiable(entropy_T)
        ctx.save_for_backward(logits_TV, target_T, lse_T, entropy_T if entropy == "loss" else None)
        return logp_T, entropy_T

    @staticmethod
    def backward(
        ctx: Any, grad_logp_T: Tensor, grad_entropy_T: Tensor | None
    ) -> tuple[Tensor, None, None]:
        logits_TV, target_T, lse_T, entropy_T = ctx.saved_tensors
        grad_TV = logits_TV.float() - lse_T[:, None]
        if entropy_T is None:
            grad_TV.exp_().mul_(-grad_logp_T[:, None])
        else:
            assert grad_entropy_T is not None
            p_TV = grad_TV.exp()
            grad_TV.add_(entropy_T[:, None]).mul_(-grad_entropy_T[:, None]).sub_(
                grad_logp_T[:, None]
            ).mul_(p_TV)
        grad_TV.scatter_add_(1, target_T[:, None], grad_logp_T[:, None])
        return grad_TV.to(logits_TV.dtype), None, None


class PolicyHead(nn.Module):
    """A Hugging Face causal language model (or PEFT around one) that answers with log-probs of the
    response tokens."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, inputs: Inputs, temperature: float, entropy: Entropy = "off"
    ) -> tuple[Tensor, Tensor | None]:
        """(log p(target)_T, entropy_T) at this temperature, float32, in nats."""
        causal = base_model(self.model)
        hidden_TH = _hidden(causal, inputs)
        head = causal.get_output_embeddings()

        def score(hidden_TH: Tensor, target_T: Tensor) -> tuple[Tensor, Tensor | None]:
            logits_TV = head(hidden_TH)
            if temperature != 1:
                logits_TV = logits_TV.float() / temperature
            result: tuple[Tensor, Tensor | None] = SelectLogSoftmax.apply(
                logits_TV, target_T, entropy
            )  # type: ignore[no-untyped-call]
            return result

        piece: int = max(1, LOGITS_LIMIT // int(causal.config.vocab_size))
        if len(hidden_TH) <= piece:
            return score(hidden_TH, inputs.target_T)
        # Each piece's logits are computed again in backward, so that only one piece is alive at a
        # time.
        run = (
            (lambda h, t: checkpoint(score, h, t, use_reentrant=False))
            if torch.is_grad_enabled()
            else score
        )
        parts = [
            run(h, t)
            for h, t in zip(
                torch.split(hidden_TH, piece), torch.split(inputs.target_T, piece), strict=True
            )
        ]
        logp_T = torch.cat([logp for logp, _ in parts])
        return logp_T, None if entropy == "off" else torch.cat(
            [e for _, e in parts if e is not None]
        )


class ValueHead(nn.Module):
    """A Hugging Face token classifier with one label that answers with the value before each
    response token."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, inputs: Inputs, temperature: float, entropy: Entropy = "off"
    ) -> tuple[Tensor, Tensor | None]:
        """(value_T, None); value[t] is read at position prompt_len - 1 + t, before response token t
        is known."""
        classifier = base_model(self.model)
        value_T: Tensor = classifier.score(_hidden(classifier, inputs)).float().squeeze(-1)
        return value_T, None


class ScoreHead(nn.Module):
    """A Hugging Face sequence classifier with d labels that answers with what it says of each text,
    at its last token."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, inputs: Inputs, temperature: float, entropy: Entropy = "off"
    ) -> tuple[Tensor, Tensor | None]:
        """(output_Td, None), float32; for rows of `scored_row` T is the number of rows."""
        classifier = base_model(self.model)
        output_Td: Tensor = classifier.score(_hidden(classifier, inputs)).float()
        return output_Td, None


def scored_row(
    token_ids: Sequence[int],
    *,
    prompt_id: str,
    sample: int,
    scalars: Mapping[str, float] | None = None,
) -> Row:
    """A whole text as a Row for a score head, which reads at the position that predicts a response
    token.

    All of the text is prompt; the one response token only marks the place behind its last token,
    and is never fed.
    """
    return Row(
        prompt_id=prompt_id,
        sample=sample,
        prompt_ids=tuple(token_ids),
        response_ids=(0,),
        scalars=scalars or {},
    )


def base_model(model: nn.Module) -> Any:
    """The Hugging Face model inside PEFT, whose layers carry the adapters in place; or the model
    itself."""
    inner = getattr(model, "get_base_model", None)
    return inner() if inner is not None else model


def _hidden(model: Any, inputs: Inputs) -> Tensor:
    """Last hidden states at the predicting positions: (T, H)."""
    body = getattr(model, model.base_model_prefix)
    hidden_BSH: Tensor = body(input_ids=inputs.ids_BS, use_cache=False).last_hidden_state
    return hidden_BSH.flatten(0, 1).index_select(0, inputs.predict_T)


def prepare_config(config: Any, *, attention: str) -> None:
    """SelectionContext dropout off (a second pass must give the same numbers) and refuse what this forward pass
    does not compute."""
    for name in ("final_logit_softcapping", "logits_scaling", "logit_scale"):
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise ConfigError(
                f"policy.model: {config.model_type} rescales its logits ({name}={getattr(config, name)}), which the learner "
                "does not compute; expected a model whose logits are lm_head(hidden), such as qwen2, qwen3, llama or mistral"
            )
    for name, value in vars(config).items():
        if (name.endswith(("dropout", "_pdrop", "dropout_prob", "dropout_rate"))) and isinstance(
            value, float
        ):
            setattr(config, name, 0.0)
    config.use_cache = False
    config._attn_implementation = attention


def token_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Cut rows into batches of at most `budget` padded tokens (or one row), longest first."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batches: list[list[int]] = []
    for i in order:
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > budget:
            batches.append([])
        batches[-1].append(i)
    return batches
