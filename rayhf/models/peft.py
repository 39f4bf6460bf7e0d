"""The Hugging Face model inside a PEFT wrapper."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def base_model(model: nn.Module) -> PreTrainedModel:
    """Return the Hugging Face model that PEFT wraps, or the model itself where PEFT does not.

    Its layers carry the adapters in place, so a forward pass through it includes them.
    """
    unwrap = getattr(model, "get_base_model", None)
    return unwrap() if unwrap is not None else model
