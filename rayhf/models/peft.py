"""The Hugging Face model inside a PEFT wrapper, and the modules that get an adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from rayhf.config.schema import LoraConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def base_model(model: nn.Module) -> PreTrainedModel:
    """Return the Hugging Face model that PEFT wraps, or the model itself where PEFT does not.

    Its layers carry the adapters in place, so a forward pass through it includes them.
    """
    unwrap = getattr(model, "get_base_model", None)
    return unwrap() if unwrap is not None else model


def lora_targets(model: nn.Module, lora: LoraConfig) -> str | list[str]:
    """Return PEFT's `target_modules`.

    In a mixture of experts "all-linear" is the attention's layers alone: PEFT would translate the
    names of other layers into those of the fused experts, whose adapters no engine reads.
    """
    if not isinstance(lora.target_modules, str):
        return list(lora.target_modules)
    if not any(".experts." in name for name, _ in model.named_parameters()):
        return lora.target_modules
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".self_attn." in name
    ]
