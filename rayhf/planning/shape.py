"""Shape of a dense decoder: parameters and the bytes of one token's tensors.

In: a model's config.json; no weights are read. Out: numbers for estimates.

H is the hidden size, I the MLP's, s the bytes of a number.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rayhf.config.schema import Dtype, LoraConfig
from rayhf.errors import ConfigError
from rayhf.models.source import AS_DATA

BYTES: dict[Dtype, int] = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Shape of a dense decoder (llama, qwen, mistral ...)."""

    body: int
    """Parameters without the output head."""
    tied: bool
    """Whether the output head is the embedding."""
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    linears: tuple[tuple[str, int, int], ...]
    """Name, inputs and outputs of every linear layer of the body: the layers LoRA can adapt."""

    @property
    def parameters(self) -> int:
        """Parameters of the language model."""
        return self.body + (0 if self.tied else self.vocabulary * self.hidden)

    @property
    def linear_weights(self) -> int:
        """Weights of the body's linear layers, which QLoRA keeps in 4 bits."""
        return sum(inputs * outputs for _, inputs, outputs in self.linears)

    def adapters(self, lora: LoraConfig) -> int:
        """Return the parameters of LoRA: A is rank x inputs, B is outputs x rank."""
        targets = lora.target_modules
        adapted = [
            inputs + outputs
            for name, inputs, outputs in self.linears
            if targets == "all-linear" or any(name.endswith(target) for target in targets)
        ]
        return lora.rank * sum(adapted)

    def cache_per_token(self, dtype: Dtype) -> int:
        """Return the bytes of one token's keys and values in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * BYTES[dtype]

    def kept_per_token(self, dtype: Dtype) -> float:
        """Return the bytes that one layer keeps of one token for its backward pass.

        As transformers computes it, with SDPA. Each of two norms: its input and its normalized
        input (both float32 in bfloat16 models: the norm is computed so, and the normalized input
        again in bfloat16 for the product with the weight), and its output for the linear layers
        behind it: 3 H. Attention: rotated queries and keys, values, and the output, which the next
        linear layer reads; a log-sum-exp per head. MLP: gate, activation, up and their product,
        each for the operation that reads it: 4 I.
        """
        s = BYTES[dtype]
        query = self.heads * self.head_dim
        key = self.kv_heads * self.head_dim
        norm = 3 * s * self.hidden if dtype == "float32" else (4 + 2 + 2) * self.hidden
        return 2 * norm + s * (2 * query + 2 * key + 4 * self.intermediate) + 4 * self.heads

    def transient_per_token(self, dtype: Dtype) -> float:
        """Return the bytes that one token needs only while a layer computes, in either direction.

        The residual and two tensors of its size, and three of the MLP's.
        """
        return BYTES[dtype] * (3 * self.hidden + 3 * self.intermediate)


def read_shape(model: Path, *, key: str) -> Shape:
    """Read a shape from config.json. Raise ConfigError that begins with `key`.

    Parameters are counted on a model without memory (torch's meta device).
    """
    import torch
    from transformers import AutoConfig, AutoModel

    try:
        config = AutoConfig.from_pretrained(str(model), **AS_DATA)
        with torch.device("meta"):
            body: torch.nn.Module = AutoModel.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"{key}: {model}: no estimate from its config.json ({str(error).splitlines()[0]})"
        ) from None
    text = config.get_text_config()
    linears = tuple(
        (name, module.in_features, module.out_features)
        for name, module in body.named_modules()
        if isinstance(module, torch.nn.Linear)
    )
    return Shape(
        body=sum(parameter.numel() for parameter in body.parameters()),
        tied=bool(text.tie_word_embeddings),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        heads=text.num_attention_heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        vocabulary=text.vocab_size,
        linears=linears,
    )
