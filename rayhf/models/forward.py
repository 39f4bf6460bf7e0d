"""The forward pass that learner, reference and preference models share: rows in, numbers out.

rows -> Inputs (token ids, the positions that predict response tokens, the tokens to predict)
     -> PolicyHead: log-probs and entropy of the response tokens, shape (T,); and log-probs of K
        further tokens at each of their positions, shape (T, K)
     -> ValueHead: values before the response tokens, shape (T,)
     -> ScoreHead: d outputs for a whole text, shape (T, d); see scored_row.

The response tokens of all rows are concatenated without padding. Rows are fed in one of two forms.
Packed: one sequence without padding, in which rows may share prefixes (prefix_tree.py); attention
is over the tree, position ids are depths. Padded: a row per line, padded on the right; attention is
causal, so no real token ever attends to padding: no attention mask is needed, and position ids are
the plain 0, 1, 2 ... The last token of a row predicts no trained token, so it is not fed. The
language-model head runs only at the positions that predict response tokens.

Shapes: B rows of a micro-batch, S padded length (packed: B is 1, S the number of tree nodes), T
response tokens, H hidden size, V vocabulary, d outputs of a score head.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rayhf.config.schema import Packing
from rayhf.errors import ConfigError
from rayhf.models.peft import base_model
from rayhf.models.prefix_tree import Ints, build_tree
from rayhf.models.tree_attention import NAME, Tree, place_tree, register
from rayhf.types import Row, given_row, token_array

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel
    from transformers.modeling_outputs import MoeModelOutputWithPast

Entropy = Literal["off", "metric", "loss"]
HeadOutput = tuple[Tensor, Tensor | None]
"""A head's values, and what else of a policy was requested: entropy_T, or ids_TK of the likeliest
tokens."""

LOGITS_LIMIT = 1 << 27
"""Most logits (T x V) in memory at once: 512 MiB in float32. Longer inputs are split."""


# ----------------------------------------------------------------------------------------- inputs


@dataclass(frozen=True, slots=True)
class Inputs:
    """Model inputs of one micro-batch."""

    ids_BS: Tensor
    """int64. Padded rows: without the last token of the longest row, 0 on the right."""
    predict_T: Tensor
    """int64 index into the flattened (B*S,) positions that predict the response tokens."""
    target_T: Tensor
    """int64, the response tokens."""
    top_TK: Tensor | None = None
    """int64, K further tokens at each position, whose log-probs are wanted too."""
    tree: Tree | None = None
    """Of packed rows."""
    most: int = 0
    """Largest T of any rank in this forward pass: the head runs in as many pieces as that needs."""

    @property
    def fed(self) -> int:
        """Tokens that go through the model, padding included."""
        return self.ids_BS.numel()


EMPTY = given_row("", (0,), (0,))
"""What an empty micro-batch feeds, so that it still runs every collective."""


def build_inputs(
    rows: Sequence[Row], device: torch.device | str, *, packing: Packing = "off", most: int = 0
) -> Inputs:
    """Lay rows out as model inputs; without rows, one dummy position.

    `most`: largest T of any rank. Raises ConfigError for a row without prompt or response.
    """
    rows = rows or [EMPTY]
    for row in rows:
        if not row.prompt_ids.size or not row.response_ids.size:
            raise ConfigError(
                f"row of prompt {row.prompt_id!r}, sample {row.sample}: {len(row.prompt_ids)} "
                f"prompt and {len(row.response_ids)} response tokens; expected at least one of each"
            )
    target_T = np.concatenate([row.response_ids for row in rows]).astype(np.int64)
    tree = None
    if packing == "off":
        ids_BS, predict_T = _pad(rows)
    else:
        layout = build_tree(rows, share=packing == "tree")
        ids_BS, predict_T = layout.ids_N[None], layout.predict_T
        tree = place_tree(layout, device)
    return Inputs(
        ids_BS=torch.from_numpy(ids_BS).to(device),
        predict_T=torch.from_numpy(predict_T).to(device),
        target_T=torch.from_numpy(target_T).to(device),
        top_TK=_top_ids(rows, device),
        tree=tree,
        most=most,
    )


def _top_ids(rows: Sequence[Row], device: torch.device | str) -> Tensor | None:
    """Return the reference's likeliest tokens; None unless all rows have them."""
    ids = [row.reference_top.top_ids for row in rows if row.reference_top is not None]
    if len(ids) < len(rows):
        return None
    return torch.from_numpy(np.concatenate(ids).astype(np.int64)).to(device)


def _pad(rows: Sequence[Row]) -> tuple[Ints, Ints]:
    """Return ids_BS and predict_T of padded rows."""
    length = max(len(row) for row in rows) - 1
    ids_BS = np.zeros((len(rows), length), dtype=np.int64)
    predict: list[Ints] = []
    for b, row in enumerate(rows):
        ids_BS[b, : len(row) - 1] = row.fed_ids
        predict.append(b * length + row.predicted_at)
    return ids_BS, np.concatenate(predict)


def scored_row(
    token_ids: Sequence[int],
    *,
    prompt_id: str,
    sample: int,
    scalars: Mapping[str, float] | None = None,
) -> Row:
    """Return a whole text as a Row for a ScoreHead.

    A head reads at the position that predicts a response token. The whole text is the prompt, so
    the head reads at the text's last token; the one response token is never fed.
    """
    return Row(
        prompt_id=prompt_id,
        sample=sample,
        prompt_ids=token_array(token_ids),
        response_ids=token_array((0,)),
        scalars=scalars or {},
    )


def prepare_config(config: PreTrainedConfig, *, attention: str, packing: Packing = "off") -> None:
    """Set up a transformers config for this forward pass.

    Dropout is turned off: a second pass must give the same numbers. Packed rows need attention over
    their tree. For padded ones, "sdpa" becomes "eager" for attention that it does not compute:
    capped scores (gemma2), sinks (gpt_oss).
    """
    if packing != "off":
        register()
        attention = NAME
    elif attention == "sdpa" and not _has_sdpa(config):
        attention = "eager"
    for name, value in vars(config).items():
        if (name.endswith(("dropout", "_pdrop", "dropout_prob", "dropout_rate"))) and isinstance(
            value, float
        ):
            setattr(config, name, 0.0)
    config.use_cache = False
    config._attn_implementation = attention


def _has_sdpa(config: PreTrainedConfig) -> bool:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    return not capped and bool(getattr(model_class, "_supports_sdpa", True))


# ------------------------------------------------------------------------------------------ heads


class SelectLogSoftmax(torch.autograd.Function):
    """Log-probs of chosen tokens, and entropy, without storing a (T, V) log-softmax.

    (logits_TV, target_TK) -> (log p(target)_TK, entropy_T). Backward uses d logp_t/d z_v =
    1[v = t] - p_v and d H/d z_v = -p_v (log p_v + H), with z = logits / temperature. Arithmetic is
    in float32; what is kept for backward is the logits as they come.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits_TV: Tensor,
        target_TK: Tensor,
        entropy: Entropy,
        temperature: float = 1.0,
    ) -> HeadOutput:
        ctx.temperature = temperature
        z_TV = _scaled(logits_TV, temperature)
        lse_T = torch.logsumexp(z_TV, dim=-1)
        logp_TK = z_TV.gather(1, target_TK) - lse_T[:, None]
        entropy_T = None
        if entropy != "off":
            entropy_T = lse_T - (torch.exp(z_TV - lse_T[:, None]) * z_TV).sum(-1)
            if entropy == "metric":
                ctx.mark_non_differentiable(entropy_T)
        ctx.save_for_backward(logits_TV, target_TK, lse_T, entropy_T if entropy == "loss" else None)
        return logp_TK, entropy_T

    @staticmethod
    def backward(
        ctx: Any, grad_logp_TK: Tensor, grad_entropy_T: Tensor | None
    ) -> tuple[Tensor, None, None, None]:
        logits_TV, target_TK, lse_T, entropy_T = ctx.saved_tensors
        grad_logp_T1 = grad_logp_TK.sum(1, keepdim=True)
        z_TV = _scaled(logits_TV, ctx.temperature)
        grad_TV = z_TV - lse_T[:, None] if z_TV is logits_TV else z_TV.sub_(lse_T[:, None])
        if entropy_T is None:
            grad_TV.exp_().mul_(-grad_logp_T1)
        else:
            assert grad_entropy_T is not None
            p_TV = grad_TV.exp()
            grad_TV.add_(entropy_T[:, None]).mul_(-grad_entropy_T[:, None]).sub_(grad_logp_T1).mul_(
                p_TV
            )
        grad_TV.scatter_add_(1, target_TK, grad_logp_TK)
        if ctx.temperature != 1:
            grad_TV.div_(ctx.temperature)
        return grad_TV.to(logits_TV.dtype), None, None, None


def _scaled(logits_TV: Tensor, temperature: float) -> Tensor:
    """Return logits / temperature in float32; the logits themselves where that is the same."""
    z_TV = logits_TV.float()
    if temperature == 1:
        return z_TV
    return z_TV / temperature if z_TV is logits_TV else z_TV.div_(temperature)


def _top_log_softmax(
    logits_TV: Tensor, target_TK: Tensor, top_k: int, temperature: float
) -> HeadOutput:
    """Return log-probs of K chosen and of the top_k likeliest tokens, (T, K + top_k), and the ids.

    Without gradient. The likeliest token is first.
    """
    z_TV = _scaled(logits_TV, temperature)
    lse_T1 = torch.logsumexp(z_TV, dim=-1, keepdim=True)
    top = z_TV.topk(top_k, dim=-1)
    return torch.cat([z_TV.gather(1, target_TK), top.values], dim=1) - lse_T1, top.indices


class Head(nn.Module):
    """A Hugging Face model, or PEFT around one, and how its rows are fed."""

    def __init__(self, model: nn.Module, packing: Packing = "off") -> None:
        super().__init__()
        self.model = model
        self.packing: Packing = packing


class PolicyHead(Head):
    """A causal language model that returns log-probs."""

    def forward(
        self, inputs: Inputs, temperature: float, entropy: Entropy = "off", top_k: int = 0
    ) -> HeadOutput:
        """Return (log p(target)_T, entropy_T) at this temperature, float32, in nats.

        Where the inputs have top_TK, the log-probs are (T, 1 + K): of the target and of these. With
        `top_k`, which is for a model without gradient, they are (T, 1 + top_k): of the target and
        of the likeliest tokens, and these tokens' ids are in the place of entropy_T.
        """
        causal = base_model(self.model)
        hidden_TH = _hidden(causal, inputs)
        to_logits = _logits_function(causal)
        target_TK = inputs.target_T[:, None]
        if inputs.top_TK is not None:
            target_TK = torch.cat([target_TK, inputs.top_TK], dim=1)

        def select(hidden_TH: Tensor, target_TK: Tensor) -> HeadOutput:
            logits_TV = to_logits(hidden_TH)
            if top_k:
                return _top_log_softmax(logits_TV, target_TK, top_k, temperature)
            apply: Callable[..., HeadOutput] = SelectLogSoftmax.apply
            return apply(logits_TV, target_TK, entropy, temperature)

        most = max(len(hidden_TH), inputs.most)
        pieces = math.ceil(most * int(causal.config.vocab_size) / LOGITS_LIMIT)
        if pieces == 1:
            logp_TK, other = select(hidden_TH, target_TK)
            return logp_TK.squeeze(1), other
        # Recomputing each piece's logits in backward keeps only one piece in memory at a time.
        # ZeRO-3 gathers the head's weights in each call, on all ranks together: every rank calls it
        # equally often, with empty pieces where it has fewer tokens than pieces.
        run = (
            (lambda h, t: checkpoint(select, h, t, use_reentrant=False))
            if torch.is_grad_enabled()
            else select
        )
        parts = [
            run(h, t)
            for h, t in zip(
                torch.tensor_split(hidden_TH, pieces),
                torch.tensor_split(target_TK, pieces),
                strict=True,
            )
        ]
        others = [other for _, other in parts if other is not None]
        logp_TK = torch.cat([logp for logp, _ in parts])
        return logp_TK.squeeze(1), torch.cat(others) if others else None


class ValueHead(Head):
    """A token classifier with one label that returns values."""

    def forward(self, inputs: Inputs, temperature: float, entropy: Entropy = "off") -> HeadOutput:
        """Return (value_T, None), float32.

        value[t] is read at position prompt_len - 1 + t, before response token t is known.
        """
        classifier = base_model(self.model)
        value_T: Tensor = classifier.score(_hidden(classifier, inputs)).float().squeeze(-1)
        return value_T, None


class ScoreHead(Head):
    """A sequence classifier with d labels, read at each text's last token.

    The model's padding token plays no part, unlike in transformers' own forward pass.
    """

    def forward(self, inputs: Inputs, temperature: float, entropy: Entropy = "off") -> HeadOutput:
        """Return (output_Td, None), float32; for rows of `scored_row` T is the number of rows."""
        classifier = base_model(self.model)
        output_Td: Tensor = classifier.score(_hidden(classifier, inputs)).float()
        return output_Td, None


def score_texts(
    classifier: nn.Module, texts: Sequence[Sequence[int]], device: torch.device
) -> Tensor:
    """Return a causal sequence classifier's outputs at each text's last token: float32 (R, d)."""
    rows = [scored_row(ids, prompt_id="text", sample=i) for i, ids in enumerate(texts)]
    output_Rd: Tensor = ScoreHead(classifier)(build_inputs(rows, device), 1.0)[0]
    return output_Rd


class _GivenHiddenStates(nn.Module):
    """A model body that returns the hidden states it is given as embeddings."""

    def forward(self, *_: object, inputs_embeds: Tensor, **__: object) -> MoeModelOutputWithPast:
        from transformers.modeling_outputs import MoeModelOutputWithPast

        output = MoeModelOutputWithPast(last_hidden_state=inputs_embeds)
        output.cross_attentions = None  # read by gpt2
        return output


def _logits_function(causal: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """Return the model's own function from hidden states (T, H) to logits (T, V).

    It is the model's forward pass with another body. So whatever a model does after its body is
    done here too: gemma2 caps its logits, granite and cohere scale them.
    """
    head = copy.copy(causal)  # shares every parameter and submodule
    head._modules = {**causal._modules, causal.base_model_prefix: _GivenHiddenStates()}

    def to_logits(hidden_TH: Tensor) -> Tensor:
        logits_TV: Tensor = head.forward(inputs_embeds=hidden_TH[None]).logits[0]
        return logits_TV

    return to_logits


def _hidden(model: PreTrainedModel, inputs: Inputs) -> Tensor:
    """Return the last hidden states at the predicting positions: (T, H)."""
    body = getattr(model, model.base_model_prefix)
    packed = (
        {}
        if inputs.tree is None
        else {"position_ids": inputs.tree.depth_N[None], "tree": inputs.tree}
    )
    hidden_BSH: Tensor = body(input_ids=inputs.ids_BS, use_cache=False, **packed).last_hidden_state
    return hidden_BSH.flatten(0, 1).index_select(0, inputs.predict_T)
